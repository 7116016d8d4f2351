"""A vector in the biases of a copy: the same model as the steered one, or a refusal."""

from __future__ import annotations

from typing import Any

import families
import pytest
import torch
from patching_cases import plain
from steering_cases import vector

from mechattr.errors import (
    ModelStateError,
    SelfCheckError,
    SettingError,
    UnsupportedFeatureError,
    UnsupportedModelError,
)
from mechattr.models.hf import HookedHF
from mechattr.sites import full_name
from mechattr.steering import SteeringVector, merge

CLOSE: dict[str, Any] = {"rtol": 0, "atol": 1e-12}  # float64, sums in another order
SITES = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "z", "mlp_post")


def at(model: Any, short: str, layer: int = 1) -> SteeringVector:
    """A random direction at one site."""
    sizes = {"z": (model.info.n_heads, model.info.d_head), "mlp_post": (model.info.d_mlp,)}
    shape = sizes.get(short, (model.info.d_model,))
    return SteeringVector.of({full_name(short, layer): torch.randn(shape, generator=torch.Generator().manual_seed(0))})


def logits(torch_model: Any, batch: Any) -> torch.Tensor:
    with torch.no_grad():
        given = {"attention_mask": batch.mask.long(), "position_ids": batch.positions.clamp(min=0)}
        return torch_model(batch.tokens, **given).logits[batch.mask]


@pytest.mark.parametrize(
    "family", ["gpt2", "llama", "mistral", "gpt_neox"]
)  # the third has no biases, the last is parallel
def test_a_merged_copy_is_the_steered_model(family: str) -> None:
    with families.widened():  # transformers' norms compute in float32
        model = HookedHF(families.model(family, torch.float64), name=family)
        batch, own = families.ragged("left"), model.model
        clean, state = logits(own, batch), {name: x.clone() for name, x in own.state_dict().items()}
        settings = {"attention_mask": batch.mask.long(), "max_new_tokens": 4, "do_sample": False, "pad_token_id": 2}
        for short in SITES:
            if full_name(short, 1) not in model.sites():
                continue
            v = at(model, short)
            merged = v.merge_into_bias(own, 1.5)
            with v.apply(own, 1.5):
                steered, tokens = logits(own, batch), own.generate(batch.tokens, **settings)
            torch.testing.assert_close(logits(merged, batch), steered, **CLOSE)
            assert torch.equal(merged.generate(batch.tokens, **settings), tokens)
            with pytest.raises(AssertionError):  # control: not merged
                torch.testing.assert_close(clean, steered, **CLOSE)
            assert type(merged) is type(own) and torch.equal(logits(own, batch), clean)
        assert all(torch.equal(x, state[name]) for name, x in own.state_dict().items())
        several = at(model, "resid_post", 0) + 2 * at(model, "resid_post", 0)
        tensors = {**several.tensors, **at(model, "resid_pre").tensors, **at(model, "attn_out", 0).tensors}
        both = SteeringVector.of({name: table.values for name, table in tensors.items()})
        with both.apply(model):
            expected = model.run(batch).logits[batch.mask]
        torch.testing.assert_close(logits(both.merge_into_bias(model), batch), expected, **CLOSE)


@pytest.mark.parametrize("family", [name for name in families.SHAPES if name in families.DECODERS] + ["glm4", "llava"])
def test_every_family_is_merged_or_refused(family: str) -> None:
    """What is merged was compared with the steered model; what is refused says why."""
    model = families.hooked(family)
    for short in ("resid_post", "z"):
        if full_name(short, 1) not in model.sites():
            continue
        try:
            merged = at(model, short).merge_into_bias(model)
        except UnsupportedModelError as error:
            assert "a norm stands between" in error.found or "no linear layer that writes it" in error.found
            continue
        batch = families.ragged("right")
        with at(model, short).apply(model):
            expected = model.run(batch).logits[batch.mask]
        scale = float(expected.abs().max())
        torch.testing.assert_close(logits(merged, batch), expected, rtol=0, atol=1e-4 * scale)  # float32 sums


def overwritten(project: Any, change: torch.Tensor) -> None:
    project.bias = torch.nn.Parameter(change.to(project.weight.dtype))


def test_a_wrong_merge_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Controls: the bias of another projection, and a bias in place of the one that was there."""
    model, text = families.hooked("gpt2"), "logits that differ from the steered ones by"
    with monkeypatch.context() as wrong:
        wrong.setitem(merge.WRITERS, "mlp_out", ("o", False))
        with pytest.raises(SelfCheckError, match=text):
            at(model, "mlp_out", 0).merge_into_bias(model)
    monkeypatch.setattr(merge, "_add", overwritten)
    with pytest.raises(SelfCheckError, match=text):
        at(model, "mlp_out", 0).merge_into_bias(model)


def test_what_is_no_bias_is_refused() -> None:
    model, gemma = families.hooked("gpt2"), families.hooked("gemma2")
    v = vector(model)
    cases: list[tuple[SteeringVector, Any, dict[str, Any], type[Exception], str]] = [
        (v, model, {"operator": "ablate"}, SettingError, "operator='ablate'\n  found: a bias acts as operator='add'"),
        (v, model, {"positions": "generated"}, SettingError, "positions='generated'\n  found: a bias acts as"),
        (v, model, {"positions": [1]}, SettingError, r"positions=\[1\]"),
        (v, model, {"multiplier": [1.0, 2.0]}, SettingError, "fix: give one number for all rows"),
        (SteeringVector.of({v.sites[0]: torch.ones(2, 24)}), model, {}, SettingError, "a bias acts at all positions"),
        (vector(gemma), gemma, {}, UnsupportedModelError, "a norm stands between the projection and the residual"),
        (at(gemma, "attn_out"), gemma.model, {}, UnsupportedModelError, "a bias for blocks.1.hook_attn_out of a"),
        (at(model, "resid_pre", 0), model, {}, UnsupportedFeatureError, "found: no bias writes there\n  fix: merge"),
        (at(model, "ln1"), model, {}, UnsupportedFeatureError, "a bias for blocks.1.ln1.hook_out"),
        (vector(plain("gpt2_like")), plain("gpt2_like"), {}, UnsupportedFeatureError, "found: backend 'plain'"),
    ]  # fmt: skip
    for given, where, settings, kind, text in cases:
        with pytest.raises(kind, match=text):
            given.merge_into_bias(where, **settings)
    with v.apply(model.model), pytest.raises(ModelStateError, match="fix: merge outside of the block"):
        v.merge_into_bias(model.model)
    with v.apply(model), pytest.raises(ModelStateError, match="fix: merge outside of the block"):
        v.merge_into_bias(model)
