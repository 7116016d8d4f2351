"""Metrics: one number a row, never reduced, from the logits that follow the prompt.

Notation: $z$ are the logits after the last real token of a row, $a$ the answer, $f$ the foil of the row's pair,
$p = \\mathrm{softmax}(z)$. Logits of half precision are taken to float32 first; wider ones keep their type.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechattr.models.base import Batch

Unit = Literal["logit", "nat", "probability"]
PADDING = -1  # fills the rows of answers that have fewer tokens than the longest


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """A function of a run's logits that gives one number a row.

    Attributes:
        name: the name by which it is asked for and reported.
        unit: "logit", "nat" or "probability".
        higher_is_better: whether a better model has a higher value.
        contrast: whether the value is answer against foil, so that a positive one is a right answer.
        function: `(logits, batch) -> Tensor[batch]`; `batch.example` says which pair a row belongs to.
    """

    name: str
    unit: Unit
    higher_is_better: bool = True
    contrast: bool = False
    function: Callable[[Tensor, Batch], Tensor]

    def __call__(self, logits: Float[Tensor, "batch pos d_vocab"], batch: Batch) -> Float[Tensor, " batch"]:
        """The value of each row."""
        return self.function(logits, batch)


def logit_difference(answers: Int[Tensor, " pair"], foils: Int[Tensor, " pair"]) -> Metric:
    """$z_a - z_f$, in logits."""

    def difference(logits: Tensor, batch: Batch) -> Tensor:
        final = final_logits(logits, batch)
        return _pick(final, answers, batch) - _pick(final, foils, batch)

    return Metric(name="logit_difference", unit="logit", contrast=True, function=difference)


def log_probability(answers: Int[Tensor, " pair"]) -> Metric:
    """$\\log p_a$, in nats."""

    def log_p(logits: Tensor, batch: Batch) -> Tensor:
        return _pick(final_logits(logits, batch).log_softmax(-1), answers, batch)

    return Metric(name="log_probability", unit="nat", function=log_p)


def sequence_log_probability(answers: Int[Tensor, "pair answer"]) -> Metric:
    """$\\sum_k \\log p(a_k \\mid \\text{prompt}, a_{<k})$, in nats.

    The rows must end with the answer without its last token, so that the last `len(answer)` positions predict it.
    Answers of unequal length are padded on the right with `PADDING`.
    """

    def log_p(logits: Tensor, batch: Batch) -> Tensor:
        wanted = answers.to(logits.device)[batch.example]
        real = wanted != PADDING
        lengths = real.sum(1, keepdim=True)
        # Token k of the answer is predicted len(answer) - 1 - k columns before the last; real tokens are contiguous.
        steps = torch.arange(wanted.shape[1], device=logits.device)
        columns = (batch.columns(-1)[:, None] - (lengths - 1 - steps)).where(real, 0)
        rows = torch.arange(len(batch), device=logits.device)[:, None]
        log_probabilities = _at_least_float32(logits[rows, columns]).log_softmax(-1)
        picked = log_probabilities.gather(-1, wanted.clamp_min(0)[..., None])[..., 0]
        return picked.where(real, 0).sum(1)

    return Metric(name="sequence_log_probability", unit="nat", function=log_p)


def probability_difference(answers: Int[Tensor, "pair ..."], foils: Int[Tensor, "pair ..."]) -> Metric:
    """$\\sum_{y \\in A} p_y - \\sum_{y \\in F} p_y$, where $A$ and $F$ are the answers and the foils of the pair."""

    def difference(logits: Tensor, batch: Batch) -> Tensor:
        p = final_logits(logits, batch).softmax(-1)
        return _pick_set(p, answers, batch) - _pick_set(p, foils, batch)

    return Metric(name="probability_difference", unit="probability", contrast=True, function=difference)


def kl_divergence(reference: Float[Tensor, "pair d_vocab"]) -> Metric:
    """$\\sum_y r_y (\\log r_y - \\log p_y)$, in nats, from the reference distribution $r$ of the pair.

    Args:
        reference: $\\log r$, the log-probabilities of the clean run after its last token.
    """

    def divergence(logits: Tensor, batch: Batch) -> Tensor:
        log_p = final_logits(logits, batch).log_softmax(-1)
        log_r = reference.to(log_p)[batch.example]
        return (log_r.exp() * (log_r - log_p)).sum(-1)

    return Metric(name="kl_divergence", unit="nat", higher_is_better=False, function=divergence)


METRICS: Mapping[str, Callable[..., Metric]] = MappingProxyType(
    {
        "logit_difference": logit_difference,
        "log_probability": log_probability,
        "sequence_log_probability": sequence_log_probability,
        "probability_difference": probability_difference,
        "kl_divergence": kl_divergence,
    }
)


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def final_logits(logits: Float[Tensor, "batch pos d_vocab"], batch: Batch) -> Float[Tensor, "batch d_vocab"]:
    """The logits after the last real token of each row, in float32 or wider."""
    rows = torch.arange(len(batch), device=logits.device)
    return _at_least_float32(logits[rows, batch.columns(-1).to(logits.device)])


def _pick(values: Float[Tensor, "batch d_vocab"], ids: Int[Tensor, " pair"], batch: Batch) -> Float[Tensor, " batch"]:
    return values.gather(1, ids.to(values.device)[batch.example, None])[:, 0]


def _pick_set(values: Float[Tensor, "batch d_vocab"], ids: Tensor, batch: Batch) -> Float[Tensor, " batch"]:
    members = ids.to(values.device)[batch.example].reshape(len(batch), -1)
    return values.gather(1, members.clamp_min(0)).where(members != PADDING, 0).sum(1)
