"""Costs of paths, edges, bounds and circuits told before anything is run, against what the methods then count."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
from estimate_cases import made, measured
from patching_cases import pairs_task, plain

import mechattr as ma
from mechattr.engines.memory import Course, peak
from mechattr.patching import EdgeAttribution
from mechattr.sites import Node
from mechattr.tasks.task import Task


@cache
def scored(kind: str) -> tuple[Task, EdgeAttribution]:
    """Three pairs that differ in every token, and scores of all edges on them."""
    task = pairs_task(made(kind), (16,) * 3, changed=range(16))
    return task, ma.edge_attribution(made(kind), task, method="eap", progress=False)


LAST = Node("resid_post", 1)
MORE: dict[str, tuple[str, Callable[[EdgeAttribution], dict[str, Any]]]] = {
    "paths": ("path_patching", lambda _: {"receivers": [Node("q", 1, head=0), LAST]}),
    "one sender": (
        "path_patching",
        lambda _: {"receivers": [Node("q", 1, 15, head=0)], "senders": [Node("z", 0, 14, head=1)], "mlps": "frozen"},
    ),
    "all edges": ("edge_patching", lambda _: {}),
    "some edges": ("edge_patching", lambda edges: {"edges": edges.top(12), "batch_size": 4, "direction": "denoising"}),
    "a bound": ("missed_effect_bound", lambda _: {"verified": [], "budget": 9 + 140}),
    "a bound by pair": (
        "missed_effect_bound",
        lambda _: {
            "verified": [Node("z", 1, 3, head=0)],
            "sites": ("z", "resid_pre"),
            "per_pair": True,
            "control": False,
            "p": 0.1,
            "budget": 6 + 130,
            "batch_size": 8,
        },
    ),
    "curves": ("faithfulness", lambda edges: {"edges": edges, "random": 1, "sizes": (0.05, 0.2)}),
    "a circuit": (
        "faithfulness",
        lambda edges: {"edges": edges.circuit(top=30), "random": 1, "ablation": "zero", "batch_size": 4},
    ),
    "nodes of a circuit": ("minimality", lambda edges: {"circuit": edges.circuit(top=30), "random": 1}),
    "edges of a circuit": (
        "minimality",
        lambda edges: {"circuit": edges.circuit(top=12, method="greedy"), "unit": "edge", "ablation": "mean"},
    ),
}


@pytest.mark.parametrize("name", MORE)
@pytest.mark.parametrize("kind", ("gpt2", "llama"))
def test_circuits_paths_and_bounds_are_told(kind: str, name: str) -> None:
    """Passes as counted and bytes as measured; every activation differs, so that bounds are reached."""
    model, (task, edges) = made(kind), scored(kind)
    method, make = MORE[name]
    how = make(edges)
    told = ma.estimate(model, task, method, **how)
    found: list[Any] = []
    used = peak(lambda: found.append(measured(method)(model, task, progress=False, **how)))
    assert 0.8 * used <= told.bytes <= 1.2 * used
    assert told.bytes == told.recorded + told.working
    assert told.backward == found[0].passes.backward
    assert told.at_most == (method not in ("faithfulness", "minimality"))
    assert told.forward == pytest.approx(found[0].passes.forward, abs=1e-9)  # sums of fractions in another order


def test_bounds_on_passes_are_bounds() -> None:
    """Prompts that differ late, and nodes so few that some samples have none."""
    model = plain("gpt2_like")
    task = pairs_task(model, changed=(2,))
    few: dict[str, Any] = {"verified": [], "sites": "z", "positions": "all", "p": 0.05, "budget": 300}
    for method, how in (
        ("path_patching", {"receivers": [LAST], "positions": "aligned"}),
        ("edge_patching", {}),
        ("missed_effect_bound", few),
    ):
        told, spent = ma.estimate(model, task, method, **how), measured(method)(model, task, **how)
        assert told.at_most
        assert (spent.passes.forward < told.forward) == (method != "edge_patching")  # the writers differ somewhere
        assert spent.passes.forward <= told.forward + 1e-9
    assert ma.estimate(model, task, "missed_effect_bound", **few).forward == 300
    last = ma.estimate(model, task, "path_patching", receivers=[Node("q", 0, head=0)])
    assert last.forward == 2 * len(task)  # no sender lies below: only the prompts are run


@pytest.mark.parametrize("name", ("paths", "all edges", "a bound", "curves", "nodes of a circuit"))
def test_an_estimate_of_a_short_prompt_is_outside(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: the peak of the made-up prompts themselves."""
    model, (task, edges) = made("gpt2"), scored("gpt2")
    method, make = MORE[name]
    told = ma.estimate(model, task, method, **make(edges))
    replay = Course.replay
    monkeypatch.setattr(Course, "replay", lambda self, _sizes: replay(self))
    assert not 0.8 * told.bytes <= ma.estimate(model, task, method, **make(edges)).bytes <= 1.2 * told.bytes
