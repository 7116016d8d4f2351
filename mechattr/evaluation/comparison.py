"""`Comparison`: orders of the same nodes beside their true effects."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from mechattr.base import Artifact
from mechattr.errors import UnknownNameError, nearest
from mechattr.evaluation import discovery

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

POINTS = 200  # of a drawn curve


class Comparison(Artifact):
    """Orders of the same nodes, and their true effects.

    `tensors` holds `effect` [node] (mean over pairs of |effect|), `rank` [method, node] and `cost` [method, node]: the
    verifications after which a node's effect is known, without what an estimate itself cost; that is in
    `settings["setup"]`, by method, in verifications (forward passes of all pairs; a backward pass counts as two).
    Nodes are sorted by site; `settings["nodes"]` says how many each site has.
    """

    kind = "comparison"

    @property
    def methods(self) -> tuple[str, ...]:
        """The names of the orders."""
        return tuple(str(name) for name in self.tensors["rank"].coords["method"])

    def _of(self, what: str, method: str) -> np.ndarray:
        if method not in self.methods:
            raise UnknownNameError(f"method {method!r}", "not in this comparison", nearest(method, self.methods))
        return self.tensors[what].sel(method=method).numpy()

    def recall(self, method: str, k: int, site: str | None = None) -> float:
        """The share of the truly k largest nodes among the first k of an order.

        Args:
            method: whose order.
            k: number of nodes.
            site: look at the nodes of one site only.

        Raises:
            UnknownNameError: no such method or site.
            SettingError: k is not a number of nodes.
        """
        ranks, effects = self._of("rank", method), self.tensors["effect"].numpy()
        if site is not None:
            mine = self._site(site)
            ranks, effects = discovery.ranks_among(ranks, mine), effects[mine]
        return discovery.recall_at(ranks, effects, k)

    def _site(self, site: str) -> slice:
        counts: Any = self.settings["nodes"]
        if site not in counts:
            raise UnknownNameError(f"site {site!r}", "not in this comparison", nearest(site, counts))
        before = sum(counts[name] for name in list(counts)[: list(counts).index(site)])
        return slice(before, before + counts[site])

    def cost(self, method: str, *, setup: bool = True) -> np.ndarray:
        """cost(k) for k = 1, 2, ...: verifications until the truly k largest nodes are known.

        Args:
            method: whose order.
            setup: with what the estimate itself cost.

        Raises:
            UnknownNameError: no such method.
        """
        before: Any = self.settings["setup"]
        costs = self._of("cost", method)
        return discovery.cost_curve(costs, self.tensors["effect"].numpy(), before[method] if setup else 0.0)

    def relative_cost(self, method: str, *, setup: bool = False, upto: int | None = None) -> float:
        """The inverse-rank-weighted geometric mean of cost(k) / k: 1 for the exact order.

        Args:
            method: whose order.
            setup: with what the estimate itself cost.
            upto: the last k; all nodes that have an effect unless given.

        Raises:
            UnknownNameError: no such method.
        """
        return discovery.inverse_rank_weighted(discovery.relative_cost(self.cost(method, setup=setup)), upto)

    def to_pandas(self, ks: Sequence[int] = (10, 30, 100)) -> pd.DataFrame:
        """One row a method, cheapest first.

        Columns: method, setup, relative_cost (the order alone), with_setup, worst (the largest cost(k) / k of the
        order), and recall@k for each k.
        """
        import pandas as pd

        before: Any = self.settings["setup"]
        rows = [
            {
                "method": method,
                "setup": before[method],
                "relative_cost": self.relative_cost(method),
                "with_setup": self.relative_cost(method, setup=True),
                "worst": float(discovery.relative_cost(self.cost(method, setup=False)).max()),
                **{f"recall@{k}": self.recall(method, k) for k in ks},
            }
            for method in self.methods
        ]
        return pd.DataFrame(rows).sort_values("relative_cost", kind="stable", ignore_index=True)

    def plot(self, k: int = 10, ax: Axes | None = None) -> Axes:
        """Draws the share of the true top k found against the verifications; see `mechattr.draw.curves`."""
        from mechattr import draw

        effects = self.tensors["effect"].numpy()
        visited = np.unique(np.geomspace(1, len(effects), POINTS).round().astype(int))
        before: Any = self.settings["setup"]
        found = {
            method: discovery.found_curve(self._of("cost", method), effects, k, visited, before[method])
            for method in self.methods
        }
        chance = found.pop("random", None)
        ax = draw.pyplot_axes(6.2, 3.5) if ax is None else ax
        return draw.discovery_curve(found, visited, k=k, random=chance, cost="verifications", ax=ax)

    @property
    def summary(self) -> str:
        """How many orders of how many nodes, and which is the cheapest."""
        best = self.to_pandas(ks=()).iloc[0]
        return (
            f"{len(self.methods)} orders of {len(self.tensors['effect']):,} nodes; cheapest: {best['method']}, "
            f"relative cost {best['relative_cost']:.3g} ({best['with_setup']:.3g} with what its estimate cost)"
        )

    def __repr__(self) -> str:
        return f"Comparison({self.summary})"

    def _repr_html_(self) -> str:
        table = self.to_pandas().to_html(index=False, float_format="{:.3g}".format)
        return f"<div>{escape(self.summary)}</div>{table}"
