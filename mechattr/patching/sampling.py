"""Random sets of nodes, patched together: the samples of a difference in means and what they say of each node."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechattr.engines.subsampling import Contrast, Split, contrast, draw
from mechattr.labelled import Labelled
from mechattr.patching.interventions import finite
from mechattr.patching.nodes import NodeTable
from mechattr.patching.sets import Sets

CHUNK = 128  # samples that are drawn, and journalled, together


class Recorded(Protocol):
    """What both prompts of every pair say of the nodes: `Sets`, or blocks of pairs put together."""

    @property
    def table(self) -> NodeTable:
        """The nodes."""
        ...

    @property
    def moved(self) -> Bool[Tensor, "pair node"]:
        """Whether the two prompts give a node different activations."""
        ...

    def estimates(self) -> Float[Tensor, "pair node"]:
        """First-order estimate of each node's effect alone."""
        ...


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class Draws:
    """The samples of a run, made again from the seed whenever they are needed.

    Attributes:
        free: the nodes to sample from, as places among all nodes.
        p: probability that a node is patched in a sample.
        seed: of the samples.
        total: number of samples. The first ones do not depend on it.
        n_pairs: number of pairs.
        turns: the pairs that are taken in turn; `None` takes pairs at random.
    """

    free: Int[Tensor, " node"]
    p: float
    seed: int
    total: int
    n_pairs: int
    turns: Int[Tensor, " pair"] | None

    def size(self, chunk: int) -> int:
        """Number of samples in a chunk: the last one can have fewer."""
        return min(CHUNK, self.total - chunk * CHUNK)

    def pairs(self, chunk: int) -> Int[Tensor, " sample"]:
        """The pairs of a chunk."""
        if self.turns is None:
            return draw(self.seed, chunk, CHUNK, 0, self.p, self.n_pairs)[0][: self.size(chunk)]
        return self.turns[torch.arange(chunk * CHUNK, chunk * CHUNK + self.size(chunk)) % len(self.turns)]

    def draw(self, chunk: int) -> tuple[Int[Tensor, " sample"], Bool[Tensor, "sample node"]]:
        """The pairs and sets of a chunk; of one with fewer samples, those that a whole one begins with."""
        chosen = draw(self.seed, chunk, CHUNK, len(self.free), self.p, self.n_pairs)[1]
        return self.pairs(chunk), chosen[: self.size(chunk)]


def effects_of(sets: Sets, pairs: Tensor, chosen: Tensor, free: Tensor, first: int = 0) -> list[float]:
    """The effects of samples: sets of free nodes, each patched into its pair.

    Args:
        sets: patches the sets.
        pairs: the pair of each sample.
        chosen: its nodes [sample, free node].
        free: the free nodes among all.
        first: the number of the first pair of `sets`, where that is a block.

    Raises:
        NonFiniteError: a sample whose metric is NaN or infinite.
    """
    among_all = torch.zeros(len(pairs), sets.moved.shape[1], dtype=torch.bool)
    among_all[:, free] = chosen
    effects: list[float] = sets.effects(pairs - first, among_all).tolist()
    return finite(effects, lambda i: f"the effect of a set of nodes, on pair {int(pairs[i])}")


def chunk_effects(sets: Sets, draws: Draws, chunk: int) -> list[float]:
    """The effects of the samples of a chunk."""
    return effects_of(sets, *draws.draw(chunk), draws.free)


class Sampling:
    """What the samples of a run have shown so far.

    Args:
        sets: what is known of the nodes.
        free: the nodes to sample from.
        p: probability that a node is patched in a sample.
        seed: of the samples.
        total: number of samples.
        per_pair: keep the statistics of pairs apart, and take the pairs in turn instead of at random.
        control: subtract first-order estimates of the nodes' effects from the samples before taking differences.

    Attributes:
        draws: the samples.
        values: the effects of the samples taken so far, by chunk.
        rows: samples that had to be run: the others patch nothing that differs.
    """

    def __init__(
        self, sets: Recorded, free: Tensor, p: float, seed: int, total: int, *, per_pair: bool, control: bool
    ) -> None:
        self.sets, self.free = sets, free
        self.moved = sets.moved[:, free]
        self.live = self.moved if per_pair else None  # where pairs are kept apart
        turns = self.moved.any(1).nonzero()[:, 0] if per_pair else None  # without the pairs that do not differ
        self.draws = Draws(free=free, p=p, seed=seed, total=total, n_pairs=len(self.moved), turns=turns)
        none = Split.of(torch.zeros(0, len(free), dtype=torch.bool), torch.zeros(0))
        self.strata = [none] * (len(sets.moved) if per_pair else 1)
        # any constants keep the differences unbiased, so a gradient that overflowed may count as none
        self.estimates = sets.estimates()[:, free].nan_to_num_(0, 0, 0) if control and len(free) else None
        self.values: list[list[float]] = []
        self.rows = 0

    def take(self, effects: list[float]) -> None:
        """Adds the effects of the next chunk to the statistics."""
        pairs, chosen = self.draws.draw(len(self.values))
        values = torch.tensor(effects, dtype=torch.float64)
        for i, (pair, mask) in enumerate(zip(pairs.tolist(), chosen, strict=True)):
            members = mask.nonzero()[:, 0]
            self.rows += bool(self.moved[pair, members].any())
            if self.estimates is not None:
                values[i] -= self.estimates[pair, members].sum()
        for stratum in [0] if self.live is None else sorted(set(pairs.tolist())):
            here = slice(None) if self.live is None else pairs == stratum
            self.strata[stratum] += Split.of(chosen[here], values[here])
        self.values.append(effects)

    def contrast(self) -> Contrast:
        """What the samples so far say of each node."""
        offset = self.estimates
        if offset is not None and self.live is None:
            offset = offset.mean(0, keepdim=True)
        return contrast(self.strata, self.live, offset)

    def labelled(self) -> dict[str, Labelled]:
        """The statistics of each node by site, NaN where a node is not covered."""
        now, live = self.contrast(), self.live
        inclusions = torch.stack([split.inside.count for split in self.strata])
        if live is not None:
            inclusions = torch.where(live, inclusions, math.inf)
        columns = {
            "difference": now.size,
            "signed": now.signed,
            "error": now.error,
            "dof": now.dof,
            "inclusions": inclusions.amin(0),
        }
        found = {}
        for kind, values in columns.items():
            every = torch.full((self.sets.moved.shape[1],), math.nan, dtype=torch.float64)
            every[self.free] = values
            for short, (axes, coords, mine, flat) in self.sets.table.tables.items():
                table = torch.full([len(coords[axis]) for axis in axes], math.nan, dtype=torch.float64)
                table.view(-1)[flat] = every[mine]
                found[f"{kind}/{short}"] = Labelled(table, axes, coords)
        return found
