"""What builders of steering vectors and their arithmetic refuse, and what they say then."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import mechattr as ma
from mechattr.errors import MechattrError, SettingError
from mechattr.models.base import HookedModel
from mechattr.sites import Node
from mechattr.steering import (
    Condition,
    SteeringVector,
    condition,
    mass_mean,
    mean_difference,
    pca,
    probe,
    propensity,
    refusal,
)

PAIRS = [(f"I think that the {noun}s", f"I think that the {noun}") for noun in ("lion", "writer", "beggar", "cow")]
LIMITS: dict[str, Any] = {"tokens": [5], "max_kl": 100.0, "min_induced": -100.0}
SITE = "blocks.1.hook_resid_post"
ALWAYS = Condition.of(SITE, torch.ones(128), -2.0)


@pytest.fixture(scope="module")
def model() -> HookedModel:
    return ma.load("tiny")


def test_a_token_that_is_named_twice_counts_once(model: HookedModel) -> None:
    once, twice = (refusal(model, PAIRS, **{**LIMITS, "tokens": t}).settings["chosen"] for t in ([5, 9], [5, 9, 5]))
    assert once == twice


CASES: dict[str, tuple[Callable[[HookedModel], Any], str]] = {
    "first tokens are equal": (
        lambda m: mean_difference(m, PAIRS, layers=[1], positions=0),
        "a vector of mean_difference\n  found: no difference at blocks.1.hook_resid_post\n"
        "  fix: give other data, or read it at other positions or sites",
    ),
    "also of a probe": (
        lambda m: probe(m, PAIRS, layers=[1], positions=0),
        "a vector of probe\n  found: no difference at blocks.1.hook_resid_post\n"
        "  fix: give other data, or read it at other positions or sites",
    ),
    "one pair about its mean": (
        lambda m: pca(m, PAIRS[:1], layers=[1], variant="centred"),
        "variant='centred'\n  found: one pair\n  fix: give more: their mean is taken away",
    ),
    "one pair has no covariance": (
        lambda m: mass_mean(m, PAIRS[:1], layers=[1]),
        "a covariance at blocks.1.hook_resid_post\n  found: texts of one side that do not differ there\n"
        "  fix: give more pairs, or use mean_difference",
    ),
    "ridge": (
        lambda m: mass_mean(m, PAIRS, layers=[1], ridge=float("inf")),
        "ridge=inf\n  found: no positive number\n  fix: give a number above 0",
    ),
    "pairs": (
        lambda m: mean_difference(m, None, layers=[1]),  # type: ignore[arg-type]
        "pairs\n  found: none\n  fix: give (positive text, negative text) pairs",
    ),
    "triples": (
        lambda m: propensity(m, None),  # type: ignore[arg-type]
        "triples\n  found: none\n  fix: give (prompt, preferred answer, dispreferred answer) triples",
    ),
    "a fraction of a layer": (
        lambda m: mean_difference(m, PAIRS, layers=[1.0]),  # type: ignore[list-item]
        "layers=[1.0]\n  found: a model with layers 0 to 3\n  fix: name existing layers",
    ),
    "sites": (
        lambda m: mean_difference(m, PAIRS, sites=3),  # type: ignore[arg-type]
        "sites=3\n  found: no list of sites\n  fix: give a name, or a list of names or nodes",
    ),
    "refusal without a difference": (
        lambda m: refusal(m, PAIRS, **LIMITS, positions=[0]),
        "a direction of refusal\n  found: no difference at the positions [0]\n"
        "  fix: give pairs that differ there, or other positions",
    ),
    "refusal of everything": (
        lambda m: refusal(m, PAIRS, **{**LIMITS, "tokens": range(m.info.d_vocab)}),
        "tokens\n  found: all that there are\n  fix: give those with which the behaviour begins",
    ),
    "refusal held_out": (
        lambda m: refusal(m, PAIRS, **LIMITS, held_out="all"),  # type: ignore[arg-type]
        "held_out='all'\n  found: no share\n  fix: give a number between 0 and 1",
    ),
    "refusal limits": (
        lambda m: refusal(m, PAIRS, **{**LIMITS, "max_kl": "0.1"}),
        "max_kl='0.1'\n  found: a str\n  fix: give a number",
    ),
    "refusal rows": (
        lambda m: refusal(m, PAIRS, **LIMITS, batch_size=0),
        "batch_size=0\n  found: not a count\n  fix: give a whole number from 1",
    ),
    "one condition and another": (
        lambda _: ALWAYS and ALWAYS,
        "the truth of a gate\n  found: it decides row by row\n"
        "  fix: combine conditions with &, | and ~, and compare with None",
    ),
    "a threshold": (
        lambda _: Condition.of(SITE, torch.ones(128), float("nan")),
        "threshold=nan\n  found: no finite number\n  fix: give a number",
    ),
    "thresholds": (
        lambda m: condition(m, PAIRS, layers=[1], thresholds=[0.5, float("inf")]),
        "thresholds=[0.5, inf]\n  found: no finite numbers\n  fix: give some, or leave them out",
    ),
    "the direction of a condition": (
        lambda _: Condition.of(SITE, [1.0], 0.5),  # type: ignore[arg-type]
        f"a condition at {SITE}\n  found: a list\n  fix: give a tensor",
    ),
    "a list in place of a tensor": (
        lambda _: SteeringVector.of({SITE: [1.0] * 128}),  # type: ignore[dict-item]
        f"a direction at {SITE}\n  found: a list\n  fix: give a tensor of floating point numbers",
    ),
    "whole numbers": (
        lambda _: SteeringVector.of({SITE: torch.ones(128, dtype=torch.long)}),
        f"a direction at {SITE}\n  found: torch.int64\n  fix: give a tensor of floating point numbers",
    ),
    "a column, which would make a vector of positions": (
        lambda _: SteeringVector.of({SITE: torch.ones(128)}) * torch.ones(3, 1),  # type: ignore[operator]
        "a steering vector times tensor([[1.],\n        [1.],\n        [1.]])\n  found: a Tensor\n"
        "  fix: multiply vectors by numbers",
    ),
    "a head of the stream": (
        lambda _: SteeringVector.of({SITE: torch.ones(128)}).only([Node("resid_post", 1, head=3)]),
        f"the direction of L1H3 resid_post\n  found: no heads at {SITE}\n  fix: name sites, or nodes of heads",
    ),
}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_refused(model: HookedModel, case: str) -> None:
    call, text = CASES[case]
    with pytest.raises(SettingError) as error:
        call(model)
    assert isinstance(error.value, MechattrError)
    assert str(error.value) == text


def test_one_layer_needs_no_list(model: HookedModel) -> None:
    found = refusal(model, PAIRS, **LIMITS, layers=1)  # type: ignore[arg-type]
    assert found.settings["chosen"]["layer"] == 1  # type: ignore[index, call-overload]
