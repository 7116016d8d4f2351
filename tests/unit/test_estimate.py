"""Costs told before anything is run, against what the methods then count and what the model then records."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import families
import pytest
import torch
from patching_cases import all_nodes, hf, pairs_task, plain, shorts

import mechattr as ma
from mechattr.errors import EmptyTaskError, MismatchError, SettingError, UnknownNameError, UnknownSiteError
from mechattr.models import Batch, HookedHF, record
from mechattr.models.base import Run
from mechattr.patching import Estimate
from mechattr.patching.estimate import METHODS
from mechattr.patching.variants import VARIANTS
from mechattr.sites import Node

# Prompts that differ from the first token on, so that no activation is the same on both, and others.
EVERY, LATE = (0, 1, 2, 3, 4), (2,)
SETTINGS: tuple[dict[str, Any], ...] = (
    {},
    {"sites": "z", "positions": "all"},
    {"sites": ("embed", "k", "rot_q", "mlp_out", "ln_final"), "positions": "named", "batch_size": 2},
    {"sites": ("v", "attn_scores", "result"), "direction": "denoising", "batch_size": 1},
)


def measured(method: str) -> Any:
    return getattr(ma, method)


@pytest.mark.parametrize("changed", (EVERY, LATE), ids=("every token", "a late token"))
@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(s) or "defaults")
@pytest.mark.parametrize("kind", ("gpt2_like", "llama"))
@pytest.mark.parametrize("method", METHODS)
def test_passes_are_those_that_the_method_counts(
    method: str, kind: str, settings: dict[str, Any], changed: tuple[int, ...]
) -> None:
    model = plain(kind) if kind.endswith("_like") else hf(kind)
    task = pairs_task(model, changed=changed)
    told, spent = ma.estimate(model, task, method, **settings), measured(method)(model, task, **settings)
    assert told.backward == spent.passes.backward
    assert told.nodes == len(spent.nodes())
    assert told.at_most == (method == "activation_patching")
    if changed == EVERY or method == "attribution_patching":
        assert spent.settings["n_trivial_zero"] == 0 or method == "attribution_patching"
        assert told.forward == pytest.approx(spent.passes.forward, abs=1e-9)  # sums of fractions in another order
    elif settings.get("positions") == "all":  # merged over positions every node differs somewhere
        assert told.forward == pytest.approx(spent.passes.forward, abs=1e-9)
    else:
        assert spent.passes.forward < told.forward - 1


def test_given_nodes_and_a_given_recording_cost_less() -> None:
    model = plain("gpt2_like")
    task = pairs_task(model, changed=EVERY)
    nodes = [Node("z", 1, 2, head=0), Node("z", 0, 2, head=1), Node("mlp_out", 1, 0), Node("z", 1, 2, head=0)]
    source = record(model, task.corrupt, model.sites())
    whole = ma.estimate(model, task, "activation_patching", sites=("z", "mlp_out"))
    for given, pairs in ((None, 2.0), (source, 1.0)):
        told = ma.estimate(model, task, "activation_patching", nodes=nodes, source=given)
        assert told.forward == len(task) * (pairs + 1 + 2 * 0.5)  # layer 0 of 2 takes a whole pass, layer 1 half
        assert told.nodes == 3
        spent = ma.activation_patching(model, task, nodes=nodes, source=given)
        assert told.forward == spent.passes.forward < whole.forward
        for variant, runs in (("max", 0), ("hedged", 1)):
            told = ma.estimate(model, task, "attribution_patching", variant=variant, source=given)
            assert told.forward == (pairs + runs) * len(task)


def watched(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of the recorded activations that are alive whenever a run ends."""
    alive: list[weakref.ref[torch.Tensor]] = []
    sizes: list[int] = []
    run = model.run

    def watching(*arguments: Any, **settings: Any) -> Run:
        found: Run = run(*arguments, **settings)
        alive.extend(weakref.ref(labelled.values) for labelled in found.activations.values())
        sizes.append(sum(x.numel() * x.itemsize for ref in alive if (x := ref()) is not None))
        return found

    monkeypatch.setattr(model, "run", watching)
    return sizes


