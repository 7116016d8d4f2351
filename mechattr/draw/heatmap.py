"""Layer by head and layer by position heatmaps; layers run downward from 0."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from mechattr.draw.labels import place
from mechattr.draw.style import (
    INK,
    LABEL_POINTS,
    SMALL_POINTS,
    TICK_POINTS,
    array,
    colour_bar,
    colours,
    ink_on,
    limits,
    new_figure,
    style,
)
from mechattr.draw.tokens import spell
from mechattr.errors import SettingError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from mechattr.draw.style import Values

MAX_TICKS = 40
GAP = 0.6  # between the heads and the MLP column, in cells


def head_map(
    heads: Values,
    mlps: Values | None = None,
    *,
    label: str,
    signed: bool = True,
    layers: Sequence[int] | None = None,
    column: str = "head",
    title: str = "",
    n_outlined: int = 10,
    ax: Axes | None = None,
) -> Axes:
    """Which heads and MLPs matter? Layer x head with the MLP column beside it, on one colour scale.

    The strongest are outlined. Grey cells were not measured (NaN).

    Args:
        heads: [layer, head], any unit.
        mlps: [layer], the same unit.
        label: what the colour means, with its unit.
        signed: red to blue around 0; otherwise magnitudes from white.
        layers: layer numbers, 0, 1, ... without them.
        column: what the columns are.
        title: a line above.
        n_outlined: how many of the largest |value| are outlined and labelled.
        ax: axes to draw into; a new figure without it.

    Raises:
        SettingError: shapes that do not fit.
    """
    grid = array(heads)
    if grid.ndim != 2 or (mlps is not None and array(mlps).shape != grid.shape[:1]):
        found = f"heads {grid.shape}" + ("" if mlps is None else f", MLPs {array(mlps).shape}")
        raise SettingError("a layer x head map", found, "give heads as [layer, head] and MLPs as [layer]")
    n_layers, n_heads = grid.shape
    beside = np.full((n_layers, 0), np.nan) if mlps is None else array(mlps)[:, None]
    numbers = list(layers) if layers is not None else list(range(n_layers))
    bounds = limits(grid, beside)
    cmap, norm = colours(bounds.bound, signed=signed)
    with style():
        if ax is None:
            columns = n_heads + (GAP + 1 if mlps is not None else 0)
            cell = min(max(7.4 / columns, 0.2), 0.55)
            ax = new_figure(max(columns * cell, 2.2) + 1.9, max(n_layers * min(cell, 0.34), 1.7) + 0.8).add_subplot()
        where = n_heads + GAP  # left edge of the MLP column, in cells
        for block, left in ((grid, 0.0), (beside, where)):
            if block.shape[1]:
                extent = (left - 0.5, left + block.shape[1] - 0.5, n_layers - 0.5, -0.5)
                ax.imshow(
                    np.ma.masked_invalid(block),
                    cmap=cmap,
                    norm=norm,
                    extent=extent,
                    aspect="auto",
                    interpolation="nearest",
                )
                frame(ax, left - 0.5, -0.5, block.shape[1], n_layers)
        right = where + 0.5 if mlps is not None else n_heads - 0.5
        ax.set(xlim=(-0.5, right), ylim=(n_layers - 0.5, -0.5), xlabel=column, ylabel="layer")
        ax.set_title(title, loc="left")
        step = max(1, math.ceil(n_heads / 20))
        ticks: list[float] = [float(i) for i in range(0, n_heads, step)]
        names = [str(i) for i in range(0, n_heads, step)]
        ax.set_xticks(ticks + ([where] if mlps is not None else []), names + (["MLP"] if mlps is not None else []))
        layer_ticks(ax, numbers)
        colour_bar([ax], cmap, norm, label, bounds, gaps=not (np.isfinite(grid).all() and np.isfinite(beside).all()))
        kind = "E" if column.startswith("expert") else "H"
        cells = [(grid[i, j], i, float(j), f"L{numbers[i]}{kind}{j}") for i in range(n_layers) for j in range(n_heads)]
        cells += [(beside[i, 0], i, where, f"MLP {numbers[i]}") for i in range(n_layers) if mlps is not None]
        measured = [cell for cell in cells if math.isfinite(cell[0]) and cell[0] != 0]
        _outline(ax, sorted(measured, key=lambda cell: -abs(cell[0]))[:n_outlined], lambda v: ink_on(cmap(norm(v))))
    return ax


def position_map(
    panels: Mapping[str, Values],
    tokens: Sequence[str],
    *,
    label: str,
    spans: Mapping[str, tuple[int, int]] | None = None,
    signed: bool = True,
    layers: Sequence[int] | None = None,
    column: str = "token",
    title: str = "",
) -> list[Axes]:
    """Where in the prompt? A layer x position panel for each kind of effect, all on one colour bar, spans named above.

    Args:
        panels: title -> [layer, position], one unit.
        tokens: the tokens (or span names) below the columns; at most 40 are written, every n-th of more.
        label: what the colour means, with its unit.
        spans: name -> (start, end), the end exclusive, drawn as brackets above.
        signed: red to blue around 0; otherwise magnitudes from white.
        layers: layer numbers, 0, 1, ... without them.
        column: what the columns are.
        title: a line above all.

    Raises:
        SettingError: shapes that do not fit.
    """
    grids = {name: array(values) for name, values in panels.items()}
    shapes = {grid.shape for grid in grids.values()}
    if len(shapes) != 1 or next(iter(shapes))[1:] != (len(tokens),):
        found = ", ".join(f"{name} {grid.shape}" for name, grid in grids.items()) + f", {len(tokens)} tokens"
        raise SettingError(
            "layer x position maps", found, "give each panel as [layer, position] with one token a position"
        )
    n_layers, n_columns = next(iter(shapes))
    bounds = limits(*grids.values())
    cmap, norm = colours(bounds.bound, signed=signed)
    stacked = n_columns > 12
    cell = min(max((6.9 if stacked else 7.0 / len(grids)) / n_columns, 0.03), 0.5 if stacked else 0.42)
    rows = _span_rows(spans or {}, cell * 72)
    lines = max(rows.values(), default=-1) + 1
    width, height = (
        max(n_columns * cell, 1.4),
        max(n_layers * min(max(2.2 / n_layers, 0.1), 0.26), 0.9 if stacked else 1.6),
    )
    shown = [spell(token, longest=14) for token in tokens]
    ticks = list(range(0, n_columns, math.ceil(n_columns / MAX_TICKS)))
    upright = max(len(shown[i]) for i in ticks) * 0.6 * TICK_POINTS > cell * 72 * (ticks[1] if len(ticks) > 1 else 1)
    below = 0.3 + (max(len(shown[i]) for i in ticks) * 0.085 if upright else 0.15)
    with style():
        if stacked:
            figure = new_figure(width + 1.4, len(grids) * (height + 0.32) + below + 0.2 * lines + (0.3 if title else 0))
            axes = list(np.atleast_1d(figure.subplots(len(grids), 1, sharex=True)))
        else:
            figure = new_figure(
                len(grids) * (width + 0.2) + 1.7, height + below + 0.55 + 0.2 * lines + (0.3 if title else 0)
            )
            axes = list(np.atleast_1d(figure.subplots(1, len(grids), sharey=True)))
        if title:
            figure.suptitle(title, fontsize=LABEL_POINTS)
        for index, (ax, (name, grid)) in enumerate(zip(axes, grids.items(), strict=True)):
            ax.imshow(np.ma.masked_invalid(grid), cmap=cmap, norm=norm, aspect="auto", interpolation="nearest")
            ax.set_ylim(n_layers - 0.5, -0.5)
            frame(ax, -0.5, -0.5, n_columns, n_layers)
            bracketed = bool(rows) and (index == 0 or not stacked)
            ax.set_title(name, loc="left", pad=4 + (13 * lines + 3 if bracketed else 0))
            if bracketed:
                _brackets(ax, spans or {}, rows)
            if index == 0 or stacked:
                ax.set_ylabel("layer")
                layer_ticks(ax, list(layers) if layers is not None else list(range(n_layers)))
            if index == len(grids) - 1 or not stacked:
                ax.set_xticks(ticks, [shown[i] for i in ticks], rotation=90 if upright else 0)
                ax.set_xlabel(column if len(ticks) == n_columns else f"{column} (1 of {ticks[1]} named)")
            ax.tick_params(length=2)
        colour_bar(axes, cmap, norm, label, bounds, gaps=not all(np.isfinite(grid).all() for grid in grids.values()))
    return axes


def layer_ticks(ax: Axes, numbers: list[int]) -> None:
    """Every layer's number, or every 2nd, 4th, ... of many."""
    step = max(1, math.ceil(len(numbers) / 16))
    ax.set_yticks(range(0, len(numbers), step), [str(n) for n in numbers[::step]])


