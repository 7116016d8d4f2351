"""The logit lens against the model's own logits and against its formula."""

from __future__ import annotations

from typing import Any

import families
import pytest
import torch
from prompt_cases import model_of, rows_of

import mechattr as ma
from mechattr.decomposition import vocabulary
from mechattr.decomposition.vocabulary import kl, last_stream, pieces, read_out
from mechattr.errors import AnswerError, SettingError, UnknownSiteError
from mechattr.models import Batch
from mechattr.sites import full_name

KINDS = ("gpt2_like", "llama_like", *families.SHAPES)


@pytest.mark.parametrize("kind", KINDS)
def test_the_last_stream_read_out_is_the_model_s_logits_to_the_last_bit(kind: str) -> None:
    model = model_of(kind)
    rows = rows_of(model)
    run = model.run(rows, record=last_stream(model))
    logits = read_out(model, run.activations[last_stream(model)].values).logits
    assert torch.equal(logits[rows.mask], run.logits[rows.mask])


@pytest.mark.parametrize("family", ("gpt2", "llama"))
def test_a_second_final_norm_is_told_apart(family: str) -> None:
    """transformers' last hidden state is after the final norm: read as a stream, it is normed twice."""
    model = families.hooked(family)
    rows = Batch.of(families.tokens())
    with torch.no_grad():
        own = model.model(input_ids=rows.tokens, output_hidden_states=True)
    last = model.run(rows, record=last_stream(model)).activations[last_stream(model)].values
    assert torch.equal(read_out(model, last).logits, own.logits)
    assert not torch.equal(last, own.hidden_states[-1])
    assert not torch.allclose(read_out(model, own.hidden_states[-1]).logits, own.logits, atol=1e-2)


@pytest.mark.parametrize("wrong", ("", "frozen norm"))
@pytest.mark.parametrize("kind", ("gpt2_like", "llama_like"))
def test_streams_are_read_through_the_norm_with_their_own_scale(kind: str, wrong: str) -> None:
    model = model_of(kind)
    rows = rows_of(model)
    result = ma.logit_lens(model, rows, target=5, foil=7, k=3)
    cache = model.run(rows, record=["resid_pre", "resid_post"]).activations
    norm, w_u, b_u = model.norm("ln_final"), model.weight("unembed.W_U"), model.weight("unembed.b_U")
    last = model.run(rows).logits
    for site in result.settings["sites"]:
        x = cache[site].values
        y = norm(x)
        if wrong:
            scale = norm.scale(cache[last_stream(model)].values)[..., None]
            y = norm.centre(x) / scale * norm.weight + (0 if norm.bias is None else norm.bias)
        log_p = (y @ w_u + b_u).log_softmax(-1)
        place = str(ma.sites.Node(*ma.sites.parse(site)).label)
        found = {name: table.sel(site=place).values[rows.mask] for name, table in result.tensors.items()}
        expected = {
            "score/kl": (log_p.exp() * (log_p - last.log_softmax(-1))).sum(-1),
            "score/logit": log_p[..., 5] - log_p[..., 7],
            "score/probability": log_p[..., 5].exp(),
            "score/rank": 1 + (log_p > log_p[..., 5, None]).sum(-1).double(),
            "top/token": log_p.topk(3).indices,
            "top/probability": log_p.topk(3).values.exp(),
        }
        expected = {name: values[rows.mask] for name, values in expected.items()}
        if wrong and site != last_stream(model):
            with pytest.raises(AssertionError):
                torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
        elif not wrong:
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)  # float64 rounding of logits of about 30


def test_the_last_entry_is_the_prediction_and_divergence_is_never_negative() -> None:
    model = model_of("llama_like")
    rows = rows_of(model)
    result = ma.logit_lens(model, rows, target=5)
    divergence = result.scores["kl"].values[rows.mask[:, None].expand(-1, 3, -1)]
    assert bool((divergence >= -1e-14).all())  # float64 rounding of a sum that may be 0
    assert bool((result.scores["kl"].sel(site="L1 resid_post").values[rows.mask] == 0).all())
    assert bool((result.scores["kl"].sel(site="L0 resid_pre").values[rows.mask] > 1e-3).all())
    logits = model.run(rows).logits
    top = result.tensors["top/token"].sel(site="L1 resid_post", rank=1).values
    assert torch.equal(top[rows.mask], logits.argmax(-1)[rows.mask])


