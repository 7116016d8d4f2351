"""`Block`: some pairs of a task, for work that is done in parts and put together again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Self

from torch import Tensor

from mechattr.models.base import row_numbers
from mechattr.tasks.task import PositionMode, Span, Task


@dataclass(frozen=True, kw_only=True, eq=False)
class Block(Task):
    """Some pairs of a task, at the places that all pairs of the whole task have.

    A smaller task may align where the whole does not, or have a span that other pairs lack; a block does not, so that
    tables of blocks have the same axes as that of the whole.

    Attributes:
        whole: the task.
        index: the numbers of the pairs.
    """

    whole: Task
    index: tuple[int, ...]

    @classmethod
    def of(cls, whole: Task, index: Tensor | Sequence[int]) -> Self:
        """The pairs `index` of a task; arguments and errors are those of `Task.rows`."""
        part = whole.rows(index)
        shared = [name for name in whole.spans[0] if all(name in spans for spans in whole.spans)]
        values = {field.name: getattr(part, field.name) for field in fields(Task)}
        values["spans"] = tuple({name: spans[name] for name in shared} for spans in part.spans)
        return cls(**values, whole=whole, index=tuple(row_numbers(index, len(whole)).tolist()))

    @property
    def aligned(self) -> bool:
        """Whether a position means the same in every pair of the whole task."""
        return self.whole.aligned

    def positions(self, mode: PositionMode, *, source: bool = False) -> dict[str, tuple[Span, ...]]:
        """The places of the whole task, at these pairs."""
        found = self.whole.positions(mode, source=source)
        return {label: tuple(spans[i] for i in self.index) for label, spans in found.items()}

    def rows(self, index: Tensor | Sequence[int]) -> Task:
        """Some of these pairs, as a block of the same task."""
        chosen = row_numbers(index, len(self)).tolist()
        return Block.of(self.whole, [self.index[i] for i in chosen])


def whole_of(task: Task) -> Task:
    """The task that a block belongs to; any other task itself."""
    return task.whole if isinstance(task, Block) else task
