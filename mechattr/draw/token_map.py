"""Token by token heatmaps: what each position has of each other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from mechattr.draw.style import TICK_POINTS, array, colour_bar, colours, limits, pyplot_axes, style
from mechattr.draw.tokens import spell
from mechattr.errors import SettingError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from mechattr.draw.style import Values

MAX_TICKS = 60
_FRAME = "#999999"


def token_map(
    values: Values,
    tokens: Sequence[str],
    *,
    label: str,
    signed: bool = False,
    title: str = "",
    ax: Axes | None = None,
) -> Axes:
    """Which token does each position take from? A row a query, a column a source; every n-th of many is named.

    Args:
        values: [query, key].
        tokens: the tokens, one a position.
        label: what the colour means, with its unit.
        signed: red to blue around 0; otherwise magnitudes from white.
        title: a line above.
        ax: axes to draw into; pyplot's new figure without it.

    Raises:
        SettingError: values that are not one row and one column a token.
    """
    grid, n = array(values), len(tokens)
    if grid.shape != (n, n):
        found = f"values {grid.shape}, {n} tokens"
        raise SettingError("a token x token map", found, "give values as [query, key] with one token a position")
    bounds = limits(grid)
    cmap, norm = colours(bounds.bound, signed=signed)
    shown = [spell(token, longest=14) for token in tokens]
    step = math.ceil(n / MAX_TICKS)
    beside = max(map(len, shown)) * 0.085
    side = min(max(n * 0.21, 1.6), 8.0)
    if ax is None:
        ax = pyplot_axes(side + beside + 1.3, side + beside + 0.5)
    with style():
        ax.imshow(np.ma.masked_invalid(grid), cmap=cmap, norm=norm, interpolation="nearest")
        ticks = range(0, n, step)
        ax.set_xticks(ticks, [shown[i] for i in ticks], rotation=90, fontsize=TICK_POINTS)
        ax.set_yticks(ticks, [shown[i] for i in ticks], fontsize=TICK_POINTS)
        named = "" if step == 1 else f" (1 of {step} named)"
        ax.set(xlabel="source token" + named, ylabel="position")
        ax.set_title(title, loc="left")
        ax.tick_params(length=2)
        for spine in ax.spines.values():
            spine.set(visible=True, color=_FRAME)
        colour_bar([ax], cmap, norm, label, bounds, gaps=not np.isfinite(grid).all())
    return ax
