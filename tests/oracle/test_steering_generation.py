"""Steered generation, cell by cell: with a cache, without one, and as a loop by hand; greedy and with beams; prompts of
one length and padded ones; on hooked models and on the transformers models themselves."""

from __future__ import annotations

from typing import Any

import families
import pytest
import torch
from steering_cases import FAMILIES, PLACES, by_hand, everywhere, mask_of

from mechattr.models import Batch

STEPS, FACTORS = 3, [1.0, -0.5, 2.0]
BASE: dict[str, Any] = {"max_new_tokens": STEPS, "min_new_tokens": STEPS, "do_sample": False}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("family", FAMILIES)
def test_cached_generation_is_uncached_and_a_loop_by_hand(family: str, place: str, beams: int, padded: bool) -> None:
    model = families.hooked(family)
    batch = families.ragged("left") if padded else Batch.of(families.tokens(3, 5))
    v, positions = everywhere(model), mask_of(batch) if place == "mask" else PLACES[place]
    expected = by_hand(model, batch, v, positions, STEPS, FACTORS, beams)
    own = {"attention_mask": batch.mask.long(), "pad_token_id": 2, **BASE}
    before = model.model.__dict__.get("generate")
    for cached in (True, False):
        settings = {"num_beams": beams, "use_cache": cached}
        with v.apply(model, FACTORS, positions=positions):
            found = model.generate(batch, **BASE, **settings)
        assert torch.equal(found.tokens[:, -STEPS:], expected)
        if cached:
            with v.apply(model.model, FACTORS, positions=positions):
                assert torch.equal(model.model.generate(batch.tokens, **own, **settings), found.tokens)
    assert model.model.__dict__.get("generate") is before
    if place == "all":  # the control: what is not steered says something else
        assert not torch.equal(model.generate(batch, **BASE, num_beams=beams).tokens[:, -STEPS:], expected)


def test_places_are_told_apart() -> None:
    """The control: a loop by hand that steers somewhere else does not say the same."""
    model, batch = families.hooked("gpt2"), families.ragged("left")
    v, said = everywhere(model), []
    for place in PLACES.values():
        positions = mask_of(batch) if place == "mask" else place
        with v.apply(model, FACTORS, positions=positions):
            said.append(model.generate(batch, **{**BASE, "max_new_tokens": 6, "min_new_tokens": 6}).tokens)
    assert not any(torch.equal(said[i], said[j]) for i in range(len(said)) for j in range(i))
