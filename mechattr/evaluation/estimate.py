"""What a method would cost: passes from shapes, and memory from the method's own first steps on a short prompt."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from torch import Tensor

from mechattr.errors import SettingError, UnknownNameError, nearest
from mechattr.evaluation.scale import check_draws, check_graph, check_kind, scored_direction
from mechattr.evaluation.trials import asked_circuits, taken_apart, with_random
from mechattr.methods import METHODS as ROWS
from mechattr.models.base import HookedModel
from mechattr.patching import edge_outlines, outlines
from mechattr.patching.circuit import Circuit
from mechattr.patching.cost import Estimate
from mechattr.patching.edge_artifact import EdgeAttribution
from mechattr.patching.edge_run import EdgeRun
from mechattr.patching.interventions import PAIRS_AT_ONCE
from mechattr.patching.node_counts import Memory
from mechattr.patching.places import check_call
from mechattr.patching.probe import Sizes, probe
from mechattr.tasks.task import Task


def estimate(model: HookedModel, task: Task, method: str, /, **settings: Any) -> Estimate:
    """What a method would cost on a task; the settings are those of the method.

    Passes. Those of `attribution_patching`, `edge_attribution`, `faithfulness` and `minimality` are exact. Those of the
    others are an upper bound: interventions that change nothing are not run, which is known only once both prompts were
    recorded. It is reached when every activation differs. The bound on missed effects counts every sample of its
    budget; a sample without a node, or a `target` that is met early, saves some.

    Memory. The method takes its first steps on a few made-up prompts of about ten tokens, whose numbers are primes;
    every tensor that comes and goes on the way is noted with the powers of these primes in its size, and the same
    course is played again at the sizes of the task. What is counted so is what torch allocates besides the weights, on
    all devices together: activations, what autograd keeps, logits, tables, temporary tensors. Not counted are buffers
    inside of a kernel, what the allocator does not give back, and in sweeps tensors by the number of interventions
    that change nothing. What depends on the data is counted at its most: the rows of a batch of `missed_effect_bound`
    as if every sample had nodes of every site, and those of a sweep as if every activation differed.

    Args:
        model: a hooked model.
        task: prompt pairs.
        method: one of `METHODS`.
        **settings: keywords of the method, such as `variant`, `checkpoint`, `batch_size` or `edges`, with its defaults.

    Raises:
        UnknownNameError: no such method, and what the method itself refuses by name.
        SettingError: a keyword that the method does not have, or one that it needs is missing, and what the method
            itself refuses.
        UnsupportedFeatureError: prompts with images or with an encoder's side, and what the method itself refuses.
        UnknownSiteError, AlignmentError, EmptyTaskError, MismatchError: as the method raises them.

    Cost:
        The passes of one pair or of five to seven, on prompts of about ten tokens: a sweep stops after its first run;
        for `missed_effect_bound` 128 passes more.
    """
    if method not in METHODS:
        raise UnknownNameError(f"to estimate method {method!r}", "no such method", nearest(method, METHODS))
    module, _, name = ROWS[method].function.partition(":")
    signature = inspect.signature(getattr(import_module(module), name))
    unknown = [name for name in settings if name not in signature.parameters]
    if unknown:
        fix = nearest(unknown[0], list(signature.parameters)[2:])
        raise SettingError(f"{unknown[0]}= for {method}", "the method has no such setting", fix)
    instead = "call the method on a few pairs, and read the passes of its result"
    check_call(f"a call to estimate {method}", model, task, instead=instead)
    needed = [
        p.name for p in list(signature.parameters.values())[2:] if p.default is p.empty and p.name not in settings
    ]
    if needed:
        raise SettingError(f"to estimate {method}", f"no {needed[0]}", f"give {needed[0]}=, as to the method")
    bound = signature.bind(model, task, **settings)
    bound.apply_defaults()
    return _OUTLINES[method](model, task, bound.arguments)


def _faithfulness(model: HookedModel, task: Task, given: Mapping[str, Any]) -> Estimate:
    edges = given["edges"]
    check_draws(given["random"], given["seed"])
    check_kind(edges, (Circuit, EdgeAttribution))
    run = _run(model, task, edges, given)
    asked, _ = asked_circuits(edges, given["sizes"], given["by"], given["method"])
    _, masks = with_random(asked, run.graph.mask, given["random"], given["seed"])
    return _cut(task, "faithfulness", run, masks, len(asked), given)


def _minimality(model: HookedModel, task: Task, given: Mapping[str, Any]) -> Estimate:
    circuit = given["circuit"]
    check_draws(given["random"], given["seed"])
    check_kind(circuit, (Circuit,))
    run = _run(model, task, circuit, given)
    without, masks = taken_apart(circuit, run.graph.mask, given["unit"], given["random"], given["seed"])
    return _cut(task, "minimality", run, masks, len(without[0]), given)


def _run(model: HookedModel, task: Task, edges: Circuit | EdgeAttribution, given: Mapping[str, Any]) -> EdgeRun:
    way = scored_direction(edges, given["direction"])
    run = EdgeRun(model, task, direction=way, ablation=given["ablation"], batch_size=given["batch_size"])
    check_graph(run, edges)
    return run


def _cut(task: Task, method: str, run: EdgeRun, masks: Tensor, scored: int, given: Mapping[str, Any]) -> Estimate:
    """Of one run for each different circuit and pair, after a run for the values of writers that are cut."""
    graph, different = run.graph, len(run.different(masks)[0])
    pairs, columns = min(len(task), PAIRS_AT_ONCE), task.clean.tokens.shape[1]
    before = 0 if run.ablation == "zero" else 1
    recorded = before * Memory(run.model, columns).recorded(graph.written, pairs)
    peak = probe(
        run.model,
        task,
        method,
        Sizes(pairs=pairs, rows=min(run.rows, different * pairs), columns=columns),
        {name: x for name, x in given.items() if name not in ("model", "task", *_CALL)},
        positions=None,
        numbers=(len(graph.writers), len(graph.readers), len(masks), different),
        runs=1,
    )
    return Estimate(
        method=method,
        forward=float(len(task) * (different + before)),
        backward=0.0,
        nodes=scored,
        recorded=recorded,
        working=max(0, peak - recorded),
        at_most=False,
    )


_CALL = ("batch_size", "progress", "resume")  # of the call itself, not of its prompts
_OUTLINES: Mapping[str, Callable[[HookedModel, Task, Mapping[str, Any]], Estimate]] = {
    "activation_patching": outlines.activation_patching,
    "attribution_patching": outlines.attribution_patching,
    "ablation": outlines.ablation,
    "causal_tracing": outlines.causal_tracing,
    "path_patching": outlines.path_patching,
    "missed_effect_bound": outlines.missed_effect_bound,
    "edge_attribution": edge_outlines.edge_attribution,
    "edge_patching": edge_outlines.edge_patching,
    "faithfulness": _faithfulness,
    "minimality": _minimality,
}
METHODS = tuple(_OUTLINES)
