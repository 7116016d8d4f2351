"""Recordings that are made in parts when memory runs out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mechattr.models.base import Batch, HookedModel, Metric
from mechattr.models.edits import Edit
from mechattr.models.halving import Halving


def recorded(
    model: HookedModel,
    batch: Batch,
    names: Sequence[str],
    metric: Metric | None = None,
    edits: Callable[[Sequence[int]], Sequence[Edit]] | None = None,
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Activations by full name and the metric of one run; of several with fewer rows each where one does not fit.

    Rows do not depend on one another, so only rounding tells the two apart.

    Args:
        model: a hooked model.
        batch: token rows.
        names: full site names.
        metric: one number a row.
        edits: what is edited in some rows of the batch.
    """
    parts: list[tuple[dict[str, Tensor], Tensor | None]] = []

    def some(rows: Sequence[int]) -> Sequence[int]:
        here = batch if len(rows) == len(batch) else batch.rows(rows)
        run = model.run(here, record=tuple(names), metric=metric, edits=() if edits is None else edits(rows))
        parts.append(({name: run.activations[name].values for name in names}, run.metric))
        return rows

    Halving(len(batch))(range(len(batch)), lambda rows: list(some(rows)))
    if len(parts) == 1:
        return parts[0]
    values = {name: torch.cat([part[name] for part, _ in parts]) for name in names}
    return values, None if metric is None else torch.cat([value for _, value in parts if value is not None])
