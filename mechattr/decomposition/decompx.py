"""DecompX: the stream of every position as a sum of one vector for each input token, and one for biases."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from mechattr.artifact import Cache
from mechattr.decomposition.prompt import Prompt, prompt_of
from mechattr.errors import SelfCheckError, SettingError, UnsupportedFeatureError
from mechattr.labelled import Labelled
from mechattr.models.base import Batch, HookedModel
from mechattr.models.norms import Norm
from mechattr.sites import full_name

Vectors = Float[Tensor, "batch source pos d_model"]

# Of the largest entry of the stream: what the vectors may miss of it.
_BROKEN = 1e-3


def decompx_vectors(
    model: HookedModel,
    given: str | Sequence[str] | Batch,
    *,
    layers: Sequence[int] | None = None,
    at_once: int = 32,
) -> Labelled:
    """Each input token's part of the residual stream of every position.

    Patterns, norm scales and slopes a(z)/z of activations are held at their values, of a gate a(z) u the factor a(z);
    with them the network is linear in the embeddings, up to biases, and the vectors of all tokens and biases add up to
    the stream:

        x_i = sum_k D_ik + D_i,bias.

    Read out along a logit the last ones are the relevance that `lrp` finds by one backward pass. Where a
    pre-activation is exactly 0 its slope counts as 0.

    Args:
        model: a decoder or encoder without experts.
        given: a text, several, or a batch.
        layers: before which blocks; `n_layers` stands for the stream behind the last, which alone is the default.
        at_once: how many input tokens are followed together; bounds memory.

    Returns:
        [layer, source, pos, d_model], with the axis `batch` first if several texts were given. Sources are positions,
        and last `"bias"`. NaN at padding.

    Raises:
        SettingError: a layer that does not exist, or no count.
        UnsupportedFeatureError: a mixture of experts, or an encoder-decoder model.
        SelfCheckError: the vectors do not add up to the stream.

    Cost:
        1 forward pass with all its activations, and for each input token and the biases the work of another; memory for
        the square of the length times d_model for each layer that is kept.

    References:
        Modarressi et al. (2023), DecompX: Explaining Transformers Decisions by Propagating Token Decomposition.
    """
    if model.info.n_experts:
        raise UnsupportedFeatureError(
            f"vectors of {model.info.name!r} ({model.info.family})",
            "its MLPs are mixtures of experts, whose neurons are no sites",
            "use ma.lrp, which goes through experts",
        )
    if isinstance(at_once, bool) or not isinstance(at_once, int) or at_once < 1:
        raise SettingError(f"at_once={at_once!r}", "no count", "give a whole number from 1")
    last = model.info.n_layers
    chosen = [last] if layers is None else list(layers)
    if not chosen or any(isinstance(x, bool) or x not in range(last + 1) for x in chosen):
        raise SettingError(f"layers={chosen}", f"blocks 0 to {last - 1}, {last} behind the last", "name some of these")
    prompt = prompt_of(model, given)
    vectors = _all_vectors(model, prompt, chosen, at_once)
    coords = {"layer": chosen, "source": [*range(prompt.batch.tokens.shape[1]), "bias"]}
    return prompt.table(vectors, ("layer", "source", "pos", "d_model"), **coords)


def _all_vectors(
    model: HookedModel, prompt: Prompt, chosen: Sequence[int], at_once: int
) -> Float[Tensor, "batch layer source pos d_model"]:
    shorts = ["resid_pre", "pattern", "attn_out", "mlp_pre", "mlp_post", "mlp_out", "resid_post"]
    shorts += ["mlp_pre_linear"] if model.info.gated else []
    shorts += ["z"] if model.info.write_norm else []
    have = set(model.sites())
    wanted = {full_name(short, layer) for short in shorts for layer in range(model.info.n_layers)} & have
    cache = model.run(prompt.batch, record=[site for site in model.sites() if site in wanted]).activations
    frozen = _Frozen(model, cache)
    x = frozen.site("resid_pre", 0)
    places = torch.arange(x.shape[1], device=x.device)
    parts = []
    for chunk in places.split(at_once):
        start = x.new_zeros(len(x), len(chunk), *x.shape[1:])
        start[:, torch.arange(len(chunk), device=x.device), chunk] = x[:, chunk]
        parts.append(frozen.follow(start, chosen, affine=False))
    parts.append(frozen.follow(torch.zeros_like(x)[:, None], chosen, affine=True))
    vectors = torch.cat(parts, 2)
    streams = [frozen.stream(layer) for layer in chosen]
    missed = (vectors.sum(2) - torch.stack(streams, 1))[prompt.batch.mask[:, None].expand(-1, len(chosen), -1)]
    if model.info.dtype != "bfloat16" and float(missed.abs().max()) > _BROKEN * float(torch.stack(streams).abs().max()):
        raise SelfCheckError(
            f"vectors of {model.info.name!r} ({model.info.family})",
            f"they miss {float(missed.abs().max()):.4g} of the stream",
            "a part of this model is not linear with patterns, norms and slopes held: use ma.lrp",
        )
    return vectors


@dataclass(frozen=True, eq=False, slots=True)
class _Frozen:
    """The blocks of a model as affine maps at the values of one run."""

    model: HookedModel
    cache: Cache

    def site(self, short: str, layer: int) -> Tensor:
        x = self.cache[full_name(short, layer)].values
        return x.to(torch.promote_types(x.dtype, torch.float32))

    def stream(self, layer: int) -> Float[Tensor, "batch pos d_model"]:
        last = layer == self.model.info.n_layers
        return self.site("resid_post", layer - 1) if last else self.site("resid_pre", layer)

    def follow(
        self, vectors: Vectors, chosen: Sequence[int], *, affine: bool
    ) -> Float[Tensor, "batch layer source pos d_model"]:
        """Vectors before the first block, followed up to the chosen layers; with biases if `affine`."""
        kept = {0: vectors}
        for layer in range(max(chosen)):
            vectors = self.block(layer, vectors, affine=affine)
            kept |= {layer + 1: vectors} if layer + 1 in chosen else {}
        return torch.stack([kept[layer] for layer in chosen], 1)

    def block(self, layer: int, vectors: Vectors, *, affine: bool) -> Vectors:
        info, p = self.model.info, f"blocks.{layer}."
        x, out = self.site("resid_pre", layer), self.site("attn_out", layer)
        read = vectors if info.post_norm else self.norm(p + "ln1", vectors, x, affine)
        middle = vectors + self.attention(layer, read, affine)
        if info.post_norm:
            middle = self.norm(p + "ln1_post", middle, x + out, affine)
        if full_name("mlp_out", layer) not in self.cache:
            return middle
        if info.post_norm:
            read = middle
        else:
            read = self.norm(p + "ln2", vectors if info.parallel else middle, x if info.parallel else x + out, affine)
        after = middle + self.mlp(layer, read, affine)
        if not info.post_norm:
            return after
        first = self.model.norm(p + "ln1_post")
        assert first is not None  # a post-norm block has both
        stream = first(x + out).to(x.dtype) + self.site("mlp_out", layer)
        return self.norm(p + "ln2_post", after, stream, affine)

    def attention(self, layer: int, read: Vectors, affine: bool) -> Vectors:
        p, pattern = f"blocks.{layer}.attn.", self.site("pattern", layer)
        w_v, b_v, w_o, b_o = (self.model.weight(p + n).to(read) for n in ("W_V", "b_V", "W_O", "b_O"))
        v = einsum(read, w_v, "b s k m, h m e -> b s k h e") + affine * b_v
        v = v.repeat_interleave(len(w_o) // len(w_v), 3)
        z = einsum(pattern, v, "b h q k, b s k h e -> b s q h e")
        out = einsum(z, w_o, "b s q h e, h e m -> b s q m") + affine * b_o
        if not self.model.info.write_norm:
            return out
        whole = einsum(self.site("z", layer), w_o, "b q h e, h e m -> b q m") + b_o
        return self.norm(f"blocks.{layer}.ln1_post", out, whole, affine)

    def mlp(self, layer: int, read: Vectors, affine: bool) -> Vectors:
        p, gated = f"blocks.{layer}.mlp.", self.model.info.gated
        w_in, b_in, w_out, b_out = (self.model.weight(p + n).to(read) for n in ("W_in", "b_in", "W_out", "b_out"))
        post, pre = self.site("mlp_post", layer), self.site("mlp_pre_linear" if gated else "mlp_pre", layer)
        slope = torch.where(pre == 0, 0.0, post / torch.where(pre == 0, 1.0, pre))
        out = ((read @ w_in + affine * b_in) * slope[:, None]) @ w_out + affine * b_out
        if not self.model.info.write_norm:
            return out
        return self.norm(f"blocks.{layer}.ln2_post", out, post @ w_out + b_out, affine)

    def norm(self, name: str, vectors: Vectors, whole: Float[Tensor, "batch pos d_model"], affine: bool) -> Vectors:
        """Vectors through a norm whose scale is that of their sum."""
        norm: Norm | None = self.model.norm(name)
        if norm is None:
            return vectors
        scale = norm.scale(whole).to(vectors.dtype)[:, None, :, None]
        y = norm.centre(vectors).to(vectors.dtype) * norm.weight.to(vectors.dtype) / scale
        return y if norm.bias is None or not affine else y + norm.bias.to(vectors.dtype)
