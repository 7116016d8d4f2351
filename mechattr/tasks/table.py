"""The table of tasks that need nothing but a model, by the name that the command line uses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from mechattr.errors import UnknownTaskError, nearest
from mechattr.models.base import HookedModel
from mechattr.tasks.generators import gendered_pronoun, greater_than, ioi, subject_verb
from mechattr.tasks.pairtext import Split
from mechattr.tasks.repeated import induction
from mechattr.tasks.task import Task

TASKS: Mapping[str, Callable[..., Task]] = MappingProxyType(
    {
        "ioi": ioi,
        "greater_than": greater_than,
        "subject_verb": subject_verb,
        "gendered_pronoun": gendered_pronoun,
        "induction": induction,
    }
)


def make(model: HookedModel, name: str, *, n: int, seed: int = 0, split: Split = "test", **options: Any) -> Task:
    """The task of a name.

    Raises:
        UnknownTaskError: no task has this name.
    """
    if name not in TASKS:
        raise UnknownTaskError(f"task {name!r}", "no such task", nearest(name, TASKS))
    return TASKS[name](model, n=n, seed=seed, split=split, **options)
