"""Headers of the file format: reading one and checking everything that it claims, before any tensor is read."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from mechattr.coordinates import Coordinate, check_coords
from mechattr.errors import ArtifactError, AxisError

FORMAT = "mechattr/1"
KEY = "mechattr"  # where the document lies in the metadata of a safetensors file
DIGEST = 64  # hex digits of a sha256
MANIFEST = "manifest.json"  # in a folder of shards
SHARD = "shard"  # the kind of a file in such a folder

# The digest is the first value of the document, so its digits lie right behind these bytes.
FILE_PREFIX = b'{"__metadata__":{"mechattr":"{\\"header_sha256\\":\\"'
MANIFEST_PREFIX = b'{"header_sha256":"'

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}

_COMMON = {"header_sha256", "format", "kind", "settings", "provenance"}
_HEX = re.compile(r"[0-9a-f]{64}")
_LIMIT = 100_000_000  # bytes of a header, the limit of safetensors itself
_FIX = "restore the file from a copy or make it again"


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """Where one tensor lies, and what it is: `begin` and `end` are byte places in the file `path`."""

    path: Path
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int
    axes: tuple[str, ...]
    coords: Mapping[str, tuple[Coordinate, ...]]
    sha256: str

    def read(self) -> bytearray:
        """The tensor's bytes.

        Raises:
            ArtifactError: the file cannot be read, or the bytes do not have the sha256 of the header.
        """
        data = bytearray(self.end - self.begin)
        try:
            with self.path.open("rb") as file:
                file.seek(self.begin)
                count = file.readinto(data)
        except OSError as error:
            raise ArtifactError(f"to read {self.path}", str(error), _FIX) from error
        if count != len(data) or hashlib.sha256(data).hexdigest() != self.sha256:
            raise ArtifactError(f"to read tensor {self.name!r} of {self.path}", "its sha256 does not match", _FIX)
        return data


def read_file(path: Path) -> tuple[dict[str, Any], dict[str, Entry], str]:
    """The document, the tensors and the header's sha256 of one file.

    Raises:
        ArtifactError: anything about the header is wrong.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            first = file.read(8)
            length = int.from_bytes(first, "little")
            if len(first) < 8 or not 2 <= length <= min(size - 8, _LIMIT):
                raise _error(path, f"a header of {length} bytes in a file of {size}: truncated, or no safetensors file")
            raw = file.read(length)
    except OSError as error:
        raise _error(path, str(error), "check the path") from error
    header = _parse(path, raw)
    metadata = header.pop("__metadata__", None)
    text = metadata.get(KEY) if isinstance(metadata, dict) else None
    if not isinstance(text, str):
        raise _foreign(path)
    document = _parse(path, text.encode("utf-8", "surrogatepass"))
    digest = _check_document(path, document, raw, FILE_PREFIX, {"tensors"})
    return document, _entries(path, document["tensors"], header, 8 + length, size), digest


