"""What LRP costs over the forward and backward pass of the bare model, and several targets in one batched backward pass
over one after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import mechattr as ma
from benchmarks import models
from benchmarks.measure import Ratio, interleaved, ratio
from mechattr.models import Batch, HookedHF

TARGETS = list(range(100, 116))


class Bare:
    """Passes of a bare model from targets at the last position; parameters have no gradients."""

    def __init__(self, raw: Any, tokens: torch.Tensor) -> None:
        self.raw, self.tokens = raw, tokens

    def graph(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings, and the logits of the last position."""
        embeddings = self.raw.get_input_embeddings()(self.tokens).requires_grad_(True)
        return embeddings, self.raw(inputs_embeds=embeddings, use_cache=False).logits[:, -1]

    def one(self, target: int = TARGETS[0]) -> None:
        """One forward and one backward pass."""
        embeddings, logits = self.graph()
        torch.autograd.grad(logits[:, target].sum(), embeddings)

    def each(self) -> None:
        """A forward and a backward pass for each target."""
        for target in TARGETS:
            self.one(target)

    def shared(self) -> None:
        """One forward pass, and a backward pass for each target over its graph."""
        embeddings, logits = self.graph()
        for target in TARGETS:
            torch.autograd.grad(logits[:, target].sum(), embeddings, retain_graph=True)


def measure(shape: str, rounds: int) -> list[Ratio]:
    """One prompt of one shape."""
    raw = models.raw(shape)
    hooked, tokens = HookedHF(raw, name=shape), models.tokens(shape, 1)[:1]
    bare, batch = Bare(raw, tokens), Batch.of(tokens)

    def lrp(variant: str, target: Any = TARGETS[0]) -> Callable[[], object]:
        return lambda: ma.lrp(hooked, batch, target=target, variant=variant)

    taken = interleaved({"bare": bare.one, "cp": lrp("cp"), "attn": lrp("attn")}, rounds)
    several = interleaved(
        {"each": bare.each, "shared": bare.shared, "cp": lrp("cp", TARGETS), "attn": lrp("attn", TARGETS)},
        max(3, rounds // 4),
        warmup=1,
    )
    goal, n = shape == "M", len(TARGETS)
    rows = [
        ratio(f"{shape}: {name} / (1 forward + 1 backward)", taken[key], taken["bare"], target=1.2 if goal else None)
        for key, name in (("cp", "CP-LRP"), ("attn", "AttnLRP"))
    ]
    for key, name in (("cp", "CP-LRP"), ("attn", "AttnLRP")):
        rows += [
            ratio(
                f"{shape}: 1 forward + {n} backward passes on its graph / {name} of {n} targets in one",
                several["shared"],
                several[key],
                target=1.0 if goal else None,
                at_most=False,
            ),
            ratio(
                f"{shape}: {n} forward-backward passes / {name} of {n} targets in one",
                several["each"],
                several[key],
                target=1.5 if goal else None,
                at_most=False,
            ),
        ]
    return rows
