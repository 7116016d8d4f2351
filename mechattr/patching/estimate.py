"""What a method would cost: passes from shapes, and memory from the method's own first steps on a short prompt."""

from __future__ import annotations

import inspect
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch

from mechattr.errors import SettingError, UnknownNameError, nearest
from mechattr.methods import METHODS as ROWS
from mechattr.models.base import Batch, HookedModel
from mechattr.patching.ablation import KINDS
from mechattr.patching.attribution import PAIRS_AT_ONCE as PAIRS_OF_GRADIENTS
from mechattr.patching.cost import Estimate
from mechattr.patching.edges import METHODS as EDGE_METHODS
from mechattr.patching.edges import EdgeSums, fitting, path_of
from mechattr.patching.effects import plan_of
from mechattr.patching.graph import Graph, check_additive
from mechattr.patching.interventions import PAIRS_AT_ONCE, rows_of, share_of
from mechattr.patching.nodes import table_of
from mechattr.patching.places import (
    Positions,
    base_and_source,
    check_call,
    direction_of,
    feature_of,
    mode_of,
    node_sites,
    places_of,
    rows_at_once,
    taken_at,
)
from mechattr.patching.probe import Sizes, probe, probe_edges
from mechattr.patching.source import shape_of, source_of
from mechattr.sites import SITES, Node, full_name, parse
from mechattr.tasks.task import Task


def estimate(model: HookedModel, task: Task, method: str, /, **settings: Any) -> Estimate:
    """What a method would cost on a task; the settings are those of the method.

    Passes. Those of `attribution_patching` and `edge_attribution` are exact. Those of the others are an upper bound:
    interventions that change nothing are not run, which is known only once both prompts were recorded. It is reached
    when every activation differs.

    Memory. The method takes its first steps on a few made-up prompts of about ten tokens, whose numbers are primes;
    every tensor that comes and goes on the way is noted with the powers of these primes in its size, and the same
    course is played again at the sizes of the task. What is counted so is what torch allocates besides the weights, on
    all devices together: activations, what autograd keeps, logits, tables, temporary tensors. Not counted are buffers
    inside of a kernel, what the allocator does not give back, and in sweeps tensors by the number of interventions
    that change nothing.

    Args:
        model: a hooked model.
        task: prompt pairs.
        method: one of `METHODS` of this module.
        **settings: keywords of the method, such as `variant`, `checkpoint` or `batch_size`, with its defaults.

    Raises:
        UnknownNameError: a method that is not estimated, and what the method itself refuses by name.
        SettingError: a keyword that the method does not have, and what the method itself refuses.
        UnsupportedFeatureError: prompts with images or with an encoder's side, and what the method itself refuses.
        UnknownSiteError, AlignmentError, EmptyTaskError, MismatchError: as the method raises them.

    Cost:
        The passes of one pair or of five to seven, on prompts of about ten tokens: a sweep stops after its first run.
    """
    if method not in METHODS:
        found = "no such method" if method not in ROWS else "its cost is known only on the way"
        raise UnknownNameError(f"to estimate method {method!r}", found, nearest(method, METHODS))
    module, _, name = ROWS[method].function.partition(":")
    signature = inspect.signature(getattr(import_module(module), name))
    unknown = [name for name in settings if name not in signature.parameters]
    if unknown:
        fix = nearest(unknown[0], list(signature.parameters)[2:])
        raise SettingError(f"{unknown[0]}= for {method}", "the method has no such setting", fix)
    check_call(f"a call to estimate {method}", model, task)
    bound = signature.bind(model, task, **settings)
    bound.apply_defaults()
    return _OUTLINES[method](model, task, bound.arguments)


# -- sweeps


