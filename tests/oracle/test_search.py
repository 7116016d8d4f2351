"""Gradient-free orders on models whose effects are known, and the comparison of orders on real ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from patching_cases import exact_effects, pairs_task, plain

import mechattr as ma
from mechattr.engines.subsampling import Split, contrast
from mechattr.errors import EmptyTaskError, MismatchError, SettingError, UnknownNameError
from mechattr.evaluation import search
from mechattr.evaluation.compare import compare_orders
from mechattr.evaluation.comparison import Comparison
from mechattr.patching.nodes import table_of
from mechattr.patching.sets import Sets

CLOSE = 1e-12  # sums of at most a thousand float64 numbers of size one


def additive(effects: np.ndarray, counted: list[int] | None = None) -> search.Patch:
    """[node, pair] effects that add up; counts the sets that are asked for."""

    def patch(sets: np.ndarray) -> np.ndarray:
        if counted is not None:
            counted.append(len(sets))
        return sets @ effects

    return patch


def planted(n: int, where: int) -> np.ndarray:
    """One node with an effect, and noise that no set of nodes can add up to it."""
    effects = np.random.default_rng(1).normal(size=(n, 1)) / (10 * n)
    effects[where] = 1
    return effects


def difference_in_means(sets: np.ndarray, effects: np.ndarray) -> np.ndarray:
    """[node, pair]: what subsampling takes the size of."""
    chosen = torch.from_numpy(sets)
    return np.stack([contrast([Split.of(chosen, torch.from_numpy(row))]).signed.numpy() for row in effects.T], 1)


def every_set(n: int) -> np.ndarray:
    return (np.arange(2**n)[:, None] >> np.arange(n)) % 2 == 1


def test_difference_in_means_is_exact_where_effects_add_up() -> None:
    effects = np.random.default_rng(0).normal(size=(6, 3))
    sets = every_set(6)
    np.testing.assert_allclose(difference_in_means(sets, sets @ effects), effects, rtol=0, atol=CLOSE)
    with_only = sets.T.astype(float) @ (sets @ effects) / sets.sum(0)[:, None]  # the sets without it left out
    assert np.abs(with_only - effects).max() > 0.1


def test_interactions_count_with_their_probability() -> None:
    sets = every_set(4)
    together = (sets[:, 0] & sets[:, 1])[:, None] * 2.0  # nodes 0 and 1 act only together
    found = difference_in_means(sets, together)[:, 0]
    np.testing.assert_allclose(found, [1, 1, 0, 0], rtol=0, atol=CLOSE)  # 2 times the probability of the other, 1/2


def test_subsampling_is_unbiased() -> None:
    effects = np.random.default_rng(0).normal(size=(12, 1))
    draws = []
    for seed in range(400):
        sets = np.random.default_rng(seed).random((60, 12)) < 0.3
        draws.append(difference_in_means(sets, sets @ effects)[:, 0])
    error = np.mean(draws, 0) - effects[:, 0]
    deviation = np.std(draws, 0) / np.sqrt(len(draws))
    assert np.abs(error / deviation).max() < 4  # 12 nodes, four standard errors: by chance 1 in 1300


def test_subsampling_averages_magnitudes_over_pairs() -> None:
    effects = np.zeros((8, 2))
    effects[5] = 1, -1  # cancels in the mean over pairs
    found = search.subsampling(additive(effects), 8, n_sets=60, p=0.5)
    assert found.order[0] == 5
    assert found.costs[5] == 61
    assert found.setup == 60


def test_rarely_chosen_nodes_come_last() -> None:
    effects = np.ones((40, 1))
    found = search.subsampling(additive(effects), 40, n_sets=6, p=0.2)
    sets = np.random.default_rng(0).random((6, 40)) < 0.2
    rare = np.flatnonzero((sets.sum(0) < 2) | (sets.sum(0) > 4))
    assert 0 < len(rare) < 40
    np.testing.assert_array_equal(np.sort(found.order[-len(rare) :]), rare)


@pytest.mark.parametrize(("n", "levels", "most"), ((3125, 5, 25), (1024, 10, 20)))
def test_hierarchical_search_descends_to_a_planted_node(n: int, levels: int, most: int) -> None:
    where = 2 * n // 3
    found = search.hierarchical(additive(planted(n, where)), n, levels=levels)
    assert found.costs[where] <= most  # parts of a split times levels
    assert found.order[0] // (most // levels) == where // (most // levels)  # in the same last block
    np.testing.assert_array_equal(np.sort(found.order), np.arange(n))
    breadth_first = sum((most // levels) ** level for level in range(1, levels))  # every block before any node
    assert breadth_first > most


def test_costs_of_a_hierarchical_search_count_every_set() -> None:
    found = search.hierarchical(additive(np.array([[0.0], [0], [3], [1]])), 4, levels=2)
    # two halves are measured, then nodes 2 and 3 of the larger one, then 0 and 1
    np.testing.assert_array_equal(found.order, [2, 3, 0, 1])
    np.testing.assert_array_equal(found.costs, [5, 6, 3, 4])


def test_blocks_are_visited_by_size() -> None:
    effects = np.array([[0.0], [0], [1], [-5], [2], [1]])
    found = search.blocks(additive(effects), 6, size=2)
    np.testing.assert_array_equal(found.order, [2, 3, 4, 5, 0, 1])
    np.testing.assert_array_equal(found.costs, [8, 9, 4, 5, 6, 7])
    counted: list[int] = []
    single = search.blocks(additive(effects, counted), 6, size=1)
    np.testing.assert_array_equal(single.costs, np.arange(1, 7))  # blocks of one node verify it
    assert sum(counted) == 6


def test_random_and_exact_orders() -> None:
    effects = np.array([0.5, -3, 1])
    np.testing.assert_array_equal(search.exact_order(effects).order, [1, 2, 0])
    one, other = (search.random_order(50, seed=seed).order for seed in (0, 1))
    assert not np.array_equal(one, other)
    np.testing.assert_array_equal(one, search.random_order(50, seed=0).order)


@pytest.mark.parametrize(
    ("call", "message"),
    (
        (lambda p: search.subsampling(p, 4, n_sets=0), "n_sets=0"),
        (lambda p: search.subsampling(p, 4, n_sets=9, p=1.0), "(?s)p=1.0.*between 0 and 1"),
        (lambda p: search.blocks(p, 4, size=True), "size=True"),
        (lambda p: search.hierarchical(p, 4, levels=0), "(?s)levels=0.*whole number from 1"),
    ),
)
def test_unusable_settings(call: Callable[[search.Patch], object], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        call(additive(np.ones((4, 1))))


def test_a_model_seen_through_patch() -> None:
    model = plain("llama_like")
    task = pairs_task(model)
    nodes = ma.attribution_patching(model, task, sites=("q", "z"), positions="aligned").nodes()
    table, mode = table_of(model, task, nodes, None)
    patch = search.patch_of(Sets(model, task, table, mode, "noising"))
    found = patch(np.eye(len(nodes), dtype=bool))
    expected = exact_effects(model, task, nodes).T.numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-10 * np.abs(expected).max())  # float64 runs
    some = np.array([3, 7, 11])
    part = search.patch_of(Sets(model, task, table, mode, "noising"), some)(np.eye(3, dtype=bool))
    np.testing.assert_allclose(part, found[some], rtol=0, atol=1e-10 * np.abs(expected).max())
    assert np.abs(found[some] - found[:3]).max() > 1e-3  # the first nodes instead of the named ones


@pytest.fixture(scope="module")
def linear() -> tuple[object, object, ma.Attribution, ma.Attribution]:
    """Where every estimate is exact."""
    model = plain("linear")
    task = pairs_task(model)
    sites = ("v", "z", "mlp_post")
    return (
        model,
        task,
        ma.attribution_patching(model, task, sites=sites),
        ma.activation_patching(model, task, sites=sites),
    )


def test_comparison_where_estimates_are_exact(linear: tuple, tmp_path: Path) -> None:
    model, task, estimate, exact = linear
    found = compare_orders(model, task, {"estimate": estimate, "backwards": estimate.top(10**6)[::-1]}, seed=1)
    assert found.methods == ("estimate", "backwards", "random", "subsampling", "blocks", "hierarchical")
    # rounding may swap nodes of nearly equal effect
    assert found.relative_cost("estimate") == pytest.approx(1, abs=0.02)
    assert found.recall("estimate", 10) == found.recall("estimate", 5, site="z") == 1
    setup = estimate.passes.forward + 2 * estimate.passes.backward
    assert found.cost("estimate")[0] == 1 + setup / len(task)
    assert found.relative_cost("estimate", setup=True) > found.relative_cost("estimate")
    assert found.relative_cost("backwards") > found.relative_cost("random") > 1
    assert sum(found.settings["nodes"].values()) + found.settings["n_trivial_zero"] == len(exact.nodes())
    table = found.to_pandas(ks=(5,))
    assert list(table.columns) == ["method", "setup", "relative_cost", "with_setup", "worst", "recall@5"]
    assert table["method"][0] == "estimate"
    same = compare_orders(model, task, {"estimate": estimate}, exact=exact, searches=())
    assert same.relative_cost("estimate") == found.relative_cost("estimate")
    found.save(tmp_path / "c.safetensors")
    again = Comparison.load(tmp_path / "c.safetensors")
    assert again.to_pandas().equals(found.to_pandas())
    assert "hierarchical" in again._repr_html_() and found.summary in again._repr_html_()
    assert repr(found) == f"Comparison({found.summary})"
    start = f"6 orders of {len(found.tensors['effect'])} nodes; cheapest: estimate, relative cost 1 ("
    assert found.summary.startswith(start)


def test_comparison_draws(linear: tuple) -> None:
    model, task, estimate, exact = linear
    axes = compare_orders(model, task, {"estimate": estimate}, exact=exact, searches=("random",)).plot(k=5)
    assert "verifications" in axes.get_xlabel()


def test_comparison_refuses_what_does_not_belong_together(linear: tuple) -> None:
    model, task, estimate, exact = linear
    with pytest.raises(UnknownNameError, match="did you mean 'blocks'"):
        compare_orders(model, task, {"a": estimate}, searches=("block",))
    with pytest.raises(SettingError, match=r"(?s)'random' in both.*rename"):
        compare_orders(model, task, {"random": estimate}, searches=("random",))
    with pytest.raises(SettingError, match="neither exact= nor a result"):
        compare_orders(model, task, {"a": exact.top(3)})
    with pytest.raises(MismatchError, match=r"(?s)'a'.*direction is 'denoising'"):
        other = ma.attribution_patching(model, task, sites=("z",), direction="denoising")
        compare_orders(model, task, {"a": other}, exact=exact)
    with pytest.raises(MismatchError, match=r"(?s)no score of Node.*score every node"):
        compare_orders(model, task, {"a": exact.top(3)}, exact=exact)
    with pytest.raises(SettingError, match="a node that comes twice"):
        compare_orders(model, task, {"a": [exact.top(1)[0]] * 2}, exact=exact)
    with pytest.raises(MismatchError, match="task_hash"):
        compare_orders(model, pairs_task(model, seed=5), {"a": estimate}, exact=exact)
    same = pairs_task(model, changed=())
    with pytest.raises(EmptyTaskError, match=r"(?s)no node has an effect.*pairs that differ"):
        compare_orders(model, same, {"a": ma.attribution_patching(model, same, sites=("z",))})
    found = compare_orders(model, task, {"a": estimate}, exact=exact, searches=())
    with pytest.raises(UnknownNameError, match="'b'"):
        found.recall("b", 3)
    with pytest.raises(UnknownNameError, match="'q'"):
        found.recall("a", 3, site="q")
    assert torch.isfinite(found.tensors["effect"].values).all()
