"""What every row of `mechattr.METHODS` is held to, on plain and transformers models."""

from __future__ import annotations

import copy
import hashlib
import random
from collections.abc import Callable
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from patching_cases import assert_same, averaged, bigness, hf, pairs_task, plain, repadded, shorts

import mechattr as ma
from mechattr.methods import METHODS, MethodRow
from mechattr.models.plain import HookedPlain

MODELS = ("gpt2_like", "llama_like", "gpt2", "llama")
SITES = ("q", "k", "v", "z", "mlp_out")
ROWS = pytest.mark.parametrize("row", METHODS.values(), ids=METHODS)
KINDS = pytest.mark.parametrize("kind", MODELS)


@cache
def model_of(kind: str) -> Any:
    return plain(kind) if kind.endswith("_like") else hf(kind)


def call(row: MethodRow, model: Any, task: Any, **settings: Any) -> ma.Attribution:
    module, name = row.function.split(":")
    method: Callable[..., ma.Attribution] = getattr(import_module(module), name)
    return method(model, task, **{"sites": SITES, "progress": False, **settings})


def tolerance(model: Any, task: Any) -> float:
    """Other batch shapes add in another order: rounding of the dtype, in units of the largest logit."""
    return (1e-12 if model.info.dtype == "float64" else 1e-5) * bigness(model, task)


