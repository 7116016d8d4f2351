"""The engine behind every backend: what happens to an activation as it passes a site.

A backend calls `taps(name, x) -> x` at each site that `taps.wants(name)`; everything else (edits, recording, gradients,
rules) is here, so that reading, patching and differentiating a site are the same causal node on every backend.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from mechattr.errors import SettingError, UnknownSiteError
from mechattr.models.base import AttentionForm, ModelInfo, Start, Visit
from mechattr.models.dictionary import Dictionary
from mechattr.models.edits import Edit, Frame, apply, validate
from mechattr.models.rules import Rules
from mechattr.models.sharding import Split
from mechattr.sites import expand, reads_source, site_spec


@dataclass(eq=False, slots=True)
class Watch:
    """What happens as a backward pass reaches the sites of a run.

    Attributes:
        keeps: whether a visitor will ask for activations. They are kept as autograd keeps its own tensors, so that a
            checkpointed run computes them again.
        visit: the visitor of the present pass.
    """

    keeps: bool
    visit: Visit | None = None


class Point(NamedTuple):
    """A gradient site in the graph of a run, without its activation.

    Attributes:
        edge: where its gradient arrives.
        blank: zeros in its shape, without their memory.
    """

    edge: GradientEdge
    blank: Tensor


class _Node(torch.autograd.Function):
    """The identity as an autograd node of its own, so that a gradient belongs to one site and not to a shared tensor.

    The anchor is a leaf below every site. It makes sites differentiable where parameters are not, and one backward pass
    towards it goes through all of them without keeping any gradient.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor, name: str, watch: Watch) -> Tensor:  # noqa: ARG004 (autograd's)
        ctx.name, ctx.watch = name, watch
        ctx.set_materialize_grads(False)
        if watch.keeps:
            ctx.save_for_backward(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, None, None, None]:
        (gradient,) = gradients
        if gradient is not None and ctx.watch.visit is not None:
            (x,) = ctx.saved_tensors
            ctx.watch.visit(ctx.name, x.detach(), gradient)
        return gradient, None, None, None


_node: Callable[[Tensor, Tensor, str, Watch], Tensor] = _Node.apply


