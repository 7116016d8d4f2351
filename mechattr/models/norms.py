"""Layer norms taken apart: the scale that a norm divides by, and the norm at a given scale."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mechattr.models.placement import stored


@dataclass(frozen=True, eq=False, slots=True)
class Norm:
    """y = c / s * weight + bias with s = sqrt(mean(c^2) + eps): a LayerNorm if `centred` (c = x - mean(x)), else RMS.

    Everything is computed in float32 or wider.
    """

    centred: bool
    weight: Float[Tensor, " d_model"]
    bias: Float[Tensor, " d_model"] | None
    eps: float

    def to(self, device: torch.device) -> Norm:
        """The same norm on another device."""
        bias = None if self.bias is None else self.bias.to(device)
        return replace(self, weight=self.weight.to(device), bias=bias)

    def centre(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
        """c."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        return x - x.mean(-1, keepdim=True) if self.centred else x

    def scale(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "..."]:
        """s."""
        return (self.centre(x).pow(2).mean(-1) + self.eps).sqrt()

    def __call__(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
        """y."""
        y = self.centre(x) / self.scale(x)[..., None] * self.weight
        return y if self.bias is None else y + self.bias


# LayerNorms that are classes of their own
LAYER_NORMS = ("CohereLayerNorm", "Cohere2LayerNorm", "OlmoLayerNorm")


def norm_of(module: nn.Module, like: Tensor) -> Norm:
    """A norm module as a function of its own: detached from the module, with the module's present weights.

    `like` says where ones are, the weight of a norm that has none.
    """
    bias = stored(module, "bias")
    return Norm(
        _is_centred(module),
        norm_weight(module, like).detach(),
        None if bias is None else bias.detach(),
        _eps(module),
    )


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a LayerNorm or one of the families' RMSNorms, as T5's layer norm is."""
    return _is_centred(module) or type(module).__name__.endswith(("RMSNorm", "T5LayerNorm"))


def _is_centred(module: nn.Module) -> bool:
    return isinstance(module, nn.LayerNorm) or type(module).__name__ in LAYER_NORMS


def _eps(module: nn.Module) -> float:
    written = 1e-5 if type(module).__name__ == "OlmoLayerNorm" else 0.0  # OLMo's stands in its forward
    return float(getattr(module, "variance_epsilon", getattr(module, "eps", written)))


def _centred(module: nn.Module, x: Tensor) -> Tensor:
    x = x if x.dtype == torch.float64 else x.float()
    return x - x.mean(-1, keepdim=True) if _is_centred(module) else x


def norm_weight(module: Any, like: Tensor) -> Float[Tensor, " d_model"]:
    """The factor that a norm truly applies: Gemma and Nemotron store it minus one, and OLMo has none. `like` has the
    norm's width as its last axis."""
    weight = stored(module, "weight")
    if weight is None:
        return like.new_ones(like.shape[-1])
    name = type(module).__name__
    return 1.0 + weight if name.startswith(("Gemma", "VaultGemma")) or name.endswith("LayerNorm1P") else weight


def norm_scale(module: nn.Module, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "..."]:
    """sqrt(mean(c^2) + eps), with c the centred input of a LayerNorm or the input of an RMSNorm; float32 or wider."""
    return (_centred(module, x).pow(2).mean(-1) + _eps(module)).sqrt()


def normalise(module: nn.Module, x: Float[Tensor, "... d_model"], scale: Float[Tensor, "..."]) -> Tensor:
    """c / scale * weight + bias: linear in the input when the scale is held fixed."""
    y = _centred(module, x) / scale[..., None] * norm_weight(module, x)
    bias = stored(module, "bias")
    return y if bias is None else y + bias
