"""Routes: the result of information flow routes, a graph of edges with weights for each prompt."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mechattr.artifact import Passes
from mechattr.base import Artifact
from mechattr.errors import AxisError, SettingError
from mechattr.labelled import Labelled

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from mechattr.draw import RouteView

INTO = ("resid_mid", "resid_post")
KINDS = ("attention", "mlp", "residual", "bias")
COLUMNS = ("batch", "layer", "into", "query", "key", "kind", "head", "neuron")
_BY_PROMPT = ("strings", "position", "prediction", "probability", "clipped")  # settings with one entry a prompt
_SHOWN = 20  # rows of a table in a notebook


class Routes(Artifact):
    """Edges along which a prediction was made, one graph a prompt.

    Nodes are places of the residual stream: `resid_mid` (after attention) and `resid_post` (after the MLP) of a layer
    and position, above the embeddings. Each edge ends in a node and carries the part's share in it. `tensors` has the
    columns `layer`, `into`, `query`, `key`, `kind` and `weight` [edge], and `batch` for a list of prompts; `head`, -1
    where there is none, and `neuron` if the graph tells these apart. `into` and `kind` count the entries of `INTO` and
    `KINDS` of this module; `to_pandas` spells them out.

    Raises:
        AxisError: columns are missing or unequally long.
    """

    kind: ClassVar[str] = "routes"

    def __post_init__(self) -> None:
        super().__post_init__()
        needed = {"layer", "into", "query", "key", "kind", "weight"}
        shapes = {table.shape for table in self.tensors.values()}
        if not needed <= self.tensors.keys() or len(shapes) != 1:
            found = f"{', '.join(self.tensors) or 'nothing'} of shapes {sorted(shapes)}"
            raise AxisError("the edges of routes", found, f"give one entry an edge in {', '.join(sorted(needed))}")

    @property
    def strings(self) -> list[list[str]]:
        """The tokens of each prompt as text."""
        return cast(list[list[str]], self.settings["strings"])

    @property
    def passes(self) -> Passes:
        """What the result cost, in prompt rows."""
        return Passes(**cast(dict[str, float], self.settings["passes"]))

    @property
    def n_edges(self) -> int:
        """How many edges all graphs have together."""
        return len(self.tensors["weight"])

    def column(self, name: str) -> Tensor:
        """A column of the edges; zeros for the batch of a single prompt, -1 for heads and neurons that are not told."""
        if name in self.tensors:
            return self.tensors[name].values
        return torch.full((self.n_edges,), 0 if name == "batch" else -1)

    def prompt(self, row: int) -> Routes:
        """The graph of one prompt, as if it had been the only one.

        Raises:
            SettingError: no such prompt.
        """
        n = len(self.strings)
        if isinstance(row, bool) or not isinstance(row, int) or not 0 <= row < n:
            raise SettingError(f"prompt {row!r}", f"{n} prompts", f"give a number from 0 to {n - 1}")
        settings: dict[str, Any] = dict(self.settings)
        settings |= {name: [settings[name][row]] for name in _BY_PROMPT}
        passes = {name: count / n for name, count in self.passes._asdict().items()}
        settings |= {"n_prompts": 1, "passes": passes}
        chosen = self._only(self.column("batch") == row, settings)
        tensors = {name: table for name, table in chosen.tensors.items() if name != "batch"}
        return Routes(tensors, settings=settings, provenance=self.provenance)

    def prune(self, threshold: float) -> Routes:
        """The graph that a higher threshold gives, without another pass.

        Args:
            threshold: at least that of the result.

        Raises:
            SettingError: a lower one, or weights that are shares in what survived the threshold already.
        """
        if self.settings["renormalise"]:
            raise SettingError("to prune routes", "renormalised weights", "extract them again at that threshold")
        lowest = float(cast(float, self.settings["threshold"]))
        if not threshold >= lowest:
            raise SettingError(f"threshold={threshold!r}", f"edges below {lowest:g} are gone", "extract them again")
        return self._only(self._reached(threshold), {**self.settings, "threshold": float(threshold)})

    def merged(self) -> Routes:
        """One edge for each pair of places: heads are summed, with the residual edge where query and key are one.

        Neurons are summed, too; MLPs and biases stay apart. An edge that is left of attention has no head, and one of
        the stream around attention counts as attention.
        """
        names = [name for name in COLUMNS if name in self.tensors and name not in ("head", "neuron")]
        columns = {name: self.column(name).clone() for name in names}
        attention = (columns["into"] == 0) & (columns["kind"] == KINDS.index("residual"))
        columns["kind"][attention] = KINDS.index("attention")
        columns["layer"] = -columns["layer"]  # unique sorts upward, and graphs are written from the top
        columns["into"] = -columns["into"]
        rows, place = torch.stack(list(columns.values()), 1).unique(dim=0, return_inverse=True)
        weights = self.tensors["weight"].values
        summed = weights.new_zeros(len(rows)).index_add(0, place, weights)
        found = dict(zip(names, rows.T, strict=True))
        found |= {"layer": -found["layer"], "into": -found["into"]}
        tensors = {name: Labelled(values, ("edge",)) for name, values in {**found, "weight": summed}.items()}
        return Routes(tensors, settings={**self.settings, "merged": True}, provenance=self.provenance)

    def to_pandas(self) -> pd.DataFrame:
        """All edges, from the top down.

        Columns: batch (for a list of prompts), layer, into, query, key, kind, head and neuron (where told apart),
        weight, query_token, key_token.
        """
        import pandas as pd

        frame = {}
        for name in COLUMNS:
            if name in self.tensors:
                frame[name] = pd.Series(self.column(name).numpy())
                if name in ("head", "neuron"):
                    frame[name] = frame[name].astype("Int64").mask(frame[name] < 0)
        for name, names in (("into", INTO), ("kind", KINDS)):
            frame[name] = frame[name].map(dict(enumerate(names)))
        frame["weight"] = pd.Series(self.tensors["weight"].numpy())
        rows = self.column("batch").tolist()
        for name in ("query", "key"):
            places = self.column(name).tolist()
            frame[f"{name}_token"] = pd.Series([self.strings[b][i] for b, i in zip(rows, places, strict=True)])
        return pd.DataFrame(frame)

    def plot(self, ax: Axes | None = None, *, prompt: int = 0) -> Axes:
        """Draws the graph of one prompt, tokens to the right and layers upward; see `mechattr.draw.route_map`.

        Args:
            ax: axes to draw into; pyplot's new figure without it.
            prompt: which one, of several.
        """
        from mechattr import draw

        view = self.view(prompt)
        if ax is None:
            ax = draw.pyplot_axes(*draw.route_map_size(view))
        return draw.route_map(view, ax=ax)

    def page(self, *, prompt: int = 0, title: str = "Information flow routes", threshold: float | None = None) -> str:
        """An interactive page as one HTML document that needs no network; see `mechattr.draw.route_page`.

        Args:
            prompt: which one, of several.
            title: its headline.
            threshold: where its slider stands at first; the slider begins at the threshold of the result.
        """
        from mechattr import draw

        return draw.route_page(self.view(prompt), title=title, threshold=threshold)

    def view(self, prompt: int = 0) -> RouteView:
        """What is drawn of one prompt.

        Args:
            prompt: which one, of several.
        """
        from mechattr.draw import RouteEdge, RouteView

        one = self.prompt(prompt)
        names = ("layer", "into", "query", "key", "kind", "head", "neuron", "weight")
        rows = zip(*(one.column(name).tolist() for name in names), strict=True)
        edges = [RouteEdge(a, INTO[b], i, j, KINDS[k], *rest) for a, b, i, j, k, *rest in rows]
        s: Mapping[str, Any] = one.settings
        of_prompt = {name: s[name][0] for name in ("position", "prediction", "probability")}
        sizes = {name: s[name] for name in ("n_layers", "threshold", "parallel")}
        return RouteView(tokens=one.strings[0], edges=edges, **of_prompt, **sizes)

    def _only(self, chosen: Bool[Tensor, " edge"], settings: Mapping[str, Any]) -> Routes:
        tensors = {name: Labelled(table.values[chosen], table.axes) for name, table in self.tensors.items()}
        return Routes(tensors, settings=settings, provenance=self.provenance)

    def _reached(self, threshold: float) -> Bool[Tensor, " edge"]:
        """The edges that a walk from the top meets, of those at the threshold or largest of their node."""
        batch, layer, into, query, key, kind = (self.column(name) for name in COLUMNS[:6])
        weight = self.column("weight")
        kept = (weight >= threshold) | self._largest(torch.stack([batch, layer, into, query], 1))
        n_layers, parallel = int(cast(int, self.settings["n_layers"])), bool(self.settings["parallel"])
        width = max(map(len, self.strings))
        open_nodes = torch.zeros(len(self.strings), n_layers + 1, 2, width, dtype=torch.bool)
        top = torch.tensor(cast(list[int], self.settings["position"]))
        open_nodes[torch.arange(len(top)), n_layers - 1, 1, top] = True
        found = torch.zeros_like(kept)
        for at in reversed(range(n_layers)):
            for half in (1, 0):
                here = kept & (layer == at) & (into == half) & open_nodes[batch, at, half, query]
                found |= here
                on = here & (kind != KINDS.index("bias"))
                down = on & ((kind == KINDS.index("mlp")) if parallel else torch.zeros_like(on)) if half else on
                open_nodes[batch[down], at - 1, 1, key[down]] = True  # that of layer 0 goes to the spare last one
                if half:
                    stay = on & ~down
                    open_nodes[batch[stay], at, 0, key[stay]] = True
        return found

    def _largest(self, nodes: Int[Tensor, "edge name"]) -> Bool[Tensor, " edge"]:
        """The first largest edge of each node."""
        order = self.column("weight").argsort(descending=True, stable=True)
        _, place = nodes[order].unique(dim=0, return_inverse=True)
        first = torch.full((int(place.max()) + 1,), len(place)).scatter_reduce(
            0, place, torch.arange(len(place)), "amin"
        )
        chosen = torch.zeros(len(place), dtype=torch.bool)
        chosen[order[first]] = True
        return chosen

    @property
    def summary(self) -> str:
        """The method, how many prompts and edges, the threshold and the cost."""
        s = self.settings
        passes = f"{self.passes.forward:g} forward and {self.passes.backward:g} backward passes"
        threshold = float(cast(float, s["threshold"]))
        return f"{s['method']}, {s['n_prompts']} prompts, {self.n_edges:,} edges from {threshold:g}, {passes}"

    def __repr__(self) -> str:
        return f"Routes({self.summary})"

    def _repr_html_(self) -> str:
        frame = self.to_pandas().sort_values("weight", ascending=False, kind="stable")[:_SHOWN]
        table = frame.to_html(index=False, escape=True, na_rep="", float_format="{:.4g}".format)
        return f"<div>{escape(self.summary)}</div>{table}"
