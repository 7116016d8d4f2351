"""Evidence that the weights plant: one head copies the number at one position, so every method has to point there."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path

import pytest
from agreement_model import agreement_model, planted_samples

import mechattr as ma
from mechattr.evaluation import EvidenceScores

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the analyses are not part of the package

from circuits.agreement_methods import METHODS

SAMPLES = planted_samples()
# What the heads wrote is nearly all of the stream that the final norm divides by its size, so the logit is saturated
# and its gradient with respect to that is small: the size of gradients, no decomposition, is tested without norms.
CASES = [(name, norm) for name in METHODS for norm in ("none", "rms") if (name, norm) != ("gradient norm", "rms")]


@cache
def scores(looks_at: int, norm: str) -> EvidenceScores:
    return ma.evaluation.evidence_benchmark(agreement_model(looks_at, norm), SAMPLES, METHODS)


@pytest.mark.parametrize(("name", "norm"), CASES)
def test_every_method_points_at_the_position_that_the_head_copies(name: str, norm: str) -> None:
    found = scores(1, norm)
    assert found.accuracy == 1
    for metric in ("PG_1", "PG_2", "MRR", "RRA"):
        assert found.values(name, metric).tolist() == [1] * len(SAMPLES), metric


@pytest.mark.parametrize(("name", "norm"), CASES)
def test_no_method_points_there_when_the_head_copies_an_attractor(name: str, norm: str) -> None:
    """Negative control: the same words and the same right answers, from the other noun."""
    found = scores(4, norm)
    assert found.accuracy == 1
    assert found.values(name, "PG_1").tolist() == [0] * len(SAMPLES)


def test_the_planted_sentences_have_attractors_between_noun_and_verb() -> None:
    assert len(SAMPLES) == 24
    assert {sample.evidence for sample in SAMPLES} == {(1,)}
    assert {sample.attractors[0] for sample in SAMPLES} == {4}
    assert len({sample.factors["construction"] for sample in SAMPLES}) >= 2