def frame(ax: Axes, left: float, top: float, width: float, height: float) -> None:
    """A thin frame, so that white cells at the edge are seen as cells; the axes' own lines go."""
    from matplotlib.patches import Rectangle

    ax.add_patch(Rectangle((left, top), width, height, fill=False, edgecolor="#999999", linewidth=0.8, clip_on=False))
    for spine in ax.spines.values():
        spine.set_visible(False)
    ax.tick_params(length=2)


def _outline(ax: Axes, cells: list[tuple[float, int, float, str]], ink: Callable[[float], str]) -> None:
    """Outlines cells and names them: inside where the name fits, beside with a leader otherwise."""
    from matplotlib.patches import Rectangle

    ax.figure.figure.draw_without_rendering()
    corners = ax.transData.transform([(0.0, 0.0), (1.0, 1.0)])
    per_point = ax.figure.dpi / 72.0
    cell_width, cell_height = np.abs(corners[1] - corners[0]) / per_point
    widest = max((len(name) for *_, name in cells), default=0) * 0.62 * SMALL_POINTS
    fits = widest <= cell_width and cell_height >= SMALL_POINTS + 2
    for value, row, middle, name in cells:
        box = Rectangle(
            (middle - 0.5, row - 0.5), 1, 1, fill=False, edgecolor=INK, linewidth=1.2, clip_on=False, zorder=3
        )
        box.set_gid("outlined")
        ax.add_patch(box)
        if fits:
            ax.text(
                middle,
                row,
                name,
                ha="center",
                va="center",
                fontsize=SMALL_POINTS,
                color=ink(value),
                gid="outlined-name",
            )
    if not fits:
        points = [(middle, float(row)) for _, row, middle, _ in cells]
        for note in place(ax, points, [name for *_, name in cells], radius=min(cell_width, cell_height) / 2):
            note.set_gid("outlined-name")
            note.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.8, "alpha": 0.85})


