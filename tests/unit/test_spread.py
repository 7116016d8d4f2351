"""Methods spread over executors: blocks are put together to what one call gives, failures are repeated, killed runs go
on."""

from __future__ import annotations

import copy
import importlib.util
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from contract_cases import CASES, assert_equal, call, tables, verified
from patching_cases import hf, pairs_task, plain
from torch import Tensor

import mechattr as ma
from mechattr.engines import ray_executor
from mechattr.engines.executors import Executor, InProcess, executor_of
from mechattr.engines.merge import Part, merged
from mechattr.engines.packed import packed, unpacked
from mechattr.engines.ray_executor import RayExecutor
from mechattr.engines.spread import Work
from mechattr.errors import (
    BackendError,
    ExecutorError,
    MismatchError,
    OutputExistsError,
    SettingError,
    UnknownNameError,
)
from mechattr.methods import METHODS
from mechattr.tasks.block import Block

SPREAD = {
    "ablation",
    "activation_patching",
    "attribution_patching",
    "causal_tracing",
    "edge_attribution",
    "edge_patching",
    "faithfulness",
    "minimality",
    "missed_effect_bound",
    "path_patching",
}
ROUNDING = 1e-12  # float64: blocks add the same numbers in another order
SPREAD_CASES = {name: case for name, case in CASES.items() if case.method in SPREAD}
EVERY = pytest.mark.parametrize("case", SPREAD_CASES.values(), ids=SPREAD_CASES)


@dataclass(frozen=True)
class Wrapped(InProcess):
    """Runs another function than it is given, and returns the results of later blocks first."""

    wrap: Callable[[Any], Any] = lambda function: function
    name: ClassVar[str] = "wrapped"

    def map(self, function: Any, tasks: Sequence[Any]) -> Any:
        yield from reversed(list(super().map(self.wrap(function), tasks)))


class FirstFails:
    """Fails the first time that it meets each block."""

    def __init__(self, function: Any) -> None:
        self.function, self.met = function, list[Part]()

    def __call__(self, part: Part) -> Any:
        self.met.append(part)
        if self.met.count(part) == 1:
            raise RuntimeError("a worker died")
        return self.function(part)


class Stop(BaseException):
    """Ends a run as a signal would."""


def test_every_method_that_is_put_together_from_pairs_takes_an_executor() -> None:
    taking = set()
    for name in METHODS:
        keywords = inspect.signature(getattr(ma, name)).parameters
        taking |= {name} if "executor" in keywords else set()
    assert taking == SPREAD
    pairs = {name: row for name, row in METHODS.items() if row.takes == "pairs"}
    means = {name for name, row in pairs.items() if "batch_independent" in row.promises}
    # ablation and the bound depend on other pairs through references and samples, which are those of the whole task
    assert taking == means | {"ablation", "missed_effect_bound"}


@pytest.mark.parametrize("lengths", ((5,) * 5, (5, 6, 5, 7, 6)), ids=("aligned", "ragged"))
@EVERY
def test_blocks_of_unequal_size_give_what_one_call_gives(case: Any, lengths: tuple[int, ...]) -> None:
    if not case.ragged:
        lengths = (5,) * 5
    model = plain("llama_like")
    task = pairs_task(model, lengths)
    named = {"positions": "named"} if case.inputs is verified and lengths != (5,) * 5 else {}
    whole = call(case, model, task, **named)
    cut = call(case, model, task, **named, executor=InProcess(pairs=2, nodes=7))
    assert_equal(tables(cut), tables(whole), ROUNDING)
    assert [table.coords for table in cut.tensors.values()] == [table.coords for table in whole.tensors.values()]
    assert cut.provenance == whole.provenance
    said = cut.settings["executor"]
    assert said["name"] == "inprocess" and said["pairs"] == 2 and said["blocks"] >= 3
    assert said["nodes"] == (7 if case.method in ("activation_patching", "ablation") else None)
    rounded = {"clean_metric", "corrupt_metric", "noised_metric", "completeness", "passes"}
    rounded |= {"faithfulness", "gap", "whole", "empty"}
    exact = cut.settings.keys() - rounded - {"executor"}
    assert cut.settings.keys() - {"executor"} == whole.settings.keys()
    assert {name: cut.settings[name] for name in exact} == {name: whole.settings[name] for name in exact}
    for name in rounded & whole.settings.keys() - {"passes"}:
        expected = whole.settings[name]
        close = expected if expected is None else pytest.approx(expected, abs=ROUNDING, rel=ROUNDING)
        assert cut.settings[name] == close, name


