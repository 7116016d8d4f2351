"""A method on a large task, block by block: cut, run on an executor, put together.

`spread` is for methods whose result is a mean over pairs. Methods that put numbers of single pairs together themselves
(ratios of means, statistics of samples) use `Pairs`. The workers get the model and the task once, and then the numbers
of the pairs (and nodes) of each block; what comes back is the block's result.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from tqdm.auto import tqdm

from mechattr.base import Artifact
from mechattr.engines.executors import Executor, executor_of
from mechattr.engines.merge import Part, check_origin, merged
from mechattr.engines.packed import packed, unpacked
from mechattr.engines.sweep import Journal
from mechattr.errors import SettingError
from mechattr.models.base import HookedModel
from mechattr.provenance import JSON, provenance
from mechattr.tasks.block import Block
from mechattr.tasks.task import Task

Kind = TypeVar("Kind", bound=Artifact)
Cut = tuple[str, Callable[[], Sequence[Any]]]


@dataclass(frozen=True, eq=False, slots=True)
class Work:
    """What every worker gets: a method and all that it is called with, except which block.

    Attributes:
        function: the method.
        model: the model.
        task: the whole task.
        settings: its keywords.
        cut: the keyword that takes nodes, and all nodes, where blocks are cut by nodes, too.
    """

    function: Callable[..., Artifact]
    model: HookedModel
    task: Task
    settings: Mapping[str, Any]
    cut: tuple[str, Sequence[Any]] | None = None

    def __call__(self, part: Part) -> dict[str, Any]:
        """The result on one block."""
        chosen = dict(self.settings)
        if self.cut is not None and part.nodes is not None:
            name, nodes = self.cut
            chosen[name] = [nodes[i] for i in part.nodes]
        return packed(self.function(self.model, Block.of(self.task, part.pairs), progress=False, **chosen))

    def parts(self, executor: Executor) -> list[Part]:
        """All blocks, nodes within pairs."""
        size = executor.nodes
        nodes = [None] if self.cut is None or size is None else _ranges(len(self.cut[1]), size)
        grid = [(pairs, some) for pairs in _ranges(len(self.task), executor.pairs) for some in nodes]
        return [Part(number, pairs, some) for number, (pairs, some) in enumerate(grid)]


def spread(
    function: Callable[..., Kind],
    /,
    cut: Cut | None = None,
    *,
    model: HookedModel,
    task: Task,
    executor: str | Executor,
    resume: Path | str | None = None,
    progress: bool | None = None,
    **settings: Any,
) -> Kind:
    """What `function(model, task, **settings)` returns, made block by block.

    Args:
        function: a method whose result is a mean over pairs.
        cut: the keyword that takes a list of nodes, and how to list them all: then blocks may be cut by nodes, too.
        model: a hooked model.
        task: prompt pairs.
        executor: where the blocks run.
        resume: a journal of finished blocks, which are not repeated.
        progress: `None` shows a bar on a terminal only.
        **settings: the other keywords of the method.

    Returns:
        The same artifact, to rounding; `settings["executor"]` says how it was made. Blocks of the same size give the
        same bits on every executor.

    Raises:
        UnknownNameError, BackendError, SettingError: as `executor_of`; or a recorded source, which is not cut.
        ExecutorError: a block failed for good, or there is no cluster.
        OutputExistsError: the journal belongs to other work.
        MismatchError: workers with another model or other versions of the packages.
    """
    chosen = executor_of(executor)
    if settings.get("source") is not None:
        fix = "leave out the source, which the workers then run, or the executor"
        raise SettingError("a recorded source with an executor", "activations of all pairs, which are not cut", fix)
    listed = None if cut is None or chosen.nodes is None else (cut[0], cut[1]())
    work = Work(function, model, task, settings, listed)
    parts = work.parts(chosen)
    journal = Journal(resume, _key(work, chosen))
    results = _finished(work, parts, chosen, journal, function.__name__, progress)
    found = [(part, unpacked(result)) for part, result in zip(parts, results, strict=True)]
    whole = merged(task, found, model.fingerprint())
    said = {**whole.settings, "executor": _said(chosen, len(parts), chosen.nodes if cut else None)}
    return cast(Kind, type(whole)(whole.tensors, settings=said, provenance=whole.provenance))


@dataclass(frozen=True, eq=False, slots=True)
class Pairs:
    """The pairs of a task in blocks on an executor, for methods that put the numbers of single pairs together.

    Attributes:
        model: a hooked model.
        task: the whole task.
        executor: where the blocks run.
    """

    model: HookedModel
    task: Task
    executor: Executor

    @classmethod
    def on(cls, model: HookedModel, task: Task, executor: str | Executor | None) -> Pairs | None:
        """The pairs on an executor, named or given; `None` without one.

        Raises:
            UnknownNameError, BackendError, SettingError: as `executor_of`.
        """
        return None if executor is None else cls(model, task, executor_of(executor))

    @property
    def said(self) -> dict[str, JSON]:
        """What a result's settings say of it."""
        return {"executor": _said(self.executor, len(self._ranges), None)}

    def journal(self, resume: Path | str | None, key: Mapping[str, Any]) -> Journal:
        """The journal of work that is identified by `key`; errors are those of `Journal`."""
        return Journal(resume, {**key, "block": [self.executor.pairs, None], **self.model.fingerprint()})

    def each(
        self,
        work: Callable[[HookedModel, Block, Part], dict[str, Any]],
        journal: Journal,
        *,
        stage: int = 0,
        label: str = "",
        progress: bool | None = None,
    ) -> list[tuple[Part, dict[str, Any]]]:
        """Every block with what `work` gives for it, which is JSON, in order.

        Args:
            work: gets the model, the pairs of the block as a task, and which they are.
            journal: of this work.
            stage: its number, where several stages of work share a journal.
            label: what the bar says.
            progress: `None` shows a bar on a terminal only.

        Raises:
            ExecutorError, MismatchError: as `spread`.
        """
        first = stage * len(self._ranges)
        parts = [Part(number, pairs) for number, pairs in enumerate(self._ranges, start=first)]
        results = _finished(_Stated(work, self.model, self.task), parts, self.executor, journal, label, progress)
        check_origin([(part, result["made"]) for part, result in zip(parts, results, strict=True)], _made(self.model))
        return [(part, result["found"]) for part, result in zip(parts, results, strict=True)]

    @property
    def _ranges(self) -> list[range]:
        return _ranges(len(self.task), self.executor.pairs)


