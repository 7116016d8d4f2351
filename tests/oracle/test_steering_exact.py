"""What steering promises to the last bit or digit: nothing where it does nothing, nothing left behind, orthogonal
weights for ablation, and the last block's output before the final norm."""

from __future__ import annotations

import copy
from typing import Any

import families
import pytest
import torch
from steering_cases import FAMILIES, PLACES, SITE, everywhere, mask_of, vector

from mechattr.errors import MechattrError
from mechattr.models import Batch, HookedHF
from mechattr.sites import full_name
from mechattr.steering import Condition, SteeringVector

SETTINGS: dict[str, Any] = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}


def bare_logits(torch_model: Any, batch: Batch) -> torch.Tensor:
    given = {"attention_mask": batch.mask.long(), "position_ids": batch.positions.clamp(min=0)}
    with torch.no_grad():
        return torch_model(batch.tokens, **given).logits


@pytest.mark.parametrize("operator", ["add", "norm_preserving", "angular"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_multiplier_of_zero_and_a_closed_gate_change_no_bit(family: str, operator: str) -> None:
    model, batch, v = families.hooked(family), families.ragged("left"), everywhere(families.hooked(family))
    clean, bare = model.run(batch).logits, bare_logits(model.model, batch)
    for place in PLACES:
        positions = mask_of(batch) if place == "mask" else PLACES[place]
        how: dict[str, Any] = {"positions": positions, "operator": operator}
        for zero in ({"multiplier": [0.0] * 3}, {"gate": [False] * 3}):
            with v.apply(model, **how, **zero):
                assert torch.equal(model.run(batch).logits, clean)
        with v.apply(model.model, 0.0, **how):
            assert torch.equal(bare_logits(model.model, batch), bare)
    said = model.generate(batch, num_beams=2, **SETTINGS).tokens
    with v.apply(model, 0.0, operator=operator):
        assert torch.equal(model.generate(batch, num_beams=2, **SETTINGS).tokens, said)
    with v.apply(model, 1e-3, operator=operator):  # control
        assert not torch.equal(model.run(batch).logits, clean)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_block_is_steered_before_the_final_norm(family: str) -> None:
    with families.widened():  # transformers' norms compute in float32
        model = HookedHF(families.model(family, torch.float64), name=family)
        batch, last = Batch.of(families.tokens()), full_name("resid_post", model.info.n_layers - 1)
        v, base, cap = vector(model, site=last), model.model.base_model, model.model.config.to_dict()
        final, softcap = base.ln_f if family == "gpt2" else base.norm, cap.get("final_logit_softcapping")
        x, added = model.run(batch, record=last).activations[last].values, 1.5 * v.tensors[last].values.double()

        def logits(normed: torch.Tensor) -> torch.Tensor:
            out = model.model.get_output_embeddings()(normed)
            return (out if softcap is None else softcap * torch.tanh(out / softcap)).detach()

        with v.apply(model, 1.5):
            found = model.run(batch).logits
        torch.testing.assert_close(found, logits(final(x + added)), rtol=0, atol=1e-10)  # float64
        with pytest.raises(AssertionError):  # control: steered behind the norm
            torch.testing.assert_close(found, logits(final(x) + added), rtol=0, atol=1e-10)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_ablation_is_orthogonal_weights(family: str) -> None:
    """All that writes along the direction, made orthogonal to it, is ablation behind each write."""
    with families.widened():  # transformers' norms compute in float32
        model = HookedHF(families.model(family, torch.float64), name=family)
        batch, other = families.ragged("left"), copy.deepcopy(model.model)
        head = other.get_output_embeddings()
        head.weight = torch.nn.Parameter(head.weight.detach().clone())  # not the embedding's, where they are tied
        u = torch.randn(model.info.d_model, generator=torch.Generator().manual_seed(0)).double()
        u = u / u.norm()
        writers = ("wte", "wpe", "c_proj") if family == "gpt2" else ("embed_tokens", "o_proj", "down_proj")
        for name, x in other.named_parameters():
            path, _, kind = name.rpartition(".")
            if path.endswith(writers):
                rows = x if kind == "bias" or family == "gpt2" or "embed" in name else x.T  # what it writes, last
                rows.data -= (rows.data @ u)[..., None] * u
        writes = ("resid_pre", "resid_mid", "resid_post")
        everywhere = [full_name(short, layer) for layer in range(model.info.n_layers) for short in writes]
        with SteeringVector.of(dict.fromkeys(everywhere, u)).apply(model, 3.0, operator="ablate"):
            found = model.run(batch).logits
            said = model.generate(batch, **SETTINGS).tokens
        expected = HookedHF(other, name=family)
        torch.testing.assert_close(found[batch.mask], expected.run(batch).logits[batch.mask], rtol=0, atol=1e-10)
        assert torch.equal(said, expected.generate(batch, **SETTINGS).tokens)
        with SteeringVector.of({SITE: u}).apply(model, operator="ablate"), pytest.raises(AssertionError):
            found = model.run(batch).logits  # control: ablated at one place
            torch.testing.assert_close(found[batch.mask], expected.run(batch).logits[batch.mask], rtol=0, atol=1e-10)


def failing(_rows: Batch) -> list[bool]:
    raise ValueError("mine")


@pytest.mark.parametrize("bare", [False, True])
def test_whatever_is_raised_nothing_stays(bare: bool) -> None:
    model, batch = families.hooked("gpt2"), families.ragged("left")
    torch_model, v, c = model.model, vector(model), torch.ones(model.info.d_model)
    late = Condition.of(full_name("resid_post", 1), c, 0.0)
    hooks, attributes = families.hooks_of(model), dict(torch_model.__dict__)
    clean, fingerprint = model.run(batch).logits, model.fingerprint()
    refused: list[dict[str, Any]] = [
        {"gate": failing}, {"gate": [True]}, {"gate": 1}, {"multiplier": [1.0] * 2}, {"multiplier": 1e39},
        {"positions": mask_of(batch)[:, :2]}, {"positions": []}, {"positions": "here"},
        {"vector": vector(model, site=full_name("resid_post", 0)), "gate": late},
        {"vector": SteeringVector.of({SITE: torch.ones(3)})}, {"vector": vector(model, site=full_name("mlp_out", 7))},
        {"operator": lambda x, v, m: x[:1]},
    ]  # fmt: skip
    for how in refused:
        how = dict(how)
        given = how.pop("vector", v)
        for generates in (False, True):
            with pytest.raises((MechattrError, ValueError)), given.apply(torch_model if bare else model, **how):
                if bare and generates:
                    torch_model.generate(batch.tokens, attention_mask=batch.mask.long(), pad_token_id=2, **SETTINGS)
                elif bare:
                    bare_logits(torch_model, batch)
                elif generates:
                    model.generate(batch, **SETTINGS)
                else:
                    model.run(batch)
            assert families.hooks_of(model) == hooks and dict(torch_model.__dict__) == attributes
            assert not model._standing and model.fingerprint() == fingerprint
    assert torch.equal(model.run(batch).logits, clean)
