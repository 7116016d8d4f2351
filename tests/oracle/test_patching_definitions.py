"""Both methods against their definitions: one node, one prompt, one full run at a time; each check rejects mistakes."""

from __future__ import annotations

import pytest
import torch
from patching_cases import (
    PLAIN,
    all_nodes,
    atp_effects,
    bigness,
    exact_effects,
    full,
    hf,
    means,
    pairs_task,
    part,
    places,
    plain,
    shorts,
    values,
)

import mechattr as ma
from mechattr.models.edits import Edit
from mechattr.models.plain import plain_model
from mechattr.models.plain_config import PlainConfig
from mechattr.patching.places import places_of
from mechattr.sites import Node

MODES = ("aligned", "named", "all")
DIRECTIONS = ("noising", "denoising")
WRONG = (
    "abs after the mean",
    "gradient at the source run",
    "gradient of the layer above",
    "gradient of the mean over pairs",
    "sign flipped",
)
# float64 rounding over a few hundred operations on values up to about 100
ROUNDING = {"rtol": 0, "atol": 1e-10}


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("positions", MODES)
def test_on_a_linear_network_the_estimate_is_the_exact_effect_at_every_site(positions: str, direction: str) -> None:
    model = plain("linear")
    task = pairs_task(model)
    settings = {"sites": shorts(model), "positions": positions, "direction": direction}
    estimate = ma.attribution_patching(model, task, variant="atp", **settings)
    exact = ma.activation_patching(model, task, **settings)
    assert not {"q", "k"} & set(estimate.scores)
    assert max(float(table.values.abs().max()) for table in exact.scores.values()) > 0.1
    for name, table in exact.tensors.items():
        assert table.axes == estimate.tensors[name].axes
        torch.testing.assert_close(estimate.tensors[name].values, table.values, **ROUNDING)


def test_the_estimate_is_not_exact_where_the_network_is_not_linear() -> None:
    model = plain("gpt2_like")
    task = pairs_task(model)
    estimate, exact = ma.attribution_patching(model, task), ma.activation_patching(model, task)
    for site in ("q", "mlp_post"):
        assert float((estimate.signed[site].values - exact.signed[site].values).abs().max()) > 0.01


def test_v_and_z_are_exact_below_a_fixed_pattern_and_q_is_not() -> None:
    model = plain_model(PlainConfig.attention_only(n_layers=1))
    task = pairs_task(model, changed=(1, 2, 4))  # at the last position too, the only query that the metric reads
    sites = ("q", "v", "z", "result", "attn_out", "pattern")
    estimate = ma.attribution_patching(model, task, variant="atp", sites=sites)
    exact = ma.activation_patching(model, task, sites=sites)
    for site in sites[1:]:
        torch.testing.assert_close(estimate.signed[site].values, exact.signed[site].values, **ROUNDING)
    assert float((estimate.signed["q"].values - exact.signed["q"].values).abs().max()) > 1e-3


@pytest.mark.parametrize("positions", MODES)
@pytest.mark.parametrize("kind", ("gpt2_like", "llama_like"))
def test_attribution_patching_follows_its_definition(kind: str, positions: str) -> None:
    model = plain(kind)
    task = pairs_task(model)
    nodes = all_nodes(model, task, shorts(model), positions)
    for direction in DIRECTIONS:
        how = {"positions": positions, "direction": direction}
        found = ma.attribution_patching(model, task, variant="atp", sites=shorts(model), **how)
        assert sum(table.values.numel() for table in found.scores.values()) == len(set(nodes))
        effects = atp_effects(model, task, nodes, positions=positions, direction=direction)
        torch.testing.assert_close(values(found, nodes), means(effects), **ROUNDING)


@pytest.mark.parametrize("wrong", WRONG)
def test_the_check_of_attribution_patching_rejects(wrong: str) -> None:
    model = plain("gpt2_like")
    task = pairs_task(model)
    nodes = all_nodes(model, task, ("z", "mlp_post"), "named")
    found = ma.attribution_patching(model, task, variant="atp", sites=("z", "mlp_post"), positions="named")
    with pytest.raises(AssertionError):
        torch.testing.assert_close(
            values(found, nodes),
            means(atp_effects(model, task, nodes, positions="named", wrong=wrong), wrong),
            **ROUNDING,
        )


