"""Slow definitions of the variants of attribution patching: one prompt, one node and one held write at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from patching_cases import full, part, places, single
from torch import Tensor

import mechattr as ma
from mechattr.models.base import Batch
from mechattr.models.edits import Edit
from mechattr.models.rules import Rules
from mechattr.sites import Node, expand, full_name
from mechattr.tasks.task import Task

Gradients = Callable[[Batch, Sequence[str]], Mapping[str, Tensor]]
OUTSIDE = ("embed", "pos_embed", "resid_pre", "resid_mid", "resid_post", "ln_final", "ln_final_scale")
ATTENTION = ("ln1_scale", "ln1", "q", "k", "v", "rot_q", "rot_k", "attn_scores", "pattern", "z", "result", "attn_out")


def full_gradients(model: Any, task: Task, *, hold: frozenset[int] = frozenset(), cut: str = "") -> Gradients:
    """Gradients of the metric with the writes of some blocks held, or with one write cut by an edit."""

    def of(base: Batch, names: Sequence[str]) -> Mapping[str, Tensor]:
        edits = [Edit(cut, lambda x, _place: x.detach())] if cut else []
        found = model.run(base, gradients=names, metric=task.metric, rules=Rules(hold=hold), edits=edits).gradients
        # the edit comes before the site's gradient is taken, so the write itself has to be put to zero
        return {name: torch.zeros_like(x.values) if name == cut else x.values for name, x in found.items()}

    return of


def runs(task: Task, row: int, direction: str) -> tuple[Batch, Batch]:
    """Base and source prompt of a pair."""
    sides = (single(task.clean, row), single(task.corrupt, row))
    return sides if direction == "noising" else sides[::-1]


def estimates(
    model: Any,
    task: Task,
    nodes: Sequence[Node],
    gradients: Gradients,
    *,
    fix: bool,
    positions: str = "aligned",
    direction: str = "noising",
) -> Tensor:
    """[pair, node]. With `fix`, the change that a query or key makes at z is measured by running the model."""
    names = list(dict.fromkeys(full(model, node) for node in nodes))
    outputs = list(
        dict.fromkeys(full_name("z", n.layer) for n in nodes if fix and n.site in ("q", "k", "rot_q", "rot_k"))
    )
    found = torch.zeros(len(task), len(nodes), dtype=torch.float64)
    for row in range(len(task)):
        base, source = runs(task, row, direction)
        here, there = (model.run(batch, record=[*names, *outputs]).activations for batch in (base, source))
        slopes = gradients(base, [*names, *outputs])
        for j, node in enumerate(nodes):
            span, name = places(task, row, positions)[node.pos], full(model, node)
            if fix and node.site in ("q", "k", "rot_q", "rot_k"):
                z = full_name("z", node.layer)
                edit = Edit(name, ma.models.Set(there), positions=list(range(*span)), heads=[node.head])
                moved = model.run(base, edits=[edit], record=z).activations[z].values
                change, slope = (moved - here[z].values).double(), slopes[z].double()
            else:
                change = part(there[name].values, node, span).double() - part(here[name].values, node, span).double()
                slope = part(slopes[name], node, span).double()
            found[row, j] = (change * slope).sum()
    return found


def drop_gradients(model: Any, task: Task, unit: str) -> list[tuple[str, Gradients]]:
    """Every drop: a name and its gradients."""
    if unit == "block":
        return [(f"{i}", full_gradients(model, task, hold=frozenset({i}))) for i in range(model.info.n_layers)]
    writes = [
        n
        for short in ("attn_out", "mlp_out")
        if full_name(short, 0) in model.sites()
        for n in expand(short, model.sites())
    ]
    return [(name, full_gradients(model, task, cut=name)) for name in writes]


def shares_its_norm(model: Any) -> bool:
    """Whether attention and MLP of a block read the stream through one norm."""
    return model.info.parallel and full_name("ln2", 0) not in model.sites()


def dropped(
    model: Any, task: Task, nodes: Sequence[Node], *, fix: bool, unit: str = "block", wrong: str = "", **how: Any
) -> Tensor:
    """[pair, node]: the mean magnitude over drops; `wrong` names a mistake to make on purpose."""
    each = torch.stack([estimates(model, task, nodes, g, fix=fix, **how) for _, g in drop_gradients(model, task, unit)])
    n, above = len(each), [range((node.layer or 0) + (node.layer is not None), len(each)) for node in nodes]
    if wrong == "the skip path is killed":  # a drop of block l then leaves nothing to what lies below it
        for j, layers in enumerate(above):
            each[list(layers), :, j] = 0
    if wrong == "drops above the node only":
        return torch.stack([each[list(ls), :, j].abs().sum(0) / max(1, len(ls)) for j, ls in enumerate(above)], -1)
    if wrong == "the mean before the magnitude":
        return each.sum(0).abs() / (n - 1)
    if wrong == "divided by all drops":
        return each.abs().sum(0) / n
    # a norm that attention and MLP share lies on a path through either
    kept = {*OUTSIDE, *(("ln1", "ln1_scale") if unit == "sublayer" and shares_its_norm(model) else ())}
    lost = torch.tensor([0 if node.site in kept else 1 for node in nodes])
    return each.abs().sum(0) / (n - lost)