@EVERY
def test_without_node_blocks_the_passes_are_those_of_one_call(case: Any) -> None:
    model = plain("gpt2_like")
    task = pairs_task(model)
    whole, cut = call(case, model, task), call(case, model, task, executor=InProcess(pairs=2))
    extra = 3.0 if case.settings.get("kind", "mean") == "mean" and case.method == "ablation" else 0.0
    # the second block runs the three reference prompts again; the bound runs both prompts again for its one look
    extra = 6.0 if case.method == "missed_effect_bound" else extra
    assert cut.settings["passes"]["forward"] == pytest.approx(whole.settings["passes"]["forward"] + extra)
    assert cut.settings["passes"]["backward"] == whole.settings["passes"]["backward"]


def test_chosen_nodes_are_cut_too_and_the_rest_stays_unmeasured() -> None:
    model = plain("gpt2_like")
    task = pairs_task(model, (5, 6, 7))
    nodes = ma.attribution_patching(model, task, sites=("q", "mlp_out")).top(9)
    whole = ma.activation_patching(model, task, nodes=nodes)
    cut = ma.activation_patching(model, task, nodes=nodes, executor=InProcess(pairs=2, nodes=4))
    assert_equal(tables(cut), tables(whole), ROUNDING)
    assert cut.nodes() == whole.nodes() and cut.top(9) == whole.top(9)


def test_a_site_that_is_one_node_is_put_together_too() -> None:
    model = plain("gpt2_like")
    task = pairs_task(model, (5, 6, 7))
    for method in (ma.attribution_patching, ma.activation_patching, ma.ablation):
        given: dict[str, Any] = {"sites": ("embed", "z"), "positions": "all"}
        whole, cut = method(model, task, **given), method(model, task, **given, executor=InProcess(pairs=2))
        assert cut.scores["embed"].axes == () and whole.value(ma.Node("embed", None)) > 0
        assert_equal(tables(cut), tables(whole), ROUNDING)


def blocks(model: Any, task: Any, sizes: Sequence[int], **settings: Any) -> list[tuple[Part, Any]]:
    """The results of blocks of given sizes."""
    work, found, start = Work(ma.attribution_patching, model, task, settings), [], 0
    for number, size in enumerate(sizes):
        part = Part(number, range(start, start + size))
        found.append((part, unpacked(work(part))))
        start += size
    return found


def test_the_check_rejects_an_unweighted_mean_a_block_that_is_missing_and_one_that_counts_twice() -> None:
    model = plain("gpt2_like")
    task = pairs_task(model, (5,) * 5)
    whole = ma.attribution_patching(model, task)
    found = blocks(model, task, (2, 2, 1))
    assert_equal(tables(merged(task, found, model.fingerprint())), tables(whole), ROUNDING)
    unweighted = {name: torch.stack([tables(r)[name] for _, r in found]).mean(0) for name in whole.tensors}
    with pytest.raises(AssertionError):
        assert_equal(unweighted, tables(whole), ROUNDING)
    for wrong, pairs in ((found[:2], 4), ([*found, found[0]], 7)):
        with pytest.raises(MismatchError, match=rf"of a task of 5 pairs\n.*on {pairs} to {pairs} pairs\n.*block once"):
            merged(task, wrong, model.fingerprint())


