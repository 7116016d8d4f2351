"""The QK fix against explicit softmaxes, against the model itself, and against exact patching where they must agree."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from patching_cases import all_nodes, bigness, exact_effects, hf, means, pairs_task, plain, repadded, values
from star_cases import estimates, full_gradients
from torch import Tensor

import mechattr as ma
from mechattr.models.base import AttentionForm
from mechattr.models.plain import plain_model
from mechattr.models.plain_config import PlainConfig
from mechattr.patching.qk import Attended, attended, fix_of, key_effects, key_moves, output_change
from mechattr.sites import Node

MODES = ("aligned", "named", "all")
B, T, H, KV, D = 2, 6, 4, 2, 3
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "softcap": {"softcap": 2.0},
    "sinks": {"sinks": True},
    "softcap and sinks": {"softcap": 1.5, "sinks": True},
    "window": {"window": 3},
    "left padding": {"padding": True},
    "large": {"size": 12.0},
}
ROUNDING = {"rtol": 1e-12, "atol": 1e-12}  # float64 rounding over a few dozen operations


def logits(form: AttentionForm, q: Tensor, k: Tensor) -> Tensor:
    """Of one row, by hand: q [d], k [key, d]."""
    found = (
        torch.stack([sum((a * b for a, b in zip(q, key, strict=True)), torch.zeros(())) for key in k]) * form.scaling
    )
    return found if form.softcap is None else torch.tanh(found / form.softcap) * form.softcap


def softmax(row: Tensor, seen: Tensor, sink: Tensor | None) -> Tensor:
    """Over the keys that are seen, and the sink."""
    e = torch.where(seen, (row - row.max()).exp(), 0.0)
    return e / (e.sum() + (0.0 if sink is None else (sink - row.max()).exp()))


def layer(
    *, softcap: float | None = None, sinks: bool = False, window: int = T, padding: bool = False, size: float = 2.0
) -> Any:
    """A random layer: its form, activations at the base and at the source run, which keys a row sees, gradient at z."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    form = AttentionForm(0.7, softcap, 2 * draw(H) if sinks else None)
    q, q2, k, k2 = (size * draw(B, T, n, D) for n in (H, H, KV, KV))
    k2[:, 1], q2[0, 2] = k[:, 1], q[0, 2]  # some do not move
    real = torch.ones(B, T, dtype=torch.bool)
    if padding:
        real[1, :2] = False
    i, j = torch.arange(T)[:, None], torch.arange(T)
    seen = ((j <= i) & (i - j < window)) & real[:, None, :] & real[:, :, None]
    return (
        form,
        {"rot_q": q, "rot_k": k, "v": draw(B, T, KV, D)},
        {"rot_q": q2, "rot_k": k2},
        seen,
        draw(B, T, H, D),
        real,
    )


def row_pattern(form: AttentionForm, q: Tensor, k: Tensor, seen: Tensor, head: int) -> Tensor:
    return softmax(logits(form, q, k), seen, None if form.sinks is None else form.sinks[head])


