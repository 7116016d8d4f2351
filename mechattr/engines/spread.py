"""A method on a large task, block by block: cut, run on an executor, put together.

Any method whose result is a mean over pairs can be spread. The workers get the model and the task once, and then the
numbers of the pairs (and nodes) of each block; what comes back is the block's result.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from tqdm.auto import tqdm

from mechattr.base import Artifact
from mechattr.engines.executors import Executor, executor_of
from mechattr.engines.merge import Part, merged
from mechattr.engines.packed import packed, unpacked
from mechattr.engines.sweep import Journal
from mechattr.errors import SettingError
from mechattr.models.base import HookedModel
from mechattr.provenance import JSON
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
    missing = [part for part in parts if part.number not in journal.done]
    with tqdm(total=len(parts), desc=function.__name__, disable=None if progress is None else not progress) as bar:
        bar.update(len(parts) - len(missing))
        if missing:
            with closing(chosen.map(work, missing)) as results:
                for i, result in results:
                    journal.note(missing[i].number, [result])
                    bar.update()
    found = [(part, unpacked(journal.done[part.number][0])) for part in parts]
    whole = merged(task, found, model.fingerprint())
    executed: JSON = {
        "name": chosen.name,
        "blocks": len(parts),
        "pairs": chosen.pairs,
        "nodes": chosen.nodes if cut else None,
    }
    said = {**whole.settings, "executor": executed}
    return cast(Kind, type(whole)(whole.tensors, settings=said, provenance=whole.provenance))


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
