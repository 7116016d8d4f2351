"""Numbers that users give: counts, numbers above 0, shares."""

from __future__ import annotations

from math import inf
from typing import Any

from mechattr.errors import SettingError


def check_count(name: str, value: Any) -> None:
    """Whether an argument is a number of things.

    Raises:
        SettingError: it is none.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise SettingError(f"{name}={value!r}", "not a count", "give a whole number from 1")


def check_positive(name: str, value: Any) -> None:
    """Whether an argument is a number above 0.

    Raises:
        SettingError: it is none.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < inf:
        raise SettingError(f"{name}={value!r}", "no positive number", "give a number above 0")


def check_share(name: str, value: Any) -> None:
    """Whether an argument is a share of something, neither none nor all of it.

    Raises:
        SettingError: it is none.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
        raise SettingError(f"{name}={value!r}", "no share", "give a number between 0 and 1")
