"""Path patching: what one writer does through chosen readers only.

1. Run both prompts of each pair; keep the base run's heads (and MLPs, where they are frozen).
2. Run the base prompt with the sender as on the other prompt and every other head frozen at its base value; keep what
   the receivers hold.
3. Run the base prompt again with the receivers holding that, everything else free, and measure.

So the receivers see the sender's change directly or through MLPs, never through other heads; what they then do reaches
the output on every path.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Bool
from torch import Tensor

from mechattr.artifact import Attribution
from mechattr.engines.executors import Executor
from mechattr.engines.spread import spread
from mechattr.engines.sweep import sweep
from mechattr.errors import EmptyTaskError, SettingError, UnknownNameError, nearest
from mechattr.models.base import Batch, HookedModel, Metric, Start
from mechattr.models.edits import Edit, Place
from mechattr.patching.interventions import Chunk, Interventions, Patch, Recording, rows_of, share_of
from mechattr.patching.nodes import NodeTable, every_node, table_of
from mechattr.patching.places import Direction, Places, Positions, base_and_source, check_call, direction_of, places_of
from mechattr.patching.recording import recorded
from mechattr.patching.settings import provenance_of, settings_of
from mechattr.patching.source import Source, shape_of, source_of
from mechattr.sites import Node, full_name, parse
from mechattr.tasks.task import Task

SENDERS = ("z", "mlp_out")
MLPS = ("recomputed", "frozen")


def path_patching(
    model: HookedModel,
    task: Task,
    receivers: Sequence[Node],
    *,
    senders: Sequence[Node] | None = None,
    mlps: Literal["recomputed", "frozen"] = "recomputed",
    direction: str = "noising",
    positions: Positions | None = None,
    batch_size: int | None = None,
    progress: bool | None = None,
    resume: Path | None = None,
    executor: str | Executor | None = None,
) -> Attribution:
    r"""Measures the effect of each sender on the metric through the receivers only.

    $$I(s \to R) = L\big(x \mid \mathrm{do}(R \leftarrow \tilde R)\big) - L(x), \qquad
    \tilde R = R\big(x \mid \mathrm{do}(s \leftarrow s(x'),\ h \leftarrow h(x)\ \text{for all heads}\ h \ne s)\big)$$

    with $x$ the base prompt (clean under noising, corrupt under denoising) and $x'$ the other. With the last
    `resid_post` as receiver and frozen MLPs it is the sender's direct effect on the logits.

    Args:
        model: a hooked model.
        task: prompt pairs with a metric.
        receivers: nodes that are patched together, such as `Node("q", 9, head=6)`, or
            `Node("resid_post", model.info.n_layers - 1)` for the logits. One without a position stands for its values
            at all positions. `z` of a head is what its changed queries, keys and values give before heads are frozen.
        senders: heads (`z`) and MLPs (`mlp_out`) whose effects are measured, one by one; all of them by default.
        mlps: `"recomputed"` lets MLPs between sender and receivers carry the change on, `"frozen"` holds them at their
            base values, which leaves the direct edges.
        direction: `"noising"` or `"denoising"`.
        positions: of the senders, where `senders` does not say: `"aligned"`, `"named"` or (by default) `"all"`, merged.
        batch_size: rows of a forward pass, about 4096 tokens' worth unless given; it halves itself when memory runs
            out.
        progress: `None` shows a bar on a terminal only.
        resume: a journal; a sweep that was killed goes on from it and returns the same result.
        executor: `"ray"`, `"inprocess"` or an executor, to run the pairs block by block elsewhere; see `docs/scale.md`.

    Returns:
        `scores[site]` and `signed[site]` of the senders, NaN where one was not asked for. A sender above all receivers
        has effect 0.

    Raises:
        UnknownSiteError: a site that this model does not have.
        UnknownNameError: no such direction, treatment of MLPs or kind of positions.
        SettingError: a sender that is no head or MLP, a node that does not exist, or an unusable `batch_size`.
        AlignmentError: positions that are not comparable across the pairs.
        EmptyTaskError: no pairs, senders or receivers.
        NonFiniteError: a run has NaN or infinity.
        OutputExistsError: the journal belongs to another sweep.
        ExecutorError: a block failed for good.

    Cost:
        2 forward passes a pair, and for each sender of each pair that changes and lies below a receiver
        (L - its layer)/L of one and (L - the lowest reached receiver's layer)/L of one.

    References:
        Wang et al. 2023, arXiv:2211.00593; Goldowsky-Dill et al. 2023, arXiv:2304.05969.
    """
    check_call("path patching", model, task)
    if executor is not None:
        return spread(path_patching, **locals())
    way = direction_of(direction)
    run, mode = paths_of(model, task, receivers, senders, mlps, way, positions, batch_size)
    table = run.table
    key = {"task": task.hash(), "direction": way, "nodes": table.hash(), "rows": run.rows}
    key |= {"receivers": run.to.table.hash(), "mlps": mlps}
    results = sweep(
        run.groups(),
        run.compute,
        n_groups=len(run.parts),
        key={**key, **model.fingerprint()},
        resume=resume,
        progress=progress,
        label="path patching",
    )
    magnitude, signed = run.means(results)
    settings = settings_of(
        task,
        method="path_patching",
        direction=way,
        sites=table.sites,
        positions=mode,
        base=run.base_metric,
        source=run.source_metric,
        passes=(2 * len(task) + run.forward, 0.0),
        trivial=~run.ran,
        n_nodes=len(table),
        receivers=[str(node) for node in run.to.nodes],
        mlps=mlps,
    )
    return Attribution(table.labelled(magnitude, signed), settings=settings, provenance=provenance_of(model, task))


def paths_of(
    model: HookedModel,
    task: Task,
    receivers: Sequence[Node],
    senders: Sequence[Node] | None,
    mlps: str,
    way: Direction,
    positions: Positions | None,
    batch_size: int | None,
) -> tuple[Paths, Positions]:
    """What a call would run, and what the senders' positions mean; errors are those of `path_patching`."""
    if mlps not in MLPS:
        raise UnknownNameError(f"mlps={mlps!r}", "no such treatment of MLPs", nearest(mlps, MLPS))
    receivers = list(receivers) if isinstance(receivers, Iterable) else [receivers]
    if not receivers:
        raise EmptyTaskError("path patching", "an empty list of receivers", "give at least one node")
    if senders is None:
        mode: Positions = positions or "all"
        present = {parse(name)[0] for name in model.sites()}
        table = every_node(model, [site for site in SENDERS if site in present], places_of(task, mode))
    else:
        table, mode = table_of(model, task, senders, positions)
    strange = [site for site in table.sites if site not in SENDERS]
    if strange:
        fix = "send from heads (z) and MLPs (mlp_out), which write to the residual stream"
        raise SettingError("senders of path patching", f"nodes of {strange[0]}", fix)
    to = _Receivers.of(model, task, receivers)
    base, other = base_and_source(task, way)
    there = source_of(model, other, task.metric, table.names, None)
    rows = rows_of(base, batch_size)
    return Paths(model, base, task.metric, there, table, places_of(task, mode), rows, to, mlps == "frozen"), mode


@dataclass(frozen=True, eq=False, slots=True)
class _Receivers:
    """The receivers as entries of activations.

    Attributes:
        nodes: as they were given.
        table: the nodes, each once.
        where: by full name, whether an entry belongs to a receiver; axes of the site, up to the head or neuron.
    """

    nodes: Sequence[Node]
    table: NodeTable
    where: dict[str, Bool[Tensor, "pair ..."]]

    @classmethod
    def of(cls, model: HookedModel, task: Task, nodes: Sequence[Node]) -> _Receivers:
        """Checks the nodes and finds their entries."""
        table, mode = table_of(model, task, nodes, None)
        places, every = places_of(task, mode), torch.arange(len(task))
        where: dict[str, Tensor] = {}
        for node in range(len(table)):
            for name, entries, _ in table.selections(torch.full_like(every, node), every, places):
                shape = shape_of(name, model.info, *task.clean.tokens.shape)[: len(entries)]
                mask = where.setdefault(name, torch.zeros(shape, dtype=torch.bool, device=task.clean.device))
                mask[entries] = True
        return cls(nodes, table, where)


def _reaches(model: HookedModel, sender: str, receiver: str) -> bool:
    """Whether what is written at one site can change what another holds."""
    order = {site: i for i, site in enumerate(model.sites())}
    site, layer = parse(receiver)
    # in a parallel block the MLP does not read what attention writes
    beside = model.info.parallel and layer == parse(sender)[1] and site not in ("result", "attn_out", "resid_post")
    return order[receiver] > order[sender] and not beside


class Paths(Interventions):
    """Senders in place of nodes: two runs for each, the first to see what the receivers get."""

    def __init__(
        self,
        model: HookedModel,
        base: Batch,
        metric: Metric,
        there: Source,
        table: NodeTable,
        places: Places,
        rows: int,
        to: _Receivers,
        freeze_mlps: bool,
    ) -> None:
        super().__init__(model, base, metric, there, table, places, rows)
        self.to = to
        names = [name for name in model.sites() if parse(name)[0] == "z"]
        names += [name for name in model.sites() if parse(name)[0] == "mlp_out" and freeze_mlps]
        self.frozen_sites = names
        self.reach = torch.tensor([[_reaches(model, sender, name) for name in to.where] for sender in table.names])

    @property
    def forward(self) -> float:
        """Forward passes of both runs of each sender."""
        n = self.model.info.n_layers
        second = sum(share_of(self.landing(chunk.layer), n) * len(chunk.nodes) for chunk in self.chunks)
        return super().forward + second

    def above(self, layer: int | None) -> list[str]:
        """The receivers that some sender of a block reaches."""
        mine = [parse(name)[1] == layer for name in self.table.names]
        reached = self.reach[torch.tensor(mine)].any(0).tolist()
        return [name for name, yes in zip(self.to.where, reached, strict=True) if yes]

    def landing(self, layer: int | None) -> int:
        """The lowest block with a receiver that some sender of a block reaches."""
        last = self.model.info.n_layers - 1  # the final norm comes after it
        return min(last if (at := parse(name)[1]) is None else at for name in self.above(layer))

    def together(self, moved: Bool[Tensor, "pair node"]) -> Bool[Tensor, "pair node"]:
        """A sender that reaches no receiver is not run."""
        return moved & self.reach.any(1)[self.table.name]

    def _record(self, pairs: Sequence[int]) -> Bool[Tensor, "pair node"]:
        names = [full_name("resid_pre", layer) for layer in range(self.model.info.n_layers)]
        names += [*self.frozen_sites, *self.table.names]
        batch, places = self.base.rows(pairs), self.places.rows(pairs)
        kept, metric = recorded(self.model, batch, names, self.metric)
        there, source_metric = self.there.rows(pairs)
        assert metric is not None and source_metric is not None  # one was given
        self.now = Recording(torch.tensor(pairs), batch, places, kept, metric, there)
        self.base_metric += metric.tolist()
        self.source_metric += source_metric.tolist()
        self.dtype = torch.promote_types(metric.dtype, torch.float32)
        changed = {name: self.changed(name, kept[name]) for name in self.table.names}
        return self.together(self.table.lookup(changed, len(batch)))

    def _run(self, chunk: Chunk, part: Tensor) -> list[float]:
        now, pairs, nodes = self.now, chunk.pairs[part], chunk.nodes[part]
        assert chunk.layer is not None  # heads and MLPs lie in blocks
        batch, receivers = now.batch.rows(pairs), self.above(chunk.layer)
        held: dict[str, Tensor] = {}

        def hold(x: Tensor, place: Place) -> Tensor:
            held[place.site] = x
            return x

        def freeze(_x: Tensor, place: Place) -> Tensor:
            return now.stream[place.site][pairs]

        frozen = [name for name in self.frozen_sites if (parse(name)[1] or 0) >= chunk.layer]
        edits = [*(Edit(name, hold) for name in receivers), *(Edit(name, freeze) for name in frozen)]
        for name, write, read in self.table.selections(nodes, pairs, now.places):
            edits.append(Edit(name, Patch(write, now.source[name][read])))
        self.model.run(batch, edits=edits, start=self._start(chunk.layer, pairs))
        edits = [Edit(name, _Receive(self._entries(name, nodes, now.pairs[pairs]), held[name])) for name in receivers]
        start = self._start(self.landing(chunk.layer), pairs)
        value = self.model.run(batch, edits=edits, metric=self.metric, start=start).metric
        assert value is not None  # a metric was given
        effects: list[float] = (value - now.metric[pairs]).tolist()
        return effects

    def _start(self, layer: int, pairs: Tensor) -> Start:
        return Start(layer, self.now.stream[full_name("resid_pre", layer)][pairs])

    def _entries(self, name: str, nodes: Tensor, pairs: Tensor) -> Bool[Tensor, "row ..."]:
        """What each row's sender changes of a receiver's site; nothing in rows whose sender lies above it."""
        mask = self.to.where[name][pairs]
        reached = self.reach[self.table.name[nodes], list(self.to.where).index(name)].to(mask.device)
        return mask & reached.reshape(-1, *[1] * (mask.ndim - 1))


@dataclass(frozen=True, eq=False, slots=True)
class _Receive:
    """Replaces the entries of receivers by what they held in another run."""

    where: Bool[Tensor, "row ..."]
    values: Tensor

    def __call__(self, x: Tensor, _place: Place) -> Tensor:
        where = self.where.reshape(*self.where.shape, *[1] * (x.ndim - self.where.ndim))
        return torch.where(where, self.values, x)
