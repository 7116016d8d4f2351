"""How many nodes a call has, and how many bytes their activations."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mechattr.models.base import HookedModel
from mechattr.patching.nodes import table_of
from mechattr.patching.places import Positions, feature_of, mode_of, node_sites, places_of, taken_at
from mechattr.patching.source import shape_of
from mechattr.sites import SITES, Node, parse
from mechattr.tasks.task import Task


@dataclass(frozen=True, slots=True, kw_only=True)
class Nodes:
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
    def of(cls, model: HookedModel, task: Task, given: Mapping[str, Any]) -> Nodes:
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


class Memory:
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
