"""Ratios of timings: in one process, interleaved, with the interval of their median."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from scipy.stats import bootstrap


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """The median of paired ratios and its 95 % interval.

    Attributes:
        name: what is compared with what.
        value: median of (time of the one / time of the other), round by round.
        low, high: bootstrap interval of that median.
        target: the figure to reach; `None` where the row is for comparison only.
        at_most: whether the target is an upper bound.
        seconds: median seconds of the one and of the other.
    """

    name: str
    value: float
    low: float
    high: float
    target: float | None
    at_most: bool
    seconds: tuple[float, float]

    @property
    def met(self) -> bool | None:
        """Whether the median reaches the target."""
        if self.target is None:
            return None
        return self.value <= self.target if self.at_most else self.value >= self.target


def interleaved(functions: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 2) -> dict[str, np.ndarray]:
    """Seconds of each function, measured in turn (A B C A B C ...), so that other load hits all alike."""
    taken: dict[str, list[float]] = {name: [] for name in functions}
    for i in range(warmup + rounds):
        for name, function in functions.items():
            gc.collect()
            gc.disable()
            begin = time.perf_counter()
            function()
            elapsed = time.perf_counter() - begin
            gc.enable()
            if i >= warmup:
                taken[name].append(elapsed)
    return {name: np.array(values) for name, values in taken.items()}


def ratio(name: str, one: np.ndarray, other: np.ndarray, *, target: float | None = None, at_most: bool = True) -> Ratio:
    """The median of `one / other` over rounds, with its interval."""
    paired = one / other
    interval = bootstrap((paired,), np.median, n_resamples=2000, method="percentile", rng=0).confidence_interval
    return Ratio(
        name=name,
        value=float(np.median(paired)),
        low=float(interval.low),
        high=float(interval.high),
        target=target,
        at_most=at_most,
        seconds=(float(np.median(one)), float(np.median(other))),
    )
