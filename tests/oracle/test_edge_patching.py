"""Exact effects of edges, against a network in which one reader sees another output of one writer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from network_cases import measured, network, prompt
from patching_cases import bigness, exact_effects, hf, pairs_task, plain, repadded
from torch import Tensor

from mechattr.errors import EmptyTaskError, SettingError, UnknownNameError
from mechattr.patching.edge_patching import edge_patching
from mechattr.patching.edge_run import EdgeRun
from mechattr.patching.graph import Graph
from mechattr.sites import Node
from mechattr.tasks.task import Task

ROUNDING = 1e-11  # float64, logits of order 10, a few dozen additions
LENGTHS = (6, 4, 5)


def effects(model: Any, task: Task, direction: str = "noising", wrong: str = "") -> Tensor:
    """[pair, writer, reader]: one network run for each edge; `wrong` names a mistake to make on purpose."""
    graph = Graph.of(model.info)
    order = {name: i for i, name in enumerate(graph.readers)}
    found = torch.full((len(task), *graph.mask.shape), float("nan"), dtype=torch.float64)
    for row in range(len(task)):
        batches = (task.clean, task.corrupt) if direction == "noising" else (task.corrupt, task.clean)
        scales: dict[str, Tensor] = {}

        def note(reader: str, x: Tensor, scales: Any = scales) -> Tensor:
            return scales.setdefault(reader, x)

        before, base = network(model, prompt(batches[0], row), scale=note)
        _, other = network(model, prompt(batches[1], row))
        for i, j in graph.mask.nonzero().tolist():
            writer, reader = graph.writers[i], graph.readers[j]

            def see(
                u: str, v: str, out: Tensor, w: str = writer, r: str = reader, b: Any = base, o: Any = other
            ) -> Tensor:
                hit = u == w and (v == r or (wrong == "later readers see it too" and order[v] > order[r]))
                return out + o[u] - b[u] if hit else out

            extra = {"scale": note} if wrong == "norm of the base run" else {}
            logits, _ = network(model, prompt(batches[0], row), see=see, **extra)
            change = measured(task, batches[0], row, logits) - measured(task, batches[0], row, before)
            found[row, i, j] = change
    return found


@pytest.mark.parametrize("kind", ["linear", "gpt2_like", "llama_like"])
@pytest.mark.parametrize("direction", ["noising", "denoising"])
def test_every_edge(kind: str, direction: str) -> None:
    model = plain(kind)
    task = pairs_task(model, LENGTHS)
    expected = effects(model, task, direction)
    result = edge_patching(model, task, direction=direction, progress=False)
    for name, table in (("score", expected.abs().mean(0)), ("signed", expected.mean(0))):
        torch.testing.assert_close(result.tensors[name].values, table, rtol=0, atol=ROUNDING, equal_nan=True)


@pytest.mark.parametrize("wrong", ["norm of the base run", "later readers see it too"])
def test_mistakes_are_told_apart(wrong: str) -> None:
    model = plain("gpt2_like")
    task = pairs_task(model, (4,))
    found = edge_patching(model, task, progress=False).signed.values
    gap = (found - effects(model, task, wrong=wrong).mean(0)).abs()
    assert gap[~gap.isnan()].max() > 1e6 * ROUNDING


def test_edges_out_of_a_head_add_up_to_the_head_in_a_linear_network() -> None:
    model = plain("linear")
    task = pairs_task(model, LENGTHS)
    graph = Graph.of(model.info)
    signed = edge_patching(model, task, progress=False).signed.values
    nodes = [Node("z", layer, None, head) for layer in range(2) for head in range(2)]
    nodes += [Node("mlp_out", layer) for layer in range(2)]
    rows = [graph.writer_index(f"a{n.layer}.h{n.head}" if n.site == "z" else f"m{n.layer}") for n in nodes]
    whole = exact_effects(model, task, nodes, positions="all").mean(0)
    torch.testing.assert_close(signed.nansum(1)[rows], whole, rtol=0, atol=ROUNDING)
    direct = signed[rows, -1]  # wrong: the edge into the logits alone
    assert (direct - whole).abs().max() > 1e6 * ROUNDING


def test_edges_of_one_writer_add_up_to_its_node_only_where_the_network_is_linear() -> None:
    model = plain("gpt2_like")
    task = pairs_task(model, LENGTHS)
    whole = exact_effects(model, task, [Node("z", 0, None, 0)], positions="all").mean()
    signed = edge_patching(model, task, progress=False).signed.values
    assert (signed.nansum(1)[Graph.of(model.info).writer_index("a0.h0")] - whole).abs() > 1e-6


@pytest.mark.parametrize("family", ["gpt2", "qwen3", "gpt_neox", "phi3", "phi", "falcon_groups"])
def test_families(family: str) -> None:
    """One edge ablated in a run, and one edge patched: two ways to the same number."""
    model = hf(family)
    task = pairs_task(model, LENGTHS)
    run = EdgeRun(model, task)
    edges = [("a0.h1", "a1.h0<q>"), ("a0.h3", "a1.h1<k>"), ("m0", "a1.h1<v>"), ("input", "m1"), ("a1.h2", "logits")]
    result = edge_patching(model, task, edges, progress=False)
    base = run.metric(run.graph.mask)
    for source, target in edges:
        keep = run.graph.mask.clone()
        keep[run.graph.writer_index(source), run.graph.reader_index(target)] = False
        change = (run.metric(keep) - base).mean().item()
        assert result.value(source, target, "signed") == pytest.approx(change, abs=1e-5 * bigness(model, task))
    assert int((~result.score.values.isnan()).sum()) == len(edges)


def test_cost_and_zeros_are_exact() -> None:
    model = plain("gpt2_like")
    task = pairs_task(model, changed=(3,))
    result = edge_patching(model, task, progress=False)
    n_edges = int(Graph.of(model.info).mask.sum())
    first = sum(1 for j in Graph.of(model.info).mask.nonzero()[:, 1].tolist() if j < 7)  # the readers of block 0
    assert result.passes == (2 * 3 + 3 * (first + 0.5 * (n_edges - first)), 0.0)
    same = pairs_task(model, changed=())
    nothing = edge_patching(model, same, progress=False)
    assert nothing.passes == (6.0, 0.0)
    assert nothing.settings["n_trivial_zero"] == n_edges
    assert bool((nothing.score.values[Graph.of(model.info).mask] == 0).all())


def test_padding_batches_and_a_journal_do_not_matter(tmp_path: Any) -> None:
    model = plain("llama_like")
    task = pairs_task(model, LENGTHS)
    whole = edge_patching(model, task, progress=False).signed.values
    for side in ("left", "right"):
        other = edge_patching(model, repadded(task, side), batch_size=7, progress=False).signed.values
        torch.testing.assert_close(other, whole, rtol=0, atol=ROUNDING, equal_nan=True)
    journal = tmp_path / "journal"
    first = edge_patching(model, task, progress=False, resume=journal).signed.values
    journal.write_bytes(b"".join(journal.read_bytes().splitlines(keepends=True)[:2]))
    again = edge_patching(model, task, progress=False, resume=journal).signed.values
    torch.testing.assert_close(again, first, rtol=0, atol=0, equal_nan=True)


def test_bad_input() -> None:
    model = plain("gpt2_like")
    task = pairs_task(model)
    with pytest.raises(SettingError, match=r"edge m1 -> a0\.h0<q>"):
        edge_patching(model, task, [("m1", "a0.h0<q>")])
    with pytest.raises(UnknownNameError, match=r"writer 'a9\.h0'"):
        edge_patching(model, task, [("a9.h0", "logits")])
    with pytest.raises(EmptyTaskError, match="an empty list of edges"):
        edge_patching(model, task, [])
    strange: tuple[Any, ...] = ([("a0.h0", "m1", 0.3)], ("a0.h0", "m1"), "a0.h0", [None], 3)
    for edges in strange:
        with pytest.raises(SettingError, match=r"fix: give \(writer, reader\) pairs"):
            edge_patching(model, task, edges)
