"""What attribution patching costs over its floor: two forward passes and one backward pass of the bare model."""

from __future__ import annotations

import torch

import mechattr as ma
from benchmarks import models
from benchmarks.measure import Ratio, interleaved, ratio
from mechattr.models import HookedHF


def measure(shape: str, rounds: int) -> list[Ratio]:
    """All q, k, v, z, neurons and positions of one shape."""
    raw = models.raw(shape)
    hooked = HookedHF(raw, name=shape)
    clean, corrupt = models.tokens(shape, 1), models.tokens(shape, 2)
    pairs = [
        {"clean_tokens": a, "corrupt_tokens": b, "answer": 11, "foil": 12}
        for a, b in zip(clean.tolist(), corrupt.tolist(), strict=True)
    ]
    task = ma.tasks.from_pairs(hooked, pairs)

    def floor() -> None:
        with torch.no_grad():
            raw(corrupt, use_cache=False)
        embeddings = raw.get_input_embeddings()(clean).requires_grad_(True)
        logits = raw(inputs_embeds=embeddings, use_cache=False).logits
        torch.autograd.grad((logits[:, -1, 11] - logits[:, -1, 12]).sum(), embeddings)

    taken = interleaved({"floor": floor, "atp": lambda: ma.attribution_patching(hooked, task, progress=False)}, rounds)
    return [
        ratio(
            f"{shape}: AtP on q, k, v, z, neurons / (2 forward + 1 backward)",
            taken["atp"],
            taken["floor"],
            target=1.3 if shape == "M" else None,
        )
    ]
