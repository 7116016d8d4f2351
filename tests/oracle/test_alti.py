"""ALTI and ALTI-Logit straight from their definitions, and the variants that are wrong (E2, E4, E5, E17, E18)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from typing import Any

import families
import pytest
import torch
from einops import einsum
from patching_cases import PLAIN, plain
from prompt_cases import rows_of
from torch import Tensor

import mechattr as ma
from mechattr.decomposition.mixing import Mixing, mixing, of_row
from mechattr.decomposition.parts import AttentionParts, attention_parts, attention_sites
from mechattr.errors import SettingError, UnsupportedFeatureError
from mechattr.models import Batch
from mechattr.models.plain import plain_model
from mechattr.models.plain_config import PlainConfig

KINDS = ("gpt2_like", "llama_like", *families.SHAPES)
DECODERS = tuple(kind for kind in KINDS if kind not in families.ENCODERS)
INCLUDES = ("attention", "residual", "all")


def model_of(kind: str) -> Any:
    return plain(kind) if kind in PLAIN else families.hooked(kind, torch.float64)


def same(found: Tensor, expected: Tensor, atol: float = 1e-12) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


def by_definition(parts: AttentionParts, wrong: str = "") -> Tensor:
    """C of one prompt from the tensor [head, query, key, d_model] that the package never makes."""
    u, y, n = parts.values()[0], parts.whole[0], parts.whole.shape[1]
    moved = einsum(parts.pattern[0], u, "h q k, k h d -> h q k d").sum(0)
    here = torch.arange(n)
    if wrong != "residual left out":
        moved[here, here] += parts.residual[0]
    if wrong == "bias given to every part":
        moved = moved + parts.bias[0, :, None] / n
    order = 2 if wrong == "L2" else 1
    size, distance = y.norm(order, dim=-1)[:, None], (y[:, None] - moved).norm(order, dim=-1)
    c = size - distance if wrong == "not clipped" else (size - distance).clamp(min=0)
    total = c.sum(-1, keepdim=True)
    return c if wrong == "not normalised" else torch.where(total == 0, torch.eye(n, dtype=c.dtype), c / total)


def parts_of(model: Any, batch: Batch, layer: int = 0) -> AttentionParts:
    sites = set(attention_sites(model, layer))
    cache = model.run(batch, record=[site for site in model.sites() if site in sites]).activations
    return attention_parts(model, cache, layer)


@pytest.mark.parametrize("kind", KINDS)
def test_contributions_are_those_of_the_definition(kind: str) -> None:
    with families.widened():
        model = model_of(kind)
        rows = rows_of(model)
        result = ma.alti(model, rows)
        for layer in range(model.info.n_layers):
            parts = parts_of(model, rows, layer)
            for row, n in enumerate((7, 4, 5)):
                found = result.scores["alti"].sel(batch=row, layer=layer).values[:n, :n]
                same(found, by_definition(of_row(parts, row, n)))  # float64 rounding of a share of 1
    shares = result.scores["alti"].values[0]
    assert int((shares > 1e-3).sum()) > shares.shape[-1] * len(shares)  # more than a share a row


@pytest.mark.parametrize(
    "wrong", ["residual left out", "bias given to every part", "L2", "not clipped", "not normalised"]
)
def test_wrong_definitions_are_told_apart(wrong: str) -> None:
    parts = drawn(torch.zeros(6, 6, dtype=torch.float64))
    with pytest.raises(AssertionError):
        same(mixing(parts).shares, by_definition(parts, wrong), 1e-4)


def from_weights(model: Any, batch: Batch, wrong: str = "") -> Tensor:
    """[query, key] of block 0, from the model's weights and its embedding alone."""
    cache = model.run(batch, record=["resid_pre", "pattern", "attn_out"]).activations
    x, out = cache["resid_pre", 0].values[0], cache["attn_out", 0].values[0]
    w = {name: model.weight(f"blocks.0.attn.{name}") for name in ("W_V", "b_V", "W_O", "b_O")}
    normed = model.norm("blocks.0.ln1")(x)
    repeats = model.info.n_heads // model.info.n_kv_heads
    v = einsum(normed, w["W_V"], "k d, g d e -> k g e") + (0 if wrong == "value bias left out" else w["b_V"])
    v = v.repeat_interleave(repeats, 1) if wrong != "kv heads tiled" else v.repeat(1, repeats, 1)
    u = einsum(v, w["W_O"], "k h e, h e d -> k h d")[None]
    y = x + out
    form = AttentionParts(cache["pattern", 0].values, v[None], w["W_O"], x[None], w["b_O"].expand_as(x)[None], y[None])
    same(form.values(), u)
    return by_definition(form)


