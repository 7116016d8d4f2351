"""`PairText`: one clean and one corrupt prompt as plain text, before any tokenizer has seen them."""

from __future__ import annotations

import random
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeVar

Split = Literal["train", "test"]
Span = tuple[int, int]
Answer = str | int | tuple[str | int, ...]
Item = TypeVar("Item")


@dataclass(frozen=True, slots=True, kw_only=True)
class PairText:
    """A clean prompt, the corrupt prompt that differs from it at named places, and the two answers.

    Attributes:
        clean: the prompt on which the model should give `answer`.
        corrupt: the prompt with the decisive words exchanged.
        answer: continuation of the clean prompt, with its leading space, or a token id; several are a set of answers.
        foil: the continuation (or set) that the answer is compared with; () for none.
        spans: name -> (first character, one past the last) in `clean`.
        corrupt_spans: the same names in `corrupt`.
        factors: what was drawn (template, order, construction, ...), for balancing and for grouping results.
    """

    clean: str
    corrupt: str
    answer: Answer
    foil: Answer
    spans: Mapping[str, Span] = field(default_factory=dict)
    corrupt_spans: Mapping[str, Span] = field(default_factory=dict)
    factors: Mapping[str, str | int | bool] = field(default_factory=dict)


def members(answer: Answer) -> tuple[str | int, ...]:
    """An answer as a tuple."""
    return answer if isinstance(answer, tuple) else (answer,)


def fill(template: str, words: Mapping[str, str]) -> tuple[str, dict[str, Span]]:
    """Put `words` into the `{slots}` of a template; slots in capitals are returned as character spans."""
    text, spans = "", {}
    for literal, slot, _, _ in string.Formatter().parse(template):
        text += literal
        if slot is not None:
            if slot.isupper():
                spans[slot] = (len(text), len(text) + len(words[slot]))
            text += words[slot]
    return text, spans


def pick(rng: random.Random, items: Sequence[Item], index: int | None) -> tuple[int, Item]:
    """One of `items` with its index: the one at `index`, or a random one where `index` is None."""
    chosen = rng.randrange(len(items)) if index is None else index
    return chosen, items[chosen]
