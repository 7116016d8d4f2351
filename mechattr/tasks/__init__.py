"""Prompt pairs, token alignment, metrics and task generators.

Names load when they are first used: the grammars in `mechattr.tasks.grammar` need the standard library only.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mechattr.tasks.blimp import EvidenceSet, blimp_samples
    from mechattr.tasks.evidence import EvidenceSample
    from mechattr.tasks.generators import gendered_pronoun, greater_than, ioi, subject_verb
    from mechattr.tasks.grammar.agreement import agreement_samples
    from mechattr.tasks.metrics import METRICS, Metric
    from mechattr.tasks.pairs import from_pairs
    from mechattr.tasks.pairtext import PairText
    from mechattr.tasks.repeated import induction
    from mechattr.tasks.resample import resampled
    from mechattr.tasks.table import TASKS, make
    from mechattr.tasks.task import Task, accuracy

_WHERE = {
    "EvidenceSample": "evidence",
    "EvidenceSet": "blimp",
    "METRICS": "metrics",
    "TASKS": "table",
    "Metric": "metrics",
    "PairText": "pairtext",
    "Task": "task",
    "accuracy": "task",
    "agreement_samples": "grammar.agreement",
    "blimp_samples": "blimp",
    "from_pairs": "pairs",
    "gendered_pronoun": "generators",
    "greater_than": "generators",
    "induction": "repeated",
    "ioi": "generators",
    "make": "table",
    "resampled": "resample",
    "subject_verb": "generators",
}

__all__ = [
    "METRICS",
    "TASKS",
    "EvidenceSample",
    "EvidenceSet",
    "Metric",
    "PairText",
    "Task",
    "accuracy",
    "agreement_samples",
    "blimp_samples",
    "from_pairs",
    "gendered_pronoun",
    "greater_than",
    "induction",
    "ioi",
    "make",
    "resampled",
    "subject_verb",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        if name.startswith("__"):  # asked by the import system, which expects a plain answer
            raise AttributeError(f"module 'mechattr.tasks' has no attribute {name!r}")
        from mechattr.errors import nearest

        raise AttributeError(f"module 'mechattr.tasks' has no attribute {name!r}: {nearest(name, _WHERE)}")
    value = getattr(import_module(f"mechattr.tasks.{_WHERE[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
