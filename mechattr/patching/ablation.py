"""Ablation: remove one node from the clean run, without a corrupt prompt, and measure what the metric loses.

What takes the node's place is nothing (zeros), what it is on average, or what it is on another prompt. The sweep is the
one of exact patching: only the values that are put in differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from mechattr.artifact import Attribution
from mechattr.engines.executors import Executor
from mechattr.engines.spread import spread
from mechattr.engines.sweep import sweep
from mechattr.errors import (
    AlignmentError,
    EmptyTaskError,
    SettingError,
    UnknownNameError,
    UnsupportedFeatureError,
    nearest,
)
from mechattr.models.base import HookedModel
from mechattr.patching.interventions import Interventions, Values, rows_of, whole_number
from mechattr.patching.nodes import NodeTable, asked
from mechattr.patching.places import Places, Positions, check_call, places_of
from mechattr.patching.replacements import ByPlace, Means, Others, Zeros
from mechattr.patching.settings import provenance_of, settings_of
from mechattr.sites import SITES, Node, of_rows
from mechattr.tasks.block import Block, whole_of
from mechattr.tasks.task import Task

KINDS = ("mean", "zero", "resample")


def ablation(
    model: HookedModel,
    task: Task,
    *,
    kind: str = "mean",
    sites: str | Sequence[str] | None = None,
    nodes: Sequence[Node] | None = None,
    positions: Positions | None = None,
    reference: Task | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool | None = None,
    resume: Path | None = None,
    executor: str | Executor | None = None,
) -> Attribution:
    r"""Measures the effect of removing each node from the clean run.

    $$I(n) = L\big(x \mid \mathrm{do}(n \leftarrow r_n)\big) - L(x), \qquad
    \text{score}(n) = \mathbb E_{\text{pairs}} |I(n)|, \quad \text{signed}(n) = \mathbb E_{\text{pairs}} I(n)$$

    with $x$ the clean prompt; the corrupt one is not run. What takes the node's place, $r_n$, is

    - `"zero"`: zeros;
    - `"mean"`: the mean of the node over all real tokens at its place in the clean prompts of `reference`: at that
      position where positions align, at all tokens of the span or of the prompt otherwise, each token with equal
      weight. Every token of the node gets this one vector;
    - `"resample"`: the node's value on another prompt, token by token. Each pair takes the clean prompt of another
      pair of the task (a random cycle through all pairs), or a random one of `reference`.

    Args:
        model: a hooked model.
        task: prompt pairs with a metric.
        kind: `"mean"`, `"zero"` or `"resample"`.
        sites: short names, by default those of activation patching; every node of these sites is measured. `q` and `k`
            are replaced after rotary embedding and norms.
        nodes: measure these nodes only; `sites` and `positions` then follow from them.
        positions: `"aligned"` (each position), `"named"` (spans) or `"all"` (merged); by default each position where
            the pairs align, else the spans that the task names in every pair.
        reference: the prompts that means and other values are taken from: the clean side of a task. The task itself
            unless given.
        seed: of the choice of the other prompts.
        batch_size: rows of a forward pass, about 4096 tokens' worth unless given; it halves itself when memory runs
            out.
        progress: `None` shows a bar on a terminal only.
        resume: a journal; a sweep that was killed goes on from it and returns the same result.
        executor: `"ray"`, `"inprocess"` or an executor, to run the pairs block by block elsewhere; see `docs/scale.md`.

    Returns:
        Tables as those of `activation_patching` under noising: `contribution` is the metric that is lost. Corrupt
        prompts are not run: `corrupt_metric` is `None`. `settings["reference_rows"]` names the prompt that each pair
        took its values from.

    Raises:
        UnknownSiteError: a site that this model does not have.
        UnknownNameError: no such kind or kind of positions.
        SettingError: a node that does not exist, one pair and nothing else to resample from, a reference that is not
            used or no task, or an unusable `batch_size` or `seed`.
        UnsupportedFeatureError: the mean of attention rows, or zeros as attention scores or as the scale of a norm.
        AlignmentError: positions that are not comparable, within the task or with those of the reference.
        EmptyTaskError: no pairs or no nodes.
        NonFiniteError: a run has NaN or infinity.
        OutputExistsError: the journal belongs to another sweep.
        ExecutorError: a block failed for good.

    Cost:
        1 forward pass a pair; for `"mean"` 1 more for each prompt of the reference, for `"resample"` 1 more a pair; and
        (L - layer)/L of one for each node of each pair that differs from what takes its place, a whole one outside the
        blocks. No backward pass.

    References:
        Zero and mean ablation: Wang et al. 2022, Interpretability in the Wild, arXiv:2211.00593; resampling: Chan et
        al. 2022, Causal Scrubbing.
    """
    check_call("ablation", model, task, sources=True)
    if executor is not None:
        cut = ("nodes", lambda: asked(model, task, sites, nodes, positions)[0].nodes())
        return spread(ablation, **locals())
    whole_number("seed", seed, 0)
    if kind not in KINDS:
        raise UnknownNameError(f"ablation of kind {kind!r}", "no such kind", nearest(str(kind), KINDS))
    table, mode = asked(model, task, sites, nodes, positions)
    _check_sites(table, kind)
    rows = rows_of(task.clean, batch_size)
    places = places_of(task, mode, table.sites)
    other, other_places = _reference(task, reference, kind, mode, table.sites, places)
    chosen = _others(task, reference, seed) if kind == "resample" else None
    there: Values
    if chosen is not None:
        there, spent = Others.of(model, task, other, places, other_places, chosen, table.names), len(task)
    elif kind == "mean":
        there, spent = Means.of(model, other, other_places, table.names, rows), len(other)
    else:
        there, spent = Zeros(model, task, table.names), 0
    run = (ByPlace if kind == "mean" else Interventions)(model, task.clean, task.metric, there, table, places, rows)
    results = sweep(
        run.groups(),
        run.compute,
        n_groups=len(run.parts),
        key={
            "method": "ablation",
            "task": task.hash(),
            "kind": kind,
            "nodes": table.hash(),
            "rows": rows,
            "reference": None if reference is None else reference.hash(),
            "reference_rows": chosen,
            **model.fingerprint(),
        },
        resume=resume,
        progress=progress,
        label=f"{kind} ablation",
    )
    magnitude, signed = run.means(results)
    settings = settings_of(
        task,
        method="ablation",
        direction="noising",
        sites=table.sites,
        positions=mode,
        base=run.base_metric,
        source=None,
        passes=(float(len(task) + spent) + run.forward, 0.0),
        trivial=~run.ran,
        kind=kind,
        n_nodes=len(table),
        reference_hash=None if reference is None else reference.hash(),
        reference_rows=chosen,
        seed=seed if kind == "resample" else None,
    )
    return Attribution(table.labelled(magnitude, signed), settings=settings, provenance=provenance_of(model, task))


def _check_sites(table: NodeTable, kind: str) -> None:
    for short in table.sites:
        why = ""
        if kind == "mean" and of_rows(SITES[short].axes):
            why = "keys of different prompts are different tokens"
        elif kind == "zero" and short.endswith("attn_scores"):
            why = "queries would attend to the future" if short == "attn_scores" else "padding would be attended to"
        elif kind == "zero" and short.endswith("_scale"):
            why = "the norm would divide by zero"
        if why:
            raise UnsupportedFeatureError(
                f"{kind} ablation of {short}", why, "ablate another site, or use kind='resample'"
            )


def _reference(
    task: Task, reference: Task | None, kind: str, mode: Positions, sites: Sequence[str], places: Places
) -> tuple[Task, Places]:
    """The reference and its places, in the order of the task's."""
    if reference is None:
        whole = whole_of(task)
        return whole, places if whole is task else places_of(whole, mode, sites)
    if not isinstance(reference, Task):
        raise SettingError("reference", f"a {type(reference).__name__}", "give a task, whose clean prompts are used")
    if kind == "zero":
        raise SettingError("reference of kind='zero'", "zeros are taken from no prompt", "leave reference out")
    if not len(reference):
        raise EmptyTaskError("the reference of an ablation", "a task without pairs", "give at least one pair")
    found = places_of(reference, mode, sites)
    own = _in_order(task, places, found, mode)
    if places.source is None or found.source is None:
        return reference, own
    return reference, replace(own, source=_in_order(task, places.source, found.source, mode))