def read_manifest(path: Path) -> dict[str, Any]:
    """The document of a folder; its `shards` is a list of dicts with the strings `file` and `header_sha256`.

    Raises:
        ArtifactError: anything about the manifest is wrong.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise _error(path.parent, f"a folder without a readable manifest: {error}", "check the path") from error
    document = _parse(path, raw)
    _check_document(path, document, raw, MANIFEST_PREFIX, {"shards"})
    shards = document["shards"]
    if not isinstance(shards, list) or not all(
        isinstance(shard, dict)
        and shard.keys() == {"file", "header_sha256"}
        and all(isinstance(value, str) for value in shard.values())
        for shard in shards
    ):
        raise _error(path, "a list of shards that is none")
    return document


def shard_name(place: int) -> str:
    """File name of a shard of a folder: no manifest can name a file elsewhere."""
    return f"shard-{place:05d}.safetensors"


def _error(path: Path, found: str, fix: str = _FIX) -> ArtifactError:
    return ArtifactError(f"to open {path}", found, fix)


def _foreign(path: Path) -> ArtifactError:
    return _error(path, f"not a mechattr artifact: no tag {FORMAT!r}", "open a file that an artifact's save() wrote")


def _parse(path: Path, raw: bytes) -> dict[str, Any]:
    """Strict JSON: UTF-8, a dict, no key twice, no NaN or infinity."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) != len(pairs):
            raise ValueError("a key occurs twice")
        return dict(pairs)

    def finite(text: str) -> float:
        if not math.isfinite(float(text)):
            raise ValueError(f"{text} is not JSON")
        return float(text)

    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=unique, parse_float=finite, parse_constant=finite)
    except (ValueError, RecursionError) as error:
        raise _error(path, f"a header that is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise _error(path, "a header that is not a JSON object")
    return value


def _check_document(path: Path, document: dict[str, Any], raw: bytes, prefix: bytes, more: Set[str]) -> str:
    """Checks tag, sha256 and fields, in this order; returns the sha256 of the header `raw`."""
    tag = document.get("format")
    if not isinstance(tag, str) or not tag.startswith("mechattr/"):
        raise _foreign(path)
    if tag != FORMAT:
        raise _error(path, f"format {tag!r}; this version reads {FORMAT!r}", "upgrade mechattr")
    digest = hashlib.sha256(raw[: len(prefix)] + b"0" * DIGEST + raw[len(prefix) + DIGEST :]).hexdigest()
    if not raw.startswith(prefix) or raw[len(prefix) : len(prefix) + DIGEST] != digest.encode():
        raise _error(path, "a header whose sha256 does not match: it was damaged or edited")
    if (
        document.keys() != _COMMON | more
        or not isinstance(document["kind"], str)
        or not isinstance(document["settings"], dict)
        or not isinstance(document["provenance"], dict)
    ):
        raise _error(path, f"a header whose fields ({', '.join(document)}) are not those of {FORMAT}")
    return digest


def _entries(path: Path, described: Any, header: dict[str, Any], start: int, size: int) -> dict[str, Entry]:
    """Joins what the document and the safetensors header say of each tensor; together they fill the file exactly."""
    if not isinstance(described, dict) or described.keys() != header.keys():
        raise _error(path, "a document that describes other tensors than the header")
    entries = {name: _entry(path, name, described[name], header[name], start) for name in described}
    place = start
    for entry in sorted(entries.values(), key=lambda entry: (entry.begin, entry.end)):
        if entry.begin != place:
            raise _error(path, f"tensor {entry.name!r} at byte {entry.begin} where {place} is expected")
        place = entry.end
    if place != size:
        raise _error(path, f"{size} bytes where the header describes {place}: truncated or appended to")
    return entries


def _entry(path: Path, name: str, described: Any, header: Any, start: int) -> Entry:
    match described, header:
        case (
            {"axes": [*axes], "coords": {**coords}, "sha256": str(sha256), **more},
            {"dtype": str(dtype), "shape": [*shape], "data_offsets": [begin, end], **rest},
        ) if not more and not rest and dtype in DTYPES and _HEX.fullmatch(sha256):
            pass
        case _:
            raise _error(path, f"tensor {name!r} with an incomplete or unknown description")
    integers = [*shape, begin, end]
    if not all(type(number) is int and 0 <= number < 2**62 for number in integers):
        raise _error(path, f"tensor {name!r} with shape {shape} and offsets {[begin, end]}")
    # sizes of 0 count as 1 here, so that a huge size beside a zero is refused as well
    expected = math.prod(shape) * DTYPES[dtype].itemsize
    if end - begin != expected or math.prod(max(number, 1) for number in shape) >= 2**60:
        raise _error(path, f"tensor {name!r} of {end - begin} bytes where its shape {shape} needs {expected}")
    if not all(isinstance(axis, str) for axis in axes) or not all(isinstance(given, list) for given in coords.values()):
        raise _error(path, f"tensor {name!r} with axes {axes} and coordinates {coords}")
    try:
        explicit = check_coords(shape, axes, cast(dict[str, list[Coordinate]], coords))
    except AxisError as error:
        raise _error(path, f"tensor {name!r}: {error.asked}: {error.found}") from error
    return Entry(
        path=path,
        name=name,
        dtype=DTYPES[dtype],
        shape=tuple(shape),
        begin=start + begin,
        end=start + end,
        axes=tuple(axes),
        coords=explicit,
        sha256=sha256,
    )
