"""Exact effects of single edges: what one reader does when one writer's output reaches it from the other prompt.

1. Run both prompts of each pair; keep what every writer writes in both, and the residual stream of the base run.
2. Add the change of one writer's output to the input of one reader, before that reader's norm, and compute what the
   reader projects from it.
3. Put that in its place, run from the reader's block upward, and measure. All other readers still see the base value of
   the writer; everything downstream of the reader is recomputed.

It is the reference for estimates of edges. The effects of all edges out of a writer add up to its node effect only
where the network is linear.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechattr.engines.executors import Executor
from mechattr.engines.spread import spread
from mechattr.engines.sweep import sweep
from mechattr.errors import EmptyTaskError, SettingError
from mechattr.models.base import Batch, HookedModel, Start
from mechattr.models.edits import Edit, Place
from mechattr.models.halving import Halving
from mechattr.patching.edge_artifact import EdgeAttribution, edge_tables
from mechattr.patching.graph import Graph
from mechattr.patching.interventions import PAIRS_AT_ONCE, finite, rows_of, share_of
from mechattr.patching.places import base_and_source, check_call, chunks, direction_of, places_of
from mechattr.patching.recording import recorded
from mechattr.patching.settings import provenance_of, settings_of
from mechattr.patching.wiring import SiteReaders, Wiring
from mechattr.sites import full_name
from mechattr.tasks.task import Task


def edge_patching(
    model: HookedModel,
    task: Task,
    edges: Sequence[tuple[str, str]] | None = None,
    *,
    direction: str = "noising",
    batch_size: int | None = None,
    progress: bool | None = None,
    resume: Path | None = None,
    executor: str | Executor | None = None,
) -> EdgeAttribution:
    r"""Measures the effect of each edge by running the model with it patched.

    $$I(u, v) = L\big(x \mid \mathrm{do}(\mathrm{in}_v \leftarrow \mathrm{in}_v + \Delta_u)\big) - L(x), \qquad
    \Delta_u = \mathrm{out}_u(x') - \mathrm{out}_u(x)$$

    with $\mathrm{in}_v$ the residual stream that reader $v$ sees before its norm, at all positions, $x$ the base prompt
    (clean under noising, corrupt under denoising) and $x'$ the other.

    Args:
        model: a hooked model whose blocks add to the residual stream.
        task: prompt pairs with a metric.
        edges: (writer, reader) by name, such as `("a0.h1", "a2.h3<q>")` or what `EdgeAttribution.top(50)` returns; all
            edges by default.
        direction: `"noising"` puts corrupt writes into the clean run, `"denoising"` clean ones into the corrupt run.
        batch_size: rows of a forward pass, about 4096 tokens' worth unless given; it halves itself when memory runs
            out.
        progress: `None` shows a bar on a terminal only.
        resume: a journal; a sweep that was killed goes on from it and returns the same result.
        executor: `"ray"`, `"inprocess"` or an executor, to run the pairs block by block elsewhere; see `docs/scale.md`.

    Returns:
        `score` (mean over pairs of |effect|) and `signed` (mean effect) by source and target; NaN where an edge was not
        asked for or does not exist.

    Raises:
        UnsupportedFeatureError: a model whose heads have no writes of their own.
        UnknownNameError: no such writer, reader or direction.
        SettingError: two nodes that no edge joins, or an unusable `batch_size`.
        AlignmentError: the two prompts of a pair are padded differently.
        EmptyTaskError: no pairs or no edges.
        NonFiniteError: a run has NaN or infinity.
        OutputExistsError: the journal belongs to another sweep.
        ExecutorError: a block failed for good.

    Cost:
        2 forward passes a pair, and (L - layer)/L of one for each edge into a layer and each pair in which its writer
        changes (1/L for edges into the logits).

    References:
        Goldowsky-Dill et al. 2023, arXiv:2304.05969; Conmy et al. 2023, arXiv:2304.14997.
    """
    check_call("edge patching", model, task)
    if executor is not None:
        return spread(edge_patching, **locals())
    way = direction_of(direction)
    places_of(task, "all")  # raises where the two prompts of a pair are padded differently
    wiring = Wiring(model)
    chosen = edges_of(wiring.graph, edges)
    base, source = base_and_source(task, way)
    trials = Trials(wiring, task, base, source, chosen, rows_of(base, batch_size))
    digest = hashlib.sha256(chosen.numpy().tobytes()).hexdigest()
    results = sweep(
        trials.groups(),
        trials.compute,
        n_groups=len(trials.parts),
        key={"task": task.hash(), "direction": way, "edges": digest, "rows": trials.rows, **model.fingerprint()},
        resume=resume,
        progress=progress,
        label="exact edges",
    )
    graph = wiring.graph
    tensors = edge_tables(graph, *trials.means(results))
    settings = settings_of(
        task,
        method="edge_patching",
        direction=way,
        sites=["z", "mlp_out", "resid_pre"],
        positions="all",
        base=trials.base_metric,
        source=trials.source_metric,
        passes=(2.0 * len(task) + trials.forward, 0.0),
        trivial=~trials.ran,
        n_edges=len(chosen),
        n_layers=graph.n_layers,
        n_heads=graph.n_heads,
        n_kv_heads=graph.n_kv_heads,
        has_mlp=graph.has_mlp,
        parallel=graph.parallel,
    )
    return EdgeAttribution(tensors, settings=settings, provenance=provenance_of(model, task))


def edges_of(graph: Graph, edges: Sequence[tuple[str, str]] | None) -> Tensor:
    """Edges as (row, column) of the graph's mask, by reader and then writer, each once.

    Raises:
        EmptyTaskError: no edges.
        UnknownNameError: no such writer or reader.
        SettingError: something else than pairs of names, or nodes that no edge joins.
    """
    if edges is None:
        return graph.mask.T.nonzero().flip(1)
    edges = list(edges) if isinstance(edges, Iterable) else [edges]
    if not edges:
        raise EmptyTaskError("edge patching", "an empty list of edges", "give edges, or leave edges out")
    strange = [edge for edge in edges if not (isinstance(edge, Sequence) and len(edge) == 2)]
    if strange or isinstance(edges[0], str):
        fix = "give (writer, reader) pairs, such as attribution.top(50) or circuit.edges"
        raise SettingError("edges", repr((strange or edges)[0]), fix)
    found = torch.tensor([(graph.writer_index(u), graph.reader_index(v)) for u, v in edges])
    missing = (~graph.mask[found[:, 0], found[:, 1]]).nonzero()[:, 0].tolist()
    if missing:
        u, v = edges[missing[0]]
        raise SettingError(f"edge {u} -> {v}", "the reader comes before the writer", "name an edge of the graph")
    return torch.unique(found.flip(1), dim=0).flip(1)


@dataclass(frozen=True, eq=False, slots=True)
class _Chunk:
    """Edges into one block that run together: for each row its pair, counted within the group, and its edge."""

    layer: int
    pairs: Tensor
    edges: Tensor


@dataclass(frozen=True, eq=False, slots=True)
class _Recording:
    """One group of pairs: base prompts, their residual streams and metric, and how far each writer's output moves."""

    batch: Batch
    streams: dict[str, Tensor]
    metric: Tensor
    change: Float[Tensor, "pair writer pos d_model"]


class Trials:
    """All interventions of a sweep. A group of pairs is recorded once, and dropped when the next one is recorded."""

    def __init__(self, wiring: Wiring, task: Task, base: Batch, source: Batch, edges: Tensor, rows: int) -> None:
        self.wiring, self.model, self.task, self.edges, self.rows = wiring, wiring.model, task, edges, rows
        self.base, self.source = base, source
        self.halving = Halving(rows)
        self.parts = chunks(len(base), min(rows, PAIRS_AT_ONCE, wiring.rows(base.tokens.shape[1])))
        layers = torch.zeros(len(wiring.graph.readers), dtype=torch.long)
        for readers in wiring.readers:
            layers[readers.columns] = readers.layer
        self.layer = layers[edges[:, 1]]
        self.ran = torch.zeros(len(edges), dtype=torch.bool)
        self.chunks: list[_Chunk] = []
        self.base_metric: list[float] = []
        self.source_metric: list[float] = []
        self.forward = 0.0
        self.dtype = torch.float32

    def groups(self) -> Iterator[list[_Chunk]]:
        """Every intervention that can change something, in a fixed order; records each group of pairs on the way."""
        for pairs in self.parts:
            moved = self._record(pairs)[:, self.edges[:, 0]]
            self.ran |= moved.any(0)
            group = []
            for layer in self.layer.unique().tolist():
                here = (self.layer == layer).nonzero()[:, 0]
                which, pair = moved[:, here].T.nonzero(as_tuple=True)  # rows of one reader stay together
                index = zip(pair.split(self.rows), here[which].split(self.rows), strict=True)
                group += [_Chunk(layer, rows, edges) for rows, edges in index]
            self.forward += sum(share_of(chunk.layer, self.model.info.n_layers) * len(chunk.pairs) for chunk in group)
            self.chunks += group
            yield group
            del self.now  # one group is let go before the next one is recorded

    def _record(self, pairs: range) -> Bool[Tensor, "pair writer"]:
        """Runs a group of pairs; says which writers' outputs differ between the two prompts."""
        writes = self.wiring.graph.written
        streams = list(dict.fromkeys(readers.stream for readers in self.wiring.readers))
        starts = [full_name("resid_pre", layer) for layer in range(self.model.info.n_layers)]
        batch, names = self.base.rows(pairs), [*writes, *streams, *starts]
        found, metric = recorded(self.model, batch, names, self.task.metric)
        there, source_metric = recorded(self.model, self.source.rows(pairs), writes, self.task.metric)
        assert metric is not None and source_metric is not None  # one was given
        moved, change = [], []
        for name in writes:
            gap = there[name] - found[name]
            each = gap if gap.ndim == 4 else gap[:, :, None]
            moved.append(((each != 0).any(-1) & batch.mask[..., None]).any(1))
            change.append(self.wiring.outputs(name, gap))
        kept = {name: found[name] for name in (*streams, *starts)}
        self.now = _Recording(batch, kept, metric, torch.cat(change, 1))
        self.base_metric += metric.tolist()
        self.source_metric += source_metric.tolist()
        self.dtype = torch.promote_types(metric.dtype, torch.float32)
        return torch.cat(moved, 1).cpu()

    def compute(self, chunk: _Chunk) -> list[float]:
        """The effects of one chunk of the group that was recorded last."""
        effects = self.halving(range(len(chunk.pairs)), lambda part: self._run(chunk, torch.tensor(part)))
        return finite(effects, lambda i: f"the effect of edge {self._name(int(chunk.edges[i]))}")

    def _name(self, edge: int) -> str:
        (writer, reader), graph = self.edges[edge].tolist(), self.wiring.graph
        return f"{graph.writers[writer]} -> {graph.readers[reader]}"

    def _run(self, chunk: _Chunk, part: Tensor) -> list[float]:
        now, pairs = self.now, chunk.pairs[part]
        writer, reader = self.edges[chunk.edges[part]].unbind(1)
        start = Start(chunk.layer, now.streams[full_name("resid_pre", chunk.layer)][pairs])
        edits = []
        for readers in self.wiring.readers:
            columns = readers.columns
            rows = ((reader >= columns.start) & (reader < columns.stop)).nonzero()[:, 0]
            if readers.layer != chunk.layer or not len(rows):
                continue
            inputs = now.streams[readers.stream][pairs[rows]] + now.change[pairs[rows], writer[rows]]
            edits.append(Edit(readers.site, _Give(self.wiring, readers, rows, reader[rows] - columns.start, inputs)))
        value = self.model.run(now.batch.rows(pairs), edits=edits, metric=self.task.metric, start=start).metric
        assert value is not None  # a metric was given
        effects: list[float] = (value - now.metric[pairs]).tolist()
        return effects

    def means(self, results: Sequence[list[float]]) -> list[Float[Tensor, "writer reader"]]:
        """Means over pairs of |effect| and of effect, NaN where not asked; what was not run counts as zero."""
        magnitude, signed = torch.zeros(2, len(self.edges), dtype=torch.float64)
        for chunk, values in zip(self.chunks, results, strict=True):
            effects = torch.tensor(values, dtype=torch.float64)
            magnitude.index_add_(0, chunk.edges, effects.abs())
            signed.index_add_(0, chunk.edges, effects)
        found = torch.full((2, *self.wiring.graph.mask.shape), float("nan"), dtype=self.dtype)
        found[:, self.edges[:, 0], self.edges[:, 1]] = (torch.stack([magnitude, signed]) / len(self.base)).to(
            self.dtype
        )
        return list(found)


@dataclass(frozen=True, eq=False, slots=True)
class _Give:
    """Gives one reader in each of some rows another input."""

    wiring: Wiring
    readers: SiteReaders
    rows: Tensor
    which: Tensor
    inputs: Float[Tensor, "row pos d_model"]

    def __call__(self, x: Tensor, _place: Place) -> Tensor:
        out = x.clone()
        for i in self.which.unique().tolist():
            mine = self.which == i
            value = self.wiring.project(self.readers, self.inputs[mine][:, None], i)
            if x.ndim == 4:
                out[self.rows[mine], :, i] = value
            else:
                out[self.rows[mine]] = value
        return out
