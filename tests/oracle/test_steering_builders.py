"""Builders of steering vectors on a network in which the direction is planted, and against their formulas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from letters_model import Letters
from patching_cases import plain

import mechattr as ma
from mechattr.engines.moments import Moments
from mechattr.errors import SettingError, UnknownNameError
from mechattr.models.plain import plain_model
from mechattr.models.plain_config import PlainConfig
from mechattr.sites import Node, full_name
from mechattr.steering import (
    SteeringVector,
    act_add,
    from_direction,
    grains,
    iti,
    mass_mean,
    mean_difference,
    pca,
    probe,
    to_gguf,
)
from mechattr.steering.data import sides


class Folding(Letters):
    """A tokenizer that does not tell capital letters."""

    def __call__(self, text: str, add_special_tokens: bool = True, **asked: Any) -> dict[str, Any]:
        return super().__call__(text.lower(), add_special_tokens, **asked)


WORDS = "abcdefgh"
LAYER, SITE = 0, full_name("resid_post", 0)


def planted(strength: float = 40.0) -> tuple[Any, torch.Tensor, list[tuple[str, str]]]:
    """A network in which the letter `i` differs from `j` along one direction of the embedding, and pairs of texts that
    end in them."""
    model = plain_model(PlainConfig.attention_only(n_layers=1, d_vocab=12, d_model=32, n_ctx=12), tokenizer=Letters())
    generator = torch.Generator().manual_seed(3)
    direction = torch.randn(32, generator=generator, dtype=torch.float64)
    direction /= direction.norm()
    weights = {name: 0.02 * x if "attn" in name else x.clone() for name, x in model._weights.items()}
    weights["embed.W_E"][8] = weights["embed.W_E"][9] + strength * direction  # i = j + direction
    texts = ["".join(WORDS[(3 * i + k * (i % 5 + 1)) % 8] for k in range(4 + i % 3)) for i in range(24)]
    return type(model)(model.config, weights, tokenizer=Letters()), direction, [(t + "i", t + "j") for t in texts]


BUILDERS = {
    "mean_difference": (mean_difference, {}),
    "mass_mean": (mass_mean, {"ridge": 10.0}),
    "pca": (pca, {}),
    "pca pair_centred": (pca, {"variant": "pair_centred"}),
    "probe": (probe, {}),
}


@pytest.mark.parametrize("name", BUILDERS)
def test_a_planted_direction_is_found_and_turned_around(name: str) -> None:
    model, direction, pairs = planted()
    build, settings = BUILDERS[name]
    v = build(model, pairs, layers=[LAYER], **settings)
    cosine = float(torch.nn.functional.cosine_similarity(v.directions[LAYER].double(), direction, dim=0))
    assert cosine > 0.99
    turned = build(model, [(b, a) for a, b in pairs], layers=[LAYER], **settings)
    torch.testing.assert_close(turned.directions[LAYER], -v.directions[LAYER], rtol=0, atol=1e-4)  # float32 results
    assert v.settings["n_pairs"] == 24 and v.settings["method"] == name.split()[0]


def test_centred_components_lose_what_all_pairs_share() -> None:
    """The control: principal components of centred differences."""
    model, direction, pairs = planted()
    v = pca(model, pairs, layers=[LAYER], variant="centred").directions[LAYER].double()
    assert abs(float(torch.nn.functional.cosine_similarity(v, direction, dim=0))) < 0.9


@pytest.mark.parametrize("positions", ["last", "mean", -1])
def test_vectors_are_their_formulas_whatever_the_batches(positions: Any) -> None:
    model, _, pairs = planted()
    found = mean_difference(model, pairs, sites=["resid_post", "z"], positions=positions, batch_size=5)
    assert set(found.sites) == {SITE, full_name("z", 0)}
    total: dict[str, Any] = dict.fromkeys(found.sites, 0.0)
    for positive, negative in pairs:
        for sign, text in ((1, positive), (-1, negative)):
            cache = model.run(model.tokenize(text), record=found.sites).activations
            for name in found.sites:
                x = cache[name].values[0]
                x = x.mean(0) if positions == "mean" else x[-1 if positions == "last" else positions]
                total[name] = total[name] + sign * x / len(pairs)
    for name, expected in total.items():
        torch.testing.assert_close(found.tensors[name].values.double(), expected, rtol=1e-5, atol=1e-6)  # float32
    (every,) = sides(model, pairs, [SITE], positions=positions, batch_size=100)
    d = every[0].difference
    first = torch.linalg.svd(d, full_matrices=False).Vh[0]
    if positions == "last":
        v = pca(model, pairs, layers=[0]).directions[0].double()
        torch.testing.assert_close(v, first * (first @ d.mean(0)), rtol=1e-5, atol=1e-5)
        within = (torch.cov(every[0].positive.T, correction=0) + torch.cov(every[0].negative.T, correction=0)) / 2
        penalty = 0.5 * within.diagonal().mean()
        w = torch.linalg.solve(within + penalty * torch.eye(len(within)), d.mean(0))
        found_w = mass_mean(model, pairs, layers=[0], ridge=0.5).directions[0].double()
        torch.testing.assert_close(found_w, w * d.mean(0).norm() / w.norm(), rtol=1e-5, atol=1e-5)


def test_a_probe_is_the_minimum_of_its_loss() -> None:
    model, *_ = planted(1.0)
    pairs = [(WORDS[i % 8] + WORDS[(3 * i + 1) % 5], WORDS[(i + 1) % 8] + WORDS[(5 * i + 2) % 7]) for i in range(20)]
    v = probe(model, pairs, layers=[0]).directions[0].double()
    ((side,),) = sides(model, pairs, [SITE], batch_size=100)
    d = side.difference
    x, w = d / d.square().sum(1).mean().sqrt(), torch.zeros(32, dtype=torch.float64)
    for _ in range(30):  # Newton's method
        wrong = torch.sigmoid(-x @ w)
        curvature = (x.T * (wrong * (1 - wrong))) @ x / len(x) + 1e-2 * torch.eye(32)
        w = w - torch.linalg.solve(curvature, 1e-2 * w - wrong @ x / len(x))
    assert (
        float(torch.nn.functional.cosine_similarity(v, w, dim=0)) > 1 - 1e-5
    )  # where the solver of scikit-learn stops
    assert float(torch.nn.functional.cosine_similarity(v, d.mean(0), dim=0)) < 0.99  # the control: the mean difference
    torch.testing.assert_close(v.norm(), (v / v.norm()) @ d.mean(0), rtol=1e-5, atol=0)  # float32 results


def test_the_head_that_tells_the_sides_is_the_one_that_is_chosen() -> None:
    """Head 1 writes a direction where the letters differ; the others write noise of the words before."""
    config = PlainConfig.attention_only(n_layers=1, n_heads=3, n_kv_heads=3, d_vocab=12, d_model=32, d_head=6, n_ctx=12)
    model = plain_model(config, tokenizer=Letters())
    w = dict(model._weights)
    generator = torch.Generator().manual_seed(0)
    difference = w["embed.W_E"][8] - w["embed.W_E"][9]
    out = torch.nn.functional.normalize(torch.randn(6, generator=generator, dtype=torch.float64), dim=0)
    for name in ("W_Q", "W_K"):  # every head looks everywhere alike
        w[f"blocks.0.attn.{name}"] = torch.zeros_like(w[f"blocks.0.attn.{name}"])
    u = difference / difference.norm()
    w["embed.W_E"][:8] -= torch.outer(w["embed.W_E"][:8] @ u, u)
    values = 0.05 * w["blocks.0.attn.W_V"]
    values -= torch.einsum("hdk,d,e->hek", values, difference, difference / difference.square().sum())
    values[1] += 3 * torch.outer(difference, out) / difference.square().sum()
    w["blocks.0.attn.W_V"] = values
    model = type(model)(config, w, tokenizer=Letters())
    _, _, pairs = planted()
    for direction in ("mass_mean", "probe"):
        v = iti(model, pairs, layers=[0], heads=1, direction=direction)
        (name,) = v.sites
        assert v.settings["heads"] == [{"layer": 0, "head": 1, "accuracy": 1.0}]
        assert [bool(x.any()) for x in v.tensors[name].values] == [False, True, False]
        found = v.tensors[name].values[1].double()
        assert float(torch.nn.functional.cosine_similarity(found, out, dim=0)) > 0.99
    cache = model.run(model.tokenize([t for pair in pairs for t in pair]), record=name)
    batch = model.tokenize([t for pair in pairs for t in pair])
    z = cache.activations[name].values[torch.arange(len(batch)), batch.columns(-1), 1]
    mass = iti(model, pairs, sites="z", heads=1).tensors[name].values[1].double()
    spread = (z @ (mass / mass.norm())).std(correction=0)
    torch.testing.assert_close(mass.norm(), spread, rtol=1e-5, atol=0)  # float32 results
    # nodes say which heads are candidates
    assert [h["head"] for h in iti(model, pairs, sites=[Node("z", 0, head=2)]).settings["heads"]] == [2]
    many = iti(model, pairs, layers=[0], heads=9).settings["heads"]
    assert many[0]["head"] == 1 and len(many) == 3 and many[1]["accuracy"] < 1


@pytest.mark.parametrize("direction", ["mass_mean", "probe"])
def test_swapped_pairs_turn_the_directions_of_heads_around(direction: str) -> None:
    model, _, pairs = planted()
    swapped = [(b, a) for a, b in pairs]
    v, turned = (iti(model, p, layers=[0], heads=2, direction=direction) for p in (pairs, swapped))
    assert v.settings["heads"] == turned.settings["heads"]
    (name,) = v.sites
    assert float(v.tensors[name].values.norm()) > 1e-2
    torch.testing.assert_close(turned.tensors[name].values, -v.tensors[name].values, rtol=1e-4, atol=1e-6)  # solver
    other = iti(model, swapped[:12], layers=[0], heads=2, direction=direction)  # the control: other pairs
    assert not torch.allclose(other.tensors[name].values, -v.tensors[name].values, rtol=1e-4, atol=1e-6)


def test_a_swapped_pair_turns_the_difference_of_prompts_around() -> None:
    model, *_ = planted()
    v, turned = (act_add(model, [pair], layers=[0]) for pair in (("gai", "bcj"), ("bcj", "gai")))
    assert torch.equal(turned.tensors[SITE].values, -v.tensors[SITE].values)
    assert not torch.equal(turned.tensors[SITE].values, v.tensors[SITE].values)  # the control: not turned


def test_a_decoder_row_of_a_dictionary_is_what_its_latent_adds() -> None:
    """Steering by a row of a sparse autoencoder's decoder, in place of its latent."""
    model, *_ = planted()
    encoder, decoder = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    decoder = decoder.float().double()  # vectors are float32
    dictionary = ma.models.Dictionary(
        encode=lambda x: torch.relu(x @ encoder.T), decode=lambda f: f @ decoder, site="resid_post", layer=0
    )
    view = model.with_dictionaries([dictionary])
    batch = view.tokenize(["abcde", "gh"])
    edit = ma.models.Edit("resid_post_latents", ma.models.Add(3.0), neurons=[4])
    expected = view.run(batch, edits=[edit]).logits
    for row, same in ((4, True), (2, False)):  # the control: another latent's row
        v = from_direction(view, decoder[row], layers=[0])
        with v.apply(view, multiplier=3.0):
            found = view.run(batch).logits
        assert torch.allclose(found, expected, rtol=0, atol=1e-10) == same  # float64
    latent = from_direction(view, torch.eye(7)[4], sites="resid_post_latents")
    with latent.apply(view, multiplier=3.0):
        torch.testing.assert_close(view.run(batch).logits, expected, rtol=0, atol=1e-10)  # float64


