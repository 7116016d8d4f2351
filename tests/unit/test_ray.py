"""A real Ray cluster on this machine: two workers of one CPU."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from contract_cases import CASES, assert_equal, call, tables
from patching_cases import hf, pairs_task, plain

import mechattr as ma
from mechattr.engines import ray_executor
from mechattr.engines.executors import InProcess
from mechattr.engines.merge import Part
from mechattr.engines.ray_executor import RayExecutor
from mechattr.errors import ExecutorError, UnknownSiteError

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # each worker imports torch and transformers


@pytest.fixture(scope="module")
def ray() -> Any:
    """Imported when a test runs, not when tests are collected."""
    return importlib.import_module("ray")


def test_a_cluster_is_started_and_shut_down_again_and_gives_the_same_bits(ray: Any) -> None:
    for model in (plain("llama_like"), hf("gpt2")):
        task = pairs_task(model, (5,) * 5)
        executor = RayExecutor(workers=2, pairs=2)
        with executor.session():
            assert ray.cluster_resources()["CPU"] == 2
            for name in (
                "attribution_patching", "activation_patching", "edge_attribution",
                "faithfulness", "minimality", "missed_effect_bound",
            ):  # fmt: skip
                case = CASES[name]
                found = call(case, model, task, executor=executor)
                assert_equal(tables(found), tables(call(case, model, task, executor=InProcess(pairs=2))), 0)
                assert found.settings["executor"]["name"] == "ray"
        assert not ray.is_initialized()


@pytest.fixture(scope="module")
def cluster(ray: Any) -> Iterator[Any]:
    """A cluster that is there already."""
    environment = pytest.MonkeyPatch()
    environment.setenv("RAY_USAGE_STATS_ENABLED", "0")
    environment.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    yield ray
    ray.shutdown()
    environment.undo()


def dying(function: Any, marker: Path | None) -> Any:
    """The function, in a worker that is killed when it meets block 1: every time, or once."""

    def run(part: Any) -> Any:
        import os
        import signal

        if part.number == 1 and (marker is None or not marker.exists()):
            if marker is not None:
                marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return function(part)

    return run


class Killing:
    """A Ray executor whose workers die."""

    name, pairs, nodes = "killing", 2, None

    def __init__(self, marker: Path | None) -> None:
        self.ray, self.marker = RayExecutor(pairs=2, retries=1), marker

    def session(self) -> Any:
        return self.ray.session()

    def map(self, function: Any, tasks: Any) -> Any:
        return self.ray.map(dying(function, self.marker), tasks)


def test_a_worker_that_is_killed_in_the_middle_changes_nothing(cluster: Any, tmp_path: Path) -> None:
    model, marker = plain("gpt2_like"), tmp_path / "killed"
    task = pairs_task(model, (5,) * 6)
    found = ma.activation_patching(model, task, sites=("z", "mlp_out"), executor=Killing(marker))
    assert marker.exists()  # it was
    expected = ma.activation_patching(model, task, sites=("z", "mlp_out"), executor=InProcess(pairs=2))
    assert_equal(tables(found), tables(expected), 0)
    assert cluster.is_initialized()  # a cluster that was there stays


def test_a_worker_that_always_dies_is_named_and_what_is_finished_is_kept(cluster: Any, tmp_path: Path) -> None:
    model, journal = plain("gpt2_like"), tmp_path / "journal"
    task = pairs_task(model, (5,) * 6)
    text = r"block 1 \(pairs 2 to 3\)\n.*failed attempts: 2.*\n.*resume=PATH"
    with pytest.raises(ExecutorError, match=text) as caught:
        ma.attribution_patching(model, task, executor=Killing(None), resume=journal)
    assert "Died" in caught.value.found or "Crashed" in caught.value.found
    met: list[Part] = []

    class Counting(InProcess):
        def map(self, function: Any, tasks: Any) -> Any:
            met.extend(tasks)
            return super().map(function, tasks)

    found = ma.attribution_patching(model, task, executor=Counting(pairs=2), resume=journal)
    assert 1 in [part.number for part in met]
    assert_equal(tables(found), tables(ma.attribution_patching(model, task, executor=InProcess(pairs=2))), 0)


def test_errors_come_back_as_they_are_and_others_after_retries(cluster: Any) -> None:
    model = plain("gpt2_like")
    with pytest.raises(UnknownSiteError, match="did you mean"):
        ma.attribution_patching(model, pairs_task(model), sites="zz", executor=RayExecutor())

    def divide(x: int) -> float:
        return 1 / x

    with pytest.raises(ExecutorError, match=r"0\n.*failed attempts: 2, the last with ZeroDivisionError: division"):
        list(RayExecutor(retries=1).map(divide, [0]))
    assert dict(RayExecutor().map(divide, [1, 2, 4])) == {0: 1.0, 1: 0.5, 2: 0.25}


def test_weights_are_shared_and_tied_ones_stay_tied(cluster: Any) -> None:
    shared = torch.nn.Parameter(torch.randn(300, 400, dtype=torch.bfloat16), requires_grad=False)
    kept = [shared, shared, shared.detach().T, torch.arange(10)]

    def look(i: int) -> tuple[Any, ...]:
        first, second = kept[0], kept[1]
        tensor = kept[i]
        return first is second, tensor.stride(), tensor.dtype, float(tensor.float().sum())

    for i, found in RayExecutor().map(look, range(4)):
        assert found == (True, kept[i].stride(), kept[i].dtype, float(kept[i].float().sum()))


def test_a_model_of_every_family_gives_the_same_bits_after_the_journey(cluster: Any) -> None:
    for family in families.FAMILIES:
        model = families.hooked(family)
        batch = families.ragged_of(family)
        arrived = cluster.get(ray_executor._put(cluster, model))
        assert arrived.fingerprint() == model.fingerprint(), family
        assert torch.equal(arrived.run(batch).logits, model.run(batch).logits), family


def test_a_worker_that_fits_nowhere_is_refused(cluster: Any) -> None:
    with pytest.raises(ExecutorError, match=r"workers of 64 CPUs and 0 GPUs\n.*cluster of 2 CPUs.*\n.*less a worker"):
        list(RayExecutor(num_cpus=64).map(str, [1]))


def test_a_cluster_that_is_not_there_is_refused(ray: Any) -> None:
    if ray.is_initialized():
        ray.shutdown()
    for address in ("auto", "127.0.0.1:1"):
        with pytest.raises(ExecutorError, match=rf"cluster at '{address}'\n.*Error.*\n.*`ray start --head`"):
            list(RayExecutor(address=address).map(str, [1]))
