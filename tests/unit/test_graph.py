"""The graph of edges: counts, order, which edges exist, and names."""

from __future__ import annotations

import pytest
import torch

from mechattr.errors import UnknownNameError
from mechattr.models.base import ModelInfo
from mechattr.patching.graph import Graph, count_edges

GPT2_SMALL = ModelInfo(
    name="gpt2", family="gpt2", backend="hf", n_layers=12, n_heads=12, n_kv_heads=12, d_model=768, d_head=64,
    d_mlp=3072, d_vocab=50257, n_ctx=1024, norm="layer",
)  # fmt: skip
SHAPES = [
    Graph(2, 4, 2, True, False),
    Graph(3, 2, 2, True, True),
    Graph(2, 3, 1, False, False),
    Graph(1, 1, 1, True, False),
]


def slow_mask(graph: Graph, *, wrong: str = "") -> torch.Tensor:
    """Edge by edge from names: a writer comes before a reader if its stage in the network is earlier."""

    def stage(name: str, reads: bool) -> int:
        if name in ("input", "logits"):
            return -1 if name == "input" else 10**6
        layer = int(name[1:].split(".")[0])
        if name[0] == "a":
            return 4 * layer + (0 if reads else 1)
        late = 0 if graph.parallel or wrong == "the MLP does not see its block's heads" else 2
        return 4 * layer + (late if reads else 3)

    return torch.tensor([[stage(w, False) < stage(r, True) for r in graph.readers] for w in graph.writers])


def test_counts_of_published_graphs() -> None:
    graph = Graph.of(GPT2_SMALL)
    assert (len(graph.writers), len(graph.readers), graph.n_edges) == (157, 445, 32_491)
    assert count_edges(GPT2_SMALL) == 32_491
    ungrouped, grouped = Graph(32, 32, 32, True, False), Graph(32, 32, 8, True, False)
    assert len(ungrouped.writers) == len(grouped.writers) == 1_057
    assert ungrouped.n_edges == 1_592_881  # the published count gives every query head its own keys and values
    assert grouped.n_edges == 805_681


@pytest.mark.parametrize("graph", SHAPES)
def test_edges_follow_the_order_of_the_network(graph: Graph) -> None:
    assert torch.equal(graph.mask, slow_mask(graph))
    assert graph.n_edges == int(graph.mask.sum())
    if graph.has_mlp and not graph.parallel:
        assert not torch.equal(graph.mask, slow_mask(graph, wrong="the MLP does not see its block's heads"))


def test_names_and_their_order() -> None:
    graph = Graph(2, 2, 1, True, False)
    assert graph.writers == ("input", "a0.h0", "a0.h1", "m0", "a1.h0", "a1.h1", "m1")
    assert graph.readers[:5] == ("a0.h0<q>", "a0.h1<q>", "a0.h0<k>", "a0.h0<v>", "m0")
    assert graph.readers[5] == "a1.h0<q>" and graph.readers[-1] == "logits"
    assert graph.writer_index("m1") == 6 and graph.reader_index("logits") == len(graph.readers) - 1
    assert [graph.layer_of(name) for name in ("input", "logits", "a1.h1<q>", "a0.h1", "m1")] == [None, None, 1, 0, 1]


def test_a_group_of_heads_depends_on_one_key() -> None:
    graph = Graph(2, 4, 2, True, False)
    assert graph.fed_by("a1.h1<k>") == graph.fed_by("a1.h1<v>") == ("a1.h2", "a1.h3")
    assert graph.fed_by("a1.h3<q>") == ("a1.h3",)
    assert graph.fed_by("m0") == ("m0",)
    assert graph.fed_by("logits") == ()


def test_every_reader_and_writer_has_a_layer() -> None:
    graph = Graph(3, 2, 1, True, True)
    for name in (*graph.writers, *graph.readers):
        assert graph.layer_of(name) == (None if name in ("input", "logits") else int(name[1]))


def test_unknown_names() -> None:
    graph = Graph(2, 2, 2, True, False)
    with pytest.raises(UnknownNameError, match=r"writer 'a9.h0'(.|\n)*has no such writer"):
        graph.writer_index("a9.h0")
    with pytest.raises(UnknownNameError, match=r"reader 'a0.h0'(.|\n)*has no such reader"):
        graph.reader_index("a0.h0")
    with pytest.raises(UnknownNameError, match="neither a writer nor a reader"):
        graph.layer_of("a7.h0<q>")
    with pytest.raises(UnknownNameError, match="has no such reader"):
        graph.fed_by("input")
