"""Predictions by layer: the table of a lens."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from mechattr.draw.style import INK, SMALL_POINTS, TICK_POINTS, Limits, array, colour_bar, colours, ink_on, pyplot_axes
from mechattr.draw.tokens import spell
from mechattr.errors import SettingError
from mechattr.sites import parse

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from mechattr.artifact import Attribution
    from mechattr.labelled import Labelled

COLUMNS = 12  # of one band; longer prompts go on in a band below, as text does
GAP = 1.9  # rows between bands, for the tokens above each
LONGEST = 9  # characters of a token in a cell, at 7.5 points


def lens_table(result: Attribution, ax: Axes | None = None) -> Axes:
    """What is in each layer? The likeliest token of each stream (downward) and position, ground by its probability.

    Args:
        result: of one prompt.
        ax: axes to draw into; pyplot's new figure without it, so that a notebook shows it.

    Raises:
        SettingError: a result of several prompts.
    """
    settings: Any = result.settings
    if len(settings["strings"]) > 1:
        raise SettingError("a table of a lens", f"{len(settings['strings'])} prompts", "read one prompt")
    tokens, probability = (_best(result.tensors[f"top/{name}"]) for name in ("token", "probability"))
    strings, words, names = settings["strings"][0], settings["vocabulary"], _names(settings["sites"])
    if settings["position"] is not None:
        strings = [strings[place] for place in settings["position"]]
    n_sites, n_columns = tokens.shape
    width = math.ceil(n_columns / math.ceil(n_columns / COLUMNS))  # bands of about equal width
    bands = [range(a, min(a + width, n_columns)) for a in range(0, n_columns, width)]
    if ax is None:
        height = len(bands) * (n_sites * 0.24 + GAP * 0.24)
        ax = pyplot_axes(max(width * 0.72, 1.5) + 1.9, height + 0.3)
    cmap, norm = colours(1.0, signed=False)
    ticks: list[tuple[float, str]] = []
    for index, band in enumerate(bands):
        top = index * (n_sites + GAP)
        part = probability[:, band.start : band.stop]
        extent = (-0.5, len(band) - 0.5, top + n_sites - 0.5, top - 0.5)
        ax.imshow(part, cmap=cmap, norm=norm, extent=extent, aspect="auto", interpolation="nearest")
        ticks += [(top + row, name) for row, name in enumerate(names)]
        for place, column in enumerate(band):
            ax.text(
                place, top - 0.65, spell(strings[column], longest=LONGEST), ha="center", va="bottom",
                fontsize=TICK_POINTS, fontweight="bold", gid="token",
            )  # fmt: skip
            for row in range(n_sites):
                word = spell(words[str(int(tokens[row, column]))], longest=LONGEST)
                ink = ink_on(cmap(norm(part[row, place])))
                ax.text(
                    place, top + row, word, ha="center", va="center", fontsize=SMALL_POINTS, color=ink, gid="cell"
                )  # fmt: skip
    ax.set(xlim=(-0.5, width - 0.5), ylim=(len(bands) * (n_sites + GAP) - GAP - 0.5, -1.8), xticks=[])
    ax.set_yticks([place for place, _ in ticks], [name for _, name in ticks], color=INK)
    ax.set_ylabel("stream after block")
    ax.tick_params(length=0)
    for spine in ax.spines.values():
        spine.set_visible(False)
    bounds = Limits(bound=1.0, n_clipped=0, n_values=probability.size)
    colour_bar([ax], cmap, norm, "probability of the likeliest token", bounds, gaps=False)
    return ax


def _best(table: Labelled) -> np.ndarray:
    """[site, pos] of the likeliest tokens of one prompt."""
    table = table.sel(rank=1)
    table = table.sel(batch=0) if "batch" in table.axes else table
    return array(table).reshape(len(table), -1)


def _names(sites: list[str]) -> list[str]:
    """Rows of the table: block numbers, and what part of a block where it is not its end."""
    named = [parse(site) for site in sites]
    parts = {"resid_pre": "before {}", "resid_mid": "{}, attention", "resid_post": "{}"}
    return [parts[short].format(layer) for short, layer in named]
