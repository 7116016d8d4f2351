"""Token erasure: how models forget the pieces of a word once they have understood it."""

from __future__ import annotations

from mechattr.erasure.documents import read_texts
from mechattr.erasure.fit import fit_probes
from mechattr.erasure.probes import ErasureProbes
from mechattr.erasure.psi import psi, segment_spans
from mechattr.erasure.recipes import Closed, Descent

__all__ = ["Closed", "Descent", "ErasureProbes", "fit_probes", "psi", "read_texts", "segment_spans"]
