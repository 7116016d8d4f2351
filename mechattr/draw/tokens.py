"""Tokens as people read them: tick labels, and the text itself with coloured ground."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

from mechattr.draw.style import SPAN_TINTS, array, colours, ink_on, limits
from mechattr.errors import SettingError

if TYPE_CHECKING:
    from mechattr.draw.style import Values

_BOS = {"<s>", "<bos>", "<|endoftext|>", "<|begin_of_text|>", "<|startoftext|>", "[CLS]"}
_SPECIAL = re.compile(r"^(?:<\|?([A-Za-z_]+)\|?>|\[([A-Z]{3,4})\])$")
_LOOKS = str.maketrans({" ": "␣", "Ġ": "␣", "▁": "␣", "\n": "↵", "Ċ": "↵", "\t": "⇥", "\r": "␍"})

_BOX = "display:inline-block;padding:1px 3px;margin:1px;border-radius:3px"
_LINE = (
    "font-family:'DejaVu Sans Mono',Consolas,monospace;font-size:13px;line-height:1.9;background:#ffffff;color:#222222"
)


def spell(token: str, *, longest: int | None = None) -> str:
    """A token as figures show it: `␣` for a space, `↵` for a newline, `⟨bos⟩`, `⟨pad⟩` for special tokens.

    Args:
        token: the token's text, decoded or as the tokenizer's vocabulary spells it.
        longest: longer ones are cut with an ellipsis.
    """
    if token in _BOS:
        return "⟨bos⟩"
    if special := _SPECIAL.match(token):
        return f"⟨{(special[1] or special[2]).lower()}⟩"
    looks = "".join(c if c.isprintable() else "�" for c in token.translate(_LOOKS)) or "∅"
    return looks if longest is None or len(looks) <= longest else looks[: longest - 1] + "…"


def tokens_html(
    tokens: Sequence[str],
    *,
    values: Values | None = None,
    differs: Collection[int] = (),
    spans: Mapping[str, tuple[int, int]] | None = None,
    unit: str = "",
    bound: float | None = None,
) -> str:
    """The text itself as HTML: a box a token, ground by value or span, differences underlined, value on hover.

    Args:
        tokens: texts of the tokens; they are escaped.
        values: one a token: positive blue, negative red, white at 0; where not finite, the ground is plain.
        differs: positions that are marked as different from the other prompt of the pair.
        spans: name -> (start, end), the end exclusive; they tint the ground where no values are given.
        unit: unit of the values, for the hover text.
        bound: value of full colour; the 99th percentile of |value| without it.

    Raises:
        SettingError: as many values as tokens are needed.
    """
    numbers = array(values).ravel() if values is not None else None
    if numbers is not None and numbers.size != len(tokens):
        raise SettingError(
            "tokens with values", f"{len(tokens)} tokens and {numbers.size} values", "give one value a token"
        )
    names = list(spans or {})
    cmap, norm = colours(bound or (limits(numbers).bound if numbers is not None else 1.0), signed=True)
    boxes = []
    for position, token in enumerate(tokens):
        inside = [name for name in names if (spans or {})[name][0] <= position < (spans or {})[name][1]]
        ground, ink, hover = "#f4f4f4", "#222222", [f"position {position}", *inside]
        if numbers is not None and math.isfinite(numbers[position]):
            rgba = cmap(norm(numbers[position]))
            ground, ink = "#" + "".join(f"{round(255 * c):02x}" for c in rgba[:3]), ink_on(rgba)
            hover.append(f"{numbers[position]:+.4g} {unit}".strip())
        elif numbers is None and inside:
            ground = SPAN_TINTS[names.index(inside[-1]) % len(SPAN_TINTS)]
        edge, weight = ("#b2182b", "bold") if position in differs else ("transparent", "normal")
        if position in differs:
            hover.append("differs")
        boxes.append(
            f'<span title="{html.escape(" · ".join(hover))}" style="{_BOX};background:{ground};color:{ink};'
            f'border-bottom:3px solid {edge};font-weight:{weight}">{html.escape(spell(token))}</span>'
        )
    return f'<div style="{_LINE}">{"".join(boxes)}</div>'
