"""Circuits: which edges are kept, on hand-made graphs and against searches written the slow way."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mechattr.errors import ArtifactError, AxisError, SettingError, UnknownNameError
from mechattr.labelled import Labelled
from mechattr.patching.circuit import Circuit, circuit_of, extracted
from mechattr.patching.edge_artifact import EdgeAttribution, edge_tables
from mechattr.patching.extraction import greedy, on_paths, strongest
from mechattr.patching.graph import Graph

SMALL = Graph(2, 2, 2, True, False)
GROUPED = Graph(2, 4, 2, True, False)
GRAPHS = [SMALL, GROUPED, Graph(2, 2, 1, True, True), Graph(3, 2, 2, False, False)]
Edges = set[tuple[str, str]]


def scored(graph: Graph, signed: Tensor, score: Tensor | None = None, direction: str = "denoising") -> EdgeAttribution:
    sizes = {name: getattr(graph, name) for name in ("n_layers", "n_heads", "n_kv_heads", "has_mlp", "parallel")}
    settings: Any = {
        "direction": direction,
        "method": "eap",
        "metric": {"name": "difference", "unit": "logit"},
        **sizes,
    }
    tables = edge_tables(graph, signed.abs() if score is None else score, signed)
    return EdgeAttribution(tables, settings=settings, provenance={"torch": "x"})


def values_of(graph: Graph, given: dict[tuple[str, str], float], other: float = 0.0) -> Tensor:
    values = torch.full(graph.mask.shape, other, dtype=torch.float64)
    for (source, target), value in given.items():
        values[graph.writer_index(source), graph.reader_index(target)] = value
    return values


def mask_of(graph: Graph, edges: Edges) -> Tensor:
    return values_of(graph, dict.fromkeys(edges, 1.0)).bool()


def edges_of(graph: Graph, mask: Tensor) -> Edges:
    return {(graph.writers[i], graph.readers[j]) for i, j in mask.nonzero().tolist()}


def random_values(graph: Graph, seed: int) -> Tensor:
    values = torch.randn(graph.mask.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.masked_fill(~graph.mask, torch.nan)


# --- dead ends


def on_some_path(graph: Graph, edges: Edges) -> Edges:
    """Walks every path from the input, one by one, and keeps the edges of those that arrive."""
    found: Edges = set()

    def walk(writer: str, path: list[tuple[str, str]]) -> None:
        for source, target in edges:
            if source == writer:
                longer = [*path, (source, target)]
                if target == "logits":
                    found.update(longer)
                for head in graph.fed_by(target):
                    walk(head, longer)

    walk("input", [])
    return found


def from_below_only(graph: Graph, edges: Edges) -> Edges:
    """Wrong: keeps what the input reaches, and so also what never arrives at the logits."""
    reached, before = {"input"}, -1
    while len(reached) > before:
        before = len(reached)
        reached |= {head for source, target in edges if source in reached for head in graph.fed_by(target)}
    return {edge for edge in edges if edge[0] in reached}


def first_head_only(graph: Graph, edges: Edges) -> Edges:
    """Wrong: keys and values lead to one query head only."""

    class OneHead:
        def fed_by(self, reader: str) -> tuple[str, ...]:
            return graph.fed_by(reader)[:1]

    return on_some_path(OneHead(), edges)  # type: ignore[arg-type]


def sparse(graph: Graph, seed: int) -> Edges:
    chance = torch.rand(graph.mask.shape, generator=torch.Generator().manual_seed(seed))
    return edges_of(graph, graph.mask & (chance < 0.25))


def agrees(prune: Callable[[Graph, Edges], Edges], graphs: list[Graph]) -> bool:
    cases = [(graph, sparse(graph, seed)) for graph in graphs for seed in range(12)]
    return all(prune(graph, edges) == on_some_path(graph, edges) for graph, edges in cases)


def ours(graph: Graph, edges: Edges) -> Edges:
    return edges_of(graph, on_paths(mask_of(graph, edges), graph))


def test_dead_ends_are_the_edges_on_no_path_from_the_input_to_the_logits() -> None:
    assert agrees(ours, GRAPHS)
    assert not agrees(from_below_only, GRAPHS), "pruning from below alone leaves edges that lead nowhere"
    assert not agrees(first_head_only, [GROUPED]), "a shared key leads to every head of its group"
    assert any(0 < len(ours(graph, sparse(graph, 1))) < len(sparse(graph, 1)) for graph in GRAPHS)


def test_a_shared_key_leads_to_the_second_head_of_its_group() -> None:
    path = {("input", "a0.h1<k>"), ("a0.h3", "logits")}
    assert ours(GROUPED, path) == path
    assert ours(GROUPED, {("input", "a0.h1<k>"), ("a0.h1", "logits")}) == set()


def test_dead_ends_from_below_and_from_above_are_dropped() -> None:
    path = {("input", "a0.h0<v>"), ("a0.h0", "m1"), ("m1", "logits")}
    above = {("input", "m0"), ("m0", "a1.h0<q>")}  # nothing leaves a1.h0
    below = {("a0.h1", "a1.h1<k>"), ("a1.h1", "logits")}  # nothing enters a0.h1
    assert ours(SMALL, path | above | below) == path


# --- what is taken


def slow_greedy(values: Tensor, n: int, graph: Graph) -> Edges:
    inside, kept = {"logits"}, dict[tuple[str, str], None]()
    for _ in range(n):
        frontier = [
            (float(values[i, j]), (writer, reader))
            for i, writer in enumerate(graph.writers)
            for j, reader in enumerate(graph.readers)
            if (writer, reader) not in kept
            and graph.mask[i, j]
            and not values[i, j].isnan()
            and (reader == "logits" or inside & {*graph.fed_by(reader)})
        ]
        if frontier:
            best = max(frontier, key=lambda item: item[0])[1]  # the first of equal ones
            kept[best] = None
            inside.add(best[0])
    return {*kept}


@pytest.mark.parametrize("graph", GRAPHS)
def test_greedy_equals_a_search_over_the_whole_frontier(graph: Graph) -> None:
    for seed in range(4):
        values = random_values(graph, seed)
        values[:, ::3] = values[:, ::3].round()  # ties
        values[0, 1] = torch.nan
        for n in (1, 6, 15):
            assert edges_of(graph, greedy(values, n, graph)) == slow_greedy(values, n, graph)
    assert edges_of(graph, greedy(values, 15, graph)) != edges_of(graph, strongest(values, 15)), "greedy is not top-n"


def test_greedy_takes_no_more_than_can_be_reached() -> None:
    values = random_values(SMALL, 0)
    values[:, SMALL.reader_index("logits")] = torch.nan
    assert not greedy(values, 5, SMALL).any()


def test_the_strongest_take_ties_in_the_order_of_the_graph_and_never_what_was_not_measured() -> None:
    values = values_of(SMALL, {("input", "m1"): 2.0}).masked_fill(~SMALL.mask, torch.nan)
    values[0, 0] = torch.nan
    assert edges_of(SMALL, strongest(values, 3)) == {("input", "m1"), ("input", "a0.h1<q>"), ("input", "a0.h0<k>")}


def two_routes() -> EdgeAttribution:
    """One route that helps, a stronger one that hurts, and an edge that leads nowhere."""
    helps = {("input", "a0.h0<v>"): 1.0, ("a0.h0", "logits"): 1.0}
    hurts = {("input", "m0"): -3.0, ("m0", "logits"): -3.0}
    return scored(SMALL, values_of(SMALL, {**helps, **hurts, ("a0.h0", "a1.h0<q>"): 0.5}))


def test_contribution_takes_what_helps_and_score_what_is_large() -> None:
    helps, hurts = [("input", "a0.h0<v>"), ("a0.h0", "logits")], [("input", "m0"), ("m0", "logits")]
    for method in ("top", "greedy"):
        assert circuit_of(two_routes(), 2, method=method).edges == helps  # type: ignore[arg-type]
        for by in ("score", "abs_signed"):
            by_size = circuit_of(two_routes(), 2, by=by, method=method)  # type: ignore[arg-type]
            assert by_size.edges == hurts != helps, "ranking by size is another circuit"


def test_under_noising_the_metric_lost_is_the_contribution() -> None:
    signed = -two_routes().signed.values
    assert circuit_of(scored(SMALL, signed, direction="noising"), 2).edges == circuit_of(two_routes(), 2).edges
    assert circuit_of(scored(SMALL, signed), 2).edges != circuit_of(two_routes(), 2).edges


def test_score_and_magnitude_of_the_mean_differ_where_pairs_cancel() -> None:
    cancels = {("input", "m1"): 5.0, ("m1", "logits"): 5.0}
    mean = {("input", "m0"): 1.0, ("m0", "logits"): 1.0}
    edges = scored(SMALL, values_of(SMALL, mean), score=values_of(SMALL, {**cancels, **mean}))
    assert circuit_of(edges, 2, by="score").edges == [*cancels]
    assert circuit_of(edges, 2, by="abs_signed").edges == [*mean]


# --- the result


def test_a_circuit_counts_what_is_left_and_says_what_was_asked() -> None:
    edges = two_routes()
    circuit = edges.circuit(3)
    assert (circuit.n_edges, circuit.nodes) == (2, ["input", "a0.h0", "logits"])
    assert circuit.settings["extraction"] == {
        "method": "top",
        "by": "contribution",
        "requested": 3,
        "taken": 3,
        "kept": 2,
    }
    assert circuit.settings["method"] == "eap"
    assert circuit.graph == SMALL
    assert torch.equal(circuit.mask | circuit.complement(), SMALL.mask)
    assert not (circuit.mask & circuit.complement()).any()
    page = circuit._repr_html_()
    assert f"2 of {SMALL.n_edges} edges, 3 nodes; top by contribution, 3 requested" in page
    assert "a0.h0&lt;v&gt;" in page
    assert repr(circuit) == f"Circuit(2 of {SMALL.n_edges} edges, 3 nodes; top by contribution, 3 requested)"


def test_the_whole_graph_is_a_circuit_without_dead_ends() -> None:
    for graph in GRAPHS:
        edges = scored(graph, random_values(graph, 0))
        for method in ("top", "greedy"):
            assert torch.equal(circuit_of(edges, graph.n_edges, method=method).mask, graph.mask)  # type: ignore[arg-type]


def test_a_circuit_without_a_path_is_refused() -> None:
    lonely = scored(SMALL, values_of(SMALL, {("input", "m0"): 1.0}))
    nothing = scored(SMALL, values_of(SMALL, {}))
    for edges, top in ((lonely, 1), (nothing, 3)):
        with pytest.raises(SettingError) as error:
            circuit_of(edges, top)
        assert str(error.value) == (
            f"a circuit of {top} edges by contribution\n  found: none of them on a path from the input to the logits\n"
            "  fix: ask for more edges or method='greedy'"
        )
        circuit = extracted(edges, top)
        assert (circuit.n_edges, circuit.edges, circuit.nodes) == (0, [], [])
        assert circuit.to_pandas().empty
    late = scored(SMALL, values_of(SMALL, {("m1", "logits"): 1.0}))
    with pytest.raises(SettingError, match=r"fix: ask for more edges$"):
        circuit_of(late, 1, method="greedy")


@pytest.mark.parametrize("top", [0, -1, 10_000, 2.0, True])
def test_a_circuit_larger_than_the_graph_is_refused(top: Any) -> None:
    with pytest.raises(SettingError) as error:
        circuit_of(two_routes(), top)
    assert str(error.value) == (
        f"a circuit of {top!r} edges\n  found: a graph of {SMALL.n_edges} edges\n  fix: ask for 1 to {SMALL.n_edges}"
    )


def test_edges_that_were_not_measured_are_never_taken() -> None:
    values = values_of(SMALL, {("input", "logits"): 1.0}, other=torch.nan)
    edges = scored(SMALL, values)
    assert circuit_of(edges, 1).edges == [("input", "logits")]
    with pytest.raises(SettingError, match=re.escape(f"{SMALL.n_edges} edges, 1 of them measured")):
        circuit_of(edges, 2)


def test_unknown_measures_and_methods_are_refused() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'greedy'"):
        circuit_of(two_routes(), 2, method="gredy")  # type: ignore[arg-type]
    with pytest.raises(UnknownNameError, match="did you mean 'contribution'"):
        circuit_of(two_routes(), 2, by="contributions")  # type: ignore[arg-type]


def test_the_table_has_the_largest_contribution_first() -> None:
    given = {("input", "m0"): 1.0, ("m0", "m1"): -3.0, ("m1", "logits"): 2.0}
    table = circuit_of(scored(SMALL, values_of(SMALL, given)), 3, by="score").to_pandas()
    assert [*table.columns] == ["source", "target", "contribution"]
    assert table.values.tolist() == [["m0", "m1", -3.0], ["m1", "logits", 2.0], ["input", "m0", 1.0]]


def test_a_circuit_is_stored(tmp_path: Path) -> None:
    circuit = two_routes().circuit(2)
    circuit.save(tmp_path / "c.circuit")
    again = Circuit.load(tmp_path / "c.circuit")
    again.verify()
    assert again.edges == circuit.edges
    assert again.mask.dtype == torch.bool
    assert (again.settings, again.provenance) == (circuit.settings, circuit.provenance)
    with pytest.raises(ArtifactError, match="kind 'circuit'"):
        EdgeAttribution.load(tmp_path / "c.circuit")


def test_tables_of_another_graph_are_refused() -> None:
    circuit = two_routes().circuit(2)
    with pytest.raises(AxisError, match="7 writers and 15 readers of the graph"):
        replace(circuit, tensors={**circuit.tensors, "kept": Labelled(circuit.mask, ("source", "target"))})
    with pytest.raises(AxisError, match="no such table"):
        replace(circuit, tensors={"kept": circuit.tensors["kept"]})
    with pytest.raises(SettingError, match="edges that the graph does not have"):
        circuit._with(~circuit.graph.mask, {})
    with pytest.raises(SettingError, match="settings without n_layers"):
        replace(circuit, settings={})


# --- without a node, and random ones


def test_without_a_node_its_edges_are_gone_and_no_others() -> None:
    graph = SMALL
    whole = circuit_of(scored(graph, random_values(graph, 3)), graph.n_edges)
    less = whole.without("a1.h0")
    gone = {*whole.edges} - {*less.edges}
    assert gone == {
        (source, target) for source, target in whole.edges if source == "a1.h0" or target.startswith("a1.h0<")
    }
    assert gone
    assert less.settings["extraction"]["without"] == ["a1.h0"]  # type: ignore[index, call-overload]
    assert less.without("m0").settings["extraction"]["without"] == ["a1.h0", "m0"]  # type: ignore[index, call-overload]


def test_shared_keys_stay_until_the_last_head_of_the_group_goes() -> None:
    whole = circuit_of(scored(GROUPED, random_values(GROUPED, 3)), GROUPED.n_edges)
    once = whole.without("a1.h2")
    assert ("input", "a1.h1<k>") in once.edges
    assert ("input", "a1.h2<q>") not in once.edges
    twice = once.without("a1.h3")
    assert not [edge for edge in twice.edges if edge[1] in ("a1.h1<k>", "a1.h1<v>")]


@pytest.mark.parametrize("node", ["input", "logits", "m1", "nonsense"])
def test_only_nodes_of_the_circuit_can_be_taken_out(node: str) -> None:
    with pytest.raises(UnknownNameError, match="1 heads and MLPs in it"):
        two_routes().circuit(2).without(node)


def test_random_circuits_have_the_same_size_and_every_edge_the_same_chance() -> None:
    circuit = circuit_of(scored(SMALL, random_values(SMALL, 0)), 30, method="greedy")
    n, total = circuit.n_edges, SMALL.n_edges
    draws = torch.stack([circuit.random_like(seed).mask for seed in range(400)])
    assert (draws.sum((1, 2)) == n).all()
    assert not (draws & ~SMALL.mask).any()
    assert torch.equal(circuit.random_like(7).mask, draws[7])
    assert len({tuple(draw.flatten().tolist()) for draw in draws}) == 400
    chance, share = n / total, draws.double().mean(0)[SMALL.mask]
    spread = (chance * (1 - chance) / 400) ** 0.5
    assert ((share - chance).abs() < 4.5 * spread).all()  # 4.5 standard errors: once in 3,000 runs over all edges
    pruned = torch.stack([on_paths(draw, SMALL) for draw in draws]).double().mean(0)[SMALL.mask]
    assert ((pruned - chance).abs() > 4.5 * spread).any(), "pruned circuits would not have equal chances"
