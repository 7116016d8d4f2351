"""The bytes of a method, from its own first steps on a few short made-up prompts (`mechattr.engines.memory`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

import torch

from mechattr.engines.memory import Bytes, Course, primes_for
from mechattr.errors import UnsupportedFeatureError
from mechattr.methods import METHODS
from mechattr.models.base import Batch, HookedModel
from mechattr.patching.bound_plan import BoundPlan
from mechattr.patching.edge_scores import pair_scores, portions
from mechattr.patching.edges import EdgeSums
from mechattr.patching.graph import Graph
from mechattr.patching.interventions import PAIRS_AT_ONCE, rows_of
from mechattr.patching.nodes import every_node
from mechattr.patching.places import Positions, places_of
from mechattr.patching.sampling import CHUNK, Sampling, chunk_effects
from mechattr.patching.sets import GRADIENTS_AT_ONCE, Sets
from mechattr.tasks.task import Task

MOMENTS = 6 * 8  # bytes that samples leave of a node in each group of pairs: two counts, means and sums of squares


class _Enough(Exception):
    """Raised by the metric of a probe once the costliest run of a method is over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What the memory of a method depends on, besides the model.

    Attributes:
        pairs: pairs that are recorded at a time.
        rows: rows of a run in which something is patched.
        columns: tokens of a padded prompt.
    """

    pairs: int
    rows: int
    columns: int

    def to_dict(self) -> dict[str, int]:
        """By name."""
        return {"pairs": self.pairs, "rows": self.rows, "columns": self.columns}


def probe(
    model: HookedModel,
    task: Task,
    method: str,
    sizes: Sizes,
    settings: Mapping[str, Any],
    *,
    positions: Positions | None,
    numbers: Iterable[int] = (),
    runs: int | None = None,
) -> int:
    """The peak of a method at some sizes.

    Args:
        model: a hooked model.
        task: whose metric, padding and names of spans the made-up prompts take over.
        method: its name.
        sizes: of the call that is asked about.
        settings: the method's keywords.
        positions: what positions mean, for a method that asks.
        numbers: further numbers that sizes of tensors may have in them.
        runs: after how many evaluations of the metric the peak has been; all of them unless given.
    """
    small = _small(model, task, positions, numbers)
    short = _prompts(model, task, small, runs)
    module, _, name = METHODS[method].function.partition(":")
    function = getattr(import_module(module), name)
    if positions is not None:
        settings = {**settings, "positions": positions}

    def run() -> None:
        try:
            function(model, short, **settings, batch_size=small.rows, progress=False)
        except _Enough:
            return

    return _course(model, small, run).replay(sizes.to_dict()).peak


def probe_edges(
    model: HookedModel, task: Task, sizes: Sizes, make: Callable[[Graph], EdgeSums], numbers: Iterable[int] = ()
) -> int:
    """The peak of edge attribution: of its passes, and of what they leave with the buffers of the scores."""
    graph = Graph.of(model.info)
    counts = (*numbers, len(graph.writers), len(graph.readers), *(tile.width for tile in make(graph).tiles))
    small = _small(model, task, "all", counts)
    short = _prompts(model, task, small, None)
    kept: list[Any] = []
    sums = make(graph)
    passes = _course(model, small, lambda: kept.extend(sums.gather(short.clean, short.corrupt, short)))
    writers, readers = kept[:2]
    at_once, step = portions(graph, sizes.pairs, sizes.columns, model.info.d_model, writers.start.element_size())
    scores = _course(model, small, lambda: [(x.abs().sum(0), x.sum(0)) for x in pair_scores(writers, readers)])
    found: Bytes = passes.replay(sizes.to_dict())
    return max(found.peak, found.kept + scores.replay({"pairs": at_once, "rows": 1, "columns": step}).peak)


def probe_sets(
    model: HookedModel, task: Task, sizes: Sizes, plan: BoundPlan, given: Mapping[str, Any], numbers: Iterable[int]
) -> int:
    """The peak of a bound on missed effects: of its recordings, its gradients and one chunk of its samples.

    Args:
        model: a hooked model.
        task: the pairs.
        sizes: all pairs, and the rows of a batch of samples.
        plan: the nodes and samples.
        given: the method's keywords.
        numbers: further numbers that sizes of tensors may have in them.
    """
    samples = min(plan.samples, CHUNK)
    small = _small(model, task, plan.mode, (*numbers, samples))
    short = _prompts(model, task, small, 3 + given["control"])
    kept: list[Any] = []  # what lives on while the next part runs
    how = {"per_pair": given["per_pair"], "control": given["control"]}

    def record() -> None:
        table = every_node(model, plan.sites, places_of(short, plan.mode))
        kept.append(Sets(model, short, table, plan.mode, plan.way, batch_size=small.rows))

    def estimate() -> None:
        every = torch.arange(len(kept[0].table))
        kept.append(Sampling(kept[0], every, 0.5, 0, samples, **how))  # so likely that each site has a node in a set

    def sample() -> None:
        try:
            chunk_effects(kept[0], kept[1].draws, 0)
        except _Enough:  # after the first batch
            return

    def take() -> None:
        kept[1].take([0.0] * samples)
        kept[1].labelled()

    rows = rows_of(task.clean, given["batch_size"])
    asked = sizes.to_dict()
    fixed = {**asked, "rows": small.rows}  # a part that has no such rows; what looks like them is chance
    alone = fixed if given["per_pair"] else {**fixed, "pairs": small.pairs}
    prompts = [(record, fixed, min(rows, PAIRS_AT_ONCE)), (estimate, fixed, min(rows, GRADIENTS_AT_ONCE))]
    draws = [(take, alone, len(task)), (sample, asked, len(task))]  # the next sets are run beside what was taken
    if plan.samples <= CHUNK:
        draws.reverse()
    parts = [(_course(model, small, run), found, most) for run, found, most in (*prompts, *draws)]
    level = peak = 0
    for course, found, most in parts:
        whole = course.replay(found)
        part = course.replay({**found, "pairs": min(most, found["pairs"])})
        peak = max(peak, level + whole.kept + part.peak - part.kept)  # part after part, of which only so much is kept
        level += whole.kept
    strata = min(plan.strata, plan.samples) - min(plan.strata, small.pairs)
    return peak + max(0, strata) * len(plan.table) * MOMENTS


def _course(model: HookedModel, small: Sizes, run: Callable[[], object]) -> Course:
    model.fingerprint()  # hashes are computed once; what that needs is no part of the method
    course = Course(small.to_dict())
    with course:
        run()
    return course


def _small(model: HookedModel, task: Task, positions: Positions | None, numbers: Iterable[int]) -> Sizes:
    i = model.info
    shape = (i.n_layers, i.n_heads, i.n_kv_heads, i.d_model, i.d_head, i.d_mlp, i.d_vocab, i.n_heads // i.n_kv_heads)
    labels = len(task.positions(positions)) if positions in ("named", "all") else 1
    pairs, rows, columns = primes_for((*shape, labels, *numbers), 3)
    return Sizes(pairs=pairs, rows=rows, columns=columns)


def _prompts(model: HookedModel, task: Task, small: Sizes, runs: int | None) -> Task:
    """Random prompts of the task's kind, in which every token differs between the two sides."""
    if getattr(task.clean, "images", ()) or getattr(task.clean, "source", None) is not None:
        raise UnsupportedFeatureError(
            "an estimate of memory", "prompts with images, or with an encoder's side", "measure a call with one pair"
        )
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.info.d_vocab, (small.pairs, small.columns), generator=generator)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    if task.clean.padded:
        mask[0, 0 if task.clean.padding_side == "left" else -1] = False
    tokens, mask = tokens.to(task.clean.device), mask.to(task.clean.device)
    example = (torch.arange(small.pairs) % len(task)).to(tokens.device)
    shared = set.intersection(*(set(spans) for spans in task.spans))
    spent = 0

    def metric(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        nonlocal spent
        spent += 1
        value = task.metric(logits, batch)
        if runs is not None and spent >= runs:
            raise _Enough
        return value

    return replace(
        task.rows((torch.arange(small.pairs) % len(task)).tolist()),
        clean=Batch(tokens, mask, example),
        corrupt=Batch((tokens + 1) % model.info.d_vocab, mask, example),
        metric=replace(task.metric, function=metric),
        spans=({label: (0, 1) for label in sorted(shared)},) * small.pairs,
        factors=(),
    )