@pytest.mark.parametrize("batch_size", (None, 2))
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("family", ("gpt2", "llama"))
@pytest.mark.parametrize("method", METHODS)
def test_recorded_bytes_are_those_of_what_is_recorded(
    method: str, family: str, dtype: torch.dtype, batch_size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = HookedHF(families.model(family, dtype))
    task = pairs_task(model)
    settings: dict[str, Any] = {"sites": shorts(model), "positions": "all", "batch_size": batch_size}
    told = ma.estimate(model, task, method, **settings)
    sizes = watched(model, monkeypatch)
    measured(method)(model, task, **settings)
    assert max(sizes) == told.recorded
    assert told.bytes == told.recorded + told.working
    # control: the residual stream of every block is kept besides the nodes, whatever the nodes are
    lean: dict[str, Any] = {"variant": "max"} if method == "attribution_patching" else {}
    few = ma.estimate(model, task, method, sites="z", positions="all", batch_size=batch_size, **lean)
    rows = min(len(task), batch_size or 8)
    z = 2 * rows * 5 * model.info.n_heads * model.info.d_head * dtype.itemsize  # two layers
    stream = 2 * rows * 5 * model.info.d_model * dtype.itemsize
    assert few.recorded == (2 * z + stream if method == "activation_patching" else z)


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_cost_what_they_then_count(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = hf("llama")
    task = pairs_task(model)
    units = ("block", "sublayer") if "dropped" in VARIANTS[variant].parts else ("block",)
    for unit in units:
        how: dict[str, Any] = {"sites": ("q", "k", "z"), "positions": "all", "variant": variant, "unit": unit}
        told = ma.estimate(model, task, "attribution_patching", **how)
        with monkeypatch.context() as patch:
            sizes = watched(model, patch)
            spent = ma.attribution_patching(model, task, **how)
        assert (told.forward, told.backward) == spent.passes
        assert told.recorded == max(sizes)  # the second point reads the source prompt's embeddings, too
    plainly = ma.estimate(model, task, "attribution_patching", sites=("q", "k", "z"), positions="all", variant="atp")
    assert (told.working > plainly.working) == (variant != "atp")
    assert (told.recorded > plainly.recorded) == (variant in ("two_point", "hedged"))


def saved(model: HookedHF, batch: Batch) -> int:
    """Bytes that autograd keeps for the backward pass of a run, weights left out."""
    weights = {tensor.untyped_storage().data_ptr() for tensor in model.model.state_dict().values()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage  # held, so that its address is not used again
        return tensor

    def metric(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        return logits[:, -1].log_softmax(-1)[:, 7]

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.run(batch, gradients=("q", "k", "v", "z", "mlp_post"), metric=metric)
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("family", families.FAMILIES)
def test_a_graph_is_no_larger_than_told(family: str, dtype: torch.dtype) -> None:
    model = HookedHF(families.model(family, dtype))
    model.model.requires_grad_(False)
    task = pairs_task(model, (30,) * 4)
    told = ma.estimate(model, task, "attribution_patching", variant="atp").working
    kept = saved(model, task.clean)
    assert kept <= told <= 4 * kept
    # control: logits alone, or one block alone, do not cover it
    assert 2 * task.clean.tokens.numel() * model.info.d_vocab * dtype.itemsize < kept
    assert ma.estimate(model, task, "activation_patching", sites="z", batch_size=4).working < told


def test_memory_follows_the_batch_and_passes_do_not() -> None:
    model = hf("gpt2")
    task = pairs_task(model, (5,) * 6)
    for method in METHODS:
        one, two = (ma.estimate(model, task, method, sites="z", batch_size=size) for size in (1, 2))
        assert (two.recorded, two.working) == (2 * one.recorded, 2 * one.working)
        assert (one.forward, one.backward, one.nodes) == (two.forward, two.backward, two.nodes)
        assert ma.estimate(model, task, method, sites="z", batch_size=100).recorded == 6 * one.recorded


def test_nothing_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    model = hf("llama")
    task = pairs_task(model)

    def refused(*arguments: Any, **settings: Any) -> Run:
        raise AssertionError("a run")

    monkeypatch.setattr(model, "run", refused)
    for method in METHODS:
        ma.estimate(model, task, method)
        with pytest.raises(AssertionError, match="a run"):
            measured(method)(model, task)


def test_it_reads_well() -> None:
    told = Estimate(
        method="activation_patching",
        forward=1234.5,
        backward=0.0,
        nodes=2000,
        recorded=3 * 2**20,
        working=2**29,
        at_most=True,
    )
    assert str(told) == (
        "activation_patching: nodes 2,000; forward passes at most 1,234.5 prompt rows; backward passes 0.0 prompt "
        "rows; memory besides the weights about 515 MiB (3 MiB recorded)"
    )
    page = told._repr_html_()
    assert "<caption>activation_patching</caption>" in page
    assert "<tr><th>forward passes</th><td>at most 1,234.5 prompt rows</td></tr>" in page
    assert "at most" not in str(replace(told, at_most=False))
    sizes = [replace(told, recorded=n, working=0) for n in (100, 1023, 1024, 2**40)]
    assert [str(s).rpartition("about ")[2].split(" (")[0] for s in sizes] == ["100 B", "1023 B", "1 KiB", "1,024 GiB"]


def test_what_cannot_be_told_is_refused() -> None:
    model = hf("gpt2")
    task, other = pairs_task(model), record(model, pairs_task(model, seed=1).corrupt, "z")
    node = [Node("z", 0, 0, head=0)]
    cases: list[tuple[type[Exception], str, str, dict[str, Any]]] = [
        (UnknownNameError, "did you mean 'activation_patching'", "activation_patchin", {}),
        (SettingError, "variant= for activation_patching", "activation_patching", {"variant": "atp"}),
        (UnknownNameError, "no such variant", "attribution_patching", {"variant": "grad"}),
        (SettingError, "nodes= for attribution_patching", "attribution_patching", {"nodes": node}),
        (UnknownNameError, "direction 'sideways'", "activation_patching", {"direction": "sideways"}),
        (UnknownSiteError, "mlp_pre_linear", "attribution_patching", {"sites": "mlp_pre_linear"}),
        (SettingError, "batch_size=0", "activation_patching", {"batch_size": 0}),
        (SettingError, "layers run from 0 to 1", "activation_patching", {"nodes": [Node("z", 2, 0, head=0)]}),
        (MismatchError, "made on other prompts", "activation_patching", {"sites": "z", "source": other}),
    ]
    for error, text, method, settings in cases:
        with pytest.raises(error, match=text):
            ma.estimate(model, task, method, **settings)
    nothing = torch.zeros(0, dtype=torch.long)
    empty = replace(task, clean=task.clean.rows(nothing), corrupt=task.corrupt.rows(nothing), spans=())
    with pytest.raises(EmptyTaskError, match="to estimate activation_patching"):
        ma.estimate(model, empty, "activation_patching")


def test_every_node_is_counted_as_the_definition_lists_them() -> None:
    model = hf("llama")
    task, sites = pairs_task(model), shorts(model)
    sites = [short for short in sites if short not in ("attn_scores", "pattern")]
    for positions in ("aligned", "named", "all"):
        for method in METHODS:
            told = ma.estimate(model, task, method, sites=sites, positions=positions)  # type: ignore[arg-type]
            assert told.nodes == len(all_nodes(model, task, sites, positions))
