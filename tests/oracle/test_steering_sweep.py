"""Sweeps and evaluations of steering: against plain runs inside `apply`, one vector, multiplier and text at a time."""

from __future__ import annotations

import pytest
from torch.testing import assert_close

import mechattr as ma
from mechattr.models import HookedModel
from mechattr.steering import SteeringVector

NOUNS = ("rabbit", "lion", "shepherd", "writer", "gardener", "beggar")
PAIRS = [(f"I think that the {noun}s", f"I think that the {noun}") for noun in NOUNS]
TRIPLES = [
    ("The rabbits near the lion", " are tall", " is"),
    ("The rabbit", " is", " are"),
    ("I think that the shepherd", " sees", " see the lion"),
]
NEUTRAL = ["They say that the cow is tall", "The lion sees the rabbit near the beggar"]
MULTIPLIERS = (-1.5, 0.0, 0.5, 2.0)


@pytest.fixture(scope="module")
def model() -> HookedModel:
    return ma.load("tiny")


@pytest.fixture(scope="module")
def vector(model: HookedModel) -> SteeringVector:
    return ma.steering.mean_difference(model, PAIRS, layers=range(model.info.n_layers))


@pytest.mark.parametrize("operator", ["add", "norm_preserving", "ablate"])
def test_a_sweep_is_plain_runs_inside_apply(model: HookedModel, vector: SteeringVector, operator: str) -> None:
    how = {"multipliers": MULTIPLIERS, "operator": operator}
    found = ma.steering.sweep(model, vector, TRIPLES, neutral=NEUTRAL, batch_size=5, **how)
    for layer in range(model.info.n_layers):
        one = vector.only([f"blocks.{layer}.hook_resid_post"])
        for multiplier in MULTIPLIERS:
            with one.apply(model, multiplier, operator=operator):
                wanted = ma.steering.propensity(model, TRIPLES)
            values = found.tensors["propensity"].sel(layer=layer, multiplier=f"{multiplier:g}").values
            assert_close(values, wanted, rtol=1e-5, atol=1e-4)  # float32 logits, other batch shapes
