"""What the tests of applied steering share: where it acts, by definition, and generation as a loop by hand."""

from __future__ import annotations

from typing import Any

import torch

from mechattr.models import Batch
from mechattr.models.edits import Edit
from mechattr.models.operators import Add
from mechattr.sites import full_name
from mechattr.steering import SteeringVector

FAMILIES = ("gpt2", "llama", "gemma2", "qwen3")
SITE = full_name("resid_post", 1)
PLACES: dict[str, Any] = {
    "all": "all", "prompt": "prompt", "generated": "generated", "last": "last", "numbers": [2, 8],
}  # fmt: skip


def vector(model: Any, seed: int = 0, site: str = SITE, size: float = 4.0) -> SteeringVector:
    v = torch.randn(model.info.d_model, generator=torch.Generator().manual_seed(seed))
    return SteeringVector.of({site: size * v})


def steered_at(positions: Any, lengths: torch.Tensor, n: int) -> list[list[int]]:
    """The positions of each row that are steered, by definition."""
    found = []
    for length in lengths.tolist():
        every = range(length + n)
        where = {"all": every, "prompt": range(length), "generated": range(length, length + n), "last": [length - 1]}
        found.append(list(where[positions]) if isinstance(positions, str) else [p for p in positions if p < length + n])
    return found


def by_hand(
    model: Any, batch: Batch, v: torch.Tensor, positions: Any, steps: int, factors: list[float]
) -> torch.Tensor:
    """Greedy continuation without a cache, each step a run with an edit at exactly the positions that are steered."""
    tokens = [batch.tokens[i, batch.mask[i]].tolist() for i in range(len(batch))]
    for step in range(steps):
        for i, row in enumerate(tokens):
            at = [p for p in steered_at(positions, batch.lengths, step)[i] if p < len(row)]
            edits = [Edit(SITE, Add(factors[i] * v), positions=at)] if at else []
            row.append(int(model.run(Batch.of(torch.tensor([row])), edits=edits).logits[0, -1].argmax()))
    return torch.tensor([row[-steps:] for row in tokens])
