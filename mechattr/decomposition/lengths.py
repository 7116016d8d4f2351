"""How much of each token a block's attention mixes into each other: matrices [query, key] from patterns and norms.

Lengths of sum_h a_h u_h come from Gram matrices, ||sum_h a_h u_h||^2 = sum_hg a_h a_g (u_h . u_g), so that no vector is
formed for a pair of positions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from mechattr.artifact import Cache
from mechattr.decomposition.parts import AttentionParts, attention_parts, attention_sites, mlp_sites
from mechattr.models.base import HookedModel
from mechattr.sites import full_name

Matrix = Float[Tensor, "batch query key"]

_CHUNK = 2**24  # numbers of head vectors that are formed at once


def half_attention(_: HookedModel, activations: Cache, layer: int) -> Matrix:
    """A/2 + I/2, with A the mean over heads."""
    pattern = _wide(activations[full_name("pattern", layer)].values).mean(1)
    return pattern / 2 + torch.eye(pattern.shape[-1], dtype=pattern.dtype, device=pattern.device) / 2


def head_norms(model: HookedModel, activations: Cache, layer: int) -> Matrix:
    """sum_h ||A_h u_h||."""
    parts = written(model, activations, layer)
    each = [parts.values(keys).norm(dim=-1) for keys in _chunks(parts)]
    return einsum(parts.pattern.abs(), torch.cat(each, 1), "b h q k, b k h -> b q k")


def sum_norms(model: HookedModel, activations: Cache, layer: int) -> Matrix:
    """||sum_h A_h u_h||."""
    return norms(written(model, activations, layer))


def stream_norms(model: HookedModel, activations: Cache, layer: int) -> Matrix:
    """||sum_h A_h u_h + [i = j] x_i||, before a norm behind attention."""
    parts = written(model, activations, layer)
    return norms(parts, parts.residual)


def normed_norms(model: HookedModel, activations: Cache, layer: int) -> Matrix:
    """The same through the norms behind attention, their scales held."""
    parts = attention_parts(model, activations, layer)
    return norms(parts, parts.residual)


def globenc(model: HookedModel, activations: Cache, layer: int) -> Matrix:
    """The same through the second norm of a post-norm block too, with its scale as it is with the MLP; without one,
    the parts of the stream as they are."""
    parts = attention_parts(model, activations, layer)
    behind = model.norm(f"blocks.{layer}.ln2_post") if model.info.post_norm else None
    if behind is None:
        return norms(parts, parts.residual)
    scale = behind.scale(parts.whole + _wide(activations[full_name("mlp_out", layer)].values)).to(parts.whole.dtype)
    weight = behind.weight.to(parts.w_o.dtype)
    w_o, residual = (behind.centre(x).to(weight.dtype) * weight for x in (parts.w_o, parts.residual))
    return norms(replace(parts, w_o=w_o), residual) / scale[..., None]


MATRICES: dict[str, Callable[[HookedModel, Cache, int], Matrix]] = {
    "rollout": half_attention,
    "heads": head_norms,
    "sum": sum_norms,
    "residual": stream_norms,
    "norm": normed_norms,
    "globenc": globenc,
}


def sites_of(model: HookedModel, kind: str) -> list[str]:
    """What a kind of matrix needs recorded, in the order of the forward pass."""
    wanted: set[str] = set()
    for layer in range(model.info.n_layers):
        wanted |= {full_name("pattern", layer)} if kind == "rollout" else set(attention_sites(model, layer))
        if kind == "globenc" and model.info.post_norm:
            wanted |= set(mlp_sites(model, layer))
    return [site for site in model.sites() if site in wanted]


def written(model: HookedModel, activations: Cache, layer: int) -> AttentionParts:
    """The parts of what attention writes and of the stream that passes by, before any norm behind them."""
    p = f"blocks.{layer}.attn."
    pattern, v, x, out = (
        _wide(activations[full_name(short, layer)].values) for short in ("pattern", "v", "resid_pre", "attn_out")
    )
    return AttentionParts(
        pattern, v, model.weight(p + "W_O").to(v), x, model.weight(p + "b_O").to(v).expand_as(x), x + out
    )


def norms(parts: AttentionParts, residual: Float[Tensor, "batch pos d_model"] | None = None) -> Matrix:
    """||sum_h A_h u_h||, with what passes by added where query and key are one position."""
    columns = [partial(_columns, parts, residual)(keys) for keys in _chunks(parts)]
    return torch.cat(columns, -1)


def _columns(parts: AttentionParts, residual: Tensor | None, keys: slice) -> Float[Tensor, "batch query part"]:
    u, pattern = parts.values(keys), parts.pattern[..., keys]
    gram = einsum(u, u, "b k h d, b k g d -> b k h g")
    squares = (einsum(pattern, gram, "b h q k, b k h g -> b g q k") * pattern).sum(1)
    found = squares.clamp(min=0).sqrt()
    if residual is not None:
        own = parts.pattern.diagonal(dim1=-2, dim2=-1)[..., keys]
        both = (einsum(own, u, "b h k, b k h d -> b k d") + residual[:, keys]).norm(dim=-1)
        places = torch.arange(parts.pattern.shape[-1], device=u.device)[keys]
        found[:, places, torch.arange(len(places), device=u.device)] = both
    return found


def _chunks(parts: AttentionParts) -> list[slice]:
    heads, _, width = parts.w_o.shape
    step = max(1, _CHUNK // (len(parts.v) * heads * width))
    return [slice(i, i + step) for i in range(0, parts.v.shape[1], step)]


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
