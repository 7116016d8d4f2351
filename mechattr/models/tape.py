"""One run of a network: its forward pass with all checks, and as many backward passes over its graph as are wanted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from mechattr.artifact import Cache
from mechattr.errors import (
    ModelStateError,
    NonFiniteError,
    SettingError,
    UnknownNameError,
    UnsupportedFeatureError,
    nearest,
)
from mechattr.models.base import Batch, Metric, ModelInfo, Run, Start, Visit
from mechattr.models.checks import check_hold, check_start
from mechattr.models.dictionary import Dictionary
from mechattr.models.edits import Edit, Frame
from mechattr.models.rules import Rules, check_rules
from mechattr.models.taps import Point, Taps, Watch, plan_edits
from mechattr.sites import expand, parse, position_axis, reads_source, site_spec


@dataclass(eq=False, slots=True)
class Tape:
    """A forward pass that kept its graph.

    Attributes:
        logits: of every column.
        metric: one number a row, if there was a metric.
        activations: what was recorded, by full site name.
    """

    logits: Float[Tensor, "batch pos d_vocab"]
    metric: Float[Tensor, " batch"] | None
    activations: Mapping[str, Tensor]
    _value: Tensor | None = field(repr=False)
    _nodes: Mapping[str, Point] = field(repr=False)
    _anchor: Tensor = field(repr=False)
    _watch: Watch = field(repr=False)
    _open: bool = field(default=True, repr=False)

    @property
    def repeats(self) -> float:
        """Forward passes that a backward pass from given gradients needs."""
        return 0.0

    def pull_back(self, visit: Visit, at: Mapping[str, Tensor] | None = None, *, last: bool = False) -> None:
        """One backward pass: from the sum of the metric over rows, or from given gradients at some gradient sites.

        Rows stay apart, because a row's metric depends on that row only. Each gradient site that the pass reaches is
        handed over as `visit(site, activation, gradient)`, those named in `at` included, and nothing is kept; a site
        without influence is not visited.

        Args:
            visit: what receives the gradients.
            at: gradients by full site name. The pass starts there and goes down; contributions of sites that lie below
                one another add up.
            last: let the graph go afterwards.

        Raises:
            ModelStateError: the graph has been let go.
            UnknownNameError: `at` names a site that is no gradient site of this run.
        """
        check_pass(self._open, at, self._nodes)
        self._open = not last
        if at is None:
            if self._value is None or not self._value.requires_grad:  # the metric does not depend on any site
                return
            roots, gradients = [get_gradient_edge(self._value)], [torch.ones_like(self._value)]
        else:
            roots, gradients = [self._nodes[name].edge for name in at], list(at.values())
        self._watch.visit = visit
        try:
            torch.autograd.grad(roots, self._anchor, gradients, retain_graph=not last, allow_unused=True)
        finally:
            self._watch.visit = None

    def gradients(self) -> dict[str, Tensor]:
        """The gradient at every gradient site, zero where the metric does not depend on it; lets the graph go."""
        if self._value is None or not self._value.requires_grad:
            return {name: torch.zeros_like(point.blank) for name, point in self._nodes.items()}
        self._open = False
        edges, ones = [point.edge for point in self._nodes.values()], torch.ones_like(self._value)
        found = torch.autograd.grad(self._value, edges, ones, allow_unused=True)
        pairs = zip(self._nodes.items(), found, strict=True)
        return {name: torch.zeros_like(point.blank) if g is None else g for (name, point), g in pairs}


def check_pass(going: bool, at: Mapping[str, Tensor] | None, names: Iterable[str]) -> None:
    """Whether a backward pass can be made: the graph is there, and the pass starts at gradient sites."""
    if not going:
        raise ModelStateError("another backward pass", "the last one let the graph go", "leave out last=True")
    unknown = sorted(set(at or {}) - set(names))
    if unknown:
        fix = nearest(unknown[0], names)
        raise UnknownNameError(f"a backward pass from {unknown[0]}", "it is no gradient site of this run", fix)


def plan(
    info: ModelInfo,
    sites: Sequence[str],
    batch: Batch,
    record: str | Sequence[str],
    edits: Sequence[Edit],
    metric: Metric | None,
    gradients: str | Sequence[str],
    rules: Rules | None,
    start: Start | None,
    dictionaries: Mapping[str, Dictionary] | None = None,
) -> Taps:
    """What a run is to do at each site, checked against the model and the batch before anything runs."""
    wanted = frozenset(expand(gradients, sites))
    if wanted and metric is None:
        raise SettingError("gradients", "no metric to differentiate", "pass metric=task.metric or a function")
    if metric is not None and not callable(metric):
        raise SettingError(f"metric={metric!r}", "that is not callable", "pass metric=task.metric or a function")
    check_start(start, info, batch)
    check_rules(rules, sites)
    check_hold(rules, info)
    taps = Taps(
        frame=Frame.whole(batch),
        edits=plan_edits(edits, sites, info, batch.lengths, batch.prompt.lengths),
        record=frozenset(expand(record, sites)),
        gradients=wanted,
        dictionaries=dictionaries or {},
        rules=rules or Rules(),
        start=start,
    )
    _check_explicit_positions(edits, batch)
    taps.axes = {name: site_spec(name).axes for name in taps.names}
    return taps


def make_tape(
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
    checkpoint: bool = False,
    visited: bool = True,
    dictionaries: Mapping[str, Dictionary] | None = None,
) -> Tape:
    """Runs `forward(taps) -> logits` once; keeps its graph if gradients are asked for.

    `visited` says whether backward passes will be watched, for which activations of gradient sites are kept.

    Raises:
        UnknownSiteError: a site that the model does not have.
        SettingError: gradients without a metric or of one that has none, a metric of another shape, an edit, rule or
            start that does not fit.
        UnsupportedFeatureError: a site that did not fire, such as one below the start.
        NonFiniteError: NaN or infinity at a real token, with the first site that has it.
    """
    taps = plan(info, sites, batch, record, edits, metric, gradients, rules, start, dictionaries)
    taps.checkpoint, taps.watch = checkpoint and bool(taps.gradients), Watch(keeps=visited)
    with torch.enable_grad() if taps.gradients else torch.no_grad():
        logits = forward(taps)
        check_fired(taps)
        check_finite(logits, batch, lambda: _everything(forward, sites, taps), sites)
        value = None if metric is None else metric(logits, batch)
        if metric is not None:
            check_metric(value, batch)
        if taps.gradients and value is not None and logits.requires_grad and not value.requires_grad:
            raise no_gradient()
    nodes = {name: taps.nodes[name] for name in sites if name in taps.nodes}
    taps.nodes = {}  # a checkpointed graph holds the taps, which must not hold the graph
    detached = None if value is None else value.detach()
    root = value if taps.gradients else None
    return Tape(logits.detach(), detached, taps.activations, root, nodes, taps.anchor, taps.watch)


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
    checkpoint: bool = False,
    dictionaries: Mapping[str, Dictionary] | None = None,
) -> Run:
    """One run: the forward pass of `make_tape` and, if gradients are asked for, one backward pass.

    Raises:
        SettingError: `visit` without gradients, and what `make_tape` refuses.
    """
    if visit is not None and not expand(gradients, sites):
        raise SettingError("visit", "no site whose gradient is asked for", "name sites with gradients=")
    tape = make_tape(
        forward,
        info,
        sites,
        batch,
        record=record,
        edits=edits,
        metric=metric,
        gradients=gradients,
        rules=rules,
        start=start,
        checkpoint=checkpoint,
        visited=visit is not None,
        dictionaries=dictionaries,
    )
    found: dict[str, Tensor] = {}
    if visit is not None:
        tape.pull_back(visit, last=True)
    else:
        found = tape.gradients()
    return Run(tape.logits, Cache.from_tensors(tape.activations), Cache.from_tensors(found), tape.metric)


def check_fired(taps: Taps) -> None:
    """Whether every site that something was to happen at was passed."""
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
            side = batch.prompt if reads_source(site_spec(edit.site).axes) else batch
            part = side if edit.rows is None else side.rows(edit.rows)
            for position in edit.positions:
                part.columns(position)


def check_metric(value: object, batch: Batch) -> None:
    """Whether a metric gave one number a row."""
    if not isinstance(value, Tensor) or value.shape != (len(batch),):
        gave = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise SettingError("a metric", f"it returned {gave}", f"return one number a row, shape ({len(batch)},)")


def no_gradient() -> SettingError:
    """The error of a metric that cannot be differentiated."""
    found = "it does not follow from the logits by differentiable steps (argmax, detach and comparisons are none)"
    return SettingError("the gradient of a metric", found, "use a differentiable metric, or a method without gradients")


def _everything(forward: Callable[[Taps], Tensor], sites: Sequence[str], taps: Taps) -> Mapping[str, Tensor]:
    """The activations of all sites in a run of the same edits."""
    probe = Taps(
        frame=taps.frame, edits=taps.edits, record=frozenset(sites), start=taps.start, dictionaries=taps.dictionaries
    )
    probe.axes = {name: site_spec(name).axes for name in probe.names}
    with torch.no_grad():
        forward(probe)
    return probe.activations


def check_finite(
    logits: Tensor, batch: Batch, activations: Callable[[], Mapping[str, Tensor]], sites: Sequence[str]
) -> None:
    """Whether the logits of all real tokens are finite; if not, `activations` of all sites show where it begins."""
    if bool(torch.isfinite(logits.sum())) or bool(torch.isfinite(logits[batch.mask]).all()):
        return
    found = activations()
    for name in sites:
        x = found.get(name)
        axes = site_spec(name).axes
        if x is None or position_axis(axes) != 1:  # masked scores are infinite by design
            continue
        if not bool(torch.isfinite(x[(batch.prompt if reads_source(axes) else batch).mask]).all()):
            raise NonFiniteError(
                "a forward pass",
                f"NaN or infinity, first at {name} (dtype {x.dtype})",
                "use a wider dtype, such as bfloat16 or float32, or look at the edits that touch this site",
            )
    raise NonFiniteError("a forward pass", "NaN or infinity in the logits only", "use a wider dtype, such as float32")
