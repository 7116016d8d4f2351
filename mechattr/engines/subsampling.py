"""Difference in means: which of many switches moves a number, when random subsets of them are switched on together.

Each sample switches every node on with probability p, independently, and measures one number s. For each node

$$\\Delta_n = \\bar s_{n \\in S} - \\bar s_{n \\notin S}, \\qquad
\\mathrm{SE}_n^2 = \\frac{v^+}{c^+} + \\frac{v^-}{c^-}, \\qquad
\\nu_n = \\frac{\\mathrm{SE}_n^4}{(v^+/c^+)^2/(c^+-1) + (v^-/c^-)^2/(c^--1)}$$

(Welch) with counts c and sample variances v of the samples with (+) and without (-) the node, the variance of the
smaller group being at least that of the larger one. Delta is an unbiased
estimate of the node's effect averaged over the random sets of the others; it is the node's own effect where effects
add up.

Samples may come from several strata (prompt pairs). Then the quantity of interest is the mean over strata of
|effect|, estimated by the mean of |Delta|, which is too large rather than too small; SE and nu are those of the mean of
the Deltas (Welch-Satterthwaite). An upper bound from it holds without a union over strata: with the true signs sigma,
mean(|Delta|) >= mean(sigma Delta), and the latter is unbiased.

Control variate: subtracting from each sample the sum of constants c_n over its nodes changes the expectation of Delta_n
by exactly -c_n, because nodes are drawn independently. With c_n close to the effects little of the spread is left.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.special import stdtr, stdtrit
from torch import Tensor

ROUNDING = 1e-13  # a sum of squares that cancels to so small a part of itself is rounding
MIN_INCLUSIONS = 8  # expected inclusions of a node at the first look
MAX_LOOKS = 6
AT_ONCE = 2**17  # numbers of a sample and node that are held in float64 at a time: they stay in the processor's cache


@dataclass(frozen=True, eq=False, slots=True)
class Moments:
    """Count, mean and sum of squares about the mean, of many groups of numbers at once."""

    count: Float[Tensor, " group"]
    mean: Float[Tensor, " group"]
    squares: Float[Tensor, " group"]

    @classmethod
    def of_powers(cls, sums: Float[Tensor, "3 group"], centre: Tensor) -> Moments:
        """From sums of 1, x - centre and its square; `centre` has to be near the numbers, or digits are lost."""
        count, total, squares = sums
        mean = total / count.clamp_min(1)
        about_mean = squares - total * mean
        return cls(count, centre + mean, torch.where(about_mean <= ROUNDING * squares, 0, about_mean))

    def __add__(self, other: Moments) -> Moments:
        """The moments of both parts together (Chan et al. 1979), without cancellation."""
        count = self.count + other.count
        safe, delta = count.clamp_min(1), other.mean - self.mean
        mean = torch.where(self.count == 0, other.mean, self.mean + delta * other.count / safe)
        squares = self.squares + other.squares + delta.square() * self.count * other.count / safe
        return Moments(count, mean, squares)

    @property
    def variance(self) -> Float[Tensor, " group"]:
        """Unbiased; NaN below two numbers."""
        return torch.where(self.count < 2, math.nan, self.squares / (self.count - 1))


@dataclass(frozen=True, eq=False, slots=True)
class Split:
    """For each node, the samples with it and those without it."""

    inside: Moments
    outside: Moments

    @classmethod
    def of(cls, chosen: Bool[Tensor, "sample node"], values: Float[Tensor, " sample"]) -> Split:
        """The split of some samples: which nodes each had, and its number."""
        values = values.double()
        centre = values.mean() if len(values) else torch.zeros((), dtype=torch.float64)
        powers = torch.stack([torch.ones_like(values), values - centre, (values - centre).square()])
        sums = torch.empty(2, 3, chosen.shape[1], dtype=torch.float64)
        width = max(1, AT_ONCE // max(1, len(values)))
        for first in range(0, chosen.shape[1], width):
            nodes = slice(first, first + width)
            mask = chosen[:, nodes].double()
            sums[0, :, nodes] = powers @ mask
            sums[1, :, nodes] = powers @ mask.neg_().add_(1)
        inside, outside = (Moments.of_powers(part, centre) for part in sums)
        return cls(inside, outside)

    def __add__(self, other: Split) -> Split:
        return Split(self.inside + other.inside, self.outside + other.outside)


@dataclass(frozen=True, eq=False, slots=True)
class Contrast:
    """What a sample says about each node's effect.

    Attributes:
        size: estimate of |effect|, NaN where a node has too few samples.
        signed: estimate of the effect, NaN likewise.
        error: its standard error; infinite where a node has fewer than two samples with it, or without it.
        dof: degrees of freedom of the error, NaN where that is infinite.
    """

    size: Float[Tensor, " node"]
    signed: Float[Tensor, " node"]
    error: Float[Tensor, " node"]
    dof: Float[Tensor, " node"]

    def tail(self, theta: float) -> Float[Tensor, " node"]:
        """p_n(theta) = P(T_nu >= (theta - size)/error): how likely so small a difference is if |effect| = theta."""
        gap = theta - self.size
        t = torch.where(self.error == 0, torch.where(gap > 0, math.inf, -math.inf), gap / self.error)
        p = torch.from_numpy(np.asarray(stdtr(self.dof.numpy(), -t.numpy())))
        return torch.where(self.error.isinf(), 1.0, p)

    def upper(self, level: float) -> Float[Tensor, " node"]:
        """The effect at which each node's tail falls to `level`: size + t_{nu, 1-level} * error."""
        quantile = torch.from_numpy(np.asarray(-stdtrit(self.dof.numpy(), level)))
        return torch.where(self.error.isinf(), math.inf, self.size + quantile * self.error)