@dataclass(frozen=True, eq=False, slots=True)
class _Stated:
    """What a block gave, with the model and the versions that the worker has."""

    work: Callable[[HookedModel, Block, Part], dict[str, Any]]
    model: HookedModel
    task: Task

    def __call__(self, part: Part) -> dict[str, Any]:
        found = self.work(self.model, Block.of(self.task, part.pairs), part)
        return {"made": _made(self.model), "found": found}


def _made(model: HookedModel) -> dict[str, JSON]:
    return provenance({**asdict(model.info), **model.fingerprint()})


def _finished(
    function: Callable[[Part], Any],
    parts: Sequence[Part],
    executor: Executor,
    journal: Journal,
    label: str,
    progress: bool | None,
) -> list[Any]:
    """What a function gives for each block: from the journal where it is there, else from the executor."""
    missing = [part for part in parts if part.number not in journal.done]
    with tqdm(total=len(parts), desc=label, disable=None if progress is None else not progress) as bar:
        bar.update(len(parts) - len(missing))
        if missing:
            with closing(executor.map(function, missing)) as results:
                for i, result in results:
                    journal.note(missing[i].number, [result])
                    bar.update()
    return [journal.done[part.number][0] for part in parts]


def _said(executor: Executor, blocks: int, nodes: int | None) -> dict[str, JSON]:
    return {"name": executor.name, "blocks": blocks, "pairs": executor.pairs, "nodes": nodes}


def _ranges(n: int, size: int) -> list[range]:
    return [range(i, min(i + size, n)) for i in range(0, n, size)]


def _key(work: Work, executor: Executor) -> dict[str, Any]:
    """What a journal of blocks belongs to; the kind and number of workers are no part of it."""
    settings = {name: _described(value) for name, value in work.settings.items()}
    blocks = {"function": work.function.__name__, "task": work.task.hash(), "block": [executor.pairs, executor.nodes]}
    return {**settings, **blocks, **work.model.fingerprint()}


def _described(value: Any) -> Any:
    """A setting as JSON that is the same in every process."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, os.PathLike):
        return str(value)
    if isinstance(value, Task):
        return value.hash()
    if hasattr(value, "to_json"):
        return value.to_json()
    return hashlib.sha256(repr(value if isinstance(value, Sequence) else [value]).encode()).hexdigest()
