"""The engine behind every backend: what happens to an activation as it passes a site.

A backend calls `taps(name, x) -> x` at each site that `taps.wants(name)`; everything else (edits, recording, gradients,
rules) is here, so that reading, patching and differentiating a site are the same causal node on every backend.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mechattr.artifact import Cache
from mechattr.errors import NonFiniteError, SettingError, UnsupportedFeatureError
from mechattr.models.base import Batch, Metric, ModelInfo, Run, Start, Visit
from mechattr.models.edits import Edit, Frame, apply, validate
from mechattr.models.rules import Rules
from mechattr.sites import expand, parse, site_spec


@dataclass(eq=False)
class Taps:
    """The state of one run at its sites. A backend only calls it; it lives as long as the run."""

    frame: Frame
    edits: dict[str, list[Edit]] = field(default_factory=dict)
    record: frozenset[str] = frozenset()
    gradients: frozenset[str] = frozenset()
    leaves: frozenset[str] = frozenset()
    rules: Rules = Rules()
    start: Start | None = None
    activations: dict[str, Tensor] = field(default_factory=dict)
    nodes: dict[str, Tensor] = field(default_factory=dict)
    axes: dict[str, tuple[str, ...]] = field(default_factory=dict)
    fired: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        held = {f"blocks.{layer}.hook_{write}" for layer in self.rules.hold for write in ("attn_out", "mlp_out")}
        self.held = frozenset(held)
        self.names = frozenset(self.edits) | self.record | self.gradients | self.leaves | self.held

    def wants(self, name: str) -> bool:
        """Whether anything happens at this site."""
        return name in self.names

    def wants_any(self, names: Sequence[str]) -> bool:
        """Whether anything happens at one of these sites."""
        return not self.names.isdisjoint(names)

    def __call__(self, name: str, x: Tensor) -> Tensor:
        self.fired.add(name)
        for edit in self.edits.get(name, ()):
            x = apply(edit, x, name, self.axes[name], self.frame)
        if name in self.leaves:
            x = x.detach().requires_grad_(True)
        if name in self.gradients:
            x = x.view_as(x)  # an autograd node of its own: the gradient belongs to this site
            self.nodes[name] = x
        if name in self.record:
            self.activations[name] = x.detach()
        if name in self.held:
            x = x.detach()
        return x


def plan_edits(edits: Sequence[Edit], sites: Sequence[str], info: ModelInfo, lengths: Tensor) -> dict[str, list[Edit]]:
    """Edits by full site name, each checked against the model and the batch."""
    sizes = {"head": info.n_heads, "kv_head": info.n_kv_heads, "neuron": info.d_mlp}
    planned: dict[str, list[Edit]] = {}
    for edit in edits:
        for name in expand(edit.site, sites, edit.layers):
            validate(edit, name, site_spec(name).axes, sizes, lengths)
            planned.setdefault(name, []).append(edit)
    return planned


def execute(
    forward: Callable[[Taps], Tensor],
    info: ModelInfo,
    sites: Sequence[str],
    batch: Batch,
    *,
    record: str | Sequence[str],
    edits: Sequence[Edit],
    metric: Metric | None,
    gradients: str | Sequence[str],
    rules: Rules | None,
    start: Start | None,
    visit: Visit | None,
) -> Run:
    """Runs `forward(taps) -> logits` once, and one backward pass if gradients are asked for.

    Gradients are those of the sum of `metric` over rows, which keeps rows apart because a row's metric depends on that row
    only. With `visit`, each (site, activation, gradient) is handed over as the backward pass reaches it and then dropped.
    """
    wanted = frozenset(expand(gradients, sites))
    if wanted and metric is None:
        raise SettingError("gradients", "no metric to differentiate", "pass metric=task.metric or a function")
    if start is not None and not 0 <= start.layer < info.n_layers:
        raise SettingError(f"a run from block {start.layer}", f"blocks 0 to {info.n_layers - 1}", "name an existing block")
    first = "hook_embed" if start is None else f"blocks.{start.layer}.hook_resid_pre"
    leaves = ({first} | (wanted & {"hook_pos_embed"})) if wanted else set()
    taps = Taps(
        frame=Frame(batch.lengths, batch.positions, batch.positions),
        edits=plan_edits(edits, sites, info, batch.lengths),
        record=frozenset(expand(record, sites)),
        gradients=wanted,
        leaves=frozenset(leaves),
        rules=rules or Rules(),
        start=start,
    )
    _check_explicit_positions(edits, batch)
    taps.axes = {name: site_spec(name).axes for name in taps.names}
    with torch.enable_grad() if wanted else torch.no_grad():
        logits = forward(taps)
        _check_fired(taps)
        _check_finite(logits, batch, forward, sites, taps)
        value = None if metric is None else metric(logits, batch)
        if value is not None and value.shape != (len(batch),):
            raise SettingError(
                "a metric", f"it returned shape {tuple(value.shape)}", f"return one number a row, shape ({len(batch)},)"
            )
        found = _backward(value, taps, sites, visit) if wanted and value is not None else {}
    return Run(
        logits.detach(),
        Cache.from_tensors(taps.activations),
        Cache.from_tensors(found),
        None if value is None else value.detach(),
    )


def _backward(value: Tensor, taps: Taps, sites: Sequence[str], visit: Visit | None) -> dict[str, Tensor]:
    if not value.requires_grad:  # the metric does not depend on any site: every gradient is zero
        return {} if visit else {name: torch.zeros_like(x) for name, x in taps.nodes.items()}
    if visit is None:
        grads = torch.autograd.grad(value.sum(), list(taps.nodes.values()), allow_unused=True)
        pairs = zip(taps.nodes.items(), grads, strict=True)
        found = {name: torch.zeros_like(x) if g is None else g for (name, x), g in pairs}
        return {name: found[name] for name in sites if name in found}
    for name, x in taps.nodes.items():
        x.register_hook(_visitor(visit, name, x.detach()))
    # every other node lies above one of the lowest layer's nodes, so its hook fires on the way down to them
    depth = {name: -1 if (layer := parse(name)[1]) is None else layer for name in taps.nodes}
    depth.update({name: 10**9 for name in taps.nodes if name.startswith("ln_final")})
    lowest = [x for name, x in taps.nodes.items() if depth[name] == min(depth.values())]
    torch.autograd.grad(value.sum(), lowest, allow_unused=True)
    return {}


def _visitor(visit: Visit, name: str, activation: Tensor) -> Callable[[Tensor], None]:
    def hook(gradient: Tensor) -> None:
        visit(name, activation, gradient)

    return hook


def _check_fired(taps: Taps) -> None:
    silent = sorted(taps.names - taps.held - taps.fired)
    if silent:
        below = taps.start is not None and any((parse(n)[1] or 0) < taps.start.layer for n in silent)
        raise UnsupportedFeatureError(
            f"site {silent[0]}",
            f"it did not fire in this run ({len(silent)} silent)",
            f"the run starts at block {taps.start.layer}: name sites from there on"
            if below and taps.start is not None
            else "the model's own code does not pass through it; use another attention implementation or model class",
        )


def _check_explicit_positions(edits: Sequence[Edit], batch: Batch) -> None:
    for edit in edits:
        if edit.positions is not None and not isinstance(edit.positions, str):
            part = batch if edit.rows is None else batch.rows(edit.rows)
            for position in edit.positions:
                part.columns(position)


def _check_finite(
    logits: Tensor, batch: Batch, forward: Callable[[Taps], Tensor], sites: Sequence[str], taps: Taps
) -> None:
    if bool(torch.isfinite(logits.sum())) or bool(torch.isfinite(logits[batch.mask]).all()):
        return
    probe = Taps(frame=taps.frame, edits=taps.edits, record=frozenset(sites), start=taps.start)
    probe.axes = {name: site_spec(name).axes for name in probe.names}
    with torch.no_grad():
        forward(probe)
    for name in sites:
        x = probe.activations.get(name)
        if x is None or parse(name)[0] in ("attn_scores", "pattern"):  # masked scores are infinite by design
            continue
        if not bool(torch.isfinite(x[batch.mask]).all()):
            raise NonFiniteError(
                "a forward pass",
                f"NaN or infinity, first at {name} (dtype {x.dtype})",
                "use a wider dtype, such as bfloat16 or float32, or look at the edits that touch this site",
            )
    raise NonFiniteError("a forward pass", "NaN or infinity in the logits only", "use a wider dtype, such as float32")