def contrast(
    strata: Sequence[Split],
    live: Bool[Tensor, "stratum node"] | None = None,
    offset: Float[Tensor, "stratum node"] | None = None,
) -> Contrast:
    """Mean over strata of |effect| with its error; with one stratum, |effect|.

    The smaller group of a node takes the variance of the larger one where that is larger: a few samples may not have
    seen the rare large effects of other nodes, and would then look too sure. Where neither has any spread, the error is
    zero.

    Args:
        strata: the splits, one a stratum.
        live: where a node can have an effect at all; elsewhere its effect is zero without error.
        offset: constants that were subtracted from the samples with each node, and are added to its difference again.
    """
    n = len(strata[0].inside.count)
    size, signed, variance, fourth, lacking, least = torch.zeros(6, n, dtype=torch.float64)
    for i, split in enumerate(strata):
        here = torch.ones(n, dtype=torch.bool) if live is None else live[i]
        delta, error2, dof = _welch(split)
        delta = delta if offset is None else delta + offset[i]
        few = error2.isnan()
        lacking += (here & few).double()
        take = here & ~few
        size += torch.where(take, delta.abs(), 0)
        signed += torch.where(take, delta, 0)
        variance += torch.where(take, error2, 0)
        fourth += torch.where(take, error2.square() / dof, 0)
        least += torch.where(take, dof, 0)
    # without any error the degrees of freedom do not matter, but have to be a number
    dof = torch.where(fourth > 0, variance.square() / fourth, least.clamp_min(1))
    bad = lacking > 0
    return Contrast(
        torch.where(bad, math.nan, size / len(strata)),
        torch.where(bad, math.nan, signed / len(strata)),
        torch.where(bad, math.inf, variance.sqrt() / len(strata)),
        torch.where(bad, math.nan, dof),
    )


def _welch(split: Split) -> tuple[Tensor, Tensor, Tensor]:
    """Difference, squared standard error and degrees of freedom of each node; NaN where a group has below two."""
    high, low = split.inside, split.outside
    spread = (
        torch.where(high.count < low.count, high.variance.maximum(low.variance), high.variance),
        torch.where(high.count < low.count, low.variance, low.variance.maximum(high.variance)),
    )
    parts = [v / group.count for v, group in zip(spread, (high, low), strict=True)]
    error2 = parts[0] + parts[1]
    fourth = parts[0].square() / (high.count - 1) + parts[1].square() / (low.count - 1)
    dof = torch.where(fourth > 0, error2.square() / fourth, high.count + low.count - 2)
    return high.mean - low.mean, error2, dof


def draw(
    seed: int, chunk: int, samples: int, nodes: int, p: float, strata: int
) -> tuple[Int[Tensor, " sample"], Bool[Tensor, "sample node"]]:
    """For the samples of a chunk, a stratum at random and which nodes are on; the same for the same arguments."""
    generator = np.random.default_rng([seed, chunk])
    stratum = generator.integers(strata, size=samples)
    chosen = np.empty((samples, nodes), dtype=np.bool_)
    for row in chosen:  # one after the other: a byte a node is kept, four only for one sample
        np.less(generator.random(nodes, dtype=np.float32), p, out=row)
    return torch.from_numpy(stratum), torch.from_numpy(chosen)


def planned_looks(samples: int, p: float) -> list[int]:
    """At how many samples to look whether the bound is met: doubling sizes, each node expected often enough."""
    sizes = [samples]
    while len(sizes) < MAX_LOOKS and sizes[0] // 2 * p >= MIN_INCLUSIONS:
        sizes.insert(0, sizes[0] // 2)
    return sizes
