"""One prompt pair: the exact effect of every node, what each estimate says of it, and what each search finds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import mechattr as ma
from mechattr.evaluation import discovery, search
from mechattr.patching.drops import drops_of
from mechattr.patching.effects import Effects, Plan
from mechattr.patching.nodes import NodeTable, every_node
from mechattr.patching.places import places_of
from mechattr.patching.sets import Sets
from mechattr.patching.source import source_of
from mechattr.ranking import node_vector

KINDS = {"attention": ("q", "k", "v", "z"), "neurons": ("mlp_post",)}
ALPHAS = (0.1, 0.2, 0.25, 0.4)
CACHE = Path("out") / "localisation"
TOP = 10  # of recall
BACKWARD = 2  # forward passes that a backward pass counts as
CHECKED = {
    "AtP": "atp",
    "AtP+QK": "qk",
    "GradDrop": "graddrop",
    "AtP*": "star",
    "max(AtP+QK, AtP*)": "max",
    "two-point, α = 0.25": "two_point",
    "max(|c| + ½|d|, AtP*)": "hedged",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What one method is worth on one pair.

    Attributes:
        recall: by site, the share of the truly ten largest nodes among its first ten.
        relative: the inverse-rank-weighted relative cost of the order.
        with_setup: the same with the passes that the order took.
        worst: the largest relative cost at any k.
        passes: forward and backward passes that the order took.
    """

    recall: dict[str, float]
    relative: float
    with_setup: float
    worst: float
    passes: tuple[float, float]


def measure(model: Any, one: Any, kind: str, *, seed: int, searches: bool) -> tuple[int, dict[str, Found]]:
    """Every method on one pair: the number of nodes that differ between its prompts, and the results by method."""
    places = places_of(one, "aligned")
    table = every_node(model, KINDS[kind], places)
    sets = Sets(model, one, table, "aligned", "noising")
    kept = np.flatnonzero(sets.moved[0].numpy())
    effects = exact_effects(model, one, table)[kept]
    sites = np.array(table.sites)[_site_of(table)][kept]
    found = {}
    for name, (scores, passes) in estimates(model, one, table).items():
        found[name] = judge(search.by_order(discovery.order_of(scores[kept])), effects, sites, passes)
    if searches:
        budget = round(sum(np.array(passes) * (1, BACKWARD)))  # of the last estimate, which takes the most passes
        for name, result in run_searches(search.patch_of(sets, kept), len(kept), budget, seed).items():
            found[name] = judge(result, effects, sites, (float(result.setup), 0.0), costs=result.costs)
    return len(kept), found


def judge(
    result: search.Search,
    effects: np.ndarray,
    sites: np.ndarray,
    passes: tuple[float, float],
    costs: np.ndarray | None = None,
) -> Found:
    """An order against the exact effects; `costs` where the order was found while nodes were verified."""
    ranks = result.ranks
    alone = discovery.relative_cost(discovery.cost_curve(ranks, effects))
    setup = 0.0 if costs is not None else passes[0] + BACKWARD * passes[1]
    whole = discovery.relative_cost(discovery.cost_curve(ranks if costs is None else costs, effects, setup))
    recall = {}
    for site in dict.fromkeys(sites.tolist()):
        mine = sites == site
        recall[site] = discovery.recall_at(discovery.ranks_among(ranks, mine), effects[mine], TOP)
    return Found(
        recall=recall,
        relative=discovery.inverse_rank_weighted(alone),
        with_setup=discovery.inverse_rank_weighted(whole),
        worst=float(alone.max()),
        passes=passes,
    )


def exact_effects(model: Any, one: Any, table: NodeTable) -> np.ndarray:
    """[node]: measured one by one, and kept on disk."""
    path = CACHE / f"{one.hash()[:16]}-{table.hash()[:16]}-{str(model.fingerprint()['weight_hash'])[:16]}.npy"
    if path.exists():
        stored: np.ndarray = np.load(path)
        return stored
    exact = ma.activation_patching(model, one, sites=table.sites, positions="aligned", batch_size=64, progress=False)
    places = torch.arange(len(table), dtype=torch.float64)
    at = node_vector(
        {name.removeprefix("score/"): x for name, x in table.labelled(places, places).items() if "score" in name}
    )
    effects = np.empty(len(table))
    effects[at.long().numpy()] = node_vector(exact.signed).numpy()
    CACHE.mkdir(parents=True, exist_ok=True)
    np.save(path, effects)
    return effects


