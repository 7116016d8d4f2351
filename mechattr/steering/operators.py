"""What steering does to an activation: `operation(x, v, multiplier) -> x`, row by row."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

# x [rows, positions, d], v [d], multiplier [rows, 1, 1], all in float32 or wider
Operation = Callable[[Tensor, Tensor, Tensor], Tensor]


def add(
    x: Float[Tensor, "row pos d"], v: Float[Tensor, " d"], multiplier: Float[Tensor, "row 1 1"]
) -> Float[Tensor, "row pos d"]:
    """x + m v."""
    return x + multiplier * v


def norm_preserving(
    x: Float[Tensor, "row pos d"], v: Float[Tensor, " d"], multiplier: Float[Tensor, "row 1 1"]
) -> Float[Tensor, "row pos d"]:
    """x + m v, brought back to the length of x."""
    moved = x + multiplier * v
    length = moved.norm(dim=-1, keepdim=True)
    return moved * (x.norm(dim=-1, keepdim=True) / length.clamp(min=torch.finfo(x.dtype).tiny))


def ablate(
    x: Float[Tensor, "row pos d"],
    v: Float[Tensor, " d"],
    multiplier: Float[Tensor, "row 1 1"],  # noqa: ARG001 (one signature for all)
) -> Float[Tensor, "row pos d"]:
    """x - (x.u) u with u = v / |v|: nothing along v is left. The multiplier does not change it."""
    u = unit(v)
    return x - (x @ u)[..., None] * u


def ablate_then_add(
    x: Float[Tensor, "row pos d"], v: Float[Tensor, " d"], multiplier: Float[Tensor, "row 1 1"]
) -> Float[Tensor, "row pos d"]:
    """x - (x.u) u + m v."""
    return ablate(x, v, multiplier) + multiplier * v


def clamp(
    x: Float[Tensor, "row pos d"], v: Float[Tensor, " d"], multiplier: Float[Tensor, "row 1 1"]
) -> Float[Tensor, "row pos d"]:
    """x + (m |v| - x.u) u: the projection on v is what m v has."""
    u = unit(v)
    return x + (multiplier[..., 0] * v.norm() - x @ u)[..., None] * u


def angular(
    x: Float[Tensor, "row pos d"], v: Float[Tensor, " d"], multiplier: Float[Tensor, "row 1 1"]
) -> Float[Tensor, "row pos d"]:
    """x turned towards v within their plane, by the share m of the angle between them; its length stays. Where there is
    no plane (x along v, or no v) x stays."""
    u, length = unit(v), x.norm(dim=-1, keepdim=True)
    tiny = torch.finfo(x.dtype).tiny
    along = x / length.clamp(min=tiny)
    cosine = (along @ u).clamp(-1, 1)[..., None]
    across = u - cosine * along  # what of v is at a right angle to x
    apart = across.norm(dim=-1, keepdim=True)
    across = across / apart.clamp(min=tiny)
    angle = multiplier * torch.acos(cosine)
    turned = length * (along * torch.cos(angle) + across * torch.sin(angle))
    return torch.where((multiplier == 0) | (apart == 0), x, turned)


def scale(
    x: Float[Tensor, "row pos d"],
    v: Float[Tensor, " d"],  # noqa: ARG001 (one signature for all)
    multiplier: Float[Tensor, "row 1 1"],
) -> Float[Tensor, "row pos d"]:
    """m x: a head's output, or any other, larger or smaller; the direction does not matter, only where there is one."""
    return multiplier * x


def unit(v: Float[Tensor, " d"]) -> Float[Tensor, " d"]:
    """v at length 1; zeros stay."""
    return v / v.norm().clamp(min=torch.finfo(v.dtype).tiny)


OPERATORS: dict[str, Operation] = {
    "add": add,
    "norm_preserving": norm_preserving,
    "ablate": ablate,
    "ablate_then_add": ablate_then_add,
    "clamp": clamp,
    "angular": angular,
    "scale": scale,
}
