"""The training schedule: what is trained on, for how long, and at which learning rate."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

SEED = 0
VOCABULARY = 2560
SIZES = {"n_positions": 128, "n_embd": 128, "n_layer": 4, "n_head": 4}

Shares = Mapping[str, float]
TASKS: Shares = {"ioi": 0.3, "subject_verb": 0.3, "gendered_pronoun": 0.2, "greater_than": 0.2}
UNSPLIT: Shares = {
    "ioi": 0.7,
    "greater_than": 0.3,
}  # what copying and counting can do before prose has taught the words


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """A stretch of training with one mixture.

    Attributes:
        steps: number of updates.
        rows: rows a batch.
        length: tokens a row that are predicted.
        rate: learning rate of the first update and of the first one after the phase, linear between.
        kinds: share of the rows of each kind, a method of `Mixture`.
        tasks: share of each task among the task sentences.
        span: shortest and longest repeated random span.
    """

    steps: int
    rows: int
    length: int
    rate: tuple[float, float]
    kinds: Shares
    tasks: Shares = field(default_factory=lambda: TASKS)
    span: tuple[int, int] = (6, 60)


READING: Shares = {"spans": 0.10, "passage": 0.60, "around_word": 0.30}
COPYING: Shares = {"spans": 0.10, "tasks": 0.15, "passage": 0.50, "around_word": 0.25}
NAMING: Shares = {"spans": 0.10, "tasks": 0.15, "lexicon": 0.15, "passage": 0.40, "around_word": 0.20}
MIXED: Shares = {"spans": 0.10, "tasks": 0.30, "lexicon": 0.10, "passage": 0.33, "around_word": 0.17}
PROSE: Shares = {"passage": 0.35, "around_word": 0.20}

RUNS: dict[str, tuple[Phase, ...]] = {
    "main": (
        Phase(steps=100, rows=16, length=64, rate=(0.0, 3e-3), kinds={"spans": 1.0}, span=(6, 21)),
        Phase(steps=2700, rows=16, length=64, rate=(3e-3, 3e-3), kinds={"spans": 1.0}, span=(6, 21)),
        Phase(steps=1600, rows=16, length=128, rate=(3e-3, 3e-3), kinds=READING),
        Phase(steps=800, rows=16, length=128, rate=(3e-3, 3e-3), kinds=COPYING, tasks=UNSPLIT),
        Phase(steps=800, rows=16, length=128, rate=(3e-3, 3e-3), kinds=NAMING, tasks=UNSPLIT),
        Phase(steps=7600, rows=16, length=128, rate=(3e-3, 0.0), kinds=MIXED),
    ),
    "prose": (
        Phase(steps=100, rows=16, length=128, rate=(0.0, 3e-3), kinds=PROSE),
        Phase(steps=3200, rows=16, length=128, rate=(3e-3, 3e-3), kinds=PROSE),
        Phase(steps=1980, rows=32, length=128, rate=(3e-3, 0.0), kinds=PROSE),
    ),
}


def at(phases: Sequence[Phase], step: int) -> tuple[Phase, float]:
    """The phase that a step belongs to, and its learning rate."""
    for phase in phases:
        if step < phase.steps:
            first, last = phase.rate
            return phase, first + (last - first) * step / phase.steps
        step -= phase.steps
    raise IndexError(f"the schedule ends {step} steps before this one")
