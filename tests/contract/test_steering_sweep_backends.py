"""Sweeps and evaluations of steering on every backend: what the reference gives, from the middle of the network."""

from __future__ import annotations

from typing import Any

import families
import pytest
import torch
from backends import bridge

import mechattr as ma
from mechattr.models.hf import HookedHF
from mechattr.models.lens import HookedLens
from mechattr.sites import full_name
from mechattr.steering import SteeringVector

TRIPLES = [("a b a", " a", " b"), ("b b a b a", " b", " a a"), ("b a", " a", " b")]
NEUTRAL = ["a b b a", "b a"]
CLOSE: dict[str, Any] = {"rtol": 0, "atol": 1e-4}  # float32, and other sums in a bridge


def reading(kind: str, family: str) -> Any:
    """A model of a backend with a tokenizer."""
    bare, tokenizer = families.model(family), families.tokenizer()
    if kind == "lens":
        return HookedLens(bridge(family), name=family)
    if kind == "hf":
        return HookedHF(bare, tokenizer, name=family)
    from mechattr.models.nnsight import HookedNNsight

    return HookedNNsight(bare, tokenizer, name=family, remote=False if kind == "nnsight" else "local")


def swept(model: Any, **how: Any) -> Any:
    generator, d = torch.Generator().manual_seed(0), model.info.d_model
    vector = SteeringVector.of(
        {full_name("resid_post", layer): torch.randn(d, generator=generator) for layer in (0, 1)}
    )
    return ma.steering.sweep(model, vector, TRIPLES, multipliers=(-1.0, 0.0, 2.0), neutral=NEUTRAL, **how)


@pytest.mark.parametrize("kind", ("lens", "nnsight", "nnsight-local"))
def test_a_sweep_gives_what_the_reference_gives(kind: str) -> None:
    model, reference = reading(kind, "gpt2"), reading("hf", "gpt2")
    for how in ({}, {"positions": "last", "operator": "norm_preserving"}):
        expected, found = swept(reference, **how), swept(model, **how)
        assert found.passes == expected.passes
        for name, table in expected.tensors.items():
            torch.testing.assert_close(found.tensors[name].values, table.values, **CLOSE)
        other = swept(reference, **{**how, "operator": "angular"})
        with pytest.raises(AssertionError):  # control: another operator
            torch.testing.assert_close(found.tensors["propensity"].values, other.tensors["propensity"].values, **CLOSE)


@pytest.mark.parametrize("family", ("gpt2", "llama", "gemma2", "qwen3", "phi", "mixtral"))
def test_a_restart_gives_what_apply_gives(family: str) -> None:
    model = reading("hf", family)
    found, d = swept(model, positions="all"), model.info.d_model
    generator = torch.Generator().manual_seed(0)
    for layer in (0, 1):
        vector = SteeringVector.of({full_name("resid_post", layer): torch.randn(d, generator=generator)})
        for m in (-1.0, 2.0):
            with vector.apply(model, m):
                wanted = ma.steering.propensity(model, TRIPLES)
            values = found.tensors["propensity"].sel(layer=layer, multiplier=f"{m:g}").values
            torch.testing.assert_close(values, wanted, rtol=1e-5, atol=1e-4)  # float32, other batch shapes
            assert not torch.allclose(values, found.base, rtol=1e-5, atol=1e-4)  # control: not steered


@pytest.mark.parametrize("kind", ("lens", "nnsight-local"))
def test_texts_are_written_alike(kind: str) -> None:
    model, reference = reading(kind, "gpt2"), reading("hf", "gpt2")
    vector = SteeringVector.of({full_name("resid_post", 0): torch.ones(model.info.d_model)})
    how: dict[str, Any] = {"multipliers": (0.0, 3.0), "positions": "generated", "random": 1, "generate": 3}
    expected, found = (ma.steering.evaluate(m, vector, TRIPLES, **how) for m in (reference, model))
    assert found.settings["texts"] == expected.settings["texts"]
    for name in ("perplexity", "repetition", "distinct_2"):
        torch.testing.assert_close(
            found.tensors[name].values, expected.tensors[name].values, rtol=1e-4, atol=0, equal_nan=True
        )  # float32
