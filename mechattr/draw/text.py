"""Values of tokens: bars for a few, the text itself with coloured ground for more."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from mechattr.draw.style import (
    INK,
    RED_BLUE,
    SMALL_POINTS,
    TICK_POINTS,
    array,
    colours,
    ink_on,
    limits,
    pyplot_axes,
    style,
)
from mechattr.draw.tokens import spell
from mechattr.errors import SettingError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from mechattr.draw.style import Values

FEW = 15  # units below which bars are read more easily than colours
WIDTH = 6.8  # inches of a line of text
CHARACTER = 0.64 * TICK_POINTS / 72  # inches, on average


def token_values(tokens: Sequence[str], values: Values, *, label: str, ax: Axes | None = None) -> Axes:
    """Which tokens? A bar each for fewer than 15; the coloured text, line by line, for more.

    Args:
        tokens: texts of the tokens.
        values: one a token; grey where not finite.
        label: what the values are, with their unit.
        ax: axes to draw into; pyplot's new figure without it.

    Raises:
        SettingError: not one value a token.
    """
    each = array(values).ravel()
    if len(tokens) != each.size:
        found = f"{len(tokens)} tokens and {each.size} values"
        raise SettingError("values of tokens", found, "give one value a token")
    draw = named_bars if each.size < FEW else _strip
    return draw([spell(token, longest=14) for token in tokens], each, label, ax)


def named_bars(names: Sequence[str], values: np.ndarray, label: str, ax: Axes | None = None) -> Axes:
    """A bar for each name, from the top: blue where positive, red where negative."""
    with style():
        if ax is None:
            ax = pyplot_axes(5.6, 0.9 + 0.24 * len(values))
        rows = np.arange(len(values))
        ax.barh(rows, values, height=0.72, color=np.where(values >= 0, RED_BLUE[-2], RED_BLUE[1]), zorder=2, gid="bar")
        ax.set_yticks(rows, names)
        ax.set_ylim(len(values) - 0.4, -0.6)
        ax.axvline(0.0, color=INK, linewidth=0.8, zorder=3)
        ax.tick_params(axis="y", length=0)
        ax.set_xlabel(label)
    return ax


def _strip(names: Sequence[str], values: np.ndarray, label: str, ax: Axes | None = None) -> Axes:
    from matplotlib.cm import ScalarMappable
    from matplotlib.patches import Rectangle

    bounds = limits(values)
    cmap, norm = colours(bounds.bound, signed=True)
    with style():
        room = (WIDTH if ax is None else ax.get_window_extent().width / ax.figure.dpi) / CHARACTER
        places, line, left = [], 0, 0.0
        for name in names:
            width = len(name) + 1.0
            if left and left + width > room:
                line, left = line + 1, 0.0
            places.append((line, left, width))
            left += width
        if ax is None:
            ax = pyplot_axes(WIDTH + 0.2, 0.32 * (line + 1) + 0.85)
        for name, value, (row, start, width) in zip(names, values, places, strict=True):
            rgba = cmap(norm(value) if math.isfinite(value) else math.nan)
            ax.add_patch(
                Rectangle(
                    (start, row - 0.4), width, 0.8, facecolor=rgba, edgecolor="#dddddd", linewidth=0.5, gid="token"
                )
            )
            ink, points = ink_on(rgba), TICK_POINTS if len(name) < 9 else SMALL_POINTS
            ax.text(start + width / 2, row, name, ha="center", va="center", fontsize=points, color=ink)
        ax.set(xlim=(0, room), ylim=(line + 0.6, -0.6), xticks=[], yticks=[])
        for spine in ax.spines.values():
            spine.set_visible(False)
        bar = ax.figure.figure.colorbar(
            ScalarMappable(norm, cmap), ax=ax, orientation="horizontal", shrink=0.5, aspect=28, pad=0.12 / (line + 1),
            extend="both" if bounds.n_clipped else "neither",
        )  # fmt: skip
        notes = [bounds.note] * bool(bounds.n_clipped) + ["grey: not measured"] * (not np.isfinite(values).all())
        bar.set_label("; ".join([label, *notes]))
        bar.outline.set_linewidth(0.6)
    return ax
