"""The run that activations are taken from: made now, batch by batch, or recorded earlier and given as a `Cache`."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from mechattr import storage
from mechattr.artifact import Cache
from mechattr.errors import MismatchError, SettingError
from mechattr.models.base import Batch, HookedModel, Metric, ModelInfo
from mechattr.patching.recording import recorded
from mechattr.provenance import provenance
from mechattr.sites import SITES, parse


@dataclass(frozen=True, eq=False, slots=True)
class Source:
    """The source run of all pairs.

    Attributes:
        model: who runs it.
        batch: its prompts, one a pair.
        metric: the task's.
        names: the full names that are needed.
        recorded: activations of all pairs by full name, where they were recorded earlier.
    """

    model: HookedModel
    batch: Batch
    metric: Metric
    names: tuple[str, ...]
    recorded: Mapping[str, Tensor] | None = None

    def rows(self, pairs: Sequence[int]) -> tuple[dict[str, Tensor], Tensor | None]:
        """Activations by full name, and the metric if the prompts had to be run."""
        if self.recorded is not None:
            device = self.batch.device
            return {name: self.recorded[name][list(pairs)].to(device) for name in self.names}, None
        return recorded(self.model, self.batch.rows(pairs), self.names, self.metric)

    @property
    def forward(self) -> int:
        """Forward passes of a pair."""
        return 1 if self.recorded is None else 0

    @property
    def digest(self) -> str | None:
        """sha256 of a recording."""
        if self.recorded is None:
            return None
        digest = hashlib.sha256()
        for name in sorted(self.names):
            digest.update(f"{name} {storage.checksum(self.recorded[name])}\n".encode())
        return digest.hexdigest()


def source_of(
    model: HookedModel, batch: Batch, metric: Metric, names: Sequence[str], recording: Cache | None
) -> Source:
    """The source run, checked if it is a recording.

    Raises:
        SettingError: something else than a `Cache`.
        MismatchError: the recording lacks a site, was made on other tokens or by another model, or has another shape.
    """
    wanted = tuple(dict.fromkeys(names))
    if recording is None:
        return Source(model, batch, metric, wanted)
    if not isinstance(recording, Cache):
        fix = "give a Cache, such as models.record(...) or run.activations"
        raise SettingError("source", f"a {type(recording).__name__}", fix)
    missing = [name for name in wanted if name not in recording.tensors]
    if missing:
        raise MismatchError(
            f"{len(wanted)} sites of a recorded source run",
            f"it has no {missing[0]} ({len(missing)} missing)",
            f"record {', '.join(missing[:4])}{', ...' if len(missing) > 4 else ''}",
        )
    known = recording.provenance
    now = provenance({**model.fingerprint()}, tokens=batch.content)
    for field, made in (("weight_hash", "by another model"), ("tokens_sha256", "on other prompts")):
        if known.get(field) not in (None, now[field]):
            raise MismatchError(
                "a recorded source run",
                f"it was made {made} ({field} differs)",
                "record this task's corrupt prompts under noising, its clean ones under denoising",
            )
    values = {name: recording.tensors[name].values for name in wanted}
    rows, columns = batch.tokens.shape
    for name, x in values.items():
        shape = shape_of(name, model.info, rows, columns, batch.prompt.tokens.shape[1])
        if tuple(x.shape) != shape:
            raise MismatchError(
                f"{name} of shape {shape}",
                f"a recording of shape {tuple(x.shape)}",
                "record all prompts of the task in one batch",
            )
    return Source(model, batch, metric, wanted, values)


def shape_of(name: str, info: ModelInfo, rows: int, columns: int, source: int = 0) -> tuple[int, ...]:
    """The shape of a site's activation on a batch of so many rows and columns, and columns of the source."""
    short = parse(name)[0]
    sizes = {"batch": rows, "pos": columns, "query": columns, "key": columns, **info.sizes_at(short)}
    sizes |= {"source": source, "source_query": source}
    return tuple(sizes[axis] for axis in SITES[short].axes)
