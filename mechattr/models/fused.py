"""One projection for queries, keys and values: how families lay them out in its columns.

- `"thirds"`, `"blocks"`: q | k | v, in equal columns or with more for q.
- `"interleaved"`: for each key/value head its queries, its key, its value.
- `"quarters"`: four times q | v | k, each with a quarter of the heads.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

QUARTERS = 4


def split(
    x: Float[Tensor, "... columns"], layout: str, heads: int, kv_heads: int
) -> tuple[Float[Tensor, "... head d_head"], Float[Tensor, "... kv_head d_head"], Float[Tensor, "... kv_head d_head"]]:
    """Queries, keys and values."""
    group, d_head = heads // kv_heads, x.shape[-1] // (heads + 2 * kv_heads)
    if layout == "interleaved":
        grouped = x.unflatten(-1, (kv_heads, group + 2, d_head))
        return grouped[..., :group, :].flatten(-3, -2), grouped[..., group, :], grouped[..., group + 1, :]
    if layout == "quarters":
        q, v, k = x.unflatten(-1, (QUARTERS, 3, heads // QUARTERS, d_head)).unbind(-3)
        return q.flatten(-3, -2), k.flatten(-3, -2), v.flatten(-3, -2)
    q, k, v = x.unflatten(-1, (-1, d_head)).split([heads, kv_heads, kv_heads], -2)
    return q, k, v


def join(
    q: Float[Tensor, "... head d_head"],
    k: Float[Tensor, "... kv_head d_head"],
    v: Float[Tensor, "... kv_head d_head"],
    layout: str,
) -> Float[Tensor, "... columns"]:
    """The inverse of `split`."""
    kv_heads = k.shape[-2]
    if layout == "interleaved":
        return torch.cat([q.unflatten(-2, (kv_heads, -1)), k[..., None, :], v[..., None, :]], -2).flatten(-3)
    if layout == "quarters":
        return torch.stack([x.unflatten(-2, (QUARTERS, -1)) for x in (q, v, k)], -3).flatten(-4)
    return torch.cat([q, k, v], -2).flatten(-2)
