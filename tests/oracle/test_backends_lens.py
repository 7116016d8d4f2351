"""The TransformerLens backend is the reference backend: activations, gradients, edits, tokens, at every shared site."""

from __future__ import annotations

import backends
import families
import pytest
import torch
from test_models_gradients import TOLERANCE, disagreements
from torch import Tensor

from mechattr.errors import UnknownSiteError, UnsupportedFeatureError
from mechattr.models import Add, Batch, Edit, Rules, Scale, Start
from mechattr.models.lens import FAMILIES
from mechattr.sites import parse

SMALL = {name: config.model_type for name, config in families.configs().items()}
NAMES = [name for name, kind in SMALL.items() if kind in FAMILIES]
ASKED = ("gpt2", "llama", "qwen3", "gpt_neox", "gemma2")
EVERY = pytest.mark.parametrize(
    "family", [name if name in (*ASKED, "bert") else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
)  # slow: the same comparison for the other families
CLOSE = 1e-5  # float32 rounding, of the largest value
ABSENT = {
    "gpt_neox": {"rot_q", "rot_k"},
    "gpt_neox_sequential": {"rot_q", "rot_k"},
    "phi3": {"rot_q", "rot_k"},
    "bert": {"attn_scores", "pattern", "result", "attn_out"},
}


def waved(x: Tensor, _place: object) -> Tensor:
    """A change that no norm takes back."""
    return x * (1.3 + 0.5 * torch.arange(x.numel()).sin().reshape(x.shape))


def gap(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1.0))


def real(name: str, x: Tensor, batch: Batch) -> Tensor:
    """The entries of a site that belong to real tokens; masked scores are left out."""
    if parse(name)[0] not in ("attn_scores", "pattern"):
        return x[batch.mask]
    seen = batch.mask[:, None, :, None] & batch.mask[:, None, None, :] & (x > -1e4)
    return x.masked_fill(~seen, 0)


@EVERY
@pytest.mark.parametrize("side", ["left", "right"])
def test_activations_and_gradients(family: str, side: str) -> None:
    ours, theirs, batch = families.hooked(family), backends.lens(family), families.ragged(side)
    assert set(theirs.sites()) <= set(ours.sites())
    assert {parse(name)[0] for name in set(ours.sites()) - set(theirs.sites())} == ABSENT.get(family, set())
    sites = theirs.sites()
    runs = [m.run(batch, record=sites, metric=families.probe, gradients=sites) for m in (ours, theirs)]
    assert gap(runs[1].logits[batch.mask], runs[0].logits[batch.mask]) < CLOSE
    for name in sites:
        for found, wanted in (
            (runs[1].activations[name], runs[0].activations[name]),
            (runs[1].gradients[name], runs[0].gradients[name]),
        ):
            assert gap(real(name, found.values, batch), real(name, wanted.values, batch)) < CLOSE, name


@EVERY
def test_edits(family: str) -> None:
    """One site after the other, at the second token of all layers."""
    ours, theirs, batch = families.hooked(family), backends.lens(family), Batch.of(families.tokens())
    plain = ours.run(batch).logits
    for short in dict.fromkeys(parse(name)[0] for name in theirs.sites()):
        edits = [Edit(short, waved, positions=[1])]
        wanted = ours.run(batch, edits=edits).logits
        assert gap(wanted, plain) > 1e-4, short  # the edit acts
        assert gap(theirs.run(batch, edits=edits).logits, wanted) < CLOSE, short


def test_finite_differences() -> None:
    with families.widened():
        found = disagreements(backends.lens("llama", torch.float64), Batch.of(families.tokens(2, 6)))
    assert max(found.values()) < TOLERANCE, {name: e for name, e in found.items() if e >= TOLERANCE}


def test_control_an_edit_of_its_own_resid_mid_misses_the_skip_path() -> None:
    ours, theirs, batch = families.hooked("llama"), backends.lens("llama"), Batch.of(families.tokens())
    wanted = ours.run(batch, edits=[Edit("resid_mid", Add(1.0), layers=[0])]).logits
    right = theirs.run(batch, edits=[Edit("resid_mid", Add(1.0), layers=[0])]).logits
    with theirs.bridge.hooks(fwd_hooks=[("blocks.0.hook_resid_mid", lambda x, hook: x + 1.0)]), torch.no_grad():
        wrong = theirs.bridge(batch.tokens)
    assert gap(right, wanted) < CLOSE < 0.05 < gap(wrong, wanted)


