"""Orders worked out by hand: each figure of merit against its formula, and against a mistake in it."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mechattr.errors import EmptyTaskError, NonFiniteError, SettingError
from mechattr.evaluation import discovery

# Truly: node 0, 2, 1, 4, and node 3 has no effect. The method: 2, 0, 3, 1, 4.
EFFECTS = np.array([5.0, 3.0, -4.0, 0.0, 1.0])
SCORES = np.array([8.0, 2.0, 9.0, 3.0, 1.0])
RANKS = np.array([2, 4, 1, 3, 5])
COST = np.array([2.0, 2.0, 4.0, 5.0])
RELATIVE = np.array([2.0, 1.0, 4 / 3, 5 / 4])
CLOSE = 1e-14  # a handful of float64 operations


def test_ranks_and_cost_of_an_order() -> None:
    np.testing.assert_array_equal(discovery.ranks_of(SCORES), RANKS)
    np.testing.assert_array_equal(discovery.cost_curve(RANKS, EFFECTS), COST)
    np.testing.assert_array_equal(discovery.relative_cost(COST), RELATIVE)
    np.testing.assert_array_equal(discovery.cost_curve(RANKS, EFFECTS, setup=3), COST + 3)
    assert [discovery.recall_at(RANKS, EFFECTS, k) for k in (1, 2, 3, 4, 5)] == [0, 1, 2 / 3, 3 / 4, 1]


def _rank_for_running_maximum(costs: np.ndarray, effects: np.ndarray, setup: float) -> np.ndarray:
    return setup + costs[discovery.truly_largest(costs, effects)]


def _no_setup(costs: np.ndarray, effects: np.ndarray, setup: float) -> np.ndarray:
    return discovery.cost_curve(costs, effects)


def _signed_effects(costs: np.ndarray, effects: np.ndarray, setup: float) -> np.ndarray:
    return setup + np.maximum.accumulate(costs[np.argsort(-effects)][:4])


@pytest.mark.parametrize("wrong", (_rank_for_running_maximum, _no_setup, _signed_effects))
def test_mistakes_in_the_cost_are_seen(wrong: Callable[..., np.ndarray]) -> None:
    right = discovery.cost_curve(RANKS, EFFECTS, 3)
    np.testing.assert_array_equal(right, [5, 5, 7, 8])
    assert not np.array_equal(wrong(RANKS, EFFECTS, 3), right)


def test_inverse_rank_weights() -> None:
    by_hand = math.exp((math.log(2) + math.log(4 / 3) / 3 + math.log(5 / 4) / 4) / (1 + 1 / 2 + 1 / 3 + 1 / 4))
    found = discovery.inverse_rank_weighted(RELATIVE)
    assert found == pytest.approx(by_hand, rel=CLOSE)
    assert discovery.inverse_rank_weighted(RELATIVE, upto=1) == pytest.approx(2, rel=CLOSE)
    arithmetic = np.average(RELATIVE, weights=1 / np.arange(1, 5))
    unweighted = discovery.geometric_mean(RELATIVE)
    for wrong in (arithmetic, unweighted):
        assert abs(wrong - by_hand) > 0.01


def test_true_ties_cost_nothing() -> None:
    effects = np.array([2.0, -2.0, 2.0, 0.0, 1.0])
    ranks = discovery.ranks_of(np.array([1.0, 2.0, 3.0, 0.0, 0.5]))  # the tied nodes in the other order: 2, 1, 0
    np.testing.assert_array_equal(discovery.cost_curve(ranks, effects), [1, 2, 3, 4])
    assert discovery.recall_at(ranks, effects, 1) == 1
    in_node_order = np.maximum.accumulate(ranks[np.argsort(-np.abs(effects), kind="stable")][:4])
    assert in_node_order.tolist() == [3, 3, 3, 4]  # what a truth with ties in node order would charge


def test_ties_of_a_method_are_broken_by_node() -> None:
    np.testing.assert_array_equal(discovery.ranks_of(np.array([1.0, 2.0, 1.0, 2.0])), [3, 1, 4, 2])


def test_nodes_without_effect_are_not_looked_for() -> None:
    effects, ranks = np.array([0.0, 1.0, 0.0]), np.array([1, 2, 3])
    assert len(discovery.cost_curve(ranks, effects)) == 1
    assert discovery.recall_at(ranks, effects, 2) == 1  # one node has an effect, and it is among the first two


@given(arrays(np.float64, st.integers(1, 30), elements=st.sampled_from([-2.0, -1.0, 0.0, 0.5, 1.0, 3.0])), st.randoms())
def test_bounds_of_any_order(effects: np.ndarray, random: object) -> None:
    if not effects.any():
        effects = effects + 1
    order = list(range(len(effects)))
    random.shuffle(order)  # type: ignore[attr-defined]
    ranks = discovery.ranks_in(np.array(order))
    relative = discovery.relative_cost(discovery.cost_curve(ranks, effects))
    k = np.arange(1, len(relative) + 1)
    assert (relative >= 1).all()
    assert (relative <= len(effects) / k).all()
    best = discovery.ranks_of(np.abs(effects))
    np.testing.assert_array_equal(discovery.cost_curve(best, effects), k)


def test_found_after_so_many_verifications() -> None:
    visited = np.arange(1, 6)
    np.testing.assert_array_equal(discovery.found_curve(RANKS, EFFECTS, 2, visited), [0.5, 1, 1, 1, 1])
    np.testing.assert_array_equal(discovery.found_curve(RANKS, EFFECTS, 2, visited, setup=1), [0, 0.5, 1, 1, 1])
    np.testing.assert_array_equal(discovery.found_curve(RANKS, EFFECTS, 4, visited), [0.25, 0.5, 0.5, 0.75, 1])


def test_ranks_of_some_nodes_among_themselves() -> None:
    np.testing.assert_array_equal(discovery.ranks_among(RANKS, np.array([1, 2, 4])), [2, 1, 3])


def test_means_and_intervals_over_pairs() -> None:
    mean, deviation = discovery.geometric(np.array([1.0, 4.0]))
    assert mean == pytest.approx(2, rel=CLOSE)
    assert deviation == pytest.approx(math.exp(math.log(4) / math.sqrt(2)), rel=CLOSE)  # of two logs ln 4 apart
    assert discovery.geometric(np.array([3.0]))[1] == 1
    values = np.random.default_rng(0).lognormal(size=200)
    low, high = discovery.interval(values, discovery.geometric_mean)
    assert (low, high) == discovery.interval(values, discovery.geometric_mean)
    expected = 1.96 / math.sqrt(200)  # half width of the log mean for a standard deviation of 1
    assert math.log(high / low) / 2 == pytest.approx(expected, rel=0.15)  # 2000 draws of 200 values
    assert discovery.interval(np.ones(5), discovery.geometric_mean) == (1, 1)
    for n in (1, 7, 50):
        values = np.random.default_rng(n).random(n)
        # the same resamples; a mean along an axis may add in another order
        np.testing.assert_allclose(discovery.mean_interval(values), discovery.interval(values, np.mean), rtol=1e-12)


def test_unusable_input() -> None:
    with pytest.raises(NonFiniteError, match=r"(?s)order of nodes.*1 scores that are not finite.*measured nodes"):
        discovery.ranks_of(np.array([1.0, np.nan]))
    with pytest.raises(NonFiniteError, match="true effects"):
        discovery.cost_curve(np.array([1, 2]), np.array([1.0, np.inf]))
    with pytest.raises(SettingError, match=r"(?s)missing or come twice.*each node once"):
        discovery.ranks_in(np.array([0, 0]))
    with pytest.raises(SettingError, match=r"shapes \(2,\) and \(3,\)"):
        discovery.cost_curve(np.array([1, 2]), np.ones(3))
    with pytest.raises(EmptyTaskError, match="no node has an effect"):
        discovery.cost_curve(np.array([1, 2]), np.zeros(2))
    with pytest.raises(SettingError, match="recall at 0"):
        discovery.recall_at(RANKS, EFFECTS, 0)
