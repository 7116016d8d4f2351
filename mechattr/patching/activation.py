"""Exact activation patching: replace one node, recompute everything downstream, measure.

1. Run both prompts of each pair; keep the residual stream before each block of the base run and the nodes' activations
   of the source run.
2. For each layer, put one intervention in each row of a batch and run from that layer's residual stream upward; the
   blocks below cannot change. Nodes whose activation is the same on both prompts are not run: their effect is exactly
   zero.
3. effect = metric(intervened) - metric(base), pair by pair; absolute values are taken before averaging.

It is the reference for every estimate. An effect says what this one node does with all others in place; effects of
several nodes do not add up.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechattr.artifact import Attribution, Cache
from mechattr.engines.halving import Halving
from mechattr.engines.sweep import sweep
from mechattr.errors import EmptyTaskError
from mechattr.models.base import Batch, HookedModel, Metric, Start
from mechattr.models.edits import Edit, Place
from mechattr.patching.nodes import NodeTable, every_node, table_of
from mechattr.patching.places import (
    DEFAULT_SITES,
    Places,
    Positions,
    base_and_source,
    chunks,
    direction_of,
    mode_of,
    node_sites,
    per_node,
    places_of,
    rows_at_once,
)
from mechattr.patching.settings import provenance_of, settings_of
from mechattr.patching.source import Source, source_of
from mechattr.sites import Node, full_name
from mechattr.tasks.task import Task

TOKENS_AT_ONCE = 4096  # rows of a forward pass are chosen so that it has about this many tokens
PAIRS_AT_ONCE = 64  # at most so many pairs are recorded at a time


def activation_patching(
    model: HookedModel,
    task: Task,
    *,
    sites: str | Sequence[str] = DEFAULT_SITES,
    nodes: Sequence[Node] | None = None,
    direction: str = "noising",
    positions: Positions | None = None,
    source: Cache | None = None,
    batch_size: int | None = None,
    progress: bool | None = None,
    resume: Path | None = None,
) -> Attribution:
    r"""Measures the effect of replacing each node by its value on the other prompt.

    $$I(n) = L\big(x \mid \mathrm{do}(n \leftarrow n(x'))\big) - L(x), \qquad
    \text{score}(n) = \mathbb E_{\text{pairs}} |I(n)|, \quad \text{signed}(n) = \mathbb E_{\text{pairs}} I(n)$$

    with $x$ the base prompt (clean under noising, corrupt under denoising) and $x'$ the other.

    Args:
        model: a hooked model.
        task: prompt pairs with a metric.
        sites: short names; every node of these sites is measured.
        nodes: measure these nodes only, such as `attribution.top(50)`; `sites` and `positions` then follow from them.
        direction: `"noising"` puts corrupt activations into the clean run, `"denoising"` clean ones into the corrupt
            run.
        positions: `"aligned"` (each position), `"named"` (spans) or `"all"` (merged); by default each position where
            the pairs align, else the spans that the task names in every pair.
        source: activations of $x'$ for all pairs, recorded earlier, instead of a run of those prompts. Their metric is
            then not measured: `clean_metric` or `corrupt_metric` is `None`.
        batch_size: rows of a forward pass, about 4096 tokens' worth unless given; it halves itself when memory runs
            out.
        progress: `None` shows a bar on a terminal only.
        resume: a journal; a sweep that was killed goes on from it and returns the same result.

    Returns:
        `scores[site]` and `signed[site]` as `attribution_patching` returns them; NaN where a node was not asked for.

    Raises:
        UnknownSiteError: a site that this model does not have.
        UnknownNameError: no such direction or kind of positions.
        SettingError: a node that does not exist, nodes whose positions mean different things, or an unusable
            `batch_size`.
        AlignmentError: positions that are not comparable across the pairs.
        EmptyTaskError: no pairs or no nodes.
        MismatchError: `source` does not belong to this model and task, or lacks a site.
        OutputExistsError: the journal belongs to another sweep.

    Cost:
        2 forward passes a pair (1 with `source`), and (L - layer)/L of one for each node of each pair whose activation
        differs; a whole one at sites outside the blocks.

    References:
        Vig et al. 2020, Causal Mediation Analysis; Kramár et al. 2024, arXiv:2403.00745, equation 1.
    """
    if not len(task):
        raise EmptyTaskError("activation patching", "a task without pairs", "give at least one pair")
    way = direction_of(direction)
    if nodes is not None:
        table, mode = table_of(model, task, nodes, positions)
    else:
        mode = mode_of(task, positions)
        table = every_node(model, node_sites(model, sites), places_of(task, mode))
    base, other = base_and_source(task, way)
    there = source_of(model, other, task.metric, table.names, source)
    rows = rows_of(base, batch_size)
    run = _Interventions(model, base, task.metric, there, table, places_of(task, mode), rows)
    key = {"task": task.hash(), "direction": way, "nodes": table.hash(), "rows": rows, "source": there.digest}
    results = sweep(
        run.groups(),
        run.compute,
        n_groups=len(run.parts),
        key={**key, **model.fingerprint()},
        resume=resume,
        progress=progress,
        label="exact patching",
    )
    magnitude, signed = run.means(results)
    forward = len(task) * (1 + there.forward) + sum(chunk.share * len(chunk.nodes) for chunk in run.chunks)
    settings = settings_of(
        task,
        method="activation_patching",
        direction=way,
        sites=table.sites,
        positions=mode,
        base=run.base_metric,
        source=run.source_metric or None,
        source_sha256=there.digest,
        passes=(float(forward), 0.0),
        trivial=int((~run.ran).sum()),
        n_nodes=len(table),
    )
    return Attribution(table.labelled(magnitude, signed), settings=settings, provenance=provenance_of(model, task))


def rows_of(base: Batch, batch_size: int | None) -> int:
    """Rows of one forward pass."""
    return rows_at_once(batch_size, max(8, TOKENS_AT_ONCE // base.tokens.shape[1]))


def share_of(layer: int | None, n_layers: int) -> float:
    """The part of a forward pass that an intervention at a layer takes; outside the blocks it takes a whole one."""
    return 1.0 if layer is None else (n_layers - layer) / n_layers


@dataclass(frozen=True, eq=False, slots=True)
class _Chunk:
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
class _Recording:
    """One group of pairs: its base prompts, residual stream and metric, and the source activations."""

    batch: Batch
    places: Places
    stream: dict[str, Tensor]
    metric: Tensor
    source: dict[str, Tensor]


class _Interventions:
    """All interventions of a sweep. A group of pairs is recorded once, and dropped when the next one is recorded."""

    def __init__(
        self,
        model: HookedModel,
        base: Batch,
        metric: Metric,
        there: Source,
        table: NodeTable,
        places: Places,
        rows: int,
    ) -> None:
        self.model, self.base, self.metric, self.there = model, base, metric, there
        self.table, self.places, self.rows = table, places, rows
        self.halving = Halving(rows)
        self.parts = chunks(len(base), min(rows, PAIRS_AT_ONCE))
        self.chunks: list[_Chunk] = []
        self.ran = torch.zeros(len(table), dtype=torch.bool)
        self.base_metric: list[float] = []
        self.source_metric: list[float] = []
        self.dtype = torch.float32

    def groups(self) -> Iterator[list[_Chunk]]:
        """Every intervention that can change something, in a fixed order; records each group of pairs on the way."""
        n_layers = self.model.info.n_layers
        for pairs in self.parts:
            moved = self._record(pairs)
            self.ran |= moved.any(0)
            group = []
            for layer in self.table.layers:
                here = self.table.of_layer(layer)
                pair, which = moved[:, here].nonzero(as_tuple=True)
                share = share_of(layer, n_layers)
                for part in chunks(len(pair), self.rows):
                    index = slice(part.start, part.stop)
                    group.append(_Chunk(layer, pair[index], here[which[index]], share))
            self.chunks += group
            yield group
            del self.now  # one group is let go before the next one is recorded

    def _record(self, pairs: Sequence[int]) -> Bool[Tensor, "pair node"]:
        """Runs a group of pairs; says which nodes' activations differ between the two prompts."""
        batch, places, names = self.base.rows(pairs), self.places.rows(pairs), self.table.names
        stream = [full_name("resid_pre", layer) for layer in self.table.layers if layer is not None]
        here = self.model.run(batch, record=[*stream, *names], metric=self.metric)
        there, source_metric = self.there.rows(pairs)
        assert here.metric is not None  # a metric was given
        kept = {name: here.activations[name].values for name in stream}
        self.now = _Recording(batch, places, kept, here.metric, there)
        self.base_metric += here.metric.tolist()
        self.source_metric += [] if source_metric is None else source_metric.tolist()
        self.dtype = torch.promote_types(here.metric.dtype, torch.float32)
        changed = {}
        for name in names:
            differs = there[name] != here.activations[name].values
            changed[name] = places.gather(per_node(name, differs.float())) != 0
        return self.table.lookup(changed, len(batch))

    def compute(self, chunk: _Chunk) -> list[float]:
        """The effects of one chunk of the group that was recorded last."""
        return self.halving(range(len(chunk.nodes)), lambda part: self._run(chunk, torch.tensor(part)))

    def _run(self, chunk: _Chunk, part: Tensor) -> list[float]:
        now, pairs, nodes = self.now, chunk.pairs[part], chunk.nodes[part]
        start = None
        if chunk.layer is not None:
            start = Start(chunk.layer, now.stream[full_name("resid_pre", chunk.layer)][pairs])
        edits = [
            Edit(name, _Patch(index, now.source[name][source]))
            for name, index, source in self.table.selections(nodes, pairs, now.places)
        ]
        value = self.model.run(now.batch.rows(pairs), edits=edits, metric=self.metric, start=start).metric
        assert value is not None  # a metric was given
        effects: list[float] = (value - now.metric[pairs]).double().tolist()
        return effects

    def means(self, results: Sequence[list[float]]) -> tuple[Float[Tensor, " node"], Float[Tensor, " node"]]:
        """Means over pairs of |effect| and of effect; interventions that were not run count as zero."""
        magnitude, signed = torch.zeros(2, len(self.table), dtype=torch.float64)
        for chunk, values in zip(self.chunks, results, strict=True):
            effects = torch.tensor(values, dtype=torch.float64)
            magnitude.index_add_(0, chunk.nodes, effects.abs())
            signed.index_add_(0, chunk.nodes, effects)
        return (magnitude / len(self.base)).to(self.dtype), (signed / len(self.base)).to(self.dtype)


@dataclass(frozen=True, eq=False, slots=True)
class _Patch:
    """Replaces scattered entries of an activation, one node in each row, by given values."""

    index: tuple[Tensor, ...]
    values: Tensor

    def __call__(self, x: Tensor, _place: Place) -> Tensor:
        out = x.clone()
        out[self.index] = self.values.to(out.dtype)  # a recording may be wider than the model
        return out
