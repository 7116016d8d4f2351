"""Costs told before anything is run, against what the methods then count and what the model then records."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import families
import pytest
import torch
from estimate_cases import made, measured
from patching_cases import all_nodes, hf, pairs_task, plain, shorts

import mechattr as ma
from mechattr.engines.memory import Course, peak, primes_for
from mechattr.errors import EmptyTaskError, MismatchError, SettingError, UnknownNameError, UnknownSiteError
from mechattr.evaluation.estimate import METHODS
from mechattr.models import Batch, HookedHF, record
from mechattr.models.base import Run
from mechattr.patching import Estimate
from mechattr.patching.variants import VARIANTS
from mechattr.sites import Node

PATCHING = ("activation_patching", "attribution_patching")

# Prompts that differ from the first token on, so that no activation is the same on both, and others.
EVERY, LATE = (0, 1, 2, 3, 4), (2,)
SETTINGS: tuple[dict[str, Any], ...] = (
    {},
    {"sites": "z", "positions": "all"},
    {"sites": ("embed", "k", "rot_q", "mlp_out", "ln_final"), "positions": "named", "batch_size": 2},
    {"sites": ("v", "attn_scores", "result"), "direction": "denoising", "batch_size": 1},
)


FAST = (("llama", 0), ("llama", 1), ("gpt2_like", 2), ("gpt2_like", 3))
CASES = [
    pytest.param(
        kind,
        settings,
        id=f"{kind}-{'-'.join(settings) or 'defaults'}",
        marks=() if (kind, i) in FAST else pytest.mark.slow,  # the same settings on the other network
    )
    for kind in ("gpt2_like", "llama")
    for i, settings in enumerate(SETTINGS)
]


@pytest.mark.parametrize("changed", (EVERY, LATE), ids=("every token", "a late token"))
@pytest.mark.parametrize(("kind", "settings"), CASES)
@pytest.mark.parametrize("method", PATCHING)
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


FEW = (("gpt2", torch.float32, None), ("llama", torch.bfloat16, None))
RECORDINGS = [
    pytest.param(
        family,
        dtype,
        batch_size,
        id=f"{family}-{dtype}-{batch_size}",
        marks=() if (family, dtype, batch_size) in FEW else pytest.mark.slow,  # thousands of runs of one or two rows
    )
    for family in ("gpt2", "llama")
    for dtype in (torch.float64, torch.float32, torch.bfloat16)
    for batch_size in (None, 2)
]


@pytest.mark.parametrize(("family", "dtype", "batch_size"), RECORDINGS)
@pytest.mark.parametrize("method", PATCHING)
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
    assert variant == "atp" or told.bytes > plainly.bytes
    assert (told.recorded > plainly.recorded) == (variant in ("two_point", "hedged"))


CALLS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("activation_patching", {"sites": ("z", "mlp_out"), "positions": "all"}),
    ("attribution_patching", {"variant": "qk"}),
    ("attribution_patching", {}),
    ("attribution_patching", {"variant": "atp", "checkpoint": True}),
    ("edge_attribution", {"steps": 3}),
    ("edge_attribution", {"method": "eap", "checkpoint": True}),
    ("ablation", {"sites": "z", "positions": "all"}),
    ("ablation", {"sites": "attn_out", "kind": "resample", "batch_size": 2}),
    ("causal_tracing", {"sites": "resid_pre", "span": "A", "samples": 2}),
)


@pytest.mark.parametrize(("method", "how"), CALLS, ids=[f"{m}-{'-'.join(map(str, h.values()))}" for m, h in CALLS])
@pytest.mark.parametrize("kind", ("gpt2", "llama"))
def test_bytes_are_within_a_fifth_of_what_is_measured(kind: str, method: str, how: dict[str, Any]) -> None:
    """d_model 64, 16 tokens and 3 pairs; larger ones are measured by the benchmark."""
    model = made(kind)
    task = pairs_task(model, (16,) * 3, changed=range(16))
    told = ma.estimate(model, task, method, **how)
    used = peak(lambda: measured(method)(model, task, progress=False, **how))
    assert 0.8 * used <= told.bytes <= 1.2 * used
    assert told.bytes == told.recorded + told.working


@pytest.mark.parametrize("wrong", ("nothing", "the logits", "the batch", "attention grows with the tokens"))
def test_an_estimate_that_forgets_something_is_outside(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = made("gpt2", 4001 if wrong == "the logits" else 600, heads=32)
    task = pairs_task(model, (60,) * 12, changed=range(60))
    how: dict[str, Any] = {"variant": "atp", "sites": ("z", "mlp_out")}
    used = peak(lambda: ma.attribution_patching(model, task, progress=False, **how))
    born, replay = Course._born, Course.replay
    if wrong == "the logits":
        monkeypatch.setattr(Course, "_born", lambda self, x: None if x.shape[-1:] == (4001,) else born(self, x))
    elif wrong == "the batch":
        monkeypatch.setattr(Course, "replay", lambda self, sizes: replay(self, {"columns": sizes["columns"]}))
    elif wrong == "attention grows with the tokens":

        def linear(self: Course, sizes: dict[str, int]) -> Any:
            self.steps = [(n, tuple(min(p, 1) for p in powers), sign) for n, powers, sign in self.steps]
            return replay(self, sizes)

        monkeypatch.setattr(Course, "replay", linear)
    told = ma.estimate(model, task, "attribution_patching", **how).bytes
    assert (0.8 * used <= told <= 1.2 * used) == (wrong == "nothing")


def test_memory_follows_the_batch_and_passes_do_not() -> None:
    model = hf("gpt2")
    task = pairs_task(model, (5,) * 6)
    for method in PATCHING:
        one, two, all_six = (ma.estimate(model, task, method, sites="z", batch_size=size) for size in (1, 2, 100))
        assert two.recorded == 2 * one.recorded
        assert 1.5 * one.working < two.working <= 2 * one.working  # a table does not grow
        assert (one.forward, one.backward, one.nodes) == (two.forward, two.backward, two.nodes)
        assert all_six.recorded == 6 * one.recorded


def test_only_a_short_prompt_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made("llama")
    task = pairs_task(model, (60,) * 40)
    seen: list[tuple[int, ...]] = []
    forward = model._forward

    def watching(batch: Batch, taps: Any) -> torch.Tensor:
        seen.append(tuple(batch.tokens.shape))
        return forward(batch, taps)

    monkeypatch.setattr(model, "_forward", watching)
    for method, runs in (("activation_patching", 3), ("ablation", 3), ("attribution_patching", 3)):
        seen.clear()
        ma.estimate(model, task, method)
        assert len(seen) <= runs + 1  # and the form of its attention, once
        assert all(rows * columns < 200 for rows, columns in seen)


def test_the_sizes_of_a_course() -> None:
    """Products of primes, one more key, and views, which are not tensors of their own."""
    course = Course({"pairs": 5, "columns": 7})
    with course:
        x = torch.zeros(5, 7, 3)
        y = x.view(35, 3)
        z = torch.zeros(5, 7, 8)  # keys and a sink
        del x, y, z
        w = torch.zeros(7)
    assert course.replay().peak == 4 * (105 + 245)  # a sink is left out
    assert course.replay({"pairs": 2, "columns": 10}) == (4 * (60 + 200), 4 * 10)
    assert len(w) == 7
    assert primes_for((10, 21, 12, 32), 3) == [13, 17, 19]  # 5 and 7 divide, 11 stands beside 12


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
        (SettingError, "to estimate minimality\n  found: no circuit\n  fix: give circuit=", "minimality", {}),
        (SettingError, "edges of a circuit\n  found: a list", "faithfulness", {"edges": [("input", "logits")]}),
        (EmptyTaskError, "an empty list of receivers", "path_patching", {"receivers": []}),
        (SettingError, "the reader comes before the writer", "edge_patching", {"edges": [("m1", "a0.h0<q>")]}),
        (SettingError, "budget=3", "missed_effect_bound", {"verified": [], "budget": 3}),
        (UnknownNameError, "no such method of edge attribution", "edge_attribution", {"method": "eapig"}),
        (UnknownNameError, "ablation of kind 'meen'", "ablation", {"kind": "meen"}),
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
    assert set(METHODS) == {name for name, row in ma.METHODS.items() if row.takes == "pairs"}
    empty = replace(task, clean=task.clean.rows(nothing), corrupt=task.corrupt.rows(nothing), spans=())
    with pytest.raises(EmptyTaskError, match="to estimate activation_patching"):
        ma.estimate(model, empty, "activation_patching")


def test_every_node_is_counted_as_the_definition_lists_them() -> None:
    model = hf("llama")
    task, sites = pairs_task(model), shorts(model)
    sites = [short for short in sites if short not in ("attn_scores", "pattern")]
    for positions in ("aligned", "named", "all"):
        for method in PATCHING:
            told = ma.estimate(model, task, method, sites=sites, positions=positions)  # type: ignore[arg-type]
            assert told.nodes == len(all_nodes(model, task, sites, positions))
