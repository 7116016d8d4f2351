"""Exact activation patching: replace one node, recompute everything downstream, measure.

1. Run both prompts of each pair; keep the residual stream before each block of the base run and the nodes' activations
   of the source run.
2. For each layer, put one intervention in each row of a batch and run from that layer's residual stream upward; the
   blocks below cannot change. Nodes whose activation is the same on both prompts are not run: their effect is exactly
   zero.
3. effect = metric(intervened) - metric(base), pair by pair; absolute values are taken before averaging.

It is the reference for every estimate. An effect says what this one node does with all others in place; effects of
several nodes do not add up.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mechattr.artifact import Attribution, Cache
from mechattr.engines.executors import Executor
from mechattr.engines.spread import spread
from mechattr.engines.sweep import sweep
from mechattr.models.base import HookedModel
from mechattr.patching.interventions import Interventions, rows_of
from mechattr.patching.nodes import asked
from mechattr.patching.places import (
    Positions,
    base_and_source,
    check_call,
    direction_of,
    places_of,
)
from mechattr.patching.settings import provenance_of, settings_of
from mechattr.patching.source import source_of
from mechattr.sites import Node
from mechattr.tasks.task import Task


def activation_patching(
    model: HookedModel,
    task: Task,
    *,
    sites: str | Sequence[str] | None = None,
    nodes: Sequence[Node] | None = None,
    direction: str = "noising",
    positions: Positions | None = None,
    source: Cache | None = None,
    batch_size: int | None = None,
    progress: bool | None = None,
    resume: Path | None = None,
    executor: str | Executor | None = None,
) -> Attribution:
    r"""Measures the effect of replacing each node by its value on the other prompt.

    $$I(n) = L\big(x \mid \mathrm{do}(n \leftarrow n(x'))\big) - L(x), \qquad
    \text{score}(n) = \mathbb E_{\text{pairs}} |I(n)|, \quad \text{signed}(n) = \mathbb E_{\text{pairs}} I(n)$$

    with $x$ the base prompt (clean under noising, corrupt under denoising) and $x'$ the other.

    Args:
        model: a hooked model.
        task: prompt pairs with a metric.
        sites: short names; every node of these sites is measured. By default `q`, `k`, `v`, `z` and `mlp_post`; in a
            mixture of experts `mlp_out` in place of the last.
        nodes: measure these nodes only, such as `attribution.top(50)`; `sites` and `positions` then follow from them.
        direction: `"noising"` puts corrupt activations into the clean run, `"denoising"` clean ones into the corrupt
            run.
        positions: `"aligned"` (each position), `"named"` (spans) or `"all"` (merged); by default each position where
            the pairs align, else the spans that the task names in every pair.
        source: activations of $x'$ for all pairs, recorded earlier, instead of a run of those prompts. Their metric is
            then not measured: `clean_metric` or `corrupt_metric` is `None`.
        batch_size: rows of a forward pass, about 4096 tokens' worth unless given; it halves itself when memory runs
            out.
        progress: `None` shows a bar on a terminal only.
        resume: a journal; a sweep that was killed goes on from it and returns the same result.
        executor: `"ray"`, `"inprocess"` or an executor, to run the pairs block by block elsewhere; see `docs/scale.md`.

    Returns:
        `scores[site]` and `signed[site]` as `attribution_patching` returns them; NaN where a node was not asked for.

    Raises:
        UnknownSiteError: a site that this model does not have.
        UnknownNameError: no such direction or kind of positions.
        SettingError: a node that does not exist, nodes whose positions mean different things, or an unusable
            `batch_size`.
        AlignmentError: positions that are not comparable across the pairs.
        EmptyTaskError: no pairs or no nodes.
        MismatchError: `source` does not belong to this model and task, or lacks a site.
        NonFiniteError: a run has NaN or infinity.
        OutputExistsError: the journal belongs to another sweep.
        ExecutorError: a block failed for good.

    Cost:
        2 forward passes a pair (1 with `source`), and (L - layer)/L of one for each node of each pair whose activation
        differs; a whole one at sites outside the blocks
        and of an encoder.

    References:
        Vig et al. 2020, Causal Mediation Analysis; Kramár et al. 2024, arXiv:2403.00745, equation 1.
    """
    check_call("activation patching", model, task, sources=True)
    if executor is not None:
        cut = ("nodes", lambda: asked(model, task, sites, nodes, positions)[0].nodes())
        return spread(activation_patching, **locals())
    way = direction_of(direction)
    table, mode = asked(model, task, sites, nodes, positions)
    base, other = base_and_source(task, way)
    there = source_of(model, other, task.metric, table.names, source)
    rows = rows_of(base, batch_size)
    run = Interventions(model, base, task.metric, there, table, places_of(task, mode, table.sites), rows)
    key = {"task": task.hash(), "direction": way, "nodes": table.hash(), "rows": rows, "source": there.digest}
    results = sweep(
        run.groups(),
        run.compute,
        n_groups=len(run.parts),
        key={**key, **model.fingerprint()},
        resume=resume,
        progress=progress,
        label="exact patching",
    )
    magnitude, signed = run.means(results)
    forward = len(task) * (1 + there.forward) + run.forward
    settings = settings_of(
        task,
        method="activation_patching",
        direction=way,
        sites=table.sites,
        positions=mode,
        base=run.base_metric,
        source=run.source_metric or None,
        source_sha256=there.digest,
        passes=(float(forward), 0.0),
        trivial=~run.ran,
        n_nodes=len(table),
    )
    return Attribution(table.labelled(magnitude, signed), settings=settings, provenance=provenance_of(model, task))