@pytest.mark.parametrize("positions", MODES)
@pytest.mark.parametrize("kind", ("gpt2_like", "llama_like"))
def test_activation_patching_follows_its_definition(kind: str, positions: str) -> None:
    model = plain(kind)
    task = pairs_task(model, (4, 4), changed=(1,))
    nodes = all_nodes(model, task, shorts(model), positions)
    nodes = [node for i, node in enumerate(nodes) if i % 3 == 0 or node.layer is None]  # coprime with sizes of axes
    direction = "denoising" if positions == "named" else "noising"
    found = ma.activation_patching(model, task, sites=shorts(model), positions=positions, direction=direction)
    effects = exact_effects(model, task, nodes, positions=positions, direction=direction)
    torch.testing.assert_close(values(found, nodes), means(effects), **ROUNDING)


@pytest.mark.parametrize("wrong", ("abs after the mean", "other direction", "head off by one", "layer off by one"))
def test_the_check_of_activation_patching_rejects(wrong: str) -> None:
    model = plain("gpt2_like")
    task = pairs_task(model, (4, 4))
    nodes = [Node("z", layer, pos, head) for layer in (0, 1) for pos in (1, 3) for head in (0, 1)]
    found = values(ma.activation_patching(model, task, nodes=nodes), nodes)
    if wrong == "head off by one":
        nodes = [Node("z", n.layer, n.pos, 1 - n.head) for n in nodes]
    if wrong == "layer off by one":
        nodes = [Node("z", 1 - n.layer, n.pos, n.head) for n in nodes]
    direction = "denoising" if wrong == "other direction" else "noising"
    with pytest.raises(AssertionError):
        torch.testing.assert_close(
            found, means(exact_effects(model, task, nodes, direction=direction), wrong), **ROUNDING
        )


@pytest.mark.parametrize("family", ("gpt2", "llama", "gemma2"))
def test_both_methods_follow_their_definitions_on_transformers_models(family: str) -> None:
    model = hf(family)
    task = pairs_task(model, (5, 5))
    everything = all_nodes(model, task, shorts(model), "aligned")
    order = torch.randperm(len(everything), generator=torch.Generator().manual_seed(1)).tolist()
    # twelve nodes of every site, so that each site's axes and layout are tried
    chosen = [n for site in shorts(model) for n in [everything[i] for i in order if everything[i].site == site][:12]]
    atp = ma.attribution_patching(model, task, variant="atp", sites=shorts(model))
    exact = ma.activation_patching(model, task, nodes=chosen)
    tolerance = {"rtol": 0, "atol": 1e-5 * bigness(model, task)}  # float32 rounding grows with the logits
    torch.testing.assert_close(values(exact, chosen), means(exact_effects(model, task, chosen)), **tolerance)
    slow = means(atp_effects(model, task, chosen))
    tolerance["atol"] *= max(1.0, float(slow[0].max()))  # estimates may be larger than any logit
    torch.testing.assert_close(values(atp, chosen), slow, **tolerance)


@pytest.mark.parametrize("kind", ("gpt2_like", "llama_like"))
def test_the_estimate_is_the_exact_effect_to_first_order(kind: str) -> None:
    """Central differences of a small step towards the source activation: no autograd in the reference."""
    model = plain(kind)
    task = pairs_task(model, (4,))
    everything = all_nodes(model, task, shorts(model), "aligned")
    nodes = [node for i, node in enumerate(everything) if i % 7 == 0]
    found = values(ma.attribution_patching(model, task, variant="atp", sites=shorts(model)), nodes)[1]
    names = list({full(model, node) for node in nodes})
    here, there = (model.run(batch, record=names).activations for batch in (task.clean, task.corrupt))
    step, slopes = 1e-4, []
    for node in nodes:
        name, span = full(model, node), places(task, 0, "aligned")[node.pos]
        change = part((there[name] - here[name]).values, node, span)
        heads = None if node.head is None else [node.head]
        neurons = None if node.neuron is None else [node.neuron]

        def at(size: float, change=change, name=name, node=node, heads=heads, neurons=neurons) -> float:
            def move(x, place):  # type: ignore[no-untyped-def]
                return x + size * change.reshape(x.shape)

            edit = Edit(name, move, positions=[node.pos], heads=heads, neurons=neurons)
            return model.run(task.clean, edits=[edit], metric=task.metric).metric.item()

        slopes.append((at(step) - at(-step)) / (2 * step))
    # the error of central differences is step^2 = 1e-8 times the third derivative
    torch.testing.assert_close(found, torch.tensor(slopes, dtype=torch.float64), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ("linear", "gpt2_like", "llama_like", "gpt2", "llama", "gemma2"))
