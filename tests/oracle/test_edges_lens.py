"""Edge attribution and circuits beside TransformerLens's own, on the same weights.

What differs: it takes the gradient at the corrupt run (our denoising), gives each position edges of its own (summed
here), and its input is the token embedding alone. Position embeddings are the same on both prompts, so they add nothing
to the change of the input, nor to what an ablated input carries.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from patching_cases import hf, pairs_task
from torch import Tensor

from mechattr.patching.edge_run import EdgeRun
from mechattr.patching.edges import edge_attribution

SCORES = 1e-5  # of the largest score; float32 sums in another order
SHARES = 1e-4  # float32 metrics of order one to ten, over gaps of order one
LENGTH, PAIRS = 6, 3


class Lens:
    """A model behind a TransformerBridge, and a task on it, pair by pair."""

    def __init__(self, model: Any, task: Any, root: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(root)
            from benchmarks import edges, models
        self.bridge, self.task, self.names = models.bridge(model.model), task, edges
        self.bridge.embed.requires_grad_(True)  # it differentiates embeddings, whose graph frozen weights do not begin

    def pair(self, row: int) -> tuple[Tensor, Tensor, int, int]:
        clean, corrupt = (batch.tokens[[row]] for batch in (self.task.clean, self.task.corrupt))
        return clean, corrupt, int(self.task.answers[row]), int(self.task.foils[row])

    def scores(self) -> dict[tuple[str, str], float]:
        """The mean over pairs, positions summed."""
        rows = [self.names.lens_scores(self.bridge, *self.pair(row)) for row in range(PAIRS)]
        return {edge: sum(row[edge] for row in rows) / PAIRS for edge in rows[0]}

    def recovered(self, row: int, kept: set[tuple[str, str]]) -> float:
        """What a circuit keeps of one pair's gap, its edges kept at all positions."""
        from transformer_lens.tools.analysis import attribution_patching as lens

        clean, corrupt, answer, foil = self.pair(row)

        def metric(logits: Tensor) -> Tensor:
            return logits[0, -1, answer] - logits[0, -1, foil]

        config = lens.EdgeAttributionConfig(granularity="edge")
        every = lens.attribution_patch(self.bridge, clean, corrupt, metric, config).edge_scores
        circuit = [(u, v) for u, v in every if (self.names.name(u), self.names.name(v)) in kept]
        return lens.faithfulness(self.bridge, clean, corrupt, metric, circuit).recovered


@pytest.fixture(scope="module")
def case(root: Path) -> tuple[Any, Any, Lens]:
    """Our model, a task, and TransformerLens on both."""
    model = hf("gpt2")
    task = pairs_task(model, (LENGTH,) * PAIRS, changed=(1, 2, LENGTH - 1))
    return model, task, Lens(model, task, root)


def test_scores_of_all_edges(case: Any) -> None:
    model, task, lens = case
    theirs = lens.scores()

    def gap(**how: Any) -> float:
        ours = edge_attribution(model, task, method="eap", progress=False, **{"direction": "denoising", **how})
        assert len(theirs) == ours.graph.n_edges
        largest = max(map(abs, theirs.values()))
        return max(abs(ours.value(*edge, "signed") - score) for edge, score in theirs.items()) / largest

    assert gap() < SCORES
    # wrong: the gradient at the other prompt
    assert gap(direction="noising") > 0.1


@pytest.mark.parametrize(("share", "seed"), [(0.9, 0), (0.5, 1), (0.2, 2)])
def test_what_circuits_keep(case: Any, share: float, seed: int) -> None:
    model, task, lens = case
    run = EdgeRun(model, task)
    graph = run.graph
    keep = graph.mask & (torch.rand(graph.mask.shape, generator=torch.Generator().manual_seed(seed)) < share)
    kept = {(graph.writers[row], graph.readers[column]) for row, column in keep.nonzero().tolist()}
    theirs = torch.tensor([lens.recovered(row, kept) for row in range(PAIRS)], dtype=torch.float64)

    def ours(run: EdgeRun, keep: Tensor) -> Tensor:
        whole, empty, metric = run.metrics(torch.stack([graph.mask, torch.zeros_like(keep), keep]))
        return (metric - empty) / (whole - empty)

    torch.testing.assert_close(ours(run, keep), theirs, rtol=0, atol=SHARES)
    # wrong: the corrupt run with clean values outside the circuit
    assert (ours(EdgeRun(model, task, direction="denoising"), keep) - theirs).abs().max() > 0.05
    # wrong: keys and values left out of what is cut
    spared = keep | (graph.mask & torch.tensor(["<k>" in reader or "<v>" in reader for reader in graph.readers]))
    assert (ours(run, spared) - theirs).abs().max() > 0.05
