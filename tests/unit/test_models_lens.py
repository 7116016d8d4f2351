"""The TransformerLens backend: how a model gets there, what it leaves behind, what it refuses, and caches."""

from __future__ import annotations

import gc
from types import SimpleNamespace
from typing import Any

import backends
import families
import pytest
import torch
from test_models_state import Stop, live, state, stop
from transformer_lens import ActivationCache
from transformer_lens.model_bridge import TransformerBridge

import mechattr as ma
from mechattr.errors import (
    ModelStateError,
    SettingError,
    UnknownSiteError,
    UnsupportedFeatureError,
    UnsupportedModelError,
)
from mechattr.models import Add, Batch, Edit, Rules, Zero, from_transformer_lens_cache, to_transformer_lens_cache
from mechattr.models.lens import HookedLens
from mechattr.models.lens_boot import boot

BATCH = Batch.of(families.tokens())


def hooks(bridge: Any) -> dict[str, tuple[int, int]]:
    """Of each hook point: hooks that TransformerLens knows of, and hooks that torch has."""
    return {name: (len(p.fwd_hooks), len(p._forward_hooks)) for name, p in bridge.hook_dict.items()}


def test_a_model_is_loaded_and_stays_as_it_is(tmp_path: Any) -> None:
    bare = families.hooked("gpt2").model
    before, logits = state(bare), bare(BATCH.tokens).logits
    model = ma.load(bare, tokenizer=families.tokenizer(), backend="transformer_lens")
    assert state(bare) == before
    torch.testing.assert_close(model.run(BATCH).logits, logits, rtol=0, atol=1e-5)  # float32, another order of sums
    bare.save_pretrained(tmp_path)
    families.tokenizer().save_pretrained(tmp_path)
    again = ma.load(tmp_path, backend="transformer_lens")
    assert again.info.name == tmp_path.name
    assert again.fingerprint() == ma.load(tmp_path).fingerprint() == model.fingerprint()
    assert torch.equal(again.tokenize("a b").tokens, ma.load(tmp_path).tokenize("a b").tokens)
    assert repr(again).startswith(f"HookedLens('{tmp_path.name}', gpt2, 2 layers")


def test_a_bridge_is_wrapped_and_its_hooks_stay_and_act() -> None:
    bridge = backends.bridge("llama")
    model = ma.load(bridge, backend="transformer_lens")
    assert model.bridge is bridge and model.tokenizer is bridge.tokenizer
    plain, before = model.run(BATCH).logits, hooks(bridge)
    bridge.add_hook("blocks.0.attn.hook_z", lambda z, hook: z * 0)
    mine = hooks(bridge)
    assert mine != before
    zero = model.run(BATCH, edits=[Edit("z", Zero(), layers=[0])], record="z")
    assert torch.equal(model.run(BATCH).logits, zero.logits) and not torch.equal(zero.logits, plain)
    assert hooks(bridge) == mine
    bridge.reset_hooks()
    assert torch.equal(model.run(BATCH).logits, plain)
    with pytest.raises(SettingError, match=r"(?s)TransformerLens has rewritten.*use backend='transformer_lens'"):
        ma.load(bridge)
    with pytest.raises(SettingError, match="dtype for a model that is loaded already"):
        ma.load(bridge, backend="transformer_lens", dtype="float64")


def test_a_run_leaves_nothing_behind() -> None:
    model = backends.lens("gpt2")
    bridge = model.bridge
    bridge.set_use_split_qkv_input(True)  # takes ln1 out of the network, and is turned off for the run
    before = hooks(bridge)
    try:
        for kwargs in ({}, {"edits": [Edit("result", stop)]}, {"gradients": "result", "metric": stop}):
            try:
                run = model.run(BATCH, record=("ln1", "result", "resid_mid", "ln1_scale"), **kwargs)
                assert run.activations["result", 0].values.any()
            except Stop:
                assert kwargs
            assert hooks(bridge) == before
            assert bridge.cfg.use_split_qkv_input and not bridge.cfg.use_attn_result
    finally:
        bridge.set_use_split_qkv_input(False)
    with pytest.raises(ModelStateError, match="an edit runs the model that it edits"):
        model.run(BATCH, edits=[Edit("z", lambda x, place: model.run(BATCH) and x)])
    assert hooks(bridge) == before


