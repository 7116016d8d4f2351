"""Attention that does not go through transformers' interface: done once more with taps in it, to the last bit."""

from __future__ import annotations

import families
import pytest
import torch
import transformers as tf
from patching_cases import pairs_task

from mechattr.errors import SelfCheckError, SettingError, UnsupportedModelError
from mechattr.models import Add, Batch, Edit, HookedHF, Zero, adapters
from mechattr.models.anatomy import Anatomy
from mechattr.models.architectures import REFUSED
from mechattr.models.families import FAMILIES
from mechattr.patching.edge_readers import tiles_of
from mechattr.patching.edge_run import EdgeRun
from mechattr.patching.graph import Graph

ADAPTED = tuple(name for name, c in families.configs().items() if FAMILIES[c.model_type].adapter)
INSIDE = ("v", "rot_q", "rot_k", "attn_scores", "pattern")
every_adapted = pytest.mark.parametrize("family", ADAPTED)


def test_every_adapter_has_a_family() -> None:
    assert {FAMILIES[families.configs()[name].model_type].adapter for name in ADAPTED} == set(adapters.ADAPTERS)


@every_adapted
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16), ids=str)
def test_taps_inside_attention_keep_every_bit(family: str, dtype: torch.dtype) -> None:
    """Of one block, so that the other one's is the model's own."""
    model = families.hooked(family, dtype)
    for batch in (Batch.of(families.tokens()), families.ragged("left"), families.ragged("right")):
        for layer in range(2):
            sites = [f"blocks.{layer}.attn.hook_{short}" for short in INSIDE]
            logits = model.run(batch, record=sites).logits
            assert torch.equal(logits[batch.mask], model.run(batch).logits[batch.mask])


@pytest.mark.parametrize("family", ("falcon", "falcon_groups", "falcon_alibi"))
def test_scores_of_falcon_in_sdpa_are_those_of_sdpa(family: str) -> None:
    """Its eager attention adds ALiBi twice, so that eager and sdpa are two models."""
    fused, eager = families.hooked(family, attention="sdpa"), families.hooked(family)
    for batch in (Batch.of(families.tokens()), families.ragged("left")):
        own = fused.run(batch).logits[batch.mask]
        close = {"rtol": 0, "atol": 1e-5 * float(own.abs().max())}  # float32, another order of sums
        for sites in (INSIDE, ["blocks.1.attn.hook_pattern"]):
            torch.testing.assert_close(fused.run(batch, record=sites).logits[batch.mask], own, **close)
        other = eager.run(batch).logits[batch.mask]
        if family == "falcon_alibi":
            assert float((own - other).abs().max()) > 100 * close["atol"]
        else:
            torch.testing.assert_close(other, own, **close)


@pytest.mark.parametrize("family", ("gptj", "gpt_neo", "bloom", "falcon_groups", "falcon_alibi"))
@pytest.mark.parametrize("site", ("k", "pattern", "v"))
def test_edits_reach_cached_keys(family: str, site: str) -> None:
    model, batch = families.hooked(family), families.ragged("left")
    edit = Edit(site, Zero() if site == "pattern" else Add(torch.linspace(-4, 4, 6)), positions=[1, -1, 8], layers=[0])
    how = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    cached = model.generate(batch, edits=[edit], **how).tokens
    assert torch.equal(cached, model.generate(batch, edits=[edit], use_cache=False, **how).tokens)


def without_alibi(module, tap, hidden_states, residual, alibi, attention_mask, **rest):
    return adapters.bloom(module, tap, hidden_states, residual, torch.zeros_like(alibi), attention_mask, **rest)


def with_the_mask_scaled(module, tap, query, key, value, attention_mask=None):
    return adapters.gptj(module, tap, query * 2, key, value, attention_mask)


@pytest.mark.parametrize(
    ("family", "wrong"), [("bloom", ("forward", without_alibi)), ("gptj", ("_attn", with_the_mask_scaled))]
)
def test_control_an_adapter_that_does_something_else_is_found_at_load(monkeypatch, family, wrong) -> None:
    monkeypatch.setitem(adapters.ADAPTERS, family, wrong)  # type: ignore[arg-type]
    with pytest.raises(
        SelfCheckError, match=r"with taps in it, it gives another residual stream than without\n  fix: "
    ):
        HookedHF(families.model(family))


