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
_NAMES = {"multi": "last tokens of words of several tokens", "single": "words of one token"}


def footprint_curve(
    layers: Sequence[int],
    curves: Mapping[str, Mapping[int, tuple[Values, Values, Values]]],
    *,
    ax: Axes | None = None,
) -> Axes:
    """Is it forgotten? The accuracy of each offset by layer with its interval: a panel for each group, or all groups in
    the given axes, told apart by their dashes.

    Args:
        layers: -1 is the embedding, the one after the last block the final norm.
        curves: group -> offset -> (accuracy, low, high) by layer; NaN where a group has no token.
        ax: axes to draw into; a new figure without it.

    Returns:
        The axes; those of the first group of a new figure.
    """
    offsets = sorted({offset for group in curves.values() for offset in group})
    palette = dict(zip(offsets, _palette(len(offsets)), strict=True))
    with style():
        if ax is not None:
            panels = [ax] * len(curves)
        else:
            figure = new_figure(1.2 + 2.9 * len(curves), 3.4)
            panels = list(figure.subplots(1, len(curves), sharey=True, squeeze=False)[0])
        dashes = _DASHES if ax is not None else ("-",) * len(curves)
        for panel, (group, lines), dash in zip(panels, curves.items(), dashes, strict=False):
            for offset, (mean, low, high) in lines.items():
                places = np.arange(len(layers))
                panel.plot(places, array(mean), dash, color=palette[offset], linewidth=1.7, gid=f"{group} {offset}")
                panel.fill_between(places, array(low), array(high), color=palette[offset], alpha=0.15, linewidth=0)
            panel.set_xticks(range(len(layers)), _layer_names(layers))
            panel.set(xlabel="layer", ylim=(0, 1.02))
            if ax is None:
                panel.set_title(_NAMES.get(group, group), fontsize=9)
        panels[0].set_ylabel("accuracy of the probe (top 1)")
        for offset in reversed(offsets):
            panels[-1].plot([], [], color=palette[offset], linewidth=1.7, label=f"{offset:+d}" if offset else "0")
        for group, dash in zip(curves if ax is not None else (), _DASHES, strict=False):
            panels[-1].plot([], [], dash, color="#444444", linewidth=1.4, label=_NAMES.get(group, group))
        panels[-1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, title="offset")
    return panels[0]


def _layer_names(layers: Sequence[int]) -> list[str]:
    names = ["emb" if layer == -1 else str(layer) for layer in layers]
    if len(layers) > 1 and layers[-1] == len(layers) - 2:  # all of them, and one after the last block
        names[-1] = "norm"
    return names


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
    return f'<div style="{_LINE}">{"<wbr>".join(parts)}</div>'  # lines may break between segments


def _palette(n: int) -> list[str]:
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return [to_hex(colour) for colour in colormaps["viridis"](np.linspace(0.0, 0.85, max(n, 1)))]
