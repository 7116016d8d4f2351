"""The area under the ROC curve of edges, from its definition by pairs."""

from __future__ import annotations

from typing import Any

import pytest
from induction_model import BY_TOKENS, COMPOSITION, QUERY, VALUE, induction_model, induction_task

from mechattr.errors import EmptyTaskError, MismatchError, SettingError, UnknownNameError
from mechattr.evaluation.ground_truth import edge_auroc
from mechattr.patching.edge_artifact import EdgeAttribution
from mechattr.patching.edge_patching import edge_patching
from mechattr.patching.edges import edge_attribution

ROUNDING = 1e-12  # a mean of a few hundred ones, halves and zeros


@pytest.fixture(scope="module")
def clear() -> tuple[Any, Any]:
    """A model with a known circuit, and a task."""
    model = induction_model()
    return model, induction_task(model)


def by_pairs(edges: EdgeAttribution, truth: set[tuple[str, str]], ties: float) -> float:
    """From the definition, all pairs of an edge inside and one outside."""
    graph = edges.graph
    places = [(graph.writers[row], graph.readers[column]) for row, column in graph.mask.nonzero().tolist()]
    score = {edge: edges.value(*edge) for edge in places}
    wins = [
        1.0 if score[a] > score[b] else ties if score[a] == score[b] else 0.0
        for a in truth
        for b in score.keys() - truth
    ]
    return sum(wins) / len(wins)


def test_auroc_counts_pairs(clear: Any) -> None:
    edges = edge_attribution(*clear, method="eap", progress=False)  # most edges tie at 0
    truth = {COMPOSITION, ("input", "a0.h1<v>"), ("a0.h1", "logits")}
    assert abs(edge_auroc(edges, truth) - by_pairs(edges, truth, ties=0.5)) < ROUNDING
    assert abs(edge_auroc(edges, truth) - by_pairs(edges, truth, ties=0.0)) > 0.1  # wrong: a tie is a loss
    assert edge_auroc(edges, [*truth, COMPOSITION]) == edge_auroc(edges, truth)


def test_auroc_says_what_it_cannot_do(clear: Any) -> None:
    edges = edge_attribution(*clear, method="eap", progress=False)
    some = edge_patching(*clear, [COMPOSITION, VALUE], progress=False)
    with pytest.raises(UnknownNameError, match=r"writer 'a0\.h9'"):
        edge_auroc(edges, [("a0.h9", "logits")])
    with pytest.raises(UnknownNameError, match=r"reader 'a1\.h0'"):
        edge_auroc(edges, [("a0.h0", "a1.h0")])
    with pytest.raises(UnknownNameError, match="measure 'size'"):
        edge_auroc(edges, BY_TOKENS, "size")  # type: ignore[arg-type]
    with pytest.raises(SettingError, match=r"edge a1\.h0 -> a0\.h0<q>\n  found: the reader comes before the writer"):
        edge_auroc(edges, [("a1.h0", "a0.h0<q>")])
    with pytest.raises(MismatchError, match=r"input -> a1\.h0<q> of the circuit\n  found: it was not measured"):
        edge_auroc(some, [QUERY])
    with pytest.raises(EmptyTaskError, match="0 of 81 measured edges"):
        edge_auroc(edges, [])
    with pytest.raises(EmptyTaskError, match="2 of 2 measured edges"):
        edge_auroc(some, [COMPOSITION, VALUE])
