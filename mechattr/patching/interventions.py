"""All interventions of an exact sweep: which of them can change anything, and what those change.

Nodes are patched one in each row of a batch, from the residual stream before the node's block upward. Methods differ in
what the base run is and in what takes a node's place; each says so by overriding one of the small methods at the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechattr.errors import NonFiniteError, SettingError
from mechattr.models.base import Batch, HookedModel, Metric, Start
from mechattr.models.edits import Edit, Place
from mechattr.models.halving import Halving
from mechattr.patching.nodes import NodeTable
from mechattr.patching.places import Places, chunks, per_node, rows_at_once
from mechattr.patching.recording import recorded
from mechattr.sites import full_name

TOKENS_AT_ONCE = 4096  # rows of a forward pass are chosen so that it has about this many tokens
PAIRS_AT_ONCE = 64  # at most so many pairs are recorded at a time

Index = tuple[Tensor, ...]


def rows_of(base: Batch, batch_size: int | None) -> int:
    """Rows of one forward pass."""
    source = 0 if base.source is None else base.source.tokens.shape[1]
    return rows_at_once(batch_size, max(8, TOKENS_AT_ONCE // (base.tokens.shape[1] + source)))


def share_of(layer: int | None, n_layers: int) -> float:
    """The part of a forward pass that an intervention at a layer takes; outside the blocks it takes a whole one."""
    return 1.0 if layer is None else (n_layers - layer) / n_layers


def whole_number(name: str, value: int, low: int) -> int:
    """Checks a number.

    Raises:
        SettingError: not a whole number from `low`.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise SettingError(f"{name}={value!r}", f"no whole number from {low}", f"give one, such as {name}={low}")
    return value


def finite(measured: list[float], what: Callable[[int], str]) -> list[float]:
    """What was measured, if all of it is finite; `what` names an entry.

    Raises:
        NonFiniteError: one is not.
    """
    for i, value in enumerate(measured):
        if not math.isfinite(value):
            fix = "use a metric that is finite wherever the logits are, or a wider dtype"
            raise NonFiniteError(what(i), f"it is {value}, although the logits are finite", fix)
    return measured


class Values(Protocol):
    """What takes the place of activations."""

    def rows(self, pairs: Sequence[int]) -> tuple[dict[str, Tensor], Tensor | None]:
        """Of some pairs, by full name; and the metric of the run that they were taken from, if there was one."""
        ...


@dataclass(frozen=True, eq=False, slots=True)
class Chunk:
    """Interventions that run together: all of one block (or of the embeddings), of one group of pairs.

    Attributes:
        layer: the block that the run starts from; `None` is the whole network.
        pairs: for each intervention its pair, counted within the group.
        nodes: for each intervention its node.
        share: forward passes of one intervention.
    """

    layer: int | None
    pairs: Tensor
    nodes: Tensor
    share: float


@dataclass(frozen=True, eq=False, slots=True)
class Recording:
    """One group of pairs: its numbers, base prompts, residual stream and metric, and what takes the place of nodes."""

    pairs: Tensor
    batch: Batch
    places: Places
    stream: dict[str, Tensor]
    metric: Tensor
    source: dict[str, Tensor]


