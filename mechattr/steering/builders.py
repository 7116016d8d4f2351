"""Builders of steering vectors from pairs: each answers what direction tells positive from negative texts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mechattr.engines.moments import Moments
from mechattr.errors import SettingError
from mechattr.models.base import HookedModel
from mechattr.provenance import provenance
from mechattr.steering.data import check_pairs, chosen_sites, shape_at, sides
from mechattr.steering.vector import SteeringVector

Pairs = Sequence[tuple[str, str]]


def mean_difference(
    model: HookedModel,
    pairs: Pairs,
    *,
    layers: Sequence[int] | None = None,
    sites: str | Sequence[str] | None = None,
    positions: str | int = "last",
    seed: int = 0,
    batch_size: int = 16,
) -> SteeringVector:
    """v = mean over pairs of h(positive) - h(negative).

    Args:
        model: a hooked model.
        pairs: (positive text, negative text).
        layers: blocks whose output (`resid_post`) is steered; or
        sites: sites by name, such as `"z"` for all heads of all layers.
        positions: `"last"`, `"mean"`, or one position of each text.
        seed: nothing is drawn here; kept for one signature of all builders.
        batch_size: pairs of one forward pass.

    Raises:
        SettingError: pairs, layers or positions that do not fit.
        UnknownSiteError: a site that the model does not have.

    Cost:
        2 forward passes a pair; memory for one mean a site.

    References:
        Rimsky et al. (2024), Steering Llama 2 via Contrastive Activation Addition, arXiv 2312.06681.
    """
    found = _moments(model, pairs, layers, sites, positions, batch_size, scatter=False)
    return _vector(model, "mean_difference", {n: m.difference.mean for n, m in found.items()}, found, positions, seed)


def mass_mean(
    model: HookedModel,
    pairs: Pairs,
    *,
    layers: Sequence[int] | None = None,
    sites: str | Sequence[str] | None = None,
    positions: str | int = "last",
    seed: int = 0,
    batch_size: int = 16,
    ridge: float = 1e-2,
) -> SteeringVector:
    """v = (S + r I)^-1 (mean positive - mean negative), S the covariance within the two sides: the direction of linear
    discriminant analysis, scaled to the length of the difference of means.

    Args:
        model, pairs, layers, sites, positions, seed, batch_size: as for `mean_difference`.
        ridge: r, in units of the mean of S's diagonal; covariances of fewer texts than dimensions need it.

    Raises:
        SettingError: pairs, layers, positions or a ridge that do not fit.
        UnknownSiteError: a site that the model does not have.

    Cost:
        2 forward passes a pair; memory for d^2 numbers a site.

    References:
        Marks, Tegmark (2023), The Geometry of Truth, arXiv 2310.06824.
    """
    if isinstance(ridge, bool) or not isinstance(ridge, int | float) or not ridge > 0:
        raise SettingError(f"ridge={ridge!r}", "no penalty", "give a number above 0")
    found = _moments(model, pairs, layers, sites, positions, batch_size, scatter=True)
    directions = {}
    for name, m in found.items():
        within = (m.positive.covariance + m.negative.covariance) / 2
        penalty = ridge * within.diagonal().mean().clamp(min=torch.finfo(within.dtype).tiny)
        v = torch.linalg.solve(within + penalty * torch.eye(len(within), dtype=within.dtype), m.difference.mean)
        directions[name] = v * (m.difference.mean.norm() / v.norm().clamp(min=torch.finfo(v.dtype).tiny))
    return _vector(model, "mass_mean", directions, found, positions, seed, ridge=ridge)


def pca(
    model: HookedModel,
    pairs: Pairs,
    *,
    layers: Sequence[int] | None = None,
    sites: str | Sequence[str] | None = None,
    positions: str | int = "last",
    seed: int = 0,
    batch_size: int = 16,
    variant: str = "uncentred",
) -> SteeringVector:
    """The first principal component of the differences h(positive) - h(negative), with the sign of their mean and the
    length of the mean's projection on it.

    Args:
        model, pairs, layers, sites, positions, seed, batch_size: as for `mean_difference`.
        variant: `"uncentred"` differences; or `"pair_centred"`, both sides of each pair about their midpoint, whose
            components are the same. `"centred"` takes the mean difference away before, which takes away what all
            pairs share: it fails where the behaviour shifts every pair alike, and is there to be compared with.

    Raises:
        SettingError: pairs, layers, positions or a variant that do not fit.
        UnknownSiteError: a site that the model does not have.

    Cost:
        2 forward passes a pair; memory for d^2 numbers a site.

    References:
        Zou et al. (2023), Representation Engineering, arXiv 2310.01405, whose components are of centred differences.
    """
    if variant not in ("uncentred", "pair_centred", "centred"):
        raise SettingError(f"variant={variant!r}", "no such variant", "use 'uncentred', 'pair_centred' or 'centred'")
    found = _moments(model, pairs, layers, sites, positions, batch_size, scatter=True)
    directions = {}
    for name, m in found.items():
        table = m.difference.covariance if variant == "centred" else m.difference.uncentred
        first = torch.linalg.eigh(table).eigenvectors[:, -1]
        directions[name] = first * (first @ m.difference.mean)
    return _vector(model, "pca", directions, found, positions, seed, variant=variant)


class _Seen:
    """The moments of pairs at one site."""

    def __init__(self, d: int, *, scatter: bool) -> None:
        self.positive, self.negative, self.difference = (Moments(d, scatter=scatter) for _ in range(3))
        self.length = Moments(1, scatter=False)


def _moments(
    model: HookedModel,
    pairs: Pairs,
    layers: Sequence[int] | None,
    sites: str | Sequence[str] | None,
    positions: str | int,
    batch_size: int,
    *,
    scatter: bool,
) -> dict[str, _Seen]:
    given, names = check_pairs(pairs), chosen_sites(model, layers, sites)
    found = {name: _Seen(torch.Size(shape_at(model, name)).numel(), scatter=scatter) for name in names}
    for part in sides(model, given, names, positions=positions, batch_size=batch_size):
        for side in part:
            seen = found[side.site]
            seen.positive.add(side.positive)
            seen.negative.add(side.negative)
            seen.difference.add(side.positive.double() - side.negative.double())
            seen.length.add(torch.cat([side.positive, side.negative]).norm(dim=-1, keepdim=True))
    return found


def _vector(
    model: HookedModel,
    builder: str,
    directions: Mapping[str, Float[Tensor, " d"]],
    seen: Mapping[str, _Seen],
    positions: str | int,
    seed: int,
    **more: Any,
) -> SteeringVector:
    first = next(iter(seen.values()))
    settings = {
        "method": builder,
        "positions": positions,
        "seed": seed,
        "n_pairs": first.difference.n,
        "lengths": {name: float(m.length.mean) for name, m in seen.items()},
        "differences": {name: float(m.difference.mean.norm()) for name, m in seen.items()},
        **more,
    }
    tensors = {name: x.reshape(shape_at(model, name)).float() for name, x in directions.items()}
    made = provenance({**asdict(model.info), **model.fingerprint()}, seed=seed)
    return SteeringVector.of(tensors, settings=settings, provenance=made)


BUILDERS: dict[str, Callable[..., SteeringVector]] = {
    "mean_difference": mean_difference, "mass_mean": mass_mean, "pca": pca,
}  # fmt: skip
