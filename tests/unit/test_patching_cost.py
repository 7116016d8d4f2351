"""What the methods cost: passes counted at the blocks, and how many gradients are alive at once."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from patching_cases import hf, pairs_task
from transformers import GPT2Config, GPT2LMHeadModel

import mechattr as ma
import mechattr.patching.effects as effects
from mechattr.models import HookedHF
from mechattr.models.plain import plain_model
from mechattr.models.plain_config import PlainConfig
from mechattr.patching.variants import VARIANTS


@cache
def deep() -> HookedHF:
    """A GPT-2 of four blocks."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=61, n_embd=24, n_layer=4, n_head=4, n_positions=64, attn_implementation="eager")
    return HookedHF(GPT2LMHeadModel(config).eval())


@contextmanager
def counted(model: Any) -> Iterator[dict[str, float]]:
    """Passes in prompt rows: rows through each block's MLP on the way up, and gradients of its output on the way down;
    a block that is skipped or not walked through does not see them."""
    found = {"forward": 0.0, "backward": 0.0}
    blocks = model.model.transformer.h

    def down(gradient: torch.Tensor) -> None:
        found["backward"] += len(gradient) / len(blocks)

    def up(module: Any, arguments: Any, output: torch.Tensor) -> None:
        found["forward"] += len(output) / len(blocks)
        if output.requires_grad:
            output.register_hook(down)

    hooks = [block.mlp.register_forward_hook(up) for block in blocks]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("batch_size", (None, 2))
@pytest.mark.parametrize("variant", VARIANTS)
def test_passes_of_estimates_are_those_that_ran(variant: str, batch_size: int | None) -> None:
    model = deep()
    task, layers = pairs_task(model), model.info.n_layers
    model.attention(0)  # reads how attention is scaled from a run of one token, once for each model
    with counted(model) as ran:
        result = ma.attribution_patching(
            model, task, sites=("embed", "q", "k", "z"), batch_size=batch_size, variant=variant
        )
    assert result.passes == pytest.approx((ran["forward"], ran["backward"]), abs=1e-9)  # sums of fractions
    parts = VARIANTS[variant].parts
    second = variant in ("two_point", "hedged")
    more = second, second + ("dropped" in parts) * (layers - 1) / 2
    assert result.passes == pytest.approx((len(task) * (2 + more[0]), len(task) * (1 + more[1])), abs=1e-9)
    assert ma.estimate(model, task, "attribution_patching", variant=variant).backward == pytest.approx(ran["backward"])


def test_passes_of_sublayers_count_a_block_in_part_as_a_whole() -> None:
    model = deep()
    task, layers = pairs_task(model), model.info.n_layers
    model.attention(0)
    with counted(model) as ran:
        result = ma.attribution_patching(model, task, sites="z", variant="star", unit="sublayer")
    assert result.passes.backward == len(task) * (1 + layers)
    assert ran["backward"] == pytest.approx(
        len(task) * layers
    )  # the MLP of the block whose own write is held is not walked


@pytest.mark.parametrize("batch_size", (None, 2))
def test_passes_of_exact_patching_are_those_that_ran(batch_size: int | None) -> None:
    model = hf("gpt2")
    task = pairs_task(model)
    with counted(model) as ran:
        result = ma.activation_patching(model, task, sites=("embed", "q", "z", "mlp_out"), batch_size=batch_size)
    assert result.passes.forward == pytest.approx(ran["forward"], abs=1e-9)
    assert result.passes.backward == ran["backward"] == 0
    nodes = 1 + 2 * (2 * 4 + 1)
    assert 2 * len(task) < result.passes.forward < len(task) * (2 + 5 * nodes)


def test_gradients_are_let_go_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model = plain_model(PlainConfig.gpt2_like(n_layers=6))
    task = pairs_task(model)
    alive: list[weakref.ref[torch.Tensor]] = []
    most, left = 0, list[int]()
    visitor = effects.Effects._visitor

    def watched(self: Any, put: Any) -> Any:
        visit = visitor(self, put)
        return lambda *seen: look(self, visit, *seen)

    def look(self: Any, visit: Any, name: str, activation: torch.Tensor, gradient: torch.Tensor) -> None:
        nonlocal most
        alive.append(weakref.ref(gradient))
        # autograd adds to the residual stream's gradient in place, so that several sites may see one tensor
        most = max(most, len({id(ref()) for ref in alive} - {id(None)}))
        visit(name, activation, gradient)
        left.append(len(self.source))

    monkeypatch.setattr(effects.Effects, "_visitor", watched)
    sites = ("q", "k", "v", "z", "mlp_post", "mlp_out", "resid_post")
    ma.attribution_patching(model, task, sites=sites, variant="atp")
    assert len(alive) == 7 * 6
    assert left == list(range(7 * 6 - 1, -1, -1))  # so are the source activations
    # this site's gradient, that of the residual stream, and those of the branches that are still to be walked
    assert most <= 5
    kept = model.run(task.clean, gradients=("q", "k", "v", "z"), metric=task.metric).gradients
    assert len(kept) == 4 * 6  # without streaming every one is alive at the end
