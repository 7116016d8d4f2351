"""What the methods cost: passes counted at the blocks, and how many gradients are alive at once."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from patching_cases import hf, pairs_task

import mechattr as ma
import mechattr.patching.attribution as attribution
from mechattr.models.plain import plain_model
from mechattr.models.plain_config import PlainConfig


@contextmanager
def counted(model: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, float]]:
    """Passes in prompt rows: rows through each block's MLP (a block that is skipped does not call it), over blocks."""
    found = {"forward": 0.0, "backward": 0.0}
    blocks = model.model.transformer.h
    rows = 0

    def forward(module: Any, arguments: Any, output: torch.Tensor) -> None:
        nonlocal rows
        rows = len(output)
        found["forward"] += rows / len(blocks)

    grad = torch.autograd.grad

    def backward(*arguments: Any, **settings: Any) -> Any:
        found["backward"] += rows
        return grad(*arguments, **settings)

    monkeypatch.setattr(torch.autograd, "grad", backward)
    hooks = [block.mlp.register_forward_hook(forward) for block in blocks]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("batch_size", (None, 2))
@pytest.mark.parametrize("method", (ma.attribution_patching, ma.activation_patching))
def test_passes_are_those_that_ran(method: Any, batch_size: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = hf("gpt2")
    task = pairs_task(model)
    with counted(model, monkeypatch) as ran:
        result = method(model, task, sites=("embed", "q", "z", "mlp_out"), batch_size=batch_size)
    assert result.passes.forward == pytest.approx(ran["forward"], abs=1e-9)
    assert result.passes.backward == ran["backward"]
    if method is ma.attribution_patching:
        assert result.passes == (2 * len(task), len(task))
    else:
        nodes = 1 + 2 * (2 * 4 + 1)
        assert 2 * len(task) < result.passes.forward < len(task) * (2 + 5 * nodes)


def test_gradients_are_let_go_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model = plain_model(PlainConfig.gpt2_like(n_layers=6))
    task = pairs_task(model)
    alive: list[weakref.ref[torch.Tensor]] = []
    most, left = 0, list[int]()
    visit = attribution._Sums.visit

    def watched(self: Any, name: str, activation: torch.Tensor, gradient: torch.Tensor) -> None:
        nonlocal most
        alive.append(weakref.ref(gradient))
        # autograd adds to the residual stream's gradient in place, so that several sites may see one tensor
        most = max(most, len({id(ref()) for ref in alive} - {id(None)}))
        visit(self, name, activation, gradient)
        left.append(len(self.source))

    monkeypatch.setattr(attribution._Sums, "visit", watched)
    ma.attribution_patching(model, task, sites=("q", "k", "v", "z", "mlp_post", "mlp_out", "resid_post"))
    assert len(alive) == 7 * 6
    assert left == list(range(7 * 6 - 1, -1, -1))  # so are the source activations
    # this site's gradient, that of the residual stream, and those of the branches that are still to be walked
    assert most <= 5
    kept = model.run(task.clean, gradients=("q", "k", "v", "z"), metric=task.metric).gradients
    assert len(kept) == 4 * 6  # without streaming every one is alive at the end
