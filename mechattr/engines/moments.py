"""Running means and second moments in float64, added up batch by batch without keeping what was seen."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(eq=False, slots=True)
class Moments:
    """Mean and scatter of vectors that come in parts.

    Attributes:
        d: their width.
        scatter: whether sum (x - mean)(x - mean)' is kept, d^2 numbers.
        n: how many have come.
        mean: their mean.
        centred: the scatter about the mean.
    """

    d: int
    scatter: bool = True
    n: int = field(default=0, init=False)
    mean: Float[Tensor, " d"] = field(init=False)
    centred: Float[Tensor, "d d"] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.mean = torch.zeros(self.d, dtype=torch.float64)
        self.centred = torch.zeros(self.d, self.d, dtype=torch.float64) if self.scatter else None

    def add(self, x: Float[Tensor, "n d"]) -> None:
        """More vectors: both parts' scatter, and that of their means (Chan, Golub, LeVeque 1979)."""
        x = x.detach().to("cpu", torch.float64)
        k = len(x)
        if not k:
            return
        mean = x.mean(0)
        step, total = mean - self.mean, self.n + k
        if self.centred is not None:
            inside = x - mean
            self.centred += inside.T @ inside + torch.outer(step, step) * (self.n * k / total)
        self.mean = self.mean + step * (k / total)
        self.n = total

    @property
    def covariance(self) -> Float[Tensor, "d d"]:
        """The scatter over n, which is 0 for one vector."""
        assert self.centred is not None
        return self.centred / max(self.n, 1)

    @property
    def uncentred(self) -> Float[Tensor, "d d"]:
        """The mean of x x'."""
        return self.covariance + torch.outer(self.mean, self.mean)
