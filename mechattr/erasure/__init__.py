"""Token erasure: how models forget the pieces of a word once they have understood it."""

from __future__ import annotations

from mechattr.erasure.psi import psi, segment_spans

__all__ = ["psi", "segment_spans"]
