"""A table of nodes as index tensors, so that thousands of interventions are a few tensor operations."""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mechattr.errors import EmptyTaskError, SettingError
from mechattr.labelled import Labelled
from mechattr.models.base import HookedModel
from mechattr.patching.places import (
    NEURONS,
    Places,
    Positions,
    feature_of,
    mode_of,
    node_axes,
    node_sites,
    places_of,
    taken_at,
)
from mechattr.sites import SITES, Node, full_name, of_rows, parse, reads_source
from mechattr.tasks.task import Task

NONE = -1


@dataclass(frozen=True, eq=False, slots=True)
class NodeTable:
    """Nodes as columns of integers.

    Attributes:
        sites: the short names.
        names: the full names at which nodes are taken.
        name: for each node, the index of its full name.
        layer: for each node the block that a run may begin with; -1 where it is in none, or in an encoder.
        place: for each node the index of its place.
        feature: for each node its head or neuron, -1 where a place has one node.
        labels: the coordinates of places; empty where all positions are merged.
        source_labels: those of places of a source; empty where no node is there, too.
        tables: for each site, the axes and coordinates of its scores and the nodes' places in them.
    """

    sites: tuple[str, ...]
    names: tuple[str, ...]
    name: Tensor
    layer: Tensor
    place: Tensor
    feature: Tensor
    labels: tuple[int | str, ...]
    tables: dict[str, tuple[tuple[str, ...], dict[str, Any], Tensor, Tensor]]
    source_labels: tuple[int | str, ...] = ()

    def __len__(self) -> int:
        return len(self.name)

    @property
    def layers(self) -> list[int | None]:
        """The blocks that a run may begin with, the whole network (`None`) first."""
        return [None if layer == NONE else layer for layer in sorted(set(self.layer.tolist()))]

    def of_layer(self, layer: int | None) -> Tensor:
        """Indices of the nodes for which a run may begin with a block."""
        return (self.layer == (NONE if layer is None else layer)).nonzero()[:, 0]

    def nodes(self) -> list[Node]:
        """The nodes one by one."""
        site = [""] * len(self)
        for short, (_, _, mine, _) in self.tables.items():
            for i in mine.tolist():
                site[i] = short
        found = []
        layers = [parse(name)[1] for name in self.names]
        for short, name, place, feature in zip(
            site, self.name.tolist(), self.place.tolist(), self.feature.tolist(), strict=True
        ):
            kind = "neuron" if feature_of(short) in NEURONS else "head"
            which = {} if feature == NONE else {kind: feature}
            labels = self.source_labels if reads_source(SITES[short].axes) else self.labels
            found.append(Node(short, layers[name], labels[place] if labels else None, **which))
        return found

    def hash(self) -> str:
        """sha256 of the nodes."""
        digest = hashlib.sha256(repr((self.names, self.labels, *self.source_labels)).encode())
        for column in (self.name, self.layer, self.place, self.feature):
            digest.update(column.numpy().tobytes())
        return digest.hexdigest()

    def lookup(self, values: Mapping[str, Tensor], pairs: int) -> Tensor:
        """[pair, node] from site tensors [pair, place] or [pair, place, feature]."""
        found = torch.zeros(pairs, len(self), dtype=next(iter(values.values())).dtype)
        for i, name in enumerate(self.names):
            mine = (self.name == i).nonzero()[:, 0]
            x = values[name].cpu()
            index = (self.place[mine],) if x.ndim == 2 else (self.place[mine], self.feature[mine])
            found[:, mine] = x[(slice(None), *index)]
        return found

    def selections(
        self, nodes: Tensor, pairs: Tensor, places: Places
    ) -> Iterator[tuple[str, tuple[Tensor, ...], tuple[Tensor, ...]]]:
        """For rows that each patch one node: by full name, the entries to write and, by pair, the entries to read.

        Args:
            nodes: the node of each row.
            pairs: the pair of each row.
            places: the columns of each place.
        """
        for i in sorted(set(self.name[nodes].tolist())):
            rows = (self.name[nodes] == i).nonzero()[:, 0]
            mine = nodes[rows]
            where = places.at(self.names[i]).where
            device = where.device
            columns = where[pairs[rows].to(device), self.place[mine].to(device)]  # [row, column]
            which, column = columns.nonzero(as_tuple=True)
            row, pair = rows.to(device)[which], pairs[rows].to(device)[which]
            feature = self.feature[mine].to(device)[which]
            axes = SITES[parse(self.names[i])[0]].axes
            if of_rows(axes):
                yield self.names[i], (row, feature, column), (pair, feature, column)
            elif feature_of(parse(self.names[i])[0]) is None:
                yield self.names[i], (row, column), (pair, column)
            else:
                yield self.names[i], (row, column, feature), (pair, column, feature)

    def labelled(self, magnitude: Tensor, signed: Tensor) -> dict[str, Labelled]:
        """Score tables by site, NaN where a node is not in this table."""
        found = {}
        for short, (axes, coords, mine, flat) in self.tables.items():
            shape = [len(coords[axis]) for axis in axes]
            for kind, values in (("score", magnitude), ("signed", signed)):
                table = torch.full(shape, float("nan"), dtype=values.dtype)
                table.view(-1)[flat] = values[mine]
                found[f"{kind}/{short}"] = Labelled(table, axes, coords)
        return found


