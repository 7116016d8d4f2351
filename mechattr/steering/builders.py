"""Builders of steering vectors from pairs: each answers what direction tells positive from negative texts."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mechattr.errors import SettingError
from mechattr.models.base import HookedModel
from mechattr.steering.data import Sites
from mechattr.steering.made import Pairs, of_pairs, seen_at
from mechattr.steering.numbers import check_positive
from mechattr.steering.vector import SteeringVector


def mean_difference(
    model: HookedModel,
    pairs: Pairs,
    *,
    layers: Sequence[int] | None = None,
    sites: Sites = None,
    positions: str | int = "last",
    seed: int = 0,
    batch_size: int = 16,
) -> SteeringVector:
    """v = mean over pairs of h(positive) - h(negative).

    Args:
        model: a hooked model.
        pairs: (positive text, negative text).
        layers: blocks whose output (`resid_post`) is steered; or
        sites: sites by name, such as `"z"` for all heads of all layers, or nodes, such as `result.top(10)`: then only
            their heads, neurons or streams have a direction.
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
    found = seen_at(model, pairs, layers, sites, positions, batch_size, scatter=False)
    return of_pairs(
        model, "mean_difference", {n: m.difference.mean for n, m in found.items()}, found, sites, positions, seed
    )


def mass_mean(
    model: HookedModel,
    pairs: Pairs,
    *,
    layers: Sequence[int] | None = None,
    sites: Sites = None,
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
    check_positive("ridge", ridge)
    found = seen_at(model, pairs, layers, sites, positions, batch_size, scatter=True)
    directions = {}
    for name, m in found.items():
        within = (m.positive.covariance + m.negative.covariance) / 2
        penalty = ridge * within.diagonal().mean()
        if not bool(penalty > 0):
            fix = "give more pairs, or use mean_difference"
            raise SettingError(f"a covariance at {name}", "texts of one side that do not differ there", fix)
        v = torch.linalg.solve(within + penalty * torch.eye(len(within), dtype=within.dtype), m.difference.mean)
        directions[name] = v * (m.difference.mean.norm() / v.norm().clamp(min=torch.finfo(v.dtype).tiny))
    return of_pairs(model, "mass_mean", directions, found, sites, positions, seed, ridge=ridge)


def pca(
    model: HookedModel,
    pairs: Pairs,
    *,
    layers: Sequence[int] | None = None,
    sites: Sites = None,
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
    found = seen_at(model, pairs, layers, sites, positions, batch_size, scatter=True)
    if variant == "centred" and next(iter(found.values())).difference.n == 1:
        raise SettingError("variant='centred'", "one pair", "give more: their mean is taken away")
    directions = {}
    for name, m in found.items():
        table = m.difference.covariance if variant == "centred" else m.difference.uncentred
        first = torch.linalg.eigh(table).eigenvectors[:, -1]
        directions[name] = first * (first @ m.difference.mean)
    return of_pairs(model, "pca", directions, found, sites, positions, seed, variant=variant)
