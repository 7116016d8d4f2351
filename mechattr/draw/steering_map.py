"""Steering by layer and multiplier: where an effect is, and what it costs there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mechattr.draw.heatmap import frame, layer_ticks
from mechattr.draw.style import INK, SMALL_POINTS, array, colour_bar, colours, ink_on, limits, new_figure, style
from mechattr.errors import SettingError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from mechattr.draw.style import Values

WRITTEN = 90  # cells of a map whose numbers are written into them


def steering_map(
    effect: Values,
    side: Values | None = None,
    *,
    layers: Sequence[int],
    multipliers: Sequence[str],
    budget: float | None = None,
    label: str = "change of propensity\n[nat]",
    note: str = "",
    axes: Sequence[Axes] = (),
) -> list[Axes]:
    """Where does it work, and at what price? Layer x multiplier: the change of propensity, white where nothing changes,
    and beside it KL to the model as it is, on one row a layer.

    Args:
        effect: [layer, multiplier].
        side: [layer, multiplier], in nats a token, above 0; one map without it.
        layers: their numbers, downward.
        multipliers: as they are written below the columns.
        budget: a line runs around the cells that cost more, in both maps.
        label: what the first map shows, with its unit.
        note: a line above.
        axes: to draw into: two, or one for the first map alone; those of a new figure without them.

    Raises:
        SettingError: shapes that do not fit.
    """
    shape = (len(layers), len(multipliers))
    grids = [array(effect)] + ([] if side is None else [array(side)])
    if any(grid.shape != shape for grid in grids):
        found = f"{', '.join(str(grid.shape) for grid in grids)} for {shape[0]} layers and {shape[1]} multipliers"
        raise SettingError("a layer x multiplier map", found, "give [layer, multiplier]")
    labels = (label, "KL on neutral texts\n[nats a token]")
    with style():
        drawn = list(axes)[: len(grids)]
        if not drawn:
            figure = new_figure(*map_size(*shape, n_maps=len(grids)))
            drawn = list(figure.subplots(1, len(grids), sharey=True, squeeze=False)[0])
        for ax, grid, name, signed in zip(drawn, grids, labels, (True, False), strict=False):
            bounds = limits(grid)
            cmap, norm = colours(bounds.bound, signed=signed)
            ax.imshow(np.ma.masked_invalid(grid), cmap=cmap, norm=norm, aspect="auto", interpolation="nearest")
            frame(ax, -0.5, -0.5, shape[1], shape[0])
            ax.set(ylim=(shape[0] - 0.5, -0.5), xlabel="multiplier")
            ax.set_xticks(range(shape[1]), [name.replace("-", "−") for name in multipliers])
            layer_ticks(ax, list(layers))
            colour_bar([ax], cmap, norm, name, bounds, gaps=not np.isfinite(grid).all())
            if grid.size <= WRITTEN:
                for (i, j), value in np.ndenumerate(grid):
                    ink = ink_on(cmap(norm(value)))
                    ax.text(
                        j, i, _short(value), ha="center", va="center", fontsize=SMALL_POINTS, color=ink, gid="value"
                    )
            if budget is not None and len(grids) == 2:
                _border(ax, grids[1] > budget)
        drawn[0].set_ylabel("layer")
        engine: Any = drawn[0].figure.figure.get_layout_engine()
        if len(drawn) == 2 and engine is not None:
            engine.set(wspace=0.06)  # between the bar of the first map and the second
        remarks = [note] * bool(note)
        if budget is not None and len(grids) == 2 and bool((grids[1] > budget).any()):
            remarks.append(f"line: where KL passes {budget:g} nats a token")
        drawn[0].set_title("\n".join(remarks), loc="left", fontsize=SMALL_POINTS + 1)
    return drawn


def map_size(n_layers: int, n_multipliers: int, *, n_maps: int) -> tuple[float, float]:
    """Width and height in inches at which everything can be read."""
    return n_maps * (min(max(0.36 * n_multipliers, 1.8), 4.2) + 1.3) + 0.3, min(max(0.3 * n_layers, 1.4), 8.0) + 1.0


def _border(ax: Axes, cells: np.ndarray) -> None:
    """A line between cells of which one is marked and the other is not, with a white edge to be seen on dark ground."""
    from matplotlib.collections import LineCollection

    sides = [[(j + 0.5, i - 0.5), (j + 0.5, i + 0.5)] for i, j in np.argwhere(cells[:, 1:] != cells[:, :-1])]
    sides += [[(j - 0.5, i + 0.5), (j + 0.5, i + 0.5)] for i, j in np.argwhere(cells[1:] != cells[:-1])]
    for width, colour, gid in ((3.4, "white", "edge"), (1.6, INK, "budget")):
        ax.add_collection(
            LineCollection(sides, linewidths=width, colors=colour, capstyle="round", gid=gid), autolim=False
        )


def _short(value: float) -> str:
    if not np.isfinite(value):
        return ""
    return "0" if value == 0 else f"{value:.{1 if abs(value) >= 9.95 else 2}f}".replace("-", "−")
