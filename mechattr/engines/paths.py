"""Gradients along a straight path of activations, integrated: what each activation adds to a metric's change."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechattr.engines.baselines import baseline_vector, in_place
from mechattr.engines.quadrature import nodes
from mechattr.errors import SettingError
from mechattr.models.base import Batch, HookedModel, Metric
from mechattr.models.edits import Edit
from mechattr.models.halving import Halving
from mechattr.models.operators import Set
from mechattr.sites import expand

LIMIT = 0.05  # a larger gap, as a share of the change, is worth a warning


@dataclass(frozen=True, eq=False, slots=True)
class PathGradients:
    """Integrated gradients of some rows, in float64.

    Attributes:
        attributions: the share of each activation in the change; 0 at padding and where the path stands still.
        change: F(x) - F(b).
        gap: sum of the attributions minus the change.
        steps: the gradients that were used.
        passes: rows of forward and of backward passes, of all batches together.
    """

    attributions: Float[Tensor, "row pos *axes"]
    change: Float[Tensor, " row"]
    gap: Float[Tensor, " row"]
    steps: Int[Tensor, " row"]
    passes: tuple[int, int]


def path_gradients(
    model: HookedModel,
    batch: Batch,
    metric: Metric,
    *,
    site: str = "embed",
    baseline: str | int | Tensor = "mean",
    fixed: Bool[Tensor, "row pos"] | None = None,
    steps: int = 20,
    rule: str = "gauss_legendre",
    tolerance: float | None = None,
    max_steps: int = 640,
    batch_size: int = 32,
) -> PathGradients:
    r"""$a_i = (x_i - b_i) \sum_k w_k\, \partial_i F(b + \alpha_k (x - b))$, which approximates the integral over
    $\alpha \in [0, 1]$; then $\sum_i a_i = F(x) - F(b)$.

    Only the activations of the site move: at `embed`, what a model adds for positions stays. Rows are independent.

    Args:
        model: a hooked model.
        batch: token rows.
        metric: F, one number a row; `batch.example` says which row it is.
        site: one site of the model, by full name or by the name of a site that exists once.
        baseline: b: the `"mean"` of all embeddings, `"zero"`, a token's embedding by its id, or a tensor that fits the
            activation. At other sites than `embed`: `"zero"` or a tensor. At image tokens the mean and an id both are
            the mean of the image's own embeddings.
        fixed: true where activations stay as they are, such as at a first token that all texts share.
        steps: gradients a row.
        rule: a rule of `mechattr.engines.quadrature.nodes`.
        tolerance: steps double, for the rows that need it, until the gap is at most this share of the change.
        max_steps: where doubling ends.
        batch_size: rows of a forward pass, a row being one step of one row of the batch; halved when memory runs out.

    Raises:
        SettingError: a number, a tolerance or a baseline that cannot be used.
        UnknownNameError: no such rule or baseline.
        UnknownSiteError: a site that the model does not have.

    Warns:
        UserWarning: the gap of some row is over the tolerance, or without one over 5 % of the change. Near a zero
            embedding, norms that divide by the length (RMSNorm) leave no path that few steps can follow.

    Cost:
        `steps` forward and backward passes and 2 forward passes a row.

    References:
        Sundararajan, Taly, Yan (2017), Axiomatic Attribution for Deep Networks, arXiv 1703.01365.
    """
    _check(tolerance, max_steps, batch_size)
    nodes(rule, steps)
    (name, *more) = expand(site, model.sites())
    if more:
        raise SettingError(f"site={site!r}", f"{len(more) + 1} sites of that name", f"name one, such as {name!r}")
    path = _Path(model, batch, metric, name, Halving(batch_size))
    path.between(baseline, fixed)
    found = torch.zeros_like(path.step)
    used = torch.zeros(len(batch), dtype=torch.long, device=batch.device)
    rows, m, backward = list(range(len(batch))), steps, 0
    allowed = (LIMIT if tolerance is None else tolerance) * path.scale
    while rows:
        found[rows], used[rows], backward = path.integral(rows, rule, m), m, backward + len(rows) * m
        gap = found.flatten(1).sum(1) - path.change
        m *= 2
        rows = [i for i in rows if gap[i].abs() > allowed[i]] if tolerance is not None and m <= max_steps else []
    wide = gap.abs() > allowed
    if bool(wide.any()):
        worst = float((gap.abs() / path.scale).max())
        text = f"integrated gradients of {int(wide.sum())} of {len(batch)} rows miss up to {worst:.1%} of the change"
        warnings.warn(f"{text}: give more steps, a tolerance, or another baseline", stacklevel=2)
    return PathGradients(found, path.change, gap, used, (backward + 2 * len(batch), backward))


class _Path:
    """The straight line from a baseline to the activations of a batch at one site."""

    def __init__(self, model: HookedModel, batch: Batch, metric: Metric, site: str, halving: Halving) -> None:
        self.model, self.batch, self.metric, self.site, self.halving = model, batch, metric, site, halving
        ends = halving(range(len(batch)), self._ends)
        self.x, self.top = torch.stack([x for x, _ in ends]), torch.stack([value for _, value in ends])

    def between(self, given: str | int | Tensor, fixed: Tensor | None) -> None:
        """Finds the other end, the step to it, and the metric's change."""
        moving = self.batch.mask if fixed is None else self.batch.mask & ~self._fitting(fixed)
        begin = self._baseline(given)
        moving = moving.reshape(*moving.shape, *([1] * (self.x.ndim - 2)))
        self.begin = torch.where(moving, begin, self.x)
        self.step = self.x - self.begin
        bottom = torch.stack(self.halving([(i, 0.0) for i in range(len(self.x))], self._values))
        self.change = self.top - bottom
        noise = torch.finfo(getattr(torch, self.model.info.dtype)).eps ** 0.5  # a change below is mostly rounding
        self.scale = torch.maximum(self.change.abs(), noise * (self.top.abs() + bottom.abs())).clamp(min=1e-6)

    def integral(self, rows: Sequence[int], rule: str, steps: int) -> Float[Tensor, "row pos *axes"]:
        """Attributions of some rows."""
        points, weights = (x.tolist() for x in nodes(rule, steps))
        lengths = self.batch.lengths.tolist()  # rows of like lengths run together, without the columns that none has
        total = torch.zeros_like(self.step[list(rows)])
        todo = [(j, k) for j in sorted(range(len(rows)), key=lambda j: lengths[rows[j]]) for k in range(steps)]
        for begin in range(0, len(todo), self.halving.size):
            part = todo[begin : begin + self.halving.size]
            found = self.halving([(rows[j], points[k]) for j, k in part], self._gradients)
            for (j, k), gradient in zip(part, found, strict=True):
                total[j, : len(gradient)] += weights[k] * gradient
        return total * self.step[list(rows)]

    def _ends(self, rows: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        run = self.model.run(self.batch.rows(list(rows)), record=self.site, metric=self.metric)
        assert run.metric is not None
        return list(zip(run.activations[self.site].values.double(), run.metric.double(), strict=True))

    def _values(self, points: Sequence[tuple[int, float]]) -> list[Tensor]:
        batch, edit = self._at(points)
        run = self.model.run(batch, edits=[edit], metric=self.metric)
        assert run.metric is not None
        return list(run.metric.double())

    def _gradients(self, points: Sequence[tuple[int, float]]) -> list[Tensor]:
        batch, edit = self._at(points)
        run = self.model.run(batch, edits=[edit], metric=self.metric, gradients=self.site)
        return list(run.gradients[self.site].values.double())

    def _at(self, points: Sequence[tuple[int, float]]) -> tuple[Batch, Edit]:
        """Rows of the batch, and what puts each where it is on its path."""
        rows = [i for i, _ in points]
        batch = self.batch.rows(rows).shortened()
        width = batch.tokens.shape[1]
        shares = self.step.new_tensor([a for _, a in points]).reshape(-1, *([1] * (self.step.ndim - 1)))
        return batch, Edit(self.site, Set(self.begin[rows, :width] + shares * self.step[rows, :width]))

    def _baseline(self, given: str | int | Tensor) -> Tensor:
        if not isinstance(given, Tensor):
            return in_place(baseline_vector(self.model, given, self.site), self.x, self.batch.image)
        try:
            return given.to(self.x).expand(self.x.shape)
        except RuntimeError as error:
            found = f"activations of shape {list(self.x.shape)}"
            fix = "give a tensor that broadcasts to them"
            raise SettingError(f"a baseline of shape {list(given.shape)}", found, fix) from error

    def _fitting(self, fixed: Tensor) -> Tensor:
        if fixed.dtype != torch.bool or fixed.shape != self.batch.mask.shape:
            asked = f"fixed of shape {list(fixed.shape)} and {fixed.dtype}"
            fix = "give one bool for each row and column"
            raise SettingError(asked, f"a batch of shape {list(self.batch.mask.shape)}", fix)
        return fixed.to(self.batch.device)


def _check(tolerance: float | None, max_steps: int, batch_size: int) -> None:
    for name, number in (("max_steps", max_steps), ("batch_size", batch_size)):
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise SettingError(f"{name}={number!r}", "no number of rows or steps", "give a whole number from 1")
    share = isinstance(tolerance, int | float) and 0 < tolerance < 1
    if tolerance is not None and not share:
        raise SettingError(f"tolerance={tolerance!r}", "no share", "give a number between 0 and 1")
