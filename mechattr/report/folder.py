"""The folder of a run: taken once, gone on with by the same settings, and never written over by others."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

from mechattr.errors import OutputExistsError, SettingError
from mechattr.provenance import JSON, json_value
from mechattr.report.record import RECORD, difference


def claim(out: Path, key: Mapping[str, JSON], owned: Sequence[str], *, overwrite: bool) -> None:
    """Makes the folder of a run, or finds it as an earlier run with the same settings left it.

    Args:
        out: the folder.
        key: what identifies the run.
        owned: names that the run writes, which go away where it replaces another.
        overwrite: replace what an earlier run with other settings wrote; other files are left alone.

    Raises:
        OutputExistsError: the folder holds the result of other settings, or other files and no result.
        SettingError: `out` is a file, or a folder that cannot be made or written.
    """
    if out.exists() and not out.is_dir():
        raise SettingError(f"to write into {out}", "it is a file", "name a folder")
    wanted = cast(dict[str, JSON], json_value(dict(key), "key"))
    found = _key(out / RECORD)
    if found == wanted:
        return
    if found is not None and not overwrite:
        raise OutputExistsError(
            f"to write into {out}",
            f"the result of other settings: {difference(found, wanted)}",
            "name another folder, use the same settings to resume, or overwrite=True (--overwrite) to replace it",
        )
    if found is None and not overwrite and out.exists() and any(out.iterdir()):
        raise OutputExistsError(
            f"to write into {out}",
            f"{sum(1 for _ in out.iterdir())} files or folders of something else",
            "name a new folder, or overwrite=True (--overwrite) to write beside them",
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name in owned:
            (out / name).unlink(missing_ok=True)
        fresh = out / f".{RECORD}.new"
        fresh.write_text(json.dumps({"key": wanted}, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        fresh.replace(out / RECORD)
    except OSError as error:
        fix = "name a folder that can be made and written"
        raise SettingError(f"to write into {out}", error.strerror or str(error), fix) from error


def _key(path: Path) -> dict[str, JSON] | None:
    """The key in a record; `None` where there is none that can be read."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    key = record.get("key") if isinstance(record, dict) else None
    return key if isinstance(key, dict) else None