@pytest.mark.parametrize("family", ("phi", "cohere", "cohere2", "stablelm_parallel", "gptj", "codegen", "falcon"))
def test_a_norm_that_attention_and_mlp_share_is_one_module(family: str) -> None:
    model = families.hooked(family)
    assert model.info.parallel and not {n for n in model.sites() if ".ln2." in n or "resid_mid" in n}
    one, two = model.norm("blocks.1.ln1"), model.norm("blocks.1.ln2")
    assert one is not None and two is not None and torch.equal(one.weight, two.weight)
    tiles = tiles_of(model, Graph.of(model.info))
    assert [tile.reads for tile in tiles[:2]] == ["blocks.0.hook_resid_pre"] * 2
    assert all(tile.norm is not None for tile in tiles[:4])


def test_control_a_shared_norm_that_is_taken_for_none_gives_other_edges(monkeypatch) -> None:
    model = families.hooked("phi")
    task = pairs_task(model)
    run = EdgeRun(model, task)
    wanted = model.run(task.clean, metric=task.metric).metric.double()
    close = {"rtol": 0, "atol": 1e-5 * float(wanted.abs().max())}  # float32
    torch.testing.assert_close(run.metric(run.graph.mask), wanted, **close)
    real = Anatomy.norm
    monkeypatch.setattr(Anatomy, "norm", lambda self, name: None if name.endswith("ln2") else real(self, name))
    with pytest.raises(AssertionError):
        torch.testing.assert_close(EdgeRun(model, task).metric(run.graph.mask), wanted, **close)


def test_tables_of_positions_run_out_and_biases_do_not() -> None:
    long = Batch.of(families.tokens(1, 65))
    for family in ("gptj", "codegen", "gpt_neo"):
        with pytest.raises(SettingError, match="a prompt of 65 tokens\n  found: the model has 64 positions"):
            families.hooked(family).run(long)
    for family in ("falcon", "falcon_alibi"):
        assert families.hooked(family).run(long).logits.isfinite().all()
    assert families.hooked("bloom").info.n_ctx == 2048  # what it was trained with; its config does not say
    assert families.hooked("roberta").info.n_ctx == 61  # of 64: positions begin behind the padding token, 2


def test_what_no_row_can_describe_is_refused() -> None:
    for name, text in (
        ("mamba", "recurrent: a state space in place of attention"),
        ("albert", "all its layers are one"),
    ):
        config = {"mamba": tf.MambaConfig, "albert": tf.AlbertConfig}[name]
        sizes = {"hidden_size": 8, "num_hidden_layers": 1, "vocab_size": 11}
        more = {"embedding_size": 8, "num_attention_heads": 2, "intermediate_size": 8} if name == "albert" else {}
        kind = {"mamba": tf.MambaForCausalLM, "albert": tf.AlbertForMaskedLM}[name]
        with pytest.raises(UnsupportedModelError, match=f"family '{name}'\n  found: .*{text}.*\n  fix: use "):
            HookedHF(kind(config(**sizes, **more)).eval())
    assert not REFUSED.keys() & FAMILIES.keys()
    bloom = {"vocab_size": 11, "hidden_size": 8, "n_layer": 1, "n_head": 2}
    for option in ("apply_residual_connection_post_layernorm", "slow_but_exact"):
        with pytest.raises(UnsupportedModelError, match=f"a hooked bloom model with {option}=True"):
            HookedHF(tf.BloomForCausalLM(tf.BloomConfig(**bloom, **{option: True})).eval())
    sizes = {"vocab_size": 11, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    with pytest.raises(UnsupportedModelError, match="a hooked electra model\n  found: projected embeddings"):
        HookedHF(tf.ElectraForMaskedLM(tf.ElectraConfig(**sizes, embedding_size=4)).eval())
