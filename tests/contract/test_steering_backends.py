"""Steering and integrated gradients on every backend: what the reference gives."""

from __future__ import annotations

from typing import Any

import families
import pytest
import torch
from backends import backend_model, bridge
from contract_state import state

from mechattr.engines.paths import path_gradients
from mechattr.errors import UnsupportedFeatureError
from mechattr.models.hf import HookedHF
from mechattr.models.lens import HookedLens
from mechattr.sites import full_name
from mechattr.steering import (
    GAct,
    ReFT,
    SteeringVector,
    act_add,
    from_direction,
    g_act,
    grains,
    iti,
    learned,
    mass_mean,
    mean_difference,
    pca,
    probe,
    reft,
)

KINDS = pytest.mark.parametrize("kind", ("lens-gpt2", "nnsight-gpt2", "nnsight-local-gpt2"))
SITE = full_name("resid_post", 0)
CLOSE: dict[str, Any] = {"rtol": 0, "atol": 1e-4}  # float32, and other sums in a bridge

PAIRS = [("a b a a", "a b a b"), ("b b a a", "b b a b"), ("b a a", "b a b"), ("a a a a", "a a a b"), ("b a", "b b")]
TRIPLES = [("a b a", " a", " b"), ("b b a", " a", " b"), ("b a", " a", " b"), ("a a a", " a", " b")]
BUILDERS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    **{f.__name__: (f, PAIRS, {"layers": [0, 1]}) for f in (mean_difference, mass_mean, pca, probe)},
    "iti": (iti, PAIRS, {"sites": "z"}),
    "grains": (grains, TRIPLES, {"layers": [0], "k": 1}),
    "g_act": (g_act, PAIRS, {"layers": [0, 1], "clusters": 2}),
    **{
        f"learned {loss}": (learned, TRIPLES, {"layers": [0, 1], "loss": loss, "steps": 2, "rate": 0.2})
        for loss in ("bidirectional", "cross_entropy")
    },
    "reft": (reft, TRIPLES, {"layers": [0, 1], "rank": 2, "steps": 2, "rate": 0.2}),
}


def reading(kind: str) -> Any:
    """A model of a backend with a tokenizer."""
    bare, tokenizer = families.model("gpt2"), families.tokenizer()
    if kind == "lens":
        return HookedLens(bridge("gpt2"), name="gpt2")
    if kind == "hf":
        return HookedHF(bare, tokenizer, name="gpt2")
    from mechattr.models.nnsight import HookedNNsight

    return HookedNNsight(bare, tokenizer, name="gpt2", remote=False if kind == "nnsight" else "local")


@pytest.mark.parametrize("kind", ("lens", "nnsight", "nnsight-local"))
@pytest.mark.filterwarnings("ignore:integrated gradients of")  # of a random network, at the default steps
def test_vectors_are_built_alike(kind: str) -> None:
    model, other = reading("hf"), reading(kind)
    for build, data, how in BUILDERS.values():
        if build is reft and kind == "nnsight-local":  # where what an edit sees stays where it runs
            with pytest.raises(UnsupportedFeatureError, match="backend 'nnsight' keeps states where the model runs"):
                build(other, data, **how)
            continue
        expected, found = (build(m, data, **how).tensors for m in (model, other))
        fewer = build(model, data[1:], **how).tensors
        assert found.keys() == expected.keys() == fewer.keys()
        for name, table in expected.items():
            torch.testing.assert_close(found[name].values, table.values, **CLOSE)
            with pytest.raises(AssertionError):  # control: other data
                torch.testing.assert_close(fewer[name].values, table.values, **CLOSE)


