"""Waterfalls: what a sum consists of."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np

from mechattr.draw.style import INK, RED_BLUE, SMALL_POINTS, array, pyplot_axes, style
from mechattr.errors import SettingError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from mechattr.draw.style import Values

MOST = 36  # rows before small heads are put together
HEADS = 12  # that keep a row of their own then
POSITIVE, NEGATIVE, TOTAL, BAND = RED_BLUE[-2], RED_BLUE[1], "#666666", "#f3f3f3"
Row = tuple[str, float]


def waterfall(
    names: Sequence[str], values: Values, *, total: float | None = None, label: str = "logit", ax: Axes | None = None
) -> Axes:
    """What does the logit consist of? A bar for each component, each from where the last one ended; layers on bands.

    Of more than 36 components the 12 largest heads keep their rows; the other heads of a layer are one row, and so are
    all biases of layers.

    Args:
        names: of the components from the input upward, such as `L3H5`, `MLP 3` or `norm bias`.
        values: [component], which are added up in this order.
        total: what they should sum to; the difference is then shown as `remainder`.
        label: what the sum is, with its unit.
        ax: axes to draw into; pyplot's new figure without it.

    Raises:
        SettingError: not one value a name.
    """
    each = array(values).ravel()
    if len(names) != each.size:
        raise SettingError("a waterfall", f"{each.size} values, {len(names)} names", "give one value a name")
    rows = _rows(names, each.tolist())
    if total is not None:
        rows.append(("remainder", total - float(each.sum())))
    ends = np.cumsum([value for _, value in rows])
    sums = float(ends[-1]) if total is None else total
    with style():
        if ax is None:
            ax = pyplot_axes(6.4, 0.9 + 0.2 * (len(rows) + 1))
        starts = np.concatenate([[0.0], ends[:-1]])
        colours = [POSITIVE if value >= 0 else NEGATIVE for _, value in rows]
        ax.barh(np.arange(len(rows)), ends - starts, left=starts, height=0.72, color=colours, zorder=2, gid="component")
        ax.barh([len(rows)], [sums], height=0.72, color=TOTAL, zorder=2, gid="total")
        for row, end in enumerate(ends[:-1]):
            ax.plot([end, end], [row - 0.36, row + 1.36], color="#999999", linewidth=0.6, zorder=1)
        low, high = min(ends.min(), 0.0, sums), max(ends.max(), 0.0, sums)
        reach = float(high - low) or 1.0
        rights = [*np.maximum(starts, ends), max(sums, 0.0)]
        for row, (value, right) in enumerate(zip([*(value for _, value in rows), sums], rights, strict=True)):
            ax.text(right + 0.01 * reach, row, _number(value), va="center", fontsize=SMALL_POINTS, zorder=3)
        for first, last, odd in _bands([name for name, _ in rows]):
            if odd:
                ax.axhspan(first - 0.5, last + 0.5, color=BAND, zorder=0, linewidth=0)
        ax.axvline(0.0, color=INK, linewidth=0.8, zorder=1)
        ax.set_yticks(range(len(rows) + 1), [*(name for name, _ in rows), "sum"])
        ax.set_ylim(len(rows) + 0.6, -0.6)
        ax.set_xlim(low - 0.03 * reach, high + 0.1 * reach)  # room for the number beside the longest bar
        ax.tick_params(axis="y", length=0)
        ax.set_xlabel(label)
    return ax


def _rows(names: Sequence[str], values: Sequence[float]) -> list[Row]:
    """Every component; of many, the largest heads, the others by layer, and biases together."""
    rows = list(zip(names, values, strict=True))
    if len(rows) <= MOST:
        return rows
    heads = sorted((row for row in rows if _is_head(row[0])), key=lambda row: -abs(row[1]))
    kept = {name for name, _ in heads[:HEADS]}
    found: list[Row] = []
    biases: list[float] = []
    last = 0  # row after the last layer
    for layer, group in groupby(rows, key=lambda row: _layer(row[0])):
        members = list(group)
        if layer is None:
            found += members
            continue
        biases += [value for name, value in members if name.startswith("b_")]
        members = [row for row in members if not row[0].startswith("b_")]
        small = [value for name, value in members if _is_head(name) and name not in kept]
        found += [row for row in members if row[0] in kept]
        found += [(f"L{layer}, {len(small)} other heads", sum(small))] if small else []
        found += [row for row in members if not _is_head(row[0])]
        last = len(found)
    return [*found[:last], *([("biases of layers", sum(biases))] if biases else []), *found[last:]]


def _is_head(name: str) -> bool:
    return re.fullmatch(r"L\d+H\d+", name) is not None


def _layer(name: str) -> int | None:
    match = re.search(r"\d+", name)
    return None if match is None else int(match[0])


def _bands(names: Sequence[str]) -> list[tuple[int, int, bool]]:
    """First and last row of each layer, and whether the layer is odd."""
    found, row = [], 0
    for layer, group in groupby(names, key=_layer):
        n = len(list(group))
        found.append((row, row + n - 1, layer is not None and layer % 2 == 1))
        row += n
    return found


def _number(value: float) -> str:
    return f"{value:+.2f}" if abs(value) >= 0.005 or value == 0 else f"{value:+.0e}"
