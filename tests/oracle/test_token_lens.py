"""The token lens against its formula, and its sum against the whole of what attention writes."""

from __future__ import annotations

from typing import Any

import families
import pytest
import torch
from einops import einsum
from prompt_cases import model_of, rows_of

import mechattr as ma
from mechattr.decomposition import Lens, target_of
from mechattr.decomposition.prompt import prompt_of
from mechattr.errors import SettingError, UnknownNameError
from mechattr.sites import full_name

ATOL = 1e-12  # float64 rounding of sums of a few hundred products
PARTITION = {"first": [0], "last": [-1], "between": [1, 2]}  # of rows of 4 tokens


def lens(model: Any, **settings: Any) -> Lens:
    return ma.token_lens(model, rows_of(model), **{"target": 5, "foil": 7, **settings})


@pytest.mark.parametrize("kind", ("gpt2_like", "llama_like", "gemma2", "gpt_neox", "olmo2"))
def test_all_sources_sum_to_what_attention_writes(kind: str) -> None:
    with families.widened():
        model = families.hooked(kind, torch.float64) if kind in families.SHAPES else model_of(kind)
        result = lens(model)
        total = result.scores["source"].values.nan_to_num().sum(-1)
        expected = result.scores["attention"].values - result.scores["bias"].values
        torch.testing.assert_close(total, expected, rtol=0, atol=1e-10)


def test_a_partition_sums_too_and_an_overlap_is_told_apart() -> None:
    model = model_of("gpt2_like")
    rows = rows_of(model).rows([1])  # 4 tokens
    whole = ma.token_lens(model, rows, target=5)
    expected = (whole.scores["attention"] - whole.scores["bias"]).values
    parted = ma.token_lens(model, rows, target=5, sources=PARTITION)
    torch.testing.assert_close(parted.scores["source"].values.sum(-1), expected, rtol=0, atol=ATOL)
    overlapping = ma.token_lens(model, rows, target=5, sources={**PARTITION, "again": [0]})
    with pytest.raises(AssertionError):
        torch.testing.assert_close(overlapping.scores["source"].values.sum(-1), expected, rtol=0, atol=ATOL)
    own = ma.token_lens(model, rows, target=5, sources=PARTITION, norm="own")
    with pytest.raises(AssertionError):
        own_whole = (own.scores["attention"] - own.scores["bias"]).values
        torch.testing.assert_close(own.scores["source"].values.sum(-1), own_whole, rtol=0, atol=ATOL)


@pytest.mark.parametrize("norm", ("frozen", "own"))
@pytest.mark.parametrize("wrong", ("", "no weight of the norm", "not centred", "bias of the values left out"))
def test_updates_are_decoded_through_the_norm(norm: str, wrong: str) -> None:
    model = model_of("gpt2_like")
    prompt = prompt_of(model, rows_of(model))
    target = target_of(model, prompt, 5, 7)
    result = lens(model, norm=norm, sources={"S": [0, 2]}, k=2)
    cache = model.run(prompt.batch, record=["pattern", "v", "resid_post"]).activations
    final = target.at(cache[full_name("resid_post", 1)].values)
    ln, w_u = model.norm("ln_final"), model.weight("unembed.W_U")
    for layer in range(2):
        v = cache["v", layer].values
        v = v - model.weight(f"blocks.{layer}.attn.b_V") if wrong == "bias of the values left out" else v
        pattern = target.at(cache["pattern", layer].values.transpose(1, 2))[:, :, [0, 2]]
        u = einsum(pattern, v[:, [0, 2]], model.weight(f"blocks.{layer}.attn.W_O"), "b h k, b k h e, h e d -> b d")
        x = u if wrong == "not centred" else ln.centre(u)
        x = x if wrong == "no weight of the norm" else x * ln.weight
        logits = x / ln.scale(final if norm == "frozen" else u)[:, None] @ w_u
        found = {"score/source": result.scores["source"].values[:, layer, 0]}
        found |= {name: result.tensors[f"top/{name}"].values[:, layer, 0] for name in ("logit", "token")}
        top = logits.topk(2)
        expected = {"score/source": logits[:, 5] - logits[:, 7], "logit": top.values, "token": top.indices}
        if wrong:
            with pytest.raises(AssertionError):
                torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
        else:
            torch.testing.assert_close(found, expected, rtol=0, atol=ATOL)


def test_frozen_shares_are_those_of_direct_attribution() -> None:
    model = model_of("llama_like")
    found, direct = lens(model), ma.direct_logit_attribution(model, rows_of(model), target=5, foil=7)
    heads = direct.scores["head_source"].sum("head")
    torch.testing.assert_close(found.scores["source"].values, heads.values, rtol=0, atol=ATOL, equal_nan=True)


def test_words_are_shown() -> None:
    model = ma.load("tiny")
    result = ma.token_lens(model, "When Mary and John went to the store, John gave a drink to", target=" Mary", k=1)
    frame = result.to_pandas("top/logit")
    row = frame[(frame["layer"] == 3) & (frame["pos"] == 1)].iloc[0]
    assert (row["token"], row["top_token"]) == (" Mary", " Mary")
    assert len(result.to_pandas("top/token")) == len(frame)


def test_wrong_input_is_refused() -> None:
    model = model_of("gpt2_like")
    with pytest.raises(UnknownNameError, match="norm='final'\n  found: no such scale"):
        lens(model, norm="final")
    with pytest.raises(SettingError, match=r"sources={'S': \[\]}\n  found: no positions by name\n  fix: name some"):
        lens(model, sources={"S": []})
    for sources in ([3, 4], {"S": 3}):
        with pytest.raises(SettingError, match="found: no positions by name"):
            lens(model, sources=sources)
    with pytest.raises(SettingError, match="position='END'\n  found: str"):
        lens(model, sources={"S": ["END"]})
    with pytest.raises(SettingError, match="position 4\n  found: rows of 4 to 7 real tokens"):
        lens(model, sources={"S": [4]})
    with pytest.raises(SettingError, match="k=0"):
        lens(model, k=0)