def test_control_its_pattern_of_an_encoder_does_not_act() -> None:
    theirs, batch = backends.lens("bert"), Batch.of(families.tokens())
    plain = theirs.run(batch).logits
    erased = [("blocks.0.attn.hook_pattern", lambda x, hook: x * 0)]
    with theirs.bridge.hooks(fwd_hooks=erased), torch.no_grad(), pytest.warns(UserWarning, match="edit is discarded"):
        assert torch.equal(theirs.bridge(batch.tokens), plain)
    for site in ("pattern", "attn_scores", "attn_out", "result"):
        with pytest.raises(UnknownSiteError, match=f"site '{site}'\n  found: this model has no such site"):
            theirs.run(batch, record=site)
    with pytest.raises(UnsupportedFeatureError, match="fix: use a decoder, or backend='hf'"):
        theirs.run(batch, metric=families.probe, gradients="z", rules=Rules(hold={0}))


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])
def test_a_run_from_the_middle_and_held_writes(family: str) -> None:
    ours, theirs, batch = families.hooked(family), backends.lens(family), families.ragged("right")
    start = Start(1, ours.run(batch, record="resid_pre").activations["resid_pre", 1].values)
    calls: list[int] = []
    handle = theirs._anatomy.parts[0]["down"].register_forward_hook(lambda *_: calls.append(1))
    assert gap(theirs.run(batch, start=start).logits[batch.mask], ours.run(batch).logits[batch.mask]) < CLOSE
    handle.remove()
    assert not calls
    with pytest.raises(UnsupportedFeatureError, match="the run starts at block 1: name sites from there on"):
        theirs.run(batch, record="blocks.0.attn.hook_z", start=start)
    held = [
        m.run(batch, metric=families.probe, gradients="resid_pre", rules=Rules(hold={1})).gradients["resid_pre", 0]
        for m in (ours, theirs)
    ]
    assert gap(held[1].values[batch.mask], held[0].values[batch.mask]) < CLOSE
    free = theirs.run(batch, metric=families.probe, gradients="resid_pre").gradients["resid_pre", 0]
    assert gap(free.values[batch.mask], held[0].values[batch.mask]) > 0.1


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "gemma2"])
def test_generation(family: str) -> None:
    ours, theirs, batch = families.hooked(family), backends.lens(family), families.ragged("left")
    tokens = []
    edits = [Edit("resid_post", Add(3 * torch.randn(24)), layers=[0], positions="generated")]
    edits.append(Edit("mlp_out", Scale(2.0), positions=[-1, 8]))
    for edit in ((), edits):
        found, wanted = (
            m.generate(batch, edits=edit, max_new_tokens=6, do_sample=False).tokens for m in (theirs, ours)
        )
        assert torch.equal(found, wanted)
        tokens.append(found)
    assert not torch.equal(*tokens)


def test_generation_stops_as_the_reference_does() -> None:
    ours, theirs, batch = families.hooked("gpt2"), backends.lens("gpt2"), families.ragged("left")
    free = ours.generate(batch, max_new_tokens=6, do_sample=False).tokens
    models, before = (ours.model, theirs.model), ours.model.generation_config.eos_token_id
    try:
        for model in models:
            model.generation_config.eos_token_id = int(free[0, 8])  # the second token that the first row gets
            model.generation_config.pad_token_id = 2
        found, wanted = (m.generate(batch, max_new_tokens=6, do_sample=False).tokens for m in (theirs, ours))
    finally:
        for model in models:
            model.generation_config.eos_token_id = before
    assert torch.equal(found, wanted)
    assert found[0, -1] == 2


@pytest.mark.parametrize("family", ["gpt2", "qwen3", "gemma2"])
def test_what_it_says_of_the_model(family: str) -> None:
    ours, theirs = families.hooked(family), backends.lens(family)
    assert ours.fingerprint()["weight_hash"] == theirs.fingerprint()["weight_hash"]
    names = [f"blocks.1.{n}" for n in ("attn.W_Q", "attn.b_K", "attn.W_O", "mlp.W_in", "mlp.b_out", "ln1.w")]
    for name in (*names, "embed.W_E", "unembed.W_U", "unembed.b_U", "ln_final.w"):
        assert torch.equal(ours.weight(name), theirs.weight(name)), name
    x = torch.randn(2, 24)
    for name in ("blocks.0.ln1", "blocks.1.ln2", "ln_final"):
        assert torch.equal(ours.norm(name)(x), theirs.norm(name)(x))
    for layer in range(2):
        mine, other = ours.attention(layer), theirs.attention(layer)
        assert (mine.scaling, mine.softcap) == (other.scaling, other.softcap)
    a, b = ours.info, theirs.info
    assert b.backend == "transformer_lens"
    same = [f for f in a.__dataclass_fields__ if f not in ("name", "backend")]
    assert [getattr(a, f) for f in same] == [getattr(b, f) for f in same]
