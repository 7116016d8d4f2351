"""Puts orders of nodes beside each other: which one finds the truly largest nodes soonest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from mechattr.artifact import Attribution
from mechattr.errors import EmptyTaskError, MismatchError, SettingError, UnknownNameError, nearest
from mechattr.evaluation import discovery, search
from mechattr.evaluation.comparison import Comparison
from mechattr.evaluation.search import Patch, Search
from mechattr.labelled import Labelled
from mechattr.models.base import HookedModel
from mechattr.patching.activation import activation_patching
from mechattr.patching.nodes import table_of
from mechattr.patching.places import direction_of
from mechattr.patching.sets import Sets
from mechattr.patching.settings import provenance_of
from mechattr.ranking import node_vector
from mechattr.sites import Node
from mechattr.tasks.task import Task

SEARCHES = ("random", "subsampling", "blocks", "hierarchical")
BACKWARD = 2  # forward passes that a backward pass counts as


def compare_orders(
    model: HookedModel,
    task: Task,
    methods: Mapping[str, Attribution | Sequence[Node]],
    *,
    exact: Attribution | None = None,
    searches: Sequence[str] = SEARCHES,
    n_sets: int | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> Comparison:
    r"""Judges orders of nodes by how soon they find the nodes that exact patching finds largest.

    $$\rho(k) = \frac1k \big(\text{setup} + \max_{j \le k} \text{cost of the truly } j\text{-th node}\big)$$

    Nodes whose activation is the same on both prompts of every pair are left out: no method has to look at them.

    Args:
        model: a hooked model.
        task: prompt pairs.
        methods: by name, the result of an estimate, ordered by score, or nodes in order; they must score every node
            that `exact` measured.
        exact: the true effects; measured here for the nodes of the first method unless given.
        searches: gradient-free orders to put beside, among `"random"`, `"subsampling"`, `"blocks"`, `"hierarchical"`.
        n_sets: random sets for subsampling; one for every ten nodes unless given.
        seed: of random orders and sets.
        batch_size: rows of a forward pass.
        progress: `None` shows a bar on a terminal only.

    Raises:
        UnknownNameError: no such search.
        SettingError: no method, or an order that names a node twice or not at all.
        MismatchError: results of another task, direction or kind of positions, or that lack nodes.
        EmptyTaskError: no node has an effect.

    Cost:
        Where `exact` is not given, that of `activation_patching`. For each pair 2 forward passes, and at most one for
        each set: `n_sets`, a block for every 20 nodes, and the tree of the hierarchical search (about a quarter as
        many sets as there are nodes).

    References:
        Kramár et al. 2024, arXiv:2403.00745, on the cost of verified recall.
    """
    unknown = [name for name in searches if name not in SEARCHES]
    if unknown:
        raise UnknownNameError(f"search {unknown[0]!r}", "no such search", nearest(unknown[0], SEARCHES))
    if set(methods) & set(searches):
        raise SettingError(
            "methods and searches", f"{min(set(methods) & set(searches))!r} in both", "rename the method"
        )
    if exact is None:
        exact = _measured(model, task, methods, batch_size, progress)
    nodes = exact.nodes()
    for name, result in methods.items():
        if isinstance(result, Attribution):
            _check(name, result, exact, task)
    _check("exact", exact, exact, task)
    table, mode = table_of(model, task, nodes, None)
    direction = direction_of(str(exact.settings["direction"]))
    sets = Sets(model, task, table, mode, direction, batch_size=batch_size)
    kept = np.flatnonzero(sets.moved.any(0).numpy())
    vector = node_vector(exact.scores).numpy()
    effects = vector[~np.isnan(vector)][kept]
    if not effects.any():
        raise EmptyTaskError("to compare orders", "no node has an effect", "use pairs that differ")
    ranks = {name: _ranks_of(name, result, nodes)[kept] for name, result in methods.items()}
    orders = {name: search.by_order(np.argsort(mine)) for name, mine in ranks.items()}
    setup = {name: _passes(result) / len(task) for name, result in methods.items()}
    patch = search.patch_of(sets, kept)
    for name in searches:
        orders[name] = _run(name, patch, len(kept), n_sets, seed)
        setup[name] = 0.0
    sites = [nodes[i].site for i in kept]
    coords = {"method": list(orders)}
    tensors = {
        "effect": Labelled(torch.from_numpy(effects), ("node",)),
        "rank": Labelled(torch.from_numpy(np.stack([o.ranks for o in orders.values()])), ("method", "node"), coords),
        "cost": Labelled(torch.from_numpy(np.stack([o.costs for o in orders.values()])), ("method", "node"), coords),
    }
    settings: dict[str, Any] = {
        "task": task.name,
        "task_hash": task.hash(),
        "direction": direction,
        "positions": mode,
        "n_pairs": len(task),
        "nodes": {site: sites.count(site) for site in dict.fromkeys(sites)},
        "n_trivial_zero": len(nodes) - len(kept),
        "setup": setup,
        "seed": seed,
    }
    return Comparison(tensors, settings=settings, provenance=provenance_of(model, task))


def _measured(
    model: HookedModel,
    task: Task,
    methods: Mapping[str, Attribution | Sequence[Node]],
    batch_size: int | None,
    progress: bool | None,
) -> Attribution:
    """The true effects of the nodes of the first result."""
    first = next((result for result in methods.values() if isinstance(result, Attribution)), None)
    if first is None:
        raise SettingError(
            "true effects", "neither exact= nor a result to compare", "give exact=activation_patching(...)"
        )
    direction = str(first.settings["direction"])
    return activation_patching(
        model, task, nodes=first.nodes(), direction=direction, batch_size=batch_size, progress=progress
    )


def _check(name: str, result: Attribution, exact: Attribution, task: Task) -> None:
    wanted = {"task_hash": task.hash(), **{key: exact.settings.get(key) for key in ("direction", "positions")}}
    for key, value in wanted.items():
        if result.settings.get(key) != value:
            raise MismatchError(
                f"to compare {name!r}",
                f"its {key} is {result.settings.get(key)!r}, not {value!r}",
                "use one task and setting",
            )


def _ranks_of(name: str, result: Attribution | Sequence[Node], nodes: Sequence[Node]) -> np.ndarray:
    """The rank that a method gives to each node of the exact result."""
    if isinstance(result, Attribution):
        vector, known = node_vector(result.scores), result.nodes()
        scores = dict(zip(known, vector[~vector.isnan()].tolist(), strict=True))
    else:
        known = list(result)
        if len(set(known)) != len(known):
            raise SettingError(f"order {name!r}", "a node that comes twice", "name each node once")
        scores = {node: -float(i) for i, node in enumerate(known)}
    missing = [node for node in nodes if node not in scores]
    if missing:
        raise MismatchError(
            f"to compare {name!r} with {len(nodes)} exact effects",
            f"no score of {missing[0]!r} ({len(missing)} missing)",
            "score every node that was measured",
        )
    return discovery.ranks_of(np.array([scores[node] for node in nodes]))


def _passes(result: Attribution | Sequence[Node]) -> float:
    if not isinstance(result, Attribution):
        return 0.0
    return result.passes.forward + BACKWARD * result.passes.backward


def _run(name: str, patch: Patch, n_nodes: int, n_sets: int | None, seed: int) -> Search:
    if name == "random":
        return search.random_order(n_nodes, seed=seed)
    if name == "subsampling":
        return search.subsampling(patch, n_nodes, n_sets=max(4, n_nodes // 10) if n_sets is None else n_sets, seed=seed)
    return search.blocks(patch, n_nodes) if name == "blocks" else search.hierarchical(patch, n_nodes)
