"""`EvidenceSample`: a prompt of words, two continuations, and the words that decide between them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class EvidenceSample:
    """A prompt whose right continuation follows from known words of it; plain text, no tokenizer has seen it.

    All numbers of words count from 0.

    Attributes:
        words: the prompt, to be joined by single spaces.
        target: the continuation that the evidence asks for, one word.
        foil: the continuation that it rules out.
        evidence: which words decide.
        evidence_plus: the evidence, and words that say the same as part of the same phrase (a determiner).
        secondary: words elsewhere that also tell the answer (a verb that agrees with the same noun): no fault of a
            method that points at them.
        attractors: words that ask for the same kind of continuation and are not what it follows from.
        factors: what was drawn, for balancing and for grouping results.
    """

    words: tuple[str, ...]
    target: str
    foil: str
    evidence: tuple[int, ...]
    evidence_plus: tuple[int, ...] = ()
    secondary: tuple[int, ...] = ()
    attractors: tuple[int, ...] = ()
    factors: Mapping[str, str | int | bool] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """The prompt."""
        return " ".join(self.words)