def every_node(model: HookedModel, sites: Sequence[str], places: Places) -> NodeTable:
    """All nodes of some sites."""
    columns = []
    for short in sites:
        layers = [NONE if (layer := parse(name)[1]) is None else layer for name in taken_at(model, short)]
        feature = feature_of(short)
        features = [NONE] if feature is None else range(model.info.sizes_at(short)[feature])
        grid = torch.cartesian_prod(
            torch.tensor([sites.index(short)]),
            torch.tensor(layers),
            torch.arange(max(1, len(places.at(short).labels))),
            torch.tensor(list(features)),
        )
        columns.append(grid)
    return _build(model, tuple(sites), torch.cat(columns), places)


def asked(
    model: HookedModel,
    task: Task,
    sites: str | Sequence[str] | None,
    nodes: Sequence[Node] | None,
    positions: Positions | None,
) -> tuple[NodeTable, Positions]:
    """The table of given nodes or, without any, of all nodes of some sites, and what their positions mean; errors are
    those of `table_of`, `node_sites`, `mode_of` and `places_of`."""
    if nodes is not None:
        return table_of(model, task, nodes, positions)
    shorts = node_sites(model, sites)
    mode = mode_of(task, positions, shorts)
    return every_node(model, shorts, places_of(task, mode, shorts)), mode


def table_of(
    model: HookedModel, task: Task, nodes: Sequence[Node], positions: Positions | None
) -> tuple[NodeTable, Positions]:
    """The table of given nodes, and what their positions mean; it must be what was asked for, if anything was.

    Raises:
        EmptyTaskError: no nodes.
        SettingError: something else than nodes; a layer, position, head or neuron that does not exist; positions of
            several kinds, or of another kind than `positions`.
    """
    nodes = list(nodes) if isinstance(nodes, Iterable) else [nodes]
    if not nodes:
        raise EmptyTaskError("activation patching", "an empty list of nodes", "give nodes, or leave nodes out")
    strange = [type(node).__name__ for node in nodes if not isinstance(node, Node)]
    if strange:
        raise SettingError("nodes", f"a {strange[0]}", "give a list of Node, such as attribution.top(50)")
    kinds = {"all" if n.pos is None else "named" if isinstance(n.pos, str) else "aligned" for n in nodes}
    if len(kinds) > 1:
        raise SettingError(
            "nodes", f"positions of several kinds ({', '.join(sorted(kinds))})", "patch each kind in a call of its own"
        )
    mode: Positions = kinds.pop()  # type: ignore[assignment]
    if positions not in (None, mode):
        raise SettingError(f"positions={positions!r}", f"nodes with {mode} positions", "leave positions out")
    sites = node_sites(model, list(dict.fromkeys(n.site for n in nodes)))
    places = places_of(task, mode, sites)
    labels = {short: places.at(short).labels for short in sites}
    rows = []
    for node in dict.fromkeys(nodes):
        _check(model, node)
        here = labels[node.site]
        if node.pos is not None and node.pos not in here:
            raise SettingError(
                f"node {node}", f"positions of this task: {_some(here)}", "name a position that every pair has"
            )
        feature = next((f for f in (node.head, node.neuron) if f is not None), NONE)
        layer = NONE if node.layer is None else node.layer
        rows.append([sites.index(node.site), layer, 0 if node.pos is None else here.index(node.pos), feature])
    return _build(model, sites, torch.tensor(rows), places), mode


