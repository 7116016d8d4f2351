"""GGUF files of control vectors: as much of the format as one direction a layer needs, read and written in full."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mechattr.errors import ArtifactError

MAGIC, VERSION, ALIGNMENT = b"GGUF", 3, 32
_F32, _STRING, _ARRAY, _UINT32 = 0, 8, 9, 4  # F32 is a type of tensors, the others are types of values
_PLAIN = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_DEEPEST = 8  # of arrays in arrays


def write(path: Path, meta: Mapping[str, str | int], tensors: Mapping[str, Tensor]) -> None:
    """Writes a file of version 3, with texts and whole numbers (as uint32) and tensors (as float32).

    The file appears at once, or not at all.
    """
    head = [MAGIC, struct.pack("<IQQ", VERSION, len(tensors), len(meta))]
    for key, value in meta.items():
        kind, packed = (_STRING, _text(value)) if isinstance(value, str) else (_UINT32, struct.pack("<I", value))
        head += [_text(key), struct.pack("<I", kind), packed]
    offset, parts = 0, []
    for name, tensor in tensors.items():
        data = tensor.detach().cpu().to(torch.float32).contiguous().numpy().astype("<f4").tobytes()
        sizes = tuple(reversed(tensor.shape))  # the fastest axis first
        head += [_text(name), struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, _F32, offset)]
        parts.append(data + bytes(-len(data) % ALIGNMENT))
        offset += len(parts[-1])
    begin = b"".join(head)
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(begin + bytes(-len(begin) % ALIGNMENT) + b"".join(parts))
    partial.replace(path)


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The values and the float32 tensors of a file of version 2 or 3.

    Raises:
        ArtifactError: no such file, another format or version, a truncated file, or tensors of other types.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ArtifactError(f"reading {path}", str(error), "give the path of a .gguf file") from error
    if data[:4] != MAGIC:
        raise ArtifactError(f"reading {path}", "it is no GGUF file", "give the path of a .gguf file")
    try:
        return _parsed(_Reader(path, data))
    except (struct.error, UnicodeDecodeError, ValueError) as error:
        if isinstance(error, ArtifactError):
            raise
        raise _damaged(path, str(error)) from error


class _Reader:
    """Bytes that are read from the front."""

    def __init__(self, path: Path, data: bytes) -> None:
        self.path, self.data, self.at = path, data, len(MAGIC)

    def take(self, form: str) -> Any:
        """The next number."""
        (value,) = struct.unpack_from(form, self.data, self.at)
        self.at += struct.calcsize(form)
        return value

    def text(self) -> str:
        """The next text."""
        n = self.take("<Q")
        if n > len(self.data) - self.at:
            raise _damaged(self.path, f"a text of {n} bytes at byte {self.at} of {len(self.data)}")
        self.at += n
        return self.data[self.at - n : self.at].decode()

    def value(self, kind: int, depth: int = 0) -> Any:
        """The next value of a type."""
        if kind in _PLAIN:
            return self.take(_PLAIN[kind])
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY or depth == _DEEPEST:
            raise _damaged(self.path, f"a value of type {kind}")
        inner, n = self.take("<I"), self.take("<Q")
        if n > len(self.data) - self.at:
            raise _damaged(self.path, f"an array of {n} values at byte {self.at} of {len(self.data)}")
        return [self.value(inner, depth + 1) for _ in range(n)]


def _parsed(file: _Reader) -> tuple[dict[str, Any], dict[str, Tensor]]:
    version, n_tensors, n_values = file.take("<I"), file.take("<Q"), file.take("<Q")
    if version not in (2, VERSION):
        fix = "write it again with a newer tool" if version < 2 else "update mechattr"
        raise ArtifactError(f"reading {file.path}", f"GGUF of version {version}", fix)
    meta: dict[str, Any] = {}
    for _ in range(n_values):
        key = file.text()
        meta[key] = file.value(file.take("<I"))
    outlines = [_outline(file) for _ in range(n_tensors)]
    alignment = meta.get("general.alignment", ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise _damaged(file.path, f"an alignment of {alignment!r}")
    begin = file.at + -file.at % alignment
    tensors = {}
    for name, shape, kind, offset in outlines:
        if kind != _F32:
            found = f"the tensor {name!r} has type {kind}, which is not float32"
            raise ArtifactError(f"reading {file.path}", found, "write control vectors as F32")
        size = 4 * math.prod(shape)
        if begin + offset + size > len(file.data):
            raise _damaged(file.path, f"{name!r} ends at byte {begin + offset + size} of {len(file.data)}")
        values = np.frombuffer(file.data, "<f4", math.prod(shape), begin + offset)
        tensors[name] = torch.from_numpy(values.astype(np.float32).reshape(shape))
    return meta, tensors


def _outline(file: _Reader) -> tuple[str, tuple[int, ...], int, int]:
    name, n = file.text(), file.take("<I")
    if n > 4:
        raise _damaged(file.path, f"{name!r} has {n} axes")
    shape = tuple(reversed([file.take("<Q") for _ in range(n)]))
    return name, shape, file.take("<I"), file.take("<Q")


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _damaged(path: Path, found: str) -> ArtifactError:
    return ArtifactError(f"reading {path}", f"a damaged or truncated file: {found}", "copy or write the file again")
