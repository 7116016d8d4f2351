"""The table of verified components: as rows, as CSV, and as HTML that sorts."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable
from html import escape
from typing import Any

from mechattr.report.results import Results
from mechattr.sites import Node, full_name

COLUMNS = ("component", "site", "position", "estimate", "exact", "score", "share")
CSV_COLUMNS = (
    "rank", "component", "site", "layer", "head", "neuron", "position",
    "estimate", "estimate_score", "exact", "score", "share",
)  # fmt: skip


def rows(results: Results, k: int | None = None) -> list[dict[str, Any]]:
    """The verified components, the largest exact mean |effect| first.

    Args:
        results: a run.
        k: how many; all of them without it.

    Returns:
        A row a component: its name, full site and position; `estimate` and `exact`, the contributions (metric lost by
        noising, or regained by denoising, mean over pairs); `score`, the exact mean |effect|; `share`, |exact| as a
        share of the gap between clean and corrupt metric. A head of k or v is a kv head.
    """
    return [{name: row[name] for name in COLUMNS} for row in map(_full_row(results), results.verified[:k])]


def _full_row(results: Results) -> Callable[[Node], dict[str, Any]]:
    def row(node: Node) -> dict[str, Any]:
        return {
            "component": node.label,
            "site": full_name(node.site, node.layer),
            "layer": node.layer,
            "head": node.head,
            "neuron": node.neuron,
            "position": results.position(node.pos),
            "estimate": results.scored.value(node, "contribution"),
            "estimate_score": results.scored.value(node, "score"),
            "exact": results.exact.value(node, "contribution"),
            "score": results.exact.value(node, "score"),
            "share": results.share(node),
        }

    return row


def csv_text(results: Results) -> str:
    """The whole table as CSV, numbers in full precision."""
    text = io.StringIO()
    writer = csv.DictWriter(text, CSV_COLUMNS, lineterminator="\n")
    writer.writeheader()
    for rank, row in enumerate(map(_full_row(results), results.verified), start=1):
        writer.writerow({"rank": rank, **{name: "" if _absent(value) else value for name, value in row.items()}})
    return text.getvalue()


def _absent(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def html_table(results: Results, *, limit: int | None = None) -> str:
    """The table as HTML: a click on a column's head sorts by it, bars show the size of the effects.

    Args:
        results: a run.
        limit: rows that are written; all of them without it.
    """
    shown = rows(results, limit)
    largest = max((abs(row[name]) for row in shown for name in ("estimate", "exact")), default=0.0) or 1.0
    unit = escape(results.unit)
    heads = (
        ("#", "rank by exact mean |effect|"),
        ("component", "name; the head of k and v is a kv head"),
        ("site", "full name of the site"),
        ("position", "position and token of the first pair, or span"),
        (f"estimate [{unit}]", "contribution by attribution patching; positive helps the answer"),
        (f"exact [{unit}]", "contribution, measured by replacing the activation"),
        (f"exact |effect| [{unit}]", "mean over pairs of |effect|, measured"),
        ("share [%]", "|exact contribution| as a share of |clean - corrupt|"),
    )
    head = "".join(
        f'<th class="{"text" if 1 <= i <= 3 else "number"}" title="{escape(about)}" tabindex="0">{name}</th>'
        for i, (name, about) in enumerate(heads)
    )
    body = "".join(
        f'<tr><td class="number" data-value="{rank}">{rank}</td><td class="text"><b>{escape(row["component"])}</b></td>'
        f'<td class="text site">{escape(row["site"])}</td>'
        f'<td class="text" data-value="{escape(_order(row["position"]))}">{escape(row["position"])}</td>'
        f"{_bar(row['estimate'], largest)}{_bar(row['exact'], largest)}"
        f"{_number(row['score'], '.3f')}{_number(100 * row['share'], '.1f')}</tr>"
        for rank, row in enumerate(shown, start=1)
    )
    return f'<table class="sortable"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def _order(position: str) -> str:
    """What a position sorts by: its number where it starts with one."""
    first = position.split(" ")[0]
    return first if first.isdigit() else position


def _number(value: float, form: str) -> str:
    if math.isnan(value):
        return '<td class="number" data-value="">–</td>'
    return f'<td class="number" data-value="{value!r}">{format(value, form).replace("-", "−")}</td>'


def _bar(value: float, largest: float) -> str:
    """A signed number, and beside it a bar that grows from the middle: blue to the right, red to the left."""
    if math.isnan(value):
        return '<td class="number" data-value="">–</td>'
    reach = 50.0 * min(abs(value) / largest, 1.0)
    left = 50.0 if value >= 0 else 50.0 - reach
    return (
        f'<td class="number" data-value="{value!r}">{f"{value:+.3f}".replace("-", "−")}<span class="bar">'
        f'<i class="{"up" if value >= 0 else "down"}" style="left:{left:.1f}%;width:{reach:.1f}%"></i></span></td>'
    )
