"""AtP* for every node beside the exhaustive exact sweep, and the memory of AtP."""

from __future__ import annotations

import os
from pathlib import Path

import torch

import mechattr as ma
from benchmarks.attribution import setting
from benchmarks.measure import Ratio, interleaved, ratio
from mechattr.engines.memory import peak

SHARED = Path(os.environ.get("MECHATTR_TEST_DATA", Path(__file__).resolve().parents[2] / "shared"))


def measure(rounds: int) -> list[Ratio]:
    """q, k, v, z and every neuron of stories260K at every position, eight pairs; nothing where the model is missing."""
    folder = SHARED / "models" / "stories260K"
    if not folder.exists():
        return []
    model = ma.load(folder)
    texts = ["Once upon a time there was a little girl who had a red ball and a dog in the park"] * 8
    task = ma.tasks.resampled(model, texts, n=8, seed=0)

    def star() -> object:
        return ma.attribution_patching(model, task, variant="star", progress=False)

    def exhaustive() -> object:
        return ma.activation_patching(model, task, progress=False)

    taken = interleaved({"exhaustive": exhaustive, "star": star}, rounds, warmup=1)
    nodes = len(star().nodes())  # type: ignore[attr-defined]
    name = f"stories260K: exhaustive sweep / AtP*, {nodes:,} nodes, {len(task)} pairs"
    return [ratio(name, taken["exhaustive"], taken["star"], target=50.0, at_most=False)]


def memory() -> list[Ratio]:
    """Peak of allocated memory on shape M: AtP over one forward-backward pass and one cache of the corrupt prompt."""
    hooked, task, bare = setting("M")
    names = [name for name in hooked.sites() if name.endswith(("rot_q", "rot_k", "hook_v", "hook_z", "mlp.hook_post"))]
    cache = sum(x.values.nbytes for x in hooked.run(task.corrupt, record=names).activations.tensors.values())
    floor = peak(bare.gradients) + cache
    used = peak(lambda: ma.attribution_patching(hooked, task, variant="atp", progress=False))
    return [
        Ratio(
            name="M: peak memory of AtP / (one forward-backward pass + one cache)",
            value=used / floor,
            low=used / floor,
            high=used / floor,
            target=1.2,
            at_most=True,
            seconds=(used / 2**20, floor / 2**20),
        )
    ]


if __name__ == "__main__":
    torch.set_num_threads(2)
    print(memory())
