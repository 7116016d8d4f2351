"""Where the parts of a large piece of work run: one after the other in this process, or on a Ray cluster.

An executor gets one function and many tasks, and hands back results as they finish. It repeats a task that failed; an
error of mechattr's own is not repeated, since the same call would fail again.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import ClassVar, Protocol, TypeAlias, TypeVar, runtime_checkable

from mechattr.errors import ExecutorError, MechattrError, SettingError, UnknownNameError, nearest

Work = TypeVar("Work")
Result = TypeVar("Result")
Results: TypeAlias = Generator[tuple[int, Result], None, None]  # (number of a task, its result), as they finish

NAMES = ("inprocess", "ray")


@runtime_checkable
class Executor(Protocol):
    """Runs a function on many tasks."""

    @property
    def name(self) -> str:
        """What results call it."""
        ...

    @property
    def pairs(self) -> int:
        """Prompt pairs of one block. Results depend on it by rounding, and on nothing else of an executor."""
        ...

    @property
    def nodes(self) -> int | None:
        """Nodes of one block, where a method measures them one by one; `None` for all of them."""
        ...

    def session(self) -> AbstractContextManager[None]:
        """Keeps what `map` needs, such as a cluster, from one call to the next."""
        ...

    def map(self, function: Callable[[Work], Result], tasks: Sequence[Work]) -> Results[Result]:
        """(number of a task, its result), as they finish.

        Raises:
            ExecutorError: a task failed for good; names it by its `str`.
            MechattrError: the function raised it.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class InProcess:
    """One task after the other, in this process.

    Attributes:
        retries: how often a task that failed is repeated.
        pairs: prompt pairs of one block.
        nodes: nodes of one block; `None` for all of them.
    """

    name: ClassVar[str] = "inprocess"

    retries: int = 2
    pairs: int = 8
    nodes: int | None = None

    def __post_init__(self) -> None:
        check_sizes(retries=(self.retries, 0), pairs=(self.pairs, 1))
        if self.nodes is not None:
            check_sizes(nodes=(self.nodes, 1))

    def session(self) -> AbstractContextManager[None]:
        """There is nothing to keep."""
        return nullcontext()

    def map(self, function: Callable[[Work], Result], tasks: Sequence[Work]) -> Results[Result]:
        """(number of a task, its result), in order.

        Raises:
            ExecutorError: a task failed `retries` + 1 times.
            MechattrError: the function raised it.
        """
        for i, task in enumerate(tasks):
            yield i, self._result(function, task)

    def _result(self, function: Callable[[Work], Result], task: Work) -> Result:
        for attempt in itertools.count(1):
            try:
                return function(task)
            except MechattrError:
                raise
            except Exception as error:  # any other failure is what retries are for
                if attempt > self.retries:
                    raise failed(task, attempt, error) from error
        raise AssertionError


def executor_of(executor: str | Executor) -> Executor:
    """An executor by name, with its defaults, or the one that is given.

    Raises:
        UnknownNameError: another name.
        SettingError: neither a name nor an executor.
        BackendError: Ray is not installed.
    """
    if isinstance(executor, str):
        if executor == "inprocess":
            return InProcess()
        if executor == "ray":
            from mechattr.engines.ray_executor import RayExecutor

            return RayExecutor()
        raise UnknownNameError(f"executor {executor!r}", "no such executor", nearest(executor, NAMES))
    if isinstance(executor, type) or not isinstance(executor, Executor):
        fix = "give 'inprocess', 'ray', or an executor such as InProcess() or RayExecutor()"
        found = f"the class {executor.__name__}" if isinstance(executor, type) else f"a {type(executor).__name__}"
        raise SettingError(f"executor={executor!r}", found, fix)
    return executor


def check_sizes(**sizes: tuple[object, int]) -> None:
    """Checks counts, given as (value, least).

    Raises:
        SettingError: no whole number, or one below the least.
    """
    for name, (value, least) in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise SettingError(f"an executor with {name}={value!r}", "no count", f"give a whole number from {least}")


def failed(task: object, attempts: int, error: BaseException) -> ExecutorError:
    """The error for a task that is not tried again."""
    text = str(error).strip().splitlines()
    cause = f"{type(error).__name__}: {text[-1] if text else 'no message'}"
    return ExecutorError(
        f"{task}",
        f"failed attempts: {attempts}, the last with {cause}",
        "mend the cause and call again: with resume=PATH, blocks that are finished are not repeated",
    )
