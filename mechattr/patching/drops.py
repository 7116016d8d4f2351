"""GradDrop: backward passes in which one write to the residual stream is held fixed and the skip path is kept.

Paths of opposite sign can cancel in one gradient; with the write of one block held, paths through that block are gone
and the others show. Nothing above the held write changes, so a drop does not start at the metric: it starts below
the write, from the gradient that the full pass left above it. All drops of a network with L blocks together walk
through L (L - 1) / 2 blocks instead of L^2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from mechattr.errors import UnknownNameError, nearest
from mechattr.models.base import ModelInfo
from mechattr.sites import full_name, host_of, parse

UNITS = ("block", "sublayer")
LN1 = frozenset({"ln1_scale", "ln1"})
ATTENTION = LN1 | {"q", "k", "v", "rot_q", "rot_k", "attn_scores", "pattern", "z", "result", "attn_out"}
MLP = frozenset({"ln2_scale", "ln2", "mlp_pre", "mlp_pre_linear", "mlp_post", "router_logits", "expert_out", "mlp_out"})
STREAM = frozenset({"resid_pre", "resid_mid"})

Reach = Literal["again", "full", "none"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Drop:
    """One held write.

    Attributes:
        layer: the block that it belongs to.
        start: where the backward pass begins, and the site whose gradient in the full pass it begins with.
        beside: sites of the skip path beside the write, which the pass does not walk through, likewise.
        held: short names in this block from which nothing comes through.
        again: short names in this block that the pass visits again, or that lie beside the write.
        blocks: number of blocks that the pass walks through, whole or in part.
    """

    layer: int
    start: Mapping[str, str]
    beside: Mapping[str, str]
    held: frozenset[str]
    again: frozenset[str]
    blocks: int

    def reach(self, name: str) -> Reach:
        """What a site sees in this drop: another gradient, the full one, or none."""
        short, layer = parse(name)
        short = host_of(short)  # a dictionary acts just before its host
        if layer is None:
            return "again" if short in ("embed", "pos_embed") else "full"
        if layer != self.layer:
            return "full" if layer > self.layer else "again"
        return "none" if short in self.held else "again" if short in self.again else "full"


def drops_of(info: ModelInfo, sites: Sequence[str], unit: str) -> tuple[Drop, ...]:
    """The drops of a network, from the top down.

    Args:
        info: the model.
        sites: the full site names that it has.
        unit: `"block"` holds attention and MLP of a block together, `"sublayer"` one of them at a time.

    Raises:
        UnknownNameError: another unit.
    """
    if unit not in UNITS:
        raise UnknownNameError(f"unit {unit!r}", "no such unit of GradDrop", nearest(unit, UNITS))
    make = _blocks if unit == "block" else _sublayers
    return tuple(drop for layer in reversed(range(info.n_layers)) for drop in make(info, frozenset(sites), layer))


def _above(info: ModelInfo, layer: int) -> str:
    return full_name("resid_post", layer) if layer == info.n_layers - 1 else full_name("resid_pre", layer + 1)


def _blocks(info: ModelInfo, sites: frozenset[str], layer: int) -> list[Drop]:
    above, middle = _above(info, layer), full_name("resid_mid", layer)
    return [
        Drop(
            layer=layer,
            start={full_name("resid_pre", layer): above},
            beside={middle: above} if middle in sites else {},
            held=ATTENTION | MLP,
            again=STREAM,
            blocks=layer,
        )
    ]


def _sublayers(info: ModelInfo, sites: frozenset[str], layer: int) -> list[Drop]:
    above, before = _above(info, layer), full_name("resid_pre", layer)
    attention, mlp, middle = (full_name(short, layer) for short in ("attn_out", "mlp_out", "resid_mid"))
    only_attention = mlp not in sites
    if not info.parallel:
        lower = Drop(
            layer=layer, start={before: middle}, beside={}, held=ATTENTION, again=frozenset({"resid_pre"}), blocks=layer
        )
        upper = Drop(
            layer=layer, start={middle: above}, beside={}, held=MLP, again=ATTENTION | STREAM, blocks=layer + 1
        )
        return [lower] if only_attention else [upper, lower]
    shared = frozenset() if full_name("ln2", layer) in sites else LN1  # one norm that both read
    return [
        Drop(
            layer=layer,
            start={before: above, kept: above},
            beside={},
            held=held - shared,
            again=again | shared | {"resid_pre"},
            blocks=layer + 1,
        )
        for held, kept, again in ((ATTENTION, mlp, MLP), (MLP, attention, ATTENTION))
    ]
