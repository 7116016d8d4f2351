"""Sites: the named places of a forward pass, and nodes, the things that are scored at them.

Names and axis order are those of TransformerLens. A short name (`"z"`) stands for the site in every layer, a full name
(`"blocks.3.attn.hook_z"`) for one place.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from mechattr.errors import UnknownSiteError, nearest

RESID = ("batch", "pos", "d_model")
HEADS = ("batch", "pos", "head", "d_head")
KV_HEADS = ("batch", "pos", "kv_head", "d_head")
SCORES = ("batch", "head", "query", "key")
NEURONS = ("batch", "pos", "neuron")
SCALE = ("batch", "pos")
EXPERTS = ("batch", "pos", "expert")
SOURCE_KV_HEADS = ("batch", "source", "kv_head", "d_head")
SOURCE_SCORES = ("batch", "head", "query", "source")
LATENTS = ("batch", "pos", "latent")

# Where a dictionary of the user can be put: its latents and its error are then sites, too.
HOSTS = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")


@dataclass(frozen=True, slots=True)
class SiteSpec:
    """One row of the site table: short name, full-name template (`{l}` is the layer) and axes."""

    short: str
    template: str
    axes: tuple[str, ...]

    @property
    def layered(self) -> bool:
        """Whether the site exists once a layer."""
        return "{l}" in self.template


_BLOCKS: dict[str, SiteSpec] = {
    spec.short: spec
    for spec in (
        SiteSpec("embed", "hook_embed", RESID),
        SiteSpec("pos_embed", "hook_pos_embed", RESID),
        SiteSpec("resid_pre", "blocks.{l}.hook_resid_pre", RESID),
        SiteSpec("ln1_scale", "blocks.{l}.ln1.hook_scale", SCALE),
        SiteSpec("ln1", "blocks.{l}.ln1.hook_out", RESID),
        SiteSpec("q", "blocks.{l}.attn.hook_q", HEADS),
        SiteSpec("k", "blocks.{l}.attn.hook_k", KV_HEADS),
        SiteSpec("v", "blocks.{l}.attn.hook_v", KV_HEADS),
        SiteSpec("rot_q", "blocks.{l}.attn.hook_rot_q", HEADS),
        SiteSpec("rot_k", "blocks.{l}.attn.hook_rot_k", KV_HEADS),
        SiteSpec("attn_scores", "blocks.{l}.attn.hook_attn_scores", SCORES),
        SiteSpec("pattern", "blocks.{l}.attn.hook_pattern", SCORES),
        SiteSpec("z", "blocks.{l}.attn.hook_z", HEADS),
        SiteSpec("result", "blocks.{l}.attn.hook_result", ("batch", "pos", "head", "d_model")),
        SiteSpec("attn_out", "blocks.{l}.hook_attn_out", RESID),
        SiteSpec("resid_mid", "blocks.{l}.hook_resid_mid", RESID),
        SiteSpec("cross_q", "blocks.{l}.cross_attn.hook_q", HEADS),
        SiteSpec("cross_k", "blocks.{l}.cross_attn.hook_k", SOURCE_KV_HEADS),
        SiteSpec("cross_v", "blocks.{l}.cross_attn.hook_v", SOURCE_KV_HEADS),
        SiteSpec("cross_attn_scores", "blocks.{l}.cross_attn.hook_attn_scores", SOURCE_SCORES),
        SiteSpec("cross_pattern", "blocks.{l}.cross_attn.hook_pattern", SOURCE_SCORES),
        SiteSpec("cross_z", "blocks.{l}.cross_attn.hook_z", HEADS),
        SiteSpec("cross_result", "blocks.{l}.cross_attn.hook_result", ("batch", "pos", "head", "d_model")),
        SiteSpec("cross_attn_out", "blocks.{l}.hook_cross_attn_out", RESID),
        SiteSpec("resid_mid_cross", "blocks.{l}.hook_resid_mid_cross", RESID),
        SiteSpec("ln2_scale", "blocks.{l}.ln2.hook_scale", SCALE),
        SiteSpec("ln2", "blocks.{l}.ln2.hook_out", RESID),
        SiteSpec("mlp_pre", "blocks.{l}.mlp.hook_pre", NEURONS),
        SiteSpec("mlp_pre_linear", "blocks.{l}.mlp.hook_pre_linear", NEURONS),
        SiteSpec("mlp_post", "blocks.{l}.mlp.hook_post", NEURONS),
        SiteSpec("router_logits", "blocks.{l}.mlp.hook_router_logits", EXPERTS),
        SiteSpec("expert_out", "blocks.{l}.mlp.hook_expert_out", (*EXPERTS, "d_model")),
        SiteSpec("mlp_out", "blocks.{l}.hook_mlp_out", RESID),
        SiteSpec("resid_post", "blocks.{l}.hook_resid_post", RESID),
        SiteSpec("ln_final_scale", "ln_final.hook_scale", SCALE),
        SiteSpec("ln_final", "ln_final.hook_out", RESID),
    )
}
_DICTIONARIES = [
    SiteSpec(f"{host}_{part}", f"blocks.{{l}}.hook_{host}.hook_sae_{hook}", axes)
    for part, hook, axes in (("latents", "acts_post", LATENTS), ("error", "error", RESID))
    for host in HOSTS
]
OF_DICTIONARIES = frozenset(spec.short for spec in _DICTIONARIES)

_OF_SOURCE = {"pos": "source", "query": "source_query", "key": "source"}


def _of_encoder(spec: SiteSpec) -> SiteSpec:
    """The same site of the encoder of an encoder-decoder model, whose positions are those of the source."""
    template = spec.template.replace("blocks.", "encoder.") if spec.layered else f"encoder.{spec.template}"
    return SiteSpec(f"encoder_{spec.short}", template, tuple(_OF_SOURCE.get(axis, axis) for axis in spec.axes))


# An encoder has no cross-attention, and none of those that are supported has rotary embeddings or experts.
_NOT_IN_ENCODERS = ("cross", "rot_", "router", "expert")
_ENCODER = [_of_encoder(spec) for spec in _BLOCKS.values() if not any(part in spec.short for part in _NOT_IN_ENCODERS)]

SITES: dict[str, SiteSpec] = {**_BLOCKS, **{spec.short: spec for spec in (*_ENCODER, *_DICTIONARIES)}}

_FULL = re.compile(r"^(?P<stack>blocks|encoder)\.(?P<layer>\d+)\.(?P<rest>.+)$")
_BY_TEMPLATE = {spec.template: spec for spec in SITES.values()}


def position_axis(axes: Sequence[str]) -> int:
    """The index of the axis that positions select: the queries of scores and patterns, else the second axis."""
    return next((axes.index(axis) for axis in ("query", "source_query") if axis in axes), 1)


def reads_source(axes: Sequence[str]) -> bool:
    """Whether the positions of a site count the tokens of the source, as in an encoder."""
    return axes[position_axis(axes)] in ("source", "source_query")


def of_rows(axes: Sequence[str]) -> bool:
    """Whether a site has a row for each query and head, as scores and patterns of attention."""
    return position_axis(axes) == 2


def of_source(short: str) -> bool:
    """Whether a site is there because of a source: cross-attention, or a part of an encoder beside a decoder."""
    return short.startswith("encoder_") or "cross" in short


def host_of(short: str) -> str:
    """The host of a dictionary's latents or error; any other site itself."""
    return short.rpartition("_")[0] if short in OF_DICTIONARIES else short


