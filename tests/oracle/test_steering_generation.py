"""Steered generation, cell by cell: with a cache, without one, and as a loop by hand; greedy and with beams; prompts of
one length and padded ones; on hooked models and on the transformers models themselves."""

from __future__ import annotations

from typing import Any

import families
import pytest
import torch
from steering_cases import FAMILIES, PLACES, by_hand, everywhere, mask_of

from mechattr.errors import UnsupportedFeatureError
from mechattr.models import Batch
from mechattr.steering import SteeringVector

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


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_an_encoder_decoder_of_the_user_is_steered_as_the_hooked_one(family: str) -> None:
    model = families.hooked(family)
    start = torch.full((3, 1), model.model.config.decoder_start_token_id)
    batch = families.with_source(Batch.of(start))
    v, read, mask = everywhere(model), batch.source.tokens, batch.source.mask.long()
    for place in ("all", [1], "generated"):
        for settings in ({"num_beams": 1}, {"num_beams": 3}):
            how: dict[str, Any] = {"multiplier": FACTORS, "positions": place, "gate": [True, False, True]}
            with v.apply(model, **how):
                expected = model.generate(batch, **BASE, **settings).tokens
            with v.apply(model.model, **how):
                found = model.model.generate(read, attention_mask=mask, **BASE, **settings)
            assert torch.equal(found, expected)
            assert not torch.equal(model.generate(batch, **BASE, **settings).tokens, expected)  # control
    with torch.no_grad():
        padded = read.flip(1), mask.flip(1), start  # columns are counted as the model counts them
        clean = model.model(*padded).logits
        with v.apply(model.model, 0.0):
            assert torch.equal(model.model(*padded).logits, clean)
    text = "an edit of encoder.0.hook_resid_post\n  found: transformers runs the encoder outside of the forward pass"
    outside = SteeringVector.of({"encoder.0.hook_resid_post": torch.ones(model.info.d_model)})
    with pytest.raises(UnsupportedFeatureError, match=text), outside.apply(model.model):
        pass
