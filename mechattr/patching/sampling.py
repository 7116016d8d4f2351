"""Random sets of nodes, patched together: the samples of a difference in means and what they say of each node."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mechattr.engines.subsampling import Contrast, Split, contrast, draw
from mechattr.labelled import Labelled
from mechattr.patching.interventions import finite
from mechattr.patching.sets import Sets

CHUNK = 128  # samples that are drawn, and journalled, together


class Sampling:
    """The samples of a run, made again from the seed whenever they are needed, and what they have shown so far.

    Args:
        sets: patches the sets.
        free: the nodes to sample from.
        p: probability that a node is patched in a sample.
        seed: of the samples.
        total: number of samples. The first ones do not depend on it.
        per_pair: keep the statistics of pairs apart, and take the pairs in turn instead of at random.
        control: subtract first-order estimates of the nodes' effects from the samples before taking differences.

    Attributes:
        values: the effects of the samples taken so far, by chunk.
        rows: samples that had to be run: the others patch nothing that differs.
    """

    def __init__(
        self, sets: Sets, free: Tensor, p: float, seed: int, total: int, *, per_pair: bool, control: bool
    ) -> None:
        self.sets, self.free, self.p, self.seed, self.total = sets, free, p, seed, total
        self.moved = sets.moved[:, free]
        self.live = self.moved if per_pair else None  # where pairs are kept apart
        none = Split.of(torch.zeros(0, len(free), dtype=torch.bool), torch.zeros(0))
        self.strata = [none] * (len(sets.moved) if per_pair else 1)
        # any constants keep the differences unbiased, so a gradient that overflowed may count as none
        self.estimates = sets.estimates()[:, free].nan_to_num_(0, 0, 0) if control and len(free) else None
        self.values: list[list[float]] = []
        self.rows = 0

    def size(self, chunk: int) -> int:
        """Number of samples in a chunk: the last one can have fewer."""
        return min(CHUNK, self.total - chunk * CHUNK)

    def draw(self, chunk: int) -> tuple[Int[Tensor, " sample"], Bool[Tensor, "sample node"]]:
        """The pairs and sets of a chunk; of one with fewer samples, those that a whole one begins with."""
        first, n = chunk * CHUNK, self.size(chunk)
        pairs, chosen = draw(self.seed, chunk, CHUNK, len(self.free), self.p, len(self.moved))
        if self.live is not None:  # in turn, without the pairs that do not differ
            useful = self.live.any(1).nonzero()[:, 0]
            pairs = useful[torch.arange(first, first + CHUNK) % len(useful)]
        return pairs[:n], chosen[:n]

    def compute(self, chunk: int) -> list[float]:
        """The effects of a chunk's sets."""
        pairs, chosen = self.draw(chunk)
        among_all = torch.zeros(len(pairs), self.sets.moved.shape[1], dtype=torch.bool)
        among_all[:, self.free] = chosen
        effects: list[float] = self.sets.effects(pairs, among_all).tolist()
        return finite(effects, lambda i: f"the effect of a set of nodes, on pair {int(pairs[i])}")

    def take(self, effects: list[float]) -> None:
        """Adds the effects of the next chunk to the statistics."""
        pairs, chosen = self.draw(len(self.values))
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