def state(model: Any, task: Any) -> tuple[Any, ...]:
    """What no method may change."""
    tokens = [batch.tokens.tolist() for batch in (task.clean, task.corrupt)]
    seeds = torch.get_rng_state().tolist(), random.getstate()
    if isinstance(model, HookedPlain):
        weights = {name: tensor for name, tensor in model._weights.items()}
        rest: tuple[Any, ...] = ()
    else:
        weights = model.model.state_dict()
        rest = tuple(
            (
                name,
                len(m._forward_hooks),
                len(m._forward_pre_hooks),
                len(m._backward_hooks),
                m.training,
                sorted(m.__dict__),
            )
            for name, m in model.model.named_modules()
        )
        rest += (model.config._attn_implementation, [p.requires_grad for p in model.model.parameters()])
        rest += ([p.grad for p in model.model.parameters()],)
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(name.encode() + tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest(), tokens, task.hash(), seeds, rest


@KINDS
@ROWS
def test_nothing_is_changed_and_the_same_call_gives_the_same_bits(row: MethodRow, kind: str) -> None:
    model, task = model_of(kind), pairs_task(model_of(kind))
    before = copy.deepcopy(state(model, task))
    first, second = call(row, model, task), call(row, model, task)
    assert state(model, task) == before
    assert first.settings == second.settings and first.provenance == second.provenance
    for name, table in first.tensors.items():
        assert torch.equal(table.values, second.tensors[name].values)


@KINDS
@ROWS
def test_order_and_size_of_batches_change_nothing(row: MethodRow, kind: str) -> None:
    model, task = model_of(kind), pairs_task(model_of(kind))
    whole = call(row, model, task)
    close = tolerance(model, task)
    assert_same(call(row, model, task.rows([2, 0, 1])), whole, close)
    assert_same(call(row, model, task, batch_size=1), whole, close)
    assert_same(call(row, model, task, batch_size=2), whole, close)
    if "batch_independent" in row.promises:
        for name, mean in averaged([call(row, model, task.rows([i])) for i in range(3)]).items():
            torch.testing.assert_close(whole.tensors[name].values, mean, rtol=0, atol=close)


@pytest.mark.parametrize("positions", ("all", "named"))
@pytest.mark.parametrize("kind", ("gpt2_like", "llama_like", *families.FAMILIES))
@ROWS
def test_padding_on_either_side_changes_nothing(row: MethodRow, kind: str, positions: str) -> None:
    model = model_of(kind)
    task = pairs_task(model, (4, 6))
    sites = ("z",) if row.name == "activation_patching" else [s for s in SITES if s in shorts(model)]
    settings = {"sites": sites, "positions": positions}
    alone = averaged([call(row, model, repadded(task.rows([i]), "right", 0), **settings) for i in range(2)])
    for side in ("left", "right"):
        padded = call(row, model, repadded(task, side), **settings)
        for name, mean in alone.items():
            torch.testing.assert_close(padded.tensors[name].values, mean, rtol=0, atol=tolerance(model, task))


def permuted(model: HookedPlain, order: list[int]) -> HookedPlain:
    """The same function with its kv heads, and the query heads of each, in another order."""
    groups = model.info.n_heads // model.info.n_kv_heads
    heads = [kv * groups + i for kv in order for i in range(groups)]
    weights = {}
    for name, tensor in model._weights.items():
        which = name.rpartition(".")[2]
        if which in ("W_Q", "b_Q", "W_O"):
            weights[name] = tensor[heads]
        else:
            weights[name] = tensor[order] if which in ("W_K", "b_K", "W_V", "b_V") else tensor
    return HookedPlain(model.config, weights)


@pytest.mark.parametrize("kind", ("gpt2_like", "llama_like"))
@ROWS
def test_reordered_heads_give_reordered_scores(row: MethodRow, kind: str) -> None:
    model, task = model_of(kind), pairs_task(model_of(kind))
    order = [1, 0]
    groups = model.info.n_heads // model.info.n_kv_heads
    heads = [kv * groups + i for kv in order for i in range(groups)]
    plainly, other = call(row, model, task), call(row, permuted(model, order), task)
    for name, table in plainly.tensors.items():
        chosen = {"head": heads, "kv_head": order}.get(table.axes[-1])
        expected = table.values if chosen is None else table.values[..., chosen]
        torch.testing.assert_close(other.tensors[name].values, expected, rtol=0, atol=tolerance(model, task))
        assert chosen is None or not torch.allclose(other.tensors[name].values, table.values)


@ROWS
def test_promises_hold(row: MethodRow) -> None:
    model = plain("linear")
    task = pairs_task(model)
    result = call(row, model, task, sites=("v", "z", "mlp_post"))
    if "exact_if_linear" in row.promises:
        exact = ma.activation_patching(model, task, sites=("v", "z", "mlp_post"))
        assert_same(result, exact, 1e-10)  # float64 rounding
    if "signed" in row.promises:
        assert result.signed.keys() == result.scores.keys()
        assert any(bool((table.values < 0).any()) for table in result.signed.values())
        for site, table in result.signed.items():
            assert bool((table.values.abs() <= result.scores[site].values + 1e-12).all())  # float64 rounding


@KINDS
@ROWS
def test_results_are_stored_read_and_shown(row: MethodRow, kind: str, tmp_path: Path) -> None:
    model, task = model_of(kind), pairs_task(model_of(kind))
    result = call(row, model, task)
    result.save(tmp_path / "result")
    for again in (ma.open(tmp_path / "result"), ma.Attribution.load(tmp_path / "result")):
        assert isinstance(again, ma.Attribution)
        assert again.settings == result.settings and again.provenance == result.provenance
        assert_same(again, result, 0)
        assert again.top(5) == result.top(5)
    assert row.name in result._repr_html_()
    columns = ["site", "layer", "pos", "head", "neuron", "score", "signed", "contribution"]
    assert list(result.to_pandas().columns) == columns
    assert result.provenance["weight_hash"] == model.fingerprint()["weight_hash"]
    assert result.settings["method"] == row.name and result.settings["task_hash"] == task.hash()
    assert len(result.settings["clean_metric"]) == len(result.settings["corrupt_metric"]) == len(task)


@ROWS
def test_a_row_names_a_page_that_exists(row: MethodRow, root: Path) -> None:
    page = (root / row.page).read_text(encoding="utf-8")
    assert f"ma.{row.name}(" in page and "## Cost" in page and "## Traps" in page
