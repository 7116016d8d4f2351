"""Fitting a condition: which direction, site, comparator and threshold tell two kinds of prompts apart."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mechattr.errors import SettingError, UnknownNameError, nearest
from mechattr.models.base import HookedModel
from mechattr.provenance import provenance
from mechattr.steering.builders import mean_difference
from mechattr.steering.conditions import COMPARATORS, SIMILARITIES, Condition
from mechattr.steering.data import Sites, check_pairs, sides
from mechattr.steering.made import Pairs
from mechattr.steering.numbers import check_share
from mechattr.steering.vector import SteeringVector


@dataclass(frozen=True, slots=True)
class Cut:
    """A place to cut the similarities of two kinds of prompts.

    Attributes:
        f1: of opening for positive prompts alone.
        gap: from the threshold to the nearest similarity, in standard deviations of all similarities.
        threshold, comparator: see `Condition`.
        site: where they were found.
    """

    f1: float
    gap: float
    threshold: float
    comparator: str
    site: str = ""


def condition(
    model: HookedModel,
    pairs: Pairs,
    *,
    layers: Sequence[int] | None = None,
    sites: Sites = None,
    positions: str | int = "last",
    seed: int = 0,
    batch_size: int = 16,
    builder: Callable[..., SteeringVector] = mean_difference,
    similarity: str = "cosine",
    thresholds: Sequence[float] | None = None,
    held_out: float = 0.2,
) -> Condition:
    r"""A condition that opens for prompts like the positive ones: the site, comparator and threshold with the largest
    F1 = 2 TP / (2 TP + FP + FN) on the pairs that are not held out. Of equal ones it is that with the widest gap
    between the two kinds, in standard deviations of the similarities.

    Args:
        model, layers, sites, seed, batch_size: as for `mechattr.steering.mean_difference`; each site is a candidate.
        pairs: (prompt that opens the gate, prompt that does not).
        positions: what is read, and what the builder reads: the `"last"` token, the `"mean"` of all, or one position.
        builder: what makes the direction, from the pairs that are not held out.
        similarity: `"cosine"`, `"projection"`, or `"tanh"`, the published cos(h, tanh(P h)), which does not see the
            sign of h; see `mechattr.steering.conditions`.
        thresholds: candidates, such as the published grid `[k / 100 for k in range(101)]`; by default all midpoints
            between neighbouring similarities, which give every decision that there is.
        held_out: the share of pairs that only judge the choice: `settings["held_out_f1"]`.

    Raises:
        SettingError: fewer than 3 pairs, layers, positions or numbers that do not fit, or pairs that give no direction
            at any site, or no two similarities.
        UnknownNameError: no such similarity.
        UnknownSiteError: a site that the model does not have.

    Cost:
        The builder, and 2 forward passes a pair; memory for two numbers a pair and site.

    References:
        Lee et al. (2024), Programming Refusal with Conditional Activation Steering, arXiv 2409.05907.
    """
    if similarity not in SIMILARITIES:
        raise UnknownNameError(f"similarity={similarity!r}", "no such name", nearest(str(similarity), SIMILARITIES))
    check_share("held_out", held_out)
    if thresholds is not None:
        numbers = [] if isinstance(thresholds, str) else list(thresholds)
        if not numbers or not all(isinstance(x, int | float) and math.isfinite(x) for x in numbers):
            raise SettingError(f"thresholds={thresholds!r:.60}", "no finite numbers", "give some, or leave them out")
    if not callable(builder):
        fix = "give a function such as mechattr.steering.mean_difference"
        raise SettingError(f"builder={builder!r:.60}", f"a {type(builder).__name__}", fix)
    given = check_pairs(pairs)
    n = len(given)
    if n < 3:
        raise SettingError("pairs", f"{n}", "give at least 3: some are held out")
    kept = min(n - 1, max(1, round(held_out * n)))
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()
    test, train = order[:kept], order[kept:]
    reads: dict[str, Any] = {"positions": positions, "batch_size": batch_size}
    vector = builder(model, [given[i] for i in train], layers=layers, sites=sites, seed=seed, **reads)
    found = _similarities(model, given, vector, similarity, **reads)
    cuts = [replace(cut, site=name) for name, x in found.items() for cut in _cuts(x[0, train], x[1, train], thresholds)]
    if not cuts:
        fix = "give pairs that differ at these sites"
        raise SettingError("a condition", f"no direction or no two similarities at {', '.join(vector.sites)}", fix)
    best = max(cuts, key=lambda cut: (cut.f1, cut.gap))
    judged = found[best.site][:, test]
    return Condition.of(
        best.site,
        vector.tensors[best.site].values,
        best.threshold,
        comparator=best.comparator,
        similarity=similarity,
        positions=positions,
        settings={
            "method": "condition", "seed": seed, "n_pairs": n, "held_out": held_out, "n_held_out": kept,
            "direction": vector.settings.get("method"), "f1": best.f1, "gap": best.gap,
            "held_out_f1": float(_f1(judged[0], judged[1], best.threshold, best.comparator)),
            "candidates": [asdict(cut) for cut in cuts],
        },
        provenance=provenance({**asdict(model.info), **model.fingerprint()}, seed=seed),
    )  # fmt: skip


def _similarities(
    model: HookedModel, pairs: Pairs, vector: SteeringVector, similarity: str, **reads: Any
) -> dict[str, Float[Tensor, "2 pair"]]:
    """The similarities of both sides at each site with a direction."""
    directions = {name: table.values.double().flatten() for name, table in vector.tensors.items()}
    directions = {name: c for name, c in directions.items() if bool(c.any())}
    found: dict[str, list[Tensor]] = {name: [] for name in directions}
    for part in sides(model, pairs, list(directions), **reads):
        for side in part:
            c = directions[side.site]
            both = (SIMILARITIES[similarity](x.to(c), c) for x in (side.positive, side.negative))
            found[side.site].append(torch.stack(tuple(both)).cpu())
    return {name: torch.cat(parts, 1) for name, parts in found.items()}


def _cuts(
    positive: Float[Tensor, " pair"], negative: Float[Tensor, " pair"], thresholds: Sequence[float] | None
) -> list[Cut]:
    """The best cut of each comparator."""
    every = torch.cat([positive, negative])
    values = every.unique()
    given = (values[1:] + values[:-1]) / 2 if thresholds is None else torch.as_tensor(thresholds, dtype=values.dtype)
    if not len(given) or len(values) < 2:
        return []
    after = torch.searchsorted(values, given).clamp(1, len(values) - 1)
    gaps = torch.minimum((given - values[after - 1]).abs(), (values[after] - given).abs()) / every.std()
    cuts = []
    for comparator in COMPARATORS:
        f1 = _f1(positive, negative, given, comparator)
        best = max(range(len(given)), key=lambda i, f1=f1: (float(f1[i]), float(gaps[i])))  # type: ignore[misc]
        cuts.append(Cut(float(f1[best]), float(gaps[best]), float(given[best]), comparator))
    return cuts


def _f1(
    positive: Float[Tensor, " pair"], negative: Float[Tensor, " pair"], threshold: Tensor | float, comparator: str
) -> Tensor:
    """F1 at each threshold: 2 TP / (2 TP + FP + FN)."""
    sign = 1.0 if comparator == "above" else -1.0
    given = torch.as_tensor(threshold, dtype=positive.dtype)
    hits, false = (
        len(x) - torch.searchsorted((sign * x).sort().values, sign * given, right=True) for x in (positive, negative)
    )
    return 2 * hits.double() / (hits + false + len(positive))
