"""Estimate against exact."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from mechattr.draw.labels import place
from mechattr.draw.style import array, new_figure, style
from mechattr.errors import SettingError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from mechattr.draw.style import Values

GROUP_COLOURS = ("#2166ac", "#e08214", "#5aae61", "#9970ab", "#8c510a", "#666666")
GROUP_MARKERS = ("o", "s", "^", "D", "v", "P")


def spearman(estimate: Values, exact: Values) -> float:
    """Spearman's rank correlation: the correlation of the ranks, where equal values share the mean of their ranks.

    Pairs with a value that is not finite are left out; NaN below 3 pairs or without variation.
    """
    x, y = array(estimate).ravel(), array(exact).ravel()
    both = np.isfinite(x) & np.isfinite(y)
    x, y = _ranks(x[both]), _ranks(y[both])
    if x.size < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return math.nan
    return float(np.corrcoef(x, y)[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]


def scatter(
    estimate: Values,
    exact: Values,
    names: Sequence[str],
    *,
    groups: Sequence[str] | None = None,
    unit: str = "",
    title: str = "",
    n_labels: int = 10,
    ax: Axes | None = None,
) -> Axes:
    """Is the estimate right? Estimate (x) against exact effect (y) on symmetric log axes, with the diagonal.

    The axes are linear around 0, up to a power of ten below most of the values. Spearman's correlation stands above,
    and the points with the largest |estimate - exact| are labelled. Pairs with a value that is not finite are
    left out.

    Args:
        estimate: values, any shape.
        exact: as many values.
        names: a name a point.
        groups: the kind of each point, which sets its colour and marker.
        unit: unit of both values, for the axis labels.
        title: a line above.
        n_labels: how many of the worst points are labelled.
        ax: axes to draw into; a new figure without it.

    Raises:
        SettingError: the lengths differ.
    """
    x, y = array(estimate).ravel(), array(exact).ravel()
    kinds = list(groups) if groups is not None else [""] * x.size
    if not x.size == y.size == len(names) == len(kinds):
        raise SettingError(
            "a scatter of estimate against exact",
            f"{x.size} estimates, {y.size} exact values, {len(names)} names, {len(kinds)} groups",
            "give one of each a point",
        )
    both = np.isfinite(x) & np.isfinite(y)
    with style():
        if ax is None:
            ax = new_figure(5.2, 5.0).add_subplot()
        bound = float(max(np.abs(x[both]).max(initial=0.0), np.abs(y[both]).max(initial=0.0))) or 1.0
        decade = _linear_until(np.abs(np.concatenate([x[both], y[both]])), bound)
        for name, setter in (("x", ax.set_xlim), ("y", ax.set_ylim)):
            getattr(ax, f"set_{name}scale")("symlog", linthresh=decade, linscale=0.6)
            setter(-1.6 * bound, 1.6 * bound)
            _ticks(ax, name, bound, decade)
        line = np.array([-1.6 * bound, 1.6 * bound])
        ax.plot(line, line, color="#888888", linewidth=0.8, linestyle="--", zorder=1, label="_diagonal")
        for axis_line in (ax.axhline, ax.axvline):
            axis_line(0.0, color="#dddddd", linewidth=0.6, zorder=0)
        for index, kind in enumerate(dict.fromkeys(kinds)):
            mine = both & (np.asarray(kinds) == kind)
            ax.scatter(
                x[mine], y[mine], s=16, color=GROUP_COLOURS[index % 6], marker=GROUP_MARKERS[index % 6], alpha=0.8,
                linewidths=0, label=kind or "_points", zorder=2,
            )  # fmt: skip
        suffix = f" [{unit}]" if unit else ""
        ax.set(xlabel=f"estimate{suffix}", ylabel=f"exact{suffix}")
        ax.set_aspect("equal")
        rho = spearman(x, y)
        found = f"Spearman {rho:.3f}" if math.isfinite(rho) else "Spearman: too few points"
        grouped = any(kinds)
        ax.set_title(
            "\n".join([title] * bool(title) + [f"{found}, n = {both.sum()}"]), loc="left", pad=20 if grouped else 6
        )
        if grouped:  # above the axes, where it can cover no point
            ax.legend(
                loc="lower left",
                bbox_to_anchor=(-0.02, 0.99),
                ncols=6,
                frameon=False,
                handletextpad=0.1,
                columnspacing=1,
            )
        gap = np.where(both, np.abs(x - y), -1.0)
        worst = [int(i) for i in np.argsort(-gap, kind="stable")[:n_labels] if gap[i] > 0]
        points, rest = np.stack([x, y], axis=1), both.copy()
        rest[worst] = False
        for note in place(ax, points[worst].tolist(), [names[i] for i in worst], others=points[rest]):
            note.set_gid("worst")
            note.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.8})
    return ax


def _linear_until(magnitudes: np.ndarray, bound: float) -> float:
    """The power of ten below the smallest tenth of the values, within three decades of the largest."""
    values = magnitudes[magnitudes > 0]
    low = float(np.percentile(values, 10)) if values.size else bound
    return 10.0 ** math.floor(math.log10(min(max(low, bound / 1000), bound / 3)))


def _ticks(ax: Axes, name: str, bound: float, decade: float) -> None:
    """Ticks at zero and the decades, thinned so that neighbours near zero never touch."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    exponents = range(round(math.log10(decade)), math.floor(math.log10(1.6 * bound)) + 1)
    every = 1 if len(exponents) <= 4 else 2  # from the largest down
    decades = [10.0**e for e in exponents[::-1][::every]][::-1]
    axis = ax.xaxis if name == "x" else ax.yaxis
    axis.set_major_locator(FixedLocator([-d for d in reversed(decades)] + [0.0] + decades))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))


def _short(value: float) -> str:
    """`0.01`, `-1`, `1e-05`: a tick's number with a true minus sign."""
    return f"{value:g}".replace("-", "−", 1) if value < 0 else f"{value:g}"
