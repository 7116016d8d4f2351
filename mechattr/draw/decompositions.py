"""Pictures of decompositions: what `Decomposition.plot` shows."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import numpy as np

from mechattr.draw.style import array, style
from mechattr.draw.token_map import token_map
from mechattr.draw.tokens import spell
from mechattr.errors import SettingError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from mechattr.artifact import Attribution

_OVER_TOKENS = ("pos", "query", "key")


def decomposition(result: Attribution, ax: Axes | None = None) -> Axes:
    """The main table of a result of one prompt: bars over its tokens or components, or a map of queries by keys.

    Args:
        result: of one prompt.
        ax: axes to draw into; pyplot's new figure without it, so that a notebook shows it.

    Raises:
        SettingError: a result of several prompts, or a table with several axes.
    """
    table = result.tensors[str(result.settings["main"])]
    strings = cast(list[list[str]], result.settings["strings"])
    if "batch" in table.axes:
        if len(strings) > 1:
            found = f"{len(strings)} prompts"
            raise SettingError("a plot of a decomposition", found, "decompose one prompt, or plot .sel(batch=0)")
        table = table.sel(batch=0)
    if table.axes == ("query", "key"):
        return token_map(table, strings[0], label="share", ax=ax)
    if len(table.axes) != 1:
        raise SettingError("bars", f"a table with axes {', '.join(table.axes)}", "choose one row with .sel(...)")
    values, (axis,) = array(table), table.axes
    over = axis in _OVER_TOKENS
    labels = [spell(token, longest=14) for token in strings[0]] if over else list(map(str, table.coords[axis]))
    if ax is None:
        import matplotlib.pyplot as plt

        with style():
            ax = plt.figure(figsize=(5.6, 1.2 + 0.22 * len(values)), layout="constrained").add_subplot()
    ax.barh(np.arange(len(values)), values, color=np.where(values >= 0, "#2166ac", "#b2182b"))
    ax.set_yticks(np.arange(len(values)), labels)
    ax.invert_yaxis()
    ax.axvline(0, color="#222222", linewidth=0.8)
    ax.set_xlabel("logit")
    return ax