def with_scores(form: AttentionForm, base: dict[str, Tensor], seen: Tensor) -> dict[str, Tensor]:
    """The base run with its scores and z, row by row."""
    scores = torch.full((B, H, T, T), torch.finfo(torch.float64).min, dtype=torch.float64)
    z = torch.zeros(B, T, H, D, dtype=torch.float64)
    for b in range(B):
        for h in range(H):
            for i in range(T):
                q, k, v = (base[n][b, ..., h // ((n != "rot_q" and H // KV) or 1), :] for n in ("rot_q", "rot_k", "v"))
                scores[b, h, i, seen[b, i]] = logits(form, q[i], k)[seen[b, i]]
                if bool(seen[b, i].any()):
                    z[b, i, h] = row_pattern(form, q[i], k, seen[b, i], h) @ v
    return {**base, "attn_scores": scores, "z": z}


def by_hand(
    form: AttentionForm, base: dict[str, Tensor], moved: dict[str, Tensor], seen: Tensor, g: Tensor, wrong: str = ""
) -> tuple[Tensor, Tensor]:
    """Effects of every query and every key, one explicit softmax each; `wrong` names a mistake to make on purpose."""
    queries = torch.zeros(B, T, H, dtype=torch.float64)
    keys = torch.zeros(B, T, KV, dtype=torch.float64)
    for b in range(B):
        for h in range(H):
            kv = h // (H // KV)
            k, v = base["rot_k"][b, :, kv], base["v"][b, :, kv]
            for i in range(T):
                if not bool(seen[b, i].any()):
                    continue
                q, slope = base["rot_q"][b, i, h], v @ g[b, i, h]
                before = row_pattern(form, q, k, seen[b, i], h)
                other = row_pattern(form, moved["rot_q"][b, i, h], k, seen[b, i], h)
                queries[b, i, h] = (other - before) @ slope
                start = other if wrong == "keys from the pattern of the moved query" else before
                for t in range(T):
                    one = k.clone()
                    one[t] = moved["rot_k"][b, t, kv]
                    if wrong == "all keys at once":
                        one = moved["rot_k"][b, :, kv]
                    keys[b, t, kv] += (row_pattern(form, q, one, seen[b, i], h) - start) @ slope
    if wrong == "no sum over the group":
        keys = keys / (H // KV)
    return queries, keys


@pytest.mark.parametrize("case", CASES)
def test_the_closed_form_is_the_softmax_with_one_query_or_key_moved(case: str) -> None:
    form, base, moved, seen, g, real = layer(**CASES[case])
    base = with_scores(form, base, seen)
    fix = fix_of(form, base, moved, real=None if bool(real.all()) else real, places=None)
    queries, keys = by_hand(form, base, moved, seen, g)
    close = 1e-10 if case == "large" else 1e-12  # rounding of logits, of which some are several hundred
    torch.testing.assert_close(fix.of_queries(g), queries, rtol=close, atol=close)
    torch.testing.assert_close(fix.of_keys(g), keys, rtol=close, atol=close)
    assert bool((fix.of_keys(g)[:, 1] == 0).all()) and bool((fix.of_queries(g)[0, 2] == 0).all())


@pytest.mark.parametrize(
    "wrong", ("keys from the pattern of the moved query", "all keys at once", "no sum over the group")
)
def test_the_check_of_the_closed_form_rejects(wrong: str) -> None:
    form, base, moved, seen, g, _ = layer()
    base = with_scores(form, base, seen)
    found = fix_of(form, base, moved, real=None, places=None).of_keys(g)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(found, by_hand(form, base, moved, seen, g, wrong)[1], **ROUNDING)


@pytest.mark.parametrize("without", ("softcap", "sinks"))
def test_a_form_without_its_softcap_or_sinks_is_another_one(without: str) -> None:
    form, base, moved, seen, g, _ = layer(softcap=1.5, sinks=True)
    base = with_scores(form, base, seen)
    other = AttentionForm(
        form.scaling, None if without == "softcap" else form.softcap, None if without == "sinks" else form.sinks
    )
    right, wrong = (fix_of(f, base, moved, real=None, places=None).of_keys(g) for f in (form, other))
    assert float((right - wrong).abs().max()) > 0.01


def saturated(delta: float, dtype: torch.dtype) -> tuple[Attended, Tensor, Tensor, Tensor, Tensor]:
    """One row with logits (30, 0, 0), of which the first moves by `delta`, computed in float64 and then rounded."""
    p = torch.tensor([30.0, 0.0, 0.0], dtype=torch.float64).softmax(0)
    v = torch.tensor([[1.0, 2.0], [-1.0, 0.5], [0.3, -2.0]], dtype=torch.float64)
    g = torch.tensor([0.7, -1.3], dtype=torch.float64)
    change = torch.zeros(3, dtype=torch.float64)
    change[0] = delta
    after = torch.tensor([30.0 + delta, 0.0, 0.0], dtype=torch.float64).softmax(0)
    others = ((after - p)[1:, None] * (v[1:] - v[0])).sum(0)  # no difference of numbers near 1
    score, value, change, slope, z = (
        x.to(dtype).reshape(1, 1, -1, x.shape[-1]) for x in (p.log(), v, change, g, p @ v)
    )
    return attended(AttentionForm(1.0), score, value, None), change, slope, z, g @ others


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=str)
@pytest.mark.parametrize("delta", (-60.0, -30.0, -1.0, -0.01, 0.01, 5.0, 90.0, 500.0))
def test_a_key_that_holds_the_whole_row_keeps_its_digits(delta: float, dtype: torch.dtype) -> None:
    at, change, g, z, expected = saturated(delta, dtype)
    # a few units of rounding, relative to the effect itself, which is a difference of exponents up to 60
    close = 1e-12 if dtype == torch.float64 else 1e-5
    found = key_effects(key_moves(at, change), g, z, at.value)[0, 0, 0]
    assert found.item() == pytest.approx(expected.item(), rel=close, abs=0)
    query = (output_change(at, change) * g).sum()
    # p' - p of the other keys is a hundredth of p where the key moves by a hundredth
    assert query.item() == pytest.approx(expected.item(), rel=100 * close, abs=0)


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=str)
def test_the_naive_closed_form_loses_them(dtype: torch.dtype) -> None:
    at, change, g, z, expected = saturated(-30.0, dtype)
    u = at.pattern * torch.expm1(change)
    naive = (u / (1 + u) * (g @ (at.value - z).mT))[0, 0, 0, 0].item()
    assert naive != pytest.approx(expected.item(), rel=1e-5)
    plain = (at.pattern * change * (g @ (at.value - z).mT))[0, 0, 0, 0].item()  # the tangent
    assert abs(plain) < 1e-6 * abs(expected.item())


def test_where_nothing_moves_every_effect_is_exactly_zero() -> None:
    for case in CASES.values():
        form, base, _, seen, g, real = layer(**case)
        base = with_scores(form, base, seen)
        for places in (None, torch.ones(B, 1, T, dtype=torch.bool)):
            fix = fix_of(form, base, {n: base[n].clone() for n in ("rot_q", "rot_k")}, real=real, places=places)
            assert bool((fix.of_queries(g) == 0).all()) and bool((fix.of_keys(g) == 0).all())


@pytest.mark.parametrize("positions", MODES)
@pytest.mark.parametrize("kind", ("gpt2_like", "llama_like"))
def test_it_is_what_the_model_does_at_z(kind: str, positions: str) -> None:
    """The move of z is measured by running the model with the query or key replaced; only what reads z is linear."""
    model = plain(kind)
    task = pairs_task(model)
    nodes = all_nodes(model, task, ("q", "k", "rot_q", "rot_k"), positions)[::3]
    for direction in ("noising", "denoising"):
        how: dict[str, Any] = {"positions": positions, "direction": direction}
        found = ma.attribution_patching(model, task, sites=("q", "k", "rot_q", "rot_k"), variant="qk", **how)
        effects = estimates(model, task, nodes, full_gradients(model, task), fix=True, **how)
        torch.testing.assert_close(values(found, nodes), means(effects), rtol=0, atol=1e-10)  # float64 rounding
        assert not torch.allclose(
            means(estimates(model, task, nodes, full_gradients(model, task), fix=False, **how))[1], means(effects)[1]
        )


@pytest.mark.parametrize("side", ("right", "left"))
@pytest.mark.parametrize(
    "family",
    (
        "gpt2",
        "llama",
        "mistral",
        "qwen3",
        "gemma2",
        "gpt_neox",
        "bert",
        "opt",
        "bloom",
        "falcon_alibi",
        "gpt_neo",
        "gpt_oss",
    ),
)
def test_it_is_what_transformers_models_do_at_z(family: str, side: str) -> None:
    """Softcap, sinks, sliding windows, grouped queries, query norms, ALiBi, padding: all that attention does."""
    model = hf(family)
    task = pairs_task(model, (5, 7))
    for positions in ("named", "all"):
        nodes = [n for n in all_nodes(model, task, ("q", "k"), positions) if n.head in (0, 1)]
        found = values(
            ma.attribution_patching(model, repadded(task, side), sites=("q", "k"), positions=positions, variant="qk"),
            nodes,
        )
        slow = means(estimates(model, task, nodes, full_gradients(model, task), fix=True, positions=positions))
        # float32 rounding, relative to logits and to estimates larger than they are
        torch.testing.assert_close(
            found, slow, rtol=0, atol=1e-5 * bigness(model, task) * max(1.0, float(slow[0].max()))
        )


def test_control_without_its_sinks_a_model_is_another_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model = hf("gpt_oss")
    task = pairs_task(model)
    right = ma.attribution_patching(model, task, sites=("q", "k"), variant="qk")
    forms = {layer: AttentionForm(model.attention(layer).scaling) for layer in range(model.info.n_layers)}
    assert all(model.attention(layer).sinks is not None for layer in forms)
    monkeypatch.setattr(model, "_forms", forms)
    wrong = ma.attribution_patching(model, task, sites=("q", "k"), variant="qk")
    for name, table in right.tensors.items():
        assert float((table.values - wrong.tensors[name].values).abs().max()) > 1e-3 * float(table.values.abs().max())


@pytest.mark.parametrize("positions", MODES)
@pytest.mark.parametrize("sizes", ({}, {"n_kv_heads": 2}), ids=("heads", "grouped"))
def test_in_one_attention_layer_it_is_exact(sizes: dict[str, int], positions: str) -> None:
    model = plain_model(PlainConfig.attention_only(n_layers=1, **sizes))
    task = pairs_task(model, changed=(1, 2, 4))
    exact = ma.activation_patching(model, task, sites=("q", "k"), positions=positions)
    found = ma.attribution_patching(model, task, sites=("q", "k"), positions=positions, variant="qk")
    plainly = ma.attribution_patching(model, task, sites=("q", "k"), positions=positions, variant="atp")
    for name, table in exact.tensors.items():
        torch.testing.assert_close(found.tensors[name].values, table.values, rtol=0, atol=1e-10)  # float64 rounding
        assert not torch.allclose(plainly.tensors[name].values, table.values)


@pytest.mark.parametrize("dtype", ("float64", "float32"))
def test_saturated_attention_is_seen(dtype: str) -> None:
    """A query at score 30 for one key and 0 for others moves to another key; a key at score 30 moves to 0."""
    config = PlainConfig.attention_only(
        n_layers=1, n_heads=1, n_kv_heads=1, d_model=6, d_head=4, d_vocab=9, positions="none"
    )
    weights = {name: torch.zeros_like(x) for name, x in plain_model(config)._weights.items()}
    for token, axis in {5: 0, 6: 1, 7: 2, 8: 3}.items():
        weights["embed.W_E"][token, axis] = 1.0
    root = (30 * 2.0) ** 0.5  # scores are products over 2, the root of the width
    query, key = weights["blocks.0.attn.W_Q"][0], weights["blocks.0.attn.W_K"][0]
    key[0, 0], key[1, 1] = root, root
    query[2, 0], query[3, 1] = root, root  # token 7 looks for token 5, and token 8 for token 6
    weights["blocks.0.attn.W_V"][0, 0, 0], weights["blocks.0.attn.W_V"][0, 1, 0] = 1.0, -1.0
    weights["blocks.0.attn.W_O"][0, 0, 4] = 1.0
    weights["unembed.W_U"][4, 1] = 1.0
    model = plain_model(config, weights, dtype=dtype)
    close = 1e-10 if dtype == "float64" else 1e-5  # rounding of effects of about 2
    for clean, corrupt, node in (
        ([5, 6, 7], [5, 6, 8], Node("q", 0, 2, head=0)),
        ([5, 6, 7], [6, 6, 7], Node("k", 0, 0, head=0)),
    ):
        task = ma.tasks.from_pairs(model, [{"clean_tokens": clean, "corrupt_tokens": corrupt, "answer": 1, "foil": 2}])
        exact = exact_effects(model, task, [node])[0, 0].item()
        assert abs(exact) > 0.6
        fixed, tangent = (
            ma.attribution_patching(model, task, sites=("q", "k"), variant=v).value(node, "signed")
            for v in ("qk", "atp")
        )
        assert fixed == pytest.approx(exact, abs=close)
        assert abs(tangent) < (1e-6 if dtype == "float64" else 1e-4) * abs(exact)
