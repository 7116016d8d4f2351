"""The frontier of effect against side effect: closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mechattr.errors import SettingError
from mechattr.steering import Frontier
from mechattr.steering.frontier import area, best, knee, vertices

T = torch.tensor


def test_a_staircase_has_the_area_of_its_steps() -> None:
    effect, side = T([1.0, 3.0, 2.0, -4.0]), T([0.1, 0.4, 0.6, 0.0])
    assert vertices(effect, side).tolist() == [0, 1]  # the third is dominated, the last is worse than not to steer
    assert area(effect, side, 0.5) == pytest.approx((0.3 * 1 + 0.1 * 3) / 0.5, rel=1e-6)  # float32 numbers given
    assert area(effect, side, 1.0) == pytest.approx(0.3 * 1 + 0.6 * 3, rel=1e-6)
    assert area(effect, side, 0.05) == 0.0  # nothing is that cheap
    trapezoids = (0.1 * 0.5 + 0.3 * 2 + 0.1 * 3) / 0.5  # control: straight lines between points
    assert area(effect, side, 0.5) != pytest.approx(trapezoids, rel=1e-2)
    assert area(T([2.0]), T([0.0])) == 2.0
    assert area(T([-1.0, 0.0]), T([0.1, 0.2])) == 0.0


def test_the_area_is_a_mean_over_budgets() -> None:
    generator = torch.Generator().manual_seed(0)
    effect, side = torch.randn(9, generator=generator).double(), torch.rand(9, generator=generator).double()
    grid = (torch.arange(20000) + 0.5) / 20000 * 0.8
    by_budget = torch.where(side <= grid[:, None], effect, 0.0).amax(1).clamp(min=0)
    assert area(effect, side, 0.8) == pytest.approx(float(by_budget.mean()), abs=2e-3)  # one grid step a point


@pytest.mark.parametrize("sharp", [2, 5, 20])
def test_the_knee_of_a_concave_curve_is_where_its_slope_is_that_of_the_chord(sharp: int) -> None:
    side = torch.linspace(0, 1, 2001, dtype=torch.double)
    effect = 7 * (1 - torch.exp(-sharp * side)) / (1 - math.exp(-sharp))
    found = knee(effect, 3 * side)  # units do not matter
    wanted = math.log(sharp / (1 - math.exp(-sharp))) / sharp
    assert found is not None and float(side[found]) == pytest.approx(wanted, abs=1e-3)  # two grid steps
    steepest = int(effect.diff().argmax())  # control: the largest step
    assert float(side[steepest]) != pytest.approx(wanted, abs=1e-2)


def test_a_straight_or_convex_frontier_has_no_knee() -> None:
    assert knee(T([1.0, 2.0, 4.0]), T([1.0, 2.0, 4.0])) is None
    assert knee(T([1.0, 4.0, 9.0]), T([1.0, 2.0, 3.0])) is None
    assert knee(T([1.0]), T([1.0])) is None and knee(T([-1.0, -2.0]), T([1.0, 2.0])) is None
    assert knee(T([2.0, 1.0, 3.0]), T([0.5, 0.7, 2.0])) == 0
    assert knee(T([2.0, 3.0]), T([0.0, 0.0])) is None  # all effect is free


def test_the_best_point_keeps_the_budget() -> None:
    effect, side = T([1.0, 5.0, 3.0, -9.0]), T([0.1, 0.9, 0.5, 0.0], dtype=torch.double)
    assert [best(effect, side, budget) for budget in (0.05, 0.1, 0.5, 0.9)] == [None, 0, 2, 1]
    assert int(effect.argmax()) != best(effect, side, 0.5)  # control: the budget is not looked at


@given(st.lists(st.tuples(st.floats(-5, 5), st.floats(0, 2)), min_size=1, max_size=8), st.floats(0.01, 3), st.randoms())
def test_order_does_not_matter_and_more_points_never_hurt(points: list, budget: float, rng: object) -> None:
    effect, side = T(points, dtype=torch.double).unbind(1)
    order = torch.randperm(len(points))
    whole = area(effect, side, budget)
    assert area(effect[order], side[order], budget) == pytest.approx(whole, abs=1e-12)
    assert 0 <= area(effect[:1], side[:1], budget) <= whole + 1e-12
    found = best(effect, side, budget)
    assert whole <= (0.0 if found is None else float(effect[found])) + 1e-12


def test_a_frontier_names_its_points() -> None:
    found = Frontier(T([1.0, 3.0, 3.5]), T([0.1, 0.2, 2.0]), ((0, 0.5), (1, 0.5), (1, 2.0)), 0.4)
    assert found.knee == (1, 0.5) and found.best == ((1, 0.5), 3.0)
    assert found.area == pytest.approx((0.1 * 1 + 0.2 * 3) / 0.4, rel=1e-6)
    assert [x.tolist() for x in found.curve] == [pytest.approx([0, 0.1, 0.2, 2.0]), pytest.approx([0, 1.0, 3.0, 3.5])]
    nothing = Frontier(T([-1.0]), T([0.1]), ((0, 1.0),))
    assert nothing.best == (None, 0.0) and nothing.knee is None and nothing.area == 0.0


@pytest.mark.parametrize("effect, side", [([], []), ([1.0], [1.0, 2.0]), ([math.nan], [1.0]), ([1.0], [-0.1])])
def test_what_makes_no_frontier(effect: list[float], side: list[float]) -> None:
    with pytest.raises(SettingError, match="a frontier"):
        area(T(effect), T(side))


@pytest.mark.parametrize("budget", [0, -1.0, math.inf, math.nan, True, "0.5"])
def test_what_is_no_budget(budget: object) -> None:
    for function in (area, best):
        with pytest.raises(SettingError, match="no side effect"):
            function(T([1.0]), T([1.0]), budget)  # type: ignore[arg-type]