@KINDS
@pytest.mark.parametrize("operator", ("add", "norm_preserving", "ablate"))
def test_a_run_and_a_generation_are_steered_alike(kind: str, operator: str) -> None:
    model, other, batch = families.hooked("gpt2"), backend_model(kind), families.ragged("left")
    vector = SteeringVector.of({SITE: 4 * torch.randn(model.info.d_model)})
    before, clean = state(other, (batch,)), other.run(batch).logits[batch.mask]
    for positions in ("last", "all"):
        how: dict[str, Any] = {"multiplier": 1.5, "positions": positions, "operator": operator}
        with vector.apply(model, **how), vector.apply(other, **how):
            expected, found = (m.run(batch).logits[batch.mask] for m in (model, other))
            tokens = [m.generate(batch, max_new_tokens=2).tokens for m in (model, other)]
        torch.testing.assert_close(found, expected, **CLOSE)
        assert torch.equal(*tokens)
        with pytest.raises(AssertionError):  # control: not steered
            torch.testing.assert_close(clean, expected, **CLOSE)
    assert state(other, (batch,)) == before and torch.equal(other.run(batch).logits[batch.mask], clean)


@KINDS
@pytest.mark.filterwarnings("ignore:integrated gradients of")  # four steps are too few for the integral
def test_gradients_along_a_path_are_those_of_the_reference(kind: str) -> None:
    model, other, batch = families.hooked("gpt2"), backend_model(kind), families.ragged("right")
    for site, baseline in (("embed", "mean"), (SITE, "zero")):
        how: dict[str, Any] = {"site": site, "baseline": baseline, "steps": 4, "batch_size": 5}
        expected = path_gradients(model, batch, families.probe, **how)
        found = path_gradients(other, batch, families.probe, **how)
        torch.testing.assert_close(found.attributions, expected.attributions, rtol=0, atol=1e-3)  # of sizes up to 50
        torch.testing.assert_close(found.change, expected.change, **CLOSE)
        assert found.passes == expected.passes
        other_path = path_gradients(model, batch, families.probe, **{**how, "steps": 1})
        with pytest.raises(AssertionError):  # control: another path
            torch.testing.assert_close(found.attributions, other_path.attributions, rtol=0, atol=1e-3)


@KINDS
@pytest.mark.parametrize("which", ("reft", "g_act"))
def test_functions_of_the_state_steer_alike(kind: str, which: str) -> None:
    model, other = families.hooked("gpt2"), backend_model(kind)
    draw, d = torch.Generator().manual_seed(0), model.info.d_model
    rows, (w, c) = torch.linalg.qr(torch.randn(d, 3, generator=draw))[0].mT, torch.randn(2, 3, d, generator=draw)
    table = [rows, w / d**0.5, c[:, 0]] if which == "reft" else [c, w, c[:, 0]]
    found = (ReFT if which == "reft" else GAct).made(model, {SITE: table}, which, 0)
    for side in ("left", "right"):
        batch = families.ragged(side)
        before, clean = state(other, (batch,)), other.run(batch).logits[batch.mask]
        with found.apply(other, multiplier=0.0):
            assert torch.equal(other.run(batch).logits[batch.mask], clean)
        with found.apply(model, multiplier=2.0), found.apply(other, multiplier=2.0):
            expected, there = (m.run(batch).logits[batch.mask] for m in (model, other))
            if side == "left":
                tokens = [m.generate(batch, max_new_tokens=2).tokens for m in (model, other)]
                assert torch.equal(*tokens)
        torch.testing.assert_close(there, expected, **CLOSE)
        with pytest.raises(AssertionError):  # control: not steered
            torch.testing.assert_close(clean, expected, **CLOSE)
        assert state(other, (batch,)) == before and torch.equal(other.run(batch).logits[batch.mask], clean)


@pytest.mark.parametrize("name", ("learned bidirectional", "reft", "g_act", "act_add", "from_direction"))
def test_building_leaves_the_model_as_it_was_and_gives_the_same_again(name: str) -> None:
    model = reading("hf")
    direction = torch.ones(model.info.d_model)
    more = {
        "act_add": (act_add, PAIRS[:1], {"layers": [0]}),
        "from_direction": (from_direction, direction, {"layers": [0]}),
    }
    build, data, how = {**BUILDERS, **more}[name]
    before = state(model, ())
    found, again = (build(model, data, **how).tensors for _ in range(2))
    assert state(model, ()) == before
    assert all(torch.equal(again[n].values, table.values) for n, table in found.items())