def test_directions_of_ones_own_stay_as_they_are() -> None:
    model, direction, _ = planted()
    v = from_direction(model, direction, sites=["resid_pre", "resid_post"])
    assert len(v.sites) == 2 and torch.equal(v.directions[0], direction.float())
    for wrong, text in ((torch.ones(3), r"shape \[3\]"), ([1.0], "list"), (torch.zeros(32), "only zeros")):
        with pytest.raises(SettingError, match=text):
            from_direction(model, wrong, layers=[0])  # type: ignore[arg-type]


def test_a_difference_of_two_prompts_is_added_at_the_first_positions() -> None:
    model, direction, _ = planted()
    v = act_add(model, [("abci", "abcj")], sites=["resid_pre", "resid_post"])
    site = full_name("resid_pre", 0)
    table = v.tensors[site]
    assert table.axes == ("pos", "d_model") and not bool(table.values[:4].any())  # the first token and `abc`
    torch.testing.assert_close(table.values[4].double(), 40 * direction, rtol=0, atol=1e-5)  # float32 results
    found = v.tensors[SITE].values[4].double()
    assert float(torch.nn.functional.cosine_similarity(found, direction, dim=0)) > 0.99
    v = act_add(model, [("gai", "bcj")], sites=["resid_pre"])
    batch = model.tokenize(["abcdef", "h"], padding_side="left")  # 7 and 2 tokens
    with v.apply(model, multiplier=[2.0, -1.0]):
        steered = model.run(batch, record=site).activations[site].values
    clean = model.run(batch, record=site).activations[site].values
    expected = clean.clone()
    rows = v.tensors[site].values.double()
    expected[0, :4] += 2 * rows
    expected[1, -2:] -= rows[:2]
    torch.testing.assert_close(steered, expected, rtol=0, atol=1e-12)  # float64
    wrong = clean.clone()
    wrong[:, -1] += rows[-1]  # the control: the last difference only, everywhere at the end
    assert not torch.allclose(steered, wrong, atol=1e-2)
    cases: list[tuple[Any, str]] = [
        (lambda: act_add(model, [("a", "b"), ("c", "d")], layers=[0]), "give one pair"),
        (lambda: act_add(model, [("a", "b")], sites=[Node("z", 0, head=1)]), "sites of act_add"),
        (lambda: v.apply(model, positions="last").__enter__(), "a vector that has its own positions"),
        (
            lambda: act_add(model, [("a", "b")], sites="z").only([Node("z", 0, head=1)]),
            "directions of single positions",
        ),
        (lambda: to_gguf(act_add(model, [("a", "b")], layers=[0]), "v", model_hint=""), "axes pos, d_model at"),
    ]
    for call, text in cases:
        with pytest.raises(SettingError, match=text):
            call()
    assert act_add(model, [("a", "b")], layers=[0]).directions == {}


