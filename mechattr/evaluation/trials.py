"""Which circuits are run: those that were asked for, random ones beside them, and both without each of their parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from mechattr.errors import EmptyTaskError, SettingError, UnknownNameError, nearest
from mechattr.evaluation.scale import counts_of
from mechattr.patching.circuit import Circuit, extracted
from mechattr.patching.edge_artifact import EdgeAttribution

SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
TAKEN = ("contribution", "top")  # by and method
UNITS = ("node", "edge")
ARROW = " -> "  # between the ends of an edge


def asked_circuits(
    edges: EdgeAttribution | Circuit, sizes: Sequence[float], by: str, method: str
) -> tuple[dict[int, Circuit], dict[str, Any]]:
    """The circuit of each size, and how they were taken; arguments and errors are those of `faithfulness`."""
    if isinstance(edges, Circuit):
        _check_unused(sizes, by, method)
        return {edges.n_edges: edges}, {"by": None, "extraction": edges.settings.get("extraction")}
    counts = counts_of(sizes, edges.graph.n_edges)
    asked = {n: extracted(edges, n, by=by, method=method) for n in counts}
    return asked, {"by": by, "extraction": method}


def with_random(
    asked: Mapping[int, Circuit], every: Tensor, random: int, seed: int
) -> tuple[list[list[Circuit]], Bool[Tensor, "circuit writer reader"]]:
    """Of each size the circuit and its random ones; and what is run: all edges, none, each circuit and complement."""
    circuits = [[circuit, *(circuit.random_like(seed + i) for i in range(random))] for circuit in asked.values()]
    masks = [mask for draws in circuits for circuit in draws for mask in (circuit.mask, circuit.complement())]
    return circuits, torch.stack([every, torch.zeros_like(every), *masks])


def taken_apart(
    circuit: Circuit, every: Tensor, unit: str, random: int, seed: int
) -> tuple[list[dict[str, Tensor]], Bool[Tensor, "circuit writer reader"]]:
    """The edges of the circuit and of random ones without each part, by its name; and what is run: all edges, none, the
    circuits, and each without each part.

    Raises:
        UnknownNameError: no such unit.
        EmptyTaskError: a circuit without such parts.
    """
    if unit not in UNITS:
        raise UnknownNameError(f"unit {unit!r}", "no such part of a circuit", nearest(unit, UNITS))
    circuits = [circuit, *(circuit.random_like(seed + i) for i in range(random))]
    without = [_without(each, unit) for each in circuits]
    if not without[0]:
        raise EmptyTaskError("minimality", f"a circuit without any {unit} to remove", "give a larger circuit")
    parts = [mask for masks in without for mask in masks.values()]
    return without, torch.stack([every, torch.zeros_like(every), *(each.mask for each in circuits), *parts])


def _without(circuit: Circuit, unit: str) -> dict[str, Tensor]:
    """The circuit's edges without each of its parts, by the part's name."""
    if unit == "node":
        inner = [name for name in circuit.nodes if circuit.graph.layer_of(name) is not None]
        return {name: circuit.without(name).mask for name in inner}
    found = {}
    for (source, target), (i, j) in zip(circuit.edges, circuit.mask.nonzero().tolist(), strict=True):
        kept = circuit.mask.clone()
        kept[i, j] = False
        found[f"{source}{ARROW}{target}"] = kept
    return found


def _check_unused(sizes: Sequence[float], by: str, method: str) -> None:
    given = [f"sizes={sizes!r}"] if sizes is not SHARES else []
    given += [
        f"{name}={x!r}" for name, x, usual in zip(("by", "method"), (by, method), TAKEN, strict=True) if x != usual
    ]
    if given:
        fix = "leave it out, or give the scores of the edges in the circuit's place"
        raise SettingError(f"the faithfulness of one circuit with {', '.join(given)}", "a circuit is one size", fix)
