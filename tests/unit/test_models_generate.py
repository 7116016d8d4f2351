"""Generation under edits: the KV cache, padding and beams change nothing but speed."""

from __future__ import annotations

import families
import pytest
import torch

from mechattr.errors import SettingError
from mechattr.models import Add, Batch, Edit, PlainConfig, Scale, Set, Zero, plain_model
from mechattr.sites import SITES

DECODERS = (*families.DECODERS, *families.SOURCED)
STEPS = 6


def continued(family: str, batch: Batch, *edits: Edit, **settings) -> torch.Tensor:
    """The tokens that follow each prompt; no end token stops a row early."""
    model = families.hooked(family)
    chosen = {"max_new_tokens": STEPS, "do_sample": False, "eos_token_id": None, **settings}
    return model.generate(batch, edits=edits, **chosen).tokens[:, batch.tokens.shape[1] :]


def strong(site: str, **selection) -> Edit:
    """An edit whose effect on the tokens cannot be missed."""
    if site == "pattern":
        return Edit(site, Zero(), **selection)
    width = 24 if SITES[site].axes[-1] == "d_model" else 6
    return Edit(site, Add(4 * torch.randn(width, generator=torch.Generator().manual_seed(1))), **selection)


@pytest.mark.parametrize("family", DECODERS)
def test_an_edit_of_strength_zero_gives_the_same_tokens(family):
    batch, inside = families.ragged_of(family, "left"), families.inside_mlp(families.hooked(family))
    edits = [Edit(site, Scale(1.0)) for site in ("resid_post", "z", "v", "k", inside, "pattern")]
    assert torch.equal(continued(family, batch, *edits), continued(family, batch))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("site", ["resid_post", "z", "v", "k", "mlp_out", "pattern"])
@pytest.mark.parametrize("positions", [[1, -1, 8], "prompt", "generated"], ids=str)
def test_cached_equals_uncached(family, site, positions):
    """Position 8 is a generated token of every row, and -1 the last prompt token."""
    batch, edit = families.ragged("left"), strong(site, positions=positions, layers=[0])
    cached = continued(family, batch, edit)
    assert torch.equal(cached, continued(family, batch, edit, use_cache=False))
    assert site != "resid_post" or not torch.equal(cached, continued(family, batch))


@pytest.mark.parametrize("positions", ["prompt", "generated"])
def test_edits_reach_what_they_name(positions):
    batch = families.ragged("left")
    plain, edited = continued("gpt2", batch), continued("gpt2", batch, strong("resid_post", positions=positions))
    assert torch.equal(edited[:, 0], plain[:, 0]) == (positions == "generated")  # the first token follows the prompt
    assert not torch.equal(edited, plain)


@pytest.mark.parametrize("family", DECODERS)
def test_left_padded_prompts_continue_as_they_do_alone(family):
    batch, edit = families.ragged_of(family, "left"), strong("resid_post", positions=[0, -1, 7], layers=[0])
    together = continued(family, batch, edit)
    for row in range(len(batch)):
        assert torch.equal(together[row], continued(family, families.alone(batch, row), edit)[0])


def test_values_are_given_for_positions_that_come_one_by_one():
    batch = Batch.of(families.tokens(2, 5))
    value = 4 * torch.randn(2, 3, 24, generator=torch.Generator().manual_seed(2))
    edit = Edit("resid_post", Set(value), positions=[4, 5, 6], layers=[0])
    apart = [Edit("resid_post", Set(value[:, [i]]), positions=[4 + i], layers=[0]) for i in range(3)]
    found = continued("llama", batch, edit)
    assert torch.equal(found, continued("llama", batch, *apart))
    assert torch.equal(found, continued("llama", batch, edit, use_cache=False))


def test_beams_take_their_prompts_edit():
    batch = Batch.of(families.tokens(2, 5))
    plain = continued("gpt2", batch, num_beams=3)
    edited = continued("gpt2", batch, strong("resid_post", rows=[1]), num_beams=3)
    assert torch.equal(edited[0], plain[0])
    assert not torch.equal(edited[1], plain[1])
    at = continued("gpt2", batch, strong("resid_post", rows=[1], positions=[-1, 6]), num_beams=3)
    assert torch.equal(at[0], plain[0])


def test_the_plain_backend_generates_the_same_way():
    model = plain_model(PlainConfig.llama_like())
    batch = families.ragged("left")
    batch = Batch.of(batch.tokens % 31, batch.mask)
    edit = Edit("resid_post", Add(torch.randn(16).double()), positions=[0, -1, 8])
    together = model.generate(batch, edits=[edit], max_new_tokens=4)
    assert together.tokens.shape == (3, 11)
    assert together.prompt_columns == 7
    alone = model.generate(Batch.of(batch.tokens[1, batch.mask[1]]), edits=[edit], max_new_tokens=4)
    assert torch.equal(together.tokens[1, 7:], alone.tokens[0, 4:])
    with pytest.raises(SettingError, match=r"settings \['top_k'\]\n  fix: it is greedy"):
        model.generate(batch, top_k=3)


@pytest.mark.parametrize("model", [families.hooked("gpt2"), plain_model(PlainConfig(d_vocab=61))], ids=["hf", "plain"])
def test_a_right_padded_batch_cannot_be_continued(model):
    with pytest.raises(SettingError, match=r"(?s)rows end in padding.*padding_side='left'"):
        model.generate(families.ragged("right"))


@pytest.mark.parametrize("model", [families.hooked("gpt2"), plain_model(PlainConfig(d_vocab=61))], ids=["hf", "plain"])
def test_learned_positions_run_out_with_an_error(model):
    settings = {"max_new_tokens": 5, **({"eos_token_id": None} if model.info.backend == "hf" else {})}
    assert model.generate(Batch.of(families.tokens(1, 60)), **settings).tokens.shape == (1, 65)
    with pytest.raises(SettingError, match="a prompt of 65 tokens\n  found: the model has 64 positions"):
        model.generate(Batch.of(families.tokens(1, 61)), **settings)


def test_settings_that_the_batch_gives_are_refused():
    batch = families.ragged("left")
    for name in ("attention_mask", "return_dict_in_generate"):
        with pytest.raises(SettingError, match=f"generate with {name}"):
            families.hooked("gpt2").generate(batch, **{name: True})
    plain = plain_model(PlainConfig(d_vocab=61))
    with pytest.raises(SettingError, match=r"settings \['do_sample'\]"):
        plain.generate(batch, do_sample=True)
    assert plain.generate(batch, do_sample=False, max_new_tokens=1).tokens.shape == (3, 8)


def test_an_encoder_does_not_generate():
    with pytest.raises(SettingError, match="an encoder does not generate"):
        families.hooked("bert").generate(families.ragged("left"))
