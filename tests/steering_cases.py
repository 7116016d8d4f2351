"""What the tests of applied steering share: where it acts, by definition, and generation as a loop by hand."""

from __future__ import annotations

from typing import Any

import families
import torch

from mechattr.models import Batch
from mechattr.models.edits import Edit
from mechattr.models.operators import Add
from mechattr.sites import full_name
from mechattr.steering import SteeringVector

FAMILIES = ("gpt2", "llama", "gemma2", "qwen3")
SITE = full_name("resid_post", 1)
PLACES: dict[str, Any] = {
    "all": "all", "prompt": "prompt", "generated": "generated", "last": "last", "numbers": [2, 8], "mask": "mask",
}  # fmt: skip


def vector(model: Any, seed: int = 0, site: str = SITE, size: float = 4.0) -> SteeringVector:
    v = torch.randn(model.info.d_model, generator=torch.Generator().manual_seed(seed))
    return SteeringVector.of({site: size * v})


def everywhere(model: Any, seed: int = 0, size: float = 4.0) -> SteeringVector:
    """A vector in every block, so that what is kept of earlier tokens matters, and the last block's output, too."""
    layers = [vector(model, seed + n, full_name("resid_post", n), size) for n in range(model.info.n_layers)]
    return SteeringVector.of({name: table.values for one in layers for name, table in one.tensors.items()})


def mask_of(batch: Batch) -> torch.Tensor:
    """Positions that differ from row to row; some are padding, which is never steered."""
    return torch.rand(batch.tokens.shape, generator=torch.Generator().manual_seed(5)) < 0.5


def steered_at(positions: Any, batch: Batch, row: int, length: int) -> list[int]:
    """The positions below a length that are steered in one row, by definition."""
    prompt = int(batch.lengths[row])
    words = {"all": range(length), "prompt": range(prompt), "generated": range(prompt, length), "last": [prompt - 1]}
    if isinstance(positions, torch.Tensor):
        wanted: Any = batch.positions[row, positions[row] & batch.mask[row]].tolist()
    else:
        wanted = words[positions] if isinstance(positions, str) else positions
    return [position for position in wanted if position < length]


def by_hand(
    model: Any, batch: Batch, v: SteeringVector, positions: Any, steps: int, factors: list[float], beams: int = 1
) -> torch.Tensor:
    """Continuation without a cache, each step a run with edits at exactly the positions that are steered: of all
    continuations of the best ones so far, the best. One is greedy continuation."""
    ends = getattr(getattr(getattr(model, "model", None), "generation_config", None), "eos_token_id", None)
    said = []
    for row in range(len(batch)):
        tokens, scores = families.alone(batch, row).tokens, torch.zeros(1)
        for _ in range(steps):
            at = steered_at(positions, batch, row, tokens.shape[1])
            edits = [Edit(name, Add(factors[row] * x.values), positions=at) for name, x in v.tensors.items() if at]
            found = model.run(Batch.of(tokens), edits=edits).logits[:, -1].log_softmax(-1)
            if ends is not None and ends < found.shape[1]:
                found[:, ends] = -torch.inf
            scores, chosen = (scores[:, None] + found).flatten().topk(beams)
            tokens = torch.cat([tokens[chosen // found.shape[1]], (chosen % found.shape[1])[:, None]], 1)
        said.append(tokens[0, -steps:])
    return torch.stack(said)
