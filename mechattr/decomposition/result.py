"""What decompositions return: tables over tokens, heads, layers and components of the logits of some prompts."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any, ClassVar, cast

from mechattr.artifact import Attribution
from mechattr.errors import SettingError, UnknownNameError, nearest
from mechattr.labelled import Labelled

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

_OVER_TOKENS = {"pos": "token", "query": "query_token", "key": "key_token"}
_SHOWN = 20  # rows of a table, and prompts, in a notebook


class Decomposition(Attribution):
    """Attribution of logits, prompt by prompt.

    `tensors` holds what the method gives, among `tokens` [pos], `components` [component], `ledger` [entry] and
    `score/NAME`; results of a list of prompts begin with the axis `batch`, and are NaN at padding. `settings["main"]`
    names the table that is shown, `settings["strings"]` has the tokens as text. `top`, `nodes` and `value` know the
    nodes of the sites that `lrp` was asked for; all other tables split or repeat what another one holds.
    """

    kind: ClassVar[str] = "decomposition"

    @property
    def strings(self) -> list[list[str]]:
        """The tokens of each prompt as text."""
        return cast(list[list[str]], self.settings["strings"])

    @property
    def main(self) -> Labelled:
        """The table that `to_pandas` and a notebook show."""
        return self.tensors[str(self.settings["main"])]

    def _measure(self, which: str, allowed: Sequence[str]) -> dict[str, Labelled]:
        asked: Any = self.settings.get("sites") or ()
        found = {name: table for name, table in super()._measure(which, allowed).items() if name in asked}
        if not found:
            tables = f"{self.settings['method']} with tables {', '.join(self.tensors)}, which are not of single nodes"
            fix = "read one with to_pandas(table), or ask ma.lrp for the sites, as in sites='z'"
            raise SettingError("nodes of a decomposition", tables, fix)
        return found

    def to_pandas(self, table: str | None = None) -> pd.DataFrame:
        """A table in long form: a column for each axis, the token's text beside each position, and `value`.

        Args:
            table: the name of a tensor, such as `"tokens"`, `"components"` or `"score/alti"`; by default the main one.

        Raises:
            UnknownNameError: no such table.
        """
        if table is not None and table not in self.tensors:
            raise UnknownNameError(f"table {table!r} of a decomposition", "no such table", nearest(table, self.tensors))
        frame = (self.main if table is None else self.tensors[table]).to_pandas()
        for axis, column in _OVER_TOKENS.items():
            if axis in frame:
                rows = frame["batch"] if "batch" in frame else [0] * len(frame)
                texts = [self._token(int(row), int(place)) for row, place in zip(rows, frame[axis], strict=True)]
                frame.insert(cast(int, frame.columns.get_loc(axis)) + 1, column, texts)
        return frame[frame["value"].notna()].reset_index(drop=True)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draws the main table of one prompt; see `mechattr.draw.decomposition`.

        Raises:
            SettingError: a result of several prompts.
        """
        from mechattr import draw

        return draw.decomposition(self, ax=ax)

    def _token(self, row: int, place: int) -> str:
        strings = self.strings[row]
        return strings[place] if place < len(strings) else ""

    def _repr_html_(self) -> str:
        from mechattr.draw.tokens import tokens_html

        target: Any = self.settings.get("target")
        foil: Any = self.settings.get("foil")
        passes = f"{self.passes.forward:g} forward and {self.passes.backward:g} backward passes"
        head = f"method {self.settings['method']}, {self.settings['n_prompts']} prompts, {passes}"
        head += f", of {self.settings['explains']}" if "explains" in self.settings else ""
        lines = [f"<div>{escape(head)}</div>"]
        tokens = self.tensors.get("tokens")
        for row, strings in enumerate(self.strings[:_SHOWN] if tokens is not None else []):
            assert tokens is not None
            values = (tokens.sel(batch=row) if "batch" in tokens.axes else tokens).values[..., : len(strings)]
            if values.ndim == 1:
                what = "" if target is None else f"{target[row]!r}" + (f" − {foil[row]!r}" if foil else "")
                lines.append(f"<div>{escape(what)} {tokens_html(strings, values=values, unit='logit')}</div>")
        frame = self.to_pandas()
        largest = frame.reindex(frame["value"].abs().sort_values(ascending=False, kind="stable").index[:_SHOWN])
        lines.append(largest.to_html(index=False, escape=True, na_rep="", float_format="{:.4g}".format))
        return "".join(lines)
