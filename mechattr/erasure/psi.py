"""The erasure score of a span of tokens, and the segmentation that it gives: pure functions of probability drops."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from mechattr.errors import SettingError

OFFSETS = (0, -1, -2)  # what a row of drops is about: the token itself, the one before, the one before that


def psi(drop: Float[Tensor, "3 pos"], *, first: str = "corrected") -> Float[Tensor, "start end"]:
    """How much a span looks like one item of the vocabulary: its last token and what it remembers are forgotten.

    With E_o(t) the drop in the probability that probes give the token at t + o, from an early to a later layer, read at
    position t:

        psi(p, q) = [E_0(q) + sum_{t=p..q} sum_{o in -1,-2} s(t, o) E_o(t)] / (1 + number of terms of the sum)

    with s = +1 where t + o lies within the span and -1 where it lies before it. Terms that are not defined are left
    out of the sum and of the count. Prefix sums give all spans in O(pos^2).

    Args:
        drop: E at offsets 0, -1 and -2; NaN where it is not defined, as at positions before the offset.
        first: `"corrected"` leaves out E_0(q) where it is not defined, as for a first token that no probe was trained
            on; `"reference"` lets it stand as it is, so that spans that end there have no score.

    Returns:
        The score of each span, both ends inclusive; NaN below the diagonal and where no term is defined.

    Raises:
        SettingError: another shape, or another treatment of the first token.

    References:
        Feucht, Atkinson, Wallace, Bau (2024), Token Erasure as a Footprint of Implicit Vocabulary Items in LLMs,
        arXiv 2406.20086; signs and counts as in the source that accompanies it.
    """
    if drop.ndim != 2 or len(drop) != len(OFFSETS):
        found = f"shape {tuple(drop.shape)}"
        raise SettingError("probability drops", found, "give shape [3, pos], for offsets 0, -1 and -2")
    if first not in ("corrected", "reference"):
        raise SettingError(f"first={first!r}", "no such treatment", "use 'corrected' or 'reference'")
    n = drop.shape[1]
    e = drop.to(torch.promote_types(drop.dtype, torch.float32))
    known = ~e.isnan()
    e = e.nan_to_num(nan=0.0)
    # what the sum over t of both offsets is, and how many terms it has
    sums, counts = (torch.cat([x.new_zeros(1), x[1:].sum(0).cumsum(0)]) for x in (e, known.to(e.dtype)))
    start, end = torch.arange(n)[:, None], torch.arange(n)[None]
    second = torch.cat([e[2, 1:], e.new_zeros(1)])  # E_-2(p + 1), which looks at p - 1 if the span goes that far
    before = (e[1] + e[2])[:, None] + torch.where(end > start, second[:, None], 0.0)
    inside = sums[end + 1] - sums[start] - 2 * before
    terms = counts[end + 1] - counts[start]
    itself = known[0] if first == "corrected" else torch.ones(n, dtype=torch.bool)
    last = e[0] if first == "corrected" else drop[0].to(e.dtype)
    number = terms + itself.to(e.dtype)
    scores = (inside + last) / number.clamp(min=1)
    return scores.masked_fill((end < start) | (number == 0), torch.nan)


def segment_spans(scores: Float[Tensor, "start end"], *, longest: int | None = None) -> list[tuple[int, int, float]]:
    """The spans of highest score that do not overlap, from the best on, until all positions are covered.

    Equal scores go to the shorter span, then to the earlier one; spans without a score come last, so that what comes
    back is always a partition of the positions.

    Args:
        scores: as `psi` gives them.
        longest: most tokens of a span.

    Returns:
        (first, last, score) of each span, both ends inclusive, in order of position.

    Raises:
        SettingError: scores that are not square, or a length below 1.
    """
    n = len(scores)
    if scores.ndim != 2 or scores.shape[1] != n:
        raise SettingError("scores of spans", f"shape {tuple(scores.shape)}", "give shape [pos, pos], as psi does")
    if longest is not None and (isinstance(longest, bool) or not isinstance(longest, int) or longest < 1):
        raise SettingError(f"longest={longest!r}", "no length", "give a whole number from 1")
    most = n if longest is None else min(longest, n)
    # row by row: shorter spans first, and of equally long ones the earlier
    begin = torch.arange(n).expand(most, n)
    end = begin + torch.arange(most)[:, None]
    begin, end = begin[end < n], end[end < n]
    value = scores.cpu()[begin, end].nan_to_num(nan=-math.inf)
    order = value.argsort(descending=True, stable=True)
    free = [n] * n  # for each position, the first one from there on that is taken
    taken, left, accepted = [False] * n, n, []
    for p, q in zip(begin[order].tolist(), end[order].tolist(), strict=True):
        if taken[p] or free[p] <= q:
            continue
        accepted.append((p, q, float(scores[p, q])))
        left -= q - p + 1
        if not left:
            break
        taken[p : q + 1] = [True] * (q - p + 1)
        place = p
        while place >= 0 and free[place] > p:
            free[place] = p
            place -= 1
    return sorted(accepted)
