"""Steering vectors from linear classifiers: of whole activations, and of the heads that tell the two sides best."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mechattr.errors import SettingError, UnknownNameError, nearest
from mechattr.models.base import HookedModel
from mechattr.sites import expand, parse, site_spec
from mechattr.steering.data import Sides, Sites, check_pairs, chosen_sites, collected, nodes_of, shape_at
from mechattr.steering.made import Pairs, made
from mechattr.steering.numbers import check_count, check_positive, check_share
from mechattr.steering.vector import SteeringVector

DIRECTIONS = ("mass_mean", "probe")


def probe(
    model: HookedModel,
    pairs: Pairs,
    *,
    layers: Sequence[int] | None = None,
    sites: Sites = None,
    positions: str | int = "last",
    seed: int = 0,
    batch_size: int = 16,
    penalty: float = 1e-2,
) -> SteeringVector:
    r"""The normal w of the logistic regression that tells h(positive) from h(negative), both about their pair's
    midpoint and without intercept: the minimum of $\tfrac1n \sum_i \log(1 + e^{-w \cdot d_i}) + \tfrac\lambda2 |w|^2$
    over the n differences d, in units of their root mean square. Its length is that of the mean difference along it.

    Args:
        model, pairs, layers, sites, positions, seed, batch_size: as for `mechattr.steering.mean_difference`.
        penalty: lambda. The larger it is, the closer is w to the mean difference.

    Raises:
        SettingError: pairs, layers, positions or a penalty that do not fit.
        UnknownSiteError: a site that the model does not have.

    Cost:
        2 forward passes a pair; memory for one vector a pair and site.
    """
    check_positive("penalty", penalty)
    found = collected(model, pairs, chosen_sites(model, layers, sites), positions, batch_size)
    directions, lengths = {}, {}
    for name, side in found.items():
        d = side.positive.double() - side.negative.double()
        w = _normal(torch.cat([d, -d]), len(d), penalty, intercept=False)[0]
        directions[name] = w * (w @ d.mean(0))
        lengths[name] = _length(side)
    more: dict[str, Any] = {"n_pairs": len(d), "lengths": lengths, "penalty": penalty}
    return made(model, "probe", directions, sites, seed, positions=positions, **more)


def iti(
    model: HookedModel,
    pairs: Pairs,
    *,
    layers: Sequence[int] | None = None,
    sites: Sites = None,
    positions: str | int = "last",
    seed: int = 0,
    batch_size: int = 16,
    heads: int = 48,
    held_out: float = 0.2,
    direction: str = "mass_mean",
) -> SteeringVector:
    """Inference-time intervention: a direction in the output `z` of the heads whose logistic probes tell the two sides
    best on held-out pairs, with the length of one standard deviation of the activations along it.

    Args:
        model, pairs, positions, batch_size: as for `mechattr.steering.mean_difference`.
        layers: layers whose heads are candidates; or
        sites: `"z"`, full names of it, or nodes: the heads that are candidates.
        seed: of the choice of held-out pairs.
        heads: how many are steered (all candidates, where there are fewer).
        held_out: the share of pairs on which probes are judged.
        direction: `"mass_mean"`, the difference of the two sides' means, or `"probe"`, the probe's normal.

    Raises:
        SettingError: fewer than 3 pairs, numbers, layers or positions that do not fit, or other sites than of heads.
        UnknownNameError: no such direction.
        UnknownSiteError: a site that the model does not have.

    Cost:
        2 forward passes a pair; memory for one vector a pair and site, and a probe a head.

    References:
        Li, Patel, Viegas, Pfister, Wattenberg (2023), Inference-Time Intervention, arXiv 2306.03341.
    """
    if direction not in DIRECTIONS:
        raise UnknownNameError(f"direction={direction!r}", "no such direction", nearest(str(direction), DIRECTIONS))
    check_count("heads", heads)
    check_share("held_out", held_out)
    names = chosen_sites(model, layers, sites)
    if layers is not None:
        names = expand("z", model.sites(), layers=[layer for _, layer in map(parse, names) if layer is not None])
    foreign = next((name for name in names if "head" not in site_spec(name).axes), None)
    if foreign is not None:
        raise SettingError(f"heads at {foreign}", "it has none", "use sites='z', or layers=")
    n = len(check_pairs(pairs))
    kept = min(n - 1, max(1, round(held_out * n)))
    if n < 3:
        raise SettingError("pairs", f"{n}", "give at least 3: some are held out")
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    test, train = order[:kept], order[kept:]
    found = collected(model, pairs, names, positions, batch_size)
    allowed = _heads(model, names, sites)
    scored = []
    for name, head in allowed:
        positive, negative = (x.reshape(n, *shape_at(model, name))[:, head].double() for x in _both(found[name]))
        w, b = _normal(torch.cat([positive[train], negative[train]]), len(train), 1e-2, intercept=True)
        right = torch.cat([positive[test] @ w + b > 0, negative[test] @ w + b <= 0]).double().mean()
        v = w if direction == "probe" else (positive - negative).mean(0)
        v = v / v.norm().clamp(min=torch.finfo(v.dtype).tiny)
        spread = (torch.cat([positive, negative]) @ v).std(correction=0)
        scored.append((float(right), name, head, spread * v))
    best = sorted(scored, key=lambda one: -one[0])[:heads]
    directions = {name: torch.zeros(shape_at(model, name), dtype=torch.float64) for _, name, *_ in best}
    for _, name, head, v in best:
        directions[name][head] = v
    chosen = [{"layer": parse(name)[1], "head": head, "accuracy": right} for right, name, head, _ in best]
    return made(
        model, "iti", directions, None, seed, positions=positions, n_pairs=n, heads=chosen, direction=direction,
        held_out=held_out, lengths={name: _length(found[name]) for name in directions},
    )  # fmt: skip


def _heads(model: HookedModel, names: Sequence[str], sites: Sites) -> list[tuple[str, int]]:
    """The candidates: every head, or those of nodes."""
    nodes = nodes_of(sites)
    wanted = {(node.site, node.layer, node.head) for node in nodes}
    every = [(name, head) for name in names for head in range(shape_at(model, name)[0])]
    return [(n, h) for n, h in every if not nodes or (*parse(n), h) in wanted or (*parse(n), None) in wanted]


def _both(side: Sides) -> tuple[Tensor, Tensor]:
    return side.positive, side.negative


def _length(side: Sides) -> float:
    return float(torch.cat(_both(side)).norm(dim=-1).mean())


def _normal(
    x: Float[Tensor, "row d"], n_positive: int, penalty: float, *, intercept: bool
) -> tuple[Float[Tensor, " d"], float]:
    """The unit normal and the offset of a logistic regression whose first rows are positive; its penalty is on the mean
    loss, in units of the rows' root mean square."""
    from sklearn.linear_model import LogisticRegression

    scale = float(x.square().sum(1).mean().sqrt().clamp(min=torch.finfo(x.dtype).tiny))
    labels = np.arange(len(x)) < n_positive
    fitted = LogisticRegression(C=1 / (len(x) * penalty), fit_intercept=intercept, max_iter=1000)
    fitted.fit((x / scale).numpy(), labels)
    w = torch.from_numpy(np.asarray(fitted.coef_[0], dtype=np.float64))
    length = w.norm().clamp(min=torch.finfo(w.dtype).tiny)
    return w / length, float(fitted.intercept_[0]) * scale / float(length) if intercept else 0.0
