"""The numbers of a run that report, table and sentence share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from mechattr.artifact import Attribution
from mechattr.draw import spearman, spell
from mechattr.evaluation.faithfulness import Faithfulness
from mechattr.patching.bound import Bound
from mechattr.patching.circuit import Circuit
from mechattr.patching.edge_artifact import EdgeAttribution
from mechattr.sites import Node

STRONG_SHARE = 0.1  # a component counts as strong when it alone moves at least this share of the gap


@dataclass(frozen=True)
class Results:
    """Everything a report is made of; from a run, or read back from its folder.

    Attributes:
        record: what was asked, and the samples (see `mechattr.report.record`).
        attribution: estimates at the scored sites and at the sites of the maps.
        exact: exact effects of the strongest components by estimate; NaN elsewhere.
        whole_attribution: estimates of whole heads (z) and MLPs, all positions replaced together.
        whole_exact: the exact effects of the same.
        bound: what may hide among the components that were not checked.
        edges: estimates of all edges.
        circuit: the circuit made of the best of them.
        faithfulness: how much of the behaviour circuits of several sizes keep.
    """

    record: Mapping[str, Any]
    attribution: Attribution
    exact: Attribution
    whole_attribution: Attribution
    whole_exact: Attribution
    bound: Bound | None = None
    edges: EdgeAttribution | None = None
    circuit: Circuit | None = None
    faithfulness: Faithfulness | None = None

    @property
    def key(self) -> Mapping[str, Any]:
        """The settings of the run."""
        key: Mapping[str, Any] = self.record["key"]
        return key

    @property
    def unit(self) -> str:
        """Unit of the metric, such as "logit"."""
        return str(self.record["task"]["unit"])

    @cached_property
    def scored(self) -> Attribution:
        """The estimates of the scored sites alone, without the sites that only the maps show."""
        return at_sites(self.attribution, self.key["sites"])

    @cached_property
    def verified(self) -> list[Node]:
        """The nodes with an exact effect, the strongest (by exact score) first."""
        return self.exact.top(len(self.exact.nodes()))

    @cached_property
    def n_components(self) -> int:
        """How many components were scored."""
        return sum(int(values.isfinite().values.sum()) for values in self.scored.scores.values())

    @cached_property
    def n_zero(self) -> int:
        """How many of them have an estimate of exactly 0: their activations do not differ, or nothing reads them."""
        return sum(int((values.values == 0).sum()) for values in self.scored.scores.values())

    @cached_property
    def metrics(self) -> tuple[float, float]:
        """Mean metric on the clean and on the corrupt prompts."""
        return _mean(self._metric("clean")), _mean(self._metric("corrupt"))

    def _metric(self, side: str) -> list[float]:
        """The metric of each pair, where it is finite."""
        values: Any = self.attribution.settings[f"{side}_metric"]
        return [value for value in values if value is not None]

    @cached_property
    def gap(self) -> float:
        """|clean - corrupt| mean metric: what shares are shares of."""
        clean, corrupt = self.metrics
        return abs(clean - corrupt)

    @cached_property
    def accuracy(self) -> float | None:
        """Share of pairs with a positive metric on the clean prompt, for metrics whose sign says which answer wins."""
        clean = self._metric("clean")
        return _mean([float(value > 0) for value in clean]) if self.record["task"]["contrast"] and clean else None

    @property
    def tokens(self) -> list[str]:
        """The clean tokens of the first pair, which stand for positions in names and tick labels."""
        tokens: list[str] = self.record["task"]["samples"][0]["clean"]
        return tokens

    @property
    def spans(self) -> dict[str, tuple[int, int]]:
        """Name -> (start, end) of the spans that are at the same positions in every pair."""
        return {name: (start, end) for name, (start, end) in self.record["task"]["spans"].items()}

    def position(self, position: int | str | None) -> str:
        """A node's position as people read it: `14 ␣to (END)`, a span's name, or `all`."""
        if position is None or isinstance(position, str):
            return position or "all"
        inside = [name for name, (start, end) in self.spans.items() if start <= position < end]
        token = f" {spell(self.tokens[position])}" if position < len(self.tokens) else ""
        return f"{position}{token}" + (f" ({', '.join(inside)})" if inside else "")

    def share(self, node: Node) -> float:
        """|exact mean effect| as a share of the gap; NaN without a gap."""
        return self.exact.value(node, "abs_signed") / self.gap if self.gap > 0 else math.nan

    @cached_property
    def strong(self) -> list[Node]:
        """The verified nodes that alone move the metric by at least a tenth of the gap, the strongest first."""
        return sorted((n for n in self.verified if self.share(n) >= STRONG_SHARE), key=lambda n: -self.share(n))

    @cached_property
    def agreement(self) -> tuple[float, float]:
        """Spearman between estimate and exact over whole heads and MLPs: of contributions, and of mean |effect|."""
        nodes = self.whole_exact.nodes()
        return _rank(self.whole_attribution, self.whole_exact, nodes, "contribution"), _rank(
            self.whole_attribution, self.whole_exact, nodes, "score"
        )

    @cached_property
    def exhaustive_passes(self) -> float:
        """Forward passes (prompt rows) of an exact sweep over every scored component whose estimate is not exactly 0.

        A patch in layer l reruns the share (L - l) / L of a forward pass of each pair.
        """
        n_layers, n_pairs = self.record["model"]["n_layers"], self.record["task"]["n_pairs"]
        total = 0.0
        for values in self.scored.scores.values():
            counts = (values.isfinite().values & (values.values != 0)).sum(tuple(range(1, len(values.axes)))).tolist()
            total += sum(
                n * (n_layers - int(layer)) / n_layers for n, layer in zip(counts, values.coords["layer"], strict=True)
            )
        return total * n_pairs


def at_sites(attribution: Attribution, sites: Sequence[str]) -> Attribution:
    """The part of a result at some sites, with the same settings and provenance."""
    kept = {name: values for name, values in attribution.tensors.items() if name.partition("/")[2] in sites}
    return Attribution(kept, settings=attribution.settings, provenance=attribution.provenance)


def _rank(estimate: Attribution, exact: Attribution, nodes: list[Node], which: str) -> float:
    return spearman([estimate.value(n, which) for n in nodes], [exact.value(n, which) for n in nodes])


def _mean(values: list[float]) -> float:
    return float(np.mean(values)) if values else math.nan
