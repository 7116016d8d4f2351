"""Runs with chosen edges cut: every reader gets its own residual stream, in which the writers outside a circuit
contribute what they wrote in another run.

1. Record what every writer writes when it is ablated.
2. Run the base prompts. As writers pass, keep how far their outputs are from their ablated values.
3. Before each reader, subtract these differences over the cut edges from the stream, apply the reader's own norm and
   projection, and put the result in its place.

It is exact: nothing is linearised, and norms act on each reader's own input.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechattr.engines.merge import Part
from mechattr.engines.spread import Pairs
from mechattr.engines.sweep import sweep
from mechattr.errors import UnknownNameError, nearest
from mechattr.models.base import Batch, HookedModel
from mechattr.models.edits import Edit, Place
from mechattr.models.halving import Halving
from mechattr.patching.interventions import PAIRS_AT_ONCE, TOKENS_AT_ONCE, finite
from mechattr.patching.places import (
    base_and_source,
    by_place,
    check_call,
    chunks,
    direction_of,
    places_of,
    rows_at_once,
)
from mechattr.patching.recording import recorded
from mechattr.patching.wiring import SiteReaders, Wiring, check_keep
from mechattr.tasks.block import whole_of
from mechattr.tasks.task import Task

Ablation = Literal["resample", "mean", "zero"]
ABLATIONS = ("resample", "mean", "zero")


class EdgeRun:
    r"""The base run in which each edge outside a circuit carries its writer's ablated value.

    $$\mathrm{in}_v = \mathrm{stream}_v - \sum_{u:\,(u,v)\ \mathrm{cut}} \big(\mathrm{out}_u - \mathrm{ablated}_u\big)$$

    with $\mathrm{out}_u$ what writer $u$ writes in this very run. With every edge kept it is the base run; with none,
    and values resampled, the source run.

    Args:
        model: a hooked model whose blocks add to the residual stream.
        task: prompt pairs with a metric.
        direction: `"noising"` runs the clean prompts and ablates with the corrupt ones, `"denoising"` the reverse.
        ablation: `"resample"`: the writer's output on the other prompt of the pair; `"mean"`: its mean over the task's
            other prompts at the same position, over those prompts that have this position; `"zero"`.
        batch_size: rows of a forward pass; it halves itself when memory runs out.

    Raises:
        UnsupportedFeatureError: a model whose heads have no writes of their own.
        UnknownNameError: no such direction or ablation.
        EmptyTaskError: no pairs.
        AlignmentError: the two prompts of a pair are padded differently.

    References:
        Conmy et al. 2023, arXiv:2304.14997; Hanna et al. 2024, arXiv:2403.17806.
    """

    def __init__(
        self,
        model: HookedModel,
        task: Task,
        *,
        direction: str = "noising",
        ablation: str = "resample",
        batch_size: int | None = None,
    ) -> None:
        check_call("a run with edges cut", model, task)
        self.model, self.task, self.direction = model, task, direction_of(direction)
        self.ablation = ablation_of(ablation)
        self.wiring = Wiring(model)
        self.graph = self.wiring.graph
        places_of(task, "all")  # raises where the two prompts of a pair are padded differently
        self.base, self.source = base_and_source(task, self.direction)
        self._every = base_and_source(whole_of(task), self.direction)[1]  # what means are taken over
        width = self.base.tokens.shape[1]
        self.rows = rows_at_once(batch_size, min(self.wiring.rows(width), max(8, TOKENS_AT_ONCE // width)))
        self.forward = 0  # forward passes so far, in prompt rows
        self._halving = Halving(self.rows)
        self._means: dict[str, Tensor] = {}

    def metric(self, keep: Bool[Tensor, "writer reader"]) -> Float[Tensor, " pair"]:
        """The metric of each pair with one circuit.

        Args:
            keep: the edges of the circuit; entries where the graph has no edge do not matter.

        Raises:
            MismatchError: a mask of another graph.

        Cost:
            2 forward passes a pair, 1 where values are zero; of means the second is run once for all calls.
        """
        return self.metrics(keep[None])[0]

    def metrics(
        self,
        keep: Bool[Tensor, "circuit writer reader"],
        *,
        progress: bool | None = False,
        resume: Path | None = None,
        label: str = "edges cut",
        blocks: Pairs | None = None,
    ) -> Float[Tensor, "circuit pair"]:
        """The metric of each pair with each of several circuits; float64. Circuits that are the same run once.

        Args:
            keep: the edges of each circuit.
            progress: `None` shows a bar on a terminal only.
            resume: a journal; a sweep that was killed goes on from it and returns the same result.
            label: what the bar says.
            blocks: the pairs on an executor, which then runs them.

        Raises:
            MismatchError: masks of another graph, or workers with another model.
            NonFiniteError: a run has NaN or infinity.
            OutputExistsError: the journal belongs to another sweep.
            ExecutorError: a block failed for good.

        Cost:
            1 forward pass a pair and different circuit, and 1 a pair for the ablated values; see `metric`. Means are
            taken anew in each block.
        """
        cut, which = self.different(keep)
        digest = hashlib.sha256(cut.cpu().numpy().tobytes()).hexdigest()
        key = {"task": self.task.hash(), "direction": self.direction, "ablation": self.ablation, "cut": digest}
        if blocks is not None:
            work = _Cuts(self.direction, self.ablation, self.rows, ~cut.cpu())
            results = blocks.each(
                work, blocks.journal(resume, {**key, "rows": self.rows}), label=label, progress=progress
            )
            self.forward += sum(result["forward"] for _, result in results)
            return torch.cat([torch.tensor(r["metrics"], dtype=torch.float64) for _, r in results], 1)[which]
        parts = chunks(len(self.base), PAIRS_AT_ONCE)
        made: list[Tensor] = []

        def groups() -> Iterator[list[_Chunk]]:
            for pairs in parts:
                ablated = self._ablated(pairs)
                combos = torch.cartesian_prod(torch.arange(len(cut)), torch.tensor(list(pairs))).reshape(-1, 2)
                group = [_Chunk(combo, pairs.start, ablated) for combo in combos.split(self.rows)]
                made.extend(chunk.combos for chunk in group)
                yield group

        found = sweep(
            groups(),
            lambda chunk: finite(
                self._halving(range(len(chunk.combos)), lambda part: self._some(chunk, cut, list(part))),
                lambda i: f"the metric with edges cut, on pair {int(chunk.combos[i, 1])}",
            ),
            n_groups=len(parts),
            key={**key, "rows": self.rows, **self.model.fingerprint()},
            resume=resume,
            progress=progress,
            label=label,
        )
        metrics = torch.zeros(len(cut), len(self.base), dtype=torch.float64)
        for combos, values in zip(made, found, strict=True):
            metrics[combos[:, 0], combos[:, 1]] = torch.tensor(values, dtype=torch.float64)
        self.forward += metrics.numel()
        return metrics[which]

    def different(self, keep: Bool[Tensor, "circuit writer reader"]) -> tuple[Bool[Tensor, "run ..."], list[int]]:
        """The edges that are cut in each run, circuits that are the same together, and the run of each circuit."""
        check_keep(self.graph, keep)
        every = self.graph.mask & ~keep.cpu()
        first: dict[bytes, int] = {}
        which = [first.setdefault(row.numpy().tobytes(), len(first)) for row in every]
        return every[[which.index(i) for i in range(len(first))]].to(self.base.device), which

    # -- ablated values

    def _ablated(self, pairs: range) -> dict[str, Tensor]:
        """By full name what every writer's activation is when it is ablated, for some pairs."""
        if self.ablation == "resample":
            return self._record(self.source.rows(pairs))
        if self.ablation == "zero":
            return {}
        if not self._means:
            self._means = self._mean()
        positions = self.source.positions[list(pairs)].clamp(min=0)
        return {name: mean[positions] for name, mean in self._means.items()}

    def _record(self, batch: Batch) -> dict[str, Tensor]:
        self.forward += len(batch)
        return recorded(self.model, batch, self.wiring.graph.written)[0]

    def _mean(self) -> dict[str, Tensor]:
        """By full name the mean over prompts at each position [pos, ...]."""
        longest = int(self._every.lengths.max())
        count = (torch.arange(longest, device=self._every.device)[:, None] < self._every.lengths).sum(1)
        sums: dict[str, Tensor] = {}
        for pairs in chunks(len(self._every), self.rows):
            batch = self._every.rows(pairs)
            for name, x in self._record(batch).items():
                wide = torch.promote_types(x.dtype, torch.float32)
                total = sums.setdefault(name, x.new_zeros((longest, *x.shape[2:]), dtype=wide))
                total += by_place(x[batch.mask].to(wide), batch.positions[batch.mask], longest)
        dtype = getattr(torch, self.model.info.dtype)
        return {name: (x / count.reshape(-1, *[1] * (x.ndim - 1))).to(dtype) for name, x in sums.items()}

    # -- one batch

    def _some(self, chunk: _Chunk, cut: Bool[Tensor, "circuit writer reader"], part: list[int]) -> list[float]:
        circuits, pairs = chunk.combos[part].unbind(1)
        ablated = {name: x[pairs - chunk.first] for name, x in chunk.ablated.items()}
        batch = self.base.rows(pairs)
        edits = _Cut(self.wiring, cut, circuits, ablated).edits()
        value = self.model.run(batch, edits=edits, metric=self.task.metric).metric
        assert value is not None  # a metric was given
        found: list[float] = value.tolist()
        return found


