"""Properties of metrics that hold for any logits, and of spans that hold for any words."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from mechattr.models.base import Batch
from mechattr.tasks.metrics import (
    Metric,
    kl_divergence,
    log_probability,
    logit_difference,
    probability_difference,
    sequence_log_probability,
)
from mechattr.tasks.pairtext import fill

VOCAB = 7
logits_of_rows = st.lists(
    st.lists(st.lists(st.floats(-30, 30), min_size=VOCAB, max_size=VOCAB), min_size=2, max_size=5),
    min_size=1,
    max_size=4,
)


def batch_of(rows: list[list[list[float]]], side: str) -> tuple[torch.Tensor, Batch]:
    """Rows of logits, padded with numbers that must not matter."""
    width = max(map(len, rows))
    logits = torch.full((len(rows), width, VOCAB), 99.0, dtype=torch.float64)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        logits[i, place] = torch.tensor(row, dtype=torch.float64)
        mask[i, place] = True
    return logits, Batch.of(torch.zeros(len(rows), width, dtype=torch.long), mask)


def metrics_for(count: int) -> list[Metric]:
    first, second = torch.arange(count) % VOCAB, (torch.arange(count) + 3) % VOCAB
    reference = torch.linspace(-2, 2, count * VOCAB, dtype=torch.float64).reshape(count, VOCAB).log_softmax(-1)
    return [
        logit_difference(first, second),
        log_probability(first),
        sequence_log_probability(torch.stack([first, second], 1)),
        probability_difference(torch.stack([first, (first + 1) % VOCAB], 1), second),
        kl_divergence(reference),
    ]


@given(logits_of_rows)
def test_padding_changes_no_value(rows: list[list[list[float]]]) -> None:
    for right, left, alone in zip(*(metrics_for(len(rows)) for _ in range(3)), strict=True):
        values = right(*batch_of(rows, "right"))
        torch.testing.assert_close(left(*batch_of(rows, "left")), values, rtol=0, atol=0)  # the same numbers are read
        for i in range(len(rows)):
            logits, batch = batch_of([rows[i]], "right")
            single = alone(logits, Batch(batch.tokens, batch.mask, torch.tensor([i])))
            torch.testing.assert_close(single[0], values[i], rtol=1e-12, atol=1e-12)  # sums of other batch shapes


@given(logits_of_rows)
def test_bounds_and_symmetry(rows: list[list[list[float]]]) -> None:
    logits, batch = batch_of(rows, "right")
    count = len(rows)
    first, second = torch.arange(count) % VOCAB, (torch.arange(count) + 3) % VOCAB
    difference, log_p, sequence, probability, divergence = (m(logits, batch) for m in metrics_for(count))
    torch.testing.assert_close(logit_difference(second, first)(logits, batch), -difference, rtol=0, atol=0)
    assert (log_p <= 1e-12).all()
    assert (sequence <= 1e-12).all()
    assert (probability.abs() <= 1 + 1e-12).all()
    assert (divergence >= -1e-12).all()  # rounding of a sum that is never negative
    torch.testing.assert_close(difference, log_p - log_probability(second)(logits, batch), rtol=0, atol=1e-11)


@given(st.lists(st.text(st.characters(exclude_characters="{}"), min_size=1, max_size=6), min_size=1, max_size=4))
def test_fill_spans_cut_out_their_words(words: list[str]) -> None:
    slots = {f"W{i}": word for i, word in enumerate(words)}
    text, spans = fill(" and ".join(f"{{{slot}}}" for slot in slots), slots)
    assert text == " and ".join(words)
    assert {slot: text[slice(*spans[slot])] for slot in spans} == slots
