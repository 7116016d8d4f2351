"""GradDrop and AtP* against runs in which each write is held in turn, and against closed forms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from patching_cases import all_nodes, assert_same, averaged, bigness, hf, means, pairs_task, shorts, values
from star_cases import OUTSIDE, dropped, estimates, full_gradients

import mechattr as ma
from mechattr.errors import SettingError, UnknownNameError, UnsupportedFeatureError
from mechattr.models.base import Batch
from mechattr.models.edits import Edit
from mechattr.models.plain import plain_model
from mechattr.models.plain_config import PlainConfig
from mechattr.patching.variants import ALPHA, VARIANTS
from mechattr.sites import Node

DEEP: dict[str, Any] = {"n_layers": 3, "n_heads": 2, "n_kv_heads": 2, "d_mlp": 3, "d_model": 6, "d_head": 2}
SITES = ("q", "k", "v", "z", "resid_pre")
MODELS = {
    "gpt2_like": PlainConfig.gpt2_like(**DEEP),
    "llama_like": PlainConfig.llama_like(**{**DEEP, "n_kv_heads": 1}),
    "attention_only": PlainConfig.attention_only(**{**DEEP, "d_mlp": 0}),
}
ROUNDING = {"rtol": 0, "atol": 1e-10}  # float64 rounding over a few hundred operations on values up to about 100
WRONG = (
    "the skip path is killed",
    "drops above the node only",
    "the mean before the magnitude",
    "divided by all drops",
)


def model_of(kind: str) -> Any:
    return plain_model(MODELS[kind])


@pytest.mark.parametrize("unit", ("block", "sublayer"))
@pytest.mark.parametrize("kind", MODELS)
def test_drops_follow_their_definition(kind: str, unit: str) -> None:
    model = model_of(kind)
    task = pairs_task(model, (4, 4))
    for positions, direction in (("aligned", "noising"), ("named", "denoising"), ("all", "noising")):
        how: dict[str, Any] = {"positions": positions, "direction": direction}
        nodes = all_nodes(model, task, shorts(model), positions)
        nodes = [node for i, node in enumerate(nodes) if i % 13 == 0 or node.site in OUTSIDE[-3:]]
        for variant, fix in (("graddrop", False), ("star", True)):
            found = ma.attribution_patching(model, task, sites=shorts(model), variant=variant, unit=unit, **how)
            score = dropped(model, task, nodes, fix=fix, unit=unit, **how).mean(0)
            signed = estimates(model, task, nodes, full_gradients(model, task), fix=fix, **how).mean(0)
            torch.testing.assert_close(values(found, nodes), (score, signed), **ROUNDING)


@pytest.mark.parametrize("wrong", WRONG)
def test_the_check_of_drops_rejects(wrong: str) -> None:
    model = model_of("gpt2_like")
    task = pairs_task(model, (4, 4))
    nodes = [node for node in all_nodes(model, task, ("z", "mlp_post"), "aligned") if node.pos == 3]
    found = values(ma.attribution_patching(model, task, sites=("z", "mlp_post"), variant="star"), nodes)[0]
    torch.testing.assert_close(found, dropped(model, task, nodes, fix=True).mean(0), **ROUNDING)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(found, dropped(model, task, nodes, fix=True, wrong=wrong).mean(0), **ROUNDING)


@pytest.mark.parametrize("unit", ("block", "sublayer"))
@pytest.mark.parametrize("family", ("gpt2", "llama", "gpt_neox", "phi", "bloom", "gemma2", "olmo2"))
def test_drops_follow_their_definition_on_transformers_models(family: str, unit: str) -> None:
    model = hf(family)
    task = pairs_task(model, (4, 4))
    everything = all_nodes(model, task, shorts(model), "aligned")
    order = torch.randperm(len(everything), generator=torch.Generator().manual_seed(1)).tolist()
    nodes = [n for site in shorts(model) for n in [everything[i] for i in order if everything[i].site == site][:6]]
    found = values(ma.attribution_patching(model, task, sites=shorts(model), variant="star", unit=unit), nodes)[0]
    slow = dropped(model, task, nodes, fix=True, unit=unit).mean(0)
    scale = bigness(model, task) * max(1.0, float(slow.max()))  # estimates may be larger than any logit
    torch.testing.assert_close(found, slow, rtol=0, atol=1e-5 * scale)  # float32 rounding


@pytest.mark.parametrize("kind", MODELS)
def test_nodes_of_the_last_layer_keep_their_plain_score(kind: str) -> None:
    model = model_of(kind)
    task = pairs_task(model)
    sites = [site for site in shorts(model) if "resid" not in site and site not in ("embed", "pos_embed")]
    plainly, found = (ma.attribution_patching(model, task, sites=sites, variant=v) for v in ("qk", "star"))
    for site, table in found.scores.items():
        expected = plainly.scores[site]
        last, other = (t.values if "layer" not in t.axes else t.sel(layer=2).values for t in (table, expected))
        torch.testing.assert_close(last, other, **ROUNDING)
        if "layer" in table.axes:
            assert not torch.allclose(table.sel(layer=0).values, expected.sel(layer=0).values)


@pytest.mark.parametrize("n_layers", (2, 3, 5))
def test_what_cancels_to_first_order_is_seen(n_layers: int) -> None:
    """A neuron writes +1 to the answer, and a later MLP takes all but epsilon of it away."""
    epsilon = 1e-3
    config = PlainConfig.linear(n_layers=n_layers, n_heads=1, n_kv_heads=1, d_model=2, d_head=1, d_mlp=1, d_vocab=9)
    weights = {name: torch.zeros_like(x) for name, x in plain_model(config)._weights.items()}
    weights["embed.W_E"][6, 0] = 1.0  # the token that differs is read by the neuron of block 0,
    weights["blocks.0.mlp.W_in"][0, 0] = 1.0
    weights["blocks.0.mlp.W_out"][0, 1] = 1.0  # which writes to the direction that the answer reads,
    weights["unembed.W_U"][1, 1] = 1.0
    weights["blocks.1.mlp.W_in"][1, 0] = 1.0  # from which block 1 subtracts
    weights["blocks.1.mlp.W_out"][0, 1] = -1.0 + epsilon
    model = plain_model(config, weights)
    task = ma.tasks.from_pairs(model, [{"clean_tokens": [5, 5], "corrupt_tokens": [5, 6], "answer": 1, "foil": 2}])
    node = Node("mlp_post", 0, 1, neuron=0)
    expected = {"atp": epsilon, "graddrop": ((n_layers - 2) * epsilon + 1) / (n_layers - 1)}
    expected |= {"qk": epsilon, "star": expected["graddrop"], "max": expected["graddrop"], "two_point": epsilon}
    for variant, score in expected.items():
        found = ma.attribution_patching(model, task, sites="mlp_post", variant=variant)
        assert found.value(node) == pytest.approx(score, abs=1e-12)  # float64 rounding
        assert found.value(node, "signed") == pytest.approx(epsilon, abs=1e-12)


@pytest.mark.parametrize("alpha", (ALPHA,))
@pytest.mark.parametrize("kind", MODELS)
def test_the_second_point_follows_its_definition(kind: str, alpha: float) -> None:
    """Gradients of a run whose embeddings moved; changes are those of the base run."""
    model = model_of(kind)
    task = pairs_task(model, (4, 4))
    nodes = all_nodes(model, task, SITES, "aligned")

    def at(size: float) -> Any:
        def of(base: Batch, names: Any) -> Any:
            row = next(r for r in range(len(task)) if torch.equal(task.clean.tokens[r][None], base.tokens))
            here, there = (
                model.run(b, record="embed").activations["hook_embed"].values for b in (base, task.corrupt.rows([row]))
            )
            move = Edit("embed", lambda x, _place: here + size * (there - here))
            found = model.run(base, gradients=names, metric=task.metric, edits=[move]).gradients
            return {name: x.values for name, x in found.items()}

        return of

    found = ma.attribution_patching(model, task, sites=SITES, variant="two_point")
    base, moved, wrong = (estimates(model, task, nodes, at(size), fix=True) for size in (0.0, alpha, 1 - alpha))
    stars = [ma.attribution_patching(model, task.rows([i]), sites=SITES, variant="star") for i in range(len(task))]
    star = torch.stack([values(pair, nodes)[0] for pair in stars])
    hedged = values(ma.attribution_patching(model, task, sites=SITES, variant="hedged"), nodes)
    spread = base.abs() + (moved - base).abs() / 2
    torch.testing.assert_close(hedged, (torch.maximum(spread, star).mean(0), base.mean(0)), **ROUNDING)
    for other in (  # controls: the whole difference, half of the sum, the other point's estimate as the difference
        torch.maximum(base.abs() + (moved - base).abs(), star).mean(0),
        torch.maximum((base.abs() + moved.abs()) / 2, star).mean(0),
        torch.maximum(base.abs() + moved.abs() / 2, star).mean(0),
    ):
        assert not torch.allclose(hedged[0], other)
    torch.testing.assert_close(
        values(found, nodes), (torch.maximum(base.abs(), moved.abs()).mean(0), base.mean(0)), **ROUNDING
    )
    assert found.settings["alpha"] == alpha
    for other in (moved.abs(), torch.maximum(base.abs(), wrong.abs()), (base.abs() + moved.abs()) / 2):
        assert not torch.allclose(values(found, nodes)[0], other.mean(0))


def test_combined_scores_are_the_largest_of_their_parts_pair_by_pair() -> None:
    model = model_of("gpt2_like")
    task = pairs_task(model)
    alone = [
        {v: ma.attribution_patching(model, task.rows([i]), variant=v).scores["k"].values for v in VARIANTS}
        for i in range(len(task))
    ]
    for variant, parts in (("max", ("qk", "star")),):
        found = ma.attribution_patching(model, task, variant=variant).scores["k"].values
        expected = torch.stack([torch.maximum(*(pair[part] for part in parts)) for pair in alone]).mean(0)
        torch.testing.assert_close(found, expected, **ROUNDING)
        late = torch.maximum(*(torch.stack([pair[part] for pair in alone]).mean(0) for part in parts))
        assert not torch.allclose(found, late)  # control: the larger of two means


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", ("gpt2_like", "llama_like", "gemma2"))
def test_batches_order_and_identical_prompts(kind: str, variant: str) -> None:
    model = hf(kind) if kind == "gemma2" else model_of(kind)
    task = pairs_task(model)
    settings: dict[str, Any] = {"sites": shorts(model), "variant": variant}
    whole = ma.attribution_patching(model, task, **settings)
    close = (1e-5 if kind == "gemma2" else 1e-12) * bigness(model, task)
    close *= max(1.0, *(float(table.values.max()) for table in whole.scores.values()))
    assert_same(ma.attribution_patching(model, task.rows([2, 0, 1]), batch_size=2, **settings), whole, close)
    for name, mean in averaged([ma.attribution_patching(model, task.rows([i]), **settings) for i in range(3)]).items():
        torch.testing.assert_close(whole.tensors[name].values, mean, rtol=0, atol=close)
    assert whole.settings["n_identical_pairs"] == 0
    nothing = ma.attribution_patching(model, pairs_task(model, changed=()), **settings)
    assert all(bool((table.values == 0).all()) for table in nothing.tensors.values())
    assert nothing.settings["n_identical_pairs"] == len(task)


def test_where_graddrop_is_undefined_it_is_refused_or_left_out() -> None:
    one, encoder = plain_model(PlainConfig.attention_only(n_layers=1)), hf("bert")
    cases = (
        (one, SettingError, "a network with a single write", "undefined on a network with a single write"),
        (
            encoder,
            UnsupportedFeatureError,
            "no skip path past them",
            "undefined where norms act on the residual stream",
        ),
    )
    for model, error, text, said in cases:
        task = pairs_task(model)
        for variant in ("graddrop", "star"):
            with pytest.raises(error, match=text):
                ma.attribution_patching(model, task, variant=variant)
        sites = ("q", "z")
        found, expected, second, both = (
            ma.attribution_patching(model, task, sites=sites, variant=v) for v in ("max", "qk", "two_point", "hedged")
        )
        assert_same(found, expected, 0)
        assert found.passes == expected.passes and both.passes == second.passes
        for left in (found, both):
            assert left.settings["graddrop"] == said and left.settings["unit"] is None
        for site in sites:  # |c| + |d| / 2 is never below |c|
            assert bool((both.scores[site].values >= expected.scores[site].values).all())
    two = plain_model(PlainConfig.attention_only(n_layers=2))
    assert ma.attribution_patching(two, pairs_task(two), sites="z", variant="star").settings["graddrop"] is None
    single = plain_model(PlainConfig.gpt2_like(n_layers=1))  # attention and MLP are two writes
    ma.attribution_patching(single, pairs_task(single), variant="star", unit="sublayer")
    with pytest.raises(SettingError, match="with unit='block'"):
        ma.attribution_patching(single, pairs_task(single), variant="star")


def test_units_that_cannot_be_used() -> None:
    model = model_of("gpt2_like")
    task = pairs_task(model)
    with pytest.raises(SettingError, match="this variant drops nothing"):
        ma.attribution_patching(model, task, variant="qk", unit="sublayer")
    with pytest.raises(UnknownNameError, match="no such unit of GradDrop"):
        ma.attribution_patching(model, task, unit="head")


def test_absolute_values_come_before_the_mean_over_pairs() -> None:
    model = model_of("gpt2_like")
    task = pairs_task(model)
    nodes = [Node("z", 1, pos, head) for pos in (2, 3, 4) for head in (0, 1)]
    found = values(ma.attribution_patching(model, task, sites="z", variant="qk"), nodes)
    effects = estimates(model, task, nodes, full_gradients(model, task), fix=True)
    torch.testing.assert_close(found, means(effects), **ROUNDING)
    for wrong in (means(effects, "abs after the mean"), means(effects / len(task))):  # the latter: a batch-mean metric
        assert not torch.allclose(found[0], wrong[0])
