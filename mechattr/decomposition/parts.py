"""Blocks as sums of parts, with attention patterns and norm scales held fixed.

What attention leaves at position i is y_i = sum_j T_i(x_j) + bias_i with T_i(x_j) = sum_h A_ij^h u_j^h + [i = j] r_i:
head h moves u_j^h = v_j^h W_O^h from j to i, and r_i is the stream that passes by. Norms on the way scale all of it by
one number a position, so they are folded into A, W_O and r: norms on what attention writes (Gemma-2), and norms on the
stream after the addition (BERT), where y is the norm's output.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from mechattr.artifact import Cache
from mechattr.models.base import HookedModel
from mechattr.models.norms import Norm
from mechattr.sites import full_name


@dataclass(frozen=True, eq=False, slots=True)
class AttentionParts:
    """The parts of the stream after the attention of one block: y = sum_jh A u + residual + bias.

    Attributes:
        pattern: A; with a norm behind it divided by that norm's scale at the query.
        v: values with their bias, by kv head.
        w_o: output projections; centred and weighted where a norm is behind them.
        residual: r, the stream that passes by.
        bias: what belongs to no token: b_O and norm biases.
        whole: y as the model computed it.
    """

    pattern: Float[Tensor, "batch head query key"]
    v: Float[Tensor, "batch key kv_head d_head"]
    w_o: Float[Tensor, "head d_head d_model"]
    residual: Float[Tensor, "batch pos d_model"]
    bias: Float[Tensor, "batch pos d_model"]
    whole: Float[Tensor, "batch pos d_model"]

    def values(self, keys: slice = slice(None)) -> Float[Tensor, "batch key head d_model"]:
        """u of some source positions."""
        v = self.v[:, keys].repeat_interleave(len(self.w_o) // self.v.shape[2], 2)
        return einsum(v, self.w_o, "b k h e, h e d -> b k h d")

    def along(self, direction: Float[Tensor, "batch d_model"]) -> Float[Tensor, "batch key head"]:
        """u . direction, without forming u."""
        g = einsum(self.w_o, direction.to(self.w_o.dtype), "h e d, b d -> b h e")
        v = self.v.repeat_interleave(len(self.w_o) // self.v.shape[2], 2)
        return einsum(v, g, "b k h e, b h e -> b k h")


@dataclass(frozen=True, eq=False, slots=True)
class MlpParts:
    """The parts of the stream after the MLP of one block: y = written + residual + bias.

    Attributes:
        written: what the MLP adds; through the frozen norm of the stream where there is one.
        residual: the stream after attention, likewise.
        bias: of that norm.
        whole: y as the model computed it.
    """

    written: Float[Tensor, "batch pos d_model"]
    residual: Float[Tensor, "batch pos d_model"]
    bias: Float[Tensor, "batch pos d_model"]
    whole: Float[Tensor, "batch pos d_model"]


def attention_sites(model: HookedModel, layer: int) -> tuple[str, ...]:
    """What `attention_parts` needs recorded."""
    shorts = ["pattern", "v", "resid_pre", "attn_out", *(["ln1"] if model.info.post_norm else [])]
    shorts += ["z"] if model.info.write_norm else []
    return tuple(full_name(short, layer) for short in shorts)


def mlp_sites(model: HookedModel, layer: int) -> tuple[str, ...]:
    """What `mlp_parts` needs recorded."""
    if model.info.post_norm:
        return tuple(full_name(short, layer) for short in ("ln1", "mlp_out", "resid_post"))
    return tuple(full_name(short, layer) for short in ("resid_pre", "attn_out", "mlp_out", "resid_post"))


def attention_parts(model: HookedModel, activations: Cache, layer: int) -> AttentionParts:
    """The parts of a block's attention, in float32 or wider.

    Args:
        model: a hooked model.
        activations: with `attention_sites`.
        layer: the block.
    """
    p = f"blocks.{layer}.attn."
    wide = torch.promote_types(activations[p + "hook_v"].values.dtype, torch.float32)
    pattern, v, x, out = (
        activations[full_name(short, layer)].values.to(wide) for short in ("pattern", "v", "resid_pre", "attn_out")
    )
    w_o, b_o = model.weight(p + "W_O").to(wide), model.weight(p + "b_O").to(wide)
    bias = b_o.expand_as(x)
    behind = model.norm(f"blocks.{layer}.ln1_post")
    if behind is None:
        return AttentionParts(pattern, v, w_o, x, bias, x + out)
    if model.info.post_norm:
        scale = behind.scale(x + out).to(wide)
        whole, x = activations[full_name("ln1", layer)].values.to(wide), _through(behind, x, scale)
    else:
        z = activations[full_name("z", layer)].values.to(wide)
        scale = behind.scale(einsum(z, w_o, "b q h e, h e d -> b q d") + b_o).to(wide)
        whole = x + out
    bias = _through(behind, bias, scale)
    if behind.bias is not None:
        bias = bias + behind.bias.to(wide)
    folded = behind.centre(w_o).to(wide) * behind.weight.to(wide)
    return AttentionParts(pattern / scale[:, None, :, None], v, folded, x, bias, whole)


def mlp_parts(model: HookedModel, activations: Cache, layer: int) -> MlpParts:
    """The parts of a block's MLP, in float32 or wider; a parallel block counts as attention first, MLP second.

    Args:
        model: a hooked model.
        activations: with `mlp_sites`.
        layer: the block.
    """
    written = activations[full_name("mlp_out", layer)].values
    wide = torch.promote_types(written.dtype, torch.float32)
    written, whole = written.to(wide), activations[full_name("resid_post", layer)].values.to(wide)
    if not model.info.post_norm:
        x, out = (activations[full_name(short, layer)].values.to(wide) for short in ("resid_pre", "attn_out"))
        return MlpParts(written, x + out, torch.zeros_like(whole), whole)
    norm = model.norm(f"blocks.{layer}.ln2_post")
    assert norm is not None  # a post-norm block has both
    x = activations[full_name("ln1", layer)].values.to(wide)
    scale = norm.scale(x + written).to(wide)
    bias = torch.zeros_like(whole) if norm.bias is None else norm.bias.to(wide).expand_as(whole)
    return MlpParts(_through(norm, written, scale), _through(norm, x, scale), bias, whole)


def _through(norm: Norm, x: Tensor, scale: Tensor) -> Tensor:
    """A part through a norm at a given scale: centred, weighted and scaled, without the norm's bias."""
    return norm.centre(x).to(x.dtype) * norm.weight.to(x.dtype) / scale[..., None]
