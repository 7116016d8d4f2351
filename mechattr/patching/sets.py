"""Patches of several nodes at once: each row of a batch replaces its own set of nodes.

Subsampling, its bound on missed effects, blocks, hierarchical search and circuits all measure sets of nodes. Both
prompts of every pair are run once; then each row takes the base prompt of its pair and replaces its nodes by their
values on the other prompt. A batch starts at the lowest block that one of its sets touches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechattr.artifact import Cache
from mechattr.models.base import HookedModel, ModelInfo, Start
from mechattr.models.edits import Edit, Place
from mechattr.models.halving import Halving
from mechattr.patching.interventions import PAIRS_AT_ONCE, rows_of
from mechattr.patching.nodes import NONE, NodeTable
from mechattr.patching.places import (
    Direction,
    Places,
    Positions,
    base_and_source,
    check_call,
    chunks,
    feature_of,
    per_node,
    places_of,
)
from mechattr.patching.recording import recorded
from mechattr.patching.source import Source, source_of
from mechattr.sites import SITES, full_name, parse
from mechattr.tasks.task import Task

GRADIENTS_AT_ONCE = 16  # pairs whose graph is kept at a time


class Sets:
    r"""Effects of sets of nodes.

    $$I(S) = L\big(x \mid \mathrm{do}(n \leftarrow n(x')\ \forall n \in S)\big) - L(x)$$

    with $x$ the base prompt and $x'$ the other. Each node takes its value on $x'$, whatever the set does upstream of
    it.

    Args:
        model: a hooked model.
        task: prompt pairs with a metric.
        table: the nodes.
        mode: what their positions mean.
        direction: noising (base: clean) or denoising (base: corrupt).
        source: activations of $x'$ for all pairs, recorded earlier, instead of a run of those prompts.
        batch_size: rows of a forward pass, about 4096 tokens' worth unless given; it halves itself when memory runs
            out.

    Attributes:
        base_metric: L(x), by pair.
        source_metric: L(x'), by pair; `None` where the source was recorded earlier.
        moved: whether the two prompts give a node different activations; patching any other node changes nothing.
        forward: forward passes spent on the prompts themselves, in prompt rows.
        rows: rows of a forward pass.

    Raises:
        EmptyTaskError: no pairs.
        AlignmentError: positions that are not comparable across the pairs.
        MismatchError: `source` does not belong to this model and task, or lacks a site.
        SettingError: an unusable `batch_size`.

    Cost:
        2 forward passes a pair (1 with `source`). Memory: the source activations of the nodes' sites and the residual
        stream of the base run before each of their blocks, for all pairs.
    """

    base_metric: Float[Tensor, " pair"]
    source_metric: Float[Tensor, " pair"] | None
    moved: Bool[Tensor, "pair node"]

    def __init__(
        self,
        model: HookedModel,
        task: Task,
        table: NodeTable,
        mode: Positions,
        direction: Direction,
        *,
        source: Cache | None = None,
        batch_size: int | None = None,
    ) -> None:
        check_call("patching", model, task)
        base, other = base_and_source(task, direction)
        there = source_of(model, other, task.metric, table.names, source)
        self.model, self.table, self.task_metric = model, table, task.metric
        self.base, self.places = base, places_of(task, mode)
        self.rows = rows_of(base, batch_size)
        self.forward, self.digest = len(task) * (1 + there.forward), there.digest
        self._halving = Halving(self.rows)
        self._grids = [_Grid.of(table, i, self.places, model.info) for i in range(len(table.names))]

        self._stream_names = [full_name("resid_pre", layer) for layer in table.layers if layer is not None]
        parts = [self._record(there, pairs) for pairs in chunks(len(task), min(self.rows, PAIRS_AT_ONCE))]
        self.base_metric = torch.cat([part.metric for part in parts])
        self.moved = torch.cat([part.moved for part in parts])
        theirs = [part.source_metric for part in parts if part.source_metric is not None]
        self.source_metric = torch.cat(theirs) if theirs else None
        # site by site, so that parts and whole are in memory together for one site only
        self._stream = {name: torch.cat([part.stream.pop(name) for part in parts]) for name in self._stream_names}
        self._source = {
            name: torch.cat([part.source.pop(name) for part in parts]) for name in dict.fromkeys(table.names)
        }

    def _record(self, there: Source, pairs: Sequence[int]) -> _Part:
        """Runs both prompts of some pairs."""
        names = self.table.names
        found, metric = recorded(self.model, self.base.rows(pairs), [*self._stream_names, *names], self.task_metric)
        values, source_metric = there.rows(pairs)
        assert metric is not None  # one was given
        moved = moved_nodes(self.table, self.places.rows(pairs), found, values)
        stream = {name: found[name] for name in self._stream_names}
        return _Part(metric, source_metric, moved, stream, {name: values[name] for name in names})

    def effects(self, pairs: Int[Tensor, " row"], chosen: Bool[Tensor, "row node"]) -> Float[Tensor, " row"]:
        """Metric of each row's patched run minus that of its base run, in float64; exactly 0 where nothing differs.

        Args:
            pairs: the pair of each row.
            chosen: the nodes that each row replaces.

        Cost:
            At most 1 forward pass a row: none for a row whose nodes are the same on both prompts, and (L - layer)/L
            where no set of its batch reaches below `layer`.
        """
        found = torch.zeros(len(pairs), dtype=torch.float64)
        live = self.moved[pairs].logical_and_(chosen)
        layer = torch.full((len(pairs),), self.model.info.n_layers)
        for at in sorted(set(self.table.layer.tolist()), reverse=True):
            layer[live[:, self.table.layer == at].any(1)] = at
        order = layer.argsort(stable=True)  # rows that may start high run together
        order = order[live[order].any(1)]
        if len(order):
            at_once = self._halving(range(len(order)), lambda part: self._run(pairs, live, layer, order[list(part)]))
            found[order] = torch.tensor(at_once, dtype=torch.float64)
        return found

    def estimates(self) -> Float[Tensor, "pair node"]:
        """First-order estimate of each node's effect alone: its change times the gradient of the base run's metric.

        Cost:
            1 forward and 1 backward pass a pair.
        """
        found = torch.zeros(self.moved.shape, dtype=torch.float64)
        grids = dict(zip(self.table.names, self._grids, strict=True))

        def some(pairs: Sequence[int]) -> list[None]:
            index = torch.tensor(pairs)
            places = self.places.rows(pairs)

            def visit(name: str, x: Tensor, gradient: Tensor) -> None:
                wide = torch.promote_types(x.dtype, torch.float32)
                change = self._source[name][index.to(x.device)].to(wide) - x.to(wide)
                products = places.gather(per_node(name, change * gradient.to(wide))).flatten(1)
                found[index[:, None], grids[name].nodes] = products[:, grids[name].flat.to(x.device)].cpu().double()

            self.model.run(self.base.rows(pairs), gradients=self.table.names, metric=self.task_metric, visit=visit)
            return [None] * len(pairs)

        Halving(min(self.rows, GRADIENTS_AT_ONCE))(range(len(self.base)), some)
        return found

    def _run(self, pairs: Tensor, live: Tensor, layer: Tensor, rows: Tensor) -> list[float]:
        pairs, live, layer = pairs[rows], live[rows], layer[rows]
        there = pairs.to(self.base.device)
        first = int(layer.min())
        start = None if first == NONE else Start(first, self._stream[full_name("resid_pre", first)][there])
        edits = []
        for name, grid in zip(self.table.names, self._grids, strict=True):
            mask = grid.mask(self.places, pairs, live)
            if mask is not None:
                edits.append(Edit(name, _Replace(mask, self._source[name][there])))
        run = self.model.run(self.base.rows(pairs), edits=edits, metric=self.task_metric, start=start)
        assert run.metric is not None  # a metric was given
        effects: list[float] = (run.metric - self.base_metric[there]).tolist()
        return effects


def moved_nodes(
    table: NodeTable, places: Places, here: Mapping[str, Tensor], there: Mapping[str, Tensor]
) -> Bool[Tensor, "pair node"]:
    """Which nodes' activations differ between two runs."""
    changed = {name: places.gather(per_node(name, (there[name] != here[name]).float())) != 0 for name in table.names}
    return table.lookup(changed, len(places.where))


class _Part(NamedTuple):
    """What is kept of some pairs: metrics, which nodes differ, the base run's stream and the other run's nodes."""

    metric: Tensor
    source_metric: Tensor | None
    moved: Tensor
    stream: dict[str, Tensor]
    source: dict[str, Tensor]


class _Grid(NamedTuple):
    """The nodes of one site: how a row of chosen nodes becomes a mask over the site's activation.

    Attributes:
        nodes: their indices in the table.
        flat: their entries in the grid [place, feature].
        shape: number of places and of features.
        axes: the axes of the activation.
    """

    nodes: Tensor
    flat: Tensor
    shape: tuple[int, int]
    axes: tuple[str, ...]

    @classmethod
    def of(cls, table: NodeTable, name: int, places: Places, info: ModelInfo) -> _Grid:
        """The grid of the site `table.names[name]`."""
        nodes = (table.name == name).nonzero()[:, 0]
        short = parse(table.names[name])[0]
        feature = feature_of(short)
        features = 1 if feature is None else info.sizes_at(short)[feature]
        flat = table.place[nodes] * features + table.feature[nodes].clamp_min(0)
        return cls(nodes, flat, (places.where.shape[1], features), SITES[short].axes)

    def mask(self, places: Places, pairs: Tensor, chosen: Tensor) -> Tensor | None:
        """Where rows replace the activation, broadcasting over what is inside a node; `None` where no row does."""
        mine = chosen[:, self.nodes]
        if not bool(mine.any()):
            return None
        grid = torch.zeros(len(pairs), self.shape[0] * self.shape[1], dtype=torch.bool)
        grid[:, self.flat] = mine
        mask = grid.view(-1, *self.shape).to(places.where.device)  # [row, place, feature]
        if not places.identity:
            where = places.where[pairs.to(places.where.device)]
            mask = torch.einsum("rpc,rpf->rcf", where.float(), mask.float()) > 0
        if "query" in self.axes:  # a node is one query row of a head's pattern
            mask = mask.transpose(1, 2)
        return mask[..., 0] if len(self.axes) == 2 else mask[..., None] if len(self.axes) == 4 else mask


@dataclass(frozen=True, eq=False, slots=True)
class _Replace:
    """Takes the source's values where a mask says so."""

    mask: Tensor
    values: Tensor

    def __call__(self, x: Tensor, _place: Place) -> Tensor:
        return torch.where(self.mask, self.values.to(x.dtype), x)  # a recording may be wider than the model
