"""One run of a network: its forward pass with all checks, and as many backward passes over its graph as are wanted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from mechattr.artifact import Cache
from mechattr.errors import SettingError, UnsupportedFeatureError
from mechattr.models.base import Batch, Metric, ModelInfo, Run, Start, Visit
from mechattr.models.checks import check_hold, check_start
from mechattr.models.dictionary import Dictionary
from mechattr.models.edits import Edit, Frame
from mechattr.models.rules import Rules, check_rules
from mechattr.models.run_checks import (
    check_asked,
    check_batched,
    check_differentiable,
    check_finite,
    check_fired,
    check_metric,
    check_pass,
    check_result,
    no_gradient,
)
from mechattr.models.taps import Point, Taps, Watch, plan_edits
from mechattr.sites import expand, reads_source, site_spec


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
    _checkpointed: bool = field(default=False, repr=False)
    _divided: bool = field(default=False, repr=False)
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
        check_pass(self._open, at, self._nodes, metric=self.metric is not None)
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

    def pull_backs(
        self, at: Mapping[str, Tensor], sites: Iterable[str] | None = None, *, last: bool = False
    ) -> dict[str, Tensor]:
        """Several backward passes in one: from n gradients at each site in `at`, all gradients below them.

        The passes share the graph and its tensors, and each of their products is one larger product. Memory grows by n:
        give fewer gradients at once where that is too much.

        Args:
            at: [n, *site] by full site name. Pass i starts from the i-th gradient at every site.
            sites: full names of the gradient sites that are wanted; by default all.
            last: let the graph go afterwards.

        Returns:
            [n, *site] by full site name, zero where a pass has no influence. What is given at a site is a part of
            its gradient.

        Raises:
            ModelStateError: the graph has been let go.
            UnknownNameError: a site that is no gradient site of this run.
            SettingError: other numbers of gradients, or another shape than the site's.
            UnsupportedFeatureError: a checkpointed run, whose blocks are computed again for one pass at a time.

        Cost:
            n backward passes, in less time than one after the other. Where a model is divided among processes they do
            come one after the other: what processes exchange has no batched form.
        """
        wanted = list(self._nodes if sites is None else sites)
        check_pass(self._open, (*at, *wanted), self._nodes)
        n = check_batched(at, {name: self._nodes[name].blank for name in at})
        if self._checkpointed:
            raise UnsupportedFeatureError(
                "several backward passes in one",
                "the run is checkpointed, and its blocks are computed again for one pass at a time",
                "leave checkpoint out, or use pull_back for each gradient",
            )
        self._open = not last
        roots, edges = [self._nodes[name].edge for name in at], [self._nodes[name].edge for name in wanted]
        blanks = {name: self._nodes[name].blank for name in wanted}
        found: tuple[Tensor | None, ...]
        if self._divided:
            passes = [
                torch.autograd.grad(roots, edges, one, retain_graph=True, allow_unused=True)
                for one in zip(*at.values(), strict=True)
            ]
            found = tuple(None if parts[0] is None else torch.stack(parts) for parts in zip(*passes, strict=True))
        else:
            found = torch.autograd.grad(
                roots, edges, list(at.values()), retain_graph=not last, allow_unused=True, is_grads_batched=True
            )
        return {
            name: blank.new_zeros(n, *blank.shape) if g is None else g
            for (name, blank), g in zip(blanks.items(), found, strict=True)
        }

    def gradients(self) -> dict[str, Tensor]:
        """The gradient at every gradient site, zero where the metric does not depend on it; lets the graph go."""
        if self._value is None or not self._value.requires_grad:
            return {name: torch.zeros_like(point.blank) for name, point in self._nodes.items()}
        self._open = False
        edges, ones = [point.edge for point in self._nodes.values()], torch.ones_like(self._value)
        found = torch.autograd.grad(self._value, edges, ones, allow_unused=True)
        pairs = zip(self._nodes.items(), found, strict=True)
        return {name: torch.zeros_like(point.blank) if g is None else g for (name, point), g in pairs}


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
    if metric is not None and not callable(metric):
        raise SettingError(f"metric={metric!r}", "that is not callable", "pass metric=task.metric or a function")
    check_start(start, info, batch)
    check_rules(rules)
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
    check_result(taps)
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
        SettingError: a metric without gradient or of another shape, an edit, rule or start that does not fit.
        UnsupportedFeatureError: a site that did not fire, such as one below the start.
        NonFiniteError: NaN or infinity at a real token, with the first site that has it.
    """
    taps = plan(info, sites, batch, record, edits, metric, gradients, rules, start, dictionaries)
    check_differentiable(bool(taps.gradients))
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
    return Tape(
        logits.detach(),
        detached,
        taps.activations,
        root,
        nodes,
        taps.anchor,
        taps.watch,
        taps.checkpoint,
        taps.split is not None,
    )


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
        SettingError: gradients without a metric, `visit` without gradients, and what `make_tape` refuses.
    """
    check_asked(expand(gradients, sites), metric, visit)
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


def _check_explicit_positions(edits: Sequence[Edit], batch: Batch) -> None:
    for edit in edits:
        somewhere = edit.rows is None or len(edit.rows)
        if edit.positions is not None and not isinstance(edit.positions, str) and somewhere:
            side = batch.prompt if reads_source(site_spec(edit.site).axes) else batch
            part = side if edit.rows is None else side.rows(edit.rows)
            for position in edit.positions:
                part.columns(position)


def _everything(forward: Callable[[Taps], Tensor], sites: Sequence[str], taps: Taps) -> Mapping[str, Tensor]:
    """The activations of all sites in a run of the same edits."""
    probe = Taps(
        frame=taps.frame, edits=taps.edits, record=frozenset(sites), start=taps.start, dictionaries=taps.dictionaries
    )
    probe.axes = {name: site_spec(name).axes for name in probe.names}
    with torch.no_grad():
        forward(probe)
    return probe.activations
