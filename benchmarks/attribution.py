"""What the estimates of patching cost over the passes of the bare model that they cannot do without."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

import mechattr as ma
from benchmarks import models
from benchmarks.measure import Ratio, interleaved, ratio
from mechattr.models import HookedHF

STEPS = 10  # of integrated gradients, the default


class Bare:
    """The passes of a bare model on one batch of pairs."""

    def __init__(self, raw: Any, clean: torch.Tensor, corrupt: torch.Tensor) -> None:
        self.raw, self.clean, self.corrupt = raw, clean, corrupt

    def forward(self) -> None:
        """One forward pass without a graph."""
        with torch.no_grad():
            self.raw(self.corrupt, use_cache=False)

    def gradients(self, backward: int = 1) -> None:
        """One forward pass with its graph, and so many backward passes over it."""
        embeddings = self.raw.get_input_embeddings()(self.clean).requires_grad_(True)
        logits = self.raw(inputs_embeds=embeddings, use_cache=False).logits
        metric = (logits[:, -1, 11] - logits[:, -1, 12]).sum()
        for left in reversed(range(backward)):
            torch.autograd.grad(metric, embeddings, retain_graph=left > 0)

    def floor(self, backward: int = 1) -> Callable[[], None]:
        """Two forward passes, and backward passes over the second."""

        def run() -> None:
            self.forward()
            self.gradients(backward)

        return run


def setting(shape: str) -> tuple[HookedHF, Any, Bare]:
    """Model, task and bare passes of one shape."""
    raw = models.raw(shape)
    hooked = HookedHF(raw, name=shape)
    clean, corrupt = models.tokens(shape, 1), models.tokens(shape, 2)
    pairs = [
        {"clean_tokens": a, "corrupt_tokens": b, "answer": 11, "foil": 12}
        for a, b in zip(clean.tolist(), corrupt.tolist(), strict=True)
    ]
    return hooked, ma.tasks.from_pairs(hooked, pairs), Bare(raw, clean, corrupt)


def measure(shape: str, rounds: int) -> list[Ratio]:
    """Nodes: all q, k, v, z, neurons and positions of one shape, by plain AtP, with the QK fix, and AtP*."""
    hooked, task, bare = setting(shape)
    layers = hooked.info.n_layers
    fewer, more = (layers + 1) // 2, (layers + 2) // 2  # (L+1)/2 lies between, or is both

    def atp(variant: str) -> Callable[[], object]:
        return lambda: ma.attribution_patching(hooked, task, variant=variant, progress=False)

    jobs = {"floor": bare.floor(), "atp": atp("atp"), "qk": atp("qk")}
    taken = interleaved(jobs, rounds)
    stars = interleaved({"fewer": bare.floor(fewer), "more": bare.floor(more), "star": atp("star")}, rounds)
    goal = shape == "M"
    return [
        ratio(
            f"{shape}: AtP on q, k, v, z, neurons / (2 forward + 1 backward)",
            taken["atp"],
            taken["floor"],
            target=1.3 if goal else None,
        ),
        ratio(f"{shape}: AtP with the QK fix / AtP", taken["qk"], taken["atp"], target=1.2 if goal else None),
        ratio(
            f"{shape}: AtP* / (2 forward + (L+1)/2 backward)",
            stars["star"],
            np.mean([stars["fewer"], stars["more"]], 0),
            target=1.25 if goal else None,
        ),
    ]


def measure_edges(shape: str, rounds: int) -> list[Ratio]:
    """Edges: all of one shape, by EAP and by EAP-IG."""
    hooked, task, bare = setting(shape)

    def path() -> None:
        for _ in range(STEPS):
            bare.gradients()

    jobs: dict[str, Callable[[], object]] = {
        "floor": bare.floor(),
        "path": path,
        "eap": lambda: ma.edge_attribution(hooked, task, method="eap", progress=False),
        "eap_ig": lambda: ma.edge_attribution(hooked, task, method="eap_ig", steps=STEPS, progress=False),
    }
    taken = interleaved(jobs, rounds)
    goal, edges = shape == "M", ma.patching.count_edges(hooked.info)
    return [
        ratio(
            f"{shape}: EAP on {edges:,} edges / (2 forward + 1 backward)",
            taken["eap"],
            taken["floor"],
            target=1.3 if goal else None,
        ),
        ratio(
            f"{shape}: EAP-IG, {STEPS} steps / {STEPS} forward-backward passes",
            taken["eap_ig"],
            taken["path"],
            target=1.15 if goal else None,
        ),
    ]
