"""Blocks as sums of parts (E1): what the decompositions of all families stand on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import families
import numpy as np
import pytest
import torch
from einops import einsum
from patching_cases import plain

from mechattr.decomposition.parts import AttentionParts, attention_parts, attention_sites, mlp_parts, mlp_sites
from mechattr.decomposition.prompt import prompt_of, right_padded
from mechattr.decomposition.readout import readout
from mechattr.decomposition.target import target_of
from mechattr.errors import AnswerError, SettingError, UnsupportedFeatureError
from mechattr.models import Batch, HookedHF
from mechattr.sites import full_name

KINDS = ("gpt2_like", "llama_like", *families.SHAPES)


def model_of(kind: str) -> Any:
    return plain(kind) if kind in ("gpt2_like", "llama_like") else families.hooked(kind, torch.float64)


def rows_of(model: Any, side: str = "right") -> Batch:
    batch = families.ragged(side)
    return Batch.of(batch.tokens % model.info.d_vocab, batch.mask)


def added(parts: AttentionParts) -> torch.Tensor:
    return einsum(parts.pattern, parts.values(), "b h q k, b k h d -> b q d") + parts.residual + parts.bias


@pytest.mark.parametrize("kind", KINDS)
def test_the_parts_of_a_block_add_up_to_its_output(kind: str) -> None:
    with families.widened():
        model = model_of(kind)
        batch = rows_of(model)
        for layer in range(model.info.n_layers):
            sites = {*attention_sites(model, layer), *mlp_sites(model, layer)}
            cache = model.run(batch, record=[s for s in model.sites() if s in sites]).activations
            parts, mlp = attention_parts(model, cache, layer), mlp_parts(model, cache, layer)
            # float64 rounding of sums of a few hundred products
            torch.testing.assert_close(added(parts)[batch.mask], parts.whole[batch.mask], rtol=0, atol=1e-10)
            total = mlp.written + mlp.residual + mlp.bias
            torch.testing.assert_close(total[batch.mask], mlp.whole[batch.mask], rtol=0, atol=1e-10)
            u = torch.randn(len(batch), model.info.d_model, dtype=torch.float64)
            slow = einsum(parts.values(), u, "b k h d, b d -> b k h")
            torch.testing.assert_close(parts.along(u), slow, rtol=0, atol=1e-10)


@pytest.mark.parametrize("wrong", ["b_O left out", "value bias counted twice", "norm behind attention left out"])
def test_parts_that_lack_something_do_not_add_up(wrong: str) -> None:
    model = model_of("gemma2" if "norm" in wrong else "gpt2_like")
    cache = model.run(rows_of(model), record=attention_sites(model, 0)).activations
    parts = attention_parts(model, cache, 0)
    torch.testing.assert_close(added(parts), parts.whole, rtol=0, atol=1e-4)
    if wrong == "b_O left out":
        parts = replace(parts, bias=parts.bias * 0)
    elif "twice" in wrong:
        parts = replace(parts, v=parts.v + model.weight("blocks.0.attn.b_V"))
    else:
        parts = replace(parts, w_o=model.weight("blocks.0.attn.W_O"), pattern=cache["pattern", 0].values)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(added(parts), parts.whole, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in families.ENCODERS])
@pytest.mark.parametrize("foil", [None, 7])
def test_the_read_out_is_the_logit_before_any_cap(kind: str, foil: int | None) -> None:
    with families.widened():
        model = model_of(kind)
        prompt = prompt_of(model, rows_of(model, "left"))
        target = target_of(model, prompt, 5, foil, position=2)
        last = full_name("resid_post", model.info.n_layers - 1)
        run = model.run(prompt.batch, record=[last])
        final = target.at(run.activations[last].values)
        read = readout(model, target, final)
        found = read.of(final) + read.norm_bias + read.head_bias
        expected = target.metric(run.logits, prompt.batch)
        if kind == "gemma2":  # the families' cap on logits: c tanh(x / c)
            cap = float(model.config.final_logit_softcapping)
            each = [readout(model, target_of(model, prompt, t, position=2), final).of(final) for t in (5, foil) if t]
            found = sum(sign * cap * torch.tanh(x / cap) for sign, x in zip((1, -1), each, strict=False))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)  # float64 rounding


def test_prompts_are_padded_on_the_right_whatever_comes_in() -> None:
    left, right = families.ragged("left"), families.ragged("right")
    again = right_padded(left)
    assert torch.equal(again.mask, right.mask) and torch.equal(again.tokens[again.mask], right.tokens[right.mask])
    assert right_padded(right) is right


def test_targets_are_refused_with_what_was_found() -> None:
    model = families.hooked("llama")
    model = HookedHF(model.model, tokenizer=families.tokenizer())
    prompt = prompt_of(model, "a b a")
    texts = {
        " a b": (AnswerError, r"target ' a b' as one token\n  found: 2 tokens: ' a', ' b'\n  fix: give one token"),
        99: (AnswerError, r"target 99\n  found: a vocabulary of 61 tokens"),
        1.5: (SettingError, "a float"),
        True: (SettingError, "a bool"),
    }
    for target, (kind, text) in texts.items():
        with pytest.raises(kind, match=text):
            target_of(model, prompt, target)
    whole = target_of(model, prompt, np.int64(5), torch.tensor(7), position=np.int64(2))  # of numpy and torch
    assert (whole.ids.tolist(), whole.foils.tolist(), whole.columns.tolist()) == ([5], [7], [2])
    with pytest.raises(AnswerError, match="both are token 5"):
        target_of(model, prompt, 5, " a")
    with pytest.raises(SettingError, match="position 9\n  found: rows of 4 to 4 real tokens"):
        target_of(model, prompt, 5, position=9)
    with pytest.raises(SettingError, match="2 for 1 prompts"):
        target_of(model, prompt, [5, 6])
    with pytest.raises(SettingError, match="a prompt\n  found: a int"):
        prompt_of(model, 3)
    with pytest.raises(UnsupportedFeatureError, match="an encoder-decoder model"):
        prompt_of(families.hooked("t5"), families.batch_of("t5", families.tokens()))
    bert = families.hooked("bert")
    rows = prompt_of(bert, Batch.of(families.tokens()))
    with pytest.raises(UnsupportedFeatureError, match=r"fix: use ma.lrp\(..., variant=\"cp\"\)"):
        readout(bert, target_of(bert, rows, 5), torch.zeros(3, bert.info.d_model))
