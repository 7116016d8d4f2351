"""What the bound on missed effects refuses, and what it says then."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from patching_cases import pairs_task, plain

import mechattr as ma
from mechattr.errors import EmptyTaskError, MechattrError, MismatchError, NonFiniteError, SettingError
from mechattr.patching.bound import missed_effect_bound
from mechattr.patching.bound_result import Bound
from mechattr.patching.sets import Sets
from mechattr.sites import Node
from mechattr.tasks.task import Task


@pytest.fixture
def model() -> Any:
    return plain("llama_like")


@pytest.fixture
def task(model: Any) -> Task:
    return pairs_task(model)


def bound_of(model: Any, task: Task, **settings: Any) -> Bound:
    return missed_effect_bound(model, task, **{"verified": [], "p": 0.05, "progress": False, **settings})


BAD: list[tuple[dict[str, Any], str]] = [
    ({"p": 0.0}, "p=0.0\n  found: it is out of range\n  fix: give a number between 0 and 1"),
    ({"p": 1.0}, "p=1.0"),
    ({"p": True}, "p=True"),
    ({"p": math.nan}, "p=nan"),
    ({"confidence": 0.5}, "confidence=0.5\n  found: it is out of range\n  fix: give a number between 0.5 and 1"),
    ({"confidence": 1}, "confidence=1"),
    ({"target": 0.0}, "target=0.0\n  found: it is out of range\n  fix: give a number between 0 and inf"),
    ({"target": math.inf}, "target=inf"),
    ({"seed": -1}, "seed=-1\n  found: no seed"),
    ({"resume": 3}, "resume=3\n  found: a int, no path\n  fix: give the path of a file, or None"),
    (
        {"budget": 12},
        "found: 9 passes for the prompts themselves and at least 4 samples are needed\n  fix: give a whole",
    ),
    ({"budget": 100.0}, "budget=100.0"),
    ({"verified": None}, "verified\n  found: a NoneType\n  fix: give exact effects or a list of Node"),
    ({"verified": ["z"]}, "verified\n  found: a str\n  fix: give exact effects or a list of Node"),
    ({"verified": [Node("z", 9, 1, 0)]}, "layer 9: layers run from 0 to 1"),
    ({"verified": [Node("z", 1, 1, 0)], "positions": "named"}, "found: nodes verified with 'aligned'\n  fix: leave"),
    ({"direction": "up"}, "direction 'up'"),
    ({"sites": "zz"}, "site 'zz'"),
    ({"batch_size": 0}, "batch_size=0"),
]


@pytest.mark.parametrize(("settings", "text"), BAD)
def test_bad_input(model: Any, task: Task, settings: dict[str, Any], text: str) -> None:
    with pytest.raises(MechattrError) as error:
        bound_of(model, task, **settings)
    assert text in str(error.value)


def test_what_was_verified_has_to_belong(model: Any, task: Task) -> None:
    estimates = ma.attribution_patching(model, task)
    with pytest.raises(SettingError, match="results of attribution_patching"):
        bound_of(model, task, verified=estimates)
    exact = ma.activation_patching(model, task, nodes=estimates.top(3))
    with pytest.raises(MismatchError, match="they were measured on other pairs"):
        bound_of(model, pairs_task(model, seed=1), verified=exact)
    with pytest.raises(MismatchError, match="weights"):
        bound_of(plain("gpt2_like"), task, verified=exact)
    with pytest.raises(SettingError, match="direction='denoising'\n  found: nodes verified with 'noising'"):
        bound_of(model, task, verified=exact, direction="denoising")
    none = torch.zeros(0, dtype=torch.long)
    empty = replace(task, clean=task.clean.rows(none), corrupt=task.corrupt.rows(none), spans=())
    with pytest.raises(EmptyTaskError, match="a task without pairs"):
        bound_of(model, empty)


def test_a_metric_that_is_not_finite_is_refused(model: Any, task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Sets, "effects", lambda _self, pairs, _chosen: torch.full((len(pairs),), math.nan))
    with pytest.raises(NonFiniteError, match=r"the effect of a set of nodes, on pair [012]\n  found: it is nan"):
        bound_of(model, task)
