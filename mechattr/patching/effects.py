"""The estimated effects of one batch of pairs, collected while backward passes go by."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from mechattr.errors import UnsupportedFeatureError
from mechattr.models.base import Batch, HookedModel, Metric, Visit
from mechattr.models.edits import Edit
from mechattr.models.rules import Rules
from mechattr.models.tape import Tape
from mechattr.patching.drops import Drop
from mechattr.patching.places import Places, per_node
from mechattr.patching.qk import Fix, fix_of
from mechattr.patching.variants import Variant, variant_of
from mechattr.sites import SITES, full_name, host_of, parse

FIXED = ("rot_q", "rot_k")
READ = ("rot_q", "rot_k", "v", "z", "attn_scores")  # what the QK fix needs of the base run

# A node's site, and whether the effect goes through the softmax (`mechattr.patching.qk`) or along the gradient there.
Key = tuple[str, bool]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What the passes over a batch are for.

    Attributes:
        keys: the estimates that are wanted.
        drops: GradDrop's backward passes.
        embed: the token embeddings of the prompt.
        alphas: how far they move towards the source prompt's, for a run each whose gradients are taken.
        rules: the backward rule of all passes.
        checkpoint: whether blocks are computed again instead of kept.
    """

    keys: tuple[Key, ...]
    drops: tuple[Drop, ...] = ()
    embed: str = SITES["embed"].template
    alphas: tuple[float, ...] = ()
    rules: Rules | None = None
    checkpoint: bool = False

    @classmethod
    def of(cls, names: Sequence[str], *, fixes: Sequence[bool], **more: Any) -> Plan:
        """A plan for all nodes at `names`, without the QK fix, with it, or both."""
        keys = [(name, fix and parse(name)[0] in FIXED) for fix in fixes for name in names]
        return cls(keys=tuple(dict.fromkeys(keys)), **more)

    @property
    def linear(self) -> frozenset[str]:
        """Sites whose gradient is multiplied with the change there."""
        return frozenset(name for name, fixed in self.keys if not fixed)

    @property
    def fixed(self) -> dict[int, list[str]]:
        """By layer, the queries and keys that go through the softmax."""
        found: dict[int, list[str]] = {}
        for name, fixed in self.keys:
            layer = parse(name)[1]
            if fixed and layer is not None:
                found.setdefault(layer, []).append(name)
        return found

    @property
    def source(self) -> tuple[str, ...]:
        """Sites that are needed of the source run."""
        names = dict.fromkeys(name for name, _ in self.keys)
        return tuple(dict.fromkeys((*names, self.embed) if self.alphas else names))

    @property
    def record(self) -> tuple[str, ...]:
        """Sites that are needed of the base run besides those with a gradient."""
        return tuple(full_name(short, layer) for layer in self.fixed for short in READ)

    @property
    def gradients(self) -> tuple[str, ...]:
        """Sites at which backward passes are watched."""
        return tuple(self.linear | {full_name("z", layer) for layer in self.fixed})

    @property
    def restarts(self) -> tuple[str, ...]:
        """Sites at which backward passes begin, or whose gradient they begin with."""
        sites = (x for drop in self.drops for pair in (*drop.start.items(), *drop.beside.items()) for x in pair)
        return tuple(dict.fromkeys(sites))

    @property
    def passes(self) -> tuple[float, float]:
        """Forward and backward passes of a pair, without the source run's; a pass over some blocks counts in part."""
        layers = max((drop.layer for drop in self.drops), default=0) + 1
        runs = 1.0 + len(self.alphas)
        backward = runs + sum(drop.blocks for drop in self.drops) / layers
        return runs + (backward if self.checkpoint else 0.0), backward


