"""Every method on a circuit that is known because it was set by hand.

Which edges can be seen depends on the pairs. The two that carry positions to the first head are the same on both
prompts of every pair: only zero ablation shows them. Noising breaks an AND: each link that differs between the prompts
has an effect. Denoising repairs single links: a key alone changes nothing while the query matches nothing else.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import pytest
import torch
from induction_model import (
    BLOCK,
    BY_TOKENS,
    CIRCUIT,
    COMPOSITION,
    EARLIER,
    QUERY,
    READOUT,
    VALUE,
    induction_model,
    induction_task,
)
from torch import Tensor

import mechattr as ma
from mechattr.evaluation.faithfulness import faithfulness
from mechattr.evaluation.ground_truth import edge_auroc
from mechattr.models.rules import Rules
from mechattr.patching.bound import missed_effect_bound
from mechattr.patching.edge_artifact import EdgeAttribution, edge_tables
from mechattr.patching.edge_patching import edge_patching
from mechattr.patching.edge_run import EdgeRun
from mechattr.patching.edges import edge_attribution
from mechattr.patching.path import path_patching
from mechattr.sites import Node

ROUNDING = 1e-12  # float64, a few hundred operations on numbers of order one to ten
NOISE = 0.001  # of what the other heads write: effects up to 0.12 beside 4.3 in the circuit
SHARP = 20.0  # the softmax is saturated: its gradient is of order exp(-20)
PREVIOUS, INDUCTION = Node("z", 0, head=0), Node("z", 1, head=0)

Edge = tuple[str, str]


@pytest.fixture(scope="module")
def clear() -> tuple[Any, Any]:
    """No effect outside the circuit."""
    model = induction_model()
    return model, induction_task(model)


@pytest.fixture(scope="module")
def noisy() -> tuple[Any, Any]:
    """Small effects outside the circuit."""
    model = induction_model(noise=NOISE)
    return model, induction_task(model)


def mask_of(run: EdgeRun, edges: Collection[Edge]) -> Tensor:
    keep = torch.zeros_like(run.graph.mask)
    for source, target in edges:
        keep[run.graph.writer_index(source), run.graph.reader_index(target)] = True
    return keep


def seen(edges: EdgeAttribution) -> set[Edge]:
    """Edges with an effect."""
    return set(edges.top(int((edges.score.values > ROUNDING).sum())))


# -- the construction


@pytest.mark.parametrize("noise", [0.0, NOISE])
@pytest.mark.parametrize("sharpness", [6.0, SHARP])
def test_the_model_does_what_it_was_set_to(noise: float, sharpness: float) -> None:
    model = induction_model(noise=noise, sharpness=sharpness)
    task = induction_task(model)
    run = model.run(task.clean, record=["pattern"])
    first, second = (run.activations["pattern", layer].values[:, 0] for layer in (0, 1))
    for row, length in enumerate(task.clean.lengths.tolist()):
        assert run.logits[row, length - 1].argmax() == task.answers[row]
        assert (first[row].diagonal(-1)[: length - 1] > 0.99).all()
        for query in range(BLOCK + 1, length):  # the first token again has two matches: its own position has no other
            assert second[row, query].argmax() == query - BLOCK + 1
            assert second[row, query].max() > 0.95
    assert (task.metric(model.run(task.corrupt).logits, task.corrupt) < 1).all()  # the answer is not repeated there


def test_every_edge_of_the_design_is_needed_and_no_other(clear: Any) -> None:
    run = EdgeRun(*clear, ablation="zero")
    every = run.graph.mask
    found = run.metrics(torch.stack([every, mask_of(run, CIRCUIT), *(mask_of(run, CIRCUIT - {e}) for e in CIRCUIT)]))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=ROUNDING)
    assert (found[2:] < 0.6 * found[0]).all()  # without positions the first head averages over all earlier tokens


# -- edges


@pytest.mark.parametrize(
    ("changed", "direction", "expected"),
    [
        ("all", "noising", BY_TOKENS),
        ("all", "denoising", {VALUE, READOUT}),
        ("first block", "noising", {EARLIER, COMPOSITION, VALUE, READOUT}),
        ("first block", "denoising", {VALUE, READOUT}),
        ("last token", "noising", {QUERY, READOUT}),
        ("last token", "denoising", {QUERY, READOUT}),
        ("target", "noising", {VALUE, READOUT}),
        ("target", "denoising", {VALUE, READOUT}),
    ],
)
def test_exact_effects_are_those_of_the_design(clear: Any, changed: str, direction: str, expected: set[Edge]) -> None:
    model, _ = clear
    task = induction_task(model, changed)
    edges = edge_patching(model, task, direction=direction, progress=False)
    assert seen(edges) == expected
    assert min(edges.value(*edge, "contribution") for edge in expected) > 0.5
    assert edge_auroc(edges, expected) == 1
    # wrong: what one pair of prompts shows is taken for the whole circuit
    assert edge_auroc(edges, CIRCUIT) < 1


@pytest.mark.parametrize("method", ["eap", "eap_ig", "clean_corrupted"])
@pytest.mark.parametrize("by", ["score", "contribution"])
def test_estimates_find_the_circuit(noisy: Any, method: str, by: Any) -> None:
    edges = edge_attribution(*noisy, method=method, progress=False)
    assert edge_auroc(edges, BY_TOKENS, by) == 1
    assert set(edges.circuit(len(BY_TOKENS), by=by).edges) == BY_TOKENS
    assert edge_auroc(shuffled(edges), BY_TOKENS, by) < 0.8


def shuffled(edges: EdgeAttribution) -> EdgeAttribution:
    """Wrong: scores at other edges than those that they belong to."""
    graph, order = edges.graph, torch.randperm(edges.graph.n_edges, generator=torch.Generator().manual_seed(0))
    tables = []
    for table in (edges.score.values, edges.signed.values):
        moved = table.clone()
        moved[graph.mask] = table[graph.mask][order]
        tables.append(moved)
    return EdgeAttribution(edge_tables(graph, *tables), settings=edges.settings, provenance=edges.provenance)


def test_a_saturated_softmax_hides_the_composition() -> None:
    model = induction_model(sharpness=SHARP, noise=NOISE)
    truth = {EARLIER, COMPOSITION, VALUE, READOUT}
    task = induction_task(model, "first block")
    plain, path = (edge_attribution(model, task, method=name, progress=False) for name in ("eap", "eap_ig"))
    assert edge_auroc(edge_patching(model, task, progress=False), truth) == 1
    # the gradient at the clean prompt is flat, but between the prompts attention lets go of the match
    assert edge_auroc(plain, truth) < 0.9
    assert edge_auroc(path, truth) == 1
    # where query and key change together they match all along the path between the prompts: nothing to integrate
    task = induction_task(model, "all")
    assert edge_auroc(edge_patching(model, task, progress=False), BY_TOKENS) == 1
    for method in ("eap", "eap_ig"):
        assert edge_auroc(edge_attribution(model, task, method=method, progress=False), BY_TOKENS) < 0.9


# -- nodes


@pytest.mark.parametrize("variant", ["default", "atp", "qk"])
def test_heads_of_the_circuit_come_first(noisy: Any, variant: str) -> None:
    how = {} if variant == "default" else {"variant": variant}
    estimate = ma.attribution_patching(*noisy, sites="z", positions="all", progress=False, **how)
    assert estimate.top(2) == [INDUCTION, PREVIOUS]
    exact = ma.activation_patching(*noisy, sites="z", positions="all", progress=False)
    assert exact.top(2) == [INDUCTION, PREVIOUS]
    assert exact.value(PREVIOUS) > 30 * exact.value(exact.top(3)[2])
    # wrong: no gradient through the attention pattern, which is all that the first head acts on
    held = ma.attribution_patching(
        *noisy, sites="z", variant="atp", positions="all", rules=Rules(pattern="detached"), progress=False
    )
    assert PREVIOUS not in held.top(4)


def test_graddrop_needs_a_block_that_the_path_does_not_use() -> None:
    """Each drop holds one block. In a path through both blocks of two, every drop cuts it."""
    for idle_blocks in (0, 1, 2):
        model = induction_model(idle_blocks=idle_blocks)
        last = idle_blocks + 1
        task = induction_task(model)
        star = ma.attribution_patching(model, task, sites="z", variant="star", positions="all", progress=False)
        plain = ma.attribution_patching(model, task, sites="z", variant="qk", positions="all", progress=False)
        found, full = (result.value(PREVIOUS) for result in (star, plain))
        assert abs(found - full * idle_blocks / last) < ROUNDING  # mean over the drops that leave the path
        if idle_blocks:
            assert star.top(2) == [Node("z", last, head=0), PREVIOUS]


def test_the_fix_of_the_softmax_finds_queries_and_keys() -> None:
    model = induction_model(sharpness=SHARP, noise=NOISE)
    task = induction_task(model)
    truth = {Node(site, 1, head=0) for site in "qkv"}
    sites = ("q", "k", "v")
    exact = ma.activation_patching(model, task, sites=sites, positions="all", progress=False)
    fixed = ma.attribution_patching(model, task, sites=sites, variant="qk", positions="all", progress=False)
    assert set(fixed.top(3)) == truth
    assert truth <= set(exact.top(4))
    for node in truth:
        torch.testing.assert_close(fixed.value(node), exact.value(node), rtol=1e-6, atol=0)  # nothing else is bent
    # wrong: the softmax taken as linear
    linear = ma.attribution_patching(model, task, sites=sites, variant="atp", positions="all", progress=False)
    assert not truth <= set(linear.top(10))


def test_the_bound_clears_all_other_heads(noisy: Any) -> None:
    model, task = noisy
    exact = ma.activation_patching(model, task, nodes=[PREVIOUS, INDUCTION], positions="all", progress=False)
    smallest = min(abs(exact.value(node, "signed")) for node in (PREVIOUS, INDUCTION))
    how: dict[str, Any] = {"sites": "z", "positions": "all", "p": 0.1, "progress": False}
    bound = missed_effect_bound(model, task, verified=exact, **how)
    assert bound.n_covered == 6
    assert bound.theta < smallest / 10
    # wrong: a true head was not verified
    assert missed_effect_bound(model, task, verified=[INDUCTION], **how).theta > 0.8 * smallest


# -- paths and circuits


def test_the_previous_token_head_acts_through_the_key(clear: Any) -> None:
    model, task = clear
    whole = ma.activation_patching(model, task, nodes=[PREVIOUS], positions="all", progress=False)

    def through(site: str, head: int) -> float:
        return path_patching(
            model, task, [Node(site, 1, head=head)], senders=[PREVIOUS], positions="all", progress=False
        ).value(PREVIOUS, "signed")

    torch.testing.assert_close(through("k", 0), whole.value(PREVIOUS, "signed"), rtol=0, atol=ROUNDING)
    assert whole.value(PREVIOUS, "signed") < -4
    for other in [("q", 0), ("v", 0), ("k", 1)]:
        assert abs(through(*other)) < ROUNDING


@pytest.mark.parametrize("noise", [0.0, NOISE])
@pytest.mark.parametrize("changed", ["all", "first block"])
def test_the_circuit_is_faithful_and_nothing_else_is(noise: float, changed: str) -> None:
    model = induction_model(noise=noise)
    task = induction_task(model, changed)
    truth = BY_TOKENS if changed == "all" else BY_TOKENS - {QUERY}
    circuit = edge_patching(model, task, progress=False).circuit(len(truth))
    assert set(circuit.edges) == truth
    result = faithfulness(model, task, circuit, random=3, progress=False)
    kept, rest = result.values.item(), result.tensors["complement"].values.item()
    assert kept > 0.95
    assert abs(rest) < 0.05
    if not noise:
        assert abs(kept - 1) < ROUNDING
    assert float(result.tensors["random"].values.max()) < 0.2
    run = EdgeRun(model, task)
    whole, empty, broken = run.metrics(
        torch.stack([run.graph.mask, mask_of(run, ()), mask_of(run, truth - {COMPOSITION})])
    ).mean(1)
    # wrong: the circuit without the edge by which the two heads compose
    assert (broken - empty) / (whole - empty) < 0.2
