"""Token erasure: how models forget the pieces of a word once they have understood it."""

from __future__ import annotations

from mechattr.erasure.accuracy import Footprint, footprint
from mechattr.erasure.checkpoints import import_probes
from mechattr.erasure.documents import drawn, pieces, read_texts
from mechattr.erasure.fit import fit_probes
from mechattr.erasure.gold import Agreement, agreement, agreement_table
from mechattr.erasure.probes import ErasureProbes
from mechattr.erasure.psi import psi, segment_spans
from mechattr.erasure.recipes import Closed, Descent
from mechattr.erasure.segment import Segmentation, segment
from mechattr.erasure.vocabulary import ImplicitVocabulary, read_out
from mechattr.erasure.words import Words, entities_of, words_of

__all__ = [
    "Agreement",
    "Closed",
    "Descent",
    "ErasureProbes",
    "Footprint",
    "ImplicitVocabulary",
    "Segmentation",
    "Words",
    "agreement",
    "agreement_table",
    "drawn",
    "entities_of",
    "fit_probes",
    "footprint",
    "import_probes",
    "pieces",
    "psi",
    "read_out",
    "read_texts",
    "segment",
    "segment_spans",
    "words_of",
]
