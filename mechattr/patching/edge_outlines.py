"""What the methods that score edges would cost; see `mechattr.patching.outlines`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from mechattr.errors import UnknownNameError, nearest
from mechattr.models.base import HookedModel
from mechattr.patching.cost import Estimate
from mechattr.patching.edge_patching import Trials, edges_of
from mechattr.patching.edges import METHODS, EdgeSums, fitting, path_of
from mechattr.patching.graph import Graph, check_additive
from mechattr.patching.interventions import rows_of, share_of
from mechattr.patching.node_counts import Memory
from mechattr.patching.places import base_and_source, direction_of, places_of, rows_at_once
from mechattr.patching.probe import Sizes, probe, probe_edges
from mechattr.patching.wiring import Wiring
from mechattr.sites import full_name
from mechattr.tasks.task import Task

WRITERS = 3  # into a reader, so that a few made-up pairs fill a batch


def edge_attribution(model: HookedModel, task: Task, given: Mapping[str, Any]) -> Estimate:
    """Gradients along a path between the prompts."""
    if given["method"] not in METHODS:
        shown = f"method {given['method']!r}"
        raise UnknownNameError(shown, "no such method of edge attribution", nearest(given["method"], METHODS))
    direction_of(given["direction"])
    path = path_of(given["method"], given["rule"], given["steps"])
    check_additive(model.info)
    places_of(task, "all")
    checkpoint = bool(given["checkpoint"])
    pairs = min(len(task), rows_at_once(given["batch_size"], fitting(model, task, len(path))))
    columns, graph = task.clean.tokens.shape[1], Graph.of(model.info)

    def make(graph: Graph) -> EdgeSums:
        return EdgeSums(model, graph, path, given["rules"], checkpoint=checkpoint)

    recorded = 2 * Memory(model, columns).recorded(graph.written, pairs)
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


def edge_patching(model: HookedModel, task: Task, given: Mapping[str, Any]) -> Estimate:
    """Two recordings and a run for each edge, from the block of its reader."""
    way, _ = direction_of(given["direction"]), places_of(task, "all")
    wiring = Wiring(model)
    graph, columns = wiring.graph, task.clean.tokens.shape[1]
    base, source = base_and_source(task, way)
    edges = edges_of(graph, given["edges"])
    trials = Trials(wiring, task, base, source, edges, rows_of(base, given["batch_size"]))
    pairs = len(trials.parts[0])
    counts = torch.bincount(trials.layer, minlength=graph.n_layers)
    most = min(trials.rows, pairs * int(counts.max()))
    to_mlps = {readers.columns.start for readers in wiring.readers if "mlp" in readers.site}
    into = [int((edges[:, 1] == j).sum()) for j in to_mlps]
    streams = dict.fromkeys(readers.stream for readers in wiring.readers)
    starts = [full_name("resid_pre", layer) for layer in range(graph.n_layers)]
    memory = Memory(model, columns)
    recorded = memory.recorded({*graph.written, *streams, *starts}, pairs) + memory.recorded(graph.written, pairs)

    def reached(reader: int) -> int:
        """The peak where all rows of a batch go to one reader, so that they are of one number."""
        short = [(graph.writers[i], graph.readers[reader]) for i in graph.mask[:, reader].nonzero()[:, 0].tolist()]
        return probe(
            model,
            task,
            "edge_patching",
            Sizes(pairs=pairs, rows=most, columns=columns),
            {"edges": short, "direction": way},
            positions=None,
            numbers=(len(graph.writers), len(graph.readers), len(short)),
            runs=3,
        )

    # an MLP takes more, since its inputs can go to two sites: at most to this share a batch has rows of one block's MLP
    share = min(1.0, max(into, default=0) * pairs / most)
    wide = [j for j in range(len(graph.readers)) if j not in to_mlps and int(graph.mask[:, j].sum()) >= WRITERS]
    peak = round((1 - share) * reached(wide[0]) + (share * reached(max(to_mlps)) if share else 0))
    each = sum(int(n) * share_of(layer, graph.n_layers) for layer, n in enumerate(counts))
    return Estimate(
        method="edge_patching",
        forward=float(len(task) * (2 + each)),
        backward=0.0,
        nodes=len(edges),
        recorded=recorded,
        working=max(0, peak - recorded),
        at_most=True,
    )
