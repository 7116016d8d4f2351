"""The base of all artifacts: labelled tensors with the settings and the provenance that made them."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from html import escape
from types import MappingProxyType
from typing import ClassVar, Self, cast

from mechattr import storage
from mechattr.errors import ArtifactError, MechattrError, SettingError
from mechattr.labelled import Labelled
from mechattr.provenance import JSON, json_value

_SHOWN = 20  # rows of a table in a notebook


@dataclass(frozen=True, eq=False, repr=False)
class Artifact:
    """Base of all results.

    Args:
        tensors: labelled tensors by name.
        settings: how the result was made: strict JSON, NaN becomes `None`.
        provenance: what it was made from; see `mechattr.provenance.provenance`.
        checksums: sha256 by tensor, where the artifact was read from a file.

    Raises:
        SettingError: settings or provenance are not JSON.
    """

    kind: ClassVar[str]

    tensors: Mapping[str, Labelled]
    settings: Mapping[str, JSON] = field(default_factory=dict, kw_only=True)
    provenance: Mapping[str, JSON] = field(default_factory=dict, kw_only=True)
    checksums: Mapping[str, str] | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if not isinstance(self.tensors, storage.Stored):
            object.__setattr__(self, "tensors", MappingProxyType(dict(self.tensors)))
        for name in ("settings", "provenance"):
            value = cast(dict[str, JSON], json_value(getattr(self, name), name))
            object.__setattr__(self, name, MappingProxyType(value))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes one file; equal artifacts give equal bytes."""
        storage.save(path, self.kind, self.tensors, self.settings, self.provenance)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, lazy: bool = False) -> Self:
        """Reads an artifact of this kind; arguments and errors are those of `open`.

        Raises:
            ArtifactError: also for an artifact of another kind.
        """
        stored = storage.open(path)
        if stored.kind != cls.kind:
            raise ArtifactError(
                f"to open {path} as kind {cls.kind!r}",
                f"kind {stored.kind!r}",
                "use mechattr.open(path), or load() of the right class",
            )
        return cls.from_stored(stored, lazy=lazy)

    @classmethod
    def from_stored(cls, stored: storage.Stored, *, lazy: bool = False) -> Self:
        """The artifact in an opened file or folder; arguments and errors are those of `open`."""
        tensors = stored if lazy else dict(stored)
        try:
            return cls(tensors, settings=stored.settings, provenance=stored.provenance, checksums=stored.checksums)
        except MechattrError as error:
            raise ArtifactError(
                f"to read kind {cls.kind!r}", f"{error.asked}: {error.found}", "make the artifact again"
            ) from error

    def verify(self) -> None:
        """Checks every tensor against the sha256 that it was stored with.

        Raises:
            ArtifactError: a tensor was changed in memory or, where it is lazy, on disk.
            SettingError: the artifact was not read from a file, so there is nothing to compare with.
        """
        if self.checksums is None:
            raise SettingError("to verify an artifact", "it was not read from a file", "save it and open the file")
        for name, expected in self.checksums.items():
            if storage.checksum(self.tensors[name].values) != expected:
                raise ArtifactError(f"to verify {name!r}", "its values changed after it was read", "open it again")

    def _parts(self) -> dict[str, Labelled | storage.LazyTensor]:
        """Something with axes, shape and dtype for each tensor, without reading a lazy one."""
        tensors = self.tensors
        return {name: tensors.lazy(name) if isinstance(tensors, storage.Stored) else tensors[name] for name in tensors}

    def __repr__(self) -> str:
        size = sum(math.prod(part.shape) * part.dtype.itemsize for part in self._parts().values())
        return f"{type(self).__name__}({len(self.tensors)} tensors, {size:,} bytes)"

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{escape(name)}</td><td>{escape(_sizes(part))}</td><td>{_dtype(part)}</td></tr>"
            for name, part in list(self._parts().items())[:_SHOWN]
        )
        more = f"<div>and {len(self.tensors) - _SHOWN} more</div>" if len(self.tensors) > _SHOWN else ""
        return (
            f"<div>{escape(repr(self))}</div><table><thead><tr><th>name</th><th>axes</th><th>dtype</th></tr></thead>"
            f"<tbody>{rows}</tbody></table>{more}"
        )


def _sizes(part: Labelled | storage.LazyTensor) -> str:
    return ", ".join(f"{axis}={size}" for axis, size in zip(part.axes, part.shape, strict=True)) or "scalar"


def _dtype(part: Labelled | storage.LazyTensor) -> str:
    return str(part.dtype).removeprefix("torch.")
