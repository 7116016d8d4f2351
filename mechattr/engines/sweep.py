"""Resumable sweeps: chunks of work, one list of numbers each, and a journal that survives being killed.

The journal is a text file: a header line that says what is being computed, then one line a finished chunk. Floats are
written in full (Python's repr round-trips), so a resumed sweep returns the same bits as an uninterrupted one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from tqdm.auto import tqdm

from mechattr.errors import OutputExistsError, SettingError

Chunk = TypeVar("Chunk")


class Journal:
    """The numbers of finished chunks, in a file or, without a path, nowhere.

    Args:
        path: the file; created when missing.
        key: what identifies the work; a journal with another key is refused.

    Raises:
        SettingError: something else than a path.
        OutputExistsError: the journal belongs to other work, or the file is no journal.
    """

    def __init__(self, path: Path | str | None, key: Mapping[str, Any]) -> None:
        if path is not None and not isinstance(path, str | os.PathLike):
            fix = "give the path of a file, or None"
            raise SettingError(f"resume={path!r}", f"a {type(path).__name__}, no path", fix)
        self.path = None if path is None else Path(path)
        self.done: dict[int, list[Any]] = {} if self.path is None else _read(self.path, key)

    def numbers(self, chunk: int, compute: Callable[[], list[float]], n: int | None = None) -> list[float]:
        """The numbers of a chunk, computed and noted unless they are there already: `n` of them, where it is given."""
        if chunk not in self.done or n not in (None, len(self.done[chunk])):
            self.note(chunk, compute())
        return self.done[chunk]

    def note(self, chunk: int, values: list[Any]) -> None:
        """Notes what a chunk gave: numbers, or anything else that is JSON."""
        self.done[chunk] = values
        if self.path is not None:
            _append(self.path, {"chunk": chunk, "values": values})


def sweep(
    groups: Iterable[Sequence[Chunk]],
    compute: Callable[[Chunk], list[float]],
    *,
    n_groups: int,
    key: Mapping[str, Any],
    resume: Path | None = None,
    progress: bool | None = None,
    label: str = "",
) -> list[list[float]]:
    """The numbers of every chunk in order, with progress, and without repeating what a journal holds.

    Args:
        groups: the chunks of work in a fixed order, in groups that are made one after the other; each is finished
            before the next one is made.
        compute: the numbers of one chunk.
        n_groups: number of groups, from which the progress bar guesses how many chunks are to come.
        key: what identifies this sweep; a journal with another key is refused.
        resume: the journal's path; created when missing.
        progress: `None` shows a bar on a terminal only.
        label: what the bar says.

    Raises:
        SettingError, OutputExistsError: as `Journal`.
    """
    journal = Journal(resume, key)
    found: list[list[float]] = []
    with tqdm(desc=label, disable=None if progress is None else not progress) as bar:
        for made, group in enumerate(groups, start=1):
            bar.total = (len(found) + len(group)) * n_groups // made
            for chunk in group:
                found.append(journal.numbers(len(found), partial(compute, chunk)))
                bar.update()
    return found


def _read(path: Path, key: Mapping[str, Any]) -> dict[int, list[Any]]:
    """The finished chunks of a journal; mends its end, or begins it."""
    header = _line({"journal": 1, **key})
    text = path.read_bytes() if path.is_file() else b""
    if path.exists() and not path.is_file():
        raise OutputExistsError(f"to resume from {path.name}", "it is no file", "choose another path")
    if header.startswith(text):  # missing, or killed while the header was written: nothing was finished
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(header)
        return {}
    first, *lines = text.split(b"\n")
    _check_header(path, _json(first), json.loads(header))
    done: dict[int, list[Any]] = {}
    whole = len(first) + 1
    for line in lines[:-1]:  # what follows the last newline was cut off
        entry = _json(line)
        if not (isinstance(entry.get("chunk"), int) and isinstance(entry.get("values"), list)):
            break
        whole += len(line) + 1
        done[entry["chunk"]] = entry["values"]
    if whole < len(text):
        os.truncate(path, whole)  # or the next line would be glued to the rest
    return done


def _check_header(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    if found == wanted:
        return
    differ = sorted(k for k in {*found, *wanted} if found.get(k) != wanted.get(k))
    raise OutputExistsError(
        f"to resume from {path.name}",
        f"it belongs to another sweep (different: {', '.join(differ)})" if "journal" in found else "it is no journal",
        "choose another path, or delete the file",
    )


def _json(line: bytes) -> dict[str, Any]:
    """The object in a line; empty where there is none."""
    try:
        value = json.loads(line)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _line(entry: Mapping[str, Any]) -> bytes:
    return json.dumps(entry).encode() + b"\n"


def _append(path: Path, entry: Mapping[str, Any]) -> None:
    with path.open("ab") as file:
        file.write(_line(entry))
        file.flush()
        os.fsync(file.fileno())
