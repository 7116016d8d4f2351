"""Edge attribution: every edge's effect estimated from a few forward and backward passes.

An edge carries what one part of the network wrote to another part that reads it. Its effect is estimated by the dot
product of the change of what is written with the gradient at the reader's own input, before the reader's norm. Plain
EAP takes the gradient at the base run, where saturated parts look unimportant; EAP-IG averages it over runs between the
two prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from mechattr.engines import quadrature
from mechattr.engines.executors import Executor
from mechattr.engines.spread import spread
from mechattr.errors import NonFiniteError, SettingError, UnknownNameError, nearest
from mechattr.models.base import Batch, HookedModel
from mechattr.models.edits import Edit
from mechattr.models.halving import Halving
from mechattr.models.operators import Set
from mechattr.models.rules import Rules, check_rules
from mechattr.patching.edge_artifact import EdgeAttribution, edge_tables
from mechattr.patching.edge_readers import Readers, Tile, tiles_of
from mechattr.patching.edge_scores import Writers, pair_scores
from mechattr.patching.graph import Graph, check_additive
from mechattr.patching.interventions import finite
from mechattr.patching.places import base_and_source, check_call, direction_of, places_of, rows_at_once
from mechattr.patching.settings import provenance_of, settings_of
from mechattr.sites import full_name
from mechattr.tasks.task import Task

METHODS = ("eap", "eap_ig", "clean_corrupted")
PAIRS_AT_ONCE = 16
KEPT = 2**29  # bytes of what is kept of all runs of a batch, unless a batch size is given


def edge_attribution(
    model: HookedModel,
    task: Task,
    *,
    method: str = "eap_ig",
    steps: int = 10,
    rule: str = "midpoint",
    direction: str = "noising",
    rules: Rules | None = None,
    checkpoint: bool = False,
    batch_size: int | None = None,
    progress: bool | None = None,
    resume: Path | None = None,
    executor: str | Executor | None = None,
) -> EdgeAttribution:
    r"""Estimates the effect of replacing what each edge carries by its value on the other prompt.

    $$\hat I(u \to v) = \sum_t \big(\text{out}_u(x') - \text{out}_u(x)\big)_t^\top
    \sum_k w_k \left.\frac{\partial L}{\partial\, \text{in}_v}\right|_{x_k,\,t}, \qquad
    \text{score} = \mathbb E_{\text{pairs}} |\hat I|, \quad \text{signed} = \mathbb E_{\text{pairs}} \hat I$$

    with $x$ the base prompt (clean under noising), $x'$ the other, $\text{in}_v$ the input of reader $v$ alone, before
    its norm, and $x_k$ runs on the straight path from the embeddings of $x'$ to those of $x$. Keys and values are one
    reader for each key/value head. Positions are summed.

    Since gradients are averaged along the whole path, the edges out of the input sum to the change of the metric:
    $\sum_v \hat I(\text{input} \to v) = L(x') - L(x)$. What is missing is the error of the quadrature;
    `settings["completeness"]` has it: `mean` and `max` over pairs in the metric's unit, and `relative`, the mean over
    the mean |change of the metric|. It is `None` under `rules`, which are not derivatives.

    Args:
        model: a hooked model whose blocks add each head's and each MLP's output to the residual stream.
        task: prompt pairs with a metric; `positions` are merged, so pairs only need equal lengths.
        method: `"eap"` (gradient at the base run), `"clean_corrupted"` (mean of the gradients at both prompts) or
            `"eap_ig"` (path integral with `steps` runs).
        steps: runs with a gradient of `"eap_ig"`; the others have 1 and 2.
        rule: quadrature of `"eap_ig"`: `"midpoint"`, `"gauss_legendre"`, or for comparison with published numbers
            `"left"`, which starts at $x'$ (the corrupt prompt under noising); also `"right"` and `"trapezoid"`.
        direction: `"noising"` or `"denoising"`, as in `attribution_patching`.
        rules: another backward pass, such as `Rules.relp()`; edges out of blocks that it holds score 0.
        checkpoint: keep the input of each block only and compute blocks again as a backward pass reaches them.
        batch_size: pairs at a time; otherwise up to 16, fewer where the runs of so many would not fit 512 MB; it halves
            itself when memory runs out.
        progress: `None` shows a bar on a terminal only.
        resume: a journal of finished blocks, with `executor` only: a run that was killed goes on from it.
        executor: `"ray"`, `"inprocess"` or an executor, to run the pairs block by block elsewhere; see `docs/scale.md`.

    Returns:
        `score` and `signed`, axes `source` and `target`, NaN where there is no edge; in the metric's unit.

    Raises:
        UnknownNameError: no such method, rule or direction.
        SettingError: an unusable `steps` or `batch_size`, `rules` that are none, or a metric without a gradient.
        UnsupportedFeatureError: a model that norms what its blocks write, so that heads do not add up, or `checkpoint`
            on a backend without it.
        AlignmentError: prompts of a pair with different lengths.
        EmptyTaskError: no pairs.
        NonFiniteError: the metric is NaN or infinite, or a gradient or an activation overflows in a narrow dtype.
        ExecutorError: a block failed for good.

    Cost:
        A pair: 2 forward and 1 backward pass for `"eap"`, 2 and 2 for `"clean_corrupted"`, `steps` + 2 forward (less
        where the rule has runs at the ends) and `steps` backward passes for `"eap_ig"`; with `checkpoint` as many
        forward passes again as there are backward passes. Memory besides one run's graph:
        queries, keys, values and the residual stream of each run with a gradient, working tensors of 64 MB, and for one
        pair at a time a number for each edge.

    References:
        Syed et al. 2023, arXiv:2310.10348 (EAP); Hanna et al. 2024, arXiv:2403.17806 (EAP-IG).
    """
    check_call("edge attribution", model, task)
    if executor is not None:
        return spread(edge_attribution, **locals())
    if resume is not None:
        fix = "give an executor, such as 'inprocess', or leave resume out"
        raise SettingError(f"resume={str(resume)!r}", "no executor: without blocks there is nothing to keep", fix)
    if method not in METHODS:
        raise UnknownNameError(f"method {method!r}", "no such method of edge attribution", nearest(method, METHODS))
    way = direction_of(direction)
    check_rules(rules)
    path = path_of(method, rule, steps)
    check_additive(model.info)
    places_of(task, "all")  # says if the prompts of a pair do not line up
    graph = Graph.of(model.info)
    sums = EdgeSums(model, graph, path, rules, checkpoint=checkpoint)
    halving = Halving(rows_at_once(batch_size, fitting(model, task, len(path))))
    base, source = base_and_source(task, way)

    def some(pairs: Sequence[int]) -> list[tuple[float, float, float]]:
        """Adds the scores of some pairs; the metric on both runs and the sum of the input's edges for each."""
        found = sums.batch(base.rows(pairs), source.rows(pairs), task)
        finite([before for before, _, _ in found], lambda i: f"the metric of the base run, on pair {pairs[i]}")
        finite([after for _, after, _ in found], lambda i: f"the metric of the source run, on pair {pairs[i]}")
        _check_finite(sums.magnitude, sums.tiles)
        bar.update(len(pairs))
        return found

    with tqdm(total=len(task), desc="edges", disable=None if progress is None else not progress) as bar:
        seen = halving(range(len(task)), some)
    n = len(task)
    forward = len({0.0, 1.0, *path}) + (len(path) if checkpoint else 0)
    settings = settings_of(
        task,
        method="edge_attribution",
        variant=method,
        direction=way,
        sites=["resid_pre", "z", *(["mlp_out"] if graph.has_mlp else [])],
        positions="all",
        rules=None if rules is None else rules.to_json(),
        steps=len(path),
        rule=rule if method == "eap_ig" else None,
        base=[metric for metric, _, _ in seen],
        source=[metric for _, metric, _ in seen],
        passes=(float(n * forward), float(n * len(path))),
        trivial=graph.mask & ~sums.moved.cpu()[:, None],
        completeness=None if rules is not None else _completeness(seen),
        n_layers=graph.n_layers,
        n_heads=graph.n_heads,
        n_kv_heads=graph.n_kv_heads,
        has_mlp=graph.has_mlp,
        parallel=graph.parallel,
    )
    tables = edge_tables(graph, sums.magnitude / n, sums.signed / n)
    return EdgeAttribution(tables, settings=settings, provenance=provenance_of(model, task))


def path_of(method: str, rule: str, steps: int) -> dict[float, float]:
    """Where on the path from the source (0) to the base run (1) gradients are taken, and their weights."""
    points, weights = quadrature.nodes(rule, steps)  # checks them even where they are not used
    if method == "eap":
        return {1.0: 1.0}
    if method == "clean_corrupted":
        return {0.0: 0.5, 1.0: 0.5}
    return dict(zip(points.tolist(), weights.tolist(), strict=True))


def fitting(model: HookedModel, task: Task, runs: int) -> int:
    """How many pairs keep less than `KEPT` bytes: two residual streams a block and run, and projections."""
    info = model.info
    widths = 2 * runs * info.d_model + 2 * (info.n_heads + info.n_kv_heads) * info.d_head + 3 * info.d_model
    a_pair = task.clean.tokens.shape[1] * info.n_layers * widths * max(4, model.weight("embed.W_E").element_size())
    return max(1, min(PAIRS_AT_ONCE, KEPT // a_pair))


def _completeness(seen: Sequence[tuple[float, float, float]]) -> dict[str, float | None]:
    """How far the edges out of the input are from the change of the metric; no relative figure if it never changes."""
    base, source, total = torch.tensor(seen, dtype=torch.float64).unbind(1)
    change = source - base
    missing = (total - change).abs()
    relative = float(missing.mean() / change.abs().mean()) if bool(change.any()) else None
    return {"mean": float(missing.mean()), "max": float(missing.max()), "relative": relative}


class EdgeSums:
    """The sums over pairs of every edge's score; a batch counts once it is finished, so that it can be repeated."""

    def __init__(
        self, model: HookedModel, graph: Graph, path: dict[float, float], rules: Rules | None, *, checkpoint: bool
    ) -> None:
        self.model, self.graph, self.path, self.rules = model, graph, path, rules
        self.checkpoint = checkpoint
        self.tiles = tiles_of(model, graph)
        kind = torch.promote_types(model.weight("embed.W_E").dtype, torch.float32)
        device = model.weight("embed.W_E").device
        self.magnitude = torch.zeros(len(graph.writers), len(graph.readers), dtype=kind, device=device)
        self.signed = torch.zeros_like(self.magnitude)
        self.moved = torch.zeros(len(graph.writers), dtype=torch.bool, device=device)

    def batch(self, base: Batch, source: Batch, task: Task) -> list[tuple[float, float, float]]:
        """Adds a batch; for each pair the metric on the base and the source run, and the sum of the input's edges."""
        writers, readers, before, after = self.gather(base, source, task)
        magnitude, signed = torch.zeros_like(self.magnitude), torch.zeros_like(self.signed)
        totals: list[Tensor] = []
        for scores in pair_scores(writers, readers):
            magnitude += scores.abs().sum(0)
            signed += scores.sum(0)
            totals.append(scores[:, 0].sum(-1))
        self.magnitude += magnitude
        self.signed += signed
        self.moved |= writers.moved
        return list(zip(before.tolist(), after.tolist(), torch.cat(totals).tolist(), strict=True))

    def gather(self, base: Batch, source: Batch, task: Task) -> tuple[Writers, Readers, Tensor, Tensor]:
        """All passes over a batch: what is written and read, and the metric on the base and the source run."""
        rules = self.rules or Rules()
        readers = Readers(self.model, self.tiles, base.mask, frozen=rules.norm == "frozen")
        there, after = self._end(source, 0.0, readers, task)
        here, before = self._end(base, 1.0, readers, task)
        writers = Writers.between(self.model, self.graph, there, here, base.mask, rules.hold)
        start = full_name("resid_pre", 0)
        low, high = there[start], here[start]
        del there, here
        for point, weight in self.path.items():
            if point not in (0.0, 1.0):
                edit = Edit(start, Set(low + point * (high - low)))
                readers.add(self._tape(base, task, edits=[edit]), weight)
        return writers, readers, before, after

    def _end(self, batch: Batch, point: float, readers: Readers, task: Task) -> tuple[dict[str, Tensor], Tensor]:
        """One end of the path: what every writer wrote, and the metric; its gradients too if the path has them."""
        names = self.graph.written
        if point not in self.path:
            run = self.model.run(batch, record=names, metric=task.metric)
            assert run.metric is not None  # a metric was given
            return {name: run.activations[name].values for name in names}, run.metric
        tape = self._tape(batch, task, record=names)
        readers.add(tape, self.path[point])
        assert tape.metric is not None  # a metric was given
        return {name: tape.activations[name] for name in names}, tape.metric

    def _tape(self, batch: Batch, task: Task, *, record: Sequence[str] = (), edits: Sequence[Edit] = ()) -> Any:
        inputs = [tile.reads for tile in self.tiles if tile.norm is not None]
        sites = [part.site for tile in self.tiles for part in tile.projections]
        return self.model.tape(
            batch,
            metric=task.metric,
            gradients=sites,
            record=[*record, *inputs],
            edits=edits,
            rules=self.rules,
            checkpoint=self.checkpoint,
        )


def _check_finite(magnitude: Tensor, tiles: Sequence[Tile]) -> None:
    bad = (~magnitude.isfinite()).any(0)
    for tile in reversed(tiles):  # the backward pass reaches the last block first
        for part in tile.projections:
            if bool(bad[tile.columns][part.heads].any()):
                raise NonFiniteError(
                    f"edge scores at {part.site}",
                    "NaN or infinity in its gradient or in what is written to it",
                    "use a wider dtype, such as bfloat16 or float32",
                )