def test_shorter_prompts_are_filled_up_with_spaces() -> None:
    model = ma.load("tiny")
    v = act_add(model, [("I love the sea", "I hate")], layers=[0])
    batch = model.tokenize(["I love the sea", "I hate  "])
    x = model.run(batch, record=SITE).activations[SITE].values
    assert v.settings["n_positions"] == batch.tokens.shape[1] and not batch.padded
    torch.testing.assert_close(v.tensors[SITE].values, x[0] - x[1], rtol=0, atol=1e-4)  # float32


def test_moments_are_those_of_everything_at_once() -> None:
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 5
    m = Moments(6)
    for part in (x[:1], x[1:1], x[1:30], x[30:]):
        m.add(part)
    close = {"rtol": 0, "atol": 1e-12}  # float64 sums of 50 products
    torch.testing.assert_close(m.mean, x.mean(0), **close)
    torch.testing.assert_close(m.covariance, torch.cov(x.T, correction=0), **close)
    torch.testing.assert_close(m.uncentred, x.T @ x / 50, **close)
    halves = Moments(6)
    halves.mean = (x[:10].mean(0) + x[10:].mean(0)) / 2  # the control: means of unequal parts
    with pytest.raises(AssertionError):
        torch.testing.assert_close(halves.mean, x.mean(0), **close)