def test_a_hundred_runs_leave_no_tensor_alive() -> None:
    model, batch = backends.lens("gpt2"), Batch.of(families.tokens(1, 4))

    def run() -> None:
        sites = ("z", "mlp_post", "resid_mid", "ln1_scale", "pattern")
        model.run(batch, record=sites, edits=[Edit("z", Add(0.1))], metric=families.probe, gradients=sites)

    run()
    gc.collect()
    before = live()
    gc.disable()  # what is left then is held by a cycle or by the model
    try:
        for _ in range(100):
            run()
        assert live() <= before
    finally:
        gc.enable()


def test_rules_other_than_hold_are_refused() -> None:
    model = backends.lens("gpt2")
    assert model.supports(Rules()) and model.supports(Rules(hold={0})) and not model.supports(Rules.relp())
    assert model.supports("z") and model.supports(Zero()) and not model.supports("mlp_pre_linear")
    with pytest.raises(UnsupportedFeatureError, match=r"(?s)Rules\(norm='frozen'.*inside the bridge.*backend='hf'"):
        model.run(BATCH, metric=families.probe, gradients="z", rules=Rules(norm="frozen"))
    other = backends.lens("gpt_neox")
    with pytest.raises(UnknownSiteError, match="site 'rot_q'\n  found: this model has no such site"):
        other.run(BATCH, record="rot_q")


def test_folded_weights_are_refused_and_aliases_alone_are_not() -> None:
    bridge = backends.bridge("gpt2")
    bridge.enable_compatibility_mode(no_processing=True)
    model = HookedLens(bridge)
    wanted = families.hooked("gpt2").run(BATCH, record="resid_mid")
    found = model.run(BATCH, record="resid_mid")
    torch.testing.assert_close(found.logits, wanted.logits, rtol=0, atol=1e-5)  # float32, another order of sums
    folded = backends.bridge("gpt2")
    kept = HookedLens(folded)
    folded.enable_compatibility_mode()
    for call in (lambda: HookedLens(folded), lambda: kept.run(BATCH)):
        with pytest.raises(UnsupportedModelError, match=r"(?s)processed weights.*folded its norms.*no_processing=True"):
            call()


def test_multimodal_models_are_refused_before_anything_is_booted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TransformerBridge, "boot_transformers", lambda *args, **kwargs: stop())
    model = SimpleNamespace(config=SimpleNamespace(vision_config=object()))
    with pytest.raises(UnsupportedModelError, match=r"(?s)multimodal \(vision_config\).*installs torchvision"):
        boot(model, families.tokenizer())
    with pytest.raises(Stop):  # the control: another model is booted
        boot(families.hooked("gpt2").model, families.tokenizer())
    bridge = SimpleNamespace(original_model=0, hook_dict=0, blocks=0, cfg=SimpleNamespace(is_multimodal=True))
    with pytest.raises(UnsupportedModelError, match="a bridge of a multimodal model"):
        HookedLens(bridge)


