"""Attribution patching: every node's effect estimated from two forward passes and one backward pass.

1. Run the source prompt and keep the activations of all nodes.
2. Run the base prompt with gradients of the metric.
3. As the backward pass reaches a site, take the dot product of its gradient with the change of its activation, and let
   both go.
4. Take absolute values pair by pair, then average.

It is exact where the metric is linear in the node. It misleads where attention is saturated (the softmax is flat there)
and where paths of opposite sign cancel to first order; the exact check of the best nodes (`activation_patching`) shows
how far it can be trusted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from mechattr.artifact import Attribution
from mechattr.errors import EmptyTaskError, UnknownNameError, nearest
from mechattr.labelled import Labelled
from mechattr.models.base import HookedModel
from mechattr.models.rules import Rules
from mechattr.patching.places import (
    DEFAULT_SITES,
    Places,
    Positions,
    base_and_source,
    chunks,
    direction_of,
    node_axes,
    node_sites,
    per_node,
    places_of,
    taken_at,
)
from mechattr.patching.settings import provenance_of, settings_of
from mechattr.sites import SITES, parse
from mechattr.tasks.task import Task

VARIANTS = ("atp",)


def attribution_patching(
    model: HookedModel,
    task: Task,
    *,
    sites: str | Sequence[str] = DEFAULT_SITES,
    variant: str = "atp",
    direction: str = "noising",
    positions: Positions | None = None,
    rules: Rules | None = None,
    batch_size: int = 16,
    progress: bool | None = None,
) -> Attribution:
    r"""Estimates the effect of replacing each node by its value on the other prompt.

    $$\hat I(n) = \big(n(x') - n(x)\big)^\top \left.\frac{\partial L}{\partial n}\right|_{x}, \qquad
    \text{score}(n) = \mathbb E_{\text{pairs}} |\hat I(n)|, \quad \text{signed}(n) = \mathbb E_{\text{pairs}} \hat I(n)$$

    with $x$ the base prompt (clean under noising, corrupt under denoising) and $x'$ the other. A node that spans several
    positions sums its dot products before the absolute value is taken.

    Args:
        model: a hooked model.
        task: prompt pairs with a metric.
        sites: short names. `q` and `k` are taken after rotary embedding and norms, where their exact effect is the same.
        variant: `"atp"`.
        direction: `"noising"` puts corrupt activations into the clean run, `"denoising"` clean ones into the corrupt run.
        positions: `"aligned"` (each position, the default), `"named"` (spans) or `"all"` (merged).
        rules: another backward pass, such as `Rules(norm="frozen")`.
        batch_size: pairs at a time.
        progress: `None` shows a bar on a terminal only.

    Returns:
        `scores[site]` and `signed[site]`, axes `layer`, `pos` (unless merged), and `head`, `kv_head` or `neuron`; in the
        metric's unit.

    Raises:
        UnknownSiteError: a site that this model does not have.
        AlignmentError: positions that are not comparable across the pairs.
        EmptyTaskError: no pairs.

    Cost:
        2 forward passes and 1 backward pass a pair, for all nodes together. Peak memory: the source activations of one
        batch and the graph of one run.

    References:
        Nanda 2023, Attribution Patching; Kramár et al. 2024, arXiv:2403.00745, equations 4 and 5.
    """
    if variant not in VARIANTS:
        raise UnknownNameError(f"variant {variant!r}", "no such variant", nearest(variant, VARIANTS))
    if not len(task):
        raise EmptyTaskError("attribution patching", "a task without pairs", "give at least one pair")
    way = direction_of(direction)
    shorts = node_sites(model, sites)
    places = places_of(task, positions)
    total = _Total(model, shorts, places)
    clean, corrupt = [], []
    bar = tqdm(chunks(len(task), batch_size), desc="attribution", disable=None if progress is None else not progress)
    for rows in bar:
        base, source = base_and_source(task.rows(rows), way)
        there = model.run(source, record=total.names, metric=task.metric)
        total.begin(there.activations, places.rows(rows))
        here = model.run(base, gradients=total.names, metric=task.metric, rules=rules, visit=total.visit)
        total.finish()
        first, second = (here, there) if way == "noising" else (there, here)
        clean.append(first.metric)
        corrupt.append(second.metric)
    n = len(task)
    settings = settings_of(
        task,
        method="attribution_patching",
        variant=variant,
        direction=way,
        sites=shorts,
        positions=positions or "aligned",
        clean=torch.cat([m for m in clean if m is not None]),
        corrupt=torch.cat([m for m in corrupt if m is not None]),
        passes=(2.0 * n, 1.0 * n),
        trivial=total.trivial(),
    )
    return Attribution(total.tables(n), settings=settings, provenance=provenance_of(model, task))


class _Total:
    """Sums of |effect| and effect over pairs, filled while backward passes go by."""

    def __init__(self, model: HookedModel, shorts: Sequence[str], places: Places) -> None:
        self.places, self.shorts = places, shorts
        self.full = {short: taken_at(model, short) for short in shorts}
        self.names = [name for names in self.full.values() for name in names]
        self.magnitude: dict[str, Tensor] = {}
        self.signed: dict[str, Tensor] = {}
        self.moved: dict[str, Tensor] = {}
        self.source: dict[str, Tensor] = {}

    def begin(self, source: Any, places: Places) -> None:
        self.source = {name: source[name].values for name in self.names}
        self.here = places

    def visit(self, name: str, activation: Tensor, gradient: Tensor) -> None:
        self.add(name, self.source.pop(name), activation, gradient)

    def add(self, name: str, source: Tensor, activation: Tensor, gradient: Tensor | None) -> None:
        wide = torch.promote_types(activation.dtype, torch.float32)
        change = source.to(wide) - activation.to(wide)
        effect = per_node(name, change * gradient.to(wide)) if gradient is not None else None
        moved = self.here.gather(per_node(name, (change != 0).to(wide))) != 0
        if effect is None:
            effect = torch.zeros_like(moved, dtype=wide)
        else:
            effect = self.here.gather(effect)
        for store, value in ((self.magnitude, effect.abs().sum(0)), (self.signed, effect.sum(0))):
            store[name] = store[name] + value if name in store else value
        self.moved[name] = self.moved[name] | moved.any(0) if name in self.moved else moved.any(0)

    def finish(self) -> None:
        """Sites that no path connects with the metric were not visited: their estimate is zero."""
        for name in list(self.source):
            source = self.source.pop(name)
            self.add(name, source, source, None)

    def trivial(self) -> int:
        """Nodes whose activation is the same on both prompts of every pair."""
        return int(sum((~moved).sum() for moved in self.moved.values()))

    def tables(self, n: int) -> dict[str, Labelled]:
        found = {}
        for short, names in self.full.items():
            axes = node_axes(short, self.places)
            coords: dict[str, Any] = {} if self.places.merged else {"pos": self.places.labels}
            if SITES[short].layered:
                coords["layer"] = [parse(name)[1] for name in names]
            for kind, sums in (("score", self.magnitude), ("signed", self.signed)):
                parts = [(sums[name] / n)[0] if self.places.merged else sums[name] / n for name in names]
                values = torch.stack(parts) if SITES[short].layered else parts[0]
                found[f"{kind}/{short}"] = Labelled(values, axes, coords)
        return found
