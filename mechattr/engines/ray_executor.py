"""Blocks of work on a Ray cluster: an existing one, or one of this process that is shut down again.

The function (with its model and task) is put into the cluster's object store once; every worker process takes it from
there once. On one machine weights on the CPU are not copied: all workers read the same shared memory.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import socket
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from mechattr.engines.executors import Result, Results, Work, check_sizes, failed
from mechattr.errors import BackendError, ExecutorError, MechattrError, SettingError

_KNOCK = 10.0  # seconds to wait for a cluster's port
# Ray's own defaults are to report usage, and to hide accelerators from workers that ask for none.
_QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}


@dataclass(frozen=True, slots=True, kw_only=True)
class RayExecutor:
    """Tasks as Ray tasks.

    In a process that has called `ray.init` already, that cluster is used, whatever `address` says.

    Attributes:
        workers: how many blocks run at once, and the size of a cluster that is started; by default as many as fit.
        address: `None` starts a cluster of this process; `"auto"` is one on this machine; `"host:6379"` or
            `"ray://host:10001"` is one elsewhere.
        num_cpus: cores of a worker, and its threads of torch.
        num_gpus: accelerators of a worker. A model that is on a CUDA device is put on the worker's own.
        retries: how often a block is repeated that failed or whose worker died.
        pairs: prompt pairs of one block.
        nodes: nodes of one block; `None` for all of them.

    Raises:
        BackendError: Ray is not installed.
        SettingError: a number out of range.
    """

    name: ClassVar[str] = "ray"

    workers: int | None = None
    address: str | None = None
    num_cpus: int = 1
    num_gpus: float = 0
    retries: int = 2
    pairs: int = 8
    nodes: int | None = None

    def __post_init__(self) -> None:
        check_sizes(num_cpus=(self.num_cpus, 1), retries=(self.retries, 0), pairs=(self.pairs, 1))
        check_sizes(**{name: (n, 1) for name in ("workers", "nodes") if (n := getattr(self, name)) is not None})
        if self.address is not None and not isinstance(self.address, str):
            fix = "give 'auto', 'host:port' or None"
            raise SettingError(f"address={self.address!r}", f"a {type(self.address).__name__}", fix)
        if not isinstance(self.num_gpus, int | float) or not self.num_gpus >= 0:
            raise SettingError(
                f"an executor with num_gpus={self.num_gpus!r}", "no share of a GPU", "give 0, 0.5, 1, ..."
            )
        if importlib.util.find_spec("ray") is None:
            raise BackendError("executor 'ray'", "Ray is not installed", "pip install mechattr[ray]")

    @contextmanager
    def session(self) -> Iterator[None]:
        """A cluster to work on, for all calls inside; shut down again if it was started here, left if it was there.

        Raises:
            ExecutorError: nothing answers at `address`.
        """
        ray: Any = importlib.import_module("ray")
        if ray.is_initialized():
            yield
            return
        own: dict[str, Any] = {}
        if self.address is None:
            workers = self.workers or max(1, (os.cpu_count() or 1) // self.num_cpus)
            own = {"num_cpus": workers * self.num_cpus, "include_dashboard": False}
        else:
            _knock(self.address)
        before = {name: os.environ.get(name) for name in _QUIET}
        os.environ.update({name: value for name, value in _QUIET.items() if before[name] is None})
        try:
            ray.init(address=self.address or "local", log_to_driver=False, logging_level=logging.ERROR, **own)
        except (ConnectionError, TimeoutError, RuntimeError, ValueError) as error:
            raise _absent(self.address, f"{type(error).__name__}: {error}") from error
        finally:
            for name in (name for name, value in before.items() if value is None):
                del os.environ[name]
        try:
            yield
        finally:
            ray.shutdown()

    def map(self, function: Callable[[Work], Result], tasks: Sequence[Work]) -> Results[Result]:
        """(number of a task, its result), as they finish.

        Raises:
            ExecutorError: a task failed `retries` + 1 times, the function cannot travel, or there is no cluster with
                room for a worker.
            MechattrError: the function raised it.
        """
        ray: Any = importlib.import_module("ray")
        with self.session():
            seats = self._seats(ray)
            shared = _put(ray, function)
            call = ray.remote(num_cpus=self.num_cpus, num_gpus=self.num_gpus, max_retries=0)(_call)
            waiting = deque((i, 1) for i in range(len(tasks)))
            running: dict[Any, tuple[int, int]] = {}
            try:
                while waiting or running:
                    while waiting and len(running) < seats:
                        i, attempt = waiting.popleft()
                        # in a list: a bare reference would be resolved for each task anew
                        running[call.remote([shared], shared.hex(), self.num_cpus, tasks[i])] = (i, attempt)
                    done, _ = ray.wait(list(running), num_returns=1)
                    i, attempt = running.pop(done[0])
                    try:
                        result = ray.get(done[0])
                    except ray.exceptions.RayError as error:
                        cause = getattr(error, "cause", None) or error
                        if isinstance(cause, MechattrError):
                            raise cause from None
                        if attempt > self.retries:
                            raise failed(tasks[i], attempt, cause) from error
                        waiting.appendleft((i, attempt + 1))
                    else:
                        yield i, result
            finally:
                for reference in running:
                    ray.cancel(reference, force=True)

    def _seats(self, ray: Any) -> int:
        """How many workers run at once."""
        has = ray.cluster_resources()
        cpus, gpus = has.get("CPU", 0), has.get("GPU", 0)
        room = int(min(cpus / self.num_cpus, gpus / self.num_gpus if self.num_gpus else cpus))
        if not room:
            raise ExecutorError(
                f"workers of {self.num_cpus} CPUs and {self.num_gpus:g} GPUs",
                f"a cluster of {cpus:g} CPUs and {gpus:g} GPUs",
                "ask for less a worker, or add nodes to the cluster",
            )
        return min(room, self.workers or room)


def _knock(address: str) -> None:
    """Whether something answers at a cluster's port; Ray itself would wait for minutes, or end the process."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon:
        return
    try:
        socket.create_connection((host, int(port)), timeout=_KNOCK).close()
    except (OSError, ValueError) as error:
        raise _absent(address, f"{type(error).__name__}: {error}") from error


