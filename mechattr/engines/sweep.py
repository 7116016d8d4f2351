"""Resumable sweeps: a list of chunks, one result each, and a journal that survives being killed.

The journal is a text file: a header line that says what is being computed, then one line a finished chunk. Floats are
written in full (Python's repr round-trips), so a resumed sweep returns the same bits as an uninterrupted one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from mechattr.errors import OutputExistsError

Chunk = TypeVar("Chunk")


def sweep(
    chunks: Sequence[Chunk],
    compute: Callable[[Chunk], list[float]],
    *,
    key: Mapping[str, Any],
    resume: Path | None = None,
    progress: bool | None = None,
    label: str = "",
) -> list[list[float]]:
    """`[compute(chunk) for chunk in chunks]`, with progress, and without repeating what a journal holds.

    Args:
        chunks: the work, in a fixed order.
        compute: the numbers of one chunk.
        key: what identifies this sweep; a journal with another key is refused.
        resume: the journal's path; created when missing.
        progress: `None` shows a bar on a terminal only.
        label: what the bar says.

    Raises:
        OutputExistsError: the journal belongs to another sweep.
    """
    from tqdm.auto import tqdm

    done = _read(resume, key, len(chunks)) if resume is not None else {}
    bar = tqdm(total=len(chunks), initial=len(done), desc=label, disable=None if progress is None else not progress)
    try:
        for i, chunk in enumerate(chunks):
            if i in done:
                continue
            done[i] = compute(chunk)
            if resume is not None:
                _append(resume, {"chunk": i, "values": done[i]})
            bar.update()
    finally:
        bar.close()
    return [done[i] for i in range(len(chunks))]


def _read(path: Path, key: Mapping[str, Any], n: int) -> dict[int, list[float]]:
    header = {"journal": 1, "chunks": n, **key}
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        _append(path, header)
        return {}
    lines = path.read_bytes().split(b"\n")
    found = _json(lines[0])
    if found is None:  # killed while the header was written: nothing was finished
        path.unlink()
        return _read(path, key, n)
    if found != json.loads(json.dumps(header)):
        differ = sorted(k for k in {*found, *header} if found.get(k) != header.get(k))
        raise OutputExistsError(
            f"to resume from {path.name}",
            f"it belongs to another sweep (different: {', '.join(differ)})",
            "choose another path, or delete the journal",
        )
    done: dict[int, list[float]] = {}
    whole = 0
    for line in lines:
        entry = _json(line)
        if entry is None:
            break
        whole += len(line) + 1
        if "chunk" in entry:
            done[entry["chunk"]] = entry["values"]
    if whole < path.stat().st_size:  # a line that was cut off: drop it, or the next one would be glued to it
        os.truncate(path, whole)
    elif whole > path.stat().st_size:  # the last line is whole but for its newline
        with path.open("ab") as file:
            file.write(b"\n")
    return done


def _json(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _append(path: Path, entry: Mapping[str, Any]) -> None:
    with path.open("ab") as file:
        file.write(json.dumps(entry).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def halving(rows: Sequence[Any], run: Callable[[Sequence[Any]], list[float]]) -> list[float]:
    """`run(rows)`, in halves (and halves of those) when memory runs out.

    Raises:
        RuntimeError: a single row does not fit.
    """
    try:
        return run(rows)
    except (torch.cuda.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if len(rows) == 1 or not _out_of_memory(error):
            raise
    torch.cuda.empty_cache()
    middle = len(rows) // 2
    return halving(rows[:middle], run) + halving(rows[middle:], run)


def _out_of_memory(error: BaseException) -> bool:
    if isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)):
        return True
    return "not enough memory" in str(error) or "can't allocate memory" in str(error)
