"""The training schedule: what is trained on, for how long, and at which learning rate."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

SEED = 0
VOCABULARY = 2560
SIZES = {"n_positions": 128, "n_embd": 128, "n_layer": 4, "n_head": 4}

Stretch = TypeVar("Stretch", "Phase", "Rate")
Shares = Mapping[str, float]
TASKS: Shares = {"ioi": 0.3, "subject_verb": 0.3, "gendered_pronoun": 0.2, "greater_than": 0.2}
UNSPLIT: Shares = {
    "ioi": 0.7,
    "greater_than": 0.3,
}  # what copying and counting can do before prose has taught the words

WIDER: Shares = {
    "spans": 0.10, "tasks": 0.30, "lexicon": 0.04, "rare_words": 0.13, "passage": 0.28, "around_word": 0.15,
}  # fmt: skip
WIDEST: Shares = {
    "spans": 0.10, "tasks": 0.32, "lexicon": 0.04, "rare_words": 0.12, "years": 0.06, "passage": 0.24,
    "around_word": 0.12,
}  # fmt: skip
LAST: Shares = {
    "spans": 0.08, "tasks": 0.42, "lexicon": 0.03, "rare_words": 0.12, "years": 0.02, "passage": 0.22,
    "around_word": 0.11,
}  # fmt: skip
CALLING: Shares = {
    "spans": 0.08, "tasks": 0.40, "lexicon": 0.03, "rare_words": 0.10, "names": 0.08, "years": 0.02, "passage": 0.19,
    "around_word": 0.10,
}  # fmt: skip
POLISH: Shares = {
    "spans": 0.06, "tasks": 0.52, "lexicon": 0.03, "rare_words": 0.09, "names": 0.06, "years": 0.01, "passage": 0.15,
    "around_word": 0.08,
}  # fmt: skip
ALL: Shares = {"ioi": 0.15, "transfer": 0.35, "subject_verb": 0.25, "gendered_pronoun": 0.15, "greater_than": 0.1}
SCATTERED: Shares = {
    "ioi": 0.12, "transfer": 0.20, "scattered": 0.22, "subject_verb": 0.22, "gendered_pronoun": 0.16,
    "greater_than": 0.08,
}  # fmt: skip

COUNTED: Shares = {
    "ioi": 0.12, "transfer": 0.16, "scattered": 0.18, "subject_verb": 0.20, "gendered_pronoun": 0.13,
    "greater_than": 0.21,
}  # fmt: skip

NAMED: Shares = {
    "ioi": 0.12, "transfer": 0.20, "scattered": 0.30, "subject_verb": 0.18, "gendered_pronoun": 0.11,
    "greater_than": 0.09,
}  # fmt: skip

FRONTED: Shares = {
    "ioi": 0.12, "transfer": 0.15, "scattered": 0.18, "fronted": 0.18, "subject_verb": 0.19, "gendered_pronoun": 0.09,
    "greater_than": 0.09,
}  # fmt: skip

HARDEST: Shares = {
    "ioi": 0.10, "transfer": 0.15, "scattered": 0.25, "fronted": 0.13, "subject_verb": 0.27, "gendered_pronoun": 0.05,
    "greater_than": 0.05,
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """A stretch of training with one mixture.

    Attributes:
        steps: number of updates.
        rows: rows a batch.
        length: tokens a row that are predicted.
        kinds: share of the rows of each kind, a method of `Mixture`.
        tasks: share of each task among the task sentences.
        span: shortest and longest repeated random span.
    """

    steps: int
    rows: int
    length: int
    kinds: Shares
    tasks: Shares = field(default_factory=lambda: TASKS)
    span: tuple[int, int] = (6, 60)


READING: Shares = {"spans": 0.10, "passage": 0.60, "around_word": 0.30}
COPYING: Shares = {"spans": 0.10, "tasks": 0.15, "passage": 0.50, "around_word": 0.25}
NAMING: Shares = {"spans": 0.10, "tasks": 0.15, "lexicon": 0.15, "passage": 0.40, "around_word": 0.20}
MIXED: Shares = {"spans": 0.10, "tasks": 0.30, "lexicon": 0.10, "passage": 0.33, "around_word": 0.17}
PROSE: Shares = {"passage": 0.35, "around_word": 0.20}


@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """A stretch of training whose learning rate goes linearly from `first` towards `last`.

    Attributes:
        steps: number of updates.
        first: learning rate of the first update.
        last: where it would be after `over` updates.
        over: None for `steps`; more where the stretch ends before the rate has arrived.
    """

    steps: int
    first: float
    last: float
    over: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What is trained on, and at which learning rate: two rows of stretches, of equal length in all.

    Attributes:
        phases: mixtures.
        rates: learning rates.
        averaged: the steps (the last one among them) after which the parameters are kept; the model is their mean.
    """

    phases: Sequence[Phase]
    rates: Sequence[Rate]
    averaged: Sequence[int]

    @property
    def steps(self) -> int:
        """Number of updates of the whole run."""
        return sum(phase.steps for phase in self.phases)

    def phase(self, step: int) -> Phase:
        """The phase of a step."""
        return _at(self.phases, step)[0]

    def rate(self, step: int) -> float:
        """The learning rate of a step."""
        rate, done = _at(self.rates, step)
        return rate.first + (rate.last - rate.first) * done / (rate.over or rate.steps)