def plan_of(
    model: HookedModel,
    names: Sequence[str],
    variant: str,
    unit: str,
    rules: Rules | None = None,
    *,
    checkpoint: bool = False,
) -> Plan:
    """The passes of one variant.

    Raises:
        UnknownNameError, SettingError, UnsupportedFeatureError: as `variant_of`.
    """
    chosen, drops, _ = variant_of(model.info, model.sites(), variant, unit)
    beside = {site for drop in drops for site in drop.beside}  # the passes start below
    lost = [name for name in names if host_of(parse(name)[0]) != parse(name)[0]]
    lost = [name for name in lost if full_name(host_of(parse(name)[0]), parse(name)[1]) in beside]
    if lost:
        raise UnsupportedFeatureError(
            f"variant {variant!r} at {lost[0]}",
            "GradDrop's passes over whole blocks go past a dictionary at resid_mid",
            "use variant='atp', or unit='sublayer'",
        )
    embed = SITES["encoder_embed" if model.info.n_encoder_layers else "embed"].template
    more = {"embed": embed, "alphas": chosen.alphas, "rules": rules, "checkpoint": checkpoint}
    return Plan.of(names, fixes=(chosen.fix,), drops=drops, **more)


class Effects:
    """Effects by pair, place and feature.

    Attributes:
        full: along the gradient of the base run, with its sign.
        dropped: mean magnitude over GradDrop's passes.
        moved: by alpha, along the gradients of the run that moved, with its sign.
        differs: by site, whether the node differs between the two prompts.
        metric: of the base run, by pair.
        again: forward passes of a pair that the backend needed for GradDrop, beyond those of the plan.
    """

    def __init__(self, plan: Plan, model: HookedModel, batch: Batch, places: Places, source: dict[str, Tensor]) -> None:
        self.plan, self.model, self.batch, self.places, self.source = plan, model, batch, places, source
        self.once = not plan.drops and not plan.alphas
        self.full: dict[Key, Tensor] = {}
        self.dropped: dict[Key, Tensor] = {}
        self.moved: dict[float, dict[Key, Tensor]] = {}
        self.differs: dict[str, Tensor] = {}
        self.metric: Tensor
        self.again = 0.0
        self.embedding = source[plan.embed] if plan.alphas else None
        self._linear, self._fixed, self._wanted = plan.linear, plan.fixed, {name for name, _ in plan.keys}
        self._changes: dict[str, Tensor] = {}
        self._fixes: dict[int, Fix] = {}
        merged = not places.identity and bool((places.where.sum(-1) > 1).any())
        self._columns: Bool[Tensor, "pair place column"] | None = places.where if merged else None

    def scores(self, name: str, variant: Variant) -> tuple[Tensor, Tensor]:
        """The score of each pair and node of a site in one variant, and the effect with its sign."""
        key = (name, variant.fix and parse(name)[0] in FIXED)
        full = self.full[key]
        parts: dict[str, list[Tensor]] = {
            "full": [full.abs()],
            "dropped": [self.dropped[key]] if key in self.dropped else [],
            "moved": [x[key].abs() for x in self.moved.values()],
            "spread": [full.abs() + (x[key] - full).abs() / 2 for x in self.moved.values()],
        }
        found = [x for part in variant.parts for x in parts[part]]
        return torch.stack(found).amax(0) if len(found) > 1 else found[0], full

    # -- passes

    def run(self, metric: Metric) -> Effects:
        """All passes."""
        plan = self.plan
        self._main(metric)
        for alpha in plan.alphas:
            moved: dict[Key, Tensor] = {}
            tape = self._tape(metric, plan.gradients, edits=[Edit(plan.embed, self._towards(alpha))])
            tape.pull_back(self._visitor(moved.__setitem__), last=True)
            self.moved[alpha] = {key: moved.get(key, torch.zeros_like(x)) for key, x in self.full.items()}
        self.source, self._changes, self._fixes = {}, {}, {}
        return self

    def _main(self, metric: Metric) -> None:
        """The base run, its full backward pass and GradDrop's."""
        plan, kept = self.plan, dict[str, Tensor]()
        starts = {site for drop in plan.drops for site in (*drop.start.values(), *drop.beside.values())}
        tape = self._tape(metric, {*plan.gradients, *plan.restarts}, record=plan.record)
        self.metric, self._base = tape.metric, dict(tape.activations)  # type: ignore[assignment]
        visit = self._visitor(self.full.__setitem__)

        def keeping(name: str, activation: Tensor, gradient: Tensor) -> None:
            if name in starts:
                kept[name] = gradient
            visit(name, activation, gradient)

        tape.pull_back(keeping, last=not plan.drops)
        self._settle()
        if plan.drops:
            self._drop(tape, kept)

    def _drop(self, tape: Tape, kept: Mapping[str, Tensor]) -> None:
        total = {key: torch.zeros_like(effect) for key, effect in self.full.items()}

        def add(key: Key, effect: Tensor) -> None:
            total[key] += effect.abs_()

        visit = self._visitor(add)
        for drop in self.plan.drops:
            for site, above in drop.beside.items():
                if site in self._wanted and above in kept:
                    visit(site, kept[above], kept[above])
            at = {site: kept[above] for site, above in drop.start.items() if above in kept}
            if at:
                tape.pull_back(visit, at, last=drop is self.plan.drops[-1])
                self.again += tape.repeats
        for key, effect in self.full.items():
            reaches = [drop.reach(key[0]) for drop in self.plan.drops]
            live = len(reaches) - reaches.count("none")
            self.dropped[key] = total[key].add_(effect.abs(), alpha=reaches.count("full")).div_(live)

    def _tape(self, metric: Metric, gradients: Iterable[str], **more: Any) -> Tape:
        more |= {"rules": self.plan.rules, "checkpoint": self.plan.checkpoint}
        return self.model.tape(self.batch, metric=metric, gradients=tuple(gradients), **more)

    def _towards(self, alpha: float) -> Callable[[Tensor, object], Tensor]:
        assert self.embedding is not None
        target = self.embedding
        return lambda x, _place: x + alpha * (target.to(x.dtype) - x)

    # -- effects at sites

    def _visitor(self, put: Callable[[Key, Tensor], None]) -> Visit:
        def visit(name: str, activation: Tensor, gradient: Tensor) -> None:
            short, layer = parse(name)
            if short == "z" and layer in self._fixed:
                self._through_softmax(layer, gradient, put)
            if name in self._linear:
                change = self._change(name, activation)
                product = change * gradient.to(change.dtype)
                put((name, False), self.places.at(name).gather(per_node(name, product)))

        return visit

    def _change(self, name: str, activation: Tensor) -> Tensor:
        """Source minus base in float32 or wider; kept if another pass will ask again."""
        if name in self._changes:
            return self._changes[name]
        wide = torch.promote_types(activation.dtype, torch.float32)
        change = self.source.pop(name).to(wide) - activation.to(wide)
        self._note(name, change)
        if not self.once:
            self._changes[name] = change
        return change

    def _note(self, name: str, change: Tensor) -> None:
        self.differs[name] = self.places.at(name).gather(per_node(name, (change != 0).to(change.dtype))) != 0

    def _through_softmax(self, layer: int, gradient: Tensor, put: Callable[[Key, Tensor], None]) -> None:
        fix = self._fixes.get(layer) or self._fix(layer)
        for name in self._fixed[layer]:
            queries = parse(name)[0] == "rot_q"
            effect = fix.of_queries(gradient) if queries else fix.of_keys(gradient)
            put((name, True), effect if not queries and self._columns is not None else self.places.gather(effect))

    def _fix(self, layer: int) -> Fix:
        base = {short: self._base.pop(full_name(short, layer)) for short in READ}
        moved = {}
        for name in self._fixed[layer]:
            short = parse(name)[0]
            here = base[short].to(torch.promote_types(base[short].dtype, torch.float32))
            moved[short] = self.source[name].to(here.dtype)
            self._note(name, moved[short] - here)
            if name not in self._linear:
                del self.source[name]
        real = self.batch.mask if self.batch.padded else None
        fix = fix_of(self.model.attention(layer), base, moved, real=real, places=self._columns)
        if not self.once:
            self._fixes[layer] = fix
        return fix

    def _settle(self) -> None:
        """Sites that no path connects with the metric were not visited: their effect is zero."""
        for name, fixed in self.plan.keys:
            if (name, fixed) in self.full:
                continue
            nothing = torch.zeros_like(
                self.source[name], dtype=torch.promote_types(self.source[name].dtype, torch.float32)
            )
            self.full[name, fixed] = self.places.at(name).gather(per_node(name, nothing))
            self.differs.setdefault(name, self.full[name, fixed] != 0)