@dataclass(frozen=True, eq=False, slots=True)
class _Cuts:
    """The metrics of a block's pairs with each of several circuits, in a worker."""

    direction: str
    ablation: str
    rows: int
    keep: Tensor

    def __call__(self, model: HookedModel, block: Task, _part: Part) -> dict[str, Any]:
        run = EdgeRun(model, block, direction=self.direction, ablation=self.ablation, batch_size=self.rows)
        return {"metrics": run.metrics(self.keep).tolist(), "forward": run.forward}


@dataclass(frozen=True, eq=False, slots=True)
class _Chunk:
    """Rows that run together: their circuits and pairs, and the ablated values of pairs from `first` on."""

    combos: Tensor
    first: int
    ablated: dict[str, Tensor]


class _Cut:
    """What happens during one run: writers are watched, readers get their own inputs."""

    def __init__(self, wiring: Wiring, cut: Tensor, circuits: Tensor, ablated: dict[str, Tensor]) -> None:
        self.wiring, self.cut, self.circuits, self.ablated = wiring, cut, circuits.to(cut.device), ablated
        self.streams: dict[str, Tensor] = {}
        self.gaps: Tensor | None = None  # [row, writer, pos, d_model]: output in this run minus ablated output

    def edits(self) -> list[Edit]:
        """In the order in which they act at one site: the write into block 0 is seen before it is read."""
        watch = [Edit(name, self.watch) for name in self.wiring.graph.written]
        streams = dict.fromkeys(readers.stream for readers in self.wiring.readers if readers.norm is not None)
        return [*watch, *(Edit(name, self.hold) for name in streams), *map(self.reader, self.wiring.readers)]

    def watch(self, x: Tensor, place: Place) -> Tensor:
        gap = x - self.ablated[place.site] if self.ablated else x
        gap = self.wiring.outputs(place.site, gap)
        if self.gaps is None:
            self.gaps = gap.new_zeros(len(gap), len(self.wiring.graph.writers), *gap.shape[2:])
        self.gaps[:, self.wiring.places(place.site)] = gap
        return x

    def hold(self, x: Tensor, place: Place) -> Tensor:
        self.streams[place.site] = x
        return x

    def reader(self, readers: SiteReaders) -> Edit:
        """The edit that gives the readers of one site their own inputs."""

        def give(x: Tensor, _place: Place) -> Tensor:
            assert self.gaps is not None  # the input writes before anything is read
            stream = x if readers.norm is None else self.streams[readers.stream]
            cut = self.cut[self.circuits, : readers.seen, readers.columns].to(stream.dtype)
            gaps = self.gaps[:, : readers.seen]
            lost = torch.matmul(cut.transpose(1, 2), gaps.flatten(2)).unflatten(2, gaps.shape[2:])
            return self.wiring.project(readers, stream[:, None] - lost)

        return Edit(readers.site, give)


def ablation_of(ablation: str) -> Ablation:
    """Checks the name of an ablation."""
    if ablation not in ABLATIONS:
        raise UnknownNameError(f"ablation {ablation!r}", "no such ablation", nearest(ablation, ABLATIONS))
    return cast(Ablation, ablation)