def _in_order(task: Task, places: Places, found: Places, mode: Positions) -> Places:
    """The places of a reference, in the order of the task's.

    Raises:
        AlignmentError: it lacks one.
    """
    missing = [label for label in places.labels if label not in found.labels]
    if missing or (mode == "aligned" and found.labels != places.labels):
        lengths = f"prompts of {len(found.labels)} tokens, not {len(places.labels)}"
        raise AlignmentError(
            f"places of task {task.name!r} in its reference",
            lengths if mode == "aligned" else f"no place {missing[0]!r}",
            "give a reference of the same layout, or use positions='all'",
        )
    order = [found.labels.index(label) for label in places.labels] or [0]
    return Places(places.labels, found.where[:, order])


def _others(task: Task, reference: Task | None, seed: int) -> list[int]:
    """For each pair the row that its values are taken from: of the reference, or else of another pair."""
    if isinstance(task, Block):
        chosen = _others(task.whole, reference, seed)
        return [chosen[pair] for pair in task.index]
    generator = torch.Generator().manual_seed(seed)
    if reference is not None:
        return torch.randint(len(reference), (len(task),), generator=generator).tolist()
    if len(task) < 2:
        raise SettingError(
            "kind='resample'", "a task of one pair, which has no other prompt", "give two pairs or more, or a reference"
        )
    cycle = torch.randperm(len(task), generator=generator)
    found = torch.empty_like(cycle)
    found[cycle] = cycle.roll(1)
    return found.tolist()