def _span_rows(spans: Mapping[str, tuple[int, int]], cell_points: float) -> dict[str, int]:
    """The row above the map that each span's name goes to, so that neighbours do not overlap."""
    ends: list[float] = []
    rows: dict[str, int] = {}
    for name, (start, end) in sorted(spans.items(), key=lambda item: item[1]):
        half = max(len(name) * 0.68 * TICK_POINTS + 4, (end - start) * cell_points) / 2
        middle = (start + end - 1) / 2 * cell_points
        row = next((i for i, edge in enumerate(ends) if middle - half >= edge), len(ends))
        ends[row : row + 1] = [middle + half]
        rows[name] = row
    return rows


def _brackets(ax: Axes, spans: Mapping[str, tuple[int, int]], rows: Mapping[str, int]) -> None:
    """A line and a name above the columns of each span."""
    from matplotlib.transforms import ScaledTranslation

    for name, row in rows.items():
        start, end = spans[name]
        up = ScaledTranslation(0, (3 + 13 * row) / 72, ax.figure.dpi_scale_trans)
        base = ax.get_xaxis_transform() + up
        ax.plot(
            [start - 0.4, end - 0.6],
            [1, 1],
            transform=base,
            color=INK,
            linewidth=1.4,
            clip_on=False,
            solid_capstyle="butt",
        )
        text = ax.text((start + end - 1) / 2, 1, name, transform=base, ha="center", va="bottom", fontsize=TICK_POINTS)
        text.set_gid("span")
