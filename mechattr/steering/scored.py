"""What is scored of a steered model: propensity to answers, a task's metric, and how far other predictions move."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mechattr.errors import EmptyTaskError, SettingError
from mechattr.models.base import Batch, HookedModel, Metric
from mechattr.steering.preference import Triples, answer_log_probabilities, sequences
from mechattr.steering.prompted import Where
from mechattr.steering.side_effects import kl_of_logits
from mechattr.steering.stacked import Rows
from mechattr.tasks.task import Task

MULTIPLIERS = (-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0)


@dataclass(frozen=True, eq=False, slots=True)
class Items:
    """Items that are measured.

    Attributes:
        rows: what runs.
        values: the scores of rows -> one number an item.
        measure: what these numbers are.
        unit: their unit.
    """

    rows: Rows
    values: Callable[[Float[Tensor, "... row"]], Float[Tensor, "... item"]]
    measure: str
    unit: str

    @property
    def prompts(self) -> list[list[int]]:
        """The ids of each item's prompt."""
        batch, starts = self.rows.batch, self.rows.starts
        n = len(self.values(torch.zeros(len(batch))))
        return [batch.tokens[i, batch.mask[i]][: starts[i]].tolist() for i in range(n)]


def items(model: HookedModel, given: Triples | Task) -> Items:
    """The propensity to the matching answers of triples, or the metric of a task on its clean prompts.

    Raises:
        SettingError: triples that do not fit.
        EmptyTaskError: a task without pairs.
        UnsupportedFeatureError: triples, and a model that does not predict next tokens.
    """
    if isinstance(given, Task):
        if not len(given):
            raise EmptyTaskError(f"the metric of task {given.name!r}", "no pairs", "make the task with pairs")
        rows = Rows(given.clean, given.clean.lengths, partial(_measured, given.metric))
        return Items(rows, lambda scores: scores, given.metric.name, given.metric.unit)
    batch, starts = sequences(model, given)
    return Items(Rows(batch, starts, _log_probability), _difference, "propensity", "nat")


def texts(model: HookedModel, neutral: Any, positions: Where) -> Rows:
    """Rows of neutral texts; the score is the KL divergence to the unsteered model, mean over tokens. The texts count
    as prompts, and with `positions="generated"` as what is generated.

    Raises:
        SettingError: something else than texts, or an empty one.
    """
    given = [neutral] if isinstance(neutral, str) else list(neutral) if isinstance(neutral, Iterable) else [neutral]
    for i, one in enumerate(given):
        if not isinstance(one, str) or not one:
            raise SettingError(f"neutral text {i}", f"{one!r:.60}", "give texts that are not empty")
    batch = model.tokenize(given)
    generated = isinstance(positions, str) and positions == "generated"
    return Rows(batch, torch.zeros_like(batch.lengths) if generated else batch.lengths, _kl)


def check_multipliers(multipliers: Any) -> tuple[float, ...]:
    """Multipliers as numbers.

    Raises:
        SettingError: none, two of the same, or something else than finite numbers.
    """
    fix = "give different finite numbers, such as (-1, 0, 1)"
    try:
        given = torch.as_tensor(
            multipliers if isinstance(multipliers, Tensor) else list(multipliers), dtype=torch.double
        )
    except (TypeError, ValueError, RuntimeError):
        raise SettingError(f"multipliers={multipliers!r:.80}", "no list of numbers", fix) from None
    if given.ndim != 1 or not len(given) or not bool(given.isfinite().all()):
        raise SettingError(f"multipliers={multipliers!r:.80}", "none, or not finite", fix)
    numbers = tuple(given.tolist())
    if len(set(names_of(numbers))) < len(numbers):
        raise SettingError(f"multipliers={multipliers!r:.80}", "some more than once", fix)
    return numbers


def names_of(multipliers: Sequence[float]) -> tuple[str, ...]:
    """Multipliers as coordinates."""
    return tuple(f"{one:g}" for one in multipliers)


def _difference(scores: Tensor) -> Tensor:
    matching, other = scores.split(scores.shape[-1] // 2, -1)
    return matching - other


def _log_probability(logits: Tensor, batch: Batch, starts: Tensor, _base: Tensor, _of: Tensor) -> Tensor:
    return answer_log_probabilities(logits, batch, starts)


def _measured(metric: Metric, logits: Tensor, batch: Batch, _starts: Tensor, _base: Tensor, _of: Tensor) -> Tensor:
    return metric(logits, batch)


def _kl(logits: Tensor, batch: Batch, _starts: Tensor, base: Tensor, of: Tensor) -> Tensor:
    return kl_of_logits(base, logits, batch.mask, of).clamp(min=0)  # below by rounding alone