def test_what_cannot_be_run_is_refused() -> None:
    model = families.hooked("gpt2")
    cases = [
        (lambda: ma.load(model.model, backend="transformer_lens"), SettingError, "(?s)without a tokenizer.*tokenizer="),
        (lambda: HookedLens(model.model), UnsupportedModelError, "a GPT2LMHeadModel as a bridge"),
        (lambda: HookedLens(backends.bridge("opt")), UnsupportedModelError, "a bridge of family 'opt'"),
        (lambda: ma.load(ma.models.plain_model(ma.models.PlainConfig()), backend="transformer_lens"),
         SettingError, "it is no transformers model"),
        (lambda: backends.lens("gpt2").generate(BATCH, num_beams=2), SettingError, r"settings \['num_beams'\]"),
        (lambda: backends.lens("gpt2").generate(families.ragged("right")), SettingError, "rows end in padding"),
        (lambda: backends.lens("bert").generate(BATCH), SettingError, "an encoder does not generate"),
        (lambda: backends.lens("gpt2").attention(7), SettingError, "the attention of block 7"),
        (lambda: backends.lens("llama", torch.float64).run(families.ragged("left")), SettingError, "left in float64"),
    ]  # fmt: skip
    for call, error, text in cases:
        with pytest.raises(error, match=text):
            call()
    bridge = backends.bridge("gpt2")
    hooked = HookedLens(bridge)
    bridge.train()
    with pytest.raises(ModelStateError, match=r"(?s)training mode.*call bridge.eval\(\)"):
        hooked.run(BATCH)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_recordings_are_activation_caches(family: str) -> None:
    """Of the reference backend, beside the bridge's own cache."""
    ours, bridge = families.hooked(family), backends.lens(family).bridge
    recorded = ours.run(BATCH, record=ours.sites()).activations
    cache = to_transformer_lens_cache(recorded, bridge)
    with torch.no_grad():
        _, theirs = bridge.run_with_cache(BATCH.tokens)
    for name in set(cache.keys()) & set(theirs.keys()):
        found, wanted = (c[name].masked_fill(c[name] < -1e4, 0) for c in (cache, theirs))
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)  # float32, another order of sums
    for call in (
        lambda c: c.accumulated_resid(apply_ln=True, incl_mid=True),
        lambda c: c.decompose_resid(layer=1),
        lambda c: c.stack_head_results(layer=2),
        lambda c: c["z", 1],
        lambda c: c["scale", 0, "ln1"],
    ):
        torch.testing.assert_close(call(cache), call(theirs), rtol=1e-5, atol=1e-5)  # the same
    assert isinstance(to_transformer_lens_cache(recorded), ActivationCache)
    with pytest.raises(SettingError, match="found: a HookedHF\n  fix: give a TransformerBridge"):
        to_transformer_lens_cache(recorded, ours)


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "bert"])
def test_activation_caches_are_recordings(family: str) -> None:
    ours, model = families.hooked(family), backends.lens(family)
    wanted = ours.run(BATCH, record=model.sites()).activations
    with torch.no_grad():
        _, cache = model.bridge.run_with_cache(BATCH.tokens)
        one = model.bridge.run_with_cache(BATCH.tokens[:1], remove_batch_dim=True)[1]
        some = model.bridge.run_with_cache(BATCH.tokens, names_filter=["blocks.1.hook_in", "blocks.1.mlp.hook_in"])[1]
    found = from_transformer_lens_cache(cache)
    lacking = {"gpt2": {"rot_q", "rot_k", "result"}, "gemma2": {"result"}, "bert": {"rot_q", "rot_k", "embed"}}[family]
    assert {n for n in wanted if n not in found} == {n for n in wanted if ma.sites.parse(n)[0] in lacking}
    for name in set(wanted) & set(found):
        x, y = (c[name].values.masked_fill(c[name].values < -1e4, 0) for c in (found, wanted))
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)  # float32, another order of sums
    if family == "bert":
        wrong = ("hook_embed", "blocks.0.hook_attn_out", "blocks.0.hook_resid_mid", "blocks.0.attn.hook_pattern")
        assert all(name in cache.cache_dict and name not in found for name in wrong)
    torch.testing.assert_close(
        from_transformer_lens_cache(one)["ln1_scale" if family != "bert" else "z", 0].values[0],
        wanted["ln1_scale" if family != "bert" else "z", 0].values[0], rtol=1e-5, atol=1e-5,  # float32, one row alone
    )  # fmt: skip
    assert list(from_transformer_lens_cache(some)) == ["blocks.1.hook_resid_pre"]
    back = from_transformer_lens_cache(to_transformer_lens_cache(wanted, model))
    assert set(wanted) - set(back) == ({"hook_embed"} if family == "bert" else set())
    assert all(torch.equal(back[name].values, wanted[name].values) for name in back)
    with pytest.raises(SettingError, match="none of them is a site"):
        from_transformer_lens_cache(ActivationCache({"blocks.0.attn.hook_in": BATCH.tokens}, None))
