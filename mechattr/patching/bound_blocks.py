"""The runs of a bound on missed effects in blocks of pairs, for an executor.

1. Each block runs its prompts: which nodes differ, the metrics, and the first-order estimates.
2. For each look, each block runs its prompts again and then those samples that drew one of its pairs.

Samples are drawn from the seed alone, by number. So a block draws them all and runs its own, and they are those of a
run without blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mechattr.engines.merge import Part
from mechattr.engines.packed import bytes_of, tensor_of
from mechattr.engines.spread import Pairs
from mechattr.engines.sweep import Journal
from mechattr.models.base import HookedModel
from mechattr.patching.nodes import NodeTable
from mechattr.patching.places import Direction, Positions
from mechattr.patching.sampling import CHUNK, Draws, effects_of
from mechattr.patching.sets import Sets
from mechattr.tasks.task import Task


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class Prompts:
    """What every block of a bound needs, and its first stage: both prompts of each of its pairs.

    Attributes:
        table: the nodes.
        mode: what positions mean.
        way: which run is patched into which.
        rows: of a forward pass.
        control: whether first-order estimates are taken.
    """

    table: NodeTable
    mode: Positions
    way: Direction
    rows: int
    control: bool

    def sets(self, model: HookedModel, block: Task) -> Sets:
        """The block's prompts, run."""
        return Sets(model, block, self.table, self.mode, self.way, batch_size=self.rows)

    def __call__(self, model: HookedModel, block: Task, _part: Part) -> dict[str, Any]:
        sets = self.sets(model, block)
        assert sets.source_metric is not None  # both prompts were run
        found = {"moved": sets.moved, "base": sets.base_metric, "source": sets.source_metric}
        if self.control:
            found["estimates"] = sets.estimates()
        return {"forward": sets.forward, **{name: bytes_of(values) for name, values in found.items()}}


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class Samples:
    """The second stage: the effects of those sets of some chunks that are patched into one of a block's pairs.

    Attributes:
        prompts: the first stage.
        draws: all samples.
        chunks: the numbers of the chunks.
    """

    prompts: Prompts
    draws: Draws
    chunks: range

    def __call__(self, model: HookedModel, block: Task, part: Part) -> dict[str, Any]:
        sets, effects = self.prompts.sets(model, block), list[float]()
        for pairs, chosen in self._of(part.pairs):
            effects += effects_of(sets, pairs, chosen, self.draws.free, first=part.pairs.start)
        return {"forward": sets.forward, "effects": effects}

    def _of(self, own: range) -> Iterator[tuple[Tensor, Tensor]]:
        """The samples that drew some pairs, about a chunk's worth at a time."""
        kept: list[tuple[Tensor, Tensor]] = []
        for chunk in self.chunks:
            pairs, chosen = self.draws.draw(chunk)
            mine = (pairs >= own.start) & (pairs < own.stop)
            kept.append((pairs[mine], chosen[mine]))
            if chunk == self.chunks[-1] or sum(len(pairs) for pairs, _ in kept) >= CHUNK:
                yield torch.cat([pairs for pairs, _ in kept]), torch.cat([chosen for _, chosen in kept])
                kept = []


class BlockSets:
    """What `Sets` says of all pairs of a task, from blocks of them, and the effects of samples.

    Args:
        blocks: the pairs on an executor.
        prompts: the first stage, which is run.
        journal: of all stages.
        progress: `None` shows a bar on a terminal only.

    Attributes:
        base_metric, source_metric, moved, forward, table: as those of `Sets`.
    """

    def __init__(self, blocks: Pairs, prompts: Prompts, journal: Journal, progress: bool | None) -> None:
        self.blocks, self.prompts, self.journal, self.progress = blocks, prompts, journal, progress
        self.table = prompts.table
        self._found = [found for _, found in blocks.each(prompts, journal, label="prompts", progress=progress)]
        self.base_metric, self.source_metric, self.moved = map(self._whole, ("base", "source", "moved"))
        self.forward = sum(found["forward"] for found in self._found)

    def estimates(self) -> Float[Tensor, "pair node"]:
        """First-order estimates of the nodes' effects, which the first stage took."""
        return self._whole("estimates")

    def effects(self, draws: Draws, chunks: range, look: int) -> Iterator[list[float]]:
        """The effects of the sets of each chunk up to a look, one stage of work."""
        work = Samples(prompts=self.prompts, draws=draws, chunks=chunks)
        found = self.blocks.each(work, self.journal, stage=look, label=f"samples, look {look}", progress=self.progress)
        self.forward += sum(result["forward"] for _, result in found)
        effects = [iter(result["effects"]) for _, result in found]
        for chunk in chunks:
            owners = (draws.pairs(chunk) // self.blocks.executor.pairs).tolist()
            yield [next(effects[owner]) for owner in owners]

    def _whole(self, name: str) -> Tensor:
        return torch.cat([tensor_of(found[name]) for found in self._found])
