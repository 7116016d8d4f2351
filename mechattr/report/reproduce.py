"""How a run is made again: the command, and the pairs as a file for tasks that no option of the command describes."""

from __future__ import annotations

import inspect
import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from mechattr.models.base import ModelInfo
from mechattr.tasks.table import TASKS
from mechattr.tasks.task import Task

PAIRS = "pairs.jsonl"
_OPTIONS = ("n", "split", "seed", "metric")  # settings of a task that the command line has options for


def command(info: ModelInfo, task: Task, asked: Mapping[str, Any], out: Path) -> str:
    """The command line that makes the same run.

    A generated task is named with its options. Where it has settings that are no options of the command line, or comes
    from pairs or texts, the command reads the pairs that the run wrote, and writes into a folder beside it. Pairs with
    images are made again in Python only, since the file has their tokens and not their images.

    Args:
        info: the model.
        task: its prompt pairs.
        asked: direction, sites, positions, top, variant, bound, circuit, executor and seed of the run.
        out: its folder.
    """
    if task.clean.images or task.corrupt.images:
        return "ma.report.localise(model, task, ...) in Python: a file of pairs has no images"
    source: dict[str, Any] = {"model": info.name, "dtype": info.dtype}
    if task.name in TASKS and _plain_options(task):
        source |= {"task": task.name, **{name: task.settings[name] for name in _OPTIONS if name in task.settings}}
    else:
        source |= {"pairs": out / PAIRS, "metric": task.metric.name, "seed": asked["seed"]}
    lines = [
        source,
        {"sites": ",".join(asked["sites"]), "positions": asked["positions"], "direction": asked["direction"]},
        {
            "top": asked["top"],
            **{name: asked[name] for name in ("variant", "bound", "circuit", "executor") if asked[name] is not None},
        },
        {"out": out if "task" in source else out.with_name(f"{out.name}-again")},
    ]
    words = (" ".join(f"--{name} {shlex.quote(str(value))}" for name, value in line.items()) for line in lines)
    return "mechattr localise " + " \\\n  ".join(words)


def _plain_options(task: Task) -> bool:
    """Whether all settings that the command line has no option for have their default."""
    parameters = inspect.signature(TASKS[task.name]).parameters.values()
    return all(
        p.name in task.settings and task.settings[p.name] == p.default
        for p in parameters
        if p.name not in ("model", *_OPTIONS)
    )


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


def _ids(ids: Tensor) -> int | list[int]:
    """One id, or the list of a set without its padding."""
    real = [int(i) for i in ids.reshape(-1).tolist() if i >= 0]
    return real[0] if ids.ndim == 0 else real