def test_identical_prompts_give_exactly_zero(kind: str) -> None:
    model = plain(kind) if kind in PLAIN else hf(kind)
    task = pairs_task(model, changed=())
    for method in (ma.attribution_patching, ma.activation_patching):
        result = method(model, task, sites=shorts(model))
        assert all(bool((table.values == 0).all()) for table in result.tensors.values())
        assert result.settings["n_trivial_zero"] == len(result.nodes())


def test_nodes_that_cannot_change_are_counted_alike_and_are_exactly_zero() -> None:
    model = plain("gpt2_like")
    task = pairs_task(model, changed=(2,))
    results = [method(model, task) for method in (ma.attribution_patching, ma.activation_patching)]
    # before the change nothing differs; at it and after it in layer 0, q, k and v differ only at the changed token
    first = 2 * (2 * 4 * 2 + 5 * 2) + 3 * 2 * 2
    assert [result.settings["n_trivial_zero"] for result in results] == [first, first]
    for result in results:
        assert bool((result.scores["z"].sel(pos=[0, 1]).values == 0).all())
        assert bool((result.scores["z"].sel(pos=[2, 3, 4]).values != 0).any())


@pytest.mark.parametrize("kind", ("linear", "gpt2_like", "llama_like"))
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_patching_the_whole_embedding_gives_the_other_run(kind: str, direction: str) -> None:
    model = plain(kind)
    task = pairs_task(model)
    nodes = [Node("embed", None), Node("resid_pre", 0)]
    result = ma.activation_patching(model, task, nodes=nodes, direction=direction)
    clean, corrupt = (model.run(batch, metric=task.metric).metric for batch in (task.clean, task.corrupt))
    difference = corrupt - clean if direction == "noising" else clean - corrupt
    assert float(difference.abs().min()) > 0.01
    expected = means(difference[:, None].expand(-1, 2))
    torch.testing.assert_close(values(result, nodes), expected, **ROUNDING)


def test_denoising_undoes_noising_on_a_linear_network() -> None:
    model = plain("linear")
    task = pairs_task(model)
    for method in (ma.attribution_patching, ma.activation_patching):
        one, other = (
            method(model, task, direction=direction, sites=("v", "z", "mlp_post")) for direction in DIRECTIONS
        )
        for site in one.scores:
            torch.testing.assert_close(one.signed[site].values, -other.signed[site].values, **ROUNDING)
            torch.testing.assert_close(one.contribution[site].values, other.contribution[site].values, **ROUNDING)


def test_absolute_values_are_taken_pair_by_pair() -> None:
    """A pair and its mirror image have opposite effects on a linear network: they cancel in the signed mean only."""
    model = plain("linear")
    one = {"clean_tokens": [6, 7, 8], "corrupt_tokens": [6, 9, 8], "answer": 1, "foil": 2}
    mirror = {**one, "clean_tokens": one["corrupt_tokens"], "corrupt_tokens": one["clean_tokens"]}
    task, alone = ma.tasks.from_pairs(model, [one, mirror]), ma.tasks.from_pairs(model, [one])
    for method in (ma.attribution_patching, ma.activation_patching):
        both, first = method(model, task, sites=("z",)), method(model, alone, sites=("z",))
        assert float(first.scores["z"].values.max()) > 0.1
        torch.testing.assert_close(both.scores["z"].values, first.scores["z"].values, **ROUNDING)
        torch.testing.assert_close(both.signed["z"].values, torch.zeros_like(both.signed["z"].values), **ROUNDING)


def test_a_place_with_padding_is_summed_over_real_tokens_only() -> None:
    model = plain("gpt2_like")
    task = pairs_task(model, (3, 5), changed=(1,))
    where = places_of(task, "all")
    x = torch.full((2, 5), float("nan"), dtype=torch.float64)
    x[task.clean.mask] = 1.0
    torch.testing.assert_close(where.gather(x), torch.tensor([[3.0], [5.0]], dtype=torch.float64), rtol=0, atol=0)
