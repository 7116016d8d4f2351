"""One point a method, with its interval, beside baselines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from mechattr.draw.curves import GREY
from mechattr.draw.labels import make_room
from mechattr.draw.scatter import GROUP_COLOURS
from mechattr.draw.style import array, new_figure, style
from mechattr.errors import SettingError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from mechattr.draw.style import Values

DASHES = ("--", ":", "-.")


def dots(
    values: Values,
    names: Sequence[str],
    *,
    low: Values,
    high: Values,
    references: Mapping[str, float] | None = None,
    label: str = "",
    title: str = "",
    legend: bool = True,
    ax: Axes | None = None,
) -> Axes:
    """How do methods compare? One row a method from the top, a point at its value with its interval.

    Args:
        values: one a method, from 0 to 1; NaN draws no point.
        names: of the methods.
        low: lower ends of the intervals.
        high: upper ends.
        references: by name, values of baselines, drawn as grey dashed lines; up to three.
        label: what the values are.
        title: above the axes.
        legend: name the baselines below the axes.
        ax: axes to draw into; a new figure without it.

    Raises:
        SettingError: values, intervals and names of different lengths, or more than three baselines.
    """
    x, ends, lines = array(values).ravel(), (array(low).ravel(), array(high).ravel()), dict(references or {})
    if not len(x) == len(ends[0]) == len(ends[1]) == len(names) or len(lines) > len(DASHES):
        found = f"{len(x)} values, {len(ends[0])} and {len(ends[1])} ends, {len(names)} names, {len(lines)} baselines"
        raise SettingError("points with intervals", found, "give one of each a method, and at most 3 baselines")
    with style():
        if ax is None:
            ax = new_figure(*dots_size(len(names))).add_subplot()
        make_room(ax)
        rows = np.arange(len(names))
        for (name, value), dash in zip(lines.items(), DASHES, strict=False):
            ax.axvline(value, color=GREY, linewidth=1.1, linestyle=dash, zorder=1, label=name, gid=f"baseline-{name}")
        ax.hlines(rows, *ends, color=GROUP_COLOURS[0], linewidth=2.0, alpha=0.55, zorder=2, gid="interval")
        ax.plot(x, rows, "o", color=GROUP_COLOURS[0], markersize=5.0, zorder=3, gid="value")
        ax.set_yticks(rows, list(names))
        ax.set(ylim=(len(names) - 0.4, -0.6), xlim=(-0.02, 1.02), xlabel=label)
        ax.grid(axis="y", color="#eeeeee", linewidth=0.8)
        ax.set_axisbelow(True)
        ax.tick_params(axis="y", length=0)
        ax.set_title(title)
        if lines and legend:
            ax.figure.legend(
                *ax.get_legend_handles_labels(), loc="outside lower center", ncols=len(lines), frameon=False
            )
    return ax


def dots_size(n: int) -> tuple[float, float]:
    """Width and height in inches of the figure that `dots` needs for so many methods."""
    return 5.6, 1.3 + 0.26 * n
