"""The vocabulary that a model really has: what texts can produce, and what training reached."""

from __future__ import annotations

from mechattr.vocabulary.clusters import Suspects, communities, suspects
from mechattr.vocabulary.indicators import INDICATORS, indicator
from mechattr.vocabulary.reach import CATEGORIES, RoundTrip, consistent, never_in_text, round_trips
from mechattr.vocabulary.undertrained import UnderTrained, undertrained
from mechattr.vocabulary.verify import repetition

__all__ = [
    "CATEGORIES",
    "INDICATORS",
    "RoundTrip",
    "Suspects",
    "UnderTrained",
    "communities",
    "consistent",
    "indicator",
    "never_in_text",
    "repetition",
    "round_trips",
    "suspects",
    "undertrained",
]
