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
VARIANTS = {"cp": "CP-LRP", "attn": "AttnLRP"}


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


class Setting:
    """One prompt of one shape."""

    def __init__(self, shape: str) -> None:
        raw, tokens = models.raw(shape), models.tokens(shape, 1)[:1]
        self.hooked, self.bare, self.batch = HookedHF(raw, name=shape), Bare(raw, tokens), Batch.of(tokens)

    def lrp(self, variant: str, target: Any) -> Callable[[], object]:
        """One call."""
        return lambda: ma.lrp(self.hooked, self.batch, target=target, variant=variant)


def measure(shape: str, rounds: int) -> list[Ratio]:
    """One target, over a forward and a backward pass."""
    at = Setting(shape)
    jobs = {"bare": at.bare.one, "cp": at.lrp("cp", TARGETS[0]), "attn": at.lrp("attn", TARGETS[0])}
    taken = interleaved(jobs, rounds)
    goal = 1.2 if shape == "M" else None
    return [
        ratio(f"{shape}: {name} / (1 forward + 1 backward)", taken[key], taken["bare"], target=goal)
        for key, name in VARIANTS.items()
    ]


def several(shape: str, rounds: int) -> list[Ratio]:
    """All targets in one batched backward pass, beside passes one after the other."""
    at, n, goal = Setting(shape), len(TARGETS), shape == "M"
    jobs = {"shared": at.bare.shared, "each": at.bare.each, **{key: at.lrp(key, TARGETS) for key in VARIANTS}}
    taken = interleaved(jobs, rounds, warmup=1)
    others = {
        "shared": (f"1 forward + {n} backward passes on its graph", 1.0),
        "each": (f"{n} forward-backward passes", 1.5),
    }
    return [
        ratio(
            f"{shape}: {what} / {name} of {n} targets in one",
            taken[other],
            taken[key],
            target=least if goal else None,
            at_most=False,
        )
        for key, name in VARIANTS.items()
        for other, (what, least) in others.items()
    ]
