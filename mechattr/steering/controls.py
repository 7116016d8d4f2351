"""Controls: vectors that a steering vector must be better than."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from mechattr.errors import SettingError
from mechattr.models.base import Batch, HookedModel
from mechattr.models.halving import Halving
from mechattr.steering.data import shape_at
from mechattr.steering.moving import Moving
from mechattr.steering.vector import SteeringVector

Made = TypeVar("Made")


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


def mean_lengths(model: HookedModel, moving: Moving, batch: Batch, *, batch_size: int = 32) -> dict[str, float]:
    """The mean length, over tokens, of what a function of the state adds at each site of the model as it is.

    Cost:
        1 forward pass a row.
    """

    def lengths(rows: Sequence[int]) -> list[Tensor]:
        some = batch.rows(rows)
        seen = model.run(some, record=moving.sites).activations
        added = torch.stack([moving.added(site, seen[site].values.flatten(2)).norm(dim=-1) for site in moving.sites], 1)
        return list(added.masked_fill(~some.mask[:, None], 0).sum(-1))

    total = torch.stack(Halving(batch_size)(range(len(batch)), lengths)).sum(0) / batch.lengths.sum()
    return dict(zip(moving.sites, total.tolist(), strict=True))


def random_of(model: HookedModel, lengths: Mapping[str, float], seed: int = 0) -> SteeringVector:
    """Random directions of given lengths, by site; those of heads are taken together."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for site, length in lengths.items():
        drawn = torch.randn(shape_at(model, site), generator=generator, dtype=torch.double)
        tensors[site] = (drawn * (length / drawn.norm())).float()
    return SteeringVector.of(tensors, settings={"method": "random", "seed": seed})


def shuffled(
    builder: Callable[..., Made],
    model: HookedModel,
    data: Sequence[tuple[str, ...]],
    *,
    seed: int = 0,
    **settings: Any,
) -> Made:
    """What a builder makes of data whose labels say nothing: in half of the pairs or triples, drawn at random, the two
    sides change places. The length of such a vector says how much of that of the right one was not in the labels.

    Args:
        builder: such as `mechattr.steering.mean_difference`.
        model: the model.
        data: pairs (positive, negative), or triples (prompt, matching answer, other answer), which may have images.
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
    mixed = [_swapped(one) if i in swapped else tuple(one) for i, one in enumerate(given)]
    return builder(model, mixed, seed=seed, **settings)


def _swapped(one: Sequence[Any]) -> tuple[Any, ...]:
    """A pair, or what stands behind the prompt of a triple, the other way round."""
    first = int(len(one) > 2)
    return *one[:first], one[first + 1], one[first], *one[first + 2 :]
