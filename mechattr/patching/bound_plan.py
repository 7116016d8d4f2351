"""What a bound on missed effects samples: its nodes and its number of samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

from mechattr.artifact import Attribution
from mechattr.errors import SettingError
from mechattr.models.base import HookedModel
from mechattr.patching.nodes import NodeTable, every_node, table_of
from mechattr.patching.places import Direction, Positions, direction_of, mode_of, node_sites, places_of
from mechattr.patching.verified import Verified, agreed, among, verified_of
from mechattr.sites import Node
from mechattr.tasks.task import Task

INCLUSIONS = 30  # expected inclusions of a node (in each pair where pairs are kept apart) within the default budget
LEAST = 4  # samples: two with a node and two without


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class BoundPlan:
    """What is known before anything runs.

    Attributes:
        sites: the short names of the nodes' sites.
        known: what was verified.
        way: which run is patched into which.
        mode: what positions mean.
        table: all nodes.
        done: which of them were verified.
        strata: groups of pairs whose statistics are kept apart.
        samples: how many are taken at most.
        needed: the passes of the default budget.
    """

    sites: tuple[str, ...]
    known: Verified
    way: Direction
    mode: Positions
    table: NodeTable
    done: Bool[Tensor, " node"]
    strata: int
    samples: int
    needed: int


def plan_of_bound(
    model: HookedModel,
    task: Task,
    *,
    verified: Attribution | Sequence[Node],
    sites: str | Sequence[str] | None,
    p: float,
    budget: int | None,
    confidence: float,
    per_pair: bool,
    target: float | None,
    control: bool,
    seed: int,
    direction: str | None,
    positions: Positions | None,
) -> BoundPlan:
    """Checks a call; arguments and errors are those of `missed_effect_bound`."""
    own = (3 if control else 2) * len(task)
    strata = len(task) if per_pair else 1
    _check(p, confidence, target, seed, budget, own)
    shorts = node_sites(model, sites)
    known = verified_of(model, task, verified, shorts, per_pair)
    way = direction_of(agreed("direction", direction, known.direction) or "noising")
    mode = mode_of(task, agreed("positions", positions, known.positions))
    table = every_node(model, shorts, places_of(task, mode))
    done = torch.zeros(len(table), dtype=torch.bool)
    if known.nodes:
        done = among(table, table_of(model, task, known.nodes, mode)[0])
    recommended = math.ceil(INCLUSIONS / p) * strata
    return BoundPlan(
        sites=shorts,
        known=known,
        way=way,
        mode=mode,
        table=table,
        done=done,
        strata=strata,
        samples=recommended if budget is None else budget - own,
        needed=own + recommended,
    )


def _check(p: float, confidence: float, target: float | None, seed: int, budget: int | None, own: int) -> None:
    for name, value, low, high in (
        ("p", p, 0.0, 1.0),
        ("confidence", confidence, 0.5, 1.0),
        ("target", target, 0.0, math.inf),
    ):
        if value is None and name == "target":
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not low < value < high:
            raise SettingError(f"{name}={value!r}", "it is out of range", f"give a number between {low:g} and {high:g}")
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise SettingError(f"seed={seed!r}", "no seed", "give a whole number from 0")
    if budget is None:
        return
    if isinstance(budget, bool) or not isinstance(budget, int) or budget < own + LEAST:
        found = f"{own} passes for the prompts themselves and at least {LEAST} samples are needed"
        raise SettingError(f"budget={budget!r}", found, f"give a whole number from {own + LEAST}, or None")