def test_the_check_rejects_a_mean_of_ratios_and_means_of_a_block_alone() -> None:
    model, case = plain("gpt2_like"), CASES["faithfulness"]
    task = pairs_task(model, (5, 6, 5, 7, 6))
    for ablation in ("resample", "mean"):
        whole = tables(call(case, model, task, ablation=ablation))
        found = call(case, model, task, ablation=ablation, executor=InProcess(pairs=2))
        assert_equal(tables(found), whole, ROUNDING)
        sizes, rows = (2, 2, 1), ([0, 1], [2, 3], [4])
        parts = [tables(call(case, model, Block.of(task, index), ablation=ablation)) for index in rows]
        mean_of_ratios = sum(n * part["faithfulness"] for n, part in zip(sizes, parts, strict=True)) / len(task)
        with pytest.raises(AssertionError):
            torch.testing.assert_close(mean_of_ratios, whole["faithfulness"], rtol=0, atol=ROUNDING)
    alone = torch.cat([tables(call(case, model, task.rows(index), ablation="mean"))["metric"] for index in rows], -1)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(alone, whole["metric"], rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("per_pair", (False, True))
def test_a_bound_in_blocks_draws_the_samples_of_one_call_and_stops_at_the_same_look(per_pair: bool) -> None:
    model = plain("gpt2_like")
    task = pairs_task(model, (5,) * 5)
    chosen: dict[str, Any] = {"verified": [], "sites": ("z", "mlp_out"), "positions": "all", "p": 0.2, "seed": 3}
    chosen |= {"budget": 1600 if per_pair else 900, "per_pair": per_pair}
    loose = 1.01 * ma.missed_effect_bound(model, task, **chosen).theta  # so that an earlier look will do
    for target in (None, 2 * loose):
        whole = ma.missed_effect_bound(model, task, **chosen, target=target)
        cut = ma.missed_effect_bound(model, task, **chosen, target=target, executor=InProcess(pairs=2))
        assert_equal(tables(cut), tables(whole), ROUNDING)
        assert cut.settings["samples"] == whole.settings["samples"] and cut.settings["looks_taken"] == 1
        more = cut.passes.forward - whole.passes.forward
        assert more == 10 and cut.passes.backward == whole.passes.backward == 5
    # wrong: each block a bound of its own, with samples of its own
    found = [ma.missed_effect_bound(model, Block.of(task, index), **chosen) for index in ([0, 1], [2, 3], [4])]
    own = {name: torch.stack([tables(each)[name] for each in found]).mean(0) for name in whole.tensors}
    with pytest.raises(AssertionError):
        assert_equal(own, tables(whole), ROUNDING)


def test_a_bound_in_blocks_may_have_nothing_left_to_cover() -> None:
    model = plain("gpt2_like")
    task = pairs_task(model, (5,) * 3)
    exact = ma.activation_patching(model, task, sites="mlp_out", positions="all")
    found = [
        ma.missed_effect_bound(model, task, verified=exact, sites="mlp_out", **more)
        for more in ({}, {"executor": InProcess(pairs=2)})
    ]
    assert [bound.theta for bound in found] == [0.0, 0.0] and found[1].n_covered == 0


@pytest.mark.parametrize("name", ("faithfulness", "minimality", "missed_effect_bound"))
def test_results_put_together_from_pairs_survive_failures_and_being_killed(name: str, tmp_path: Path) -> None:
    seen: list[int] = []

    @dataclass(frozen=True)
    class Stopping(InProcess):
        name: ClassVar[str] = "stopping"
        left: int = 99

        def map(self, function: Any, tasks: Any) -> Any:
            for i, result in super().map(function, tasks):
                if len(seen) == self.left:
                    raise Stop
                seen.append(tasks[i].number)
                yield i, result

    model, case, path = plain("gpt2_like"), CASES[name], tmp_path / "journal"
    task = pairs_task(model, (5,) * 5)
    sound = call(case, model, task, executor=InProcess(pairs=2))
    flaky = call(case, model, task, executor=Wrapped(pairs=2, wrap=FirstFails))
    assert_equal(tables(flaky), tables(sound), 0)
    assert {**flaky.settings, "executor": 0} == {**sound.settings, "executor": 0}
    stages = 2 if name == "missed_effect_bound" else 1  # its prompts, then its samples
    with pytest.raises(Stop):
        call(case, model, task, executor=Stopping(pairs=2, left=3 * stages - 1), resume=path)
    path.write_bytes(path.read_bytes() + b'{"chunk": 2, "val')  # it was killed while it wrote
    found = call(case, model, task, executor=Stopping(pairs=2), resume=path)
    assert sorted(seen) == list(range(3 * stages))  # each block once
    assert_equal(tables(found), tables(sound), 0)
    with pytest.raises(OutputExistsError, match=r"another sweep \(different: block\)"):
        call(case, model, task, executor=InProcess(pairs=3), resume=path)
    with pytest.raises(OutputExistsError, match=r"another sweep \(different: "):
        call(case, model, task, resume=path)  # a journal of blocks is none of a run without them

    def stale(function: Any) -> Any:
        return lambda part: {**(got := function(part)), "made": {**got["made"], "versions": {"torch": "1.0"}}}

    with pytest.raises(MismatchError, match=r"put block 0 \(pairs 0 to 1\) to the others\n.*another versions\n"):
        call(case, model, task, executor=Wrapped(pairs=2, wrap=stale))


def test_nodes_that_never_change_are_counted_over_blocks_and_not_in_each() -> None:
    model = plain("gpt2_like")
    task = pairs_task(model, (5,) * 4, changed=(1,))
    other = pairs_task(model, (5,) * 4, changed=(3,), seed=1)
    rows = [(a if i < 2 else b) for i, (a, b) in enumerate(zip(_pairs(task), _pairs(other), strict=True))]
    mixed = ma.tasks.from_pairs(model, rows)
    whole = ma.attribution_patching(model, mixed)
    cut = ma.attribution_patching(model, mixed, executor=InProcess(pairs=2))
    assert cut.settings["n_trivial_zero"] == whole.settings["n_trivial_zero"]
    counts = [result.settings["n_trivial_zero"] for _, result in blocks(model, mixed, (2, 2))]
    assert min(counts) > whole.settings["n_trivial_zero"]  # neither the least nor the sum of counts would do


def _pairs(task: Any) -> list[dict[str, Any]]:
    return [
        {"clean_tokens": clean, "corrupt_tokens": corrupt, "answer": answer, "foil": foil, "spans": {"A": [1, 3]}}
        for clean, corrupt, answer, foil in zip(
            *(x.tolist() for x in (task.clean.tokens, task.corrupt.tokens, task.answers, task.foils)), strict=True
        )
    ]


def test_blocks_that_failed_once_give_the_same_bits_in_any_order() -> None:
    model = plain("gpt2_like")
    task = pairs_task(model, (5,) * 5)
    for method in (ma.attribution_patching, ma.activation_patching):
        sound = method(model, task, sites="z", executor=InProcess(pairs=2))
        flaky = method(model, task, sites="z", executor=Wrapped(pairs=2, wrap=FirstFails))
        assert_equal(tables(flaky), tables(sound), 0)
        assert {**flaky.settings, "executor": 0} == {**sound.settings, "executor": 0}


def test_a_block_that_always_fails_is_named_with_its_cause() -> None:
    def broken(function: Any) -> Any:
        def run(part: Part) -> Any:
            if part.number == 1:
                raise RuntimeError("first line\nno space left")
            return function(part)

        return run

    model = plain("gpt2_like")
    task = pairs_task(model, (5,) * 4)
    with pytest.raises(ExecutorError) as caught:
        ma.attribution_patching(model, task, executor=Wrapped(pairs=2, wrap=broken))
    assert caught.value.asked == "block 1 (pairs 2 to 3)"
    assert caught.value.found == "failed attempts: 3, the last with RuntimeError: no space left"
    assert "resume=PATH" in caught.value.fix and isinstance(caught.value.__cause__, RuntimeError)
    with pytest.raises(ExecutorError, match=r"block 1 \(pairs 2 to 3, nodes 0 to 3\)\n.*failed attempts: 1,"):
        executor = Wrapped(
            pairs=2, nodes=7, retries=0, wrap=lambda f: lambda part: f(part) if part.number < 1 else 1 / 0
        )
        ma.activation_patching(model, task, sites="z", positions="all", executor=replace(executor, nodes=7))
    assert str(Part(3, range(7, 8), range(2, 3))) == "block 3 (pairs 7, nodes 2)"


def test_errors_of_mechattr_are_raised_at_once() -> None:
    met = []

    def count(function: Any) -> Any:
        return lambda part: (met.append(part), function(part))[1]

    model = plain("gpt2_like")
    with pytest.raises(ma.errors.UnknownSiteError, match="did you mean"):
        ma.attribution_patching(model, pairs_task(model), sites="zz", executor=Wrapped(wrap=count))
    assert len(met) == 1


@pytest.mark.parametrize("method", (ma.attribution_patching, ma.activation_patching, ma.edge_attribution))
def test_a_killed_run_goes_on_from_its_journal_with_the_same_bits(method: Any, tmp_path: Path) -> None:
    seen: list[int] = []

    @dataclass(frozen=True)
    class Stopping(InProcess):
        name: ClassVar[str] = "stopping"
        last: int = 99

        def map(self, function: Any, tasks: Any) -> Any:
            for i, result in super().map(function, tasks):
                if tasks[i].number == self.last:
                    raise Stop
                seen.append(tasks[i].number)
                yield i, result

    model, path = plain("gpt2_like"), tmp_path / "journal"
    task = pairs_task(model, (5,) * 7)
    settings: dict[str, Any] = {} if method is ma.edge_attribution else {"sites": ("z", "mlp_out")}
    expected = method(model, task, **settings, executor=InProcess(pairs=2))
    with pytest.raises(Stop):
        method(model, task, **settings, executor=Stopping(pairs=2, last=2), resume=path)
    assert seen == [0, 1]
    path.write_bytes(path.read_bytes() + b'{"chunk": 2, "val')  # it was killed while it wrote
    found = method(model, task, **settings, executor=Stopping(pairs=2), resume=path)
    assert seen == [0, 1, 2, 3]
    assert_equal(tables(found), tables(expected), 0)
    again = method(model, task, **settings, executor=InProcess(pairs=2), resume=path)  # another executor may go on
    assert seen == [0, 1, 2, 3]
    assert_equal(tables(again), tables(expected), 0)
    for different, changed in (
        ("block", {"executor": InProcess(pairs=3)}),
        ("direction", {"direction": "denoising"}),
    ):
        with pytest.raises(OutputExistsError, match=rf"another sweep \(different: {different}\)"):
            method(model, task, **{**settings, "executor": InProcess(pairs=2), "resume": path, **changed})
    with pytest.raises(OutputExistsError, match=r"different: task\)"):
        method(model, pairs_task(model, (5,) * 7, seed=1), **settings, executor=InProcess(pairs=2), resume=path)


def test_blocks_of_another_model_or_another_version_are_refused() -> None:
    def tampered(name: str, value: object) -> Any:
        def wrap(function: Any) -> Any:
            def run(part: Part) -> Any:
                result = function(part)
                return {**result, "provenance": {**result["provenance"], name: value}} if part.number else result

            return run

        return wrap

    model = plain("gpt2_like")
    task = pairs_task(model)
    for name, value in (("weight_hash", "0" * 64), ("versions", {"torch": "1.0"})):
        with pytest.raises(MismatchError, match=rf"put block 1 .*\n.*another {name}\n.*same versions"):
            ma.attribution_patching(model, task, executor=Wrapped(pairs=2, wrap=tampered(name, value)))


def test_blocks_that_say_different_things_are_refused() -> None:
    model = plain("gpt2_like")
    task = pairs_task(model, (5,) * 4)
    first, second = blocks(model, task, (2, 2), variant="atp")[0], blocks(model, task, (2, 2), variant="qk")[1]
    with pytest.raises(MismatchError, match=r"put 2 blocks together\n.*different 'variant'"):
        merged(task, [first, second], model.fingerprint())


def test_a_block_has_the_places_of_the_whole_task() -> None:
    model = plain("gpt2_like")
    task = pairs_task(model, (5, 5, 6, 6))
    task = replace(task, spans=tuple({**s, "C": (0, 1)} if i < 2 else s for i, s in enumerate(task.spans)))
    block = Block.of(task, range(2))
    assert task.rows([0, 1]).aligned and not block.aligned
    assert "C" in task.rows([0, 1]).positions("named") and list(block.positions("named")) == list(
        task.positions("named")
    )
    assert block.rows([1]).index == (1,) and block.rows([1]).whole is task
    whole, cut = (ma.attribution_patching(model, task, **more) for more in ({}, {"executor": InProcess(pairs=2)}))
    assert cut.settings["positions"] == whole.settings["positions"] == "named"
    assert_equal(tables(cut), tables(whole), ROUNDING)


def test_a_result_survives_packing() -> None:
    model = plain("gpt2_like")
    for result in (
        ma.activation_patching(model, pairs_task(model), nodes=[ma.Node("z", 0, 2, head=1)]),
        ma.edge_attribution(model, pairs_task(model), steps=2),
    ):
        again = unpacked(packed(result))
        assert type(again) is type(result)
        assert again.settings == result.settings and again.provenance == result.provenance
        assert_equal(tables(again), tables(result), 0)
    empty = ma.Attribution({"score/z": ma.Labelled(torch.zeros(0, 2, dtype=torch.bfloat16), ("layer", "head"))})
    assert unpacked(packed(empty)).tensors["score/z"].values.shape == (0, 2)
    assert unpacked(packed(empty)).tensors["score/z"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("given", "error", "text"),
    (
        ("rya", UnknownNameError, "executor 'rya'\n.*\n.*did you mean 'ray'"),
        (3, SettingError, r"executor=3\n.*a int\n.*InProcess\(\) or RayExecutor\(\)"),
        (InProcess, SettingError, r"executor=<class .*InProcess'>\n.*the class InProcess\n.*InProcess\(\)"),
    ),
)
def test_executors_that_are_none_are_refused(given: Any, error: type[Exception], text: str) -> None:
    model = plain("gpt2_like")
    with pytest.raises(error, match=text):
        ma.attribution_patching(model, pairs_task(model), executor=given)


@pytest.mark.parametrize(
    ("kind", "name", "value", "least"),
    (
        (InProcess, "pairs", 0, 1),
        (InProcess, "pairs", None, 1),
        (RayExecutor, "num_cpus", None, 1),
        (InProcess, "retries", True, 0),
        (RayExecutor, "workers", 0, 1),
        (RayExecutor, "nodes", 1.5, 1),
    ),
)
def test_numbers_that_are_no_counts_are_refused(kind: Any, name: str, value: Any, least: int) -> None:
    with pytest.raises(SettingError, match=f"executor with {name}={value}\n.*no count\n.*whole number from {least}"):
        kind(**{name: value})
    with pytest.raises(SettingError, match=r"num_gpus=-1\n.*no share of a GPU"):
        RayExecutor(num_gpus=-1)
    with pytest.raises(SettingError, match=r"address=6379\n.*a int\n.*'auto', 'host:port' or None"):
        RayExecutor(address=6379)  # type: ignore[arg-type]


def test_a_journal_that_is_no_path_is_refused() -> None:
    model = plain("gpt2_like")
    with pytest.raises(SettingError, match="resume=7\n  found: a int, no path\n  fix: give the path of a file"):
        ma.attribution_patching(model, pairs_task(model), executor="inprocess", resume=7)  # type: ignore[arg-type]


def test_what_cannot_be_spread_is_refused() -> None:
    model = plain("gpt2_like")
    task = pairs_task(model)
    recorded = model.run(task.corrupt, record=model.sites()).activations
    with pytest.raises(SettingError, match=r"a recorded source with an executor\n.*not cut\n.*leave out the source"):
        ma.activation_patching(model, task, source=recorded, executor="inprocess")
    for method in (ma.attribution_patching, ma.edge_attribution):
        with pytest.raises(SettingError, match=r"resume='journal'\n.*no executor.*\n.*give an executor"):
            method(model, task, resume=Path("journal"))


def test_without_ray_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(executor_of("inprocess"), InProcess) and isinstance(InProcess(), Executor)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BackendError, match=r"executor 'ray'\n.*not installed\n.*pip install mechattr\[ray\]"):
        executor_of("ray")


