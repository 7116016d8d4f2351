"""Edits that stay for a while: what a `with` block adds to every run and generation of one model."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from mechattr.errors import ModelStateError
from mechattr.models.batch import Batch
from mechattr.models.edits import Edit
from mechattr.sites import reads_source, site_spec


@dataclass(frozen=True, eq=False, slots=True)
class StandingEdits:
    """Edits of a batch that is not known yet.

    Attributes:
        edits: batch -> edits.
        sites: the full names of the sites that they may act at.
        digest: what tells them from others in the fingerprint of results that are made meanwhile.
    """

    edits: Callable[[Batch], Sequence[Edit]]
    sites: tuple[str, ...]
    digest: str


# What acts in every call of a transformers model itself, whichever hooked model is around it
ATTACHED: dict[Any, tuple[StandingEdits, ...]] = {}


class Standing:
    """A model that can be edited for the time of a `with` block."""

    _standing: tuple[StandingEdits, ...] = ()
    _lock = threading.Lock()

    @contextmanager
    def standing(self, added: StandingEdits) -> Iterator[None]:
        """Adds edits to every run and generation inside the block, before those of the call. Blocks nest, and may end
        in any order; other models are not affected."""
        with self._lock:
            self._standing = (*self._standing, added)
        try:
            yield
        finally:
            with self._lock:
                self._standing = tuple(one for one in self._standing if one is not added)

    def _edited(self, batch: Batch, edits: Sequence[Edit], *, grows: bool = False) -> Sequence[Edit]:
        """The edits of a call, behind those that stand. Where rows do not grow, they have no position behind their last
        token: edits that stand leave them alone there, and those of the call are refused."""
        if not self._standing or isinstance(edits, Edit):
            return edits
        standing = [edit for one in self._standing for edit in one.edits(batch)]
        return [*(standing if grows else (part for edit in standing for part in _within(edit, batch))), *edits]

    def _marked(self) -> dict[str, str]:
        """What the fingerprint says while edits stand: results that are made meanwhile are of another model."""
        acting = (*ATTACHED.get(getattr(self, "model", None), ()), *self._standing)
        if not acting:
            return {}
        return {"standing_hash": hashlib.sha256(" ".join(one.digest for one in acting).encode()).hexdigest()}


def check_unedited(torch_model: Any) -> None:
    """Whether a transformers model can be looked at as it is.

    Raises:
        ModelStateError: edits are attached to it, which the checks at load would meet.
    """
    if torch_model in ATTACHED:
        found = "it is being steered, inside a block around the transformers model itself"
        raise ModelStateError(f"a hooked {type(torch_model).__name__}", found, "load it before the block begins")


def _within(edit: Edit, batch: Batch) -> list[Edit]:
    """An edit at positions that each of its rows has: one for all, or one for each position."""
    if edit.positions is None or isinstance(edit.positions, str):
        return [edit]
    rows = list(range(len(batch))) if edit.rows is None else list(edit.rows)
    lengths = (batch.prompt if reads_source(site_spec(edit.site).axes) else batch).lengths[rows]
    if all(position < int(lengths.min()) for position in edit.positions):
        return [edit]
    long = {
        position: [row for row, n in zip(rows, lengths.tolist(), strict=True) if position < n]
        for position in edit.positions
    }
    return [replace(edit, positions=[position], rows=at) for position, at in long.items() if at]
