"""Storage: the file format `mechattr/1` of every artifact.

A file is a safetensors file whose metadata holds one JSON document: format tag, kind, settings, provenance and, for
each tensor, axes, coordinates and a sha256 of its bytes. A folder is a list of such files (kind `shard`) and a
`manifest.json` with the same fields. Headers and manifests carry a sha256 of themselves in which their own digits count
as zeros; it is checked on every open. Files and folders are written under a temporary name and renamed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from mechattr.coordinates import Coordinates
from mechattr.errors import ArtifactError, AxisError, OutputExistsError
from mechattr.header import DTYPES, MANIFEST, SHARD, Entry, read_file, read_manifest, shard_name
from mechattr.labelled import Labelled
from mechattr.provenance import JSON
from mechattr.writer import ShardWriter, check_parent, checksum, encode, write

__all__ = ["LazyTensor", "ShardWriter", "Stored", "checksum", "open", "save"]


def save(
    path: str | os.PathLike[str],
    kind: str,
    tensors: Mapping[str, Labelled],
    settings: Mapping[str, Any],
    provenance: Mapping[str, Any],
) -> None:
    """Writes one file, replacing a file of that name; equal content gives equal bytes.

    Raises:
        OutputExistsError: `path` is a folder.
        SettingError: no such parent folder, a dtype that has no place in the format, or settings that are not JSON.
    """
    target = Path(path)
    if target.is_dir():
        raise OutputExistsError(f"to save to {target}", "a folder of this name", "choose a file name")
    check_parent(target)
    write(target, encode(kind, tensors, settings, provenance)[0])


def open(path: str | os.PathLike[str]) -> Stored:
    """Opens a file or folder after checking its headers; tensors are read when asked for.

    Raises:
        ArtifactError: damaged, truncated, foreign or of a newer format, or one shard of a folder.
    """
    source = Path(path)
    if not source.is_dir():
        document, entries, _ = read_file(source)
        if document["kind"] == SHARD:
            raise ArtifactError(f"to open {source}", "one shard of a folder", f"open the folder {source.parent}")
        return Stored(document, entries)
    document = read_manifest(source / MANIFEST)
    names = [shard_name(place) for place in range(len(document["shards"]))]
    present = sorted(file.name for file in source.iterdir() if file.suffix == ".safetensors")
    listed = [shard["file"] for shard in document["shards"]]
    if listed != names or present != sorted(names):
        raise ArtifactError(
            f"to open {source}",
            f"a manifest that lists {_names(listed)} in a folder that holds {_names(present)}",
            f"restore the shards {_names(names)} and nothing else",
        )
    merged: dict[str, Entry] = {}
    for shard in document["shards"]:
        file = source / shard["file"]
        header, entries, digest = read_file(file)
        if header["kind"] != SHARD or digest != shard["header_sha256"] or merged.keys() & entries.keys():
            raise ArtifactError(f"to open {source}", f"{file.name} belongs to another folder", "restore the shard")
        merged.update(entries)
    return Stored(document, merged)


def _names(names: list[str]) -> str:
    return ", ".join(map(repr, names)) or "nothing"


def _load(entry: Entry) -> Labelled:
    data = entry.read()
    # frombuffer refuses an empty buffer
    flat = torch.frombuffer(data, dtype=entry.dtype) if data else torch.empty(0, dtype=entry.dtype)
    return Labelled(flat.reshape(entry.shape), entry.axes, entry.coords)


class Stored(Mapping[str, Labelled]):
    """An opened artifact: a read-only mapping from name to tensor; each access reads from disk and checks the sha256.

    Attributes:
        kind: the kind tag.
        settings: settings as stored.
        provenance: provenance as stored.
    """

    def __init__(self, document: Mapping[str, Any], entries: Mapping[str, Entry]) -> None:
        self.kind: str = document["kind"]
        self.settings: Mapping[str, JSON] = document["settings"]
        self.provenance: Mapping[str, JSON] = document["provenance"]
        self._entries = entries

    def __getitem__(self, name: str) -> Labelled:
        return _load(self._entries[name])

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def lazy(self, name: str) -> LazyTensor:
        """A handle that reads only the slices asked for."""
        return LazyTensor(name, self._entries[name])

    @property
    def checksums(self) -> dict[str, str]:
        """The sha256 of each tensor, from the checked header."""
        return {name: entry.sha256 for name, entry in self._entries.items()}

    def verify(self) -> None:
        """Reads every tensor; raises `ArtifactError` where the bytes do not have their sha256."""
        for entry in self._entries.values():
            entry.read()


class LazyTensor:
    """A tensor on disk; `handle[index]` reads a slice, by place, through safetensors.

    A slice checks shape and dtype but not the sha256, which needs the whole tensor: `load()` does.
    """

    def __init__(self, name: str, entry: Entry) -> None:
        self.name, self._entry = name, entry
        self.axes, self.shape, self.dtype = entry.axes, entry.shape, entry.dtype

    def load(self) -> Labelled:
        """The whole tensor, checked."""
        return _load(self._entry)

    def __getitem__(self, index: int | slice | tuple[int | slice, ...]) -> Labelled:
        items = index if isinstance(index, tuple) else (index,)
        places: list[int | slice] = []
        axes: list[str] = []
        coords: dict[str, Coordinates] = {}
        if len(items) > len(self.shape):
            raise AxisError(f"index {index!r} of {self.name!r}", f"axes {self.axes}", "give one index an axis at most")
        for dim, (axis, size) in enumerate(zip(self.axes, self.shape, strict=True)):
            item = items[dim] if dim < len(items) else slice(None)
            try:
                chosen = range(size)[item]
            except (IndexError, TypeError) as error:
                raise AxisError(
                    f"index {item!r} on axis {axis!r} of {self.name!r}", f"size {size}", "give an int or a slice"
                ) from error
            if isinstance(chosen, int):
                places.append(chosen)
                continue
            if chosen.step != 1:
                raise AxisError(f"{item!r} on axis {axis!r}", f"step {chosen.step}", "lazy slices have step 1")
            kept = slice(chosen.start, max(chosen.start, chosen.stop))
            places.append(kept)
            axes.append(axis)
            coords[axis] = self._entry.coords.get(axis, range(size))[kept]
        return Labelled(self._read(tuple(places)), axes, coords)

    def _read(self, places: tuple[int | slice, ...]) -> Tensor:
        try:
            with safetensors.safe_open(str(self._entry.path), framework="pt") as file:
                handle = file.get_slice(self.name)
                if tuple(handle.get_shape()) == self.shape and DTYPES[handle.get_dtype()] == self.dtype:
                    return handle[places]
        except (OSError, safetensors.SafetensorError, KeyError) as error:
            reason = f"{type(error).__name__}: {error}"
        else:
            reason = "another shape or dtype"
        raise ArtifactError(
            f"a slice of {self.name!r} in {self._entry.path}", f"changed since it was opened: {reason}", "open it again"
        )
