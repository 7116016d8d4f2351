"""Steering by the cluster that a probe picks: planted behaviours with a direction each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import families
import pytest
import torch
from letters_model import Letters
from torch import Tensor

import mechattr as ma
from mechattr.errors import MismatchError, SettingError
from mechattr.models.plain import plain_model
from mechattr.models.plain_config import PlainConfig
from mechattr.sites import Node, full_name
from mechattr.steering import GAct, g_act, mean_difference
from mechattr.steering.data import sides

SITE = full_name("resid_post", 0)
WORDS = "abcde"


def planted() -> tuple[Any, Tensor, list[tuple[str, str]], list[tuple[str, str]]]:
    """A network in which `i` differs from `j` along one direction and `g` from `h` along another, and pairs of either
    behaviour, of which the first has more."""
    config = PlainConfig.attention_only(n_layers=1, d_vocab=12, d_model=32, n_ctx=12)
    made = plain_model(config, tokenizer=Letters())
    weights = {name: 0.02 * x if "attn" in name else x.clone() for name, x in made._weights.items()}
    directions = torch.randn(2, 32, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    directions = torch.nn.functional.normalize(directions, dim=-1)
    for (more, less), direction in zip(((8, 9), (6, 7)), directions, strict=True):
        weights["embed.W_E"][more] = weights["embed.W_E"][less] + 8 * direction
    texts = ["".join(WORDS[(3 * i + k * (i % 4 + 1)) % 5] for k in range(3 + i % 3)) for i in range(16)]
    first, second = [(t + "i", t + "j") for t in texts], [(t + "g", t + "h") for t in texts[:10]]
    return type(made)(config, weights, tokenizer=Letters()), directions, first, second


def cosines(found: GAct, directions: Tensor) -> Tensor:
    centroids = found.parts(SITE)[0].double()
    return torch.nn.functional.cosine_similarity(centroids, directions, dim=-1)


def test_planted_clusters_are_found_and_the_probe_picks_the_right_one_row_by_row() -> None:
    model, directions, first, second = planted()
    pairs = [pair for both in zip(first[:10], second, strict=True) for pair in both] + first[10:]
    found = g_act(model, pairs, layers=[0], clusters=2)
    assert bool((cosines(found, directions) > 0.99).all())
    assert found.settings["sizes"] == {SITE: [16, 10]} and found.settings["accuracy"] == {SITE: 1.0}
    mean = mean_difference(model, pairs, layers=[0]).directions[0].double()
    assert not bool((torch.nn.functional.cosine_similarity(mean[None], directions, dim=-1) > 0.99).any())  # control
    batch = model.tokenize(["dbaj", "bh", "ecdbh", "aj"], padding_side="left")
    x = model.run(batch, record=SITE).activations[SITE].values[:, -1]
    assert found.picks(SITE, x).tolist() == [0, 1, 1, 0]
    with found.apply(model, multiplier=[1.0, 2.0, 1.0, -1.0], positions="last"):
        y = model.run(batch, record=SITE).activations[SITE].values[:, -1]
    centroids, weight, bias = (part.double() for part in found.parts(SITE))
    expected = x + torch.tensor([[1.0], [2.0], [1.0], [-1.0]]) * centroids[[0, 1, 1, 0]]
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)  # float64
    torch.testing.assert_close(found.added(SITE, x), centroids[(x @ weight.T + bias).argmax(1)], rtol=0, atol=0)
    first_only = x + torch.tensor([[1.0], [2.0], [1.0], [-1.0]]) * centroids[0]  # control: always the first centroid
    assert not torch.allclose(y[1:3], first_only[1:3], atol=1.0)


def test_swapped_pairs_turn_the_centroids_around() -> None:
    model, _, first, second = planted()
    found, turned = (
        g_act(model, p, layers=[0], clusters=2) for p in (first + second, [(b, a) for a, b in first + second])
    )
    torch.testing.assert_close(turned.parts(SITE)[0], -found.parts(SITE)[0], rtol=0, atol=1e-5)  # float32 results


@pytest.mark.parametrize("positions", ["last", "mean"])
def test_one_cluster_is_the_mean_difference(positions: Any) -> None:
    model, _, first, second = planted()
    pairs = first + second
    for where in ({"layers": [0]}, {"sites": "z"}):
        settings: dict[str, Any] = {**where, "positions": positions, "batch_size": 5}
        one, vector = g_act(model, pairs, clusters=1, **settings), mean_difference(model, pairs, **settings)
        batch = model.tokenize(["dba", "bhcd"])
        clean = model.run(batch).logits
        with one.apply(model, multiplier=1.5):
            found = model.run(batch).logits
        with vector.apply(model, multiplier=1.5):
            torch.testing.assert_close(model.run(batch).logits, found, rtol=1e-6, atol=1e-6)  # float32 vectors
        with one.apply(model, multiplier=0.0):
            assert torch.equal(model.run(batch).logits, clean)
        two = g_act(model, pairs, clusters=2, **settings)
        with two.apply(model, multiplier=1.5):  # the control: two clusters
            assert not torch.allclose(model.run(batch).logits, found, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("clusters", [2, 3])
def test_the_probe_is_the_minimum_of_its_loss(clusters: int) -> None:
    model, _, first, second = planted()
    pairs = first + second + [(f"{t}b", f"{t}d") for t in ("a", "ce", "ac")]
    found = g_act(model, pairs, layers=[0], clusters=clusters, penalty=0.1)
    ((side,),) = sides(model, pairs, [SITE], batch_size=100)
    centroids, weight, bias = (part.double() for part in found.parts(SITE))
    labels = torch.cdist(side.difference, centroids).argmin(1).repeat(2)
    x = torch.cat([side.positive, side.negative])
    middle = x.mean(0)
    scale = (x - middle).square().sum(1).mean().sqrt()
    w, b = (weight * scale).requires_grad_(), (bias + weight @ middle).requires_grad_()
    loss = torch.nn.functional.cross_entropy((x - middle) / scale @ w.T + b, labels)
    # two classes have one logit w_1 - w_0 = 2 w_1, on which the penalty is
    penalty = 0.05 * (w[1] - w[0]).square().sum() if clusters == 2 else 0.05 * w.square().sum()
    for g in torch.autograd.grad(loss + penalty, (w, b), retain_graph=True):
        torch.testing.assert_close(g, torch.zeros_like(g), rtol=0, atol=1e-4)  # where the solver stops
    assert float(torch.autograd.grad(loss, w)[0].abs().max()) > 1e-3  # the control: without the penalty


def test_further_pairs_teach_the_probe_of_a_new_artifact() -> None:
    model, directions, first, second = planted()
    found = g_act(model, first[:8] + second[:1], layers=[0], clusters=2, penalty=100.0)
    blank = GAct(
        {n: t if n.endswith("centroids") else t * 0.0 for n, t in found.tensors.items()}, settings=found.settings
    )
    held_out = [first[12], second[9], second[5]]
    states = model.run(model.tokenize([b for _, b in held_out], padding_side="left"), record=SITE)
    x = states.activations[SITE].values[:, -1]
    assert blank.picks(SITE, x).tolist() == [0, 0, 0]  # the control: nothing learned
    taught = blank.refined(model, first[:4] + second[:4], steps=30)
    assert taught.picks(SITE, x).tolist() == [0, 1, 1] and blank.picks(SITE, x).tolist() == [0, 0, 0]
    assert torch.equal(taught.parts(SITE)[0], found.parts(SITE)[0])
    assert bool((cosines(taught, directions) > 0.99).all())
    # one step is rate times the gradient of the cross-entropy
    pairs = first[:3] + second[:5]
    ((side,),) = sides(model, pairs, [SITE], batch_size=100)
    y = torch.cat([side.positive, side.negative])
    middle = y.mean(0)
    scale = (y - middle).square().sum(1).mean().sqrt()
    _, weight, bias = (part.double() for part in found.parts(SITE))
    w, b = (weight * scale).requires_grad_(), (bias + weight @ middle).requires_grad_()
    labels = torch.tensor([0] * 3 + [1] * 5).repeat(2)
    loss = torch.nn.functional.cross_entropy((y - middle) / scale @ w.T + b, labels)
    by_w, by_b = torch.autograd.grad(loss, (w, b))
    once = found.refined(model, pairs, steps=1, rate=0.7)
    _, new_weight, new_bias = (part.double() for part in once.parts(SITE))
    torch.testing.assert_close(new_weight * scale, (w - 0.7 * by_w).detach(), rtol=1e-5, atol=1e-6)  # float32 results
    bias_there = new_bias + new_weight @ middle
    torch.testing.assert_close(bias_there, (b - 0.7 * by_b).detach(), rtol=1e-5, atol=1e-5)
    assert once.refined(model, pairs, steps=2).settings["refined"] == [
        {"n_pairs": 8, "steps": 1, "rate": 0.7}, {"n_pairs": 8, "steps": 2, "rate": 0.5},
    ]  # fmt: skip


def test_it_is_the_same_each_time_whatever_the_batches_and_comes_back_from_a_file(tmp_path: Path) -> None:
    model, _, first, second = planted()
    pairs = second + first
    found, again = (g_act(model, pairs, layers=[0], clusters=3, seed=5) for _ in range(2))
    parts = g_act(model, pairs, layers=[0], clusters=3, seed=5, batch_size=4)
    for name, table in found.tensors.items():
        assert torch.equal(again.tensors[name].values, table.values)
        torch.testing.assert_close(parts.tensors[name].values, table.values, rtol=1e-4, atol=1e-5)  # float32 results
    found.save(tmp_path / "g")
    back = ma.open(tmp_path / "g")
    assert isinstance(back, GAct) and back.settings == found.settings and back.sites == (SITE,)
    logits = []
    for side in ("left", "right"):
        batch = model.tokenize(["abcde", "gh"], padding_side=side)
        with back.apply(model, positions="prompt"):
            logits.append(model.run(batch).logits[batch.mask])
    torch.testing.assert_close(*logits, rtol=0, atol=1e-10)  # float64
    with found.apply(model):
        assert "standing_hash" in model.fingerprint()
    assert "standing_hash" not in model.fingerprint()


def test_what_does_not_fit_is_refused() -> None:
    model, _, first, second = planted()
    cases: list[tuple[dict[str, Any], str]] = [
        ({"clusters": 0}, "clusters=0\n  found: 4 pairs"),
        ({"clusters": 5}, "clusters=5\n  found: 4 pairs"),
        ({"clusters": 2, "sites": "resid_pre", "layers": None}, "clusters=2\n  found: 1 different differences"),
        ({"penalty": 0}, "penalty=0\n  found: no positive number"),
        ({"positions": "lats"}, "did you mean 'last'"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"layers": [3]}, r"layers=\[3\]"),
        ({"sites": [Node("z", 0, head=1)], "layers": None}, "found: a function of the whole state"),
    ]
    for settings, text in cases:
        with pytest.raises(SettingError, match=text):
            g_act(model, first[:4], **{"layers": [0], **settings})
    with pytest.raises(SettingError, match="pairs\n  found: none"):
        g_act(model, [], layers=[0])
    found = g_act(model, first + second, layers=[0], clusters=2)
    for how, text in (({"steps": 0}, "steps=0"), ({"rate": 0}, "rate=0")):
        with pytest.raises(SettingError, match=text):
            found.refined(model, first, **how)  # type: ignore[arg-type]
    with pytest.raises(SettingError, match="pairs\n  found: none"):
        found.refined(model, [])
    other = families.hooked("gpt2")
    with pytest.raises(MismatchError, match=r"g_act at blocks\.0\.hook_resid_post, of width 32"), found.apply(other):
        pass
    with pytest.raises(SettingError, match="multiplier="), found.apply(model, multiplier=float("nan")):
        pass
