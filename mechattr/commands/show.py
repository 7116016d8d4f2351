"""What commands show: tables on a terminal, or one JSON document."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    import pandas as pd


def table(title: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    """Rows with equal keys as a table: numbers to the right with equal decimals in a column, what is missing empty."""
    shown = Table(title=title)
    columns = []
    for name in rows[0] if rows else ():
        values = [row[name] for row in rows]
        numeric = all(isinstance(value, int | float | None) for value in values)
        shown.add_column(escape(name), justify="right" if numeric else "left", overflow="fold")
        decimals = _decimals([value for value in values if isinstance(value, float) and math.isfinite(value)])
        columns.append([escape(_cell(value, decimals)) for value in values])
    for cells in zip(*columns, strict=True):
        shown.add_row(*cells)
    return shown


def show(tables: Sequence[Table], lines: Sequence[str]) -> None:
    """Tables on the terminal, and lines of plain text below them."""
    console = Console(soft_wrap=True)
    for shown in tables:
        console.print(shown)
    for line in lines:
        console.print(escape(line), highlight=False)


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows with plain values, `None` where there is none."""
    return cast(list[dict[str, Any]], json.loads(frame.to_json(orient="records", double_precision=15)))


def _decimals(values: Sequence[float]) -> int:
    """Decimals that show the largest value with four digits."""
    largest = max(map(abs, values), default=0.0)
    return 3 if largest == 0 else min(6, max(0, 3 - math.floor(math.log10(largest))))


def _cell(value: object, decimals: int) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, float):
        return f"{value:.{decimals}f}"
    if isinstance(value, list | tuple):
        return " ".join(map(str, value))
    return str(value)


def echo_json(document: object) -> None:
    """One JSON document on standard output; what is not finite becomes null."""
    typer.echo(json.dumps(_finite(document), indent=2))


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
