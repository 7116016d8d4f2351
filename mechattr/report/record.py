"""The folder of a run: what it was asked, whether it may be reused, and what the report needs beside the artifacts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mechattr.errors import ArtifactError, OutputExistsError, SettingError
from mechattr.models.base import HookedModel
from mechattr.provenance import json_value
from mechattr.report.reproduce import PAIRS
from mechattr.tasks.task import Task

FORMAT = "mechattr/localise/2"
RECORD = "settings.json"
ARTIFACTS = {
    "attribution": "attribution.safetensors",
    "exact": "exact.safetensors",
    "whole_attribution": "whole_attribution.safetensors",
    "whole_exact": "whole_exact.safetensors",
}
BOUND = {"bound": "bound.safetensors"}
CIRCUIT = {"edges": "edges.safetensors", "circuit": "circuit.safetensors", "faithfulness": "faithfulness.safetensors"}
PARTIAL = {"exact": "exact.partial", "whole_exact": "whole_exact.partial", "bound": "bound.partial"}
BLOCKS = {
    name: f"{name}.blocks" for name in (*ARTIFACTS, *BOUND, "edges", "faithfulness")
}  # journals of work that is spread
TABLE, REPORT, FIGURES = "table.csv", "report.html", "figures"
N_SAMPLES = 2
N_ANSWERS = 3  # of each pair, where a set of answers counts

Record = dict[str, Any]


def artifacts(key: Mapping[str, Any]) -> dict[str, str]:
    """The files of a run's results by name: those of every run, the bound and the circuit if they were asked for."""
    return {**ARTIFACTS, **(BOUND if key["bound"] != 0 else {}), **(CIRCUIT if key["circuit"] else {})}


def describe(model: HookedModel, task: Task, settings: Mapping[str, Any]) -> Record:
    """All that the report needs to know of model and task, as JSON: the key of the run, the task, two sample pairs.

    Args:
        model: what is looked into.
        task: prompt pairs.
        settings: the arguments of the run that change its result.
    """
    info = model.info
    key = {
        "model": info.name,
        **model.fingerprint(),
        "dtype": info.dtype,
        "task": task.name,
        "task_hash": task.hash(),
        **settings,
    }
    lengths = task.clean.lengths
    return {
        "format": FORMAT,
        "key": json_value(key, "key"),
        "model": {"n_layers": info.n_layers, "n_heads": info.n_heads, "family": info.family, "revision": info.revision},
        "task": {
            "n_pairs": len(task),
            "lengths": [int(lengths.min()), int(lengths.max())],
            "metric": task.metric.name,
            "unit": task.metric.unit,
            "contrast": task.metric.contrast,
            "settings": json_value(task.settings, "task settings"),
            "skipped": dict(task.skipped),
            "citation": task.citation,
            "spans": _common_spans(task),
            "samples": [_sample(model, task, pair) for pair in range(min(N_SAMPLES, len(task)))],
        },
        "seconds": {},
    }


def _common_spans(task: Task) -> dict[str, list[int]]:
    """The named spans that are at the same positions in every pair."""
    first = task.spans[0] if task.spans else {}
    return {name: list(span) for name, span in first.items() if all(spans.get(name) == span for spans in task.spans)}


def _sample(model: HookedModel, task: Task, pair: int) -> Record:
    clean, corrupt = task.sample(pair)
    foils = [] if task.foils is None else task.foils[pair].reshape(-1).tolist()
    return {
        "clean": [text for text, _ in clean],
        "corrupt": [text for text, _ in corrupt],
        "differs": [place for place, (_, differs) in enumerate(clean) if differs],
        "answers": _texts(model, task.answers[pair].reshape(-1).tolist()),
        "foils": _texts(model, foils),
        "spans": {name: list(span) for name, span in task.spans[pair].items()} if task.spans else {},
    }


def _texts(model: HookedModel, ids: list[int]) -> list[str]:
    """Token texts, the padding of answer sets left out, cut after a few."""
    real = [i for i in ids if i >= 0]
    shown = [str(i) if model.tokenizer is None else model.tokenizer.decode([i]) for i in real[:N_ANSWERS]]
    return shown + [f"... {len(real)} in all"] * (len(real) > N_ANSWERS)


def prepare(out: Path, record: Record, *, overwrite: bool) -> Record:
    """Makes the folder of a run, or finds it as an earlier run with the same settings left it.

    Args:
        out: the folder.
        record: from `describe`.
        overwrite: replace what an earlier run with other settings wrote; other files are left alone.

    Returns:
        The record in the folder: the stored one (with its times) for a run that is resumed, else `record`.

    Raises:
        OutputExistsError: the folder holds the result of other settings, or other files and no result.
        SettingError: `out` is a file.
    """
    if out.exists() and not out.is_dir():
        raise SettingError(f"to write into {out}", "it is a file", "name a folder")
    found = (out / RECORD).exists()
    if found and (not overwrite or _same(out, record)):
        stored = read(out)
        if stored["key"] == record["key"]:
            return stored
        raise OutputExistsError(
            f"to write into {out}",
            f"the result of other settings: {difference(stored['key'], record['key'])}",
            "name another folder, use the same settings to resume, or overwrite=True (--overwrite) to replace it",
        )
    if not found and not overwrite and out.exists() and any(out.iterdir()):
        raise OutputExistsError(
            f"to write into {out}",
            f"{sum(1 for _ in out.iterdir())} files or folders that no localise wrote",
            "name a new folder, or overwrite=True (--overwrite) to write beside them",
        )
    out.mkdir(parents=True, exist_ok=True)
    _clear(out)
    write(out, record)
    return record


def _same(out: Path, record: Record) -> bool:
    """Whether the folder holds a readable record of the same run."""
    try:
        return bool(read(out)["key"] == record["key"])
    except ArtifactError:
        return False


def _clear(out: Path) -> None:
    """Removes what a run writes, and nothing else."""
    every = (*ARTIFACTS.values(), *BOUND.values(), *CIRCUIT.values(), *PARTIAL.values(), *BLOCKS.values())
    for name in (RECORD, TABLE, REPORT, PAIRS, *every):
        (out / name).unlink(missing_ok=True)
    for suffix in ("png", "svg"):
        for path in (out / FIGURES).glob(f"*.{suffix}"):
            path.unlink()


def difference(stored: Mapping[str, Any], asked: Mapping[str, Any]) -> str:
    """`top is 50 there and 20 here; ...`, hashes shortened."""

    def short(value: Any) -> str:
        return value[:12] if isinstance(value, str) and len(value) > 40 else json.dumps(value)

    names = [name for name in {**stored, **asked} if stored.get(name) != asked.get(name)]
    return "; ".join(f"{name} is {short(stored.get(name))} there and {short(asked.get(name))} here" for name in names)


def write(out: Path, record: Record) -> None:
    """Writes the record under a temporary name and renames it, so that a killed run leaves the old one whole."""
    temporary = out / f".{RECORD}.new"
    temporary.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(out / RECORD)


def read(out: Path) -> Record:
    """The record of a folder.

    Raises:
        ArtifactError: there is none, or it is damaged or of another format.
    """
    path = out / RECORD
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"the result of a localise in {out}",
            f"no readable {RECORD}: {error}",
            "name the folder that was given as --out",
        ) from error
    if not isinstance(record, dict) or record.get("format") != FORMAT or not isinstance(record.get("key"), dict):
        found = record.get("format") if isinstance(record, dict) else type(record).__name__
        raise ArtifactError(
            f"the result of a localise in {out}", f"format {found!r}", f"make it again; this version reads {FORMAT!r}"
        )
    return record
