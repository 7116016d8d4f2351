"""How a run is made again: the command, and the pairs as a file for tasks that no option describes."""

from __future__ import annotations

import inspect
import json
import shlex
from collections.abc import Mapping
from typing import Any

import torch

from mechattr.tasks.table import TASKS
from mechattr.tasks.task import Task

PAIRS = "pairs.jsonl"
_OF_COMMAND = ("n", "split", "seed")  # settings of a task that the command line has options for


def command(model: str, task: Task, asked: Mapping[str, Any], out: str) -> str:
    """What makes the same run: a command line, or Python where the task has settings that the command line cannot say.

    Args:
        model: name of the model.
        task: its prompt pairs.
        asked: direction, sites, positions, top and seed of the run.
        out: its folder.
    """
    made = task.settings
    if task.name in TASKS and all(made.get(name) == value for name, value in _defaults(task.name).items()):
        lines = [
            {"model": model, "task": task.name, **{name: str(made[name]) for name in _OF_COMMAND if name in made}},
            {"sites": ",".join(asked["sites"]), "positions": asked["positions"], "direction": asked["direction"]},
            {"top": str(asked["top"]), "out": out},
        ]
        words = [" ".join(f"--{name} {shlex.quote(value)}" for name, value in line.items()) for line in lines]
        return "mechattr localise " + " \\\n  ".join(words)
    options = ", ".join(f"{name}={value!r}" for name, value in asked.items())
    pairs = f"{out}/{PAIRS}"
    return (
        f"import mechattr as ma\n\nmodel = ma.load({model!r})\n"
        f"task = ma.tasks.from_pairs(model, {pairs!r}, metric={task.metric.name!r}, name={task.name!r})\n"
        f"ma.report.localise(model, task, out={f'{out}-again'!r}, {options})"
    )


def _defaults(name: str) -> dict[str, Any]:
    """The default of each option of a task generator that the command line has no option for."""
    parameters = inspect.signature(TASKS[name]).parameters.values()
    return {p.name: p.default for p in parameters if p.name not in ("model", *_OF_COMMAND)}


def pairs_jsonl(task: Task) -> str:
    """The pairs as JSON lines of token ids, answers, foils and spans, as `from_pairs` reads them."""
    return "".join(json.dumps(_pair(task, row)) + "\n" for row in range(len(task)))


def _pair(task: Task, row: int) -> dict[str, Any]:
    spans = task.spans[row] if task.spans else {}
    end = spans["END"][1] if "END" in spans else None  # a sequence metric's own answer tokens come after it
    clean, corrupt = (batch.tokens[row][batch.mask[row]][:end].tolist() for batch in (task.clean, task.corrupt))
    pair = {"clean_tokens": clean, "corrupt_tokens": corrupt, "answer": _ids(task.answers[row])}
    if task.foils is not None:
        pair["foil"] = _ids(task.foils[row])
    return {**pair, "spans": {name: list(span) for name, span in spans.items()}}


def _ids(ids: torch.Tensor) -> int | list[int]:
    """One id, or the list of a set without its padding."""
    real = [int(i) for i in ids.reshape(-1).tolist() if i >= 0]
    return real[0] if ids.ndim == 0 else real
