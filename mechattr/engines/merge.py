"""Results of blocks, put together to the result of the whole task.

Effects are means over pairs, so a block counts by its pairs. An entry must have been measured on all pairs or on none:
a block that is missing or counted twice is an error, never a number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mechattr.base import Artifact
from mechattr.coordinates import Coordinate
from mechattr.errors import MismatchError
from mechattr.labelled import Labelled
from mechattr.provenance import provenance
from mechattr.tasks.task import Task

# Settings of a result that are lists with one entry a pair.
BY_PAIR = ("clean_metric", "corrupt_metric", "noised_metric", "noised_tokens", "reference_rows")


@dataclass(frozen=True, slots=True)
class Part:
    """One block of work: some pairs and, where nodes are cut, too, some nodes.

    Attributes:
        number: its place among all blocks.
        pairs: the numbers of its pairs.
        nodes: the numbers of its nodes; `None` for all of them.
    """

    number: int
    pairs: range
    nodes: range | None = None

    def __str__(self) -> str:
        nodes = "" if self.nodes is None else f", nodes {_span(self.nodes)}"
        return f"block {self.number} (pairs {_span(self.pairs)}{nodes})"


def _span(numbers: range) -> str:
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"


def merged(task: Task, results: Sequence[tuple[Part, Artifact]], fingerprint: Mapping[str, str]) -> Artifact:
    """The result on a whole task, from those of its blocks in order.

    Args:
        task: the whole task.
        results: every block with its result.
        fingerprint: of the model, which the workers' must be.

    Raises:
        MismatchError: blocks of different models, settings or versions, or that do not cover the task.
    """
    first = results[0][1]
    check_origin([(part, result.provenance) for part, result in results], {**first.provenance, **fingerprint})
    names = dict.fromkeys(name for _, result in results for name in result.tensors)
    tensors = {name: _table(name, task, results) for name in names}
    tokens = torch.cat([task.clean.content.flatten(), task.corrupt.content.flatten()])
    made = {**first.provenance, "tokens_sha256": provenance({}, tokens=tokens)["tokens_sha256"]}
    return type(first)(tensors, settings=_settings(task, results), provenance=made)


def check_origin(made: Sequence[tuple[Part, Mapping[str, Any]]], expected: Mapping[str, Any]) -> None:
    """Checks the provenance of every block, the tokens aside.

    Raises:
        MismatchError: a block was made with another model or other versions than expected.
    """
    for part, found in made:
        differ = [k for k in expected if k != "tokens_sha256" and found.get(k) != expected[k]]
        if differ:
            raise MismatchError(
                f"to put {part} to the others",
                f"it was made with another {', '.join(differ)}",
                "give all workers the same model and the same versions of the packages",
            )


def _table(name: str, task: Task, results: Sequence[tuple[Part, Artifact]]) -> Labelled:
    """The mean of one table over pairs, in float64 and then in the dtype of the blocks."""
    tables = [(part, result.tensors[name]) for part, result in results if name in result.tensors]
    first = tables[0][1]
    labels = {axis: _labels(task, [table.coords[axis] for _, table in tables]) for axis in first.axes}
    place = {axis: {label: i for i, label in enumerate(labels[axis])} for axis in first.axes}
    shape = [len(labels[axis]) for axis in first.axes]
    total, count = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.long)
    for part, table in tables:
        where = [torch.tensor([place[axis][label] for label in table.coords[axis]]) for axis in first.axes]
        at: tuple[Tensor, ...] = torch.meshgrid(*where, indexing="ij") if where else ()  # a single node has no axes
        values = table.values.double()
        total[at] += values.nan_to_num() * len(part.pairs)
        count[at] += (~values.isnan()).long() * len(part.pairs)
    if not bool(((count == 0) | (count == len(task))).all()):
        raise MismatchError(
            f"{name} of a task of {len(task)} pairs",
            f"blocks that measured some entries on {int(count[count > 0].min())} to {int(count.max())} pairs",
            "give every block once",
        )
    mean = torch.where(count > 0, total / len(task), torch.nan)
    return Labelled(mean.to(first.dtype), first.axes, labels)


def _labels(task: Task, each: Sequence[Sequence[Coordinate]]) -> list[Coordinate]:
    """The coordinates of all blocks, in the order of the whole task's table."""
    if all(tuple(labels) == tuple(each[0]) for labels in each):
        return list(each[0])
    spans = list(task.spans[0])
    found = {label for labels in each for label in labels}
    return sorted(found, key=lambda label: spans.index(label) if isinstance(label, str) else label)


def _settings(task: Task, results: Sequence[tuple[Part, Artifact]]) -> dict[str, Any]:
    """What the whole result says of itself.

    Raises:
        MismatchError: blocks say different things where they must not.
    """
    every: list[Mapping[str, Any]] = [result.settings for _, result in results]
    first = every[0]
    parts = [part for part, _ in results]
    columns = dict.fromkeys(part.nodes for part in parts)
    by_pairs = [every[i] for i, part in enumerate(parts) if part.nodes == parts[0].nodes]
    by_nodes = [every[i] for i, part in enumerate(parts) if part.pairs == parts[0].pairs]
    found: dict[str, Any] = {
        "task_hash": task.hash(),
        "n_pairs": sum(settings["n_pairs"] for settings in by_pairs),
        "n_identical_pairs": sum(settings["n_identical_pairs"] for settings in by_pairs),
        "passes": {way: sum(s["passes"][way] for s in every) for way in ("forward", "backward")},
        "n_trivial_zero": sum(_never_moved(results, nodes) for nodes in columns),
        "sites": list(dict.fromkeys(site for settings in by_nodes for site in settings["sites"])),
    }
    if "n_nodes" in first:
        found["n_nodes"] = sum(settings["n_nodes"] for settings in by_nodes)
    for name in BY_PAIR:
        if first.get(name) is not None:
            found[name] = [value for settings in by_pairs for value in settings[name]]
    if first.get("completeness") is not None:
        found["completeness"] = _completeness(by_pairs, {**first, **found})
    for name in first.keys() - found.keys() - {"trivial"}:
        if any(settings.get(name) != first[name] for settings in every):
            fix = "give all blocks the same settings"
            raise MismatchError(f"to put {len(results)} blocks together", f"they have different {name!r}", fix)
    return {name: found.get(name, value) for name, value in first.items() if name != "trivial"}


def _never_moved(results: Sequence[tuple[Part, Artifact]], nodes: range | None) -> int:
    """How many nodes have the same activation on both prompts of every pair, in all blocks of these nodes."""
    masks = [np.frombuffer(bytes.fromhex(str(r.settings["trivial"])), np.uint8) for p, r in results if p.nodes == nodes]
    return int(np.unpackbits(np.bitwise_and.reduce(masks)).sum())


def _completeness(by_pairs: Sequence[Mapping[str, Any]], whole: Mapping[str, Any]) -> dict[str, float | None]:
    """What edges out of the input leave unexplained: means of means, the largest, and as a share of the change."""
    counts = [settings["n_pairs"] for settings in by_pairs]
    mean = sum(s["completeness"]["mean"] * n for s, n in zip(by_pairs, counts, strict=True)) / sum(counts)
    clean, corrupt = (torch.tensor(whole[f"{side}_metric"], dtype=torch.float64) for side in ("clean", "corrupt"))
    change = float((clean - corrupt).abs().mean())
    largest = max(settings["completeness"]["max"] for settings in by_pairs)
    return {"mean": mean, "max": largest, "relative": mean / change if change else None}