def _some(labels: Sequence[int | str]) -> str:
    shown = ", ".join(map(str, labels[:8]))
    return shown + (f", ... {labels[-1]}" if len(labels) > 8 else "")


def _among(value: Any, size: int) -> bool:
    """Whether a value is a whole number from 0 to size - 1."""
    try:
        return not isinstance(value, bool) and 0 <= operator.index(value) < size
    except TypeError:
        return False


def _check(model: HookedModel, node: Node) -> None:
    info, feature = model.info, feature_of(node.site)
    sizes = info.sizes_at(node.site)
    problems = []
    if SITES[node.site].layered:
        layers = info.n_encoder_layers if node.site.startswith("encoder_") else info.n_layers
        if not _among(node.layer, layers):
            problems.append(f"layer {node.layer}: layers run from 0 to {layers - 1}")
    elif node.layer is not None:
        problems.append(f"layer {node.layer}: {node.site} exists once in the model")
    for field, value, axes in (("head", node.head, ("head", "kv_head")), ("neuron", node.neuron, NEURONS)):
        if feature is not None and feature in axes:
            if not _among(value, sizes[feature]):
                problems.append(f"{field} {value}: {feature} runs from 0 to {sizes[feature] - 1}")
        elif value is not None:
            problems.append(f"{field} {value}: {node.site} has no {field}")
    if problems:
        raise SettingError(f"node {node!r}", "; ".join(problems), "name a node that this model has")


def _build(model: HookedModel, sites: tuple[str, ...], rows: Tensor, places: Places) -> NodeTable:
    """A table from rows (site, layer, place, feature)."""
    names: list[str] = []
    name_of = torch.zeros(len(rows), dtype=torch.long)
    begin = rows[:, 1].clone()
    tables = {}
    for i, short in enumerate(sites):
        mine = (rows[:, 0] == i).nonzero()[:, 0]
        taken = parse(taken_at(model, short)[0])[0]
        for layer in sorted(set(rows[mine, 1].tolist())):
            name = full_name(taken, None if layer == NONE else layer)
            name_of[mine[rows[mine, 1] == layer]] = len(names)
            names.append(name)
        if short.startswith("encoder_"):
            begin[mine] = NONE
        labels = places.at(short).labels
        axes = node_axes(short, places.merged)
        coords: dict[str, Any] = {}
        flat = torch.zeros(len(mine), dtype=torch.long)
        for axis in axes:
            column = {"layer": 1, "pos": 2, "source": 2}.get(axis, 3)
            values, index = rows[mine, column].unique(return_inverse=True)
            flat = flat * len(values) + index
            coords[axis] = [labels[v] for v in values.tolist()] if column == 2 else values.tolist()
        tables[short] = (axes, coords, mine, flat)
    source = () if places.source is None else places.source.labels
    return NodeTable(sites, tuple(names), name_of, begin, rows[:, 2], rows[:, 3], places.labels, tables, source)
