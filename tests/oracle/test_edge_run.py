"""Runs with edges cut, against a network that adds up what each reader sees; the whole and the empty circuit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from network_cases import measured, network, prompt
from patching_cases import bigness, hf, pairs_task, plain, repadded
from torch import Tensor

from mechattr.errors import MismatchError, UnknownNameError, UnsupportedFeatureError
from mechattr.patching.edge_run import EdgeRun
from mechattr.patching.graph import Graph
from mechattr.tasks.task import Task

ROUNDING = 1e-11  # float64, logits of order 10, a few dozen additions
LENGTHS = (6, 4, 5)


def half(graph: Graph, seed: int = 0) -> Tensor:
    """A random half of the edges."""
    return graph.mask & (torch.rand(graph.mask.shape, generator=torch.Generator().manual_seed(seed)) < 0.5)


def ablated(model: Any, task: Task, row: int, ablation: str) -> dict[str, Tensor]:
    """By writer what it writes when it is ablated."""
    outs = [network(model, prompt(task.corrupt, i))[1] for i in range(len(task))]
    if ablation == "resample":
        return outs[row]
    if ablation == "zero":
        return {name: torch.zeros_like(out) for name, out in outs[row].items()}
    length = len(prompt(task.corrupt, row))
    return {
        name: torch.stack([torch.stack([o[name][i] for o in outs if len(o[name]) > i]).mean(0) for i in range(length)])
        for name in outs[row]
    }


def expected(model: Any, task: Task, keep: Tensor, ablation: str = "resample", wrong: str = "") -> Tensor:
    """The metric of each pair, reader by reader; `wrong` names a mistake to make on purpose."""
    graph = Graph.of(model.info)
    kept = {(u, v): bool(keep[i, j]) for i, u in enumerate(graph.writers) for j, v in enumerate(graph.readers)}
    found = []
    for row in range(len(task)):
        tokens, other = prompt(task.clean, row), ablated(model, task, row, ablation)
        _, base = network(model, tokens)
        scales: dict[str, Tensor] = {}

        def see(u: str, v: str, out: Tensor, other: Any = other, base: Any = base) -> Tensor:
            if wrong == "kv heads counted as heads":
                v = v.replace("h1<k>", "h0<k>")
            if kept[u, v]:
                return base[u] if wrong == "kept edges carry the base run" else out
            return out + other[u] - base[u] if wrong == "difference taken from the base run" else other[u]

        def note(reader: str, x: Tensor, scales: Any = scales) -> Tensor:
            return scales.setdefault(reader, x)

        if wrong == "norm of the base run":
            network(model, tokens, scale=note)
        logits, _ = network(model, tokens, see=see, scale=note)
        found.append(measured(task, task.clean, row, logits))
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize("kind", ["linear", "gpt2_like", "llama_like"])
@pytest.mark.parametrize("ablation", ["resample", "mean", "zero"])
def test_half_of_the_edges(kind: str, ablation: str) -> None:
    model = plain(kind)
    task = pairs_task(model, LENGTHS)
    run = EdgeRun(model, task, ablation=ablation)
    keep = half(run.graph)
    torch.testing.assert_close(run.metric(keep), expected(model, task, keep, ablation), rtol=0, atol=ROUNDING)


@pytest.mark.parametrize(
    "wrong",
    [
        "norm of the base run",
        "difference taken from the base run",
        "kept edges carry the base run",
        "kv heads counted as heads",
    ],
)
def test_mistakes_are_told_apart(wrong: str) -> None:
    model = plain("llama_like")
    task = pairs_task(model, LENGTHS)
    run = EdgeRun(model, task)
    keep = half(run.graph)
    gap = (run.metric(keep) - expected(model, task, keep, wrong=wrong)).abs().max()
    assert gap > 1e6 * ROUNDING


@pytest.mark.parametrize("kind", ["linear", "gpt2_like", "llama_like"])
@pytest.mark.parametrize("direction", ["noising", "denoising"])
def test_all_edges_and_none(kind: str, direction: str) -> None:
    model = plain(kind)
    task = pairs_task(model, LENGTHS)
    run = EdgeRun(model, task, direction=direction)
    ends = [model.run(batch, metric=task.metric).metric for batch in (task.clean, task.corrupt)]
    base, other = ends if direction == "noising" else ends[::-1]
    torch.testing.assert_close(run.metric(run.graph.mask), base, rtol=0, atol=1e-12 * bigness(model, task))
    nothing = torch.zeros_like(run.graph.mask)
    torch.testing.assert_close(run.metric(nothing), other, rtol=0, atol=1e-12 * bigness(model, task))
    assert (base - other).abs().min() > 1e-3  # or the two could not be told apart


@pytest.mark.parametrize(
    "family",
    ["gpt2", "qwen3", "gpt_neox", "gpt_neox_sequential", "phi3", "opt", "phi", "cohere2", "bloom", "modernbert"],
)
def test_families(family: str) -> None:
    model = hf(family)
    task = pairs_task(model, LENGTHS)
    run = EdgeRun(model, task)
    keep = torch.stack([run.graph.mask, torch.zeros_like(run.graph.mask)])
    ends = torch.stack([model.run(batch, metric=task.metric).metric for batch in (task.clean, task.corrupt)])
    torch.testing.assert_close(run.metrics(keep), ends.double(), rtol=0, atol=1e-5 * bigness(model, task))  # float32


@pytest.mark.parametrize("family", ["gemma2", "olmo2", "bert"])
def test_families_without_writes_of_heads(family: str) -> None:
    model = hf(family)
    with pytest.raises(UnsupportedFeatureError, match=f"edges of '{family}'.*\n.*norms act on what its blocks write"):
        EdgeRun(model, pairs_task(model))


def test_batches_padding_and_circuits_do_not_matter() -> None:
    model = plain("llama_like")
    task = pairs_task(model, LENGTHS)
    run = EdgeRun(model, task)
    keep = torch.stack([half(run.graph, seed) for seed in range(3)])
    together = run.metrics(keep[[0, 1, 2, 1]])  # the same circuit runs once
    assert torch.equal(together[1], together[3])
    together = together[:3]
    for side in ("left", "right"):
        small = EdgeRun(model, repadded(task, side), batch_size=2).metrics(keep)
        torch.testing.assert_close(small, together, rtol=0, atol=ROUNDING)
    assert run.forward == 9 + 3  # circuits by pairs, and the other prompts


def test_a_journal_gives_the_same(tmp_path: Any) -> None:
    model = plain("gpt2_like")
    task = pairs_task(model)
    run = EdgeRun(model, task, batch_size=2)
    keep = torch.stack([half(run.graph, seed) for seed in range(3)])
    whole = run.metrics(keep, resume=tmp_path / "journal")
    lines = (tmp_path / "journal").read_bytes().splitlines(keepends=True)
    (tmp_path / "journal").write_bytes(b"".join(lines[:3]))
    assert torch.equal(run.metrics(keep, resume=tmp_path / "journal"), whole)


def test_bad_input() -> None:
    model = plain("gpt2_like")
    task = pairs_task(model)
    with pytest.raises(UnknownNameError, match="did you mean 'mean'"):
        EdgeRun(model, task, ablation="meen")
    with pytest.raises(MismatchError, match="a mask of 7 writers by 15 readers"):
        EdgeRun(model, task).metric(torch.ones(7, 7, dtype=torch.bool))
