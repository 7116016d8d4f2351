"""Smooth lines upward between boxes that stand in rows, around the boxes of the rows between."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Span = tuple[float, float]

LANE = 0.04  # width of the cells in which lines run, in inches
CLEAR = 0.05  # least distance between a line and a box
STUB = 0.03  # lines leave and arrive vertically for so long
SHARED = 0.04  # price of running where another line runs, in the unit of (sideways)^2 / upward


@dataclass(frozen=True, slots=True)
class Row:
    """Boxes at one height: their bottom, their top, and from where to where each goes sideways, in inches."""

    bottom: float
    top: float
    boxes: tuple[Span, ...]


@dataclass(frozen=True, slots=True)
class Line:
    """From somewhere on the top of a box in one row to somewhere on the bottom of a box in a higher row."""

    start: int
    leaves: Span
    end: int
    arrives: Span


def routes(rows: Sequence[Row], lines: Sequence[Line], width: Span) -> list[np.ndarray]:
    """A path for each line; the first lines get the straightest ones.

    Of all paths through the cells at the bottoms and tops of rows, the one with least sum of (sideways)^2 / upward is
    taken, by dynamic programming, where it costs extra to run where an earlier line runs. Between these heights the
    path is a monotone cubic, which never bulges beyond its ends and so never into a box.

    Args:
        rows: from the lowest up, not overlapping.
        lines: most important first.
        width: from where to where lines may go.

    Returns:
        For each line [3n + 1, 2]: the corners of n cubic Bezier curves.
    """
    cells = np.arange(width[0], width[1] + LANE / 2, LANE)
    squares = (cells[:, None] - cells) ** 2
    free = np.ones((len(rows), cells.size), dtype=bool)
    for index, row in enumerate(rows):
        for left, right in row.boxes:
            free[index] &= (cells < left - CLEAR) | (cells > right + CLEAR)
    # cells of a row between which no box lies have one number
    gaps = np.cumsum(np.diff(free, axis=1, prepend=True), axis=1)
    heights = np.array([[row.bottom, row.top] for row in rows]).reshape(-1)
    used = np.zeros((heights.size, cells.size))
    paths = []
    for line in lines:
        levels = np.arange(2 * line.start + 1, 2 * line.end + 1)
        cost = _within(cells, line.leaves) + used[levels[0]]
        came: list[np.ndarray] = []
        for level in range(2 * line.start + 2, 2 * line.end + 1):
            step = squares / (heights[level] - heights[level - 1]) + cost[:, None]
            at = level // 2
            if level % 2:  # from the bottom to the top of a row
                step = np.where(gaps[at][:, None] == gaps[at], step, np.inf)
            came.append(step.argmin(0))
            cost = step.min(0) + used[level] + (0.0 if at == line.end else np.where(free[at], 0.0, np.inf))
        cost = cost + _within(cells, line.arrives)
        places = [int(cost.argmin())]
        for back in reversed(came):
            places.append(int(back[places[-1]]))
        chosen = np.array(places[::-1])
        for beside, price in ((-1, 0.5), (0, 1.0), (1, 0.5)):
            used[levels, np.clip(chosen + beside, 0, cells.size - 1)] += price * SHARED
        paths.append(_smooth(_relaxed(cells[chosen], heights[levels]), heights[levels]))
    return paths


def _within(cells: np.ndarray, span: Span) -> np.ndarray:
    """0 for the cells inside a span, or the one nearest to its middle where none is; infinite for the others."""
    inside = (cells >= span[0]) & (cells <= span[1])
    if not inside.any():
        inside[np.abs(cells - (span[0] + span[1]) / 2).argmin()] = True
    return np.where(inside, 0.0, np.inf)


def _relaxed(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Straighter within the cells: inner points move toward the line between their neighbours, half a cell at most."""
    low, high = x - LANE / 2, x + LANE / 2
    share = (y[1:-1] - y[:-2]) / (y[2:] - y[:-2])
    for _ in range(30):
        x = np.concatenate([x[:1], x[:-2] + share * (x[2:] - x[:-2]), x[-1:]])
        x = np.clip(x, low, high)
    return x


def _smooth(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The monotone cubic through the points, vertical at both ends, as Bezier curves."""
    from scipy.interpolate import PchipInterpolator

    stub = min(STUB, float(y[1] - y[0]) / 4, float(y[-1] - y[-2]) / 4)
    y = np.concatenate([[y[0], y[0] + stub], y[1:-1], [y[-1] - stub, y[-1]]])
    x = np.concatenate([x[:1], x, x[-1:]])
    slopes = PchipInterpolator(y, x).derivative()(y)
    third = np.diff(y)[:, None] / 3
    points, tangents = np.stack([x, y], axis=1), np.stack([slopes, np.ones_like(slopes)], axis=1)
    first, second = points[:-1] + third * tangents[:-1], points[1:] - third * tangents[1:]
    corners = np.stack([first, second, points[1:]], axis=1).reshape(-1, 2)
    return np.concatenate([points[:1], corners])
