"""Edits that stay for a while: what a `with` block adds to every run and generation of one model."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from mechattr.models.batch import Batch
from mechattr.models.edits import Edit


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

    def _edited(self, batch: Batch, edits: Sequence[Edit]) -> Sequence[Edit]:
        """The edits of a call, behind those that stand."""
        if not self._standing or isinstance(edits, Edit):
            return edits
        return [*(edit for one in self._standing for edit in one.edits(batch)), *edits]

    def _marked(self) -> dict[str, str]:
        """What the fingerprint says while edits stand: results that are made meanwhile are of another model."""
        if not self._standing:
            return {}
        return {"standing_hash": hashlib.sha256(" ".join(one.digest for one in self._standing).encode()).hexdigest()}
