"""Propensity: against log-probabilities token by token, one text at a time."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

import mechattr as ma
from mechattr.models import HookedModel

TRIPLES = [
    ("The rabbits near the lion", " are tall", " is"),
    ("The rabbit", " is", " are"),
    ("I think that the shepherd", " sees", " see the lion"),
]


@pytest.fixture(scope="module")
def model() -> HookedModel:
    return ma.load("tiny")


def by_hand(model: HookedModel, prompt: str, answer: str, *, late: int = 0) -> float:
    n, ids = len(model.tokenize(prompt).tokens[0]), model.tokenize(prompt + answer).tokens[0]
    log_p = model.run(model.tokenize(prompt + answer)).logits[0].double().log_softmax(-1)
    return sum(float(log_p[t - 1 + late, ids[t]]) for t in range(n, len(ids)))


@pytest.mark.parametrize("batch_size", [1, 4, 32])
def test_propensity_is_the_difference_of_log_probabilities(model: HookedModel, batch_size: int) -> None:
    found = ma.steering.propensity(model, TRIPLES, batch_size=batch_size)
    wanted = torch.tensor([by_hand(model, p, a) - by_hand(model, p, b) for p, a, b in TRIPLES])
    assert_close(found, wanted, rtol=1e-4, atol=1e-4)  # float32 logits, other batch shapes
    one_late = torch.tensor([by_hand(model, p, a, late=1) - by_hand(model, p, b, late=1) for p, a, b in TRIPLES])
    assert not torch.allclose(found, one_late, rtol=1e-4, atol=1e-4)  # reading behind the token


def test_inside_a_block_it_is_of_the_steered_model(model: HookedModel) -> None:
    pairs = [(f"I think that the {noun}s", f"I think that the {noun}") for noun in ("rabbit", "lion", "writer")]
    vector = ma.steering.mean_difference(model, pairs, layers=[1])
    before = ma.steering.propensity(model, TRIPLES)
    with vector.apply(model, multiplier=0.0):
        assert torch.equal(ma.steering.propensity(model, TRIPLES), before)
    with vector.apply(model, multiplier=3.0):
        assert not torch.allclose(ma.steering.propensity(model, TRIPLES), before, atol=0.1)
