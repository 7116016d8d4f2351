"""In torch.inference_mode there are no gradients: what needs them says so, and what does not works as ever."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import families
import pytest
import torch

import mechattr as ma
from mechattr.errors import ModelStateError
from mechattr.models import Batch

TRIPLES = [("They say that the cow", " is", " are")]
ASKS: dict[str, Callable[[Any], Any]] = {
    "run": lambda model: model.run(_batch(), metric=lambda x, _: x[:, -1, 3], gradients="resid_post"),
    "tape": lambda model: model.tape(_batch(), metric=lambda x, _: x[:, -1, 3], gradients="resid_post"),
    "scores": lambda _: ma.steering.token_scores(ma.load("tiny"), TRIPLES, steps=2),
    "learned": lambda _: ma.steering.learned(ma.load("tiny"), TRIPLES, layers=[1], steps=1),
}


def _batch() -> Batch:
    return Batch.of(families.tokens(2, 5))


@pytest.mark.filterwarnings("ignore:integrated gradients")  # of two steps
@pytest.mark.parametrize("name", ASKS)
def test_gradients_are_refused(name: str) -> None:
    model = families.hooked("gpt2")
    with torch.no_grad():  # which is another thing
        ASKS[name](model)
    with torch.inference_mode(), pytest.raises(ModelStateError) as error:
        ASKS[name](model)
    assert str(error.value) == (
        "gradients\n  found: torch.inference_mode, in which torch keeps no graph\n"
        "  fix: leave it, or use torch.no_grad, which changes nothing here"
    )


def test_runs_without_gradients_are_the_same() -> None:
    model = families.hooked("gpt2")
    expected = model.run(_batch()).logits
    with torch.inference_mode():
        assert torch.equal(model.run(_batch()).logits, expected)