def _sweep(
    model: HookedModel,
    task: Task,
    method: str,
    given: Mapping[str, Any],
    *,
    base: Batch,
    nodes: _Nodes,
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
    memory = _Memory(model, base.tokens.shape[1])
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


def _activation(model: HookedModel, task: Task, given: Mapping[str, Any]) -> Estimate:
    base, other = base_and_source(task, direction_of(given["direction"]))
    nodes = _Nodes.of(model, task, given)
    runs = 1 + source_of(model, other, task.metric, nodes.names, given["source"]).forward
    return _sweep(model, task, "activation_patching", given, base=base, nodes=nodes, runs=runs, settings=["direction"])


def _ablation(model: HookedModel, task: Task, given: Mapping[str, Any]) -> Estimate:
    kind, nodes = given["kind"], _Nodes.of(model, task, given)
    if kind not in KINDS:
        raise UnknownNameError(f"ablation of kind {kind!r}", "no such kind", nearest(str(kind), KINDS))
    reference = task if given["reference"] is None else given["reference"]
    spent = {"zero": 0, "resample": len(task), "mean": len(reference)}[kind]
    runs = 1 + spent / len(task)
    how: dict[str, Any] = {"two": False, "settings": ["kind"]}
    return _sweep(model, task, "ablation", given, base=task.clean, nodes=nodes, runs=runs, **how)


def _tracing(model: HookedModel, task: Task, given: Mapping[str, Any]) -> Estimate:
    base = task.clean.rows([i for i in range(len(task)) for _ in range(given["samples"])])
    nodes = _Nodes.of(model, task, {**given, "nodes": None})
    how: dict[str, Any] = {"reach": given["window"] // 2, "settings": ["window", "samples"]}
    return _sweep(model, task, "causal_tracing", {**given, "samples": 1}, base=base, nodes=nodes, runs=2, **how)


# -- gradients


def _attribution(model: HookedModel, task: Task, given: Mapping[str, Any]) -> Estimate:
    _, other = base_and_source(task, direction_of(given["direction"]))
    nodes = _Nodes.of(model, task, {**given, "nodes": None})
    plan = plan_of(
        model, nodes.names, given["variant"], given["unit"], given["rules"], checkpoint=bool(given["checkpoint"])
    )
    source = source_of(model, other, task.metric, plan.source, given["source"])
    pairs = min(len(task), rows_at_once(given["batch_size"], PAIRS_OF_GRADIENTS))
    columns = task.clean.tokens.shape[1]
    forward, backward = plan.passes
    recorded = _Memory(model, columns).recorded(plan.source, pairs)
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


def _edges(model: HookedModel, task: Task, given: Mapping[str, Any]) -> Estimate:
    if given["method"] not in EDGE_METHODS:
        shown = f"method {given['method']!r}"
        raise UnknownNameError(shown, "no such method of edge attribution", nearest(given["method"], EDGE_METHODS))
    direction_of(given["direction"])
    path = path_of(given["method"], given["rule"], given["steps"])
    check_additive(model.info)
    places_of(task, "all")
    checkpoint = bool(given["checkpoint"])
    pairs = min(len(task), rows_at_once(given["batch_size"], fitting(model, task, len(path))))
    columns, graph = task.clean.tokens.shape[1], Graph.of(model.info)

    def make(graph: Graph) -> EdgeSums:
        return EdgeSums(model, graph, path, given["rules"], checkpoint=checkpoint)

    recorded = 2 * _Memory(model, columns).recorded(graph.written, pairs)
    peak = probe_edges(model, task, Sizes(pairs=pairs, rows=pairs, columns=columns), make)
    forward = len({0.0, 1.0, *path}) + (len(path) if checkpoint else 0)
    return Estimate(
        method="edge_attribution",
        forward=float(len(task) * forward),
        backward=float(len(task) * len(path)),
        nodes=graph.n_edges,
        recorded=recorded,
        working=max(0, peak - recorded),
        at_most=False,
    )


_OUTLINES: Mapping[str, Callable[[HookedModel, Task, Mapping[str, Any]], Estimate]] = {
    "activation_patching": _activation,
    "attribution_patching": _attribution,
    "ablation": _ablation,
    "causal_tracing": _tracing,
    "edge_attribution": _edges,
}
METHODS = tuple(_OUTLINES)


# -- nodes and their memory


@dataclass(frozen=True, slots=True, kw_only=True)
class _Nodes:
    """The nodes of a call.

    Attributes:
        shorts: the short names of their sites.
        names: the full names at which they are taken.
        counts: their number by layer (`None`: outside the blocks).
        numbers: how many nodes a place has, by layer and together.
        mode: what positions mean.
    """

    shorts: tuple[str, ...]
    names: tuple[str, ...]
    counts: Counter[int | None]
    numbers: tuple[int, ...]
    mode: Positions

    @classmethod
    def of(cls, model: HookedModel, task: Task, given: Mapping[str, Any]) -> _Nodes:
        """Of given nodes, or of all nodes of given sites."""
        nodes: Sequence[Node] | None = given["nodes"]
        if nodes is not None:
            table, mode = table_of(model, task, nodes, given["positions"])
            counts = Counter({layer: len(table.of_layer(layer)) for layer in table.layers})
            return cls(shorts=table.sites, names=table.names, counts=counts, numbers=(len(table),), mode=mode)
        mode = mode_of(task, given["positions"])
        places = max(1, len(places_of(task, mode).labels))
        shorts = node_sites(model, given["sites"])
        taken = [name for short in shorts for name in taken_at(model, short)]
        counts = Counter()
        for name in taken:
            short, layer = parse(name)
            feature, shape = feature_of(short), shape_of(name, model.info, 1, 1)
            counts[layer] += places * (1 if feature is None else shape[SITES[short].axes.index(feature)])
        numbers = [n // places for n in (*counts.values(), counts.total())]
        return cls(
            shorts=shorts, names=tuple(dict.fromkeys(taken)), counts=counts, numbers=(*numbers, len(taken)), mode=mode
        )


class _Memory:
    """Bytes of activations, for prompts of one padded length."""

    def __init__(self, model: HookedModel, columns: int) -> None:
        self.info, self.columns = model.info, columns
        self.width = getattr(torch, model.info.dtype).itemsize

    def recorded(self, names: Iterable[str], rows: int) -> int:
        """Of some sites; the scales of norms are float32 or wider."""
        total = 0
        for name in names:
            width = max(4, self.width) if parse(name)[0].endswith("_scale") else self.width
            total += width * math.prod(shape_of(name, self.info, rows, self.columns))
        return total