def test_an_address_where_nothing_listens_is_an_error_at_once() -> None:
    for address in ("127.0.0.1:1", "ray://127.0.0.1:1", "127.0.0.1:port"):
        with pytest.raises(ExecutorError, match=rf"cluster at '{address}'\n.*Error.*\n.*`ray start --head`"):
            ray_executor._knock(address)
    ray_executor._knock("auto")  # Ray knows where this is


def test_ray_is_imported_when_a_cluster_is_needed_and_not_before() -> None:
    RayExecutor()
    assert "ray" not in vars(ray_executor)


class Store:
    """Stands in for Ray's object store."""

    def __init__(self) -> None:
        self.util, self.serializers = self, dict[Any, Any]()

    def register_serializer(self, kind: Any, *, serializer: Any, deserializer: Any) -> None:
        self.serializers[kind] = serializer

    def deregister_serializer(self, kind: Any) -> None:
        del self.serializers[kind]

    def put(self, value: Any) -> str:
        if isinstance(value, str):
            raise TypeError(value)
        for tensor in value:
            self.serializers[Tensor](tensor)
        return "reference"


def test_what_cannot_travel_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store()
    assert ray_executor._put(store, [torch.zeros(2)]) == "reference"
    with pytest.raises(ExecutorError, match=r"send a model to workers\n.*TypeError: cannot pickle a\n.*on one device"):
        ray_executor._put(store, "cannot pickle a\nlock")
    with pytest.raises(ExecutorError, match=r"send a model.*\n.*NotImplementedError"):
        ray_executor._put(store, [torch.zeros(2, device="meta")])  # as weights that are kept on disk
    monkeypatch.setattr(ray_executor, "_memory", lambda tensor: ())
    other = [SimpleNamespace(device=torch.device("cuda", i)) for i in (1, 0)]
    with pytest.raises(ExecutorError, match=r"send a model.*\n.*tensors on cuda:0, cuda:1\n"):
        ray_executor._put(store, other)
    assert not store.serializers  # nothing stays behind


