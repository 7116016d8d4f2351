"""The engine behind every backend: what happens to an activation as it passes a site.

A backend calls `taps(name, x) -> x` at each site that `taps.wants(name)`; everything else (edits, recording, gradients,
rules) is here, so that reading, patching and differentiating a site are the same causal node on every backend.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mechattr.artifact import Cache
from mechattr.errors import NonFiniteError, SettingError, UnknownSiteError, UnsupportedFeatureError
from mechattr.models.base import Batch, Metric, ModelInfo, Run, Start, Visit
from mechattr.models.edits import Edit, Frame, apply, validate
from mechattr.models.rules import Rules
from mechattr.sites import expand, parse, site_spec


class _Node(torch.autograd.Function):
    """The identity as an autograd node of its own, so that a gradient belongs to one site and not to a shared tensor.

    The anchor is a leaf below every site. It makes sites differentiable where parameters are not, and one backward pass
    towards it goes through all of them without keeping any gradient.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor) -> Tensor:  # noqa: ARG004 (the signature of autograd)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:  # noqa: ARG004
        return gradients[0], None


_node: Callable[[Tensor, Tensor], Tensor] = _Node.apply


@dataclass(eq=False)
class Taps:
    """The state of one run at its sites. A backend only calls it; it lives as long as the run."""

    frame: Frame
    edits: dict[str, list[Edit]] = field(default_factory=dict)
    record: frozenset[str] = frozenset()
    gradients: frozenset[str] = frozenset()
    anchor: Tensor = field(default_factory=lambda: torch.zeros((), requires_grad=True))
    rules: Rules = field(default_factory=Rules)
    start: Start | None = None
    activations: dict[str, Tensor] = field(default_factory=dict)
    nodes: dict[str, Tensor] = field(default_factory=dict)
    axes: dict[str, tuple[str, ...]] = field(default_factory=dict)
    fired: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        held = {f"blocks.{layer}.hook_{write}" for layer in self.rules.hold for write in ("attn_out", "mlp_out")}
        self.held = frozenset(held)
        self.names = frozenset(self.edits) | self.record | self.gradients | self.held

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
        if name in self.gradients:
            x = _node(x, self.anchor)
            self.nodes[name] = x
        if name in self.record:
            self.activations[name] = x.detach()
        if name in self.held:
            x = x.detach()
        return x


def supported(feature: Any, sites: Sequence[str]) -> bool:
    """Whether a site name (short or full) is among `sites`, or a value is an edit operator or a `Rules`."""
    if not isinstance(feature, str):
        return isinstance(feature, Rules) or callable(feature)
    try:
        return bool(expand(feature, sites))
    except UnknownSiteError:
        return False


