"""Metrics against slow loops over rows, in float64, on batches with padding and repeated rows."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mechattr.models.base import Batch
from mechattr.tasks.metrics import (
    METRICS,
    PADDING,
    Metric,
    final_logits,
    kl_divergence,
    log_probability,
    logit_difference,
    probability_difference,
    sequence_log_probability,
)

VOCAB = 11
ROUNDING = {"rtol": 0.0, "atol": 1e-12}  # sums of a dozen float64 numbers of order one
ANSWERS, FOILS = torch.tensor([3, 5, 7]), torch.tensor([4, 6, 8])
SETS = torch.tensor([[1, 2, 3], [4, PADDING, PADDING], [5, 6, PADDING]])
FOIL_SETS = torch.tensor([[7, 8], [9, 10], [0, PADDING]])
SEQUENCES = torch.tensor([[3, 1, 4], [1, 5, PADDING], [9, PADDING, PADDING]])
REFERENCE = torch.linspace(-1, 1, 3 * VOCAB, dtype=torch.float64).reshape(3, VOCAB).log_softmax(-1)


def example_batch(side: str = "right") -> Batch:
    """Pairs 2, 0, 1, 2 with 4, 6, 5, 4 real tokens of 6 columns."""
    lengths = torch.tensor([4, 6, 5, 4])
    columns = torch.arange(6)
    mask = columns < lengths[:, None] if side == "right" else columns >= 6 - lengths[:, None]
    return Batch(torch.zeros(4, 6, dtype=torch.long), mask, torch.tensor([2, 0, 1, 2]))


def logits_for(batch: Batch) -> Tensor:
    """Random logits; a row's real tokens get the same ones on either padding side."""
    values = torch.randn(4, 6, VOCAB, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) * 2
    logits = torch.full((4, 6, VOCAB), 50.0, dtype=torch.float64)
    for row in range(4):
        length = int(batch.lengths[row])
        logits[row, batch.mask[row]] = values[row, :length]
    return logits


def slow(name: str, logits: Tensor, batch: Batch) -> Tensor:
    """Each metric by its definition, one row at a time."""
    values = []
    for row in range(len(batch)):
        real, pair = logits[row][batch.mask[row]], int(batch.example[row])
        last, p = real[-1], real[-1].exp() / real[-1].exp().sum()
        if name == "logit_difference":
            value = last[ANSWERS[pair]] - last[FOILS[pair]]
        elif name == "log_probability":
            value = p[ANSWERS[pair]].log()
        elif name == "probability_difference":
            right, wrong = ([i for i in ids[pair].tolist() if i >= 0] for ids in (SETS, FOIL_SETS))
            value = sum(p[i] for i in right) - sum(p[i] for i in wrong)
        elif name == "sequence_log_probability":
            tokens = [i for i in SEQUENCES[pair].tolist() if i >= 0]
            steps = real[-len(tokens) :]
            value = sum((step.exp() / step.exp().sum())[token].log() for step, token in zip(steps, tokens, strict=True))
        else:
            r = REFERENCE[pair].exp()
            value = (r * (r.log() - p.log())).sum()
        values.append(value)
    return torch.stack(values)


MADE: dict[str, Metric] = {
    "logit_difference": logit_difference(ANSWERS, FOILS),
    "log_probability": log_probability(ANSWERS),
    "sequence_log_probability": sequence_log_probability(SEQUENCES),
    "probability_difference": probability_difference(SETS, FOIL_SETS),
    "kl_divergence": kl_divergence(REFERENCE),
}


def test_every_metric_of_the_table_is_tested_here() -> None:
    assert MADE.keys() == METRICS.keys()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", MADE)
def test_metric_equals_its_definition_row_by_row(name: str, side: str) -> None:
    batch = example_batch(side)
    logits = logits_for(batch)
    found = MADE[name](logits, batch)
    assert found.shape == (4,)
    torch.testing.assert_close(found, slow(name, logits, batch), **ROUNDING)


def _last_column(logits: Tensor, batch: Batch) -> Tensor:
    return logits[:, -1].gather(1, ANSWERS[batch.example, None])[:, 0]


def _row_is_pair(logits: Tensor, batch: Batch) -> Tensor:
    wrong = Batch(batch.tokens, batch.mask, torch.tensor([0, 1, 2, 0]))
    return logit_difference(ANSWERS, FOILS)(logits, wrong)


def _mean_over_rows(logits: Tensor, batch: Batch) -> Tensor:
    return logit_difference(ANSWERS, FOILS)(logits, batch).mean().expand(4)


@pytest.mark.parametrize("wrong", [_last_column, _row_is_pair, _mean_over_rows])
def test_the_definition_rejects_wrong_metrics(wrong: Callable[[Tensor, Batch], Tensor]) -> None:
    batch = example_batch()
    logits = logits_for(batch)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(wrong(logits, batch), slow("logit_difference", logits, batch), **ROUNDING)


def test_the_definition_rejects_the_reverse_divergence_and_an_unpadded_sequence() -> None:
    batch = example_batch()
    logits = logits_for(batch)
    log_p, log_r = final_logits(logits, batch).log_softmax(-1), REFERENCE[batch.example]
    reverse = (log_p.exp() * (log_p - log_r)).sum(-1)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(reverse, slow("kl_divergence", logits, batch), **ROUNDING)
    unpadded = sequence_log_probability(SEQUENCES.clamp_min(0))(logits, batch)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(unpadded, slow("sequence_log_probability", logits, batch), **ROUNDING)


@pytest.mark.parametrize("name", MADE)
def test_gradient_of_a_row_stays_in_its_row_and_off_the_padding(name: str) -> None:
    batch = example_batch()
    logits = logits_for(batch).requires_grad_()
    values = MADE[name](logits, batch)
    (gradient,) = torch.autograd.grad(values[1], logits)
    assert gradient[1].abs().sum() > 0
    assert gradient[[0, 2, 3]].abs().sum() == 0
    (gradient,) = torch.autograd.grad(MADE[name](logits, batch).sum(), logits)
    assert gradient[~batch.mask].abs().sum() == 0


def test_half_precision_logits_are_compared_in_float32() -> None:
    batch = Batch.of(torch.zeros(1, 1, dtype=torch.long))
    logits = torch.tensor([[[300.0, 1.0]]], dtype=torch.bfloat16)  # 299 has no bfloat16
    found = logit_difference(torch.tensor([0]), torch.tensor([1]))(logits, batch)
    assert found.dtype == torch.float32
    assert found.item() == 299.0
    assert (logits[0, 0, 0] - logits[0, 0, 1]).item() != 299.0  # negative control: in bfloat16 the value is lost


def test_units_and_directions() -> None:
    assert {name: (m.unit, m.higher_is_better, m.contrast) for name, m in MADE.items()} == {
        "logit_difference": ("logit", True, True),
        "log_probability": ("nat", True, False),
        "sequence_log_probability": ("nat", True, False),
        "probability_difference": ("probability", True, True),
        "kl_divergence": ("nat", False, False),
    }
    assert all(metric.name == name for name, metric in MADE.items())
