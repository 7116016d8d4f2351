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
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from mechattr.artifact import Attribution, Cache
from mechattr.engines.halving import Halving
from mechattr.errors import EmptyTaskError, NonFiniteError, UnknownNameError, nearest
from mechattr.labelled import Labelled
from mechattr.models.base import HookedModel
from mechattr.models.rules import Rules
from mechattr.patching.places import (
    DEFAULT_SITES,
    Places,
    Positions,
    base_and_source,
    direction_of,
    mode_of,
    node_axes,
    node_sites,
    per_node,
    places_of,
    rows_at_once,
    taken_at,
)
from mechattr.patching.settings import provenance_of, settings_of
from mechattr.patching.source import source_of
from mechattr.sites import SITES, parse
from mechattr.tasks.task import Task

VARIANTS = ("atp",)
PAIRS_AT_ONCE = 16


def attribution_patching(
    model: HookedModel,
    task: Task,
    *,
    sites: str | Sequence[str] = DEFAULT_SITES,
    variant: str = "atp",
    direction: str = "noising",
    positions: Positions | None = None,
    rules: Rules | None = None,
    source: Cache | None = None,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> Attribution:
    r"""Estimates the effect of replacing each node by its value on the other prompt.

    $$\hat I(n) = \big(n(x') - n(x)\big)^\top \left.\frac{\partial L}{\partial n}\right|_{x}, \qquad
    \text{score}(n) = \mathbb E_{\text{pairs}} |\hat I(n)|,
    \quad \text{signed}(n) = \mathbb E_{\text{pairs}} \hat I(n)$$

    with $x$ the base prompt (clean under noising, corrupt under denoising) and $x'$ the other. A node that spans
    several positions sums its dot products before the absolute value is taken. Differences and dot products are taken
    in float32 or wider.

    Args:
        model: a hooked model.
        task: prompt pairs with a metric.
        sites: short names. `q` and `k` are taken after rotary embedding and norms, where their exact effect is the
            same.
        variant: `"atp"`.
        direction: `"noising"` puts corrupt activations into the clean run, `"denoising"` clean ones into the corrupt
            run.
        positions: `"aligned"` (each position), `"named"` (spans) or `"all"` (merged); by default each position where
            the pairs align, else the spans that the task names in every pair.
        rules: another backward pass, such as `Rules(norm="frozen")`.
        source: activations of $x'$ for all pairs, recorded earlier, instead of a run of those prompts. Their metric is
            then not measured: `clean_metric` or `corrupt_metric` is `None`.
        batch_size: pairs at a time, 16 unless given; it halves itself when memory runs out.
        progress: `None` shows a bar on a terminal only.

    Returns:
        `scores[site]` and `signed[site]`, axes `layer`, `pos` (unless merged), and `head`, `kv_head` or `neuron`; in
        the metric's unit.

    Raises:
        UnknownSiteError: a site that this model does not have.
        UnknownNameError: no such variant, direction or kind of positions.
        AlignmentError: positions that are not comparable across the pairs.
        EmptyTaskError: no pairs.
        MismatchError: `source` does not belong to this model and task, or lacks a site.
        NonFiniteError: the gradient overflows in a narrow dtype.
        SettingError: an unusable `batch_size`.

    Cost:
        2 forward passes (1 with `source`) and 1 backward pass a pair, for all nodes together. Peak memory: the source
        activations of one batch and the graph of one run.

    References:
        Nanda 2023, Attribution Patching; Kramár et al. 2024, arXiv:2403.00745, equations 4 and 5.
    """
    if variant not in VARIANTS:
        raise UnknownNameError(f"variant {variant!r}", "no such variant", nearest(variant, VARIANTS))
    if not len(task):
        raise EmptyTaskError("attribution patching", "a task without pairs", "give at least one pair")
    way = direction_of(direction)
    shorts = node_sites(model, sites)
    mode = mode_of(task, positions)
    places = places_of(task, mode)
    halving = Halving(rows_at_once(batch_size, PAIRS_AT_ONCE))
    base, other = base_and_source(task, way)
    sums = _Sums(model, shorts, places)
    there = source_of(model, other, task.metric, sums.names, source)

    def some(pairs: Sequence[int]) -> list[tuple[float, float | None]]:
        """Adds the effects of some pairs to the sums; returns the metric of each pair on both runs."""
        activations, metric = there.rows(pairs)
        sums.begin(activations, places.rows(pairs))
        run = model.run(base.rows(pairs), gradients=sums.names, metric=task.metric, rules=rules, visit=sums.visit)
        sums.finish()
        bar.update(len(pairs))
        assert run.metric is not None  # a metric was given
        return list(zip(run.metric.tolist(), [None] * len(pairs) if metric is None else metric.tolist(), strict=True))

    with tqdm(total=len(task), desc="attribution", disable=None if progress is None else not progress) as bar:
        metrics = halving(range(len(task)), some)
    n = len(task)
    settings = settings_of(
        task,
        method="attribution_patching",
        variant=variant,
        direction=way,
        sites=shorts,
        positions=mode,
        rules=None if rules is None else {"norm": rules.norm, "hold": sorted(rules.hold)},
        base=[value for value, _ in metrics],
        source=[value for _, value in metrics if value is not None] or None,
        source_sha256=there.digest,
        passes=(float(n * (1 + there.forward)), float(n)),
        trivial=sums.trivial(),
    )
    return Attribution(sums.tables(n), settings=settings, provenance=provenance_of(model, task))


class _Effect(NamedTuple):
    """Of one site, over pairs: the sum of |effect|, the sum of effects, and whether the node ever changes."""

    magnitude: Tensor
    signed: Tensor
    moved: Tensor

    def plus(self, other: _Effect) -> _Effect:
        return _Effect(self.magnitude + other.magnitude, self.signed + other.signed, self.moved | other.moved)


class _Sums:
    """The effects of all sites, filled while backward passes go by.

    A batch counts once it is finished, so that one that runs out of memory can be repeated in parts.
    """

    def __init__(self, model: HookedModel, shorts: Sequence[str], places: Places) -> None:
        self.merged, self.labels = places.merged, places.labels
        self.full = {short: taken_at(model, short) for short in shorts}
        self.names = tuple(dict.fromkeys(name for names in self.full.values() for name in names))
        self.total: dict[str, _Effect] = {}

    def begin(self, source: dict[str, Tensor], places: Places) -> None:
        self.source, self.places = source, places
        self.batch: dict[str, _Effect] = {}

    def visit(self, name: str, activation: Tensor, gradient: Tensor) -> None:
        """What the backward pass brings to one site; its source activation is let go."""
        wide = torch.promote_types(activation.dtype, torch.float32)
        change = self.source.pop(name).to(wide) - activation.to(wide)
        moved = self.places.gather(per_node(name, (change != 0).to(wide))) != 0
        effect = self.places.gather(per_node(name, change * gradient.to(wide)))
        self.batch[name] = _Effect(effect.abs().sum(0), effect.sum(0), moved.any(0))

    def finish(self) -> None:
        """Adds a batch. Sites that no path connects with the metric were not visited: their effect is zero."""
        for name, activation in list(self.source.items()):
            self.visit(name, activation, torch.zeros_like(activation))
        for name, effect in self.batch.items():
            self.total[name] = self.total[name].plus(effect) if name in self.total else effect

    def trivial(self) -> int:
        """Nodes whose activation is the same on both prompts of every pair."""
        return sum(int((~self.total[name].moved).sum()) for names in self.full.values() for name in names)

    def tables(self, n: int) -> dict[str, Labelled]:
        """Means over `n` pairs by site.

        Raises:
            NonFiniteError: a site's sum is NaN or infinite.
        """
        found = {}
        for short, names in self.full.items():
            axes = node_axes(short, self.merged)
            coords: dict[str, Any] = {} if self.merged else {"pos": self.labels}
            if SITES[short].layered:
                coords["layer"] = [parse(name)[1] for name in names]
            for kind, parts in (
                ("score", [self.total[name].magnitude for name in names]),
                ("signed", [self.total[name].signed for name in names]),
            ):
                _check_finite(dict(zip(names, parts, strict=True)))
                whole = torch.stack([part[0] if self.merged else part for part in parts]).cpu() / n
                found[f"{kind}/{short}"] = Labelled(whole if SITES[short].layered else whole[0], axes, coords)
        return found


def _check_finite(effects: dict[str, Tensor]) -> None:
    bad = [name for name, effect in effects.items() if not bool(effect.isfinite().all())]
    if bad:
        raise NonFiniteError(
            f"estimates at {bad[-1]}",  # the backward pass reaches the last layer first
            f"NaN or infinity in its gradient or its activations ({len(bad)} layers)",
            "use a wider dtype, such as bfloat16 or float32",
        )
