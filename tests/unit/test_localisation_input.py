"""Bad input to every method that localises: each error says what was asked, what was found and what to do; and what is
no error, such as pairs that do not differ, is said by the result."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from contract_cases import CASES, Case, Heads, assert_equal, call, scored, tables
from patching_cases import pairs_task, plain
from torch import Tensor

import mechattr as ma
from mechattr.errors import (
    AlignmentError,
    EmptyTaskError,
    MechattrError,
    MismatchError,
    NonFiniteError,
    OutputExistsError,
    SettingError,
    UnknownNameError,
    UnknownSiteError,
)
from mechattr.models.plain import HookedPlain, plain_model
from mechattr.tasks.task import Task

MODEL = plain("gpt2_like")
TASK = pairs_task(MODEL)
NONE = frozenset[str]()
CIRCUITS = frozenset({"faithfulness", "minimality"})  # what is undefined without a gap between clean and corrupt
ESTIMATES = frozenset({"attribution_patching", "attribution_patching two_point", "edge_attribution"})
CLEAN_ONLY = frozenset({"ablation", "ablation resample"})  # corrupt prompts are not run


def cases(without: frozenset[str] = NONE, only: frozenset[str] | None = None) -> Any:
    names = [name for name in CASES if name not in without and (only is None or name in only)]
    return pytest.mark.parametrize("case", [CASES[name] for name in names], ids=names)


def message(error: pytest.ExceptionInfo[MechattrError]) -> str:
    return f"{error.value.asked} | {error.value.found} | {error.value.fix}"


def measured_by(function: Callable[[Tensor], Tensor]) -> Task:
    """The task with a metric of the logits [batch, pos, vocab]."""
    return replace(TASK, metric=replace(TASK.metric, function=lambda logits, _batch: function(logits)))


@cases()
def test_a_model_or_task_of_another_type(case: Case) -> None:
    inputs = {**case.inputs(MODEL, Heads.of(MODEL), case.settings), **case.settings}
    method = getattr(ma, case.method)
    for model in (torch.nn.Linear(2, 2), "gpt2", None):
        with pytest.raises(SettingError) as error:
            method(model, TASK, **inputs)
        assert f" | a {type(model).__name__} | give a hooked model, such as ma.load(model)" in message(error)
    for task in ([("a", "b")], TASK.clean, None):
        with pytest.raises(SettingError) as error:
            method(MODEL, task, **inputs)
        assert f" | a {type(task).__name__} | give a task, such as ma.tasks.from_pairs(model, pairs)" in message(error)


# Pairs that have nothing to say


@cases(CIRCUITS | CLEAN_ONLY | {"missed_effect_bound"})
def test_pairs_that_do_not_differ_score_zero_and_the_result_says_so(case: Case) -> None:
    result = call(case, MODEL, replace(TASK, corrupt=TASK.clean))
    for table in tables(result).values():
        assert bool((table[~table.isnan()] == 0).all()) and not bool(table.isnan().all())
    n = len(result.to_pandas())
    assert result.settings["n_trivial_zero"] == n > 0
    assert call(case, MODEL, TASK).settings["n_trivial_zero"] < n  # control: not always all of them


def test_a_bound_on_pairs_that_do_not_differ_says_that_nothing_is_left() -> None:
    bound = call(CASES["missed_effect_bound"], MODEL, replace(TASK, corrupt=TASK.clean))
    assert bound.theta == 0 and bound.n_covered == 0
    assert "each was verified or has the same activation on both prompts" in bound._repr_html_()


@cases(only=CIRCUITS)
def test_faithfulness_without_a_gap_is_refused(case: Case) -> None:
    swapped = replace(TASK, clean=TASK.corrupt, corrupt=TASK.clean)
    even = replace(TASK, metric=replace(TASK.metric, function=lambda logits, _batch: logits[:, 0, 0]))
    for task in (replace(TASK, corrupt=TASK.clean), even):
        with pytest.raises(SettingError) as error:
            call(case, MODEL, task)
        text = message(error)
        assert "the faithfulness of circuits over 3 pairs | it is undefined: the mean metric is " in text
        assert text.endswith(
            "| choose pairs whose clean and corrupt metrics differ, such as task.rows(clean > corrupt)"
        )
    assert len(call(case, MODEL, swapped).to_pandas())  # control: a gap of the other sign is a gap


# Tasks and names


@cases()
def test_a_task_without_pairs(case: Case) -> None:
    nothing = torch.zeros(0, dtype=torch.long)
    empty = replace(TASK, clean=TASK.clean.rows(nothing), corrupt=TASK.corrupt.rows(nothing), spans=())
    with pytest.raises(EmptyTaskError) as error:
        call(case, MODEL, empty)
    assert "a task without pairs | give at least one pair" in message(error)


NAMES: dict[str, tuple[Any, type[MechattrError], str]] = {
    "direction": ("up", UnknownNameError, "direction 'up' | no such direction | choose one of: denoising, noising"),
    "positions": ("each", UnknownNameError, "positions | 'each' | choose one of: aligned, all, named"),
    "sites": ("zz", UnknownSiteError, "site 'zz' | no such site | did you mean 'z'?"),
    "variant": ("stars", UnknownNameError, "variant 'stars' | no such variant | did you mean 'star'?"),
    "kind": ("median", UnknownNameError, "ablation of kind 'median' | no such kind | did you mean 'mean'?"),
    "ablation": ("media", UnknownNameError, "ablation 'media' | no such ablation | did you mean 'mean'?"),
    "rule": ("simpson", UnknownNameError, "rule 'simpson' | no such quadrature rule | "),
    "mlps": ("ice", UnknownNameError, "mlps='ice' | no such treatment of MLPs | choose one of: frozen, recomputed"),
    "by": ("size", UnknownNameError, "measure 'size' | no such measure | choose one of: abs_signed, contribution, sc"),
    "batch_size": (0, SettingError, "batch_size=0 | no number of rows | give a whole number from 1, or None"),
    "seed": (-1, SettingError, "seed=-1 | no "),
    "rules": ("relp", SettingError, "rules='relp' | a str | give Rules, such as Rules.relp()"),
    "random": (-1, SettingError, "random=-1 | no number of random circuits | give a whole number from 0"),
}
UNITS = {
    "attribution_patching": "unit 'head' | no such unit of GradDrop | choose one of: block, sublayer",
    "attribution_patching two_point": "unit 'head' | no such unit of GradDrop | choose one of: block, sublayer",
    "minimality": "unit 'head' | no such part of a circuit | ",
}
METHODS = {
    "edge_attribution": "method 'eap_igg' | no such method of edge attribution | did you mean 'eap_ig' or 'eap'?",
    "faithfulness": "a circuit by method 'eap_igg' | no such method | choose one of: greedy, top",
}


def wrong_names() -> list[Any]:
    """Every wrong name that some method takes."""
    found = []
    for name, case in CASES.items():
        takes = set(signature(case))
        asked = {key: entry for key, entry in NAMES.items() if key in takes}
        if "unit" in takes:
            asked["unit"] = ("head", UnknownNameError, UNITS[name])
        if "method" in takes:
            asked["method"] = ("eap_igg", UnknownNameError, METHODS[name])
        found += [pytest.param(case, key, *entry, id=f"{name}-{key}") for key, entry in asked.items()]
    return found


def signature(case: Case) -> list[str]:
    function = getattr(ma, case.method)
    return list(function.__annotations__)


@pytest.mark.parametrize(("case", "setting", "value", "kind", "text"), wrong_names())
def test_wrong_names_and_numbers(case: Case, setting: str, value: Any, kind: type, text: str) -> None:
    with pytest.raises(kind) as error:
        call(case, MODEL, TASK, **{setting: value})
    assert text in message(error)


@cases()
def test_prompts_of_a_pair_that_do_not_line_up(case: Case) -> None:
    longer = pairs_task(MODEL, (6, 6, 6))
    with pytest.raises(AlignmentError) as error:
        call(case, MODEL, replace(TASK, corrupt=longer.corrupt))
    assert "clean and corrupt prompts with different lengths" in message(error)


def test_circuits_that_the_graph_does_not_have() -> None:
    edges = scored(MODEL, Heads.of(MODEL))["edges"]
    for top in (edges.graph.n_edges + 1, 0, 2.0):
        with pytest.raises(SettingError) as error:
            edges.circuit(top)
        assert message(error) == f"a circuit of {top!r} edges | a graph of 46 edges | ask for 1 to 46"
    with pytest.raises(SettingError) as error:
        ma.faithfulness(MODEL, TASK, edges, sizes=(1.5,))
    assert message(error).startswith("sizes of circuits | 1.5 | give shares of all edges above 0 and up to 1")
    other = plain("llama_like")
    for method, given in ((ma.faithfulness, edges), (ma.minimality, edges.circuit(34))):
        with pytest.raises(MismatchError, match="use scores or a circuit of this model"):
            method(other, pairs_task(other), given)


# Numbers that are none


@cases()
def test_the_first_site_that_is_not_finite_is_named(case: Case) -> None:
    weights = dict(MODEL._weights)
    loud = weights["blocks.0.mlp.W_out"].clone()
    loud[0, 0] = math.inf
    with pytest.raises(NonFiniteError) as error:
        call(case, HookedPlain(MODEL.config, {**weights, "blocks.0.mlp.W_out": loud}), TASK)
    text = "a forward pass | NaN or infinity, first at blocks.0.hook_mlp_out (dtype torch.float64) | use a wider dtype"
    assert text in message(error)


NOT_FINITE = {
    "activation_patching": "the effect of a node at blocks.0.attn.hook_rot_k | it is nan, although the logits are",
    "attribution_patching": "the metric of the base run, on pair 0 | it is nan, although the logits are finite",
    "attribution_patching two_point": "the metric of the base run, on pair 0 | it is nan, although the logits are",
    "missed_effect_bound": "the effect of a set of nodes, on pair ",
    "ablation": "the effect of a node at blocks.0.attn.hook_rot_k | it is nan, although the logits are finite",
    "ablation resample": "the effect of a node at blocks.0.attn.hook_rot_k | it is nan, although the logits are finite",
    "causal_tracing": "the effect of a node at blocks.0.attn.hook_rot_k | it is nan, although the logits are finite",
    "path_patching": "the effect of a node at blocks.0.attn.hook_z | it is nan, although the logits are finite",
    "edge_attribution": "the metric of the base run, on pair 0 | it is nan, although the logits are finite",
    "edge_patching": "the effect of edge input -> a0.h0<q> | it is nan, although the logits are finite",
    "faithfulness": "the metric with edges cut, on pair 0 | it is nan, although the logits are finite",
    "minimality": "the metric with edges cut, on pair 0 | it is nan, although the logits are finite",
}


# Gradient methods keep finished blocks of an executor only (tests/unit/test_spread.py).
BLOCKS = ("attribution_patching", "edge_attribution")
SWEPT = {name: c for name, c in CASES.items() if "resume" in signature(c) and c.method not in BLOCKS}


@pytest.mark.parametrize("name", BLOCKS)
def test_resuming_without_blocks_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(SettingError) as error:
        call(CASES[name], MODEL, TASK, resume=tmp_path / "journal")
    assert message(error).endswith("| give an executor, such as 'inprocess', or leave resume out")
    assert not (tmp_path / "journal").exists()


@pytest.mark.parametrize("name", CASES)
def test_a_metric_that_is_not_finite_is_named(name: str, tmp_path: Path) -> None:
    """NaN in a result would say "not measured"."""
    task, case, journal = measured_by(lambda logits: logits[:, -1, 0] * math.nan), CASES[name], tmp_path / "journal"
    how = {"resume": journal} if name in SWEPT else {}
    with pytest.raises(NonFiniteError) as error:
        call(case, MODEL, task, **how)
    assert NOT_FINITE[name] in message(error)
    assert not how or b"nan" not in journal.read_bytes().lower()


@pytest.mark.parametrize(
    ("name", "site"),
    (
        ("attribution_patching", "estimates at blocks.1.attn.hook_rot_q"),
        ("edge_attribution", "edge scores at blocks.1.hook_resid_post"),
    ),
)
def test_a_gradient_that_is_not_finite_names_its_site(name: str, site: str) -> None:
    """The metric itself is finite: the square root of zero."""
    task = measured_by(lambda logits: (logits[:, -1, 0] - logits[:, -1, 0].detach()).sqrt())
    with pytest.raises(NonFiniteError) as error:
        call(CASES[name], MODEL, task)
    assert f"{site} | NaN or infinity in its gradient" in message(error)


def test_edges_name_the_metric_of_the_source_run() -> None:
    def nan_on_corrupt(logits: Tensor, batch: Any) -> Tensor:
        clean = bool((batch.tokens == TASK.clean.tokens).all())
        return logits[:, -1, 0] * (1.0 if clean else math.nan)

    task = replace(TASK, metric=replace(TASK.metric, function=nan_on_corrupt))
    with pytest.raises(NonFiniteError) as error:
        call(CASES["edge_attribution"], MODEL, task)
    assert "the metric of the source run, on pair 0 | it is nan, although the logits are finite" in message(error)


@cases(only=ESTIMATES | {"missed_effect_bound"})
@pytest.mark.parametrize(
    "function",
    (lambda x: x[:, -1, 0].detach(), lambda x: x[:, -1].argmax(-1), lambda x: torch.zeros(len(x))),
    ids=("detached", "argmax", "constant"),
)
def test_estimates_of_a_metric_without_a_gradient_are_refused(case: Case, function: Any) -> None:
    """Zeros would say that nothing matters."""
    with pytest.raises(SettingError) as error:
        call(case, MODEL, measured_by(function))
    assert message(error).startswith("the gradient of a metric | it does not follow from the logits by differentiable")
    assert message(error).endswith("use a differentiable metric, or a method without gradients")
    exact = ma.activation_patching(MODEL, measured_by(lambda x: x[:, -1, 0].detach()), sites="z")
    assert float(exact.scores["z"].values.max()) > 0


def test_a_site_that_the_metric_does_not_depend_on_scores_zero() -> None:
    """Of the last block only the last position reaches a metric of the last logits."""
    case, task = CASES["attribution_patching"], measured_by(lambda logits: logits[:, -1, 0])
    score = call(case, MODEL, task, sites="mlp_out").scores["mlp_out"].sel(layer=1).values
    assert bool((score[:-1] == 0).all()) and float(score[-1]) > 0


@cases(only=ESTIMATES)
def test_a_model_without_such_sites_says_which_it_has(case: Case) -> None:
    linear = plain("linear")  # its attention is fixed: there are no queries and keys
    if case.sites:
        with pytest.raises(UnknownSiteError) as error:
            call(case, linear, pairs_task(linear))
        assert message(error).startswith("site 'q' | this model has no such site; it has")
    else:
        frame = call(case, linear, pairs_task(linear)).to_pandas()
        unread = frame.target.str.contains("<q>|<k>")
        assert bool((frame.score[unread] == 0).all()) and float(frame.score[~unread].max()) > 0


# Journals

SMALL: dict[str, dict[str, Any]] = {"missed_effect_bound": {"budget": 600}}  # a journal has a line for 128 samples


class Interrupted:
    """A model whose run is interrupted after a number of runs."""

    def __init__(self, after: float, patch: pytest.MonkeyPatch) -> None:
        self.runs, run = 0, MODEL.run

        def counted(*arguments: Any, **settings: Any) -> Any:
            if self.runs >= after:
                raise KeyboardInterrupt
            self.runs += 1
            return run(*arguments, **settings)

        patch.setattr(MODEL, "run", counted)


@pytest.mark.parametrize("name", SWEPT)
def test_an_interrupted_run_goes_on_to_the_same_bits(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, journal = SWEPT[name], tmp_path / "journal"
    how: dict[str, Any] = {"batch_size": 8, **SMALL.get(name, {})}
    with monkeypatch.context() as patch:
        total = Interrupted(math.inf, patch)
        whole = call(case, MODEL, TASK, **how)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        Interrupted(total.runs * 2 // 3, patch)
        call(case, MODEL, TASK, resume=journal, **how)
    finished = journal.read_bytes().count(b"\n") - 1
    with monkeypatch.context() as patch:
        rest = Interrupted(math.inf, patch)
        again = call(case, MODEL, TASK, resume=journal, **how)
    assert 0 < finished < journal.read_bytes().count(b"\n") - 1
    assert rest.runs < total.runs
    assert_equal(tables(again), tables(whole), 0)
    assert again.settings == whole.settings and again.provenance == whole.provenance


@pytest.mark.parametrize("name", SWEPT)
def test_a_journal_of_another_run_is_refused(name: str, tmp_path: Path) -> None:
    case, journal = SWEPT[name], tmp_path / "journal"
    call(case, MODEL, TASK, resume=journal)
    before = journal.read_bytes()
    others: list[tuple[Case, Any, Task, dict[str, Any], str]] = [
        (case, MODEL, pairs_task(MODEL, seed=1), {}, "task"),
        (case, plain_model(MODEL.config, seed=1), TASK, {}, "weight_hash"),
        (case, MODEL, TASK, {"batch_size": 3}, "rows"),
    ]
    if "direction" in signature(case):
        others.append((case, MODEL, TASK, {"direction": "denoising"}, "direction"))
    others += [(other, MODEL, TASK, {}, "") for key, other in SWEPT.items() if key != name]
    for other, model, task, how, what in others:
        with pytest.raises(OutputExistsError) as error:
            call(other, model, task, resume=journal, **how)
        text = message(error)
        assert text.startswith("to resume from journal | it belongs to another sweep (different: ") and what in text
        assert text.endswith("choose another path, or delete the file")
    assert journal.read_bytes() == before