def full_name(short: str, layer: int | None = None) -> str:
    """`("z", 3)` -> `"blocks.3.attn.hook_z"`.

    Raises:
        UnknownSiteError: no such short name, or a layer is missing or given where there is none.
    """
    spec = site_spec(short)
    if spec.layered == (layer is None):
        raise UnknownSiteError(
            f"site {short!r} with layer {layer}",
            f"{short!r} exists {'once a layer' if spec.layered else 'once in the model'}",
            "give a layer" if spec.layered else "leave the layer out",
        )
    return spec.template.format(l=layer)


@lru_cache(maxsize=4096)
def parse(name: str) -> tuple[str, int | None]:
    """`"blocks.3.attn.hook_z"` -> `("z", 3)`; the inverse of `full_name`.

    Raises:
        UnknownSiteError: not a full site name.
    """
    match = _FULL.match(name)
    spec = _BY_TEMPLATE.get(f"{match['stack']}.{{l}}.{match['rest']}" if match else name)
    if spec is None or spec.layered == (match is None):
        examples = [s.template.format(l=0) for s in SITES.values()]
        raise UnknownSiteError(f"site {name!r}", "no such full site name", nearest(name, examples))
    return spec.short, None if match is None else int(match["layer"])


def site_spec(name: str) -> SiteSpec:
    """The table row of a short or a full site name."""
    if name in SITES:
        return SITES[name]
    if "hook_" in name:
        return SITES[parse(name)[0]]
    raise UnknownSiteError(f"site {name!r}", "no such site", nearest(name, SITES))