@pytest.mark.parametrize("kind", ["gpt2_like", "llama_like"])
def test_contributions_follow_from_the_weights(kind: str) -> None:
    model = model_of(kind)
    batch = rows_of(model).rows([0])
    found = ma.alti(model, batch).scores["alti"].sel(batch=0, layer=0).values
    same(found, from_weights(model, batch))
    for wrong in {"gpt2_like": ["value bias left out"], "llama_like": ["kv heads tiled"]}[kind]:
        with pytest.raises(AssertionError):
            same(found, from_weights(model, batch, wrong), 1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_sum_to_one_and_causal_models_look_back_only(kind: str) -> None:
    with families.widened():
        model = model_of(kind)
        result = ma.alti(model, rows_of(model), rollouts=True)
    for name in ("alti", "rollouts"):
        table = result.scores[name].values[0]
        assert bool((table >= 0).all())
        same(table.sum(-1), torch.ones_like(table.sum(-1)), 1e-14)  # a few float64 roundings of 1
        assert bool(table.triu(1).any()) == model.info.encoder
    for wrong in ("not normalised", "not clipped"):  # controls
        other = by_definition(of_row(parts_of(model, rows_of(model)), 0, 7), wrong)
        assert bool((other < 0).any()) or not torch.allclose(other.sum(-1), torch.ones(7, dtype=other.dtype))
    assert torch.equal(
        result.scores["rollouts"].values[:, -1].nan_to_num(), result.scores["rollout"].values.nan_to_num()
    )


def rolled(shares: Tensor) -> list[Tensor]:
    """M of each layer, by products of matrices."""
    found = [torch.eye(shares.shape[-1], dtype=shares.dtype)]
    for share in shares:
        found.append(share @ found[-1])
    return found


@pytest.mark.parametrize("kind", ["gpt2_like", "llama_like", "gpt_neox"])
@pytest.mark.parametrize("include", INCLUDES)
def test_tokens_are_those_of_the_rollout_by_matrices(kind: str, include: str) -> None:
    with families.widened():
        deep = {"n_layers": 4, "n_heads": 2, "d_model": 8, "d_mlp": 5}
        configs = {
            "gpt2_like": lambda: PlainConfig.gpt2_like(**deep, n_kv_heads=2),
            "llama_like": lambda: PlainConfig.llama_like(**deep, n_kv_heads=1),
        }
        model = plain_model(configs[kind]()) if kind in configs else model_of(kind)
        rows = rows_of(model).rows([0])
        found = ma.alti_logit(model, rows, target=5, foil=7, position=5, include=include)
        shares = ma.alti(model, rows).scores["alti"].values[0]
    each, parts = found.scores["per_layer"].values[0], found.components.sel(batch=0)
    mixed = rolled(shares)

    def expected(wrong: str = "") -> Tensor:
        total = torch.zeros(7, dtype=each.dtype)
        for layer in range(len(each)):
            total += each[layer] @ mixed[layer + (wrong == "a block too many")]
            if include == "all":
                reads = layer + (not model.info.parallel) - (wrong == "MLPs a block below" and layer > 0)
                total += parts.sel(component=f"MLP {layer}").item() * mixed[reads][5]
        if include != "attention":
            total[5] += parts.sel(component="embed").item()
        return total

    same(found.tokens.values[0], expected())
    for wrong in ("a block too many", *(["MLPs a block below"] if include == "all" else [])):
        with pytest.raises(AssertionError):
            same(found.tokens.values[0], expected(wrong), 1e-6)


@pytest.mark.parametrize("kind", DECODERS)
@pytest.mark.parametrize("include", INCLUDES)
def test_the_account_closes(kind: str, include: str) -> None:
    with families.widened():
        model = model_of(kind)
        rows = rows_of(model)
        result = ma.alti_logit(model, rows, target=5, foil=7, include=include)
    parts, ledger, logit = result.components, result.ledger, torch.tensor(result.settings["logit"], dtype=torch.float64)
    assert parts.dtype == torch.float64
    # float64 rounding of logits of up to a hundred
    same(parts.values.sum(-1), logit, 1e-12 if kind in PLAIN else 1e-10)
    entry = {name: ledger.sel(entry=name).values for name in ledger.coords["entry"]}
    same(entry["remainder"], torch.zeros(3, dtype=torch.float64), 1e-12 if kind in PLAIN else 1e-10)
    same(entry["logit"], sum(v for name, v in entry.items() if name not in ("logit", "remainder")))
    same(result.tokens.values.nan_to_num().sum(-1), entry["tokens"])
    named = {"attn": 0, "MLP": 0, "b_O": 0}
    named = {
        name: sum(parts.sel(component=c).values for c in parts.coords["component"] if c.split()[0] == name)
        for name in named
    }
    given = {"attention": [], "residual": [parts.sel(component="embed").values]}
    given["all"] = [*given["residual"], named["MLP"]]
    same(entry["tokens"], named["attn"] + sum(given[include]))
    heads, per_layer = result.scores["heads"].values.nan_to_num(), result.scores["per_layer"].values.nan_to_num()
    same(heads.sum(2), per_layer)
    same(per_layer.sum((1, 2)), named["attn"], 1e-11)


def test_the_logit_is_the_models_own_before_any_cap() -> None:
    model = model_of("gpt2_like")
    rows = rows_of(model)
    result = ma.alti_logit(model, rows, target=5, foil=7)
    own = model.run(rows).logits[torch.arange(3), torch.tensor([6, 3, 4])]
    same(torch.tensor(result.settings["logit"], dtype=torch.float64), own[:, 5] - own[:, 7])
    assert result.settings["model_logit"] == pytest.approx(result.settings["logit"], abs=1e-12)
    gemma = families.hooked("gemma2")
    capped = ma.alti_logit(gemma, rows_of(gemma), target=5).settings
    assert capped["explains"] == "the logit before any cap"
    cap = float(gemma.config.final_logit_softcapping)
    expected = cap * torch.tanh(torch.tensor(capped["logit"]) / cap)
    torch.testing.assert_close(torch.tensor(capped["model_logit"]), expected, rtol=0, atol=1e-4)  # float32 rounding
    assert capped["model_logit"] != pytest.approx(capped["logit"], abs=1e-3)


@pytest.mark.parametrize("wrong", ["b_O left out", "value bias counted twice", "norm bias left out"])
def test_an_account_that_lacks_something_does_not_close(wrong: str) -> None:
    model = model_of("gpt2_like")
    result = ma.alti_logit(model, rows_of(model), target=5, foil=7)
    total, parts = result.components.values.sum(-1), result.components
    logit = torch.tensor(result.settings["logit"], dtype=torch.float64)
    if wrong == "value bias counted twice":
        b_v, w_o = (model.weight(f"blocks.0.attn.{name}") for name in ("b_V", "W_O"))
        once = einsum(b_v, w_o, "h e, h e d -> d")
        direction = model.weight("unembed.W_U")[:, 5] - model.weight("unembed.W_U")[:, 7]
        total = total + once @ direction
    else:
        names = [c for c in parts.coords["component"] if str(c).startswith(wrong.removesuffix(" left out"))]
        total = total - parts.sel(component=names).values.sum(-1)
    with pytest.raises(AssertionError):
        same(total, logit, 1e-4)


@pytest.mark.parametrize("include", INCLUDES)
def test_a_contrast_is_the_difference_of_two_targets(include: str) -> None:
    model = model_of("llama_like")
    rows = rows_of(model)
    both, one, other = (
        ma.alti_logit(model, rows, include=include, **targets)
        for targets in ({"target": 5, "foil": 7}, {"target": 5}, {"target": 7})
    )
    for name in ("tokens", "components", "score/per_layer", "score/heads"):
        found, left, right = (r.tensors[name].values.nan_to_num() for r in (both, one, other))
        same(found, left - right)
        with pytest.raises(AssertionError):
            same(found, left + right, 1e-4)


def layouts() -> list[Any]:
    causal = torch.full((6, 6), -torch.inf, dtype=torch.float64).triu(1)
    window = causal + torch.full((6, 6), -torch.inf, dtype=torch.float64).tril(-3)
    nobody = causal.clone()
    nobody[3:, 2] = -torch.inf
    return [
        pytest.param(mask, id=name)
        for name, mask in {"causal": causal, "both ways": causal * 0, "window": window, "unseen": nobody}.items()
        if not bool(mask.isnan().any())
    ] + [pytest.param(torch.zeros(6, 6, dtype=torch.float64), id="both ways")]


def drawn(mask: Tensor, heads: int = 4, kv_heads: int = 2, width: int = 5) -> AttentionParts:
    """Random parts of one prompt."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    n = len(mask)
    pattern = (noise(1, heads, n, n) + mask).softmax(-1)
    blank = AttentionParts(
        pattern,
        noise(1, n, kv_heads, 3),
        noise(heads, 3, width),
        noise(1, n, width),
        noise(1, n, width),
        noise(1, n, width),
    )
    moved = einsum(blank.pattern, blank.values(), "b h q k, b k h d -> b q d")
    return replace(blank, whole=moved + blank.residual + 0.3 * blank.bias, bias=0.3 * blank.bias)


@pytest.mark.parametrize("mask", layouts())
@pytest.mark.parametrize("heads", [(4, 2), (4, 1), (1, 1)], ids=["groups", "one kv head", "one head"])
def test_neither_pieces_nor_queries_change_contributions(mask: Tensor, heads: tuple[int, int]) -> None:
    parts = drawn(mask, *heads)
    expected = by_definition(parts)
    for piece in (None, 1, 11, 37, 10**6):
        same(mixing(parts, piece=piece).shares, expected)
        for queries in (slice(0, 1), slice(2, 5), slice(5, 6)):
            same(mixing(parts, queries, piece=piece).shares, expected[queries])
    with pytest.raises(AssertionError):
        same(mixing(parts, slice(1, 4)).shares, expected[2:5], 1e-4)


def test_no_tensor_is_as_large_as_heads_times_pairs_times_width(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    real = torch.baddbmm

    def counting(*args: Any, **kwargs: Any) -> Tensor:
        found = real(*args, **kwargs)
        sizes.append(found.numel())
        return found

    monkeypatch.setattr(torch, "baddbmm", counting)
    parts = drawn(torch.full((6, 6), -torch.inf, dtype=torch.float64).triu(1))
    mixing(parts, piece=20)
    assert max(sizes) <= 20 and sum(sizes) < 36 * 5  # pairs that nobody looks at are left out
    mixing(replace(parts, pattern=torch.ones_like(parts.pattern)), piece=20)
    assert sum(sizes) > 36 * 5


@pytest.mark.parametrize("include", INCLUDES)
def test_only_rows_that_the_position_depends_on_are_formed(include: str, monkeypatch: pytest.MonkeyPatch) -> None:
    formed: list[slice] = []

    def counting(parts: AttentionParts, queries: slice) -> Mixing:
        formed.append(queries)
        return mixing(parts, queries)

    monkeypatch.setattr(import_module(ma.alti_logit.__module__), "mixing", counting)
    model = model_of("gpt2_like")  # of two blocks
    ma.alti_logit(model, rows_of(model).rows([0]), target=5, position=4, include=include)
    own_row = [slice(4, 5)] if include == "all" else []  # of the last block
    assert formed == [*own_row, slice(0, 5)]


def clipped_model() -> Any:
    """Attention without norms that writes -3 x_i and nothing else, as its output bias, in block 0 of one."""
    config = PlainConfig.attention_only(
        n_layers=1, n_heads=1, n_kv_heads=1, d_model=2, d_head=2, d_vocab=8, positions="none"
    )
    x = torch.tensor([1.0, -2.0], dtype=torch.float64)
    weights = {
        "embed.W_E": x.repeat(8, 1),
        "blocks.0.attn.W_O": torch.zeros(1, 2, 2, dtype=torch.float64),
        "blocks.0.attn.b_O": -3 * x,
    }
    return plain_model(config, weights)


@pytest.mark.parametrize("length", [1, 4])
def test_a_row_that_is_all_clipped_is_its_own_position(length: int) -> None:
    model = clipped_model()
    batch = Batch.of(torch.full((1, length), 3))
    result = ma.alti(model, batch)
    assert result.settings["all_clipped_rows"] == [length]
    assert torch.equal(result.scores["alti"].values[0, 0], torch.eye(length, dtype=torch.float64))
    mlps = ma.alti_logit(model, batch, target=5, include="all")
    assert bool(mlps.tokens.isfinite().values.all())
    usual = model_of("gpt2_like")
    assert ma.alti(usual, rows_of(usual)).settings["all_clipped_rows"] == [0, 0, 0]


@pytest.mark.parametrize("change", ["heads in another order", "norm and weights scaled jointly", "norm scaled alone"])
def test_what_leaves_the_function_alone_leaves_tokens_alone(change: str) -> None:
    config = PLAIN["gpt2_like"]
    model = plain_model(config)
    weights = {name: model.weight(name) for name in ("blocks.0.ln1.w", "blocks.0.ln1.b")}
    attention = {
        f"blocks.0.attn.{n}": model.weight(f"blocks.0.attn.{n}")
        for n in ("W_Q", "b_Q", "W_K", "b_K", "W_V", "b_V", "W_O")
    }
    if change == "heads in another order":
        weights = {name: x.flip(0) for name, x in attention.items()}
    else:
        scale = torch.linspace(0.5, 2, config.d_model, dtype=torch.float64)
        weights = {name: x * scale for name, x in weights.items()}
        if "jointly" in change:
            weights |= {n: x / scale[:, None] for n, x in attention.items() if n[-3:] in ("W_Q", "W_K", "W_V")}
    other, rows = plain_model(config, weights), rows_of(model)
    found, expected = (ma.alti_logit(m, rows, target=5, foil=7, include="all").tokens.values for m in (other, model))
    check: Callable[[], None] = lambda: torch.testing.assert_close(found, expected, rtol=0, atol=1e-10, equal_nan=True)  # noqa: E731
    if change == "norm scaled alone":
        with pytest.raises(AssertionError):
            check()
    else:
        check()


def test_narrow_models_are_summed_in_float32() -> None:
    model = families.hooked("llama", torch.bfloat16)
    rows = rows_of(model)
    shares = ma.alti(model, rows).scores["alti"]
    assert shares.dtype == torch.float32
    found = shares.sel(batch=0).values
    torch.testing.assert_close(found.sum(-1), torch.ones_like(found.sum(-1)), rtol=0, atol=1e-6)  # float32 rounding
    parts = of_row(parts_of(model, rows), 0, 7)
    torch.testing.assert_close(found[0], by_definition(parts), rtol=0, atol=1e-5)  # float32 sums in another order
    narrow = replace(
        parts, **{name: getattr(parts, name).bfloat16() for name in ("pattern", "v", "w_o", "residual", "whole")}
    )
    with pytest.raises(AssertionError):
        torch.testing.assert_close(found[0], by_definition(narrow).float(), rtol=0, atol=1e-4)


def test_wrong_input_is_refused() -> None:
    model = model_of("gpt2_like")
    with pytest.raises(
        SettingError, match="include='mlp'\n  found: no such choice\n  fix: use one of attention, residual"
    ):
        ma.alti_logit(model, rows_of(model), target=5, include="mlp")
    for kind, found in {"bert": "norms act on the residual stream", "modernbert": "has an activation"}.items():
        encoder = families.hooked(kind)
        with pytest.raises(UnsupportedFeatureError, match=rf"{found}[^\n]*\n  fix: use "):
            ma.alti_logit(encoder, rows_of(encoder), target=5)
