"""Direct logit attribution against the streams themselves, every share written out by hand once more (E3)."""

from __future__ import annotations

from typing import Any

import families
import pytest
import torch
from einops import einsum
from prompt_cases import model_of, rows_of

import mechattr as ma
from mechattr.decomposition import Decomposition, prompt_of, readout, target_of
from mechattr.errors import UnsupportedFeatureError
from mechattr.sites import full_name

ATOL = 1e-12  # float64 rounding of sums of a few dozen shares of at most 30


def attributed(model: Any, **settings: Any) -> Decomposition:
    return ma.direct_logit_attribution(model, rows_of(model), **{"target": 5, **settings})


def exact(result: Decomposition, setting: str) -> torch.Tensor:
    return torch.tensor(result.settings[setting], dtype=torch.float64)


def shares(result: Decomposition, *starts: str) -> torch.Tensor:
    """The sum over components whose names begin with one of these."""
    names = [str(name) for name in result.components.coords["component"]]
    return result.components.sel(component=[name for name in names if name.startswith(starts)]).values.sum(-1)


def logits_of(model: Any, tokens: list[int], position: int = -1) -> torch.Tensor:
    batch = rows_of(model)
    logits = model.run(batch).logits[torch.arange(len(batch)), batch.columns(position)]
    return logits[:, tokens]


@pytest.mark.parametrize("kind", ("gpt2_like", "llama_like"))
@pytest.mark.parametrize("position", (-1, 2))
def test_components_sum_to_the_model_s_logit(kind: str, position: int) -> None:
    model = model_of(kind)
    result = attributed(model, foil=7, position=position)
    five, seven = logits_of(model, [5, 7], position).unbind(1)
    torch.testing.assert_close(result.components.values.sum(-1), five - seven, rtol=0, atol=ATOL)
    torch.testing.assert_close(exact(result, "model_logit"), five - seven, rtol=0, atol=ATOL)
    assert max(map(abs, result.settings["remainder"])) < ATOL  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ("gpt2_like", "llama_like"))
def test_a_contrast_is_the_difference_of_two_results(kind: str) -> None:
    model = model_of(kind)
    both, first, second = attributed(model, foil=7), attributed(model), attributed(model, target=7)
    for name, table in both.tensors.items():
        difference = first.tensors[name].values - second.tensors[name].values
        torch.testing.assert_close(table.values, difference, rtol=0, atol=ATOL, equal_nan=True)


def test_finer_tables_sum_to_coarser_ones() -> None:
    result = attributed(model_of("gpt2_like"), foil=7)
    heads = result.scores["heads"].values
    torch.testing.assert_close(result.scores["head_source"].values.nan_to_num().sum(-1), heads, rtol=0, atol=ATOL)
    for layer in range(heads.shape[1]):
        torch.testing.assert_close(shares(result, f"L{layer}H"), heads[:, layer].sum(-1), rtol=0, atol=ATOL)
        neurons = result.scores["neurons"].values[:, layer].sum(-1)
        torch.testing.assert_close(shares(result, f"MLP {layer}"), neurons, rtol=0, atol=ATOL)


@pytest.mark.parametrize("wrong", ("", "own norm", "norm bias dropped", "b_O in the heads"))
def test_shares_are_those_of_what_was_written(wrong: str) -> None:
    """Each share again from what was recorded; the named wrong ways to do it are told apart."""
    model = model_of("gpt2_like")
    prompt = prompt_of(model, rows_of(model))
    target = target_of(model, prompt, 5, 7)
    cache = model.run(prompt.batch, record=model.sites()).activations
    final = target.at(cache[full_name("resid_post", 1)].values)
    read, result = readout(model, target, final), attributed(model, foil=7)

    def of(written: torch.Tensor) -> torch.Tensor:
        at = target.at(written)
        return (readout(model, target, at) if wrong == "own norm" else read).of(at)

    expected = {"embed": of(cache["embed"].values), "pos_embed": of(cache["pos_embed"].values)}
    for layer in range(2):
        w_o, b_o = (model.weight(f"blocks.{layer}.attn.{name}_O") for name in "Wb")
        each = einsum(cache["z", layer].values, w_o, "b p h e, h e d -> h b p d")
        each = each + b_o / len(each) if wrong == "b_O in the heads" else each
        expected |= {f"L{layer}H{head}": of(written) for head, written in enumerate(each)}
        expected[f"b_O {layer}"] = read.of(b_o.expand(3, -1))
        w_out, b_out = (model.weight(f"blocks.{layer}.mlp.{name}_out") for name in "Wb")
        expected[f"MLP {layer}"] = of(cache["mlp_post", layer].values @ w_out)
        expected[f"b_out {layer}"] = read.of(b_out.expand(3, -1))
    bias = read.norm_bias * 0 if wrong == "norm bias dropped" else read.norm_bias
    expected |= {"norm bias": bias, "unembed bias": read.head_bias}
    found = {name: result.components.sel(component=name).values for name in expected}
    assert set(found) == set(result.components.coords["component"])
    if wrong:
        with pytest.raises(AssertionError):
            torch.testing.assert_close(found, expected, rtol=0, atol=ATOL)
    else:
        torch.testing.assert_close(found, expected, rtol=0, atol=ATOL)


def test_norms_on_what_is_written_are_held_fixed() -> None:
    """Gemma-2: neurons and heads go through the frozen norms behind them; without them they do not add up."""
    with families.widened():
        model = families.hooked("gemma2", torch.float64)
        result = attributed(model, foil=7)
        total = result.components.values.sum(-1)
        torch.testing.assert_close(total, exact(result, "logit"), rtol=0, atol=1e-10)
        prompt = prompt_of(model, rows_of(model))
        target = target_of(model, prompt, 5, 7)
        cache = model.run(prompt.batch, record=["mlp_post", "resid_post"]).activations
        read = readout(model, target, target.at(cache["resid_post", 1].values))
        bare = read.of(target.at(cache["mlp_post", 0].values @ model.weight("blocks.0.mlp.W_out")))
        with pytest.raises(AssertionError):
            torch.testing.assert_close(shares(result, "MLP 0"), bare, rtol=0, atol=1e-3)


def test_a_soft_cap_is_left_out() -> None:
    with families.widened():
        model = families.hooked("gemma2", torch.float64)
        cap = float(model.config.final_logit_softcapping)
        result = attributed(model)
        assert result.settings["explains"] == "the logit before any cap"
        before = exact(result, "logit")
        after = exact(result, "model_logit")
        torch.testing.assert_close(cap * torch.tanh(before / cap), after, rtol=0, atol=1e-10)  # float64 rounding
        assert not torch.allclose(before, after, atol=1e-3)


def test_models_without_an_additive_stream_are_refused() -> None:
    for family, words in (("bert", "norms act on the residual stream itself"), ("modernbert", "not linear in the")):
        with pytest.raises(UnsupportedFeatureError, match=words):
            attributed(families.hooked(family))


def test_a_mixture_of_experts_is_one_component_a_layer() -> None:
    model = families.hooked("mixtral")
    result = attributed(model, foil=7)
    assert "neurons" not in result.scores and "MLP 1" in result.components.coords["component"]


def test_position_embeddings_are_apart_where_they_are_added() -> None:
    with_positions, without = attributed(model_of("gpt2_like")), attributed(families.hooked("mistral"))
    assert list(with_positions.components.coords["component"])[:2] == ["embed", "pos_embed"]
    kinds = {str(name).split()[0] for name in without.components.coords["component"]}
    assert kinds == {"embed", "MLP", *(f"L{layer}H{head}" for layer in range(2) for head in range(4))}
