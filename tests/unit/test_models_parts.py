"""Norms and attention as functions: what the QK fix and methods of edges compute with outside the model."""

from __future__ import annotations

from typing import Any

import families
import pytest
import torch

from mechattr.errors import SettingError, UnknownNameError, UnsupportedFeatureError
from mechattr.models import Batch, PlainConfig, plain_model


def norm_inputs(model) -> dict[str, str]:
    """Norm -> the site that it reads."""
    middle = "hook_resid_pre" if model.info.parallel else "hook_resid_mid"
    last = model.info.n_layers - 1
    found = {f"blocks.{i}.ln1": f"blocks.{i}.hook_resid_pre" for i in range(last + 1)}
    found |= {f"blocks.{i}.ln2": f"blocks.{i}.{middle}" for i in range(last + 1)}
    return found | {"ln_final": f"blocks.{last}.hook_resid_post"}


def assert_norms(model, tolerance: float, *, swapped: bool = False) -> None:
    """Every norm, applied to what it reads, gives its recorded scale and output."""
    seen = {n: x.values for n, x in model.run(families.ragged("left"), record=model.sites()).activations.items()}
    mask = families.ragged("left").mask
    for name, source in norm_inputs(model).items():
        norm, x = model.norm(name), None
        if model.info.parallel and name.endswith("ln2") and f"{name}.hook_out" not in seen:
            name = name.replace("ln2", "ln1")  # one norm that attention and MLP share
        if f"{name}.hook_out" not in seen:
            assert norm is None, name
            continue
        x = seen[source][mask]
        norm = model.norm("ln_final" if swapped else name)
        assert not norm.weight.requires_grad
        torch.testing.assert_close(
            norm.scale(x), seen[f"{name}.hook_scale"][mask].to(norm.scale(x)), rtol=tolerance, atol=0
        )
        y = seen[f"{name}.hook_out"][mask]
        torch.testing.assert_close(norm(x), y.to(x), rtol=0, atol=tolerance * float(y.abs().max()))


NORMED = [f for f in families.FAMILIES if f == "modernbert" or f not in families.ENCODERS]  # the others are post-norm


@pytest.mark.parametrize("family", NORMED)
def test_norms_are_what_the_modules_compute(family):
    model = families.hooked(family)
    assert_norms(model, 1e-5)  # float32
    if family not in ("olmo", "olmo2", "olmo3", "exaone4"):  # norms without weights, or the final norm only
        with pytest.raises(AssertionError):  # control
            assert_norms(model, 1e-5, swapped=True)


@pytest.mark.parametrize("kind", ["gpt2_like", "llama_like", "attention_only", "linear"])
def test_norms_of_plain_networks(kind):
    assert_norms(plain_model(getattr(PlainConfig, kind)(d_vocab=61)), 1e-12)  # float64


def test_norms_are_computed_in_float32_or_wider():
    norm = families.hooked("gpt2").norm("ln_final")
    assert norm(torch.randn(2, 24).bfloat16()).dtype == torch.float32
    assert norm(torch.randn(2, 24).double()).dtype == torch.float64


def test_unknown_norms_are_refused():
    for model in (families.hooked("llama"), plain_model(PlainConfig())):
        for name in ("blocks.7.ln1", "ln_finale", "blocks.0.ln3"):
            with pytest.raises(
                UnknownNameError, match=rf"norm '{name}'\n  found: this model has no such norm\n  fix: "
            ):
                model.norm(name)
    with pytest.raises(
        UnsupportedFeatureError, match=r"norm ln_final\n  found: a post-norm encoder normalises the stream itself"
    ):
        families.hooked("bert").norm("ln_final")


def test_families_whose_writes_go_through_a_norm():
    found = {family for family in families.FAMILIES if families.hooked(family).info.write_norm}
    assert found == {"gemma2", "gemma3", "glm4", "olmo2", "olmo3", "exaone4"}
    assert not plain_model(PlainConfig()).info.write_norm


def position_bias(model, keys: int) -> torch.Tensor:
    """ALiBi, [head, 1, key]: slopes 2^(-8 h / heads) times the key's position, as the paper has it. Falcon scales it as
    it scales q.k, and its eager attention adds it twice."""
    if model.info.family not in ("bloom", "falcon") or model.info.rotary:
        return torch.zeros(())
    slopes = 2.0 ** (-8 / model.info.n_heads * torch.arange(1, model.info.n_heads + 1))
    bias = slopes[:, None, None] * torch.arange(keys)
    return bias if model.info.family == "bloom" else 2 * bias / model.info.d_head**0.5


def assert_attention(model, tolerance: float, **wrong: Any) -> None:
    """softmax(softcap(q.k s) + ALiBi + mask), with the sink if there is one, is the recorded pattern."""
    batch = Batch.of(families.tokens())
    seen = model.run(batch, record=("q", "k", "rot_q", "rot_k", "attn_scores", "pattern")).activations
    for layer in range(model.info.n_layers):
        form = model.attention(layer)
        q, k = (seen[wrong.get("sites", "rot_") + short, layer].values for short in "qk")
        k = k.repeat_interleave(q.shape[2] // k.shape[2], 2)
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * wrong.get("scaling", form.scaling)
        cap = wrong.get("softcap", form.softcap)
        scores = scores if cap is None else cap * torch.tanh(scores / cap)
        scores = scores + wrong.get("alibi", 1.0) * position_bias(model, q.shape[1])
        recorded, pattern = seen["attn_scores", layer].values, seen["pattern", layer].values
        masked = recorded < -1e30
        close = {"rtol": 0, "atol": tolerance * float(recorded[~masked].abs().max())}
        torch.testing.assert_close(scores[~masked], recorded[~masked], **close)
        scores = scores.masked_fill(masked, -torch.inf)
        if form.sinks is not None and wrong.get("sinks", True):
            scores = torch.cat([scores, form.sinks[None, :, None, None].expand(*scores.shape[:3], 1)], -1)
        found = scores.softmax(-1)[..., : k.shape[1]]
        torch.testing.assert_close(found, pattern, rtol=0, atol=10 * close["atol"])  # exp magnifies


@pytest.mark.parametrize("family", families.FAMILIES)
def test_attention_forms_reproduce_the_pattern(family):
    model = families.hooked(family)
    assert_attention(model, 1e-5)  # float32
    wrong = {"scaling": 1.1 * model.attention(0).scaling}
    special = {
        "gemma2": {"softcap": 300.0}, "gpt_oss": {"sinks": False},
        "bloom": {"alibi": 0.0}, "falcon_alibi": {"alibi": 0.5},
    }.get(family)  # fmt: skip
    rotated = {"sites": ""} if model.info.rotary else None  # q and k before their rotation
    for control in filter(None, (wrong, special, rotated)):
        with pytest.raises(AssertionError):
            assert_attention(model, 1e-5, **control)


def test_attention_forms_of_plain_networks_and_blocks_that_do_not_exist():
    model = plain_model(PlainConfig.llama_like(d_vocab=61))
    assert_attention(model, 1e-12)  # float64
    for each in (model, families.hooked("gpt2")):
        for layer in (-1, 2):
            with pytest.raises(SettingError, match=rf"the attention of block {layer}\n  found: blocks 0 to 1"):
                each.attention(layer)
