"""Draw pairs from a grammar until `n` of them fit the model's own tokenizer.

Every pair has a slot with its own factors (order, number, gender, ...), so that factors stay balanced whatever the
tokenizer refuses. A slot is drawn again until a pair fits; what did not fit is counted by reason in `Task.skipped`.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mechattr.errors import (
    AlignmentError,
    EmptyTaskError,
    SettingError,
    UnknownNameError,
    UnsupportedFeatureError,
    nearest,
)
from mechattr.models.base import HookedModel
from mechattr.tasks.align import Aligned, align
from mechattr.tasks.build import build, metric_name
from mechattr.tasks.metrics import Metric
from mechattr.tasks.misfits import Misfit
from mechattr.tasks.pairtext import PairText, Split
from mechattr.tasks.task import Task

ROUNDS = 60  # how often a slot is drawn before it counts as impossible
HOPELESS = 150  # draws without any pair that fits, after which the task counts as impossible
REPEATED = "a pair that was drawn already"
LEFT_OUT = "two-digit numbers that are not one token, left out of the answer sets"


def draw_task(
    name: str,
    model: HookedModel,
    draw: Callable[[random.Random, int], PairText],
    *,
    n: int,
    settings: Mapping[str, Any],
    metric: str | Metric,
    citation: str,
) -> Task:
    """A task of `n` pairs, where `draw(rng, slot)` draws a candidate for each slot.

    Raises:
        SettingError: `n` is not a positive whole number, or the model has no tokenizer.
        UnsupportedFeatureError: the model is an encoder.
        UnknownNameError: no such metric.
        EmptyTaskError: no pair fits.
        AlignmentError: fewer than `n` pairs fit.
        AnswerError: the metric takes no sets, and the task has sets of answers.
    """
    check_count("n", n)
    require_decoder(name, model)
    wanted = metric_name(metric)
    rng = stream(name, settings)
    kept: dict[int, Aligned] = {}
    seen: set[tuple[str, str]] = set()
    skipped: Counter[str] = Counter()
    for _ in range(ROUNDS):
        slots = [slot for slot in range(n) if slot not in kept]
        if not slots or (not kept and skipped.total() >= HOPELESS):
            break
        fresh = {}
        for slot in slots:
            pair = draw(rng, slot)
            if (pair.clean, pair.corrupt) in seen:
                skipped[REPEATED] += 1
            else:
                seen.add((pair.clean, pair.corrupt))
                fresh[slot] = pair
        labels = [f"{name} pair {slot}" for slot in fresh]
        fitted = align(model, list(fresh.values()), metric=wanted, labels=labels, partial_sets=True) if fresh else []
        for slot, found in zip(fresh, fitted, strict=True):
            if isinstance(found, Misfit):
                skipped[found.reason] += 1
            else:
                kept[slot] = found
    fix = "choose other options or another task; tasks.resampled and tasks.induction make pairs for any tokenizer"
    require_all(name, len(kept), n, skipped, fix)
    left_out = sum(pair.dropped for pair in kept.values())
    return build(
        name,
        model,
        [kept[slot] for slot in sorted(kept)],
        metric=metric,
        settings={"task": name, "n": n, **settings},
        skipped={**skipped, LEFT_OUT: left_out} if left_out else skipped,
        citation=citation,
    )


def stream(name: str, settings: Mapping[str, Any]) -> random.Random:
    """The random numbers of one task: every seed and split has its own."""
    return random.Random(f"{name}/{settings.get('split', '')}/{settings['seed']}")


def require_all(name: str, found: int, n: int, skipped: Mapping[str, int], fix: str) -> None:
    """Raise where fewer than `n` pairs could be made."""
    if found == n:
        return
    asked = f"{n} pairs of task {name!r}"
    reasons = "; ".join(f"{count} × {reason}" for reason, count in skipped.items()) or "nothing could be drawn"
    if found == 0:
        raise EmptyTaskError(asked, f"none could be made with this model: {reasons}", fix)
    raise AlignmentError(
        asked, f"only {found} could be made with this model: {reasons}", f"ask for fewer pairs, or {fix}"
    )


def require_decoder(name: str, model: HookedModel) -> None:
    """Raise where the model does not predict next tokens."""
    if model.info.encoder:
        found, fix = "an encoder, which predicts no next tokens", "use a decoder model"
        raise UnsupportedFeatureError(f"task {name!r} on {model.info.name!r}", found, fix)


def check_count(name: str, value: int) -> None:
    """Raise where `value` is not a positive whole number."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise SettingError(f"{name}={value!r}", "not a positive whole number", "ask for at least one")


def check_split(split: Split) -> Split:
    """The split, if it is one."""
    check_option("split", split, ("train", "test"))
    return split


def check_option(name: str, value: str | None, allowed: Sequence[str | None]) -> None:
    """Raise where `value` is not one of the allowed ones."""
    if value not in allowed:
        names = [option for option in allowed if option is not None]
        raise UnknownNameError(f"{name}={value!r}", "no such option", nearest(str(value), names))


def check_index(name: str, value: int | None, size: int) -> None:
    """Raise where `value` is neither None nor an index into `size` things."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < size):
        raise SettingError(f"{name}={value!r}", f"there are {size}", f"use 0 to {size - 1}, or None")
