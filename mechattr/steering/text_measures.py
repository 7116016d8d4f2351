"""Measures of texts alone: how varied they are, and how much they say again."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

from mechattr.errors import SettingError
from mechattr.steering.numbers import check_count

# A text, whose words are counted, or anything else that is one after the other, such as ids of tokens.
Row = str | Sequence[Hashable]


def distinct_n(rows: Sequence[Row], n: int = 2) -> float:
    r"""How varied some texts are together: different n-grams, as a share of all n-grams of all of them.

    $$\text{distinct}_n = \frac{|\bigcup_i \{g : g \in G_n(i)\}|}{\sum_i |G_n(i)|}$$

    Args:
        rows: texts, whose words between white space are counted, or rows of token ids.
        n: items of an n-gram; none reaches from one row into the next.

    Returns:
        Between 0 and 1; NaN where no row has n items.

    Raises:
        SettingError: no rows, one text instead of several, or an n that is not a whole number from 1.

    References:
        Li, Galley, Brockett, Gao, Dolan (2016), A Diversity-Promoting Objective Function, arXiv 1510.03055.
    """
    _check(rows, n)
    grams = [gram for row in rows for gram in _grams(row, n)]
    return len(set(grams)) / len(grams) if grams else float("nan")


def repetition(rows: Sequence[Row], n: int = 4) -> list[float]:
    r"""How much each text says again: the share of its n-grams that came before in the same text.

    $$1 - \frac{|\{g : g \in G_n\}|}{|G_n|}$$

    Args:
        rows: texts, whose words between white space are counted, or rows of token ids.
        n: items of an n-gram.

    Returns:
        One number a row, from 0 to below 1; NaN for a row of fewer than n items.

    Raises:
        SettingError: no rows, one text instead of several, or an n that is not a whole number from 1.

    References:
        Welleck, Kulikov, Roller, Dinan, Cho, Weston (2019), Neural Text Generation with Unlikelihood Training, arXiv
        1908.04319 (seq-rep-n).
    """
    _check(rows, n)
    grams = [_grams(row, n) for row in rows]
    return [(len(found) - len(set(found))) / len(found) if found else float("nan") for found in grams]


def _grams(row: Row, n: int) -> list[tuple[Hashable, ...]]:
    whole: Sequence[Any] = row.split() if isinstance(row, str) else row
    items = [one.item() if hasattr(one, "item") else one for one in whole]  # equal numbers of tensors are not the same
    return [tuple(items[i : i + n]) for i in range(len(items) - n + 1)]


def _check(rows: Sequence[Row], n: int) -> None:
    check_count("n", n)
    if isinstance(rows, str) or not len(rows):
        found = "one text" if isinstance(rows, str) else "none"
        raise SettingError("texts to measure", found, "give a list of texts, or of rows of token ids")
