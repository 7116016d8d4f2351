"""Variants of attribution patching: of which parts of an estimate the largest is the score."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from mechattr.errors import SettingError, UnknownNameError, UnsupportedFeatureError, nearest
from mechattr.models.base import ModelInfo
from mechattr.patching.drops import UNITS, Drop, drops_of

Part = Literal["full", "dropped", "moved", "spread"]
ALPHA = 0.25
DEFAULT_VARIANT = "hedged"  # ranks best against exact patching, see benchmarks/results/localisation.md


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """How a score is made.

    Attributes:
        name: what users call it.
        fix: whether queries and keys go through the softmax (`mechattr.patching.qk`).
        parts: the score of a pair is the largest of these. `full`: the magnitude of the estimate; `dropped`: its mean
            magnitude over GradDrop's backward passes; `moved`: its magnitude with the gradients of a run whose
            token embeddings moved a part of the way to the source prompt's; `spread`: the magnitude plus half of how
            much the estimate differs between these two runs.
    """

    name: str
    fix: bool
    parts: tuple[Part, ...]

    @property
    def alphas(self) -> tuple[float, ...]:
        """How far the token embeddings of further runs move."""
        return (ALPHA,) if {"moved", "spread"} & set(self.parts) else ()


VARIANTS = {
    variant.name: variant
    for variant in (
        Variant(name="atp", fix=False, parts=("full",)),
        Variant(name="qk", fix=True, parts=("full",)),
        Variant(name="graddrop", fix=False, parts=("dropped",)),
        Variant(name="star", fix=True, parts=("dropped",)),
        Variant(name="max", fix=True, parts=("full", "dropped")),
        Variant(name="two_point", fix=True, parts=("full", "moved")),
        Variant(name="hedged", fix=True, parts=("spread", "dropped")),
    )
}


def variant_of(
    info: ModelInfo, sites: tuple[str, ...], name: str, unit: str
) -> tuple[Variant, tuple[Drop, ...], str | None]:
    """A variant on a model, its drops, and why GradDrop was left out of it, if it was.

    Raises:
        UnknownNameError: no such variant or unit.
        SettingError: `unit` for a variant that drops nothing, or GradDrop alone on a network with a single write.
        UnsupportedFeatureError: GradDrop alone on a post-norm encoder or an encoder-decoder model.
    """
    if name not in VARIANTS:
        raise UnknownNameError(f"variant {name!r}", "no such variant", nearest(name, VARIANTS))
    variant = VARIANTS[name]
    drops = drops_of(info, sites, unit)
    if "dropped" not in variant.parts:
        if unit != UNITS[0]:
            fix = "leave unit out, or choose graddrop, star, max or hedged"
            raise SettingError(f"unit={unit!r} with variant={name!r}", "this variant drops nothing", fix)
        return variant, (), None
    fix = "choose variant='qk', 'two_point' or 'max', which leaves GradDrop out here"
    if info.post_norm:
        found = "norms act on the residual stream itself, so a block has no skip path past them"
        if variant.parts == ("dropped",):
            raise UnsupportedFeatureError(f"variant={name!r}", found, fix)
        left_out = "undefined where norms act on the residual stream"
    elif info.n_encoder_layers:
        found = "an encoder-decoder model, whose blocks write a third time, in cross-attention"
        if variant.parts == ("dropped",):
            raise UnsupportedFeatureError(f"variant={name!r}", found, fix)
        left_out = "not defined for encoder-decoder models"
    elif len(drops) < 2:
        found = "a network with a single write: with that held, nothing but the skip path is left"
        if variant.parts == ("dropped",):
            raise SettingError(f"variant={name!r} with unit={unit!r}", found, fix)
        left_out = "undefined on a network with a single write"
    else:
        return variant, drops, None
    return replace(variant, parts=tuple(part for part in variant.parts if part != "dropped")), (), left_out
