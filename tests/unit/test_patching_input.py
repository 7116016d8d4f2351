"""Bad input to the patching methods: each error says what was asked, what was found and what to do."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from patching_cases import PLAIN, all_nodes, assert_same, pairs_task, plain, repadded, shorts

import mechattr as ma
from mechattr.errors import (
    AlignmentError,
    EmptyTaskError,
    MechattrError,
    MismatchError,
    NonFiniteError,
    SettingError,
    UnknownNameError,
    UnknownSiteError,
)
from mechattr.models.plain import plain_model
from mechattr.models.record import record
from mechattr.models.rules import Rules
from mechattr.sites import Node

METHODS = pytest.mark.parametrize("method", (ma.attribution_patching, ma.activation_patching))
MODEL = plain("gpt2_like")
TASK = pairs_task(MODEL)


def message(error: pytest.ExceptionInfo[MechattrError]) -> str:
    return f"{error.value.asked} | {error.value.found} | {error.value.fix}"


@METHODS
@pytest.mark.parametrize(
    ("settings", "kind", "text"),
    (
        (
            {"direction": "up"},
            UnknownNameError,
            "direction 'up' | no such direction | choose one of: denoising, noising",
        ),
        ({"direction": None}, UnknownNameError, "direction None | no such direction"),
        ({"source": {}}, SettingError, "source | a dict | give a Cache"),
        ({"positions": "each"}, UnknownNameError, "positions | 'each' | "),
        ({"sites": ()}, SettingError, "sites | an empty list | choose among q, k, v, z, mlp_post"),
        ({"sites": "zz"}, UnknownSiteError, "site 'zz' | no such site | did you mean 'z'"),
        ({"sites": "mlp_pre_linear"}, UnknownSiteError, "site 'mlp_pre_linear' | this model has no such site; it has"),
        ({"sites": "blocks.0.attn.hook_z"}, UnknownSiteError, "sites of a table are short names | use 'z'"),
        ({"batch_size": 0}, SettingError, "batch_size=0 | no number of rows | give a whole number from 1, or None"),
        ({"batch_size": True}, SettingError, "batch_size=True | no number of rows"),
        ({"batch_size": 2.0}, SettingError, "batch_size=2.0 | no number of rows"),
    ),
)
def test_settings_that_cannot_be_used(method: Any, settings: dict[str, Any], kind: type, text: str) -> None:
    with pytest.raises(kind) as error:
        method(MODEL, TASK, **settings)
    assert text in message(error)


def test_an_unknown_variant() -> None:
    with pytest.raises(UnknownNameError) as error:
        ma.attribution_patching(MODEL, TASK, variant="grad")
    assert message(error).startswith("variant 'grad' | no such variant | ")


@METHODS
def test_tasks_that_cannot_be_used(method: Any) -> None:
    named = pairs_task(MODEL, (4, 6))
    unequal = replace(named, spans=tuple({"END": spans["END"]} for spans in named.spans))
    with pytest.raises(AlignmentError) as error:
        method(MODEL, unequal)
    assert "prompts of 4 to 6 tokens" in message(error) and "positions='named'" in message(error)
    with pytest.raises(AlignmentError) as error:
        method(MODEL, named, positions="aligned")  # asked for by name, it is not replaced by anything
    moved = replace(TASK, clean=repadded(TASK, "left").clean, corrupt=repadded(TASK, "right").corrupt)
    with pytest.raises(AlignmentError) as error:
        method(MODEL, moved, positions="all")
    assert "clean and corrupt prompts with different lengths or padding" in message(error)
    nothing = torch.zeros(0, dtype=torch.long)
    empty = replace(TASK, clean=TASK.clean.rows(nothing), corrupt=TASK.corrupt.rows(nothing), spans=())
    with pytest.raises(EmptyTaskError) as error:
        method(MODEL, empty)
    assert "a task without pairs | give at least one pair" in message(error)


@METHODS
def test_positions_by_default(method: Any) -> None:
    """Every position where pairs align, else the spans that they name."""
    unequal = pairs_task(MODEL, (4, 6))
    chosen = method(MODEL, unequal)
    assert chosen.settings["positions"] == "named"
    assert chosen.scores["z"].coords["pos"] == tuple(unequal.positions("named"))
    assert method(MODEL, TASK).settings["positions"] == "aligned"


@pytest.mark.parametrize(
    ("node", "kind", "text"),
    (
        (Node("z", 2, 0, 0), SettingError, "layer 2: layers run from 0 to 1"),
        (Node("z", -1, 0, 0), SettingError, "layer -1: layers run from 0 to 1"),
        (Node("z", None, 0, 0), SettingError, "layer None: layers run from 0 to 1"),
        (Node("z", "0", 0, 0), SettingError, "layer 0: layers run from 0 to 1"),
        (Node("z", 0, 0, 0.5), SettingError, "head 0.5: head runs from 0 to 1"),
        (Node("z", 0, 0, True), SettingError, "head True: head runs from 0 to 1"),
        (Node("embed", 0, 0), SettingError, "layer 0: embed exists once in the model"),
        (Node("z", 0, 0, 2), SettingError, "head 2: head runs from 0 to 1"),
        (Node("z", 0, 0), SettingError, "head None: head runs from 0 to 1"),
        (Node("z", 0, 0, 0, 1), SettingError, "neuron 1: z has no neuron"),
        (Node("mlp_post", 0, 0, neuron=5), SettingError, "neuron 5: neuron runs from 0 to 4"),
        (Node("attn_out", 0, 0, 1), SettingError, "head 1: attn_out has no head"),
        (
            Node("z", 0, 5, 0),
            SettingError,
            "positions of this task: 0, 1, 2, 3, 4 | name a position that every pair has",
        ),
        (Node("z", 0, -1, 0), SettingError, "positions of this task: 0, 1, 2, 3, 4"),
        (Node("z", 0, "C", 0), SettingError, "positions of this task: A, B, END"),
        (Node("zz", 0, 0, 0), UnknownSiteError, "site 'zz' | no such site"),
        (("z", 0, 0, 0), SettingError, "nodes | a tuple | give a list of Node, such as attribution.top(50)"),
    ),
)
def test_nodes_that_do_not_exist(node: Any, kind: type, text: str) -> None:
    with pytest.raises(kind) as error:
        ma.activation_patching(MODEL, TASK, nodes=[node])
    assert text in message(error)


def test_one_node_and_an_iterator_of_nodes_are_lists_of_nodes() -> None:
    node = Node("z", 0, 1, 0)
    expected = ma.activation_patching(MODEL, TASK, nodes=[node])
    assert_same(ma.activation_patching(MODEL, TASK, nodes=node), expected, 0)
    assert_same(ma.activation_patching(MODEL, TASK, nodes=iter([node])), expected, 0)


def test_a_recording_in_another_dtype_is_cast() -> None:
    exact = record(MODEL, TASK.corrupt, ("z",))
    narrow = ma.Cache.from_tensors({name: x.values.float() for name, x in exact.items()})
    found = ma.activation_patching(MODEL, TASK, sites=("z",), source=narrow)
    assert_same(found, ma.activation_patching(MODEL, TASK, sites=("z",), source=exact), 1e-4)  # float32 rounding


def test_lists_of_nodes_that_cannot_be_used() -> None:
    with pytest.raises(EmptyTaskError, match="an empty list of nodes"):
        ma.activation_patching(MODEL, TASK, nodes=[])
    with pytest.raises(SettingError, match=r"positions of several kinds \(aligned, all, named\)"):
        ma.activation_patching(MODEL, TASK, nodes=[Node("z", 0, pos, 0) for pos in (1, "A", None)])
    with pytest.raises(SettingError, match="nodes with aligned positions"):
        ma.activation_patching(MODEL, TASK, nodes=[Node("z", 0, 1, 0)], positions="all")
    with pytest.raises(AlignmentError, match="prompts of 4 to 6 tokens"):
        ma.activation_patching(MODEL, pairs_task(MODEL, (4, 6)), nodes=[Node("z", 0, 1, 0)])


@pytest.mark.parametrize("positions", ("aligned", "named", "all"))
@pytest.mark.parametrize("kind", ("gpt2_like", "llama_like"))
def test_the_top_of_an_estimate_is_checked_exactly(kind: str, positions: str) -> None:
    model = plain(kind)
    task = pairs_task(model)
    sites = ("q", "k", "v", "z", "mlp_post", "mlp_out")
    top = ma.attribution_patching(model, task, sites=sites, positions=positions).top(12)
    some = ma.activation_patching(model, task, nodes=[*top, *top[:3]], positions=positions)
    everything = ma.activation_patching(model, task, sites=sites, positions=positions)
    assert set(some.nodes()) == set(top) and some.settings["n_nodes"] == len(top)
    for node in top:  # float64 rounding: other batch shapes add in another order
        assert some.value(node, "signed") == pytest.approx(everything.value(node, "signed"), abs=1e-12)


@METHODS
@pytest.mark.parametrize("direction", ("noising", "denoising"))
def test_a_recorded_source_run_takes_the_place_of_a_fresh_one(method: Any, direction: str) -> None:
    side, other = ("corrupt", "clean") if direction == "noising" else ("clean", "corrupt")
    stored = record(MODEL, getattr(TASK, side), ("embed", "rot_q", "z", "mlp_post"))
    settings = {"sites": ("q", "z", "mlp_post"), "direction": direction}
    fresh = method(MODEL, TASK, **settings)
    found = method(MODEL, TASK, source=stored, **settings)
    assert_same(found, fresh, 0)
    # float64 rounding: other batch shapes add in another order
    assert_same(method(MODEL, TASK, source=stored, batch_size=2, **settings), fresh, 1e-12)
    assert found.settings[f"{side}_metric"] is None and len(found.settings[f"{other}_metric"]) == len(TASK)
    assert fresh.passes.forward - found.passes.forward == len(TASK)
    assert fresh.settings["source_sha256"] is None and len(found.settings["source_sha256"]) == 64


@METHODS
def test_a_recording_of_something_else_is_refused(method: Any) -> None:
    right = record(MODEL, TASK.corrupt, ("embed", "z"))
    for source, text in (
        (record(MODEL, TASK.corrupt, ("embed", "v")), "it has no blocks.0.attn.hook_z (2 missing)"),
        (record(MODEL, TASK.clean, ("embed", "z")), "it was made on other prompts (tokens_sha256 differs)"),
        (
            record(plain_model(PLAIN["gpt2_like"], seed=1), TASK.corrupt, ("embed", "z")),
            "by another model (weight_hash differs)",
        ),
        (ma.Cache.from_tensors({name: x.values[:2] for name, x in right.items()}), "a recording of shape (2, 5, "),
        (
            ma.Cache.from_tensors({name: x.values[:, 1:] for name, x in right.items()}),
            "a recording of shape (3, 4, ",
        ),
    ):
        with pytest.raises(MismatchError) as error:
            method(MODEL, TASK, sites=("z",), source=source)
        assert text in message(error)


def test_sites_that_no_path_reaches_have_no_effect() -> None:
    held = ma.attribution_patching(MODEL, TASK, sites=("z", "mlp_post"), rules=Rules(hold=frozenset({0})))
    assert held.settings["rules"]["hold"] == [0] and held.settings["rules"]["norm"] == "full"
    plainly = ma.attribution_patching(MODEL, TASK, sites=("z", "mlp_post"))
    for site in ("z", "mlp_post"):
        assert bool((held.scores[site].sel(layer=0).values == 0).all())
        # the write of block 0 is held, not changed, so nothing is different above it
        torch.testing.assert_close(held.scores[site].sel(layer=1).values, plainly.scores[site].sel(layer=1).values)


def test_half_precision_is_summed_in_float32_and_overflow_is_an_error() -> None:
    narrow = plain_model(PLAIN["gpt2_like"], dtype="bfloat16")
    wide = plain("gpt2_like")
    for method in (ma.attribution_patching, ma.activation_patching):
        found, expected = (
            method(model, pairs_task(model), sites=("z",)).scores["z"].values for model in (narrow, wide)
        )
        assert found.dtype == torch.float32
        # bfloat16 keeps 8 bits: a few per cent of the largest effect
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=0.1 * float(expected.max()))
    loud = replace(TASK, metric=replace(TASK.metric, function=lambda logits, batch: logits[:, -1, 0] * 1e300 * 1e10))
    with pytest.raises(NonFiniteError, match="the metric of the base run, on pair 0\n  found: it is inf"):
        ma.attribution_patching(MODEL, loud, sites=("z",))


def test_every_node_of_every_site_is_in_the_tables() -> None:
    result = ma.attribution_patching(MODEL, TASK, sites=shorts(MODEL))
    assert set(result.nodes()) == set(all_nodes(MODEL, TASK, shorts(MODEL), "aligned"))
