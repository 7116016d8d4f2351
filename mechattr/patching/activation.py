"""Exact activation patching: replace one node, recompute everything downstream, measure.

1. Run both prompts of each pair; keep the residual stream before each block of the base run and the nodes' activations
   of the source run.
2. For each layer, put one intervention in each row of a batch and run from that layer's residual stream upward; the blocks
   below cannot change. Nodes whose activation is the same on both prompts are not run: their effect is exactly zero.
3. effect = metric(intervened) - metric(base), pair by pair; absolute values are taken before averaging.

It is the reference for every estimate. An effect says what this one node does with all others in place; effects of
several nodes do not add up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mechattr.artifact import Attribution
from mechattr.engines.sweep import halving, sweep
from mechattr.errors import EmptyTaskError
from mechattr.models.base import Batch, HookedModel, Start
from mechattr.models.edits import Edit, Place
from mechattr.patching.nodes import NodeTable, every_node, table_of
from mechattr.patching.places import (
    DEFAULT_SITES,
    Places,
    Positions,
    base_and_source,
    chunks,
    direction_of,
    node_sites,
    per_node,
    places_of,
)
from mechattr.patching.settings import provenance_of, settings_of
from mechattr.sites import Node, full_name
from mechattr.tasks.task import Task

TOKENS_AT_ONCE = 4096  # rows of a forward pass are chosen so that it has about this many tokens


def activation_patching(
    model: HookedModel,
    task: Task,
    *,
    sites: str | Sequence[str] = DEFAULT_SITES,
    nodes: Sequence[Node] | None = None,
    direction: str = "noising",
    positions: Positions | None = None,
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
        direction: `"noising"` puts corrupt activations into the clean run, `"denoising"` clean ones into the corrupt run.
        positions: `"aligned"` (each position, the default), `"named"` (spans) or `"all"` (merged).
        batch_size: rows of a forward pass; it halves itself when memory runs out.
        progress: `None` shows a bar on a terminal only.
        resume: a journal; a sweep that was killed goes on from it and returns the same result.

    Returns:
        `scores[site]` and `signed[site]` as `attribution_patching` returns them; NaN where a node was not asked for.

    Raises:
        UnknownSiteError: a site that this model does not have.
        SettingError: a node that does not exist, or nodes whose positions mean different things.
        AlignmentError: positions that are not comparable across the pairs.
        OutputExistsError: the journal belongs to another sweep.

    Cost:
        2 forward passes a pair, and (L - layer)/L of one for each node of each pair whose activation differs.

    References:
        Vig et al. 2020, Causal Mediation Analysis; Kramár et al. 2024, arXiv:2403.00745, equation 1.
    """
    if not len(task):
        raise EmptyTaskError("activation patching", "a task without pairs", "give at least one pair")
    way = direction_of(direction)
    if nodes is not None:
        table, mode = table_of(model, task, nodes)
    else:
        mode = positions or "aligned"
        table = every_node(model, node_sites(model, sites), places_of(task, mode))
    places = places_of(task, mode)
    model_task = _Sweep(model, task, way, table, places)
    rows = batch_size or max(8, TOKENS_AT_ONCE // task.clean.tokens.shape[1])
    work = model_task.work(rows)
    key = {"task": task.hash(), "direction": way, "nodes": table.hash(), "rows": rows, **model.fingerprint()}
    results = sweep(work, model_task.compute, key=key, resume=resume, progress=progress, label="exact patching")
    magnitude, signed, clean, corrupt = model_task.collect(work, results)
    passes = 2.0 * len(task) + sum(c.share * len(c.nodes) for c in work)
    settings = settings_of(
        task,
        method="activation_patching",
        direction=way,
        sites=table.sites,
        positions=mode,
        clean=clean,
        corrupt=corrupt,
        passes=(passes, 0.0),
        trivial=int(((magnitude == 0) & ~model_task.ran).sum()),
        n_nodes=len(table),
    )
    return Attribution(table.labelled(magnitude, signed), settings=settings, provenance=provenance_of(model, task))


@dataclass(frozen=True, eq=False, slots=True)
class _Chunk:
    """Interventions that run together: all of one block (or of the embeddings), of one group of pairs."""

    group: int
    layer: int | None
    pairs: Tensor
    nodes: Tensor
    share: float


class _Sweep:
    """One sweep's recordings and interventions. Groups of pairs are recorded once and dropped when the next one begins."""

    def __init__(self, model: HookedModel, task: Task, way: Any, table: NodeTable, places: Places) -> None:
        self.model, self.task, self.table = model, task, table
        self.base, self.source = base_and_source(task, way)
        self.way, self.places = way, places
        self.ran = torch.zeros(len(table), dtype=torch.bool)
        self.base_metric, self.source_metric = torch.zeros(0), torch.zeros(0)
        self.loaded: int | None = None
        self.groups: list[range] = []

    def work(self, rows: int) -> list[_Chunk]:
        """Every intervention that can change something, in a fixed order."""
        n_layers = self.model.info.n_layers
        self.groups = chunks(len(self.task), max(1, rows))
        found: list[_Chunk] = []
        base_metric, source_metric = [], []
        for group in range(len(self.groups)):
            self._load(group)
            base_metric.append(self.metrics[0])
            source_metric.append(self.metrics[1])
            moved = self._moved()
            self.ran |= moved.any(0)
            for layer in self.table.layers:
                here = self.table.of_layer(layer)
                pairs, which = moved[:, here].nonzero(as_tuple=True)
                share = 1.0 if layer is None else (n_layers - layer) / n_layers
                for part in chunks(len(pairs), rows):
                    index = slice(part.start, part.stop)
                    found.append(_Chunk(group, layer, pairs[index], here[which[index]], share))
        self.base_metric, self.source_metric = torch.cat(base_metric), torch.cat(source_metric)
        return found

    def _load(self, group: int) -> None:
        if self.loaded == group:
            return
        pairs = self.groups[group]
        base, source = self.base.rows(pairs), self.source.rows(pairs)
        names = self.table.names
        stream = [full_name("resid_pre", layer) for layer in self.table.layers if layer is not None]
        here = self.model.run(base, record=[*dict.fromkeys([*stream, *names])], metric=self.task.metric)
        there = self.model.run(source, record=names, metric=self.task.metric)
        self.stream = {name: here.activations[name].values for name in stream}
        self.here = {name: here.activations[name].values for name in names}
        self.there = {name: there.activations[name].values for name in names}
        assert here.metric is not None and there.metric is not None
        self.metrics = (here.metric, there.metric)
        self.batch, self.where = base, self.places.rows(pairs)
        self.loaded = group

    def _moved(self) -> Tensor:
        """[pair, node]: whether the node's activation differs between the two prompts."""
        changed = {}
        for name in self.table.names:
            differs = per_node(name, (self.there[name] != self.here[name]).float())
            changed[name] = self.where.gather(differs) != 0
        return self.table.lookup(changed, len(self.batch))

    def compute(self, chunk: _Chunk) -> list[float]:
        """The effects of one chunk's interventions."""
        self._load(chunk.group)
        return halving(list(range(len(chunk.nodes))), lambda part: self._run(chunk, torch.tensor(part)))

    def _run(self, chunk: _Chunk, part: Tensor) -> list[float]:
        pairs, nodes = chunk.pairs[part], chunk.nodes[part]
        batch: Batch = self.batch.rows(pairs)
        start = None
        if chunk.layer is not None:
            start = Start(chunk.layer, self.stream[full_name("resid_pre", chunk.layer)][pairs])
        edits = [
            Edit(name, _Patch(index, self.there[name][source]))
            for name, index, source in self.table.selections(nodes, pairs, self.where)
        ]
        value = self.model.run(batch, edits=edits, metric=self.task.metric, start=start).metric
        assert value is not None
        return (value - self.metrics[0][pairs]).double().tolist()

    def collect(self, work: Sequence[_Chunk], results: Sequence[list[float]]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Means over pairs of |effect| and effect by node, and the metric on clean and corrupt prompts."""
        magnitude, signed = torch.zeros(len(self.table)).double(), torch.zeros(len(self.table)).double()
        for chunk, values in zip(work, results, strict=True):
            effects = torch.tensor(values, dtype=torch.float64)
            magnitude.index_add_(0, chunk.nodes, effects.abs())
            signed.index_add_(0, chunk.nodes, effects)
        n = len(self.task)
        first, second = (
            (self.base_metric, self.source_metric) if self.way == "noising" else (self.source_metric, self.base_metric)
        )
        dtype = torch.promote_types(self.base_metric.dtype, torch.float32)
        return (magnitude / n).to(dtype), (signed / n).to(dtype), first, second


@dataclass(frozen=True, eq=False, slots=True)
class _Patch:
    """Replaces scattered entries of an activation, one node in each row, by given values."""

    index: tuple[Tensor, ...]
    values: Tensor

    def __call__(self, x: Tensor, place: Place) -> Tensor:
        out = x.clone()
        out[self.index] = self.values
        return out
