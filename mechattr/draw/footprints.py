"""Pictures of token erasure: accuracy by layer, and text with its segments boxed."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from mechattr.draw.style import array, colours, ink_on, limits, new_figure, style
from mechattr.draw.tokens import spell

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from mechattr.draw.style import Values

_DASHES = ("-", "--", ":", "-.")
_LINE = (
    "font-family:'DejaVu Sans Mono',Consolas,monospace;font-size:13px;line-height:2.1;background:#ffffff;color:#222222"
)
_BOX = "border:1px solid #555;border-radius:3px;padding:1px 2px;margin:0 2px"
_PIECE = "border-left:1px dotted #888;margin-left:1px;padding-left:1px"
_NAMES = {"multi": "last token of words of several tokens", "single": "words of one token"}


def footprint_curve(
    layers: Sequence[int],
    curves: Mapping[str, Mapping[int, tuple[Values, Values, Values]]],
    *,
    chance: float | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Is it forgotten? The accuracy of each offset by layer with its interval, one line style a group.

    Args:
        layers: -1 is the embedding, the one after the last block the final norm.
        curves: group -> offset -> (accuracy, low, high) by layer; NaN where a group has no token.
        chance: accuracy of always naming the most frequent token, as a grey dashed line.
        ax: axes to draw into; a new figure without it.
    """
    offsets = sorted({offset for group in curves.values() for offset in group})
    palette = _palette(len(offsets))
    places = np.arange(len(layers))
    with style():
        if ax is None:
            ax = new_figure(6.4, 3.8).add_subplot()
        for (group, lines), dash in zip(curves.items(), _DASHES, strict=False):
            for offset, (mean, low, high) in lines.items():
                colour = palette[offsets.index(offset)]
                ax.plot(places, array(mean), dash, color=colour, linewidth=1.7, gid=f"{group} {offset}")
                ax.fill_between(places, array(low), array(high), color=colour, alpha=0.13, linewidth=0)
        if chance is not None:
            ax.axhline(chance, color="#888888", linewidth=0.9, linestyle=(0, (2, 2)))
        for offset, colour in zip(offsets, palette, strict=True):
            ax.plot([], [], color=colour, linewidth=1.7, label=f"offset {offset:+d}" if offset else "offset 0")
        for group, dash in zip(curves, _DASHES, strict=False):
            ax.plot([], [], dash, color="#444444", linewidth=1.4, label=_NAMES.get(group, group))
        last = max(layers)
        names = ["emb" if n == -1 else str(n) for n in layers]
        if len(layers) > 1 and last == len(layers) - 2:
            names[-1] = "norm"
        ax.set_xticks(places, names)
        ax.set(xlabel="layer", ylabel="accuracy of the probe (top 1)", ylim=(0, 1.02))
        ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    return ax


def segments_html(
    tokens: Sequence[str], segments: Sequence[tuple[int, int, float]], *, unit: str = "ψ", bound: float | None = None
) -> str:
    """A document with its segments: each span of several tokens is a box whose ground is its score, blue where it is
    positive and red where it is negative; the pieces are told apart by thin lines, and hovering shows the score.

    Args:
        tokens: texts of the tokens; they are escaped.
        segments: (first, last, score), both ends inclusive, a partition of the tokens.
        unit: what the score is called.
        bound: score of full colour; the 99th percentile of |score| of spans of several tokens without it.
    """
    from matplotlib.colors import to_hex

    scores = np.array([score for first, last, score in segments if last > first and math.isfinite(score)])
    cmap, scale = colours(bound if bound is not None else limits(scores).bound, signed=True)
    parts = []
    for first, last, score in segments:
        pieces = [html.escape(spell(token)) for token in tokens[first : last + 1]]
        about = f"{unit} = {score:.3f}" if math.isfinite(score) else f"{unit} is not defined"
        if last == first:
            parts.append(f'<span style="margin:0 1px" title="{about}">{pieces[0]}</span>')
        else:
            rgba = cmap(scale(score)) if math.isfinite(score) else (1.0, 1.0, 1.0, 1.0)
            inner = pieces[0] + "".join(f'<span style="{_PIECE}">{piece}</span>' for piece in pieces[1:])
            look = f"background:{to_hex(rgba)};color:{ink_on(rgba)};{_BOX}"
            parts.append(f'<span style="{look}" title="{about}">{inner}</span>')
        if any("\n" in token for token in tokens[first : last + 1]):
            parts.append("<br>")
    return f'<div style="{_LINE}">{"".join(parts)}</div>'


def _palette(n: int) -> list[str]:
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return [to_hex(colour) for colour in colormaps["viridis"](np.linspace(0.0, 0.85, max(n, 1)))]
