"""The scores of all edges: the change of what each writer wrote times the gradient at each reader's own input.

Edges between all writers before a reader and the readers of one block are one matrix product over positions and the
model's width. Vectors of that width are formed for as many positions at a time as fit a buffer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechattr.models.base import HookedModel
from mechattr.patching.edge_readers import Readers, real, wide
from mechattr.patching.graph import Graph
from mechattr.sites import full_name

BUFFER = 2**26  # bytes of one working tensor; a single position of one pair may need more


@dataclass(frozen=True, eq=False, slots=True)
class Writers:
    """How the output of every writer differs between two runs, compactly: heads before their output projection.

    Attributes:
        model: whose weights are used.
        graph: its graph.
        start: of the input.
        z: of each block's heads.
        mlp_out: of each block's MLP, if there are any.
    """

    model: HookedModel
    graph: Graph
    start: Float[Tensor, "pair pos d_model"]
    z: tuple[Float[Tensor, "pair pos head d_head"], ...]
    mlp_out: tuple[Float[Tensor, "pair pos d_model"], ...]

    @classmethod
    def between(
        cls,
        model: HookedModel,
        graph: Graph,
        source: Mapping[str, Tensor],
        base: Mapping[str, Tensor],
        mask: Bool[Tensor, "pair pos"],
        hold: frozenset[int] = frozenset(),
    ) -> Writers:
        """Source minus base, zero at padding and for the blocks in `hold`, whose writes are held fixed."""
        change = {name: real(wide(source[name]) - wide(base[name]), mask) for name in graph.written}
        for layer in hold:
            for name in (full_name(short, layer) for short in ("z", "mlp_out")):
                if name in change:
                    change[name] = torch.zeros_like(change[name])

        def layers(short: str) -> tuple[Tensor, ...]:
            return tuple(change[full_name(short, layer)] for layer in range(graph.n_layers))

        return cls(
            model, graph, change[full_name("resid_pre", 0)], layers("z"), layers("mlp_out") if graph.has_mlp else ()
        )

    @property
    def moved(self) -> Bool[Tensor, " writer"]:
        """Which writers differ in any pair."""
        parts = [(self.start != 0).any()[None]]
        for layer, z in enumerate(self.z):
            parts.append((z != 0).flatten(0, 1).any(-1).any(0))
            if self.mlp_out:
                parts.append((self.mlp_out[layer] != 0).any()[None])
        return torch.cat(parts)

    def outputs(self, pairs: slice, columns: slice, room: Tensor) -> Float[Tensor, "writer row d_model"]:
        """What each writer adds to the residual stream, at pairs and columns in one axis; written into `room`."""
        start = self.start[pairs, columns].flatten(0, 1)
        found = _shaped(room, len(self.graph.writers), *start.shape)
        found[0] = start
        for layer, z in enumerate(self.z):
            first = 1 + layer * self.graph.writers_a_layer
            heads = slice(first, first + self.graph.n_heads)
            weight = wide(self.model.weight(f"blocks.{layer}.attn.W_O"))
            torch.bmm(z[pairs, columns].flatten(0, 1).transpose(0, 1), weight, out=found[heads])
            if self.mlp_out:
                found[heads.stop] = self.mlp_out[layer][pairs, columns].flatten(0, 1)
        return found


def pair_scores(writers: Writers, readers: Readers) -> Iterator[Float[Tensor, "pair writer reader"]]:
    """The scores of all edges for a few pairs after another, zero where there is no edge.

    No tensor on the way is larger than `BUFFER`, unless one position of one pair already is; the scores themselves
    come in parts of that size, or one pair at a time.
    """
    n_pairs, n_columns, d_model = writers.start.shape
    width = max(tile.width for tile in readers.tiles)
    shape = (len(writers.graph.writers), len(writers.graph.readers))
    at_once, step = portions(writers.graph, n_pairs, n_columns, d_model, writers.start.element_size())
    # fresh memory is slow: the system hands it out page by page
    rooms = [writers.start.new_empty(n * at_once * step * d_model) for n in (shape[0], width)]
    for first in range(0, n_pairs, at_once):
        pairs = slice(first, min(first + at_once, n_pairs))
        found = writers.start.new_zeros(pairs.stop - pairs.start, *shape)
        for left in range(0, n_columns, step):
            columns = slice(left, min(left + step, n_columns))
            outputs = writers.outputs(pairs, columns, rooms[0])
            for i, tile in enumerate(readers.tiles):
                there = _shaped(rooms[1], tile.width, *outputs.shape[1:])
                if readers.gradient(i, pairs, columns, out=there):
                    here = outputs[: tile.seen].unflatten(1, (len(found), -1)).flatten(2).transpose(0, 1)
                    there = there.unflatten(1, (len(found), -1)).flatten(2).permute(1, 2, 0)
                    found[:, : tile.seen, tile.columns] += here @ there
        yield found


def portions(graph: Graph, pairs: int, columns: int, d_model: int, itemsize: int) -> tuple[int, int]:
    """How many pairs, and how many of their columns, are scored at a time."""
    fitting = max(1, BUFFER // (len(graph.writers) * d_model * itemsize))
    scores = BUFFER // (len(graph.writers) * len(graph.readers) * itemsize)
    return max(1, min(pairs, fitting // columns, scores)), min(columns, fitting)


def _shaped(room: Tensor, *shape: int) -> Tensor:
    """The beginning of a flat tensor in a shape."""
    return room[: math.prod(shape)].view(shape)