def test_a_soft_cap_acts() -> None:
    model = families.hooked("gemma2")
    cap = float(model.config.final_logit_softcapping)
    x = 50 * torch.randn(3, 7, model.info.d_model, generator=torch.Generator().manual_seed(0))
    norm = model.norm("ln_final")
    bare = norm(x) @ model.weight("unembed.W_U")
    logits = read_out(model, x).logits
    torch.testing.assert_close(logits, cap * torch.tanh(bare / cap), rtol=0, atol=1e-4)  # float32, logits up to 30
    assert not torch.allclose(logits, bare, atol=1e-2)


@pytest.mark.parametrize("at_once", (1, 61, 150, 61 * 7))
def test_pieces_change_nothing(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("gpt2_like")
    rows = rows_of(model)
    whole = ma.logit_lens(model, rows, target=5)
    monkeypatch.setattr(vocabulary, "AT_ONCE", at_once)
    assert len(list(pieces(3, 7, model.info.d_vocab))) > 1
    covered = torch.zeros(3, 7)
    for row, column in pieces(3, 7, model.info.d_vocab):
        covered[row, column] += 1
    assert torch.equal(covered, torch.ones(3, 7))
    parted = ma.logit_lens(model, rows, target=5)
    for name, table in whole.tensors.items():
        # float64 rounding of products of other shapes
        torch.testing.assert_close(parted.tensors[name].values, table.values, rtol=0, atol=1e-12, equal_nan=True)


def test_one_position_is_that_column_of_all() -> None:
    model = model_of("gpt2_like")
    rows = rows_of(model)
    every, one = ma.logit_lens(model, rows, target=5), ma.logit_lens(model, rows, target=5, position=-1)
    for name, table in one.tensors.items():
        assert "pos" not in table.axes
        picked = every.tensors[name].values[torch.arange(3), :, rows.lengths - 1]
        torch.testing.assert_close(table.values, picked, rtol=0, atol=1e-12)  # float64 rounding


def test_parts_of_a_block_can_be_read() -> None:
    model = model_of("gpt2_like")
    result = ma.logit_lens(model, rows_of(model), sites=["resid_mid", full_name("resid_pre", 1)])
    assert result.scores["kl"].coords["site"] == ("L0 resid_mid", "L1 resid_pre", "L1 resid_mid")
    after = ma.logit_lens(model, rows_of(model)).scores["kl"].sel(site="L0 resid_post")
    found = result.scores["kl"].sel(site="L1 resid_pre")
    torch.testing.assert_close(found.values, after.values, rtol=0, atol=0, equal_nan=True)


def test_words_are_shown_beside_ids() -> None:
    model = ma.load("tiny")
    result = ma.logit_lens(model, "When Mary and John went to the store, John gave a drink to", k=2)
    frame = result.to_pandas()
    last = frame[(frame["site"] == "L3 resid_post") & (frame["pos"] == 15) & (frame["rank"] == 1)]
    assert list(last["top_token"]) == [" Mary"] and list(last["token"]) == [" to"]


def test_divergence_is_told_from_its_reverse() -> None:
    p, q = torch.tensor([0.9, 0.1]).log(), torch.tensor([0.5, 0.5]).log()
    torch.testing.assert_close(kl(p, q), torch.tensor(0.368064), rtol=0, atol=1e-6)  # .9 ln 1.8 + .1 ln .2 in float32
    assert not torch.isclose(kl(q, p), kl(p, q), atol=1e-3)


def test_wrong_input_is_refused() -> None:
    model = model_of("gpt2_like")
    rows = rows_of(model)

    def lens(**settings: Any) -> None:
        ma.logit_lens(model, rows, **settings)

    with pytest.raises(SettingError, match=r"a lens at 'attn_out'\n  found: blocks.0.hook_attn_out is not a residual"):
        lens(sites="attn_out")
    with pytest.raises(UnknownSiteError, match="this model has no such site"):
        ma.logit_lens(families.hooked("gpt_neox"), Batch.of(families.tokens()), sites="resid_mid")
    with pytest.raises(SettingError, match="k=0\n  found: a vocabulary of"):
        lens(k=0)
    with pytest.raises(SettingError, match="foil=7\n  found: no target"):
        lens(foil=7)
    with pytest.raises(SettingError, match="position 4\n  found: rows of 4 to 7 real tokens"):
        lens(position=4)
    with pytest.raises(AnswerError, match="target 999\n  found: a vocabulary"):
        lens(target=999)
    several = ma.logit_lens(model, rows.rows([0, 1]))
    with pytest.raises(SettingError, match="2 prompts\n  fix: decompose one prompt"):
        several.plot()
    with pytest.raises(SettingError, match="2 prompts\n  fix: read one prompt"):
        ma.draw.lens_table(several)
