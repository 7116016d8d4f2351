"""Training what steers by gradient descent, while the model stays as it is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from mechattr.steering.lesson import Lesson, Trainee
from mechattr.steering.numbers import check_count, check_positive


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """The steps of a training; see `mechattr.steering.learned`.

    Raises:
        SettingError: a number that cannot be used.
    """

    steps: int
    rate: float
    minibatch: int | None
    seed: int

    def __post_init__(self) -> None:
        check_count("steps", self.steps)
        check_positive("rate", self.rate)
        if self.minibatch is not None:
            check_count("minibatch", self.minibatch)


class Adam:
    """Adam with one second moment for each tensor, where the common one has one for each number: steps have the
    direction of the averaged gradient, so that what is found does not depend on the basis of the activations.

    Args:
        parameters: changed in place.
        rates: how far a step moves the numbers of each, as their root mean square.
        decay: of the averages of gradients and of their squares, a step.
    """

    def __init__(
        self, parameters: Sequence[Tensor], rates: Sequence[float], decay: tuple[float, float] = (0.9, 0.999)
    ) -> None:
        self.parameters, self.rates, self.decay, self.steps = parameters, rates, decay, 0
        self.first = [torch.zeros_like(p) for p in parameters]
        self.second = [p.new_zeros(()) for p in parameters]

    def step(self, gradients: Iterable[Tensor]) -> None:
        """One step against the gradients."""
        self.steps += 1
        (a, b), tables = self.decay, zip(self.parameters, self.rates, self.first, self.second, strict=True)
        for (p, rate, first, second), g in zip(tables, gradients, strict=True):
            first.lerp_(g, 1 - a)
            second.lerp_(g.square().mean(), 1 - b)
            size = (second / (1 - b**self.steps)).sqrt().clamp(min=torch.finfo(p.dtype).tiny)
            p -= rate / (1 - a**self.steps) * first / size


def descend(lesson: Lesson, trainee: Trainee, schedule: Schedule, *, progress: bool | None) -> dict[str, Any]:
    """Trains the parameters in place; what it did, for settings."""
    n, size = len(lesson), min(len(lesson), schedule.minibatch or len(lesson))
    rates = [rate for name in trainee.parameters for rate in trainee.rates[name]]
    flat = [p for found in trainee.parameters.values() for p in found]
    optimiser = Adam(flat, rates)
    generator = torch.Generator().manual_seed(schedule.seed)
    losses: list[float] = []
    waiting: list[int] = []
    for _ in tqdm(range(schedule.steps), desc=lesson.loss, disable=None if progress is None else not progress):
        if len(waiting) < size:
            waiting += torch.randperm(n, generator=generator).tolist() if size < n else range(n)
        part, waiting = waiting[:size], waiting[size:]
        loss, gradients = lesson.measure(trainee, part)
        optimiser.step(g for found in gradients.values() for g in found)
        trainee.settle()
        losses.append(float(loss.mean()))
    after, _ = lesson.measure(trainee, range(n), gradients=False)
    rows = lesson.rows * size * schedule.steps
    return {
        **asdict(schedule), "loss": lesson.loss, "beta": lesson.beta, "n_pairs": n, "losses": losses,
        "base_loss": lesson.base_loss, "loss_after": float(after.mean()), "lengths": lesson.lengths,
        "passes": {"forward": rows + (2 + lesson.rows) * n, "backward": rows},
    }  # fmt: skip
