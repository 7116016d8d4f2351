"""What the methods that score nodes would cost: passes from shapes, and memory from their own first steps.

Each function has the name of its method, and takes the method's arguments as a mapping.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from mechattr.engines.memory import PRIMES
from mechattr.errors import UnknownNameError, nearest
from mechattr.models.base import Batch, HookedModel
from mechattr.patching.ablation import KINDS
from mechattr.patching.attribution import PAIRS_AT_ONCE as PAIRS_OF_GRADIENTS
from mechattr.patching.bound_plan import plan_of_bound
from mechattr.patching.cost import Estimate
from mechattr.patching.effects import plan_of
from mechattr.patching.interventions import PAIRS_AT_ONCE, rows_of, share_of
from mechattr.patching.node_counts import Memory, Nodes
from mechattr.patching.path import paths_of
from mechattr.patching.places import base_and_source, direction_of, rows_at_once
from mechattr.patching.probe import Sizes, probe, probe_sets
from mechattr.patching.sampling import CHUNK
from mechattr.patching.source import source_of
from mechattr.sites import Node, full_name
from mechattr.tasks.task import Task


def _sweep(
    model: HookedModel,
    task: Task,
    method: str,
    given: Mapping[str, Any],
    *,
    base: Batch,
    nodes: Nodes,
    runs: float,
    reach: int = 0,
    two: bool = True,
    settings: Sequence[str] = (),
) -> Estimate:
    """Of one run for each node: `runs` of each pair before, and two recordings or one of them."""
    info = model.info
    rows = rows_of(base, given["batch_size"])
    pairs = min(len(base), rows, PAIRS_AT_ONCE)
    lowest = {layer: None if layer is None else max(0, layer - reach) for layer in nodes.counts}
    most = min(rows, pairs * max(nodes.counts.values()))
    each = sum(n * share_of(lowest[layer], info.n_layers) for layer, n in nodes.counts.items())
    stream = [full_name("resid_pre", layer) for layer in lowest.values() if layer is not None]
    memory = Memory(model, base.tokens.shape[1])
    recorded = memory.recorded({*stream, *nodes.names}, pairs) + (memory.recorded(nodes.names, pairs) if two else 0)
    sites = tuple(dict.fromkeys(nodes.shorts))
    peak = probe(
        model,
        task,
        method,
        Sizes(pairs=pairs, rows=most, columns=base.tokens.shape[1]),
        {"sites": sites, **{name: given[name] for name in settings}},
        positions=nodes.mode,
        numbers=nodes.numbers,
        runs=3 if two else 2,
    )
    return Estimate(
        method=method,
        forward=len(base) * (runs + each),
        backward=0.0,
        nodes=nodes.counts.total(),
        recorded=recorded,
        working=max(0, peak - recorded),
        at_most=True,
    )


def activation_patching(model: HookedModel, task: Task, given: Mapping[str, Any]) -> Estimate:
    base, other = base_and_source(task, direction_of(given["direction"]))
    nodes = Nodes.of(model, task, given)
    runs = 1 + source_of(model, other, task.metric, nodes.names, given["source"]).forward
    return _sweep(model, task, "activation_patching", given, base=base, nodes=nodes, runs=runs, settings=["direction"])


def ablation(model: HookedModel, task: Task, given: Mapping[str, Any]) -> Estimate:
    kind, nodes = given["kind"], Nodes.of(model, task, given)
    if kind not in KINDS:
        raise UnknownNameError(f"ablation of kind {kind!r}", "no such kind", nearest(str(kind), KINDS))
    reference = task if given["reference"] is None else given["reference"]
    spent = {"zero": 0, "resample": len(task), "mean": len(reference)}[kind]
    runs = 1 + spent / len(task)
    how: dict[str, Any] = {"two": False, "settings": ["kind"]}
    return _sweep(model, task, "ablation", given, base=task.clean, nodes=nodes, runs=runs, **how)


def causal_tracing(model: HookedModel, task: Task, given: Mapping[str, Any]) -> Estimate:
    base = task.clean.rows([i for i in range(len(task)) for _ in range(given["samples"])])
    nodes = Nodes.of(model, task, {**given, "nodes": None})
    how: dict[str, Any] = {"reach": given["window"] // 2, "settings": ["window", "samples"]}
    return _sweep(model, task, "causal_tracing", {**given, "samples": 1}, base=base, nodes=nodes, runs=2, **how)


def attribution_patching(model: HookedModel, task: Task, given: Mapping[str, Any]) -> Estimate:
    _, other = base_and_source(task, direction_of(given["direction"]))
    nodes = Nodes.of(model, task, {**given, "nodes": None})
    plan = plan_of(
        model, nodes.names, given["variant"], given["unit"], given["rules"], checkpoint=bool(given["checkpoint"])
    )
    source = source_of(model, other, task.metric, plan.source, given["source"])
    pairs = min(len(task), rows_at_once(given["batch_size"], PAIRS_OF_GRADIENTS))
    columns = task.clean.tokens.shape[1]
    forward, backward = plan.passes
    recorded = Memory(model, columns).recorded(plan.source, pairs)
    names = ("variant", "unit", "direction", "rules", "checkpoint")
    peak = probe(
        model,
        task,
        "attribution_patching",
        Sizes(pairs=pairs, rows=pairs, columns=columns),
        {"sites": tuple(dict.fromkeys(nodes.shorts)), **{name: given[name] for name in names}},
        positions=nodes.mode,
        numbers=nodes.numbers,
    )
    return Estimate(
        method="attribution_patching",
        forward=len(task) * (forward + source.forward),
        backward=len(task) * backward,
        nodes=nodes.counts.total(),
        recorded=recorded,
        working=max(0, peak - recorded),
        at_most=False,
    )


def path_patching(model: HookedModel, task: Task, given: Mapping[str, Any]) -> Estimate:
    """Two runs for each sender, from its block and from that of the lowest receiver that it reaches."""
    receivers, senders, mlps = given["receivers"], given["senders"], given["mlps"]
    way = direction_of(given["direction"])
    run, mode = paths_of(model, task, receivers, senders, mlps, way, given["positions"], given["batch_size"])
    table, n = run.table, model.info.n_layers
    counts = {layer: int(run.reach.any(1)[table.name[table.of_layer(layer)]].sum()) for layer in table.layers}
    each = sum(
        count * (share_of(layer, n) + share_of(run.landing(layer), n)) for layer, count in counts.items() if count
    )
    pairs = min(len(task), run.rows, PAIRS_AT_ONCE)
    most = min(run.rows, pairs * max(1, *counts.values()))
    memory = Memory(model, task.clean.tokens.shape[1])
    kept = {*(full_name("resid_pre", layer) for layer in range(n)), *run.frozen_sites, *table.names}
    recorded = memory.recorded(kept, pairs) + memory.recorded(table.names, pairs)
    # at positions that the made-up prompts have, too
    short = {"receivers": [_early(node) for node in run.to.nodes]}
    if senders is not None:
        short["senders"] = [_early(node) for node in senders]
    peak = probe(
        model,
        task,
        "path_patching",
        Sizes(pairs=pairs, rows=most, columns=memory.columns),
        {**short, "mlps": mlps, "direction": way},
        positions=mode,
        numbers=(*counts.values(), len(table)),
        runs=3,
    )
    return Estimate(
        method="path_patching",
        forward=float(len(task) * (2 + each)),
        backward=0.0,
        nodes=len(table),
        recorded=recorded,
        working=max(0, peak - recorded),
        at_most=True,
    )


def _early(node: Node) -> Node:
    return replace(node, pos=node.pos % PRIMES[0]) if isinstance(node.pos, int) else node


def missed_effect_bound(model: HookedModel, task: Task, given: Mapping[str, Any]) -> Estimate:
    """Both prompts of all pairs, gradients of a few at a time, and samples that are rows of a batch."""
    plan = plan_of_bound(**{name: given[name] for name in inspect.signature(plan_of_bound).parameters})
    nodes = Nodes.of(model, task, {"nodes": None, "sites": plan.sites, "positions": plan.mode})
    columns = task.clean.tokens.shape[1]
    rows = min(rows_of(task.clean, given["batch_size"]), CHUNK, plan.samples)
    sizes = Sizes(pairs=len(task), rows=rows, columns=columns)
    peak = probe_sets(model, task, sizes, plan, given, nodes.numbers)
    stream = [full_name("resid_pre", layer) for layer in nodes.counts if layer is not None]
    recorded = Memory(model, columns).recorded([*stream, *nodes.names], len(task))
    runs = 3 if given["control"] else 2
    return Estimate(
        method="missed_effect_bound",
        forward=float(runs * len(task) + plan.samples),
        backward=float(len(task) if given["control"] else 0),
        nodes=len(plan.table) - int(plan.done.sum()),
        recorded=recorded,
        working=max(0, peak - recorded),
        at_most=True,
    )
