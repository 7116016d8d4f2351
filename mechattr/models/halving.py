"""Batches that shrink when memory runs out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

Row = TypeVar("Row")
Value = TypeVar("Value")

# What torch says on devices that raise a plain RuntimeError.
_MESSAGES = ("out of memory", "not enough memory", "can't allocate memory")


class Halving:
    """Runs rows in batches of at most `size`, which halves when memory runs out and stays there.

    Args:
        size: rows of the first batch.
    """

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, rows: Sequence[Row], run: Callable[[Sequence[Row]], list[Value]]) -> list[Value]:
        """`run(rows)`, in batches; `run` returns one value a row and must be safe to repeat after an error.

        Raises:
            RuntimeError: a single row does not fit.
        """
        found: list[Value] = []
        while len(found) < len(rows):
            part = rows[len(found) : len(found) + self.size]
            try:
                found += run(part)
                continue
            except (MemoryError, RuntimeError) as error:
                if len(part) == 1 or not _out_of_memory(error):
                    raise
            self.size = len(part) // 2
            torch.cuda.empty_cache()  # after the except clause, whose traceback keeps the tensors of the failed batch
        return found


def _out_of_memory(error: BaseException) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return any(message in str(error) for message in _MESSAGES)
