"""Controls: vectors that a steering vector must be better than."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from mechattr.errors import SettingError
from mechattr.models.base import HookedModel
from mechattr.steering.vector import SteeringVector


def random_like(vector: SteeringVector, seed: int = 0) -> SteeringVector:
    """Random directions of equal length: at each site, head and position the length of the given one; where that is 0
    there is none."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, table in vector.tensors.items():
        drawn = torch.randn(table.shape, generator=generator, dtype=torch.double).to(table.values.device)
        length = table.values.double().norm(dim=-1, keepdim=True)
        tensors[name] = (drawn / drawn.norm(dim=-1, keepdim=True) * length).to(table.values.dtype)
    return SteeringVector.of(tensors, settings={"method": "random", "seed": seed}, provenance=vector.provenance)


def shuffled(
    builder: Callable[..., SteeringVector],
    model: HookedModel,
    data: Sequence[tuple[str, ...]],
    *,
    seed: int = 0,
    **settings: Any,
) -> SteeringVector:
    """The vector that a builder makes of data whose labels say nothing: in half of the pairs or triples, drawn at
    random, the two sides change places. Its length says how much of the vector's was not in the labels.

    Args:
        builder: such as `mechattr.steering.mean_difference`.
        model: the model.
        data: pairs (positive, negative), or triples (prompt, matching answer, other answer).
        seed: of the draw, and of the builder.
        **settings: of the builder.

    Raises:
        SettingError: fewer than two pairs or triples, and what the builder raises.

    Cost:
        That of the builder.
    """
    given = list(data)
    if len(given) < 2:
        raise SettingError("shuffled labels", f"{len(given)} pairs", "give at least two")
    order = torch.randperm(len(given), generator=torch.Generator().manual_seed(seed))
    swapped = set(order[: len(given) // 2].tolist())
    mixed = [(*one[:-2], one[-1], one[-2]) if i in swapped else tuple(one) for i, one in enumerate(given)]
    return builder(model, mixed, seed=seed, **settings)
