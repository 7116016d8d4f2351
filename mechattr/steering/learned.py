"""Steering vectors that are trained: the direction that changes the log-probabilities of answers most."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mechattr.models.base import HookedModel
from mechattr.sites import Node
from mechattr.steering.data import Sites, chosen_sites, shape_at
from mechattr.steering.lesson import Lesson, Trainee
from mechattr.steering.made import made
from mechattr.steering.numbers import check_positive
from mechattr.steering.preference import Triples
from mechattr.steering.training import Schedule, descend
from mechattr.steering.vector import SteeringVector


def learned(
    model: HookedModel,
    triples: Triples,
    *,
    layers: Sequence[int] | None = None,
    sites: Sites = None,
    positions: str | Sequence[int] = "all",
    seed: int = 0,
    loss: str = "bidirectional",
    beta: float = 0.1,
    steps: int = 50,
    rate: float = 0.02,
    minibatch: int | None = None,
    max_norm: float | None = None,
    batch_size: int = 32,
    progress: bool | None = None,
) -> SteeringVector:
    r"""The vectors that a loss of answers is least for, by gradient descent from zero, with the model
    frozen.

    With the gain $g_d(y) = \log p_{dv}(y | x) - \log p(y | x)$ of an answer under $d$ times the vector, the losses of a
    triple are

    - `"bidirectional"`: the mean of $-\log \sigma(d \beta (g_d(y_+) - g_d(y_-)))$ over $d = 1$ and $d = -1$, so that
      the vector is of use forwards and backwards. (The published method draws one d a step.)
    - `"preference"`: the same for $d = 1$ only.
    - `"cross_entropy"`: $-\log p_v(y_+ | x)$; the other answer does not matter.

    Args:
        model: a causal language model.
        triples: (prompt, preferred answer, dispreferred answer); see `mechattr.steering.token_scores`.
        layers: blocks whose output (`resid_post`) is steered; or
        sites: sites by name, or nodes: then only their heads, neurons or streams are trained.
        positions: where vectors act while they are trained: `"all"`, the `"prompt"`, the `"generated"` tokens of the
            answer, the `"last"` one of the prompt, or position numbers (negative: from the prompt's end). `apply` has
            positions of its own.
        seed: of the choice of minibatches.
        loss: one of the three.
        beta: how fast the preference losses are satisfied.
        steps: of the optimiser.
        rate: the length of a first step, as a share of the mean length of the activations.
        minibatch: triples a step; by default all, so that nothing is drawn.
        max_norm: vectors that grow longer are brought back to this length after each step.
        batch_size: rows of a forward pass; halved when memory runs out. It does not change the result.
        progress: `None` shows a bar on a terminal only.

    Returns:
        The vector. Its settings have the loss of each step before it (`"losses"`), that of the model as it is
        (`"base_loss"`) and that at the end (`"loss_after"`), in nats.

    Raises:
        SettingError: triples, layers, positions or numbers that do not fit.
        UnknownNameError: no such loss.
        UnknownSiteError: a site that the model does not have.
        UnsupportedFeatureError: a model that does not predict next tokens.

    Cost:
        4 (`"bidirectional"`), 2 (`"preference"`) or 1 forward and backward passes a triple and step; 2 forward passes a
        triple before, and as many as in a step after.

    References:
        Cao, Zhang, Cao, Yin, Lin, Ma, Chen (2024), Personalized Steering of Large Language Models, arXiv 2406.00045.
    """
    schedule = Schedule(steps=steps, rate=rate, minibatch=minibatch, seed=seed)
    if max_norm is not None:
        check_positive("max_norm", max_norm)
    names = chosen_sites(model, layers, sites)
    lesson = Lesson(model, triples, names, positions=positions, loss=loss, beta=beta, batch_size=batch_size)
    kind = torch.promote_types(lesson.base.dtype, torch.float32)
    parts = _parts(model, names, sites)
    vectors = {n: torch.zeros(shape_at(model, n), dtype=kind, device=lesson.batch.device) for n in names}
    rates = {n: [rate * lesson.lengths[n] / float(part.sum()) ** 0.5] for n, part in parts.items()}

    def settle() -> None:
        for name, v in vectors.items():
            v *= parts[name].to(v)
            if max_norm is not None:
                v *= (max_norm / v.norm().clamp(min=torch.finfo(kind).tiny)).clamp(max=1)

    trainee = Trainee(shifted, {name: [v] for name, v in vectors.items()}, rates, reads=False, settle=settle)
    how = descend(lesson, trainee, schedule, progress=progress)
    where = positions if isinstance(positions, str) else list(positions)
    found = {name: v.cpu() for name, v in vectors.items()}
    return made(model, "learned", found, sites, positions=where, max_norm=max_norm, **how)


def shifted(x: Tensor, factors: Tensor, v: Tensor) -> Tensor:
    """x + f v."""
    return x + factors.to(x) * v.to(x)


def _parts(model: HookedModel, names: Sequence[str], sites: Sites) -> dict[str, Tensor]:
    """1 where numbers are trained, by full site name: everywhere, or at the heads, neurons or streams of nodes."""
    whole = SteeringVector.of({name: torch.ones(shape_at(model, name)) for name in names})
    nodes = sites is not None and not isinstance(sites, str) and any(isinstance(site, Node) for site in sites)
    kept = whole.only(sites) if nodes and sites is not None else whole
    return {name: kept.tensors[name].values for name in names}