def plan_edits(edits: Sequence[Edit], sites: Sequence[str], info: ModelInfo, lengths: Tensor) -> dict[str, list[Edit]]:
    """Edits by full site name, each checked against the model and the batch."""
    sizes = {"layer": info.n_layers, "head": info.n_heads, "kv_head": info.n_kv_heads, "neuron": info.d_mlp}
    planned: dict[str, list[Edit]] = {}
    if isinstance(edits, Edit) or not all(isinstance(edit, Edit) for edit in edits):
        raise SettingError("edits", f"{edits!r:.80}", "give a list of Edit")
    for edit in edits:
        for name in expand(edit.site, sites):  # all of them first: a wrong layer is an error of its own
            validate(edit, name, site_spec(name).axes, sizes, lengths)
        for name in expand(edit.site, sites, edit.layers):
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

    Gradients are those of the sum of `metric` over rows, which keeps rows apart because a row's metric depends on that
    row only; a site that the metric does not depend on has gradient zero. With `visit`, each site, activation and
    gradient is handed over as the backward pass reaches it and then dropped; a site without influence is not visited.

    Raises:
        UnknownSiteError: a site that the model does not have.
        SettingError: gradients without a metric, a metric of another shape, an edit, rule or start that does not fit.
        UnsupportedFeatureError: a site that did not fire, such as one below the start.
        NonFiniteError: NaN or infinity at a real token, with the first site that has it.
    """
    wanted = frozenset(expand(gradients, sites))
    if wanted and metric is None:
        raise SettingError("gradients", "no metric to differentiate", "pass metric=task.metric or a function")
    if metric is not None and not callable(metric):
        raise SettingError(f"metric={metric!r}", "that is not callable", "pass metric=task.metric or a function")
    if visit is not None and not wanted:
        raise SettingError("visit", "no site whose gradient is asked for", "name sites with gradients=")
    _check_start(start, info, batch)
    _check_hold(rules, info)
    taps = Taps(
        frame=Frame(batch.lengths, batch.positions, batch.positions),
        edits=plan_edits(edits, sites, info, batch.lengths),
        record=frozenset(expand(record, sites)),
        gradients=wanted,
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
        if metric is not None and (not isinstance(value, Tensor) or value.shape != (len(batch),)):
            gave = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise SettingError("a metric", f"it returned {gave}", f"return one number a row, shape ({len(batch)},)")
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
        names = [name for name in sites if name in taps.nodes]
        grads = torch.autograd.grad(value.sum(), [taps.nodes[name] for name in names], allow_unused=True)
        pairs = zip(names, grads, strict=True)
        return {name: torch.zeros_like(taps.nodes[name]) if g is None else g for name, g in pairs}
    for name, x in taps.nodes.items():
        x.register_hook(_visitor(visit, name, x.detach()))
    torch.autograd.grad(value.sum(), taps.anchor, allow_unused=True)
    return {}


def _visitor(visit: Visit, name: str, activation: Tensor) -> Callable[[Tensor], None]:
    def hook(gradient: Tensor) -> None:
        visit(name, activation, gradient)

    return hook


def _check_start(start: Start | None, info: ModelInfo, batch: Batch) -> None:
    if start is None:
        return
    if not 0 <= start.layer < info.n_layers:
        found = f"blocks 0 to {info.n_layers - 1}"
        raise SettingError(f"a run from block {start.layer}", found, "name an existing block")
    shape, wanted = tuple(start.resid_pre.shape), (*batch.tokens.shape, info.d_model)
    if shape != wanted:
        found = f"a residual stream of shape {shape}"
        raise SettingError(f"a run from block {start.layer} with shape {wanted}", found, "give one row for each prompt")
    kind, device = str(start.resid_pre.dtype).removeprefix("torch."), start.resid_pre.device
    if (kind, device) != (info.dtype, batch.device):
        found = f"a residual stream in {kind} on {device}"
        asked = f"a run from block {start.layer} in {info.dtype} on {batch.device}"
        raise SettingError(asked, found, "give a residual stream of this model")


def _check_hold(rules: Rules | None, info: ModelInfo) -> None:
    bad = sorted(layer for layer in (rules or Rules()).hold if not 0 <= layer < info.n_layers)
    if bad:
        raise SettingError(f"Rules(hold={bad})", f"blocks 0 to {info.n_layers - 1}", "name existing blocks")


def _check_fired(taps: Taps) -> None:
    silent = sorted(taps.names - taps.held - taps.fired)
    if not silent:
        return
    found = f"it did not fire in this run ({len(silent)} silent)"
    first = 0 if taps.start is None else taps.start.layer
    below = [n for n in silent if taps.start is not None and ("embed" in n or (parse(n)[1] or 0) < first)]
    if below:
        fix = f"the run starts at block {first}: name sites from there on"
        raise UnsupportedFeatureError(f"site {below[0]}", found, fix)
    fix = "the model's own code does not pass through it; use another attention implementation or model class"
    raise UnsupportedFeatureError(f"site {silent[0]}", found, fix)


def _check_explicit_positions(edits: Sequence[Edit], batch: Batch) -> None:
    for edit in edits:
        somewhere = edit.rows is None or len(edit.rows)
        if edit.positions is not None and not isinstance(edit.positions, str) and somewhere:
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
