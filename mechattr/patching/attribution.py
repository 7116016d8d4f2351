"""Attribution patching: every node's effect estimated from two forward passes and a few backward passes.

1. Run the source prompt and keep the activations of all nodes.
2. Run the base prompt with gradients of the metric.
3. As the backward pass reaches a site, take the dot product of its gradient with the change of its activation.
4. Take absolute values pair by pair, then average.

It is exact where the metric is linear in the node. It misleads where attention is saturated (the softmax is flat there)
and where paths of opposite sign cancel to first order. Variants mend both: queries and keys go through the softmax
(`mechattr.patching.qk`), and more backward passes, each without one of the paths (`mechattr.patching.drops`) or from
another point, show what cancels. The exact check of the best nodes (`activation_patching`) shows how far it can be
trusted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from mechattr.artifact import Attribution, Cache
from mechattr.engines.executors import Executor
from mechattr.engines.spread import spread
from mechattr.errors import NonFiniteError, SettingError
from mechattr.labelled import Labelled
from mechattr.models.base import HookedModel
from mechattr.models.halving import Halving
from mechattr.models.rules import Rules
from mechattr.patching.effects import Effects, plan_of
from mechattr.patching.interventions import finite
from mechattr.patching.places import (
    Places,
    Positions,
    base_and_source,
    check_call,
    direction_of,
    mode_of,
    node_axes,
    node_sites,
    places_of,
    rows_at_once,
    taken_at,
)
from mechattr.patching.settings import provenance_of, settings_of
from mechattr.patching.source import source_of
from mechattr.patching.variants import DEFAULT_VARIANT, Variant, variant_of
from mechattr.sites import SITES, parse
from mechattr.tasks.task import Task

PAIRS_AT_ONCE = 16


def attribution_patching(
    model: HookedModel,
    task: Task,
    *,
    sites: str | Sequence[str] | None = None,
    variant: str = DEFAULT_VARIANT,
    unit: str = "block",
    direction: str = "noising",
    positions: Positions | None = None,
    rules: Rules | None = None,
    source: Cache | None = None,
    checkpoint: bool = False,
    batch_size: int | None = None,
    progress: bool | None = None,
    resume: Path | None = None,
    executor: str | Executor | None = None,
) -> Attribution:
    r"""Estimates the effect of replacing each node by its value on the other prompt.

    $$\hat I(n) = \big(n(x') - n(x)\big)^\top \left.\frac{\partial L}{\partial n}\right|_{x}, \qquad
    \text{score}(n) = \mathbb E_{\text{pairs}} |\hat I(n)|,
    \quad \text{signed}(n) = \mathbb E_{\text{pairs}} \hat I(n)$$

    with $x$ the base prompt (clean under noising, corrupt under denoising) and $x'$ the other. A node that spans
    several positions sums its dot products before the absolute value is taken. Everything is added up in float32 or
    wider. Variants, where *QK* takes queries and keys through the softmax:

    | variant | score of a pair | passes besides those of `"atp"`, with L blocks |
    |---|---|---|
    | `"atp"` | magnitude of the estimate | |
    | `"qk"` | the same, with QK | |
    | `"graddrop"` | mean magnitude over drops | (L - 1) / 2 backward |
    | `"star"` | the same, with QK: AtP* | (L - 1) / 2 backward |
    | `"max"` | the larger of `"qk"` and `"star"` | (L - 1) / 2 backward |
    | `"two_point"` | the larger of `"qk"` and the same with gradients at a second point | 1 forward, 1 backward |
    | `"hedged"` | the larger of `"star"` and the magnitude of `"qk"` plus half of how much it differs between the two
    runs of `"two_point"` | 1 forward, (L + 1) / 2 backward |

    A drop holds one block's write to the residual stream fixed and keeps the skip path; the mean leaves out the drop of
    the node's own block, from which nothing comes through. The second point is the base run with its token embeddings
    moved a quarter of the way (`settings["alpha"]`) to the source prompt's. `signed` is always the estimate of the base
    run, with QK where the variant has it.

    Args:
        model: a hooked model.
        task: prompt pairs with a metric.
        sites: short names, by default those of activation patching. `q` and `k` are taken after rotary embedding and
            norms, where their exact effect is the same.
        variant: see the table. Where GradDrop is undefined (a network with a single write, norms on the residual
            stream), `"max"` and `"hedged"` leave it out and say so in `settings["graddrop"]`.
        unit: what a drop holds: `"block"` (attention and MLP together) or `"sublayer"` (one of them), which about
            doubles the drops.
        direction: `"noising"` puts corrupt activations into the clean run, `"denoising"` clean ones into the corrupt
            run.
        positions: `"aligned"` (each position), `"named"` (spans) or `"all"` (merged); by default each position where
            the pairs align, else the spans that the task names in every pair.
        rules: another backward pass, such as `Rules(norm="frozen")`.
        source: activations of $x'$ for all pairs, recorded earlier, instead of a run of those prompts. Their metric is
            then not measured: `clean_metric` or `corrupt_metric` is `None`. `"two_point"` and `"hedged"` need `embed`
            in it, too.
        checkpoint: keep the input of each block only and compute blocks again as a backward pass reaches them: the same
            numbers in less memory.
        batch_size: pairs at a time, 16 unless given; it halves itself when memory runs out.
        progress: `None` shows a bar on a terminal only.
        resume: a journal of finished blocks, with `executor` only: a run that was killed goes on from it.
        executor: `"ray"`, `"inprocess"` or an executor, to run the pairs block by block elsewhere; see `docs/scale.md`.

    Returns:
        `scores[site]` and `signed[site]`, axes `layer`, `pos` (unless merged; `source` at sites of an encoder,
        `cross_k` and `cross_v`), and `head`, `kv_head`, `neuron`, `latent` or `expert`; in the metric's unit. Pairs of
        identical prompts (`settings["n_identical_pairs"]`) score zero.

    Raises:
        UnknownSiteError: a site that this model does not have.
        UnknownNameError: no such variant, unit, direction or kind of positions.
        AlignmentError: positions that are not comparable across the pairs.
        EmptyTaskError: no pairs.
        MismatchError: `source` does not belong to this model and task, or lacks a site.
        NonFiniteError: the metric is NaN or infinite, or the gradient overflows in a narrow dtype.
        SettingError: a metric without a gradient, an unusable `batch_size`, `unit` for a variant that drops nothing, or
            `"graddrop"` or `"star"` on a network with a single write.
        UnsupportedFeatureError: `"graddrop"` or `"star"` on a model whose norms act on the residual stream, or
            `checkpoint` on a backend without it.
        ExecutorError: a block failed for good.

    Cost:
        2 forward passes (1 with `source`) and 1 backward pass a pair, for all nodes together, and what the table adds:
        a drop's backward pass walks through the blocks below it only. With `checkpoint` as many forward passes again as
        there are backward passes. Peak memory: the source activations of one batch and the graph of one run (with
        `checkpoint` that of one block); with the QK fix one more pattern a layer.

    References:
        Nanda 2023, Attribution Patching; Kramár et al. 2024, AtP*, arXiv:2403.00745 (equations 4 to 12).
    """
    check_call("attribution patching", model, task, sources=True)
    if executor is not None:
        return spread(attribution_patching, **locals())
    if resume is not None:
        fix = "give an executor, such as 'inprocess', or leave resume out"
        raise SettingError(f"resume={str(resume)!r}", "no executor: without blocks there is nothing to keep", fix)
    chosen, _, left_out = variant_of(model.info, model.sites(), variant, unit)
    way = direction_of(direction)
    shorts = node_sites(model, sites)
    mode = mode_of(task, positions, shorts)
    places = places_of(task, mode, shorts)
    halving = Halving(rows_at_once(batch_size, PAIRS_AT_ONCE))
    base, other = base_and_source(task, way)
    sums = _Sums(model, shorts, places, chosen)
    plan = plan_of(model, sums.names, variant, unit, rules, checkpoint=checkpoint)
    there = source_of(model, other, task.metric, plan.source, source)

    def some(pairs: Sequence[int]) -> list[tuple[float, float | None]]:
        """Adds the effects of some pairs to the sums; returns the metric of each pair on both runs."""
        activations, metric = there.rows(pairs)
        effects = Effects(plan, model, base.rows(pairs), places.rows(pairs), activations).run(task.metric)
        sums.add(effects)
        bar.update(len(pairs))
        found = finite(effects.metric.tolist(), lambda i: f"the metric of the base run, on pair {pairs[i]}")
        return list(zip(found, [None] * len(pairs) if metric is None else metric.tolist(), strict=True))

    with tqdm(total=len(task), desc="attribution", disable=None if progress is None else not progress) as bar:
        metrics = halving(range(len(task)), some)
    n = len(task)
    forward, backward = plan.passes
    settings = settings_of(
        task,
        method="attribution_patching",
        variant=variant,
        unit=unit if plan.drops else None,
        alpha=plan.alphas[0] if plan.alphas else None,
        graddrop=left_out,
        direction=way,
        sites=shorts,
        positions=mode,
        rules=None if rules is None else {**asdict(rules), "hold": sorted(rules.hold)},
        base=[value for value, _ in metrics],
        source=[value for _, value in metrics if value is not None] or None,
        source_sha256=there.digest,
        passes=(n * (forward + there.forward) + sums.again, n * backward),
        trivial=sums.trivial(),
    )
    return Attribution(sums.tables(n), settings=settings, provenance=provenance_of(model, task))


class _Effect(NamedTuple):
    """Of one site, over pairs: the sum of scores, the sum of effects, and whether the node ever changes."""

    score: Tensor
    signed: Tensor
    differs: Tensor

    def plus(self, other: _Effect) -> _Effect:
        return _Effect(self.score + other.score, self.signed + other.signed, self.differs | other.differs)


class _Sums:
    """The effects of all sites, batch by batch; one that runs out of memory does not count and is repeated in parts."""

    def __init__(self, model: HookedModel, shorts: Sequence[str], places: Places, variant: Variant) -> None:
        self.places, self.variant = places, variant
        self.full = {short: taken_at(model, short) for short in shorts}
        self.names = tuple(dict.fromkeys(name for names in self.full.values() for name in names))
        self.total: dict[str, _Effect] = {}
        self.again = 0.0

    def add(self, effects: Effects) -> None:
        self.again += effects.again * len(effects.metric)
        for name in self.names:
            score, signed = effects.scores(name, self.variant)
            effect = _Effect(score.sum(0), signed.sum(0), effects.differs[name].any(0))
            self.total[name] = self.total[name].plus(effect) if name in self.total else effect

    def trivial(self) -> Tensor:
        """Of each node, whether its activation is the same on both prompts of every pair."""
        return torch.cat([~self.total[name].differs.flatten() for names in self.full.values() for name in names])

    def tables(self, n: int) -> dict[str, Labelled]:
        """Means over `n` pairs by site.

        Raises:
            NonFiniteError: a site's sum is NaN or infinite.
        """
        found = {}
        for short, names in self.full.items():
            axes, places = node_axes(short, self.places.merged), self.places.at(short)
            known: dict[str, Any] = {
                "layer": [parse(name)[1] for name in names],
                "pos": places.labels,
                "source": places.labels,
            }
            coords = {axis: known[axis] for axis in axes if axis in known}
            for kind, parts in (
                ("score", [self.total[name].score for name in names]),
                ("signed", [self.total[name].signed for name in names]),
            ):
                _check_finite(dict(zip(names, parts, strict=True)))
                whole = torch.stack([part[0] if places.merged else part for part in parts]).cpu() / n
                found[f"{kind}/{short}"] = Labelled(whole if SITES[short].layered else whole[0], axes, coords)
        return found


def _check_finite(effects: dict[str, Tensor]) -> None:
    bad = [name for name, effect in effects.items() if not bool(effect.isfinite().all())]
    if bad:
        raise NonFiniteError(
            f"estimates at {bad[-1]}",  # the backward pass reaches the last layer first
            f"NaN or infinity in its gradient or its activations ({len(bad)} layers)",
            "use a wider dtype, such as bfloat16 or float32",
        )
