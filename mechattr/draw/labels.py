"""Text beside points, without overlap."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from mechattr.draw.style import INK, SMALL_POINTS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.text import Annotation
    from matplotlib.transforms import Bbox

RINGS = (5.0, 10.0, 18.0, 28.0, 42.0, 60.0, 84.0)  # distances from the point, in points
STEP = 6.0  # pixels between the points of a line that text keeps clear of
DIRECTIONS = tuple(math.radians(angle) for angle in (20, 160, -20, -160, 55, 125, -55, -125, 90, -90, 0, 180))


def overlap(one: Bbox, other: Bbox) -> float:
    """Area that two boxes share, in square pixels."""
    width = min(one.x1, other.x1) - max(one.x0, other.x0)
    height = min(one.y1, other.y1) - max(one.y0, other.y0)
    return float(max(width, 0.0) * max(height, 0.0))


def place(
    ax: Axes,
    points: Sequence[tuple[float, float]],
    texts: Sequence[str],
    *,
    size: float = SMALL_POINTS,
    radius: float = 3.0,
    others: np.ndarray | None = None,
) -> list[Annotation]:
    """Writes each text near its point, where it covers no other label, no point and no edge of the axes.

    First come, first served. Places are tried on rings around the point; a label that has to go far gets a thin leader,
    and where nothing is free the place that covers least is taken. It works in pixels: call it when limits, ticks and
    layout are final.

    Args:
        ax: axes that hold the points.
        points: data coordinates.
        texts: one a point, most important first.
        size: font size in points.
        radius: radius of the drawn markers in points, kept free of text.
        others: [n, 2], data coordinates of markers that get no label and are not covered either.

    Returns:
        The annotations, in the order of `texts`.
    """
    from matplotlib.transforms import Bbox

    ax.figure.figure.draw_without_rendering()  # runs the layout, so that pixels are final
    per_point = ax.figure.dpi / 72.0
    inside = ax.get_window_extent()
    centres = ax.transData.transform(np.asarray(points, dtype=float).reshape(-1, 2))
    unnamed = np.zeros((0, 2)) if others is None else ax.transData.transform(others)
    reach = radius * per_point
    taken = [Bbox.from_extents(x - reach, y - reach, x + reach, y + reach) for x, y in (*centres, *unnamed)]
    written = []
    for (x, y), point, text in zip(centres, points, texts, strict=True):
        note = ax.annotate(
            text, point, (0, 0), textcoords="offset points", fontsize=size, color=INK, ha="center", va="center"
        )
        note.set_in_layout(False)
        extent = note.get_window_extent()
        half_width, half_height = extent.width / 2 + 1.0, extent.height / 2 + 1.0
        best: tuple[float, float, float, Bbox] | None = None
        for ring in RINGS:
            for angle in DIRECTIONS:
                # the ring is the gap between the point and the nearest edge of the text, not its centre
                dx = math.cos(angle) * (ring * per_point + half_width) if abs(math.cos(angle)) > 0.1 else 0.0
                dy = math.sin(angle) * (ring * per_point + half_height)
                box = Bbox.from_extents(
                    x + dx - half_width, y + dy - half_height, x + dx + half_width, y + dy + half_height
                )
                outside = box.width * box.height - overlap(box, inside)
                cost = sum(overlap(box, other) for other in taken) + 4.0 * outside
                if best is None or cost < best[0]:
                    best = (cost, dx, dy, box)
            if best is not None and best[0] == 0.0:
                break
        if best is None:
            continue
        _, dx, dy, box = best
        taken.append(box)
        note.set_position((dx / per_point, dy / per_point))
        if math.hypot(max(abs(dx) - half_width, 0.0), max(abs(dy) - half_height, 0.0)) > 1.5 * radius * per_point:
            ends = ax.transData.inverted().transform([(x, y), _nearest_edge(box, x, y)])
            ax.plot(ends[:, 0], ends[:, 1], color=INK, linewidth=0.5, zorder=2.5, scalex=False, scaley=False)
        written.append(note)
    return written


def _nearest_edge(box: Bbox, x: float, y: float) -> tuple[float, float]:
    """The point of a box that is nearest to (x, y)."""
    return min(max(x, box.x0), box.x1), min(max(y, box.y0), box.y1)


def along_lines(ax: Axes) -> np.ndarray:
    """Points [n, 2] along every line of the axes, in data coordinates, so that `place` keeps text clear of lines."""
    found = [np.zeros((0, 2))]
    for line in ax.get_lines():
        corners = line.get_transform().transform(np.asarray(line.get_xydata(), dtype=float))
        corners = corners[np.isfinite(corners).all(1)]
        if len(corners):
            lengths = np.concatenate([[0.0], np.hypot(*np.diff(corners, axis=0).T).cumsum()])
            steps = np.arange(0.0, lengths[-1] + STEP, STEP)
            points = np.stack([np.interp(steps, lengths, corners[:, axis]) for axis in (0, 1)], axis=1)
            found.append(ax.transData.inverted().transform(points))
    return np.concatenate(found)


def make_room(ax: Axes) -> None:
    """Lets the layout keep what stands beside the axes on the figure, where the figure has no layout of its own."""
    figure = ax.figure.figure
    if figure.get_layout_engine() is None:
        figure.set_layout_engine("constrained")


def title(ax: Axes, *remarks: str) -> None:
    """Remarks above the axes, each from a new line, in lines as long as the axes allow."""
    width = 72 * ax.get_position().width * ax.figure.figure.get_figwidth()
    longest = max(24, int(width / (0.55 * (SMALL_POINTS + 1))))
    lines = [line for remark in remarks for line in textwrap.wrap(remark, longest)]
    ax.set_title("\n".join(lines), loc="left", fontsize=SMALL_POINTS + 1)
