"""Ranking: score tables of several sites as one vector of nodes, without a Python loop over the nodes."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechattr.errors import AxisError
from mechattr.labelled import Coordinate, Labelled

# Axis of a score table -> field of a node, in the order of the fields.
FIELDS = {
    "layer": "layer", "pos": "pos", "source": "pos", "head": "head", "kv_head": "head",
    "neuron": "neuron", "latent": "neuron", "expert": "neuron",
}  # fmt: skip


def is_node_table(table: Labelled) -> bool:
    """Whether each entry of a table is the score of one node."""
    return set(table.axes) <= FIELDS.keys()


def _in_node_order(site: str, table: Labelled) -> Labelled:
    """The table with axes in the order of a node's fields and coordinates ascending: row-major order is node order."""
    if not is_node_table(table):
        raise AxisError(
            f"nodes of {site!r}", f"axes {table.axes}", f"read the table itself; nodes have only {', '.join(FIELDS)}"
        )
    axes = sorted(table.axes, key=list(FIELDS).index)
    ordered = {axis: sorted(coords, key=_coordinate_order) for axis, coords in table.explicit_coords.items()}
    picked = table.sel(**{axis: coords for axis, coords in ordered.items() if tuple(coords) != table.coords[axis]})
    return Labelled(picked.values.permute([picked.axes.index(axis) for axis in axes]), axes, picked.explicit_coords)


def _coordinate_order(value: Coordinate) -> tuple[bool, Coordinate]:
    return isinstance(value, str), value


def node_vector(tables: Mapping[str, Labelled]) -> Float[Tensor, " nodes"]:
    """All entries of all tables in node order (site, layer, pos, head, neuron), as float64 on the CPU.

    Raises:
        AxisError: a table of something that is not a node.
    """
    parts = [_in_node_order(site, tables[site]).values.detach().cpu().double().reshape(-1) for site in sorted(tables)]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.float64)


def largest(values: Float[Tensor, " nodes"], k: int) -> Int[Tensor, " chosen"]:
    """Places of the k largest values that are not NaN, largest first, equal ones in their order."""
    measured = torch.nonzero(~values.isnan()).squeeze(1)
    k = min(k, len(measured))
    if k == 0:
        return measured[:0]
    kept = values[measured]
    # topk alone breaks ties arbitrarily: take all that reach its smallest value, then sort those stably
    reaching = torch.nonzero(kept >= torch.topk(kept, k).values[-1]).squeeze(1)
    order = torch.sort(kept[reaching], descending=True, stable=True).indices[:k]
    return measured[reaching[order]]


def node_columns(tables: Mapping[str, Labelled], places: Int[Tensor, " chosen"]) -> dict[str, np.ndarray]:
    """Site, layer, pos, head and neuron of the nodes at `places` of the node vector; None where a node has none."""
    chosen = places.numpy()
    columns = {name: np.full(len(chosen), None, dtype=object) for name in ("site", "layer", "pos", "head", "neuron")}
    start = 0
    for site in sorted(tables):
        table = _in_node_order(site, tables[site])
        rows = np.flatnonzero((chosen >= start) & (chosen < start + table.values.numel()))
        columns["site"][rows] = site
        # numpy cannot unravel into no dimensions: a table of one node has no coordinate to give
        along_axes = np.unravel_index(chosen[rows] - start, table.shape) if table.axes else ()
        for axis, along in zip(table.axes, along_axes, strict=True):
            columns[FIELDS[axis]][rows] = np.array(table.coords[axis], dtype=object)[along]
        start += table.values.numel()
    return columns