def expand(names: str | Iterable[str], available: Sequence[str], layers: Iterable[int] | None = None) -> list[str]:
    """Short and full names -> full names that exist, in the order of the forward pass (that of `available`).

    Args:
        names: short or full names.
        available: the full names that a model has, `HookedModel.sites()`.
        layers: restricts short names to these layers.

    Raises:
        UnknownSiteError: a name that is in no table, or that this model does not have.
    """
    wanted: set[str] = set()
    chosen = None if layers is None else set(layers)
    for name in [names] if isinstance(names, str) else names:
        spec = site_spec(name)
        hits = [full for full in available if parse(full)[0] == spec.short] if name in SITES else [name]
        if name in SITES and chosen is not None and spec.layered:
            hits = [full for full in hits if parse(full)[1] in chosen]
        missing = [full for full in hits if full not in set(available)]
        if missing or not hits:
            shorts = {parse(full)[0] for full in available}
            fix = nearest(name, available if "hook_" in name else shorts)
            if spec.axes[-1] == "neuron" and "router_logits" in shorts:
                fix = "its MLPs are mixtures of experts: use mlp_out, expert_out or router_logits"
            layer_note = "" if chosen is None else f" in layers {sorted(chosen)}"
            raise UnknownSiteError(
                f"site {name!r}{layer_note}",
                f"this model has no such site; it has {', '.join(s for s in SITES if s in shorts)}"
                + (f" in layers 0 to {max(parse(f)[1] or 0 for f in available)}" if available else ""),
                fix,
            )
        wanted.update(hits)
    return [full for full in available if full in wanted]


@dataclass(frozen=True, slots=True, order=True)
class Node:
    """One scored component: a site, a layer, and where they apply a position, a head (kv head for k and v) or a neuron
    (a latent at the latents of a dictionary, an expert at `expert_out` and `router_logits`).

    `pos` counts the real tokens of a prompt from 0, those of the source at sites of an encoder, `cross_k` and
    `cross_v`; it is a span's name under named positions and `None` where all positions are merged.
    """

    site: str
    layer: int | None
    pos: int | str | None = None
    head: int | None = None
    neuron: int | None = None

    @property
    def label(self) -> str:
        """The name as figures show it: `L3H5 z`, `MLP 2`, `L2N17`, `L1E3`, `L1E3 router_logits`, `L1 resid_pre`,
        `L2N17 resid_post_latents`."""
        if self.layer is None:
            return self.site
        if self.head is not None:
            return f"L{self.layer}H{self.head} {self.site}"
        if self.neuron is not None and "expert" in site_spec(self.site).axes:
            return f"L{self.layer}E{self.neuron}" + (" router_logits" if self.site == "router_logits" else "")
        if self.neuron is not None:
            known = self.site.startswith("encoder_") or self.site in OF_DICTIONARIES
            return f"L{self.layer}N{self.neuron}" + (f" {self.site}" if known else "")
        return f"MLP {self.layer}" if self.site == "mlp_out" else f"L{self.layer} {self.site}"

    def __str__(self) -> str:
        return self.label if self.pos is None else f"{self.label} @{self.pos}"
