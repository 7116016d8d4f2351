"""What builders share: the moments of pairs at each site, and vectors with the record of how they were made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from jaxtyping import Float
from torch import Size, Tensor, cat

from mechattr.engines.moments import Moments
from mechattr.errors import SettingError
from mechattr.models.base import HookedModel
from mechattr.provenance import provenance
from mechattr.steering.data import Sites, check_pairs, chosen_sites, nodes_of, shape_at, sides
from mechattr.steering.vector import SteeringVector

Pairs = Sequence[tuple[str, str]]


class Seen:
    """The moments of pairs at one site."""

    def __init__(self, d: int, *, scatter: bool) -> None:
        self.positive, self.negative, self.difference = (Moments(d, scatter=scatter) for _ in range(3))
        self.length = Moments(1, scatter=False)


def seen_at(
    model: HookedModel,
    pairs: Pairs,
    layers: Sequence[int] | None,
    sites: Sites,
    positions: str | int,
    batch_size: int,
    *,
    scatter: bool,
) -> dict[str, Seen]:
    """The moments of pairs, by full site name."""
    given, names = check_pairs(pairs), chosen_sites(model, layers, sites)
    found = {name: Seen(Size(shape_at(model, name)).numel(), scatter=scatter) for name in names}
    for part in sides(model, given, names, positions=positions, batch_size=batch_size):
        for side in part:
            seen = found[side.site]
            seen.positive.add(side.positive)
            seen.negative.add(side.negative)
            seen.difference.add(side.positive.double() - side.negative.double())
            seen.length.add(cat([side.positive, side.negative]).norm(dim=-1, keepdim=True))
    return found


def of_pairs(
    model: HookedModel,
    builder: str,
    directions: Mapping[str, Float[Tensor, " d"]],
    seen: Mapping[str, Seen],
    sites: Sites,
    positions: str | int,
    seed: int,
    **more: Any,
) -> SteeringVector:
    """A vector from the moments of pairs."""
    more = {
        "positions": positions,
        "n_pairs": next(iter(seen.values())).difference.n,
        "lengths": {name: float(m.length.mean) for name, m in seen.items()},
        "differences": {name: float(m.difference.mean.norm()) for name, m in seen.items()},
        **more,
    }
    return made(model, builder, directions, sites, seed, **more)


def made(
    model: HookedModel,
    builder: str,
    directions: Mapping[str, Float[Tensor, " d"]],
    sites: Sites,
    seed: int,
    **settings: Any,
) -> SteeringVector:
    """A vector with what made it; where `sites` are nodes, only their heads, neurons or streams keep a direction.

    Raises:
        SettingError: only zeros, or a number that is not finite.
    """
    shapes = {name: shape_at(model, name) for name in directions}
    tensors = {n: x.float() if x.ndim > len(shapes[n]) else x.reshape(shapes[n]).float() for n, x in directions.items()}
    stamp = provenance({**asdict(model.info), **model.fingerprint()}, seed=seed)
    vector = SteeringVector.of(tensors, settings={"method": builder, "seed": seed, **settings}, provenance=stamp)
    vector = vector.only(sites) if sites is not None and nodes_of(sites) else vector
    if not any(bool(table.values.any()) for table in vector.tensors.values()):
        found = f"no difference at {', '.join(vector.sites)}"
        raise SettingError(f"a vector of {builder}", found, "give other data, or read it at other positions or sites")
    return vector
