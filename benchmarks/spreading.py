"""`python -m benchmarks.spreading`: what two workers of a local Ray cluster gain over one process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

import mechattr as ma
from mechattr.engines.executors import InProcess
from mechattr.engines.ray_executor import RayExecutor

ROUNDS = 5


def seconds(call: Callable[[], Any]) -> float:
    """How long a call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    """Exact patching of 64 pairs of the bundled model in 8 blocks, both executors in turn."""
    torch.set_num_threads(1)
    model = ma.load("tiny")
    task = ma.tasks.ioi(model, n=64, seed=0)
    here, there = InProcess(pairs=8), RayExecutor(workers=2, pairs=8)

    def patch(executor: Any) -> Callable[[], Any]:
        return lambda: ma.activation_patching(model, task, sites=("z", "mlp_out"), executor=executor, progress=False)

    start = time.perf_counter()
    with there.session():
        print(f"cluster up after {time.perf_counter() - start:.1f} s")
        print(f"first call, in which workers import torch: {seconds(patch(there)):.1f} s")
        ratios = [seconds(patch(here)) / seconds(patch(there)) for _ in range(ROUNDS)]
    print(f"one process / two workers: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
