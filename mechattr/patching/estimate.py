"""What a method would cost, from shapes alone: passes and memory. No model is run."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from mechattr.artifact import Cache
from mechattr.errors import SettingError, UnknownNameError, nearest
from mechattr.models.base import HookedModel
from mechattr.patching import attribution
from mechattr.patching.effects import Plan, plan_of
from mechattr.patching.interventions import PAIRS_AT_ONCE, rows_of, share_of
from mechattr.patching.nodes import table_of
from mechattr.patching.places import (
    DEFAULT_SITES,
    Positions,
    base_and_source,
    check_call,
    direction_of,
    feature_of,
    mode_of,
    node_sites,
    places_of,
    rows_at_once,
    taken_at,
)
from mechattr.patching.source import shape_of, source_of
from mechattr.patching.variants import DEFAULT_VARIANT
from mechattr.sites import SITES, Node, full_name, parse
from mechattr.tasks.task import Task

METHODS = ("activation_patching", "attribution_patching")


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """The cost of one call of a method.

    Attributes:
        method: its name.
        forward: forward passes in prompt rows, as in `Attribution.passes`.
        backward: backward passes in prompt rows.
        nodes: number of nodes that get a score.
        recorded: bytes of the activations that are recorded and alive together.
        working: bytes of one run besides them: what its backward pass keeps, or one block without a backward pass.
        at_most: whether `forward` is an upper bound.
    """

    method: str
    forward: float
    backward: float
    nodes: int
    recorded: int
    working: int
    at_most: bool

    @property
    def bytes(self) -> int:
        """Peak memory in addition to the weights."""
        return self.recorded + self.working

    def _rows(self) -> dict[str, str]:
        bound = "at most " if self.at_most else ""
        return {
            "nodes": f"{self.nodes:,}",
            "forward passes": f"{bound}{self.forward:,.1f} prompt rows",
            "backward passes": f"{self.backward:,.1f} prompt rows",
            "memory besides the weights": f"about {_size(self.bytes)} ({_size(self.recorded)} recorded)",
        }

    def __str__(self) -> str:
        return f"{self.method}: " + "; ".join(f"{name} {value}" for name, value in self._rows().items())

    def _repr_html_(self) -> str:
        rows = "".join(f"<tr><th>{name}</th><td>{value}</td></tr>" for name, value in self._rows().items())
        return f"<table><caption>{self.method}</caption>{rows}</table>"


def estimate(
    model: HookedModel,
    task: Task,
    method: str,
    *,
    sites: str | Sequence[str] = DEFAULT_SITES,
    nodes: Sequence[Node] | None = None,
    variant: str | None = None,
    unit: str = "block",
    direction: str = "noising",
    positions: Positions | None = None,
    source: Cache | None = None,
    batch_size: int | None = None,
) -> Estimate:
    """What a method would cost on a task; the settings are those of the method.

    Passes. Those of attribution patching are exact. Those of exact patching are an upper bound: nodes whose activation
    is the same on both prompts are not run, which is known only once both were recorded. It is reached when no
    activation is the same.

    Memory. Recordings are counted from the shapes of the sites: for exact patching the nodes' activations of a group of
    pairs on both prompts and the residual stream before each block that is patched, for attribution patching those
    of a batch on the source prompt. To this comes one run. With a backward pass it is taken to keep every site of the
    model once, except `result`, with scores and patterns in float32 or wider, and the logits twice: more than autograd
    keeps, up to four times as much with fused attention. Without one, the same of a single block. Variants of
    attribution patching with several backward passes keep changes, and with the QK fix a pattern, between them. Tables
    of scores and what a metric makes are not counted.

    Args:
        model: a hooked model.
        task: prompt pairs.
        method: `"activation_patching"` or `"attribution_patching"`.
        sites: short names.
        nodes: these nodes only; exact patching alone has this setting.
        variant: of attribution patching alone; its default unless given.
        unit: of the variants that drop writes.
        direction: noising or denoising.
        positions: `"aligned"`, `"named"` or `"all"`.
        source: a recording that takes the place of the source run.
        batch_size: as the method takes it; memory grows with it.

    Raises:
        UnknownNameError: another method, variant, unit, direction or kind of positions.
        SettingError: `nodes` for attribution patching, `variant` for exact patching, or what the method itself refuses.
        UnknownSiteError, AlignmentError, EmptyTaskError, MismatchError: as the method raises them.

    Cost:
        No pass.
    """
    if method not in METHODS:
        raise UnknownNameError(f"to estimate method {method!r}", "no such method", nearest(method, METHODS))
    exact = method == "activation_patching"
    if nodes is not None and not exact:
        raise SettingError(f"nodes= for {method}", "it scores whole sites", "name sites, or use activation_patching")
    if variant is not None and exact:
        raise SettingError(f"variant= for {method}", "it has no variants", "leave it out, or use attribution_patching")
    check_call(f"a call to estimate {method}", model, task)
    base, other = base_and_source(task, direction_of(direction))
    names, counts = _nodes(model, task, sites, nodes, positions)
    memory = _Memory(model, base.tokens.shape[1])
    if not exact:
        plan = plan_of(model, names, variant or DEFAULT_VARIANT, unit)
        source_run = source_of(model, other, task.metric, plan.source, source)
        pairs = min(len(task), rows_at_once(batch_size, attribution.PAIRS_AT_ONCE))
        forward, backward = plan.passes
        return Estimate(
            method=method,
            forward=len(task) * (forward + source_run.forward),
            backward=len(task) * backward,
            nodes=counts.total(),
            recorded=memory.recorded(plan.source, pairs),
            working=memory.working(model.sites(), pairs) + memory.between(plan, pairs),
            at_most=False,
        )
    runs = 1 + source_of(model, other, task.metric, names, source).forward  # of each pair, before any intervention
    rows = rows_of(base, batch_size)
    pairs = min(len(task), rows, PAIRS_AT_ONCE)
    stream = [full_name("resid_pre", layer) for layer in counts if layer is not None]
    most = max(pairs, min(rows, pairs * max(counts.values())))
    each = sum(n * share_of(layer, model.info.n_layers) for layer, n in counts.items())
    return Estimate(
        method=method,
        forward=len(task) * (runs + each),
        backward=0.0,
        nodes=counts.total(),
        recorded=memory.recorded({*stream, *names}, pairs) + memory.recorded(names, pairs),
        working=memory.working([name for name in model.sites() if parse(name)[1] == 0], most),
        at_most=True,
    )


def _nodes(
    model: HookedModel,
    task: Task,
    sites: str | Sequence[str],
    nodes: Sequence[Node] | None,
    positions: Positions | None,
) -> tuple[tuple[str, ...], Counter[int | None]]:
    """The full names at which nodes are taken, and the number of nodes of each layer (`None`: outside the blocks)."""
    if nodes is not None:
        table, _ = table_of(model, task, nodes, positions)
        return table.names, Counter({layer: len(table.of_layer(layer)) for layer in table.layers})
    places = max(1, len(places_of(task, mode_of(task, positions)).labels))
    taken = [name for short in node_sites(model, sites) for name in taken_at(model, short)]
    counts: Counter[int | None] = Counter()
    for name in taken:
        short, layer = parse(name)
        feature, shape = feature_of(short), shape_of(name, model.info, 1, 1)
        counts[layer] += places * (1 if feature is None else shape[SITES[short].axes.index(feature)])
    return tuple(dict.fromkeys(taken)), counts


class _Memory:
    """Bytes of activations, for prompts of one padded length."""

    def __init__(self, model: HookedModel, columns: int) -> None:
        self.info, self.columns = model.info, columns
        self.width = getattr(torch, model.info.dtype).itemsize

    def recorded(self, names: Iterable[str], rows: int, *, wide: Sequence[str] = ()) -> int:
        """Of some sites; the scales of norms, and `wide` sites, are float32 or wider."""
        total = 0
        for name in names:
            short = parse(name)[0]
            width = max(4, self.width) if short.endswith("_scale") or short in wide else self.width
            total += width * math.prod(shape_of(name, self.info, rows, self.columns))
        return total

    def working(self, names: Iterable[str], rows: int) -> int:
        """Of a run that keeps these sites, and of its logits."""
        kept = [name for name in names if parse(name)[0] != "result"]
        logits = self.width * rows * self.columns * self.info.d_vocab
        return self.recorded(kept, rows, wide=("attn_scores", "pattern")) + 2 * logits

    def between(self, plan: Plan, rows: int) -> int:
        """What the passes of an estimate keep for one another: changes, gradients to restart from, and the QK fix."""
        again = bool(plan.drops or plan.alphas)
        one = ("attn_scores", "z", "z", "z")
        fixed = list(plan.fixed)[: None if again else 1]
        total = self.recorded([full_name(short, layer) for layer in fixed for short in one], rows, wide=one)
        if again:
            shorts = [parse(name)[0] for name in plan.linear]
            total += self.recorded(plan.linear, rows, wide=shorts) + self.recorded(plan.restarts, rows)
        return total


def _size(number: int) -> str:
    for unit in ("B", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.3g} {unit}" if unit != "B" else f"{number} B"
        number /= 1024  # type: ignore[assignment]
    return f"{number:,.4g} GiB"
