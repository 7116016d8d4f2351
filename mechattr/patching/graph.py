"""The edges of a residual network: who writes to the residual stream, who reads from it, and which pairs are connected.

A writer adds its output to the residual stream: the input (embeddings), each attention head, each MLP. A reader takes
the sum of all earlier writes: the queries of each head, the keys and values of each key/value head, each MLP, and the
logits (through the final norm). Every writer is connected with every later reader, so edges are pairs and no search is
needed to list them.

Keys and values of grouped-query attention are one reader for each key/value head, because heads of a group have no keys
of their own. A graph that gives every query head its own keys and values is larger: with 32 layers, 32 heads and 8
key/value heads this graph has 805,681 edges, an ungrouped one 1,592,881.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import torch
from jaxtyping import Bool
from torch import Tensor

from mechattr.errors import UnknownNameError, UnsupportedFeatureError, nearest
from mechattr.models.base import ModelInfo
from mechattr.sites import full_name

INPUT, LOGITS = "input", "logits"
KINDS = ("q", "k", "v")
_NAME = re.compile(r"^(?:a(?P<attention>\d+)\.h(?P<head>\d+)(?:<(?P<kind>[qkv])>)?|m(?P<mlp>\d+))$")


@dataclass(frozen=True)
class Graph:
    """Writers, readers and edges of a network.

    Args:
        n_layers: number of blocks.
        n_heads: attention heads a block.
        n_kv_heads: key/value heads a block; they divide the heads.
        has_mlp: whether blocks have an MLP.
        parallel: whether attention and MLP of a block read the same residual stream, so that no edge joins them.
    """

    n_layers: int
    n_heads: int
    n_kv_heads: int
    has_mlp: bool
    parallel: bool

    @classmethod
    def of(cls, info: ModelInfo) -> Self:
        """The graph of a model, from its sizes alone."""
        return cls(info.n_layers, info.n_heads, info.n_kv_heads, info.d_mlp > 0, info.parallel)

    @cached_property
    def writers(self) -> tuple[str, ...]:
        """`"input"`, then block by block the heads `"a0.h0"`, `"a0.h1"`, ... and the MLP `"m0"`."""
        names = [INPUT]
        for layer in range(self.n_layers):
            names += [f"a{layer}.h{head}" for head in range(self.n_heads)]
            names += [f"m{layer}"] * self.has_mlp
        return tuple(names)

    @cached_property
    def readers(self) -> tuple[str, ...]:
        """Block by block `"a0.h0<q>"` of each head, `"a0.h0<k>"` and `"a0.h0<v>"` of each key/value head, the MLP
        `"m0"`; last `"logits"`."""
        names = []
        for layer in range(self.n_layers):
            for kind in KINDS:
                heads = self.n_heads if kind == "q" else self.n_kv_heads
                names += [f"a{layer}.h{head}<{kind}>" for head in range(heads)]
            names += [f"m{layer}"] * self.has_mlp
        return (*names, LOGITS)

    @property
    def writers_a_layer(self) -> int:
        """How many writers a block has."""
        return self.n_heads + self.has_mlp

    @property
    def written(self) -> tuple[str, ...]:
        """The full names of the sites whose activations tell what every writer wrote."""
        names = [full_name("resid_pre", 0)]
        for layer in range(self.n_layers):
            names += [full_name("z", layer), *([full_name("mlp_out", layer)] if self.has_mlp else [])]
        return tuple(names)

    @property
    def readers_a_layer(self) -> int:
        """How many readers a block has."""
        return self.n_heads + 2 * self.n_kv_heads + self.has_mlp

    def seen_by(self, layer: int, *, mlp: bool = False) -> int:
        """How many writers come before a reader: the first so many are connected with it.

        Args:
            layer: the reader's block; `n_layers` for the logits.
            mlp: whether the reader is the MLP, which in a sequential block also reads its own block's heads.
        """
        own = self.n_heads if mlp and not self.parallel else 0
        return 1 + layer * self.writers_a_layer + own

    @cached_property
    def mask(self) -> Bool[Tensor, "writer reader"]:
        """Which edges exist. Shared by all users of this graph: not to be written to."""
        counts = []
        for layer in range(self.n_layers):
            counts += [self.seen_by(layer)] * (self.readers_a_layer - self.has_mlp)
            counts += [self.seen_by(layer, mlp=True)] * self.has_mlp
        counts.append(self.seen_by(self.n_layers))
        return torch.arange(len(self.writers))[:, None] < torch.tensor(counts)

    @property
    def n_edges(self) -> int:
        """The number of edges."""
        attention = self.readers_a_layer - self.has_mlp
        total = self.seen_by(self.n_layers)
        for layer in range(self.n_layers):
            total += attention * self.seen_by(layer) + self.has_mlp * self.seen_by(layer, mlp=True)
        return total

    @cached_property
    def _writer_places(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.writers)}

    @cached_property
    def _reader_places(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.readers)}

    def writer_index(self, name: str) -> int:
        """The row of a writer.

        Raises:
            UnknownNameError: no such writer.
        """
        return _place(name, self._writer_places, "writer")

    def reader_index(self, name: str) -> int:
        """The column of a reader.

        Raises:
            UnknownNameError: no such reader.
        """
        return _place(name, self._reader_places, "reader")

    def layer_of(self, name: str) -> int | None:
        """The block of a writer or reader; `None` for the input and the logits.

        Raises:
            UnknownNameError: neither a writer nor a reader.
        """
        if name in (INPUT, LOGITS):
            return None
        match = _NAME.match(name)
        if match is None or (name not in self._writer_places and name not in self._reader_places):
            candidates = (*self.writers, *self.readers)
            raise UnknownNameError(f"node {name!r}", "neither a writer nor a reader", nearest(name, candidates))
        return int(match["mlp"] if match["attention"] is None else match["attention"])

    def fed_by(self, reader: str) -> tuple[str, ...]:
        """The writers whose output depends directly on a reader: for keys and values every head of the group.

        Raises:
            UnknownNameError: no such reader.
        """
        self.reader_index(reader)
        match = _NAME.match(reader)
        if match is None:  # the logits
            return ()
        if match["attention"] is None:
            return (reader,)
        layer, head = int(match["attention"]), int(match["head"])
        if match["kind"] == "q":
            return (f"a{layer}.h{head}",)
        group = self.n_heads // self.n_kv_heads
        return tuple(f"a{layer}.h{h}" for h in range(head * group, (head + 1) * group))


def count_edges(info: ModelInfo) -> int:
    """The number of edges of a model, from its sizes alone; 32,491 for the small GPT-2."""
    return Graph.of(info).n_edges


def _place(name: str, places: dict[str, int], kind: str) -> int:
    if name not in places:
        raise UnknownNameError(f"{kind} {name!r}", f"this graph has no such {kind}", nearest(name, places))
    return places[name]


def check_additive(info: ModelInfo) -> None:
    """Whether a model has edges at all: each head and each MLP must add to the residual stream on its own.

    Raises:
        UnsupportedFeatureError: a norm acts on what blocks write, or on the stream itself; a mixture of experts.
    """
    if info.n_experts:
        raise UnsupportedFeatureError(
            f"edges of {info.name!r} ({info.family})",
            "its MLPs are mixtures of experts, in which the router reads the stream as well",
            "score nodes instead: attribution_patching, activation_patching, path_patching",
        )
    if info.post_norm or info.write_norm:
        raise UnsupportedFeatureError(
            f"edges of {info.name!r} ({info.family})",
            "norms act on what its blocks write, so that its heads do not add up in the residual stream",
            "score nodes instead: attribution_patching, activation_patching, path_patching",
        )
