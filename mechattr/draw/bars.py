"""Bars: what is lost without each part of a circuit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from mechattr.draw.labels import make_room, title
from mechattr.draw.style import INK, RED_BLUE, array, new_figure, style
from mechattr.errors import SettingError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from mechattr.draw.style import Values

MOST = 20  # bars
POSITIVE, NEGATIVE, GREY = RED_BLUE[-2], RED_BLUE[1], "#888888"


def drop_bars(
    names: Sequence[str],
    drops: Values,
    *,
    chance: float = math.nan,
    label: str = "chance",
    kind: str = "parts",
    note: str = "",
    ax: Axes | None = None,
) -> Axes:
    """What does the circuit need? The drop of faithfulness without each part, largest first, at most 20.

    Args:
        names: of the parts.
        drops: [part], in units of faithfulness; blue where faithfulness is lost, red where it is gained.
        chance: a drop to compare with, a grey dashed line; NaN for none.
        label: what `chance` is.
        kind: what the parts are, for the count of those that are not drawn.
        note: what to say above the axes, such as why the values cannot be trusted.
        ax: axes to draw into, best as large as `drop_size` says; their figure gets the constrained layout if it has
            none. A new figure without it.

    Raises:
        SettingError: not one drop a name.
    """
    values = array(drops).ravel()
    if len(names) != values.size:
        raise SettingError("bars of drops", f"{values.size} drops, {len(names)} names", "give one drop a name")
    order = np.argsort(-values, kind="stable")[:MOST]
    with style():
        if ax is None:
            ax = new_figure(*drop_size(len(names))).add_subplot()
        make_room(ax)
        shown, rows = values[order], np.arange(len(order))
        colours = [POSITIVE if value > 0 else NEGATIVE for value in shown]
        ax.barh(rows, shown, height=0.7, color=colours, gid="drop", zorder=2)
        ax.set_yticks(rows, [names[place] for place in order])
        ax.set_ylim(max(len(order), 1) - 0.4, -0.6)
        ax.tick_params(axis="y", length=0)
        ax.axvline(0.0, color=INK, linewidth=0.8, zorder=3)
        if math.isfinite(chance):
            ax.axvline(chance, color=GREY, linewidth=1.1, linestyle="--", zorder=3, gid="chance", label=label)
            ax.legend(loc="upper left", bbox_to_anchor=(0.0, 0.0), borderaxespad=3.8, frameon=False)  # below the axis
        rest = len(names) - len(order)
        ax.set_xlabel("drop of faithfulness")
        title(ax, note, f"the {len(order)} largest of {len(names)} {kind}" if rest else "")
    return ax


def drop_size(n: int) -> tuple[float, float]:
    """Width and height in inches of the figure that `drop_bars` needs for so many parts."""
    return 5.6, 1.5 + 0.21 * min(n, MOST)
