"""Intervals: what another draw of the same size could have given."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

DRAWS = 2000


class Estimate(NamedTuple):
    """A mean with its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}]"


def interval(
    values: Float[Tensor, "*dims"], *, confidence: float = 0.95, draws: int = DRAWS, seed: int = 0
) -> Float[Tensor, "3 ..."]:
    """The mean over items, the last axis, with its percentile bootstrap interval: (mean, low, high). Items are drawn
    with replacement, the same ones for everything in front of that axis; NaN is left out."""
    wide, real = values.double().cpu().nan_to_num(0.0), (~values.isnan()).double().cpu()
    n = wide.shape[-1]
    drawn = torch.randint(n, (draws, n), generator=torch.Generator().manual_seed(seed))
    weights = torch.zeros(draws, n, dtype=torch.double).scatter_add(1, drawn, torch.full(drawn.shape, 1 / n).double())
    edge = (1 - confidence) / 2
    means = (wide @ weights.T) / (real @ weights.T)
    low, high = torch.nanquantile(means, torch.tensor([edge, 1 - edge], dtype=torch.double), dim=-1)
    return torch.stack([wide.sum(-1) / real.sum(-1), low, high])


def estimate(values: Float[Tensor, " item"]) -> Estimate:
    """The mean of one number an item, with its interval."""
    return Estimate(*interval(values).tolist())
