"""Linear probes from states to a vocabulary: many at once, without ever holding [positions, vocabulary] as a whole.

A probe is W [vocab, d] without bias: logits = W h. Probes are stacked along a first axis, so that all layers and
offsets that are trained together share one pass over the data.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

LOGITS = 2**24  # logits of all probes and states together that are held at once
NEGLIGIBLE = -60.0  # e^-60 of the largest term is below the rounding of a sum; much smaller numbers would be slow


def chunks(n_labels: int, states: Float[Tensor, "probe n d"], chunk: int | None = None) -> Iterator[slice]:
    """The labels, so many at once: `chunk`, or as many as `LOGITS` allows."""
    chunk = chunk or max(1, LOGITS // max(1, states.shape[0] * states.shape[1]))
    for begin in range(0, n_labels, chunk):
        yield slice(begin, min(begin + chunk, n_labels))


def log_normaliser(
    weights: Float[Tensor, "probe vocab d"], states: Float[Tensor, "probe n d"], *, chunk: int | None = None
) -> Float[Tensor, "probe n"]:
    """log sum_y exp(w_y . h), with one chunk of logits in memory."""
    total = states.new_full(states.shape[:2], -torch.inf)
    for part in chunks(weights.shape[1], states, chunk):
        logits = states @ weights[:, part].mT
        top = logits.amax(-1, keepdim=True)
        here = _exponentials(logits, top).sum(-1).log_().add_(top[..., 0])
        total = torch.logaddexp(total, here)
    return total


def log_probabilities(
    weights: Float[Tensor, "probe vocab d"],
    states: Float[Tensor, "probe n d"],
    labels: Int[Tensor, "probe n"],
    *,
    chunk: int | None = None,
) -> Float[Tensor, "probe n"]:
    """log P(label | state) of one label a state: its own row of the weights, and the chunked normaliser."""
    return own_logits(weights, states, labels) - log_normaliser(weights, states, chunk=chunk)


def ranks(
    weights: Float[Tensor, "probe vocab d"],
    states: Float[Tensor, "probe n d"],
    labels: Int[Tensor, "probe n"],
    *,
    chunk: int | None = None,
) -> Int[Tensor, "probe n"]:
    """How many labels have a larger logit than the right one, or an equal one and a smaller id: 0 is top-1."""
    own = own_logits(weights, states, labels)
    found = torch.zeros_like(labels)
    for part in chunks(weights.shape[1], states, chunk):
        logits = states @ weights[:, part].mT
        ids = torch.arange(part.start, part.stop, device=labels.device)
        ahead = (logits > own[..., None]) | ((logits == own[..., None]) & (ids < labels[..., None]))
        found += (ahead & (ids != labels[..., None])).sum(-1)
    return found


def own_logits(
    weights: Float[Tensor, "probe vocab d"], states: Float[Tensor, "probe n d"], labels: Int[Tensor, "probe n"]
) -> Float[Tensor, "probe n"]:
    """w_y . h of each state's own label."""
    rows = weights[torch.arange(len(weights), device=weights.device)[:, None], labels]
    return (rows * states).sum(-1)


def cross_entropy_gradient(
    weights: Float[Tensor, "probe vocab d"],
    states: Float[Tensor, "probe n d"],
    labels: Int[Tensor, "probe n"],
    kept: Float[Tensor, "probe n"],
    *,
    chunk: int | None = None,
    into: Float[Tensor, "probe vocab d"] | None = None,
) -> tuple[Float[Tensor, " probe"], Float[Tensor, "probe vocab d"]]:
    """The weighted mean of -log P(label | state) of each probe, and its gradient (P - Y)' H.

    One probe after another, so that its logits stay in the processor's cache; where they are more than a chunk of
    labels, they are computed twice, for the normaliser and for the gradient.

    Args:
        weights: of the probes.
        states: inputs.
        labels: one a state.
        kept: the weight of each state, 0 where a probe has no label; those of a probe sum to 1, or all are 0.
        chunk: labels at once; as many as `LOGITS` allows without it.
        into: gradients to which these are added, in place.
    """
    gradient = torch.zeros_like(weights) if into is None else into
    loss = states.new_zeros(len(weights))
    for i, (w, h, y, k) in enumerate(zip(weights, states, labels, kept, strict=True)):
        parts = list(chunks(len(w), h[None], chunk))
        if len(parts) == 1:
            logits = w @ h.mT  # [label, n], in which the product for the gradient is faster
            top = logits.amax(0)
            total = _exponentials(logits, top).sum(0)
            normaliser = top + total.log()
            gradient[i].addmm_(logits, h * (k / total)[:, None])
        else:
            normaliser = log_normaliser(w[None], h[None], chunk=chunk)[0]
            for part in parts:
                probability = _exponentials(h @ w[part].mT, normaliser[:, None])
                gradient[i, part].addmm_(probability.mT, h * k[:, None])
        gradient[i].index_add_(0, y, h * -k[:, None])
        loss[i] = (k * (normaliser - (w[y] * h).sum(-1))).sum()
    return loss, gradient


def _exponentials(logits: Float[Tensor, "*dims"], top: Float[Tensor, "*dims"]) -> Float[Tensor, "*dims"]:
    """e^(logits - top) in place, but not below what is negligible."""
    return logits.sub_(top).clamp_(min=NEGLIGIBLE).exp_()


@dataclass(eq=False, slots=True)
class Ridge:
    """Running sums for probes in closed form: W = (H'H + a I)^-1 H'Y with Y one-hot, so that H'Y is a sum by label.

    Attributes:
        gram: H'H.
        cross: Y'H.
        count: states seen by each probe.
    """

    gram: Float[Tensor, "probe d d"]
    cross: Float[Tensor, "probe vocab d"]
    count: Float[Tensor, " probe"] = field(init=False)

    def __post_init__(self) -> None:
        self.count = self.gram.new_zeros(len(self.gram))

    @classmethod
    def empty(cls, n_probes: int, n_labels: int, d: int, *, device: torch.device | str = "cpu") -> Ridge:
        """Nothing seen yet; sums are in float64."""
        made: dict[str, Any] = {"dtype": torch.float64, "device": device}
        return cls(torch.zeros(n_probes, d, d, **made), torch.zeros(n_probes, n_labels, d, **made))

    def add(
        self,
        states: Float[Tensor, "probe n d"],
        labels: Int[Tensor, "probe n"],
        kept: Float[Tensor, "probe n"],
    ) -> None:
        """More states; those whose weight `kept` is 0 do not count."""
        states = states.to(self.gram.dtype)
        weighted = states * kept[..., None].to(states.dtype)
        self.gram += weighted.mT @ states
        probe = torch.arange(len(states), device=states.device)[:, None].expand_as(labels)
        self.cross.index_put_((probe, labels), weighted, accumulate=True)
        self.count += kept.sum(-1).to(self.count.dtype)

    def solve(self, alpha: float) -> Float[Tensor, "probe vocab d"]:
        """The probes; `alpha` is the penalty relative to the mean of the diagonal of H'H."""
        d = self.gram.shape[-1]
        mean = self.gram.diagonal(dim1=-2, dim2=-1).mean(-1)
        eye = torch.eye(d, dtype=self.gram.dtype, device=self.gram.device)
        penalty = (alpha * mean).clamp(min=torch.finfo(self.gram.dtype).tiny)
        return torch.linalg.solve(self.gram + penalty[:, None, None] * eye, self.cross.mT).mT