class Interventions:
    """All interventions of a sweep. A group of pairs is recorded once, and dropped when the next one is recorded."""

    def __init__(
        self,
        model: HookedModel,
        base: Batch,
        metric: Metric,
        there: Values,
        table: NodeTable,
        places: Places,
        rows: int,
    ) -> None:
        self.model, self.base, self.metric, self.there = model, base, metric, there
        self.table, self.places, self.rows = table, places, rows
        self.halving = Halving(rows)
        self.parts = chunks(len(base), min(rows, PAIRS_AT_ONCE))
        self.chunks: list[Chunk] = []
        self.ran = torch.zeros(len(table), dtype=torch.bool)
        self.base_metric: list[float] = []
        self.source_metric: list[float] = []
        self.dtype = torch.float32

    @property
    def forward(self) -> float:
        """Forward passes that the interventions took."""
        return sum(chunk.share * len(chunk.nodes) for chunk in self.chunks)

    def groups(self) -> Iterator[list[Chunk]]:
        """Every intervention that can change something, in a fixed order; records each group of pairs on the way."""
        n_layers = self.model.info.n_layers
        for pairs in self.parts:
            moved = self._record(pairs)
            self.ran |= moved.any(0)
            group = []
            for layer in self.table.layers:
                here = self.table.of_layer(layer)
                pair, which = moved[:, here].nonzero(as_tuple=True)
                start = self.lowest(layer)
                share = share_of(start, n_layers)
                for part in chunks(len(pair), self.rows):
                    index = slice(part.start, part.stop)
                    group.append(Chunk(start, pair[index], here[which[index]], share))
            self.chunks += group
            yield group
            del self.now  # one group is let go before the next one is recorded

    def _record(self, pairs: Sequence[int]) -> Bool[Tensor, "pair node"]:
        """Runs a group of pairs; says which interventions change an activation."""
        batch, places, names = self.base.rows(pairs), self.places.rows(pairs), self.table.names
        starts = dict.fromkeys(self.lowest(layer) for layer in self.table.layers)
        stream = [full_name("resid_pre", layer) for layer in starts if layer is not None]
        numbers = torch.tensor(pairs)
        found, metric = recorded(
            self.model, batch, [*stream, *names], self.metric, lambda rows: self.before(numbers[list(rows)])
        )
        there, source_metric = self.there.rows(pairs)
        assert metric is not None  # one was given
        here = {name: found[name] for name in names}
        self.now = Recording(numbers, batch, places, {name: found[name] for name in stream}, metric, there)
        self.base_metric += metric.tolist()
        self.source_metric += [] if source_metric is None else source_metric.tolist()
        self.dtype = torch.promote_types(metric.dtype, torch.float32)
        changed = {name: self.changed(name, here[name]) for name in names}
        return self.together(self.table.lookup(changed, len(batch)))

    def compute(self, chunk: Chunk) -> list[float]:
        """The effects of one chunk of the group that was recorded last."""
        effects = self.halving(range(len(chunk.nodes)), lambda part: self._run(chunk, torch.tensor(part)))
        sites = self.table.name[chunk.nodes].tolist()
        return finite(effects, lambda i: f"the effect of a node at {self.table.names[sites[i]]}")

    def _run(self, chunk: Chunk, part: Tensor) -> list[float]:
        now, pairs, nodes = self.now, chunk.pairs[part], chunk.nodes[part]
        start, edits = None, []
        if chunk.layer is not None:
            start = Start(chunk.layer, now.stream[full_name("resid_pre", chunk.layer)][pairs])
        else:
            edits = self.before(now.pairs[pairs])
        row, node = (x.to(now.batch.device) for x in self.members(nodes))
        place_of = self.table.place.to(now.batch.device)
        for name, (which, *write), read in self.table.selections(node.cpu(), pairs[row.cpu()], now.places):
            values = self.replacement(name, read, place_of[node[which]])
            edits.append(Edit(name, Patch((row[which], *write), values)))
        value = self.model.run(now.batch.rows(pairs), edits=edits, metric=self.metric, start=start).metric
        assert value is not None  # a metric was given
        effects: list[float] = (value - now.metric[pairs]).tolist()
        return effects

    def means(self, results: Sequence[list[float]]) -> tuple[Float[Tensor, " node"], Float[Tensor, " node"]]:
        """Means over pairs of |effect| and of effect; interventions that were not run count as zero."""
        magnitude, signed = torch.zeros(2, len(self.table), dtype=torch.float64)
        for chunk, values in zip(self.chunks, results, strict=True):
            effects = torch.tensor(values, dtype=torch.float64)
            magnitude.index_add_(0, chunk.nodes, effects.abs())
            signed.index_add_(0, chunk.nodes, effects)
        return (magnitude / len(self.base)).to(self.dtype), (signed / len(self.base)).to(self.dtype)

    # What methods change.

    def before(self, pairs: Int[Tensor, " row"]) -> list[Edit]:  # noqa: ARG002 (the signature of those that edit)
        """What is edited in the base run of some pairs already."""
        return []

    def lowest(self, layer: int | None) -> int | None:
        """The lowest layer that an intervention at a node of `layer` touches."""
        return layer

    def members(self, nodes: Int[Tensor, " row"]) -> tuple[Int[Tensor, " member"], Int[Tensor, " member"]]:
        """The nodes that are patched together for the node of each row: (row, node)."""
        return torch.arange(len(nodes)), nodes

    def together(self, moved: Bool[Tensor, "pair node"]) -> Bool[Tensor, "pair node"]:
        """Whether any of the nodes that are patched together differs from what takes its place, from each node's own
        answer."""
        return moved

    def changed(self, name: str, here: Float[Tensor, "pair ..."]) -> Bool[Tensor, "pair place ..."]:
        """Which nodes of a site differ from what takes their place."""
        differs = self.now.source[name] != here
        return self.now.places.at(name).gather(per_node(name, differs.float())) != 0

    def replacement(self, name: str, index: Index, place: Int[Tensor, " entry"]) -> Tensor:  # noqa: ARG002
        """What takes the place of entries of a site: those of each pair at (column, feature), of these places."""
        return self.now.source[name][index]


@dataclass(frozen=True, eq=False, slots=True)
class Patch:
    """Replaces scattered entries of an activation, one node in each row, by given values."""

    index: Index
    values: Tensor

    def __call__(self, x: Tensor, _place: Place) -> Tensor:
        out = x.clone()
        out[self.index] = self.values.to(out.dtype)  # a recording may be wider than the model
        return out
