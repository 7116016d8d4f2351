"""Distinct n-grams and repetition, against counts by hand."""

from __future__ import annotations

import math

import pytest
import torch

import mechattr as ma
from mechattr.errors import SettingError


@pytest.mark.parametrize(
    ("rows", "n", "wanted"),
    [
        (["a b a b"], 1, 2 / 4),
        (["a b a b"], 2, 2 / 3),  # ab ba ab
        (["a b", "a b"], 2, 1 / 2),  # pooled: the second text says nothing new
        (["a b", "b a"], 2, 2 / 2),  # no n-gram reaches from one text into the next
        (["a"], 2, math.nan),
        (["", "a b"], 2, 1.0),
        ([[1, 2, 1, 2], (2, 1)], 2, 2 / 4),
    ],
)
def test_distinct_n(rows: list[str], n: int, wanted: float) -> None:
    found = ma.steering.distinct_n(rows, n)
    assert found == wanted or (math.isnan(found) and math.isnan(wanted))


@pytest.mark.parametrize(
    ("row", "n", "wanted"),
    [
        ("a a a a", 1, 3 / 4),
        ("a b c d", 1, 0.0),
        ("a b  a b", 2, 1 / 3),  # white space does not count
        ("a b c", 4, math.nan),
        ("", 1, math.nan),
        ([5] * 10, 4, 6 / 7),
    ],
)
def test_repetition(row: str, n: int, wanted: float) -> None:
    found = ma.steering.repetition([row, "x y z"], n)[0]
    assert found == wanted or (math.isnan(found) and math.isnan(wanted))


def test_repetition_is_counted_text_by_text() -> None:
    texts = ["a b c", "a b c"]
    assert ma.steering.repetition(texts, 1) == [0.0, 0.0]
    pooled = 1 - ma.steering.distinct_n(texts, 1)
    assert pooled == 0.5  # what a count over all texts would say


def test_numbers_of_tensors_are_equal_where_they_are() -> None:
    """Elements of a tensor are objects of their own, of which no two are the same key of a set."""
    rows = torch.tensor([[1, 2, 1, 2]])
    assert len(set(rows[0])) == 4  # control: why they are made numbers
    for given in (rows, list(rows), [list(rows[0])], rows.numpy()):
        assert ma.steering.distinct_n(given, 2) == 2 / 3 and ma.steering.repetition(given, 2) == [1 / 3]  # type: ignore[arg-type]


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(SettingError, match=r"texts to measure\n  found: one text\n  fix: give a list of texts"):
        ma.steering.distinct_n("a b")
    with pytest.raises(SettingError, match="found: none"):
        ma.steering.repetition([])
    for n in (0, True, 1.5):
        with pytest.raises(SettingError, match=r"not a count\n  fix: give a whole number from 1"):
            ma.steering.distinct_n(["a b"], n)  # type: ignore[arg-type]
