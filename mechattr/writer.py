"""Writing: the bytes of a file, a folder shard by shard, and renaming so that nobody sees half of either."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import safetensors.torch
import torch
from jaxtyping import Shaped
from torch import Tensor

from mechattr.errors import OutputExistsError, SettingError
from mechattr.header import DIGEST, DTYPES, FILE_PREFIX, FORMAT, KEY, MANIFEST, MANIFEST_PREFIX, SHARD, shard_name
from mechattr.labelled import Labelled
from mechattr.provenance import JSON, json_value


def checksum(values: Shaped[Tensor, "*dims"]) -> str:
    """The sha256 of a tensor's bytes in row-major order."""
    row_major = values.detach().cpu().contiguous()
    # as_strided: contiguous() leaves odd strides on axes of size 0 and 1, over which view() refuses to change the dtype
    flat = row_major.as_strided((row_major.numel(),), (1,)).view(torch.uint8)
    return hashlib.sha256(flat.numpy().data).hexdigest()


class ShardWriter:
    """Writes a folder artifact tensor by tensor, with never more than a few times `shard_bytes` in memory.

    A context manager: the folder appears under its name when the block ends, and not at all when it raises.

    Args:
        path: the folder to make.
        kind: kind tag of the artifact.
        settings: settings of the artifact.
        provenance: provenance of the artifact.
        shard_bytes: a shard is written once the waiting tensors have this many bytes.

    Raises:
        OutputExistsError: `path` exists.
        SettingError: no such parent folder, or settings that are not JSON.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        kind: str = "cache",
        settings: Mapping[str, Any] | None = None,
        provenance: Mapping[str, Any] | None = None,
        shard_bytes: int = 1 << 28,
    ) -> None:
        self._target = Path(path)
        self._fields = (kind, json_value(settings or {}), json_value(provenance or {}, "provenance"))
        self._limit = shard_bytes
        self._waiting: dict[str, Labelled] = {}
        self._bytes = 0
        self._names: set[str] = set()
        self._shards: list[dict[str, JSON]] = []

    def __enter__(self) -> Self:
        check_parent(self._target)
        self._check_free()
        self._folder = _temporary(self._target)
        self._folder.mkdir()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._close()
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)  # after a successful rename it is gone already

    def add(self, name: str, tensor: Labelled) -> None:
        """Appends a tensor (copied to the CPU).

        Raises:
            SettingError: the name was added before, or cannot be stored.
        """
        if name in self._names:
            raise SettingError(f"to add {name!r} to {self._target}", "a tensor of this name", "use each name once")
        self._names.add(name)
        self._waiting[name] = Labelled(_copy(name, tensor), tensor.axes, tensor.explicit_coords)
        self._bytes += self._waiting[name].values.nbytes
        if self._bytes >= self._limit:
            self._flush()

    def _check_free(self) -> None:
        if self._target.exists():
            raise OutputExistsError(
                f"to write {self._target}", "something of this name", "choose another name or remove it"
            )

    def _flush(self) -> None:
        data, digest = encode(SHARD, self._waiting, {}, {})
        name = shard_name(len(self._shards))
        write(self._folder / name, data)
        self._shards.append({"file": name, "header_sha256": digest})
        self._waiting, self._bytes = {}, 0

    def _close(self) -> None:
        if self._waiting:
            self._flush()
        manifest = bytearray(_document(*self._fields, shards=self._shards).encode())
        _seal(manifest, MANIFEST_PREFIX, start=0, stop=len(manifest))
        write(self._folder / MANIFEST, manifest)
        self._check_free()
        self._folder.rename(self._target)
        _sync_folder(self._target.parent)


def _document(kind: str, settings: JSON, provenance: JSON, **rest: Any) -> str:
    """The JSON document, its digest first so that the digits have a fixed place, still zeros."""
    fields = {"format": FORMAT, "kind": kind, "settings": settings, "provenance": provenance, **rest}
    return json.dumps({"header_sha256": "0" * DIGEST, **fields}, allow_nan=False, separators=(",", ":"))


def _seal(data: bytearray, prefix: bytes, start: int, stop: int) -> str:
    """Puts the sha256 of `data[start:stop]` in the place of the zeros behind `prefix`; returns it."""
    digest = hashlib.sha256(data[start:stop]).hexdigest()
    first = start + len(prefix)
    data[first : first + DIGEST] = digest.encode()
    return digest


def _copy(name: str, tensor: Labelled) -> Tensor:
    """A contiguous copy on the CPU: safetensors would refuse shared memory and needs row-major order."""
    if not name.isprintable() or name in ("", "__metadata__"):
        raise SettingError(f"to store a tensor called {name!r}", "a reserved or unprintable name", "rename it")
    if tensor.dtype not in DTYPES.values():
        raise SettingError(f"to store {name!r}", f"dtype {tensor.dtype}", f"use one of {', '.join(DTYPES)}")
    return tensor.values.detach().cpu().clone(memory_format=torch.contiguous_format)


def encode(
    kind: str, tensors: Mapping[str, Labelled], settings: Mapping[str, Any], provenance: Mapping[str, Any]
) -> tuple[bytearray, str]:
    """The bytes of a file, and the sha256 of its header."""
    copies, described = {}, {}
    for name, tensor in tensors.items():
        copies[name] = _copy(name, tensor)
        described[name] = {
            "axes": tensor.axes,
            "coords": dict(tensor.explicit_coords),
            "sha256": checksum(copies[name]),
        }
    document = _document(kind, json_value(settings), json_value(provenance, "provenance"), tensors=described)
    data = bytearray(safetensors.torch.save(copies, {KEY: document}))
    return data, _seal(data, FILE_PREFIX, start=8, stop=8 + int.from_bytes(data[:8], "little"))


def check_parent(target: Path) -> None:
    """Raises `SettingError` unless the folder that `target` goes to exists."""
    if not target.parent.is_dir():
        raise SettingError(f"to write {target}", f"no folder {target.parent}", "create the folder first")


def _temporary(target: Path) -> Path:
    return target.with_name(f".{target.name}.{secrets.token_hex(8)}.partial")


def write(target: Path, data: bytes | bytearray) -> None:
    """Writes under a temporary name, flushes to disk and renames: a reader never sees half a file."""
    temporary = _temporary(target)
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(target.parent)


def _sync_folder(folder: Path) -> None:
    """Makes a rename inside `folder` survive a power cut."""
    if os.name != "posix":  # Windows cannot open a folder
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
