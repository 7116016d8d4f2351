"""The last step of a model as a linear function: logits with the scale of the final norm held fixed."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from mechattr.decomposition.target import Target
from mechattr.errors import UnsupportedFeatureError
from mechattr.models.base import HookedModel


@dataclass(frozen=True, eq=False, slots=True)
class Readout:
    """logit = x . direction + norm_bias + head_bias, for each row, with x the last residual stream.

    `direction` is (I - 11'/d) (gamma * U) / sigma for a LayerNorm, gamma * U / rms for an RMSNorm, with U the target's
    column of the unembedding (minus the foil's), and sigma or rms that of the explained position. A soft cap on logits
    (Gemma-2) lies behind it: what is explained is the logit before the cap.
    """

    direction: Float[Tensor, "batch d_model"]
    norm_bias: Float[Tensor, " batch"]
    head_bias: Float[Tensor, " batch"]

    def of(self, x: Float[Tensor, "batch ... d_model"]) -> Float[Tensor, "batch ..."]:
        """The share of vectors of the residual stream in the logit."""
        shape = (len(x), *([1] * (x.ndim - 2)), x.shape[-1])
        return (x.to(self.direction.dtype) * self.direction.reshape(shape)).sum(-1)


def readout(model: HookedModel, target: Target, final: Float[Tensor, "batch d_model"]) -> Readout:
    """The frozen read-out of rows whose last residual stream, at the explained position, is `final`.

    Raises:
        UnsupportedFeatureError: a post-norm encoder, whose stream is normalised after each addition.
    """
    check_additive_stream(model)
    u, norm = target.direction(model), model.norm("ln_final")
    head_bias = target.bias(model)
    if norm is None:
        return Readout(u, head_bias * 0, head_bias)
    norm_bias = head_bias * 0 if norm.bias is None else u @ norm.bias.to(u.dtype)
    folded = norm.centre(u * norm.weight.to(u.dtype))  # centring is symmetric: c(x).w u = x.c(w u)
    return Readout(folded.to(u.dtype) / norm.scale(final)[:, None].to(u.dtype), norm_bias, head_bias)


def check_additive_stream(model: HookedModel, asked: str = "logits as a sum over components") -> None:
    """Whether the last residual stream is the sum of what was written to it.

    Raises:
        UnsupportedFeatureError: a post-norm encoder, or one with layers between its last stream and the unembedding.
    """
    if model.info.encoder and not model.info.post_norm:
        raise UnsupportedFeatureError(
            f"{asked} of {model.info.name!r} ({model.info.family})",
            "an encoder, whose head has an activation before the unembedding: a logit is not linear in the stream",
            "use a decoder, or ma.logit_lens, which runs the head as it is",
        )
    if model.info.post_norm:
        raise UnsupportedFeatureError(
            f"{asked} of {model.info.name!r} ({model.info.family})",
            "norms act on the residual stream itself, so that components do not add up to a logit",
            'use ma.lrp(..., variant="cp") or ma.token_salience(..., method="decompx")',
        )