@dataclass(eq=False)
class Taps:
    """The state of one run at its sites. A backend only calls it; it lives as long as the run.

    Attributes:
        checkpoint: whether blocks keep their input only and are computed again as the backward pass reaches them.
        repeats: true while that happens: edits act again, and nothing is recorded a second time.
        dictionaries: by the full name of their host.
        inputs: what dictionaries will read, by host, where that is another site.
        split: how the model is divided among processes.
    """

    frame: Frame
    edits: dict[str, list[Edit]] = field(default_factory=dict)
    dictionaries: Mapping[str, Dictionary] = field(default_factory=dict)
    record: frozenset[str] = frozenset()
    gradients: frozenset[str] = frozenset()
    anchor: Tensor = field(default_factory=lambda: torch.zeros((), requires_grad=True))
    rules: Rules = field(default_factory=Rules)
    start: Start | None = None
    checkpoint: bool = False
    repeats: bool = False
    watch: Watch = field(default_factory=lambda: Watch(keeps=False))
    activations: dict[str, Tensor] = field(default_factory=dict)
    nodes: dict[str, Point] = field(default_factory=dict)
    axes: dict[str, tuple[str, ...]] = field(default_factory=dict)
    fired: set[str] = field(default_factory=set)
    forms: dict[int, AttentionForm] = field(default_factory=dict)
    inputs: dict[str, Tensor] = field(default_factory=dict)
    split: Split | None = None

    def __post_init__(self) -> None:
        writes = ("attn_out", "cross_attn_out", "mlp_out")
        held = {f"blocks.{layer}.hook_{write}" for layer in self.rules.hold for write in writes}
        self.held = frozenset(held)
        named = frozenset(self.edits) | self.record | self.gradients | self.held
        self.active = {host: d for host, d in self.dictionaries.items() if not named.isdisjoint(d.sites)}
        self.readers = {d.read: [h for h, o in self.active.items() if o.read == d.read] for d in self.active.values()}
        self.names = named.union(self.active, self.readers)

    def wants(self, name: str) -> bool:
        """Whether anything happens at this site."""
        return name in self.names

    def wants_any(self, names: Sequence[str]) -> bool:
        """Whether anything happens at one of these sites."""
        return not self.names.isdisjoint(names)

    def __call__(self, name: str, x: Tensor) -> Tensor:
        """What goes on from a site: first through its dictionary, then its edits. Where a model is spread over devices,
        all of that happens beside the tokens, and so are recordings, gradients and the values of edits there. Where a
        process has a part of the heads or neurons, it happens to all of them."""
        if self.split is not None and name in self.split.axes:
            return self.split.part(name, self._whole(name, self.split.whole(name, x)))
        return self._whole(name, x)

    def here(self, name: str, n: int) -> int:
        """How many of the n heads of a site this process has."""
        return n if self.split is None else self.split.count(name, n)

    def _whole(self, name: str, x: Tensor) -> Tensor:
        home = self.frame.queries.device
        if x.device != home:
            return self._whole(name, x.to(home)).to(x.device)
        if name in self.active:
            x = self._through(name, x)
        x = self._pass(name, x)
        for host in self.readers.get(name, ()):
            if host != name:
                self.inputs[host] = x
        return x

    def _through(self, host: str, x: Tensor) -> Tensor:
        """x + (decode(f') - decode(f)) + (e' - e): with latents f and error e as they were, x to the last bit, and the
        gradient below that of the model."""
        dictionary = self.active[host]
        latents = dictionary.encode(self.inputs.pop(host, x))
        decoded = dictionary.decode(latents)
        error = x - decoded
        at_latents, at_error = dictionary.sites
        changed = dictionary.decode(self._pass(at_latents, latents))
        return x + (changed - decoded) + (self._pass(at_error, error) - error)

    def _pass(self, name: str, x: Tensor) -> Tensor:
        self.fired.add(name)
        for edit in self.edits.get(name, ()):
            x = apply(edit, x, name, self.axes[name], self.frame)
        if name in self.gradients:
            x = _node(x, self.anchor, name, self.watch)
            if not self.repeats:
                self.nodes[name] = Point(get_gradient_edge(x), x.new_zeros(()).expand(x.shape))
        if name in self.record and not self.repeats:
            self.activations[name] = x.detach()
        if name in self.held:
            x = x.detach()
        return x


def supported(feature: Any, sites: Sequence[str]) -> bool:
    """Whether a site name (short or full) is among `sites`, or a value is an edit operator."""
    if not isinstance(feature, str):
        return callable(feature)
    try:
        return bool(expand(feature, sites))
    except UnknownSiteError:
        return False


def plan_edits(
    edits: Sequence[Edit], sites: Sequence[str], info: ModelInfo, lengths: Tensor, source: Tensor | None = None
) -> dict[str, list[Edit]]:
    """Edits by full site name, each checked against the model and the lengths of a batch's rows and of its source's."""
    planned: dict[str, list[Edit]] = {}
    if isinstance(edits, Edit) or not all(isinstance(edit, Edit) for edit in edits):
        raise SettingError("edits", f"{edits!r:.80}", "give a list of Edit")
    for edit in edits:
        for name in expand(edit.site, sites):  # all of them first: a wrong layer is an error of its own
            spec = site_spec(name)
            layers = info.n_encoder_layers if name.startswith("encoder.") else info.n_layers
            real = source if source is not None and reads_source(spec.axes) else lengths
            validate(edit, name, spec.axes, {**info.sizes_at(spec.short), "layer": layers}, real)
        for name in expand(edit.site, sites, edit.layers):
            planned.setdefault(name, []).append(edit)
    return planned
