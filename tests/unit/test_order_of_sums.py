"""Sums over tokens have one order on every device: scattered adds of accelerators have none."""

from __future__ import annotations

from typing import Any

import torch
from patching_cases import pairs_task, plain
from torch.utils._python_dispatch import TorchDispatchMode

from mechattr.patching.edge_run import EdgeRun
from mechattr.patching.places import by_place, places_of
from mechattr.patching.replacements import Means


class Scattered(TorchDispatchMode):
    """Notes operations that add at indices."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(word in func.name() for word in ("index_add", "scatter_add", "scatter_reduce")):
            self.found.append(func.name())
        return func(*args, **(kwargs or {}))


def test_means_are_not_scattered() -> None:
    model = plain("gpt2_like")
    task = pairs_task(model, (4, 6, 6))
    run = EdgeRun(model, task, ablation="mean")
    places = places_of(task, "named")
    with Scattered() as scattered:
        Means.of(model, task, places, [name for name in model.sites() if "hook_z" in name], 2)
        run.metric(run.graph.mask)
    assert scattered.found == []
    place = torch.tensor([2, 0, 2])
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    with Scattered() as scattered:  # wrong: adding at indices
        expected = torch.zeros(4, 2).index_add_(0, place, x)
    assert scattered.found == ["aten::index_add_"]
    assert torch.equal(by_place(x, place, 4), expected)