def _at(stretches: Sequence[Stretch], step: int) -> tuple[Stretch, int]:
    """The stretch that a step belongs to, and the number of its steps before this one."""
    for stretch in stretches:
        if step < stretch.steps:
            return stretch, step
        step -= stretch.steps
    raise IndexError(f"the schedule ends {step} steps before this one")


RUNS = {
    "main": Run(
        phases=(
            Phase(steps=2800, rows=16, length=64, kinds={"spans": 1.0}, span=(6, 21)),
            Phase(steps=1600, rows=16, length=128, kinds=READING),
            Phase(steps=800, rows=16, length=128, kinds=COPYING, tasks=UNSPLIT),
            Phase(steps=800, rows=16, length=128, kinds=NAMING, tasks=UNSPLIT),
            Phase(steps=2000, rows=16, length=128, kinds=MIXED, tasks=ALL),
            Phase(steps=400, rows=16, length=128, kinds=WIDER, tasks=SCATTERED),
            Phase(steps=1200, rows=16, length=128, kinds=WIDEST, tasks=COUNTED),
            Phase(steps=2400, rows=16, length=128, kinds=LAST, tasks=NAMED),
            Phase(steps=2000, rows=16, length=128, kinds=LAST, tasks=FRONTED),
            Phase(steps=2000, rows=16, length=128, kinds=CALLING, tasks=FRONTED),
            Phase(steps=1200, rows=16, length=128, kinds=POLISH, tasks=HARDEST),
        ),
        rates=(
            Rate(steps=100, first=0.0, last=3e-3),
            Rate(steps=5900, first=3e-3, last=3e-3),
            Rate(steps=6000, first=3e-3, last=0.0, over=7600),
            Rate(steps=2000, first=1e-3, last=0.0, over=3200),
            Rate(steps=2000, first=1e-3, last=0.0),
            Rate(steps=1200, first=8e-4, last=0.0),
        ),
        averaged=(16000, 17200),
    ),
    "prose": Run(
        phases=(Phase(steps=4400, rows=16, length=128, kinds=PROSE),),
        rates=(
            Rate(steps=100, first=0.0, last=3e-3),
            Rate(steps=3200, first=3e-3, last=3e-3),
            Rate(steps=300, first=3e-3, last=0.0, over=2140),
            Rate(steps=800, first=2.5e-3, last=0.0),
        ),
        averaged=(4400,),
    ),
}
