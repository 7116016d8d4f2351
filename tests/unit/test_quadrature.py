"""Quadrature rules: what they integrate exactly, how they converge, and what they refuse."""

from __future__ import annotations

import math

import pytest
import torch

from mechattr.engines.quadrature import RULES, nodes
from mechattr.errors import SettingError, UnknownNameError

DEGREE = {
    "midpoint": lambda m: 1,
    "gauss_legendre": lambda m: 2 * m - 1,
    "left": lambda m: 0,
    "right": lambda m: 0,
    "trapezoid": lambda m: 1,
}
ORDER = {"midpoint": 2, "left": 1, "right": 1, "trapezoid": 2}


def integral(rule: str, steps: int, f) -> float:
    points, weights = nodes(rule, steps)
    return float((weights * f(points)).sum())


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("steps", [2, 3, 7])
def test_points_lie_in_the_interval_and_weights_sum_to_one(rule: str, steps: int) -> None:
    points, weights = nodes(rule, steps)
    assert points.shape == weights.shape == (steps,)
    assert points.dtype == weights.dtype == torch.float64
    assert bool((points[1:] > points[:-1]).all()) and points[0] >= 0 and points[-1] <= 1
    assert bool((weights > 0).all())
    assert float(weights.sum()) == pytest.approx(1, abs=1e-14)  # rounding of a few float64 numbers


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("steps", [2, 3, 5])
def test_exact_up_to_its_degree_and_not_beyond(rule: str, steps: int) -> None:
    """The next degree is the control: a rule that were exact there would be another rule."""
    degree = DEGREE[rule](steps)
    for power in range(degree + 1):
        found = integral(rule, steps, lambda x, p=power: x**p)
        assert found == pytest.approx(1 / (power + 1), abs=1e-14)  # rounding
    beyond = integral(rule, steps, lambda x: x ** (degree + 1))
    assert abs(beyond - 1 / (degree + 2)) > 1e-7


@pytest.mark.parametrize("rule", ORDER)
def test_the_error_falls_with_the_stated_order(rule: str) -> None:
    def error(steps: int) -> float:
        steps += rule == "trapezoid"  # so many intervals
        return abs(integral(rule, steps, torch.exp) - (math.e - 1))

    # 16 and 32 intervals are far enough into the asymptotic range for 2 per cent
    assert math.log2(error(16) / error(32)) == pytest.approx(ORDER[rule], rel=0.02)


def test_one_step() -> None:
    for rule, point in (("midpoint", 0.5), ("gauss_legendre", 0.5), ("left", 0.0), ("right", 1.0)):
        points, weights = nodes(rule, 1)
        assert points.tolist() == [point] and weights.tolist() == [1.0]


def test_left_and_right_mirror_each_other() -> None:
    left, right = nodes("left", 4)[0], nodes("right", 4)[0]
    assert left.tolist() == [0, 0.25, 0.5, 0.75]
    assert torch.equal(1 - right.flip(0), left)


def test_bad_input() -> None:
    with pytest.raises(UnknownNameError, match=r"rule 'midpiont'(.|\n)*did you mean 'midpoint'"):
        nodes("midpiont", 3)
    for steps in (0, -1, 2.0, True):
        with pytest.raises(SettingError, match=r"no number of evaluations(.|\n)*a whole number from 1"):
            nodes("left", steps)
    with pytest.raises(SettingError, match=r"steps=1 of the rule 'trapezoid'(.|\n)*a whole number from 2"):
        nodes("trapezoid", 1)
