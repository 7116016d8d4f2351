"""Representation finetuning: a trained change of the state within a few of its dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from mechattr.errors import SettingError
from mechattr.models.base import HookedModel
from mechattr.steering.data import Sites
from mechattr.steering.lesson import Lesson, Trainee
from mechattr.steering.moving import Moving, whole_sites, width_at
from mechattr.steering.preference import Triples
from mechattr.steering.training import Schedule, descend


def edited(
    x: Float[Tensor, "*rows d"], r: Float[Tensor, "rank d"], w: Float[Tensor, "rank d"], b: Float[Tensor, " rank"]
) -> Float[Tensor, "*rows d"]:
    """R^T (W x + b - R x)."""
    return (x @ (w - r).mT + b) @ r


class ReFT(Moving):
    """x + m R^T (W x + b - R x) at each site: within the space of R's orthonormal rows, R x is moved to W x + b.

    `tensors` holds `R`, `W` [rank, d] and `b` [rank] by site; `settings` say how they were trained.
    """

    kind = "reft"
    addition = staticmethod(edited)
    axes: ClassVar = {"R": ("rank", "d"), "W": ("rank", "d"), "b": ("rank",)}


def reft(
    model: HookedModel,
    triples: Triples,
    *,
    layers: Sequence[int] | None = None,
    sites: Sites = None,
    rank: int = 4,
    positions: str | Sequence[int] = "all",
    seed: int = 0,
    loss: str = "cross_entropy",
    beta: float = 0.1,
    steps: int = 50,
    rate: float = 0.02,
    minibatch: int | None = None,
    batch_size: int = 32,
    progress: bool | None = None,
) -> ReFT:
    """Low-rank linear subspace ReFT, h + R^T (W h + b - R h), trained by gradient descent with the model frozen.

    Training begins at the model as it is: R has random orthonormal rows, W = R and b = 0. The rows stay orthonormal,
    because what is trained is a matrix of which R is the orthonormal factor.

    Args:
        model, triples, layers, positions, loss, beta, steps, minibatch, batch_size, progress: as for
            `mechattr.steering.learned`.
        sites: sites by name, or nodes of whole streams; the heads of a site are taken together.
        rank: rows of R.
        seed: of R at the start, and of the choice of minibatches.
        rate: a first step, as a share: of the length of R's and W's rows, and for b of the mean length of the
            activations.

    Raises:
        SettingError: triples, layers, positions or numbers that do not fit; a rank larger than a site's width; heads or
            neurons.
        UnknownNameError: no such loss.
        UnknownSiteError: a site that the model does not have.
        UnsupportedFeatureError: a model that does not predict next tokens, or a backend whose states stay where the
            model runs.

    Cost:
        As for `mechattr.steering.learned`.

    References:
        Wu, Arora, Wang, Geiger, Jurafsky, Manning, Potts (2024), ReFT: Representation Finetuning for Language Models,
        arXiv 2404.03592.
    """
    schedule = Schedule(steps=steps, rate=rate, minibatch=minibatch, seed=seed)
    names = whole_sites(model, layers, sites)
    widest = min(width_at(model, name) for name in names)
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= widest:
        raise SettingError(f"rank={rank!r}", f"states of {widest} numbers", f"give a whole number from 1 to {widest}")
    lesson = Lesson(model, triples, names, positions=positions, loss=loss, beta=beta, batch_size=batch_size)
    generator = torch.Generator().manual_seed(seed)
    parameters, rates = {}, {}
    for name in names:
        d, at = width_at(model, name), lesson.base
        r = orthonormal(torch.randn(d, rank, generator=generator, dtype=torch.float64))
        r = r.to(at.device, torch.promote_types(at.dtype, torch.float32))
        parameters[name] = [r.mT.clone(), r.clone(), r.new_zeros(rank)]
        rates[name] = [rate / d**0.5, rate / d**0.5, rate * lesson.lengths[name]]
    how = descend(lesson, Trainee(turned, parameters, rates, reads=True), schedule, progress=progress)
    where = positions if isinstance(positions, str) else list(positions)
    found = {name: [orthonormal(a), w, b] for name, (a, w, b) in parameters.items()}
    return ReFT.made(model, found, "reft", rank=rank, positions=where, **how)


def turned(
    x: Float[Tensor, "row pos *axes"],
    factors: Float[Tensor, "row ..."],
    a: Float[Tensor, "d rank"],
    w: Float[Tensor, "rank d"],
    b: Float[Tensor, " rank"],
) -> Float[Tensor, "row pos *axes"]:
    """x + f R^T (W x + b - R x), with R the orthonormal factor of A."""
    flat = x.flatten(2)
    change = edited(flat, orthonormal(a).to(flat), w.to(flat), b.to(flat))
    return x + factors.to(x) * change.view_as(x)


def orthonormal(a: Float[Tensor, "d rank"]) -> Float[Tensor, "rank d"]:
    """The rows that Gram and Schmidt make of the columns of A: of all orthonormal factors that with a positive
    diagonal, which depends smoothly on A."""
    q, upper = torch.linalg.qr(a)
    return (q * torch.sign(upper.diagonal())).mT
