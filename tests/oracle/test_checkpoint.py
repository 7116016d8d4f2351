"""Checkpointed runs: every bit of the run without, in the memory of one block."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import families
import pytest
import torch
from patching_cases import assert_same, pairs_task
from torch import Tensor

import mechattr as ma
import mechattr.models.taps as taps_module
from mechattr.engines.memory import peak
from mechattr.errors import UnsupportedFeatureError
from mechattr.models import Batch, Edit, HookedHF, PlainConfig, Rules, Scale, Set, Zero, plain_model
from mechattr.models.base import Start

RULES = (None, Rules.relp(), Rules(hold={0}, pattern="detached", activation="secant"))
EDITS = (
    Edit("resid_mid", Scale(0.7), layers=[1]),
    Edit("attn_out", Scale(0.7), layers=[1]),
    Edit("z", Zero(), layers=[0], heads=[1], positions=[-1]),
)


def plain() -> Any:
    return plain_model(PlainConfig.llama_like(n_layers=3, d_vocab=61))


def visited(model: Any, batch: Batch, **how: Any) -> dict[str, tuple[Tensor, Tensor]]:
    found: dict[str, tuple[Tensor, Tensor]] = {}
    model.run(batch, metric=families.probe, visit=lambda n, x, g: found.__setitem__(n, (x.clone(), g.clone())), **how)
    return found


def assert_every_bit(model: Any, **how: Any) -> None:
    """Activations and gradients at all sites, stored and visited."""
    batch, sites = families.ragged("left"), list(model.sites())
    batch = families.with_source(batch) if model.info.n_encoder_layers else batch
    how["edits"] = [edit for edit in how.get("edits", ()) if model.supports(edit.site)]
    if "start" in how:
        sites = [n for n in sites if n.startswith("blocks.1.")]
    runs = [
        model.run(batch, record=sites, gradients=sites, metric=families.probe, checkpoint=on, **how)
        for on in (False, True)
    ]
    assert torch.equal(runs[0].logits, runs[1].logits)
    for name in sites:
        assert torch.equal(runs[0].activations[name].values, runs[1].activations[name].values), name
        assert torch.equal(runs[0].gradients[name].values, runs[1].gradients[name].values), name
    one, other = (visited(model, batch, gradients=sites, checkpoint=on, **how) for on in (False, True))
    assert one.keys() == other.keys()
    for name, (x, g) in one.items():
        assert torch.equal(other[name][0], x) and torch.equal(other[name][1], g), name


@pytest.mark.parametrize("family", families.EVERY)
def test_every_bit_of_every_family(family: str) -> None:
    assert_every_bit(families.hooked(family), edits=EDITS)


@pytest.mark.parametrize("rules", RULES, ids=("none", "relp", "hold"))
@pytest.mark.parametrize("make", (plain, lambda: families.hooked("llama"), lambda: families.hooked("gpt_neox")))
def test_every_bit_under_rules(make: Any, rules: Rules | None) -> None:
    assert_every_bit(make(), rules=rules, edits=EDITS)


def test_every_bit_with_sdpa_float64_padding_and_a_start() -> None:
    assert_every_bit(families.hooked("llama", attention="sdpa"))
    assert_every_bit(families.hooked("gpt2", torch.float64))
    for model in (plain(), families.hooked("gpt2")):
        stream = model.run(families.ragged("left"), record="resid_pre").activations["blocks.1.hook_resid_pre"].values
        assert_every_bit(model, start=Start(1, stream))


def test_an_operator_that_changes_its_mind_shows() -> None:
    """Control of the tests above: a block is truly computed again, edits included."""
    calls: list[int] = []

    def fickle(x: Tensor, _place: object) -> Tensor:
        calls.append(1)
        return x * len(calls)

    model = plain()
    with pytest.raises(AssertionError):
        assert_every_bit(model, edits=[Edit("mlp_pre", fickle, layers=[1])])
    calls.clear()
    model.run(
        families.ragged(),
        metric=families.probe,
        gradients="z",
        edits=[Edit("mlp_pre", fickle, layers=[1])],
        checkpoint=True,
    )
    assert len(calls) == 2


@pytest.mark.parametrize("make", (plain, lambda: families.hooked("llama")))
def test_several_passes_over_one_tape(make: Any) -> None:
    model, batch, sites = make(), families.ragged(), ("z", "mlp_pre", "resid_pre", "rot_k")

    def passes(checkpoint: bool) -> list[dict[str, Tensor]]:
        tape = model.tape(batch, metric=families.probe, gradients=sites, checkpoint=checkpoint)
        start = "blocks.1.hook_resid_pre"
        found: list[dict[str, Tensor]] = []
        middle = {start: torch.ones_like(tape.logits[..., : model.info.d_model])}
        for at, last in ((None, False), (middle, False), (None, True)):
            found.append({})
            tape.pull_back(lambda n, x, g: found[-1].__setitem__(n, x * g), at, last=last)
        return found

    once, again = passes(False), passes(True)
    for one, other in zip(once, again, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert again[1].keys() < again[0].keys()


def deep(kind: str) -> Any:
    if kind == "plain":
        config = PlainConfig.llama_like(n_layers=12, d_model=64, n_heads=4, n_kv_heads=4, d_head=16, d_mlp=128)
        return plain_model(config, dtype="float32")
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=12,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=29,
        attn_implementation="eager",
    )
    return HookedHF(transformers.LlamaForCausalLM(config).eval().requires_grad_(False))


@pytest.mark.parametrize("kind", ("plain", "llama"))
def test_memory_is_that_of_a_block(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = deep(kind)
    ids = torch.randint(0, 29, (4, 16), generator=torch.Generator().manual_seed(0))

    def used(checkpoint: bool) -> int:
        how: dict[str, Any] = {"gradients": ("q", "k", "v", "z", "mlp_post"), "checkpoint": checkpoint}
        model.run(Batch.of(ids), metric=families.probe, visit=lambda *_: None, **how)
        return peak(lambda: model.run(Batch.of(ids), metric=families.probe, visit=lambda *_: None, **how))

    plainly, checkpointed = used(False), used(True)
    assert checkpointed < 0.35 * plainly
    # control: sites that hold their activations, so that blocks free little
    held: list[Tensor] = []
    call = taps_module.Taps.__call__

    def holding(self: Any, name: str, x: Tensor) -> Tensor:
        held.append(x)
        return call(self, name, x)

    monkeypatch.setattr(taps_module.Taps, "__call__", holding)
    assert used(True) > 0.35 * plainly


@pytest.mark.parametrize("kind", ("plain", "llama"))
def test_nothing_is_left(kind: str) -> None:
    model = plain() if kind == "plain" else families.hooked("llama")
    hooks = families.hooks_of(model) if kind == "llama" else []
    seen: list[weakref.ref[Tensor]] = []
    edit = Edit("mlp_pre", lambda x, place: seen.append(weakref.ref(x)) or x)
    gc.disable()  # what is left then is held by a cycle or by the model
    try:
        for last in (True, False):
            tape = model.tape(
                families.ragged(), edits=[edit], metric=families.probe, gradients=("z", "mlp_pre"), checkpoint=True
            )
            tape.pull_back(lambda *_: None, last=last)
            tape = None
            assert len(seen) > model.info.n_layers
            assert all(ref() is None for ref in seen)
    finally:
        gc.enable()
    if kind == "llama":
        assert families.hooks_of(model) == hooks
        assert not any("forward" in m.__dict__ for m in model.model.modules())


def test_a_visit_that_raises_leaves_a_usable_tape() -> None:
    model = families.hooked("llama")
    hooks = families.hooks_of(model)
    tape = model.tape(families.ragged(), metric=families.probe, gradients="z", checkpoint=True)

    def stop(*_: object) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        tape.pull_back(stop)
    found: list[str] = []
    tape.pull_back(lambda name, x, g: found.append(name), last=True)
    assert len(found) == model.info.n_layers
    assert families.hooks_of(model) == hooks


def test_without_a_gradient_it_changes_nothing() -> None:
    model, batch = plain(), families.ragged()
    cut = [Edit("resid_post", Set(torch.ones(16)), layers=[2])]
    for how in ({"record": "z"}, {"metric": families.probe, "gradients": "z", "edits": cut}):
        one, other = (model.run(batch, checkpoint=on, **how) for on in (False, True))
        assert torch.equal(one.logits, other.logits)
        assert all(torch.equal(one.gradients[n].values, other.gradients[n].values) for n in one.gradients)


def test_a_backend_that_cannot_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = plain()
    monkeypatch.setattr(type(model), "checkpoints", False)
    text = "checkpoint=True\n  found: backend 'plain' cannot compute a block again during a backward pass\n  fix: leave"
    for run in (model.run, model.tape):
        with pytest.raises(UnsupportedFeatureError, match=text):
            run(families.ragged(), metric=families.probe, gradients="z", checkpoint=True)


@pytest.mark.parametrize("variant", ("atp", "qk", "hedged"))
def test_attribution_patching_checkpointed(variant: str) -> None:
    model = deep("llama")
    task = pairs_task(model, (16,) * 4)

    def run(checkpoint: bool) -> ma.Attribution:
        return ma.attribution_patching(model, task, variant=variant, checkpoint=checkpoint, progress=False)

    once, again = run(False), run(True)
    assert_same(once, again, 0.0)
    assert again.passes == (once.passes.forward + once.passes.backward, once.passes.backward)
    if variant == "atp":  # the QK fix keeps queries, keys, values and scores of the base run
        assert peak(lambda: run(True)) < 0.5 * peak(lambda: run(False))


def test_edge_attribution_checkpointed() -> None:
    model = deep("llama")
    task = pairs_task(model, (16,) * 4)
    results = [ma.edge_attribution(model, task, steps=3, checkpoint=on, progress=False) for on in (False, True)]
    for name, table in results[0].tensors.items():
        assert torch.equal(table.values.nan_to_num(), results[1].tensors[name].values.nan_to_num())
    assert [tuple(r.passes) for r in results] == [(20.0, 12.0), (32.0, 12.0)]
