"""Pictures of decompositions: what `Decomposition.plot` shows."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from mechattr.draw.heatmap import MAX_TICKS, head_map
from mechattr.draw.lens import lens_table
from mechattr.draw.style import array, pyplot_axes
from mechattr.draw.text import named_bars, token_values
from mechattr.draw.token_map import token_map
from mechattr.draw.tokens import spell
from mechattr.draw.waterfall import waterfall
from mechattr.errors import SettingError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from mechattr.artifact import Attribution
    from mechattr.labelled import Labelled

_OVER_TOKENS = ("pos", "query", "key")


def decomposition(result: Attribution, ax: Axes | None = None, table: str | None = None) -> Axes:
    """A table of a result of one prompt, as suits its axes: components as a waterfall, tokens as bars or coloured text,
    layers by tokens or heads and tokens by tokens as maps, the likeliest tokens of a lens as a table.

    Args:
        result: of one prompt.
        ax: axes to draw into; pyplot's new figure without it, so that a notebook shows it.
        table: the name of a tensor; the main one without it.

    Raises:
        SettingError: a result of several prompts, or a table with other axes.
    """
    settings: Any = result.settings
    name = table or str(settings["main"])
    if len(settings["strings"]) > 1:
        found = f"{len(settings['strings'])} prompts"
        raise SettingError("a plot of a decomposition", found, "decompose one prompt")
    if name.startswith("top/"):
        return lens_table(result, ax)
    shown = result.tensors[name]
    shown = shown.sel(batch=0) if "batch" in shown.axes else shown
    label, axes = quantity(settings), shown.axes
    if axes == ("component",):
        total = settings.get("logit")
        names = [str(component) for component in shown.coords["component"]]
        return waterfall(names, shown, total=None if total is None else total[0], label=label, ax=ax)
    if axes == ("query", "key"):
        return token_map(shown, settings["strings"][0], label="share", ax=ax)
    if len(axes) == 1 and axes[0] in _OVER_TOKENS:
        return token_values(settings["strings"][0], shown, label=label, ax=ax)
    if len(axes) == 1:
        return named_bars([str(entry) for entry in shown.coords[axes[0]]], array(shown), label, ax)
    if len(axes) == 2 and axes[0] == "layer":
        return _layers(shown, settings["strings"][0], label, ax)
    found = f"{name} with axes {', '.join(axes)}"
    raise SettingError("a plot of a decomposition", found, "choose a table, or one row of it with .sel(...)")


def quantity(settings: Any) -> str:
    """What the numbers are: the logit of a token, or the difference of two."""
    target, foil = settings.get("target"), settings.get("foil")
    if not target:
        return "share"
    return f"logit of {spell(target[0])}" + (f" − {spell(foil[0])}" if foil else "")


def _layers(table: Labelled, strings: list[str], label: str, ax: Axes | None) -> Axes:
    """Layers downward, tokens or heads to the right."""
    axis, n = table.axes[1], table.shape[1]
    names = [str(entry) for entry in table.coords[axis]]
    if axis in _OVER_TOKENS:
        names = [spell(strings[place], longest=10) for place in range(n)]
    cell = min(max(0.42, 1.8 / n), 7.5 / n)
    if ax is None:
        ax = pyplot_axes(n * cell + 2.0, 1.9 + 0.3 * table.shape[0])
    layers = [int(layer) for layer in table.coords["layer"]]
    drawn = head_map(array(table), label=label, layers=layers, column=axis, n_outlined=0, ax=ax)
    ticks = list(range(0, n, math.ceil(n / MAX_TICKS)))
    upright = max(map(len, names)) * 0.08 > cell * len(names) / len(ticks)
    drawn.set_xticks(ticks, [names[place] for place in ticks], rotation=90 if upright else 0)
    drawn.set_xlabel({"pos": "source token"}.get(axis, axis))
    return drawn