def test_vectors_are_stored_with_what_made_them(tmp_path: Path) -> None:
    model, _, pairs = planted()
    v = mean_difference(model, pairs, layers=[0])
    v.save(tmp_path / "v")
    again = ma.open(tmp_path / "v")
    assert isinstance(again, SteeringVector) and again.settings == v.settings
    assert torch.equal(again.directions[0], v.directions[0])
    assert again.provenance["weight_hash"] == model.fingerprint()["weight_hash"]
    row = v.to_pandas().iloc[0]
    assert row["site"] == SITE and row["share"] == pytest.approx(row["norm"] / row["length"])


def test_wrong_data_is_refused() -> None:
    model, _, pairs = planted()
    cases: list[tuple[Any, dict[str, Any], str]] = [
        ([], {"layers": [0]}, "pairs\n  found: none"),
        ([("a", "a")], {"layers": [0]}, "pair 0\n  found: two equal texts"),
        ([("a", "")], {"layers": [0]}, "pair 0"),
        (pairs, {}, "give layers= or sites=, not both"),
        (pairs, {"layers": [7]}, r"layers=\[7\]\n  found: a model with layers 0 to 0"),
        (pairs, {"layers": [0], "positions": "lats"}, "did you mean 'last'"),
        (pairs, {"layers": [0], "batch_size": 0}, "batch_size=0\n  found: not a count"),
        (pairs, {"sites": []}, "where to steer\n  found: no sites"),
        (pairs, {"sites": "pattern"}, "steering at blocks.0.attn.hook_pattern"),
    ]
    for given, settings, text in cases:
        with pytest.raises(SettingError, match=text):
            mean_difference(model, given, **settings)
    folding = type(model)(model.config, model._weights, tokenizer=Folding())
    with pytest.raises(SettingError, match="pair 2\n  found: two texts of the same tokens"):
        mean_difference(folding, [("a", "b"), ("ab", "a"), ("ab", "AB")], layers=[0], batch_size=2)
    assert mean_difference(folding, [("ab", "BA"), ("ab", "A")], layers=[0]).settings["n_pairs"] == 2
    with pytest.raises(SettingError, match="triple 1\n  found: two answers of the same tokens"):
        grains(folding, [("a", "b", "c"), ("a", "b", "B")], layers=[0])
    with pytest.raises(SettingError, match="variant='pcaa'"):
        pca(model, pairs, layers=[0], variant="pcaa")
    with pytest.raises(SettingError, match="ridge=0"):
        mass_mean(model, pairs, layers=[0], ridge=0)
    with pytest.raises(SettingError, match="penalty=0"):
        probe(model, pairs, layers=[0], penalty=0)
    for settings, text in (
        ({"heads": 0}, "heads=0"),
        ({"held_out": 1}, "held_out=1"),
        ({"sites": "resid_post", "layers": None}, "heads at blocks.0.hook_resid_post\n  found: it has none"),
    ):
        with pytest.raises(SettingError, match=text):
            iti(model, pairs, **{"layers": [0], **settings})
    with pytest.raises(SettingError, match="give at least 3"):
        iti(model, pairs[:2], layers=[0])
    with pytest.raises(UnknownNameError, match="did you mean 'probe'"):
        iti(model, pairs, layers=[0], direction="prob")
    assert plain("gpt2_like").tokenizer is None