def estimates(model: Any, one: Any, table: NodeTable) -> dict[str, tuple[np.ndarray, tuple[float, float]]]:
    """By name: a score for each node, and the forward and backward passes of that estimate alone."""
    drops = drops_of(model.info, model.sites(), "block")
    plan = Plan.of(table.names, fixes=(False, True), drops=drops, alphas=ALPHAS)
    source, _ = source_of(model, one.corrupt, one.metric, plan.source, None).rows(range(1))
    seen = Effects(plan, model, one.clean, places_of(one, "aligned"), source).run(one.metric)

    def vector(effects: Any, fixed: bool) -> np.ndarray:
        key = {name: (name, fixed) if (name, fixed) in effects else (name, False) for name in table.names}
        return table.lookup({name: effects[key[name]] for name in table.names}, 1)[0].double().numpy()

    def passes(drop: bool, alpha: bool) -> tuple[float, float]:
        some = Plan.of(table.names, fixes=(True,), drops=drops if drop else (), alphas=ALPHAS[:alpha])
        forward, backward = some.passes
        return forward + 1, backward

    plain, fixed = np.abs(vector(seen.full, False)), vector(seen.full, True)
    star = vector(seen.dropped, True)
    moved = {alpha: vector(seen.moved[alpha], True) for alpha in ALPHAS}
    spread = np.abs(fixed) + np.abs(moved[0.25] - fixed) / 2
    two = {alpha: np.maximum(np.abs(fixed), np.abs(x)) for alpha, x in moved.items()}
    return {
        "AtP": (plain, passes(False, False)),
        "AtP+QK": (np.abs(fixed), passes(False, False)),
        "GradDrop": (vector(seen.dropped, False), passes(True, False)),
        "AtP*": (star, passes(True, False)),
        "max(AtP+QK, AtP*)": (np.maximum(np.abs(fixed), star), passes(True, False)),
        **{f"two-point, α = {alpha:g}": (score, passes(False, True)) for alpha, score in two.items()},
        "|c| + ½|d|": (spread, passes(False, True)),
        "max(two-point, AtP*)": (np.maximum(two[0.25], star), passes(True, True)),
        "max(|c| + ½|d|, AtP*)": (np.maximum(spread, star), passes(True, True)),
    }


def run_searches(patch: search.Patch, n_nodes: int, budget: int, seed: int) -> dict[str, search.Search]:
    """Orders without a gradient; `budget` is what the dearest estimate takes, in forward passes."""
    quarter = math.ceil(n_nodes / 4)
    return {
        "random": search.random_order(n_nodes, seed=seed),
        "subsampling, equal budget": search.subsampling(patch, n_nodes, n_sets=budget, p=0.1, seed=seed),
        "subsampling, N/4 sets": search.subsampling(patch, n_nodes, n_sets=quarter, p=0.03, seed=seed),
        "blocks of 20": search.blocks(patch, n_nodes, size=20),
        "hierarchical": search.hierarchical(patch, n_nodes),
    }


def check(model: Any, one: Any, kind: str) -> None:
    """The estimates taken apart here are those of `attribution_patching`.

    Raises:
        SystemExit: they differ by more than 1e-9 of the largest.
    """
    table = every_node(model, KINDS[kind], places_of(one, "aligned"))
    ours = estimates(model, one, table)
    for name, variant in CHECKED.items():
        theirs = ma.attribution_patching(
            model, one, sites=KINDS[kind], positions="aligned", variant=variant, progress=False
        )
        scores = torch.from_numpy(ours[name][0])
        mine = {key.removeprefix("score/"): x for key, x in table.labelled(scores, scores).items() if "score" in key}
        gap = float((node_vector(mine) - node_vector(theirs.scores)).abs().max())
        if gap > 1e-9 * float(scores.max()):
            raise SystemExit(f"{name} and variant {variant!r} differ by {gap:.1e}")


def _site_of(table: NodeTable) -> Sequence[int]:
    """For each node the index of its site."""
    found = np.empty(len(table), dtype=np.int64)
    for i, site in enumerate(table.sites):
        found[table.tables[site][2].numpy()] = i
    return found  # type: ignore[return-value]
