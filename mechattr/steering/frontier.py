"""The frontier of steering: how much effect is to be had for how much side effect."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechattr.errors import SettingError

BUDGET = 0.5  # nats a token
Label = tuple[str | int, float]


@dataclass(frozen=True, eq=False, slots=True)
class Frontier:
    """Effects against side effects, one point for each way to steer; the unsteered model is (0, 0).

    Attributes:
        effect: what is wanted, such as the change of propensity, in nats.
        side: what it costs, such as KL to the unsteered model, in nats a token.
        labels: what each point is: its condition or layer, and its multiplier.
        budget: the largest side effect that counts in `area` and `best`.
    """

    effect: Float[Tensor, " point"]
    side: Float[Tensor, " point"]
    labels: tuple[Label, ...]
    budget: float = BUDGET

    def __post_init__(self) -> None:
        _check_budget(self.budget)

    @property
    def curve(self) -> tuple[Float[Tensor, " vertex"], Float[Tensor, " vertex"]]:
        """Side effect and effect at the vertices of the frontier, from (0, 0) on; see `vertices`."""
        at = vertices(self.effect, self.side)
        zero = torch.zeros(1, dtype=torch.double)
        return torch.cat([zero, self.side.double()[at]]), torch.cat([zero, self.effect.double()[at]])

    @property
    def area(self) -> float:
        """Mean of the best effect over all budgets from 0 to `budget`; see `area`."""
        return area(self.effect, self.side, self.budget)

    @property
    def knee(self) -> Label | None:
        """The label of the knee; see `knee`."""
        found = knee(self.effect, self.side)
        return None if found is None else self.labels[found]

    @property
    def best(self) -> tuple[Label | None, float]:
        """The label and effect of the best point within the budget; (None, 0.0) where not to steer is best."""
        found = best(self.effect, self.side, self.budget)
        return (None, 0.0) if found is None else (self.labels[found], float(self.effect[found]))


def vertices(effect: Float[Tensor, " point"], side: Float[Tensor, " point"]) -> Int[Tensor, " vertex"]:
    """The points that have more effect than every point of equal or smaller side effect, and more than 0, in the order
    of their side effects.

    Raises:
        SettingError: no points, points of another number of side effects, NaN, or a negative side effect.
    """
    e, s = effect.double(), side.double()
    if e.ndim != 1 or e.shape != s.shape or not len(e):
        found = f"effects of shape {list(e.shape)}, side effects of shape {list(s.shape)}"
        raise SettingError("a frontier", found, "give one number of each a point")
    if not bool((e.isfinite() & s.isfinite()).all()) or bool((s < 0).any()):
        raise SettingError("a frontier", "NaN, infinity or a negative side effect", "give what was measured")
    order = sorted(range(len(e)), key=lambda i: (float(s[i]), -float(e[i])))
    kept, highest = [], 0.0
    for i in order:
        if float(e[i]) > highest:
            kept.append(i)
            highest = float(e[i])
    return torch.tensor(kept, dtype=torch.long)


def area(effect: Float[Tensor, " point"], side: Float[Tensor, " point"], budget: float = BUDGET) -> float:
    r"""The mean over budgets of the best effect that they buy:

    $$A = \frac{1}{B} \int_0^B E(s)\, ds, \qquad E(s) = \max(0, \max_{s_i \le s} e_i)$$

    E is a staircase, so the integral is exact; nothing is put between points that were not measured. The unit is that
    of the effect; a point with an effect e at no side effect has A = e.

    Raises:
        SettingError: points that make no frontier, or a budget that is not above 0.
    """
    _check_budget(budget)
    at = vertices(effect, side)
    bounds = torch.cat([side.double()[at].clamp(max=budget), torch.tensor([budget], dtype=torch.double)])
    return float((bounds.diff() * effect.double()[at]).sum() / budget)


def knee(effect: Float[Tensor, " point"], side: Float[Tensor, " point"]) -> int | None:
    """The vertex that lies farthest above the chord from (0, 0) to the last vertex, where both axes run from 0 to 1:
    from there on, more effect costs more than it did on average. `None` where no vertex lies above the chord.

    Raises:
        SettingError: points that make no frontier.
    """
    at = vertices(effect, side)
    if len(at) < 2:
        return None
    x, y = side.double()[at] / side[at[-1]], effect.double()[at] / effect[at[-1]]
    above = y - x  # sqrt(2) times the distance
    place = int(above.argmax())
    return int(at[place]) if float(above[place]) > 0 else None


def best(effect: Float[Tensor, " point"], side: Float[Tensor, " point"], budget: float = BUDGET) -> int | None:
    """The point with the largest effect among those with a side effect of at most `budget`; `None` where none of them
    has an effect above 0.

    Raises:
        SettingError: points that make no frontier, or a budget that is not above 0.
    """
    _check_budget(budget)
    within = [int(i) for i in vertices(effect, side) if float(side[i]) <= budget]
    return within[-1] if within else None


def _check_budget(budget: float) -> None:
    if isinstance(budget, bool) or not isinstance(budget, int | float) or not 0 < budget < float("inf"):
        raise SettingError(f"budget={budget!r}", "no side effect", "give a number above 0, in nats a token")
