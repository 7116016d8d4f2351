"""What recording costs: over the model's own forward pass, and beside TransformerLens."""

from __future__ import annotations

import torch

from benchmarks import models
from benchmarks.measure import Ratio, interleaved, ratio
from mechattr.models import Batch, HookedHF


def measure(shape: str, rounds: int) -> list[Ratio]:
    """Recording all residual sites, and everything, on one shape."""
    raw = models.raw(shape)
    hooked, bridge = HookedHF(raw, name=shape), models.bridge(raw)
    ids = models.tokens(shape, 1)
    batch = Batch.of(ids)
    stream = ("resid_pre", "resid_mid", "resid_post")

    def plain() -> None:
        with torch.no_grad():
            raw(ids, use_cache=False)

    def lens_all() -> None:
        with torch.no_grad():
            bridge.run_with_cache(ids)

    def lens_stream() -> None:
        with torch.no_grad():
            bridge.run_with_cache(ids, names_filter=lambda name: "resid" in name)

    taken = interleaved(
        {
            "plain": plain,
            "none": lambda: hooked.run(batch),
            "stream": lambda: hooked.run(batch, record=stream),
            "all": lambda: hooked.run(batch, record=hooked.sites()),
            "lens stream": lens_stream,
            "lens all": lens_all,
        },
        rounds,
    )
    floor = taken["plain"]
    goal = shape == "M"
    return [
        ratio(f"{shape}: run, nothing recorded / forward", taken["none"], floor),
        ratio(f"{shape}: record resid_* / forward", taken["stream"], floor, target=1.15 if goal else None),
        ratio(f"{shape}: record everything (with result) / forward", taken["all"], floor, target=1.5 if goal else None),
        ratio(f"{shape}: TransformerLens resid_* / forward", taken["lens stream"], floor),
        ratio(f"{shape}: TransformerLens run_with_cache / forward", taken["lens all"], floor),
    ]
