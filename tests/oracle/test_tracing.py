"""Causal tracing against its definition: one noise, one node, one unpadded prompt and explicit edits at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from patching_cases import (
    all_nodes,
    assert_same,
    averaged,
    bigness,
    full,
    hf,
    means,
    pairs_task,
    places,
    plain,
    repadded,
    shorts,
    single,
    values,
)
from torch import Tensor

import mechattr as ma
from mechattr.errors import (
    AlignmentError,
    EmptyTaskError,
    MechattrError,
    OutputExistsError,
    SettingError,
    UnknownNameError,
)
from mechattr.models import Add, Edit, Set
from mechattr.models.plain import plain_model
from mechattr.models.plain_config import PlainConfig
from mechattr.patching.tracing import causal_tracing, noise_of
from mechattr.sites import Node
from mechattr.tasks.task import Task

# float64 rounding over a few hundred operations on values up to about 100
ROUNDING = {"rtol": 0, "atol": 1e-10}
DEEP = plain_model(PlainConfig.llama_like(n_layers=5, n_heads=4, n_kv_heads=2, d_head=2, d_model=8, d_mlp=5))
MODEL = plain("gpt2_like")
TASK = pairs_task(MODEL)


def slow(
    model: Any,
    task: Task,
    nodes: Sequence[Node],
    *,
    span: str | None = None,
    noise: float = 3.0,
    samples: int = 2,
    window: int = 1,
    positions: str = "aligned",
    seed: int = 0,
    wrong: str = "",
) -> Tensor:
    """[pair and sample, node], straight from the definition; `wrong` names a mistake to make on purpose."""
    sigma = noise * float(model.weight("embed.W_E").double().std(correction=0))
    found = torch.zeros(len(task) * samples, len(nodes), dtype=torch.float64)
    names = list(dict.fromkeys(name for name in model.sites() if "scores" not in name))
    for row in range(len(task)):
        clean, corrupt = single(task.clean, row), single(task.corrupt, row)
        differs = (clean.tokens != corrupt.tokens)[0].nonzero()[:, 0].tolist()
        blurred = differs if span is None else list(range(*task.spans[row][span]))
        if wrong == "noise on every token":
            blurred = list(range(clean.tokens.shape[1]))
        there = model.run(corrupt if wrong == "corrupt activations" else clean, record=names).activations
        for sample in range(samples):
            for j, node in enumerate(nodes):
                number = sample + j if wrong == "noise drawn anew for each node" else sample
                drawn = noise_of(seed, clean.tokens[0].tolist(), number, len(blurred), model.info.d_model)
                blur = [Edit("embed", Add(sigma * drawn), positions=blurred)] if blurred else []
                before = model.run(clean, edits=blur, metric=task.metric).metric
                reach = 0 if wrong == "window restored at its centre only" else window // 2
                layers = [node.layer]
                if node.layer is not None:
                    low, high = node.layer - reach, node.layer + reach
                    layers = [layer for layer in range(low, high + 1) if 0 <= layer < model.info.n_layers]
                where = list(range(*places(task, row, positions)[node.pos]))
                selected: dict[str, Any] = {"positions": where, "heads": None if node.head is None else [node.head]}
                selected["neurons"] = None if node.neuron is None else [node.neuron]
                put = [Edit(full(model, replace(node, layer=layer)), Set(there), **selected) for layer in layers]
                run = model.run(clean, edits=[*([] if wrong == "no noise" else blur), *put], metric=task.metric)
                found[row * samples + sample, j] = (run.metric - before).item()
    return found


@pytest.mark.parametrize("positions", ("aligned", "named", "all"))
@pytest.mark.parametrize("net", ("gpt2_like", "llama_like"))
def test_causal_tracing_follows_its_definition_at_every_site(net: str, positions: str) -> None:
    model = plain(net)
    task = pairs_task(model, (4, 4))
    sites = [short for short in shorts(model) if short != "attn_scores"]
    nodes = [node for i, node in enumerate(all_nodes(model, task, sites, positions)) if i % 5 == 0]
    found = causal_tracing(model, task, sites=sites, positions=positions, samples=2)
    torch.testing.assert_close(values(found, nodes), means(slow(model, task, nodes, positions=positions)), **ROUNDING)
    assert float(found.scores["resid_post"].values.max()) > 0.01
    torch.testing.assert_close(found.contribution["z"].values, found.signed["z"].values, **ROUNDING)


@pytest.mark.parametrize("window", (1, 3, 13))
def test_a_window_restores_the_layers_around_the_node(window: int) -> None:
    task = pairs_task(DEEP, (4, 4), changed=(1,))
    nodes = all_nodes(DEEP, task, ("attn_out", "v", "mlp_post"), "aligned")[1::8]
    found = causal_tracing(DEEP, task, sites=("attn_out", "v", "mlp_post"), window=window, samples=2, batch_size=7)
    expected = slow(DEEP, task, nodes, window=window)
    torch.testing.assert_close(values(found, nodes), means(expected), **ROUNDING)
    if window == 1:
        return
    alone = slow(DEEP, task, nodes, window=window, wrong="window restored at its centre only")
    with pytest.raises(AssertionError):
        torch.testing.assert_close(values(found, nodes), means(alone), **ROUNDING)


@pytest.mark.parametrize(
    "wrong",
    (
        "noise drawn anew for each node",
        "noise on every token",
        "corrupt activations",
        "no noise",
        "abs after the mean",
    ),
)
def test_the_check_rejects(wrong: str) -> None:
    nodes = all_nodes(MODEL, TASK, ("resid_post", "z"), "aligned")
    found = values(causal_tracing(MODEL, TASK, sites=("resid_post", "z"), samples=2), nodes)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(found, means(slow(MODEL, TASK, nodes, wrong=wrong), wrong), **ROUNDING)


@pytest.mark.parametrize("family", ("gpt2", "llama", "gemma2", "bert"))
def test_causal_tracing_follows_its_definition_on_transformers_models(family: str) -> None:
    model = hf(family)
    task = pairs_task(model, (5, 5))
    nodes = all_nodes(model, task, ("resid_post", "attn_out", "z"), "aligned")[::4]
    found = causal_tracing(model, task, sites=("resid_post", "attn_out", "z"), samples=2, window=3)
    tolerance = 1e-5 * bigness(model, task)  # float32 rounding grows with the logits
    expected = means(slow(model, task, nodes, window=3))
    torch.testing.assert_close(values(found, nodes), expected, rtol=0, atol=tolerance)


def test_a_named_span_is_blurred_and_settings_say_how() -> None:
    nodes = all_nodes(MODEL, TASK, ("resid_post",), "named")
    settings = {"span": "B", "noise": 1.5, "samples": 3, "seed": 4, "positions": "named"}
    found = causal_tracing(MODEL, TASK, sites=("resid_post",), **settings)
    torch.testing.assert_close(values(found, nodes), means(slow(MODEL, TASK, nodes, **settings)), **ROUNDING)
    sigma = 1.5 * float(MODEL.weight("embed.W_E").std(correction=0))
    assert found.settings["sigma"] == pytest.approx(sigma, rel=1e-12)  # float64 rounding
    assert found.settings["noised_tokens"] == [1, 1, 1] and found.settings["direction"] == "denoising"
    clean = MODEL.run(TASK.clean, metric=TASK.metric).metric
    noised = []
    for row in range(3):
        for sample in range(3):
            prompt = single(TASK.clean, row)
            drawn = noise_of(4, prompt.tokens[0].tolist(), sample, 1, MODEL.info.d_model)
            edit = Edit("embed", Add(sigma * drawn), positions=[3])
            noised.append(MODEL.run(prompt, edits=[edit], metric=TASK.metric).metric.item())
    torch.testing.assert_close(torch.tensor(found.settings["clean_metric"], dtype=torch.float64), clean, **ROUNDING)
    wanted = torch.tensor(noised, dtype=torch.float64).view(3, 3).mean(1)
    for name in ("noised_metric", "corrupt_metric"):
        torch.testing.assert_close(torch.tensor(found.settings[name], dtype=torch.float64), wanted, **ROUNDING)


def test_restoring_everything_that_noise_touched_undoes_it() -> None:
    """The blurred embeddings; or the whole residual stream of any layer."""
    sites = ("embed", "resid_pre", "resid_post")
    found = causal_tracing(MODEL, TASK, sites=sites, positions="all", samples=4)
    lost = torch.tensor(found.settings["clean_metric"]) - torch.tensor(found.settings["noised_metric"])
    assert float(lost.abs().max()) > 0.01
    for site in sites:
        table = found.signed[site].values
        torch.testing.assert_close(table, lost.mean().to(table).expand_as(table), rtol=0, atol=1e-6)  # float32 lists


def test_noise_has_its_size_and_belongs_to_a_prompt() -> None:
    drawn = noise_of(0, [0], 0, 100, 100)
    assert abs(float(drawn.std()) - 1) < 0.05 and abs(float(drawn.mean())) < 0.05  # 7 and 5 standard errors
    others = [noise_of(*key, 100, 100) for key in ((1, [0], 0), (0, [1], 0), (0, [0], 1))]
    assert not any(torch.equal(drawn, other) for other in others)
    assert torch.equal(drawn, noise_of(0, [0], 0, 100, 100))
    whole = causal_tracing(MODEL, TASK, samples=2)
    # float64 rounding: other batch shapes add in another order
    assert_same(causal_tracing(MODEL, TASK.rows([2, 0, 1]), samples=2), whole, 1e-12)
    for name, mean in averaged([causal_tracing(MODEL, TASK.rows([i]), samples=2) for i in range(3)]).items():
        torch.testing.assert_close(whole.tensors[name].values, mean, rtol=0, atol=1e-12)
    state = torch.get_rng_state()
    causal_tracing(MODEL, TASK, samples=1)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("positions", ("named", "all"))
def test_padding_changes_nothing(positions: str) -> None:
    task = pairs_task(MODEL, (4, 6))
    found = causal_tracing(MODEL, task, positions=positions, samples=2)
    nodes = all_nodes(MODEL, task, ("resid_post", "mlp_out"), positions)
    torch.testing.assert_close(values(found, nodes), means(slow(MODEL, task, nodes, positions=positions)), **ROUNDING)
    for side in ("left", "right"):
        padded = causal_tracing(MODEL, repadded(task, side), positions=positions, samples=2)
        assert_same(padded, found, 1e-12)  # other batch shapes add in another order


def test_nodes_that_noise_cannot_reach_are_not_run() -> None:
    task = pairs_task(DEEP, changed=(2,))
    for window, sites in ((1, ("resid_post", "v")), (3, ("v",))):
        found = causal_tracing(DEEP, task, sites=sites, window=window, samples=2)
        for table in found.scores.values():
            assert bool((table.sel(pos=[0, 1]).values == 0).all())
        # before the blurred token nothing changes; after it the first layer's values do not, unless the window
        # holds the layer above
        later = found.scores["v"].sel(pos=[3, 4], layer=0).values
        assert bool((later == 0).all()) == (window == 1)
        least = sum(table.sel(pos=[0, 1]).values.numel() for table in found.scores.values())
        assert found.settings["n_trivial_zero"] == least + (later.numel() if window == 1 else 0)


def test_pairs_that_do_not_differ_have_no_noise_and_effects_of_zero() -> None:
    same = pairs_task(MODEL, changed=())
    found = causal_tracing(MODEL, same, samples=2)
    assert found.settings["noised_tokens"] == [0, 0, 0]
    assert found.settings["n_trivial_zero"] == len(found.nodes()) and found.passes.forward == 2 * 2 * 3
    assert all(bool((table.values == 0).all()) for table in found.tensors.values())


@pytest.mark.parametrize("window", (1, 3))
@pytest.mark.parametrize("batch_size", (None, 3))
def test_passes_are_those_that_ran(batch_size: int | None, window: int) -> None:
    model = hf("gpt2")
    task = pairs_task(model)
    ran = 0.0

    def count(module: Any, arguments: Any, output: Tensor) -> None:
        nonlocal ran
        ran += len(output) / 2

    hooks = [block.mlp.register_forward_hook(count) for block in model.model.transformer.h]
    try:
        settings = {"sites": ("embed", "resid_post"), "samples": 2, "window": window}
        result = causal_tracing(model, task, batch_size=batch_size, **settings)
    finally:
        for hook in hooks:
            hook.remove()
    assert result.passes.forward == pytest.approx(ran, abs=1e-9) and result.passes.backward == 0
    # the embeddings of 2 blurred tokens, whole; 4 positions that noise reaches in 2 layers, whole and half
    nodes = 2 + 4 * (1.5 if window == 1 else 2.0)
    assert result.passes.forward == pytest.approx(3 * 2 * (2 + nodes), abs=1e-9)


def test_a_journal_is_taken_up_and_results_are_stored(tmp_path: Path) -> None:
    journal, settings = tmp_path / "journal", {"samples": 2, "window": 3, "batch_size": 8}
    whole = causal_tracing(MODEL, TASK, **settings)
    assert_same(causal_tracing(MODEL, TASK, **settings, resume=journal), whole, 0)
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:3]) + lines[3][:5])
    assert_same(causal_tracing(MODEL, TASK, **settings, resume=journal), whole, 0)
    assert journal.read_bytes() == b"".join(lines)
    for change in ({"seed": 1}, {"window": 1}, {"noise": 2.0}, {"span": "A"}):
        with pytest.raises(OutputExistsError, match=f"different: {next(iter(change))}"):
            causal_tracing(MODEL, TASK, **{**settings, **change}, resume=journal)
    whole.save(tmp_path / "result")
    assert_same(ma.open(tmp_path / "result"), whole, 0)  # type: ignore[arg-type]
    exact = ma.activation_patching(MODEL, TASK, nodes=whole.top(3))
    assert set(exact.nodes()) == set(whole.top(3))


@pytest.mark.parametrize(
    ("settings", "kind", "text"),
    (
        (
            {"window": 4},
            SettingError,
            "window=4 | no layer in the middle of an even number of layers | give an odd number, such as 5",
        ),
        ({"window": 0}, SettingError, "window=0 | no whole number from 1"),
        ({"window": 3.0}, SettingError, "window=3.0 | no whole number from 1"),
        ({"samples": 0}, SettingError, "samples=0 | no whole number from 1 | give one, such as samples=1"),
        ({"samples": True}, SettingError, "samples=True | no whole number from 1"),
        ({"seed": -1}, SettingError, "seed=-1 | no whole number from 0"),
        ({"noise": 0}, SettingError, "noise=0 | no standard deviation | give a positive number, such as 3.0"),
        ({"noise": float("inf")}, SettingError, "noise=inf | no standard deviation"),
        ({"noise": "3"}, SettingError, "noise='3' | no standard deviation"),
        (
            {"span": "subject"},
            UnknownNameError,
            "to blur span 'subject' | 3 of 3 pairs have no such span (first: pair 0) | choose one of: A, B, END",
        ),
        ({"positions": "each"}, UnknownNameError, "positions | 'each' | "),
        ({"sites": ()}, SettingError, "sites | an empty list"),
        ({"batch_size": 0}, SettingError, "batch_size=0 | no number of rows"),
    ),
)
def test_settings_that_cannot_be_used(settings: dict[str, Any], kind: type[MechattrError], text: str) -> None:
    with pytest.raises(kind) as error:
        causal_tracing(MODEL, TASK, **settings)
    assert text in f"{error.value.asked} | {error.value.found} | {error.value.fix}"


def test_tasks_that_cannot_be_used() -> None:
    with pytest.raises(AlignmentError, match="prompts of 4 to 6 tokens"):
        causal_tracing(MODEL, pairs_task(MODEL, (4, 6)), positions="aligned")
    moved = replace(TASK, clean=repadded(TASK, "left").clean, corrupt=repadded(TASK, "right").corrupt)
    with pytest.raises(AlignmentError, match="clean and corrupt prompts with different lengths or padding"):
        causal_tracing(MODEL, moved, positions="all")
    nothing = torch.zeros(0, dtype=torch.long)
    empty = replace(TASK, clean=TASK.clean.rows(nothing), corrupt=TASK.corrupt.rows(nothing), spans=())
    with pytest.raises(EmptyTaskError, match="causal tracing"):
        causal_tracing(MODEL, empty)
