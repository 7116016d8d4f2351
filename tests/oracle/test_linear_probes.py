"""Linear probes in chunks against autograd, the whole table of logits, and their normal equations."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from mechattr.engines import linear_probes
from mechattr.engines.linear_probes import (
    LOGITS,
    Ridge,
    chunks,
    cross_entropy_gradient,
    log_probabilities,
    ranks,
)

CLOSE = {"rtol": 0, "atol": 1e-11}  # float64 sums of at most a few hundred products
P, V, N, D = 3, 23, 40, 6


def data(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weights, states = (torch.randn(P, n, D, dtype=torch.float64, generator=generator) for n in (V, N))
    labels = torch.randint(0, V, (P, N), generator=generator)
    kept = (torch.rand(P, N, generator=generator) < 0.7).double()
    return weights, states, labels, kept


@pytest.mark.parametrize("chunk", [1, 7, 23, 100])
@pytest.mark.parametrize("size", [1.0, 40.0])  # of the weights: with 40 most labels are negligible
def test_chunks_give_what_all_logits_at_once_give(chunk: int, size: float) -> None:
    weights, states, labels, kept = data()
    weights = weights * size
    logits = states @ weights.mT
    whole = logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    torch.testing.assert_close(log_probabilities(weights, states, labels, chunk=chunk), whole, **CLOSE)
    order = logits.argsort(-1, descending=True)
    expected = (order == labels[..., None]).int().argmax(-1)
    assert torch.equal(ranks(weights, states, labels, chunk=chunk), expected)
    kept = kept / kept.sum(-1, keepdim=True)
    free = weights.clone().requires_grad_()
    loss = -(kept * (states @ free.mT).log_softmax(-1).gather(-1, labels[..., None])[..., 0]).sum(-1)
    (expected_gradient,) = torch.autograd.grad(loss.sum(), free)
    found, gradient = cross_entropy_gradient(weights, states, labels, kept, chunk=chunk)
    torch.testing.assert_close(found, loss.detach(), **CLOSE)
    torch.testing.assert_close(gradient, expected_gradient, **CLOSE)
    before = torch.ones_like(weights)
    cross_entropy_gradient(weights, states, labels, kept, chunk=chunk, into=before)
    torch.testing.assert_close(before, expected_gradient + 1, **CLOSE)


def test_a_gradient_without_its_labels_is_told_apart() -> None:
    weights, states, labels, kept = data()
    _, gradient = cross_entropy_gradient(weights, states, labels, kept)
    other = (labels + 1) % V
    with pytest.raises(AssertionError):
        torch.testing.assert_close(cross_entropy_gradient(weights, states, other, kept)[1], gradient, **CLOSE)


def test_more_than_what_is_negligible_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, states, labels, _ = data()
    whole = (states @ weights.mT).log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    monkeypatch.setattr(linear_probes, "NEGLIGIBLE", -3.0)  # far too much is left as it is not
    with pytest.raises(AssertionError):
        torch.testing.assert_close(log_probabilities(weights, states, labels), whole, **CLOSE)


def test_many_states_take_fewer_labels_at_once() -> None:
    few, many = (torch.zeros(2, n, D) for n in (10, 2000))
    assert [part.stop - part.start for part in chunks(100, few, 30)] == [30, 30, 30, 10]
    assert (
        len(list(chunks(128_000, few))) == 1 and max(p.stop - p.start for p in chunks(128_000, many)) * 4000 <= LOGITS
    )
    assert len(list(chunks(5, torch.zeros(2, 0, D)))) == 1


def test_equal_logits_rank_by_id() -> None:
    weights, states = torch.zeros(1, 4, 2), torch.ones(1, 4, 2)
    assert ranks(weights, states, torch.tensor([[0, 1, 2, 3]])).tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize("alpha", [0.0, 0.1])
def test_ridge_solves_its_normal_equations(alpha: float) -> None:
    _, states, labels, kept = data()
    ridge = Ridge.empty(P, V, D)
    for part in (slice(0, 15), slice(15, N)):  # as it comes in
        ridge.add(states[:, part], labels[:, part], kept[:, part])
    weights = ridge.solve(alpha)
    for probe in range(P):
        chosen = kept[probe] > 0
        h, y = states[probe, chosen], F.one_hot(labels[probe, chosen], V).double()
        penalty = alpha * (h.mT @ h).diagonal().mean()
        residual = h.mT @ (h @ weights[probe].mT - y) + penalty * weights[probe].mT
        torch.testing.assert_close(residual, torch.zeros_like(residual), rtol=0, atol=1e-8)  # of sums of 40 products
        wrong = ridge.solve(alpha + 0.01)[probe]  # another penalty
        assert float((h.mT @ (h @ wrong.mT - y) + penalty * wrong.mT).abs().max()) > 1e-4
    assert ridge.count.tolist() == kept.sum(-1).tolist()
