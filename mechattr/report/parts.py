"""Parts of pages: the document around sections, facts, figures and tables."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mechattr import draw
from mechattr.report.look import SCRIPT, STYLE

if TYPE_CHECKING:
    import pandas as pd


def document(title: str, about: str, sections: Mapping[str, str]) -> str:
    """A page with numbered sections.

    Args:
        title: plain text.
        about: a line of plain text below it.
        sections: HTML by heading.
    """
    body = "".join(f"<h2>{i}. {name}</h2>{text}\n" for i, (name, text) in enumerate(sections.items(), start=1))
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body><main><h1>{escape(title)}</h1>"
        f'<p class="note">{escape(about)}</p>\n{body}</main><script>{SCRIPT}</script></body></html>\n'
    )


def fact_table(rows: Mapping[str, str]) -> str:
    """Names and their HTML."""
    lines = "".join(f"<tr><th>{name}</th><td>{text}</td></tr>" for name, text in rows.items())
    return f'<table class="facts">{lines}</table>'


def figure(path: Path, alt: str, caption: str) -> str:
    """A PNG inside the page, at the size it was drawn for (150 pixels an inch; a page has 96)."""
    png = path.read_bytes()
    width = round(int.from_bytes(png[16:20], "big") * 96 / draw.DPI)  # bytes 16 to 19 of a PNG are its width in pixels
    data = base64.b64encode(png).decode()
    return (
        f'<figure><img alt="{escape(alt)}" width="{width}" src="data:image/png;base64,{data}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def frame_table(frame: pd.DataFrame, *, digits: int = 3) -> str:
    """A table that sorts by a click on a heading; numbers have so many significant digits."""
    numeric = {name: frame[name].dtype.kind in "if" for name in frame}
    heads = "".join(f'<th class="{_kind(numeric[name])}" tabindex="0">{escape(str(name))}</th>' for name in frame)
    rows = []
    for row in frame.itertuples(index=False):
        cells = "".join(
            f'<td class="{_kind(numeric[name])}" data-value="{escape(_full(x))}">{escape(_short(x, digits))}</td>'
            for name, x in zip(frame, row, strict=True)
        )
        rows.append(f"<tr>{cells}</tr>")
    table = f"<thead><tr>{heads}</tr></thead><tbody>{''.join(rows)}</tbody>"
    return f'<div class="scroll"><table class="sortable">{table}</table></div>'


def _kind(numeric: bool) -> str:
    return "number" if numeric else "text"


def _full(value: Any) -> str:
    return "" if isinstance(value, float) and not math.isfinite(value) else str(value)


def _short(value: Any, digits: int) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.{digits}g}" if math.isfinite(value) else ""
