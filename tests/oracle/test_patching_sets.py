"""Sets of nodes patched at once, against single-node patching and against explicit edits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from patching_cases import (
    all_nodes,
    atp_effects,
    bigness,
    full,
    hf,
    pairs_task,
    places,
    plain,
    repadded,
    shorts,
    single,
)
from torch import Tensor

import mechattr as ma
from mechattr.models.edits import Edit
from mechattr.patching.nodes import table_of
from mechattr.patching.sets import Sets
from mechattr.sites import Node
from mechattr.tasks.task import Task

EXACT = 1e-12  # float64: the same intervention in a batch of another shape
SINGLE = 1e-5  # float32, of the largest logit


def sets_of(
    model: Any, task: Task, nodes: list[Node], direction: str = "noising", positions: str = "aligned", **settings: Any
) -> Sets:
    table, _ = table_of(model, task, nodes, None)
    assert len(table) == len(nodes)
    return Sets(model, task, table, positions, direction, **settings)  # type: ignore[arg-type]


def singles(sets: Sets, nodes: list[Node], n_pairs: int) -> Tensor:
    """[pair, node]: every set of one node."""
    pair, node = torch.cartesian_prod(torch.arange(n_pairs), torch.arange(len(nodes))).unbind(1)
    return sets.effects(pair, torch.eye(len(nodes), dtype=torch.bool)[node]).view(n_pairs, len(nodes))


def exact_singles(model: Any, task: Task, nodes: list[Node], direction: str) -> Tensor:
    found = []
    for row in range(len(task)):
        result = ma.activation_patching(model, task.rows([row]), nodes=nodes, direction=direction)
        found.append([result.value(node, "signed") for node in nodes])
    return torch.tensor(found, dtype=torch.float64)


def two_edits(model: Any, task: Task, row: int, nodes: list[Node], positions: str) -> float:
    """The effect of some nodes together: one run with an explicit `Set` for each."""
    base, source = single(task.clean, row), single(task.corrupt, row)
    there = model.run(source, record=[full(model, node) for node in nodes]).activations
    edits = []
    for node in nodes:
        where = list(range(*places(task, row, positions)[node.pos]))
        heads = None if node.head is None else [node.head]
        neurons = None if node.neuron is None else [node.neuron]
        edits.append(Edit(full(model, node), ma.models.Set(there), positions=where, heads=heads, neurons=neurons))
    before = model.run(base, metric=task.metric).metric
    return float((model.run(base, edits=edits, metric=task.metric).metric - before).item())


@pytest.mark.parametrize("direction", ("noising", "denoising"))
@pytest.mark.parametrize("positions", ("aligned", "named", "all"))
@pytest.mark.parametrize("kind", ("gpt2_like", "llama_like"))
def test_a_set_of_one_node_is_activation_patching(kind: str, positions: str, direction: str) -> None:
    model = plain(kind)
    task = pairs_task(model, (5, 5) if positions == "aligned" else (5, 6, 5))
    nodes = sorted(all_nodes(model, task, shorts(model), positions))
    found = singles(sets_of(model, task, nodes, direction, positions), nodes, len(task))
    expected = exact_singles(model, task, nodes, direction)
    torch.testing.assert_close(found, expected, rtol=0, atol=EXACT)
    assert (expected != 0).double().mean() > 0.2  # not zeros against zeros


@pytest.mark.parametrize("family", ("gpt2", "llama", "gemma2"))
def test_a_set_of_one_node_is_activation_patching_on_transformers_models(family: str) -> None:
    model = hf(family)
    task = repadded(pairs_task(model, (5, 6)), "left")
    nodes = sorted(all_nodes(model, task, ("q", "k", "v", "z", "mlp_out", "resid_pre"), "named"))
    found = singles(sets_of(model, task, nodes, positions="named"), nodes, len(task))
    expected = exact_singles(model, task, nodes, "noising")
    torch.testing.assert_close(found, expected, rtol=0, atol=SINGLE * bigness(model, task))


def union_over_rows(sets: Sets, pairs: Tensor, chosen: Tensor) -> Tensor:
    """Wrong: every row patches what any row patches."""
    return sets.effects(pairs, chosen.any(0).expand_as(chosen))


@pytest.mark.parametrize(("kind", "positions"), [("llama_like", "aligned"), ("gpt2_like", "named")])
def test_a_set_of_two_nodes_is_a_run_with_two_edits(kind: str, positions: str) -> None:
    model = plain(kind)
    task = pairs_task(model)
    nodes = sorted(all_nodes(model, task, ("q", "k", "v", "z", "mlp_post", "resid_mid", "pattern"), positions))
    sets = sets_of(model, task, nodes, positions=positions)
    live = sets.moved.all(0).nonzero()[:, 0]
    generator = torch.Generator().manual_seed(0)
    both = torch.stack([live[torch.randperm(len(live), generator=generator)[:2]] for _ in range(40)])
    pairs = torch.arange(40) % len(task)
    chosen = torch.zeros(40, len(nodes), dtype=torch.bool).scatter_(1, both, True)
    expected = torch.tensor(
        [
            two_edits(model, task, int(p), [nodes[i] for i in sorted(b.tolist())], positions)
            for p, b in zip(pairs, both, strict=True)
        ],
        dtype=torch.float64,
    )
    torch.testing.assert_close(sets.effects(pairs, chosen), expected, rtol=0, atol=EXACT)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(union_over_rows(sets, pairs, chosen), expected, rtol=0, atol=EXACT)


def test_sets_that_change_nothing_are_exactly_zero_and_do_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    model = plain("gpt2_like")
    task = pairs_task(model, changed=(2,))
    nodes = sorted(all_nodes(model, task, ("z", "mlp_post"), "aligned"))
    sets = sets_of(model, task, nodes)
    before = torch.tensor([node.pos < 2 for node in nodes])
    assert not sets.moved[:, before].any()
    monkeypatch.setattr(type(model), "run", None)  # any run would fail
    chosen = torch.stack([torch.zeros_like(before), before])
    assert sets.effects(torch.tensor([0, 1]), chosen).tolist() == [0.0, 0.0]
    assert sets.effects(torch.tensor([], dtype=torch.long), chosen[:0]).tolist() == []


def test_batches_of_any_size_and_a_recorded_source_agree() -> None:
    model = plain("llama_like")
    task = pairs_task(model)
    nodes = sorted(all_nodes(model, task, ("q", "z", "mlp_post"), "aligned"))
    sets = sets_of(model, task, nodes)
    chosen = torch.rand(30, len(nodes), generator=torch.Generator().manual_seed(0)) < 0.05
    pairs = torch.arange(30) % len(task)
    expected = sets.effects(pairs, chosen)
    assert expected.abs().min() >= 0 and expected.abs().max() > 0.1
    torch.testing.assert_close(
        sets_of(model, task, nodes, batch_size=1).effects(pairs, chosen), expected, rtol=0, atol=EXACT
    )
    recorded = ma.models.record(model, task.corrupt, list(sets.table.names))
    again = sets_of(model, task, nodes, source=recorded)
    torch.testing.assert_close(again.effects(pairs, chosen), expected, rtol=0, atol=EXACT)
    assert (sets.forward, again.forward, again.source_metric) == (6, 3, None)


@pytest.mark.parametrize(
    ("positions", "direction"), [("aligned", "noising"), ("named", "denoising"), ("all", "noising")]
)
def test_first_order_estimates_follow_the_definition(positions: str, direction: str) -> None:
    model = plain("llama_like")
    task = pairs_task(model)
    nodes = sorted(all_nodes(model, task, ("q", "k", "v", "z", "mlp_post", "resid_post"), positions))
    found = sets_of(model, task, nodes, direction, positions).estimates()
    expected = atp_effects(model, task, nodes, positions=positions, direction=direction)
    torch.testing.assert_close(found, expected, rtol=0, atol=EXACT)
    wrong = atp_effects(
        model, task, nodes, positions=positions, direction=direction, wrong="gradient at the source run"
    )
    with pytest.raises(AssertionError):
        torch.testing.assert_close(found, wrong, rtol=0, atol=EXACT)
