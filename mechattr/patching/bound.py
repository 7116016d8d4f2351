"""A bound on what was missed: how large an effect can a node still have that nobody verified?

An estimate ranks nodes, exact patching verifies the best of them, and this says what is left: random small subsets of
all other nodes are patched together, and the difference in means with and without a node bounds its effect.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from tqdm.auto import tqdm

from mechattr.artifact import Attribution
from mechattr.engines.executors import Executor
from mechattr.engines.spread import Pairs
from mechattr.engines.subsampling import planned_looks
from mechattr.engines.sweep import Journal
from mechattr.labelled import Labelled
from mechattr.models.base import HookedModel
from mechattr.patching.bound_blocks import BlockSets, Prompts
from mechattr.patching.bound_plan import plan_of_bound
from mechattr.patching.bound_result import Bound
from mechattr.patching.interventions import rows_of
from mechattr.patching.places import Positions, check_call
from mechattr.patching.sampling import CHUNK, Draws, Sampling, chunk_effects
from mechattr.patching.sets import Sets
from mechattr.patching.settings import provenance_of, settings_of
from mechattr.sites import Node
from mechattr.tasks.task import Task


def missed_effect_bound(
    model: HookedModel,
    task: Task,
    *,
    verified: Attribution | Sequence[Node],
    sites: str | Sequence[str] | None = None,
    p: float = 0.01,
    budget: int | None = None,
    confidence: float = 0.99,
    per_pair: bool = False,
    target: float | None = None,
    control: bool = True,
    seed: int = 0,
    direction: str | None = None,
    positions: Positions | None = None,
    batch_size: int | None = None,
    progress: bool | None = None,
    resume: Path | None = None,
    executor: str | Executor | None = None,
) -> Bound:
    r"""Bounds the effects of all nodes that were not verified, by patching random subsets of them together.

    Each sample takes a pair and a set S that holds every unverified node with probability p, patches S at once, and
    measures $s = L(x \mid \mathrm{do}(S \leftarrow S(x'))) - L(x)$. With $\Delta_n$ the difference of the means of s
    with and without node n, and Welch's standard error and degrees of freedom (the variance of the smaller group taken
    to be at least that of the larger one),

    $$\theta^* = \max_n \big(|\Delta_n| + t_{\nu_n, 1-\alpha}\,\mathrm{SE}_n\big), \qquad
    p(\theta) = \max_n P\big(T_{\nu_n} \ge (\theta - |\Delta_n|)/\mathrm{SE}_n\big)$$

    The samples of $\Delta$ are not s itself but s minus the sum over S of first-order estimates $\hat I_n$ (attribution
    patching, pair by pair), and the mean estimate of n is added to $\Delta_n$ again: as nodes are drawn independently,
    that changes no expectation, but most of the spread that the other nodes cause is gone.

    What it says: with the given confidence no covered node has an effect above $\theta^*$, where an effect is averaged
    over contexts in which each other unverified node is patched with probability p. Nodes that interact can have a
    larger effect alone. Nodes whose activation is the same on both prompts of every pair have no effect and are left
    out. Student's t is an approximation: it wants many samples with each node (30 by default) and many nodes in each
    sample. So verify the largest effects first, and all of a small rest instead of bounding it.

    With `per_pair=False` each sample draws its pair at random and |mean effect over pairs| is bounded: effects of
    opposite sign cancel. With `per_pair=True` samples take the pairs in turn, statistics are kept for each pair, and
    mean |effect| is bounded: by mean over pairs of $|\Delta|$ plus t times the standard error of mean $\Delta$. That
    holds because, with the true signs, the mean of the signed differences is unbiased and never above it.

    Args:
        model: a hooked model.
        task: prompt pairs with a metric.
        verified: exact effects, the result of `activation_patching(nodes=...)`, or a list of nodes.
        sites: short names, by default those of activation patching; the bound covers every node of these that was not
            verified.
        p: probability that a node is patched in a sample.
        budget: forward passes to spend at most, the three of each pair (two without `control`) included. By default so
            many that a node is expected in 30 samples (with `per_pair` in each pair): 30/p samples.
        confidence: probability, at least, with which the bound holds.
        per_pair: bound the mean over pairs of |effect| instead of |mean effect|.
        target: stop early when $\theta^*$ is at most this. The bound is then looked at after a half, a quarter, ... of
            the samples, as far as a node is expected 8 times by then; each of these J looks, planned before, has error
            probability $(1 - \text{confidence})/J$, so that looking does not spoil the confidence.
        control: use first-order estimates as a control variate, which take a differentiable metric. The bound is valid
            with any estimates, and tight with good ones.
        seed: of the samples.
        direction: `"noising"` or `"denoising"`; by default that of `verified`, else noising.
        positions: `"aligned"`, `"named"` or `"all"`; by default those of `verified`, else the task's default.
        batch_size: rows of a forward pass, about 4096 tokens' worth unless given.
        progress: `None` shows a bar on a terminal only.
        resume: a journal; a run that was killed goes on from it and returns the same result. One with another budget
            goes on from it, too, and returns what it would have returned alone, unless a `target` was given: its looks
            are planned from the budget. To enlarge the budget because of the bound that was found is one more look,
            which the confidence does not account for.
        executor: `"ray"`, `"inprocess"` or an executor, to run the prompts and samples of the pairs block by block
            elsewhere; see `docs/scale.md`. The same samples are drawn. A journal then belongs to one budget.

    Returns:
        The bound. `theta` is infinite where the budget gave a node fewer than two samples.

    Raises:
        SettingError: an unusable `p`, `budget`, `confidence`, `target`, `seed` or `resume`; estimates as `verified`;
            another direction or other positions than those of `verified`; nodes that do not exist.
        MismatchError: `verified` belongs to another model or task.
        UnknownSiteError: a site that this model does not have.
        UnknownNameError: no such direction or kind of positions.
        AlignmentError: positions that are not comparable across the pairs.
        EmptyTaskError: no pairs.
        NonFiniteError: a sample whose metric is NaN or infinite.
        OutputExistsError: the journal belongs to another run.
        ExecutorError: a block failed for good.

    Cost:
        2 forward passes a pair and at most one a sample, whatever the number of nodes; with `control` 1 forward and 1
        backward pass more a pair. Memory besides what patching records: for a node a few bytes for each of 128 samples,
        statistics (with `per_pair` of each pair), and with `control` 8 bytes a pair. With `executor` 2 forward passes
        a pair more for each look, and a journal of about 12 bytes for each node and pair (1 without `control`).

    References:
        Kramár et al. 2024, AtP*, arXiv:2403.00745 (the diagnostic); Welch 1947, Biometrika 34.
    """
    check_call("a bound on missed effects", model, task)
    plan = plan_of_bound(
        model,
        task,
        verified=verified,
        sites=sites,
        p=p,
        budget=budget,
        confidence=confidence,
        per_pair=per_pair,
        target=target,
        control=control,
        seed=seed,
        direction=direction,
        positions=positions,
    )
    known, table, done, samples = plan.known, plan.table, plan.done, plan.samples
    sizes = [samples] if target is None else planned_looks(samples, p / plan.strata)
    looks = sorted({min(samples, -(-size // CHUNK) * CHUNK) for size in sizes})
    rows = rows_of(task.clean, batch_size)
    key = {
        "task": task.hash(),
        "direction": plan.way,
        "nodes": table.hash(),
        "unverified": hashlib.sha256((~done).numpy().tobytes()).hexdigest(),
        "rows": rows,
        "samples": {"p": p, "seed": seed, "per_pair": per_pair},
        "looks": None if target is None else looks,  # a larger budget would add looks that nobody planned
    }
    blocks = Pairs.on(model, task, executor)
    sets: Sets | BlockSets
    if blocks is None:
        sets = Sets(model, task, table, plan.mode, plan.way, batch_size=rows)
    else:
        journal = blocks.journal(resume, {**key, "looks": looks, "control": control})
        prompts = Prompts(table=table, mode=plan.mode, way=plan.way, rows=rows, control=control)
        sets = BlockSets(blocks, prompts, journal, progress)
    moved = sets.moved.any(0)
    free = (moved & ~done).nonzero()[:, 0]
    run = Sampling(sets, free, p, seed, samples if len(free) else 0, per_pair=per_pair, control=control)
    extra = len(task) if control and (len(free) or blocks is not None) else 0
    taken = 0
    if len(free):
        effects = (
            sets.effects
            if isinstance(sets, BlockSets)
            else partial(_journalled, sets, Journal(resume, {**key, **model.fingerprint()}))
        )
        ends = [-(-size // CHUNK) for size in looks]
        off = True if blocks else None if progress is None else not progress  # blocks have bars of their own
        with tqdm(total=ends[-1], desc="bound on missed effects", disable=off) as bar:
            for look, end in enumerate(ends, start=1):
                for values in effects(run.draws, range(len(run.values), end), look):
                    run.take(values)
                    bar.update()
                taken = look
                if target is not None and float(run.contrast().upper((1 - confidence) / len(looks)).max()) <= target:
                    break
    settings = settings_of(
        task,
        method="missed_effect_bound",
        direction=plan.way,
        sites=plan.sites,
        positions=plan.mode,
        base=sets.base_metric.tolist(),
        source=None if sets.source_metric is None else sets.source_metric.tolist(),
        passes=(float(sets.forward + extra + run.rows), float(extra)),
        trivial=int((~moved & ~done).sum()),
        n_nodes=len(table),
        n_verified=int(done.sum()),
        n_covered=len(free),
        p=p,
        confidence=confidence,
        per_pair=per_pair,
        control=control,
        target=target,
        seed=seed,
        samples=sum(map(len, run.values)),
        budget=budget,
        budget_needed=plan.needed,
        looks_planned=len(looks),
        looks_taken=taken,
        **({} if blocks is None else blocks.said),
    )
    tensors = run.labelled()
    if known.effects is not None and len(known.effects):
        tensors["verified"] = Labelled(known.effects.sort(descending=True).values, ("rank",))
    return Bound(tensors, settings=settings, provenance=provenance_of(model, task))


def _journalled(sets: Sets, journal: Journal, draws: Draws, chunks: range, _look: int) -> Iterator[list[float]]:
    """The effects of the sets of each chunk, from the journal or run now."""
    for chunk in chunks:
        yield journal.numbers(chunk, partial(chunk_effects, sets, draws, chunk), draws.size(chunk))