def test_tensors_travel_with_their_layout_and_dtype() -> None:
    base = torch.randn(4, 6, dtype=torch.float64)
    cases = (
        base,
        base.T,
        base[1:, ::2],
        base[0].expand(3, 6),
        base.bfloat16(),
        torch.zeros(0, 3),
        torch.tensor(3),
        torch.tensor([True, False]),
        torch.nn.Parameter(base.float()),
        torch.nn.Parameter(base, requires_grad=False),
        base.clone().requires_grad_(),
    )
    for tensor in cases:
        found = ray_executor._tensor(ray_executor._memory(tensor))
        assert type(found) is type(tensor) and found.requires_grad == tensor.requires_grad
        assert found.dtype == tensor.dtype and found.stride() == tensor.stride() and torch.equal(found, tensor)


def test_a_transformers_model_travels_without_what_belongs_to_its_process() -> None:
    model = hf("gpt2")
    other = copy.deepcopy(model)  # through the same methods as a journey to another process
    batch = pairs_task(model).clean
    assert other._turns is not model._turns and other.fingerprint() == model.fingerprint()
    assert torch.equal(other.run(batch).logits, model.run(batch).logits)


def test_a_report_made_in_blocks_says_so_and_has_the_same_numbers(tmp_path: Path) -> None:
    model = plain("gpt2_like")
    task = pairs_task(model, (5,) * 3)
    chosen: dict[str, Any] = {"sites": ("z", "mlp_out"), "top": 4, "bound": 60, "circuit": 5, "progress": False}
    done = ma.report.localise(model, task, out=tmp_path / "run", **chosen, executor=InProcess(pairs=2))
    edges = ma.edge_attribution(model, task)
    assert_equal(tables(done.results.edges), tables(edges), ROUNDING)
    assert_equal(tables(done.exact), tables(ma.activation_patching(model, task, nodes=done.exact.nodes())), ROUNDING)
    chance = ma.missed_effect_bound(model, task, verified=done.exact, sites=chosen["sites"], budget=60)
    assert_equal(tables(done.results.bound), tables(chance), ROUNDING)
    tested = ma.faithfulness(model, task, done.results.edges)
    assert_equal(tables(done.results.faithfulness), tables(tested), ROUNDING)
    page = done.report_path.read_text()
    assert "executor inprocess, 2 blocks of up to 2 pairs" in page and "--executor inprocess" in page
    assert not [path for path in (tmp_path / "run").iterdir() if path.suffix in (".blocks", ".partial")]
