"""Circuits: the edges that are kept, as a result of its own."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechattr.base import Artifact
from mechattr.errors import AxisError, SettingError, UnknownNameError, nearest
from mechattr.labelled import Labelled
from mechattr.patching.extraction import greedy, on_paths, strongest
from mechattr.patching.graph import LOGITS, Graph
from mechattr.patching.interventions import whole_number
from mechattr.provenance import JSON

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from mechattr.patching.edge_artifact import EdgeAttribution

METHODS = ("top", "greedy")
AXES = ("source", "target")
_SIZES = ("n_layers", "n_heads", "n_kv_heads", "has_mlp", "parallel")  # settings that a graph is built from
_SHOWN = 20  # rows of a table in a notebook


class Circuit(Artifact):
    """A set of edges of a model's graph, with the contribution of each.

    `tensors` holds `kept` (which edges belong to the circuit) and `contribution` (of every edge, NaN where there is
    none or it was not measured), with axes source and target. `settings` are those of the edge scores with
    `extraction`: how the circuit was taken from them.

    Raises:
        AxisError: tables that do not belong to the graph of the settings.
        SettingError: settings that describe no graph, or an edge is kept that the graph does not have.
    """

    kind = "circuit"

    def __post_init__(self) -> None:
        super().__post_init__()
        if missing := [name for name in _SIZES if name not in self.settings]:
            raise SettingError("a circuit", f"settings without {', '.join(missing)}", "add the sizes of its graph")
        graph = self.graph
        for name in ("kept", "contribution"):
            coords = self.tensors[name].explicit_coords if name in self.tensors else {}
            if coords != {"source": graph.writers, "target": graph.readers}:
                found = f"sizes {self.tensors[name].shape}" if name in self.tensors else "no such table"
                fix = f"label it with the {len(graph.writers)} writers and {len(graph.readers)} readers of the graph"
                raise AxisError(f"the table {name!r} of a circuit", found, fix)
        if (self.mask & ~graph.mask).any():
            raise SettingError("a circuit", "edges that the graph does not have", "keep only edges of graph.mask")

    @property
    def graph(self) -> Graph:
        """The graph that the circuit is a part of."""
        sizes: dict[str, Any] = {name: self.settings[name] for name in _SIZES}
        return Graph(**sizes)

    @property
    def mask(self) -> Bool[Tensor, "writer reader"]:
        """Which edges belong to the circuit."""
        return self.tensors["kept"].values

    def complement(self) -> Bool[Tensor, "writer reader"]:
        """The edges of the graph that do not belong to the circuit."""
        return self.graph.mask & ~self.mask

    @property
    def n_edges(self) -> int:
        """The number of edges."""
        return int(self.mask.sum())

    @property
    def edges(self) -> list[tuple[str, str]]:
        """The edges (source, target) in the order of the graph."""
        graph = self.graph
        return [(graph.writers[i], graph.readers[j]) for i, j in self.mask.nonzero().tolist()]

    @property
    def nodes(self) -> list[str]:
        """The nodes that an edge leaves, in the order of the graph, and `"logits"` where one arrives there.

        Where the circuit has no dead ends these are all its nodes: an edge into a head, also into keys and values that
        several heads share, is followed by one that leaves it.
        """
        graph = self.graph
        left = self.mask.any(1).nonzero().flatten().tolist()
        arrives = bool(self.mask[:, graph.reader_index(LOGITS)].any())
        return [graph.writers[place] for place in left] + [LOGITS] * arrives

    def without(self, node: str) -> Circuit:
        """The circuit without the edges that leave or enter one node; nothing else is pruned.

        Keys and values that the node shares with another head of the circuit keep their edges.

        Raises:
            UnknownNameError: the node is not one of the circuit, or is the input or the logits, without which there
                is no path.
        """
        inner = [name for name in self.nodes if self.graph.layer_of(name) is not None]
        if node not in inner:
            raise UnknownNameError(
                f"the circuit without {node!r}", f"{len(inner)} heads and MLPs in it", nearest(node, inner)
            )
        graph, kept, others = self.graph, self.mask.clone(), {*inner} - {node}
        kept[graph.writer_index(node)] = False
        for place, reader in enumerate(graph.readers):
            fed = graph.fed_by(reader)
            if node in fed and not others.intersection(fed):
                kept[:, place] = False
        return self._with(kept, {**self._extraction, "without": [*self._extraction.get("without", []), node]})

    def random_like(self, seed: int) -> Circuit:
        """A random circuit with as many edges, drawn without replacement and with equal chances from the whole graph.

        Its dead ends stay: without them it would have fewer edges than the circuit that it is compared with.

        Raises:
            SettingError: an unusable seed.
        """
        graph, generator = self.graph, torch.Generator().manual_seed(whole_number("seed", seed, 0))
        places = graph.mask.flatten().nonzero().flatten()
        kept = torch.zeros(graph.mask.numel(), dtype=torch.bool)
        kept[places[torch.randperm(len(places), generator=generator)[: self.n_edges]]] = True
        extraction = {"method": "random", "seed": seed, "requested": self.n_edges}
        return self._with(kept.view(graph.mask.shape), extraction)

    @property
    def _extraction(self) -> dict[str, Any]:
        found = self.settings.get("extraction")
        return dict(found) if isinstance(found, Mapping) else {}

    def _with(self, kept: Tensor, extraction: Mapping[str, Any]) -> Self:
        return type(self)(
            {**self.tensors, "kept": _labelled(kept, self.graph)},
            settings={**self.settings, "extraction": {**extraction, "kept": int(kept.sum())}},
            provenance=self.provenance,
        )

    def _rows(self) -> list[tuple[str, str, float]]:
        """Source, target and contribution, largest |contribution| first, then what was not measured."""
        values = self.tensors["contribution"].values.double().cpu()
        places = self.mask.cpu().nonzero()
        kept = values[places[:, 0], places[:, 1]]
        order = torch.argsort(kept.abs().nan_to_num(-1.0, posinf=float("inf")), descending=True, stable=True)
        edges = self.edges
        return [(*edges[place], float(kept[place])) for place in order.tolist()]

    def to_pandas(self) -> pd.DataFrame:
        """The edges with columns source, target and contribution, largest |contribution| first."""
        import pandas as pd

        return pd.DataFrame(self._rows(), columns=["source", "target", "contribution"])

    def plot(self, ax: Axes | None = None, *, limit: int = 60) -> Axes:
        """Draws the graph; see `mechattr.draw.circuit_graph`.

        Args:
            ax: axes to draw into; pyplot's new figure without it, so that a notebook shows it.
            limit: how many edges are drawn at most.
        """
        from mechattr import draw

        rows, graph = self._rows(), self.graph
        group = graph.n_heads // graph.n_kv_heads
        if ax is None:
            ax = draw.pyplot_axes(*draw.graph_size(rows, group=group, limit=limit))
        return draw.circuit_graph(rows, n_layers=graph.n_layers, group=group, unit=self._unit, limit=limit, ax=ax)

    @property
    def _unit(self) -> str:
        metric = self.settings.get("metric")
        return str(metric.get("unit", "")) if isinstance(metric, Mapping) else ""

    @property
    def summary(self) -> str:
        """How many edges and nodes, and how they were taken."""
        extraction = self._extraction
        line = f"{self.n_edges:,} of {self.graph.n_edges:,} edges, {len(self.nodes)} nodes"
        how = [str(extraction[key]) for key in ("method", "by") if key in extraction]
        line += f"; {' by '.join(how)}" if how else ""
        if extraction.get("requested", self.n_edges) != self.n_edges:
            line += f", {extraction['requested']:,} requested"
        return line

    def __repr__(self) -> str:
        return f"Circuit({self.summary})"

    def _repr_html_(self) -> str:
        import pandas as pd

        rows = pd.DataFrame(self._rows()[:_SHOWN], columns=["source", "target", "contribution"])
        more = f"<div>and {self.n_edges - _SHOWN:,} more</div>" if self.n_edges > _SHOWN else ""
        table = rows.to_html(index=False, escape=True, na_rep="", float_format="{:.4g}".format)
        return f"<div>{escape(self.summary)}</div>{table}{more}"


def circuit_of(
    edges: EdgeAttribution,
    top: int,
    *,
    by: Literal["contribution", "score", "abs_signed"] = "contribution",
    method: Literal["top", "greedy"] = "top",
) -> Circuit:
    """A circuit from the scores of edges.

    `"top"` takes the `top` edges of largest value. `"greedy"` starts at the logits and takes, again and again, the
    edge of largest value among those into a node that is already in the circuit. Equal values are taken in the order
    of the graph. Then dead ends are dropped, edges on no path from the input to the logits, so that the circuit may
    have fewer edges than asked for: `n_edges` counts what is left, and settings hold both numbers.

    Args:
        edges: scores of the edges.
        top: how many edges are taken.
        by: `"contribution"`, signed, so that edges that work against the metric come last; `"score"`, the mean over
            pairs of |effect|; or `"abs_signed"`, the magnitude of the mean effect.
        method: `"top"` or `"greedy"`.

    Raises:
        UnknownNameError: another measure or method.
        SettingError: fewer than one edge, or more than the graph has or were measured; or none of them lies on a path,
            as may be when few are asked for or all values are the same.

    Cost:
        No pass.

    References:
        Hanna, Pezzelle, Belinkov 2024, arXiv:2403.17806 (greedy); Mueller et al. 2025, arXiv:2504.13151 (by
        contribution or by magnitude).
    """
    found = extracted(edges, top, by=by, method=method)
    if not found.n_edges:
        how = "" if method == "greedy" else " or method='greedy'"
        raise SettingError(
            f"a circuit of {top:,} edges by {by}",
            "none of them on a path from the input to the logits",
            f"ask for more edges{how}",
        )
    return found


def extracted(edges: EdgeAttribution, top: int, *, by: str = "contribution", method: str = "top") -> Circuit:
    """What `circuit_of` says, where a circuit without any path is empty."""
    if method not in METHODS:
        raise UnknownNameError(f"a circuit by method {method!r}", "no such method", nearest(method, METHODS))
    graph, table = edges.graph, edges.measure(by).values.detach().cpu().double()
    values: Float[Tensor, "writer reader"] = table.masked_fill(~graph.mask, torch.nan)
    measured = int((~values.isnan()).sum())
    if isinstance(top, bool) or not isinstance(top, int) or not 1 <= top <= measured:
        unmeasured = f", {measured:,} of them measured" if measured < graph.n_edges else ""
        raise SettingError(
            f"a circuit of {top!r} edges", f"a graph of {graph.n_edges:,} edges{unmeasured}", f"ask for 1 to {measured}"
        )
    taken = strongest(values, top) if method == "top" else greedy(values, top, graph)
    kept = on_paths(taken, graph)
    extraction: dict[str, JSON] = {"method": method, "by": by, "requested": top}
    extraction |= {"taken": int(taken.sum()), "kept": int(kept.sum())}
    return Circuit(
        {"kept": _labelled(kept, graph), "contribution": _labelled(edges.contribution.values, graph)},
        settings={**edges.settings, "extraction": extraction},
        provenance=edges.provenance,
    )


def _labelled(values: Tensor, graph: Graph) -> Labelled:
    return Labelled(values.detach().cpu(), AXES, {"source": graph.writers, "target": graph.readers})
