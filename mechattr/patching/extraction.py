"""From scores of edges to a circuit: which edges are kept, and which of those lie on a path."""

from __future__ import annotations

import heapq

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechattr.patching.graph import INPUT, LOGITS, Graph
from mechattr.ranking import largest


def strongest(values: Float[Tensor, "writer reader"], n: int) -> Bool[Tensor, "writer reader"]:
    """The n edges of largest value; equal ones in the order of the graph, NaN never."""
    kept = torch.zeros(values.numel(), dtype=torch.bool)
    kept[largest(values.reshape(-1), n)] = True
    return kept.view(values.shape)


def greedy(values: Float[Tensor, "writer reader"], n: int, graph: Graph) -> Bool[Tensor, "writer reader"]:
    """From the logits downward: n times the edge of largest value among those into a node of the circuit.

    A node joins the circuit with the first edge that leaves it. Equal values in the order of the graph; NaN never, so
    there may be fewer edges where some were not measured.

    Cost:
        No pass; O(E log E) in the edges that are looked at.
    """
    readers_of: dict[str, list[int]] = {name: [] for name in graph.writers}
    for place, name in enumerate(graph.readers):
        for head in graph.fed_by(name):
            readers_of[head].append(place)
    kept = torch.zeros(values.shape, dtype=torch.bool)
    heap: list[tuple[float, int, int]] = []
    opened: set[int] = set()
    inside: set[int] = set()

    def open_up(readers: list[int]) -> None:
        for reader in readers:
            if reader not in opened:  # a key/value reader belongs to several heads
                opened.add(reader)
                for writer in torch.nonzero(~values[:, reader].isnan()).flatten().tolist():
                    heapq.heappush(heap, (-float(values[writer, reader]), writer, reader))

    open_up([graph.reader_index(LOGITS)])
    for _ in range(n):
        if not heap:
            break
        _, writer, reader = heapq.heappop(heap)
        kept[writer, reader] = True
        if writer not in inside:
            inside.add(writer)
            open_up(readers_of[graph.writers[writer]])
    return kept


def on_paths(kept: Bool[Tensor, "writer reader"], graph: Graph) -> Bool[Tensor, "writer reader"]:
    """The kept edges that lie on a path of kept edges from the input to the logits; the others are dead ends.

    Within a path, a reader is followed by a writer that it feeds: the queries by their head, keys and values by every
    query head of their group, an MLP by itself.

    Cost:
        No pass; O(E) a block.
    """
    feeds = torch.zeros(len(graph.readers), len(graph.writers), dtype=torch.bool)
    for place, name in enumerate(graph.readers):
        for writer in graph.fed_by(name):
            feeds[place, graph.writer_index(writer)] = True
    reached = torch.zeros(len(graph.writers), dtype=torch.bool)
    reached[graph.writer_index(INPUT)] = True
    useful = torch.zeros(len(graph.readers), dtype=torch.bool)
    useful[graph.reader_index(LOGITS)] = True
    while True:  # both sets only grow, and are complete when neither does
        entered = kept[reached].any(0)
        left = kept[:, useful].any(1)
        wider, longer = reached | feeds[entered].any(0), useful | feeds[:, left].any(1)
        if torch.equal(wider, reached) and torch.equal(longer, useful):
            return kept & reached[:, None] & useful
        reached, useful = wider, longer
