"""Directional ablation on a network in which one direction decides, beside a larger difference that decides nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from letters_model import Letters

from mechattr.errors import SettingError
from mechattr.models.plain import plain_model
from mechattr.models.plain_config import PlainConfig
from mechattr.sites import full_name
from mechattr.steering import mean_difference, refusal

REFUSES, HARMFUL, HARMLESS = 10, 8, 9  # k, i, j


def refusing() -> tuple[Any, torch.Tensor, list[tuple[str, str]]]:
    """A network that says `k` behind `i`, along one direction of the embedding, and pairs that differ before it, too:
    `a` against `b`, by a larger difference that no prediction depends on."""
    config = PlainConfig.attention_only(n_layers=3, d_vocab=12, d_model=32, n_ctx=12)
    model = plain_model(config, tokenizer=Letters())
    q, _ = torch.linalg.qr(torch.randn(32, 14, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    direction = q[:, 13]
    w = {name: 0.02 * x if "attn" in name or "pos" in name else x.clone() for name, x in model._weights.items()}
    w["embed.W_E"] = q[:, :12].T.clone()
    w["embed.W_E"][HARMFUL] = w["embed.W_E"][HARMLESS] + 8 * direction
    w["embed.W_E"][:2] *= 20
    w["unembed.W_U"] = torch.zeros_like(w["unembed.W_U"])
    w["unembed.W_U"][:, REFUSES] = direction
    w["unembed.b_U"] = torch.zeros(12, dtype=torch.float64)
    texts = ["".join("cdefgh"[(i + 2 * j) % 6] for j in range(2 + i % 3)) for i in range(15)]
    return type(model)(config, w, tokenizer=Letters()), direction, [(t + "ai", t + "bj") for t in texts]


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a.double(), b, dim=0))


def test_the_direction_that_decides_is_chosen() -> None:
    model, direction, pairs = refusing()
    v = refusal(model, pairs, tokens=[REFUSES], positions=[-1, -2])
    assert set(v.sites) == {full_name(s, n) for s in ("resid_pre", "attn_out") for n in range(3)}
    for table in v.tensors.values():
        assert cosine(table.values, direction) > 0.99
    chosen, candidates = v.settings["chosen"], v.settings["candidates"]
    assert chosen["position"] == -1 and chosen["kl"] <= 0.1 and chosen["induced"] >= 0
    assert {(c["layer"], c["position"]) for c in candidates} == {(n, p) for n in range(3) for p in (-1, -2)}
    assert not any(c["fits"] for c in candidates if c["position"] == -2)
    # the control: the candidate with the largest difference of means
    sizes = {p: mean_difference(model, pairs, sites=["resid_pre"], positions=p) for p in (-1, -2)}
    largest = max(sizes.values(), key=lambda one: max(one.norms().values()))
    assert all(abs(cosine(x.values, direction)) < 0.5 for x in largest.tensors.values())


def test_ablation_stops_what_the_direction_does_and_scores_are_their_formulas() -> None:
    model, _, pairs = refusing()
    v = refusal(model, pairs, tokens=[REFUSES], held_out=0.9, layers=[1])
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0)).tolist()[:14]
    rows = [model.tokenize([pairs[i][side] for i in order]) for side in (0, 1)]

    def predictions(side: int) -> torch.Tensor:
        logits = model.run(rows[side]).logits
        return logits[torch.arange(len(order)), rows[side].columns(-1)].softmax(-1)

    p, base = predictions(0)[:, REFUSES], predictions(1)
    assert float((p.log() - (1 - p).log()).mean()) > 0
    with v.apply(model, operator="ablate"):
        p, after = predictions(0)[:, REFUSES], predictions(1)
    chosen = v.settings["chosen"]
    assert chosen["ablated"] == pytest.approx(float((p.log() - (1 - p).log()).mean()), abs=1e-5)  # float32 directions
    assert chosen["kl"] == pytest.approx(float((base * (base / after).log()).sum(-1).mean()), abs=1e-5)
    assert chosen["ablated"] < -2
    with v.only([full_name("resid_pre", 1)]).apply(model):
        p = predictions(1)[:, REFUSES]
    assert chosen["induced"] == pytest.approx(float((p.log() - (1 - p).log()).mean()), abs=1e-4)


def test_swapped_sides_turn_the_direction_around() -> None:
    model, _, pairs = refusing()
    a, b = (
        refusal(model, given, tokens=[REFUSES], layers=[0], max_kl=1e9, min_induced=-1e9)
        for given in (pairs, [(n, p) for p, n in pairs])
    )
    site = full_name("resid_pre", 0)
    torch.testing.assert_close(a.tensors[site].values, -b.tensors[site].values, rtol=0, atol=1e-5)  # float32 results


def test_what_does_not_fit_is_refused() -> None:
    model, _, pairs = refusing()
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (pairs[:1], {}, "held-out pairs\n  found: one pair"),
        (pairs, {"tokens": []}, r"tokens=\[\]\n  found: ids from 0 to 11"),
        (pairs, {"tokens": [12]}, "ids from 0 to 11"),
        (pairs, {"positions": "last"}, "no list of positions"),
        (pairs, {"positions": [-9]}, "position -9"),
        (pairs, {"layers": [7]}, r"layers=\[7\]"),
        (pairs, {"deepest": 0.0}, "none below 0.0 of 3"),
        (pairs, {"positions": [-2]}, "none within the limits"),
    ]
    for given, settings, text in cases:
        with pytest.raises(SettingError, match=text):
            refusal(model, given, **{"tokens": [REFUSES], **settings})