def _absent(address: str | None, found: str) -> ExecutorError:
    return ExecutorError(
        f"a Ray cluster at {address!r}" if address else "a Ray cluster of this process",
        found.splitlines()[0],
        "start one with `ray start --head` and give its address, or leave address out for one of this process",
    )


_LOADED: dict[str, Any] = {}  # of this worker process: the function that it took from the object store last


def _call(shared: list[Any], key: str, threads: int, task: Any) -> Any:
    """Runs one task in a worker."""
    if key not in _LOADED:
        _LOADED.clear()
        torch.set_num_threads(threads)
        _LOADED[key] = importlib.import_module("ray").get(shared[0])
    return _LOADED[key](task)


def _put(ray: Any, function: Any) -> Any:
    """Puts a function into the object store, its tensors as blocks of memory instead of as pickled copies.

    Raises:
        ExecutorError: something in it cannot be pickled, or its tensors lie on several devices.
    """
    places = set()

    def memory(tensor: Tensor) -> tuple[Any, ...]:
        places.add(tensor.device)
        return _memory(tensor)

    kinds = (Tensor, torch.nn.Parameter)
    for kind in kinds:
        ray.util.register_serializer(kind, serializer=memory, deserializer=_tensor)
    fix = "give a model of backend 'hf' or 'plain' on one device, or use executor='inprocess'"
    try:
        shared = ray.put(function)
    except Exception as error:  # whatever an object that does not travel raises
        text = str(error).strip().splitlines()
        raise ExecutorError(
            "to send a model to workers", f"{type(error).__name__}: {text[0] if text else 'no message'}", fix
        ) from error
    finally:
        for kind in kinds:
            ray.util.deregister_serializer(kind)
    devices = sorted(str(place) for place in places if place.type != "cpu")
    if len(devices) > 1:
        raise ExecutorError("to send a model to workers", f"tensors on {', '.join(devices)}", fix)
    return shared


def _memory(tensor: Tensor) -> tuple[Any, ...]:
    """The stretch of memory that a tensor's entries lie in, and how they lie there."""
    bare = tensor.detach()
    sizes, strides = tuple(bare.shape), bare.stride()
    length = 1 + sum((n - 1) * step for n, step in zip(sizes, strides, strict=True)) if bare.numel() else 0
    flat = bare.as_strided((length,), (1,)).cpu().view(torch.uint8).numpy()
    device = "cuda" if bare.is_cuda else "cpu"  # a worker sees its own device only
    return flat, bare.dtype, sizes, strides, device, tensor.requires_grad, isinstance(tensor, torch.nn.Parameter)


def _tensor(kept: tuple[Any, ...]) -> Tensor:
    """The tensor again, on memory that is read and never written."""
    flat, dtype, sizes, strides, device, requires_grad, is_parameter = kept
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # "not writable": weights are only read
        memory = torch.from_numpy(flat).view(dtype) if len(flat) else torch.empty(0, dtype=dtype)
    whole = memory.to(device).as_strided(sizes, strides)
    return torch.nn.Parameter(whole, requires_grad) if is_parameter else whole.requires_grad_(requires_grad)
