"""How well segments agree with words or names that are known, beside what chance and a simple rule reach."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mechattr.erasure.words import Span
from mechattr.errors import SettingError

if TYPE_CHECKING:
    import pandas as pd

DRAWS = 100
LENGTHS: dict[str, Callable[[int], bool]] = {
    "all": lambda n: n > 1,
    "2": lambda n: n == 2,
    "3": lambda n: n == 3,
    "4+": lambda n: n > 3,
}


@dataclass(frozen=True, slots=True)
class Agreement:
    """Spans of several tokens against gold spans.

    Attributes:
        precision: share of the spans that are gold; NaN without any.
        recall: share of the gold spans that are found; NaN without any.
        boundary_f1: F1 of the places at which a span of several tokens begins or ends.
        n_found, n_gold: their numbers.
    """

    precision: float
    recall: float
    boundary_f1: float
    n_found: int
    n_gold: int


def agreement(found: Sequence[Sequence[Span]], gold: Sequence[Sequence[Span]], *, length: str = "all") -> Agreement:
    """Precision and recall of exact spans, and F1 of their boundaries, over all documents.

    Args:
        found: for each document its spans (first, last), both inclusive; those of one token do not count.
        gold: likewise.
        length: which spans count: `"all"` of several tokens, `"2"`, `"3"` or `"4+"`.

    Raises:
        SettingError: another number of documents, or no such length.
    """
    if len(found) != len(gold):
        raise SettingError(f"gold spans of {len(found)} documents", f"{len(gold)}", "give a list for each document")
    if length not in LENGTHS:
        raise SettingError(f"length={length!r}", "no such length", f"use one of {', '.join(LENGTHS)}")
    counts, edges = [0, 0, 0], [0, 0, 0]
    for ours, theirs in zip(found, gold, strict=True):
        a, b = ({(p, q) for p, q in spans if LENGTHS[length](q - p + 1)} for spans in (ours, theirs))
        counts = [x + y for x, y in zip(counts, (len(a & b), len(a), len(b)), strict=True)]
        ends_a, ends_b = ({("first", p) for p, _ in s} | {("last", q) for _, q in s} for s in (a, b))
        sizes = (len(ends_a & ends_b), len(ends_a), len(ends_b))
        edges = [x + y for x, y in zip(edges, sizes, strict=True)]
    both, n_found, n_gold = counts
    total = edges[1] + edges[2]
    return Agreement(
        both / n_found if n_found else float("nan"),
        both / n_gold if n_gold else float("nan"),
        2 * edges[0] / total if total else float("nan"),
        n_found,
        n_gold,
    )


def joined(strings: Sequence[str]) -> list[Span]:
    """What the tokenizer alone says: a token without a space belongs to the one before, if both are letters."""
    spans: list[Span] = []
    for i, token in enumerate(strings):
        glued = bool(spans) and token[:1].isalpha() and strings[i - 1][-1:].isalpha()
        spans = [*spans[:-1], (spans[-1][0], i)] if glued else [*spans, (i, i)]
    return [span for span in spans if span[1] > span[0]]


def shuffled(spans: Sequence[Span], n: int, draw: random.Random) -> list[Span]:
    """Spans of the same lengths at random places of a document of n tokens that do not overlap."""
    lengths = [q - p + 1 for p, q in spans]
    gaps = n - sum(lengths)
    draw.shuffle(lengths)
    cuts = sorted(draw.choices(range(gaps + 1), k=len(lengths)))
    found, used = [], 0
    for cut, size in zip(cuts, lengths, strict=True):
        found.append((cut + used, cut + used + size - 1))
        used += size
    return found


def agreement_table(
    found: Sequence[Sequence[Span]],
    gold: Sequence[Sequence[Span]],
    strings: Sequence[Sequence[str]],
    *,
    seed: int = 0,
    draws: int = DRAWS,
) -> pd.DataFrame:
    """Agreement by length of span: of the segments, of random spans of the same lengths, and of the merge rule.

    Args:
        found: spans of several tokens of each document.
        gold: gold spans of each document.
        strings: the tokens of each document as text.
        seed: of the random spans.
        draws: how often spans are drawn; the mean is shown.

    Returns:
        Columns spans, length, precision, recall, boundary_f1, n_found, n_gold.
    """
    import pandas as pd

    several = [[span for span in spans if span[1] > span[0]] for spans in found]
    draw = random.Random(seed)
    random_spans = [
        [shuffled(spans, len(tokens), draw) for spans, tokens in zip(several, strings, strict=True)]
        for _ in range(draws)
    ]
    rows = []
    for length in LENGTHS:
        singles = {"segments": several, "merged tokens": [joined(tokens) for tokens in strings]}
        for name, spans in singles.items():
            rows.append({"spans": name, "length": length, **_fields(agreement(spans, gold, length=length))})
        drawn = [_fields(agreement(spans, gold, length=length)) for spans in random_spans]
        mean = {key: sum(one[key] for one in drawn) / len(drawn) for key in drawn[0]}
        rows.append({"spans": "random", "length": length, **mean})
    return pd.DataFrame(rows)


def _fields(found: Agreement) -> dict[str, float]:
    return {name: float(getattr(found, name)) for name in Agreement.__slots__}
