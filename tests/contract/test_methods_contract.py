"""What every row of `mechattr.METHODS` is held to, on plain and transformers models and on other backends."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from backends import backend_model
from contract_cases import CASES, NO_EDGES, Case, Heads, assert_equal, call, combined, renamed, tables, tolerance
from contract_state import state
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from patching_cases import PLAIN, SIZES, hf, pairs_task, plain, repadded, shorts

import mechattr as ma
from mechattr.errors import UnknownSiteError, UnsupportedFeatureError
from mechattr.methods import METHODS, MethodRow
from mechattr.models.plain import HookedPlain, plain_model
from mechattr.models.plain_config import PlainConfig

MODELS = ("gpt2_like", "llama_like", "gpt2", "llama")
ELSEWHERE = ("lens-gpt2", "nnsight-gpt2")  # other backends; what they need more than these is in tests of their own
PLAIN_AND_FAMILIES = ("gpt2_like", "llama_like", *families.SHAPES)
SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in ELSEWHERE]  # slow: what `test_backends_agree` implies
KINDS = pytest.mark.parametrize("kind", [*MODELS, *SLOW])
EVERY = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def some(**chosen: bool) -> Any:
    """The cases for which attributes are set, or not."""
    found = {name: c for name, c in CASES.items() if all(bool(getattr(c, k)) == yes for k, yes in chosen.items())}
    return pytest.mark.parametrize("case", found.values(), ids=found)


@cache
def model_of(kind: str) -> Any:
    if "-" in kind:
        return backend_model(kind)
    return plain(kind) if kind in PLAIN else hf(kind)


def state_of(model: Any, task: Any) -> tuple[Any, ...]:
    return *state(model, (task.clean, task.corrupt)), task.hash()


def test_every_method_is_held_to_the_contract() -> None:
    assert {case.method for case in CASES.values()} == {name for name, row in METHODS.items() if row.takes == "pairs"}


@KINDS
@EVERY
def test_nothing_is_changed_and_the_same_call_gives_the_same_bits(case: Case, kind: str) -> None:
    model, task = model_of(kind), pairs_task(model_of(kind))
    before = copy.deepcopy(state_of(model, task))
    first, second = call(case, model, task), call(case, model, task)
    assert state_of(model, task) == before
    assert first.settings == second.settings and first.provenance == second.provenance
    assert_equal(tables(first), tables(second), 0)


@KINDS
@EVERY
def test_order_and_size_of_batches_change_nothing(case: Case, kind: str) -> None:
    model, task = model_of(kind), pairs_task(model_of(kind))
    whole = call(case, model, task)
    close = tolerance(model, task, whole)
    if not case.by_order:
        assert_equal(tables(call(case, model, task.rows([2, 0, 1])), [2, 0, 1]), tables(whole), close)
    for size in (1, 2) if kind in PLAIN else (2,):
        assert_equal(tables(call(case, model, task, batch_size=size)), tables(whole), close)
    if "batch_independent" in case.promises:
        expected = combined([call(case, model, task.rows([i])) for i in range(3)])
        assert_equal({name: tables(whole)[name] for name in expected}, expected, close)


def test_what_is_drawn_by_number_says_so_and_nothing_else_depends_on_order() -> None:
    model = model_of("gpt2_like")
    task = pairs_task(model)
    other = task.rows([1, 0, 2])
    resample = CASES["ablation resample"]
    whole, moved = call(resample, model, task), call(resample, model, other)
    assert whole.settings["reference_rows"] == moved.settings["reference_rows"]  # the seed says which
    with pytest.raises(AssertionError):
        assert_equal(tables(moved), tables(whole), 1e-6)
    two = call(resample, model, task.rows([0, 1])), call(resample, model, task.rows([1, 0]))  # each takes the other
    assert_equal(tables(two[0]), tables(two[1]), tolerance(model, task, whole))
    bound = CASES["missed_effect_bound"]
    whole, moved = call(bound, model, task), call(bound, model, other)
    for name in ("n_covered", "n_verified", "n_trivial_zero", "samples", "passes"):
        assert whole.settings[name] == moved.settings[name]
    for name, table in tables(whole).items():
        assert torch.equal(table.isnan(), tables(moved)[name].isnan())


def additive() -> HookedPlain:
    """A linear network of one block: what its heads do adds up, so that every sample says the same of a node."""
    return plain_model(PlainConfig.linear(**{**SIZES, "n_layers": 1}))


def test_where_effects_add_up_the_bound_does_not_depend_on_what_is_drawn() -> None:
    model, case = additive(), CASES["missed_effect_bound"]
    task = pairs_task(model)
    heads = Heads.of(model, [1, 0])
    exact = ma.activation_patching(model, task, sites="z").signed["z"].values
    first = call(case, model, task, sites="z")
    seen = ("difference/z", "signed/z", "error/z")
    turned = call(case, heads.weights(model), task, heads=heads, sites="z")
    for found, expected in (
        (call(case, model, task.rows([2, 0, 1]), sites="z"), tables(first)),
        (call(case, model, task, sites="z", seed=1), tables(first)),
        (turned, renamed(first, heads, turned)),
    ):
        assert not torch.equal(tables(found)["inclusions/z"], expected["inclusions/z"])  # other samples
        assert_equal({n: tables(found)[n] for n in seen}, {n: expected[n] for n in seen}, 1e-10)  # float64 rounding
    covered = ~first.tensors["error/z"].values.isnan()
    torch.testing.assert_close(first.tensors["signed/z"].values[covered], exact[covered], rtol=0, atol=1e-10)


def paddings() -> list[Any]:
    """Every case with every kind of model that it supports, and with each kind of positions that it takes."""
    return [
        pytest.param(case, kind, positions, id="-".join(filter(None, (name, kind, positions))))
        for name, case in CASES.items()
        for kind in PLAIN_AND_FAMILIES
        if kind not in case.refuses
        for positions in (("all", "named") if case.placed else ("",))
    ]


@pytest.mark.parametrize(("case", "kind", "positions"), paddings())
def test_padding_on_either_side_changes_nothing(case: Case, kind: str, positions: str) -> None:
    model = model_of(kind)
    task = pairs_task(model, (4, 6) if case.ragged else (5, 5))
    settings: dict[str, Any] = {"positions": positions} if positions else {}
    if case.sites:
        settings["sites"] = [site for site in case.sites if site in shorts(model)]
    plainly = repadded(task, "right", 0)
    if "batch_independent" in case.promises:
        expected = combined([call(case, model, plainly.rows([i]), **settings) for i in range(2)])
    else:
        expected = tables(call(case, model, plainly, **settings))
    for side in ("left", "right"):
        padded = call(case, model, repadded(task, side), **settings)
        close = tolerance(model, task, padded)
        assert_equal({name: tables(padded)[name] for name in expected}, expected, close)


@pytest.mark.parametrize("kind", ELSEWHERE)
@EVERY
def test_backends_agree(case: Case, kind: str) -> None:
    model, other = families.hooked(kind.rpartition("-")[2]), model_of(kind)
    task = pairs_task(other)
    before = copy.deepcopy(state_of(other, task))
    found, expected = call(case, other, task), call(case, model, pairs_task(model))
    assert state_of(other, task) == before
    assert_equal(tables(found), tables(expected), tolerance(other, task, found))


CARRIED = ("path_patching", "edge_patching", "faithfulness", "minimality")  # their edits hold more than tensors


@EVERY
def test_methods_run_as_on_a_server_or_are_refused(case: Case) -> None:
    model, other = families.hooked("gpt2"), model_of("nnsight-local-gpt2")
    task = pairs_task(other)
    if case.method in CARRIED:
        with pytest.raises(UnsupportedFeatureError, match=r"(?s)sending a .*fix: .*remote="):
            call(case, other, task)
    else:
        found, expected = call(case, other, task), call(case, model, pairs_task(model))
        assert_equal(tables(found), tables(expected), tolerance(other, task, found))


@some(refuses=True)
def test_families_that_are_not_supported_are_refused(case: Case) -> None:
    for kind in sorted(case.refuses):
        model = model_of(kind)
        with pytest.raises(UnsupportedFeatureError, match=f"edges of '{kind}'.*\n.*{NO_EDGES[kind]}"):
            call(case, model, pairs_task(model))


@pytest.mark.parametrize("kind", ("gpt2_like", "llama_like"))
@some(by_head=False)
def test_reordered_heads_give_reordered_scores(case: Case, kind: str) -> None:
    model, task = model_of(kind), pairs_task(model_of(kind))
    heads = Heads.of(model, [1, 0])
    without = {"random": 0} if "random" in case.settings else {}  # random circuits draw edges by number
    plainly = call(case, model, task, **without)
    other = call(case, heads.weights(model), task, heads=heads, **without)
    expected = renamed(plainly, heads, other)
    assert_equal(tables(other), expected, tolerance(model, task, plainly))
    moved = [name for name, table in expected.items() if not torch.equal(table, tables(plainly)[name])]
    named = {"head", "kv_head", "source", "target", "part"}
    assert all(name in moved for name, x in plainly.tensors.items() if named & {*x.axes})


@some(by_head=False)
def test_another_task_is_told_apart(case: Case) -> None:
    """The control of the tests above: the same comparison sees another task."""
    model = model_of("gpt2_like")
    task, other = pairs_task(model), pairs_task(model, seed=1)
    with pytest.raises(AssertionError):
        assert_equal(
            tables(call(case, model, other)),
            tables(call(case, model, task)),
            tolerance(model, task, call(case, model, task)),
        )


def measured(case: Case, model: Any, task: Any, sites: Any) -> Any:
    """The exact effects of what a method measures or estimates."""
    return ma.activation_patching(model, task, sites=sites) if case.sites else ma.edge_patching(model, task)


EXACT = {name: case for name, case in CASES.items() if "exact_if_linear" in case.promises}


@pytest.mark.parametrize("case", EXACT.values(), ids=EXACT)
def test_estimates_are_exact_in_a_linear_network(case: Case) -> None:
    model, sites = plain("linear"), ("v", "z", "mlp_post")
    task = pairs_task(model)
    result, exact = call(case, model, task, sites=sites), measured(case, model, task, sites)
    close = 1e-10  # float64 rounding
    drops = result.settings.get("unit") is not None  # the score is then at least what is measured
    signed = {name for name in result.tensors if name.startswith("signed")}
    for name, table in tables(exact).items():
        if name in signed or not drops:
            torch.testing.assert_close(result.tensors[name].values, table, rtol=0, atol=close, equal_nan=True)
        else:
            assert bool((result.tensors[name].values >= table - close).all())


SIGNED = {name: case for name, case in CASES.items() if "signed" in case.promises}


@pytest.mark.parametrize("case", SIGNED.values(), ids=SIGNED)
def test_effects_carry_a_sign(case: Case) -> None:
    model = model_of("gpt2_like")
    result = call(case, model, pairs_task(model))
    pairs = [(name, name.replace("signed", "score")) for name in result.tensors if name.startswith("signed")]
    assert 2 * len(pairs) == len(result.tensors)
    signed = [(result.tensors[a].values, result.tensors[b].values) for a, b in pairs]
    assert any(bool((effect < 0).any()) for effect, _ in signed) and any(bool((e > 0).any()) for e, _ in signed)
    for effect, score in signed:
        there = ~effect.isnan()
        assert bool((effect[there].abs() <= score[there] + 1e-12).all())  # float64 rounding


@KINDS
@EVERY
def test_results_are_stored_read_and_shown(case: Case, kind: str, tmp_path: Path) -> None:
    model, task = model_of(kind), pairs_task(model_of(kind))
    result = call(case, model, task)
    result.save(tmp_path / "result")
    frame = result.to_pandas()
    assert tuple(frame.columns) == case.columns and len(frame)
    for again in (ma.open(tmp_path / "result"), case.result.load(tmp_path / "result")):
        assert type(again) is case.result
        assert again.settings == result.settings and again.provenance == result.provenance
        assert_equal(tables(again), tables(result), 0)
        assert again.to_pandas().equals(frame)
        assert again._repr_html_() == result._repr_html_()
    assert "<table" in result._repr_html_()
    if hasattr(result, "plot"):
        ax = Figure().add_subplot()
        drawn = result.plot(ax)
        assert isinstance(drawn, Axes) and drawn.get_figure() is ax.get_figure()
    assert result.provenance["weight_hash"] == model.fingerprint()["weight_hash"]
    assert result.settings["method"] == case.method and result.settings["task_hash"] == task.hash()
    assert result.settings["n_pairs"] == len(task) == len(result.settings["clean_metric"])
    corrupt = result.settings["corrupt_metric"]
    assert (corrupt is None) == (case.method == "ablation") and (corrupt is None or len(corrupt) == len(task))
    assert result.passes.forward >= len(task) and result.passes.backward >= 0


@pytest.mark.parametrize("row", METHODS.values(), ids=METHODS)
def test_a_row_names_a_page_that_exists(row: MethodRow, root: Path) -> None:
    page = (root / row.page).read_text(encoding="utf-8")
    assert f"ma.{row.name}(" in page and "## Cost" in page and "## Traps" in page


def test_a_mixture_of_experts_is_scored_by_what_its_mlps_write() -> None:
    model = model_of("mixtral")
    task = pairs_task(model)
    for method in (ma.attribution_patching, ma.activation_patching, ma.ablation):
        assert tuple(method(model, task).scores) == ("q", "k", "v", "z", "mlp_out")
    with pytest.raises(UnknownSiteError, match="mlp_post"):
        ma.attribution_patching(model, task, sites="mlp_post")
