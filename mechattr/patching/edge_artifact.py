"""The result of edge attribution: a score for every edge between a writer and a later reader."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import torch
from torch import Tensor

from mechattr.artifact import Passes
from mechattr.base import Artifact
from mechattr.errors import AxisError, SettingError, UnknownNameError, nearest
from mechattr.labelled import Labelled
from mechattr.patching.graph import Graph
from mechattr.ranking import largest

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from mechattr.patching.circuit import Circuit

AXES = ("source", "target")
_RANKINGS = ("score", "contribution", "abs_signed")
_SHAPE = ("n_layers", "n_heads", "n_kv_heads", "has_mlp", "parallel")  # settings that a graph is built from
_SHOWN = 20  # rows of a table in a notebook
_DRAWN = 60  # edges of the figure


class EdgeAttribution(Artifact):
    """Scores of edges.

    `tensors` holds `score` (mean over pairs of |effect|) and `signed` (mean effect), axes `source` (writers) and
    `target` (readers), in the metric's unit; NaN where there is no edge.

    Raises:
        SettingError: settings that describe no graph, or no direction.
        AxisError: tensors with other axes or coordinates than the graph.
    """

    kind = "edge_attribution"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.settings.get("direction") not in ("noising", "denoising"):
            found = repr(self.settings.get("direction"))
            raise SettingError("settings['direction']", found, "use 'noising' or 'denoising'")
        missing = [name for name in _SHAPE if name not in self.settings]
        if missing:
            raise SettingError("an edge attribution", f"settings without {missing}", "add the sizes of its graph")
        graph = self.graph
        for name in ("score", "signed"):
            table = self.tensors.get(name)
            wanted = (graph.writers, graph.readers)
            if table is None or table.axes != AXES or tuple(table.coords.values()) != wanted:
                found = "nothing" if table is None else f"axes {table.axes} of shape {table.shape}"
                fix = f"label {len(wanted[0])} writers and {len(wanted[1])} readers with the names of the graph"
                raise AxisError(f"tensor {name!r} of an edge attribution", found, fix)

    @property
    def graph(self) -> Graph:
        """Writers, readers and edges."""
        n_layers, n_heads, n_kv_heads = (int(cast(int, self.settings[name])) for name in _SHAPE[:3])
        return Graph(n_layers, n_heads, n_kv_heads, bool(self.settings["has_mlp"]), bool(self.settings["parallel"]))

    @property
    def score(self) -> Labelled:
        """Mean over pairs of |effect|."""
        return self.tensors["score"]

    @property
    def signed(self) -> Labelled:
        """Mean effect over pairs."""
        return self.tensors["signed"]

    @property
    def contribution(self) -> Labelled:
        """Metric lost by noising: `-signed` under noising, `+signed` under denoising."""
        return 0.0 - self.signed if self.settings["direction"] == "noising" else self.signed

    @property
    def passes(self) -> Passes:
        """What the result cost, in prompt rows."""
        return Passes(**cast(dict[str, float], self.settings["passes"]))

    def measure(self, by: str) -> Labelled:
        """The table that edges are ranked by: `"score"`, `"contribution"` or `"abs_signed"`.

        Raises:
            UnknownNameError: no such measure.
        """
        if by not in _RANKINGS:
            raise UnknownNameError(f"measure {by!r}", "no such measure", nearest(by, _RANKINGS))
        if by == "abs_signed":
            return abs(self.signed)
        return self.score if by == "score" else self.contribution

    def top(self, k: int, by: str = "score") -> list[tuple[str, str]]:
        """The k largest edges as (source, target), largest first; ties in the order of the graph.

        Args:
            k: how many; fewer come back when the graph has fewer.
            by: `"score"`, `"contribution"` or `"abs_signed"`.

        Raises:
            SettingError: k is not a count.
            UnknownNameError: no such measure.
        """
        if isinstance(k, bool) or not isinstance(k, int) or k < 0:
            raise SettingError(f"top(k={k!r})", type(k).__name__, "give a whole number from 0")
        writers, readers = self._names(self._places(by, k))
        return list(zip(writers, readers, strict=True))

    def value(self, source: str, target: str, which: str = "score") -> float:
        """One edge's `"score"`, `"signed"`, `"contribution"` or `"abs_signed"`; NaN where there is no edge.

        Raises:
            UnknownNameError: no such writer, reader or measure.
        """
        row, column = self.graph.writer_index(source), self.graph.reader_index(target)
        return float((self.signed if which == "signed" else self.measure(which)).values[row, column])

    def circuit(
        self,
        top: int,
        by: Literal["contribution", "score", "abs_signed"] = "contribution",
        method: Literal["top", "greedy"] = "top",
    ) -> Circuit:
        """The circuit of the `top` most important edges; see `mechattr.patching.circuit.circuit_of`.

        Args:
            top: how many edges are taken, before those on no path are dropped.
            by: `"contribution"`, `"score"` or `"abs_signed"`.
            method: `"top"` or `"greedy"`.

        Raises:
            UnknownNameError: another measure or method.
            SettingError: no such number of edges, or none of them lies on a path.
        """
        from mechattr.patching.circuit import circuit_of

        return circuit_of(self, top, by=by, method=method)

    def to_pandas(self) -> pd.DataFrame:
        """All edges, largest score first; columns source, target, score, signed, contribution."""
        return self._frame(self.score.values.numel())

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draws the graph of the edges with the largest scores, on paths or not."""
        from mechattr import draw

        rows = [(*edge, self.value(*edge, "contribution")) for edge in self.top(_DRAWN)]
        group = self.graph.n_heads // self.graph.n_kv_heads
        if ax is None:
            ax = draw.pyplot_axes(*draw.graph_size(rows, group=group))
        unit = str(cast(Mapping[str, Any], self.settings.get("metric", {})).get("unit", ""))
        return draw.circuit_graph(rows, n_layers=self.graph.n_layers, group=group, unit=unit, ax=ax)

    def _places(self, by: str, k: int) -> Tensor:
        """Places of the k largest edges in the flattened table."""
        return largest(self.measure(by).values.detach().cpu().double().flatten(), k)

    def _names(self, places: Tensor) -> tuple[np.ndarray, np.ndarray]:
        graph = self.graph
        rows, columns = np.divmod(places.numpy(), len(graph.readers))
        return np.array(graph.writers, dtype=object)[rows], np.array(graph.readers, dtype=object)[columns]

    def _frame(self, k: int) -> pd.DataFrame:
        import pandas as pd

        places = self._places("score", k)
        writers, readers = self._names(places)
        tables = {"score": self.score, "signed": self.signed, "contribution": self.contribution}
        numbers = {
            name: table.values.detach().cpu().double().flatten()[places].numpy() for name, table in tables.items()
        }
        return pd.DataFrame({"source": writers, "target": readers, **numbers})

    @property
    def summary(self) -> str:
        """The method, how many edges and pairs, and the cost."""
        measured, total = int((~self.score.values.isnan()).sum()), self.graph.n_edges
        some = f"{total:,}" if measured == total else f"{measured:,} of {total:,}"
        known = [str(self.settings["method"])] if "method" in self.settings else []
        known.append(f"{some} edges")
        known += [f"{self.settings['n_pairs']} pairs"] if "n_pairs" in self.settings else []
        if "passes" in self.settings:
            known.append(f"{self.passes.forward:g} forward and {self.passes.backward:g} backward passes")
        return ", ".join(known)

    def __repr__(self) -> str:
        return f"EdgeAttribution({self.summary})"

    def _repr_html_(self) -> str:
        table = self._frame(_SHOWN).to_html(index=False, escape=True, float_format="{:.4g}".format)
        return f"<div>{escape(self.summary)}</div>{table}"


def edge_tables(graph: Graph, score: Tensor, signed: Tensor) -> dict[str, Labelled]:
    """The tensors of an `EdgeAttribution` from [writer, reader] tables; NaN is put where there is no edge."""
    nothing = ~graph.mask.to(score.device)
    coords = {"source": graph.writers, "target": graph.readers}
    tables = {"score": score, "signed": signed}
    return {name: Labelled(x.masked_fill(nothing, torch.nan).cpu(), AXES, coords) for name, x in tables.items()}
