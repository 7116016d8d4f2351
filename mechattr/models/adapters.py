"""Attention that does not go through transformers' interface: each family's own, with taps in it.

For the time of a run an adapter takes the place of one method of an attention module (`_attn` or `forward`) and does
the same operations in the same order, so that a tap that changes nothing changes no bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mechattr.models.attention import AttentionTap


def _float32(scores: Tensor) -> Tensor:
    return torch.softmax(scores, -1, dtype=torch.float32)


def _own(scores: Tensor) -> Tensor:
    return torch.softmax(scores, -1)


def gptj(
    module: Any, tap: AttentionTap, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """GPT-J: q.k and its softmax in float32."""
    query, key, value = tap.enter(query, key, value, scaling=1 / module.scale_attn)
    scores = torch.matmul(query.to(torch.float32), key.to(torch.float32).transpose(-1, -2)) / module.scale_attn
    if attention_mask is not None:
        scores = scores + attention_mask
    pattern = tap.pattern(scores, _own, value.dtype)
    return torch.matmul(pattern, value), pattern


def codegen(
    module: Any, tap: AttentionTap, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """CodeGen: as GPT-J, but the mask is added before scores are scaled."""
    query, key, value = tap.enter(query, key, value, scaling=1 / module.scale_attn)
    scores = torch.matmul(query.to(torch.float32), key.to(torch.float32).transpose(-1, -2))
    if attention_mask is not None:
        scores = scores + attention_mask
    pattern = tap.pattern(scores / module.scale_attn, _own, value.dtype)
    return torch.matmul(pattern, value), pattern


def gpt_neo(
    module: Any, tap: AttentionTap, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """GPT-Neo: scores are not scaled; every other layer sees a window, which is the module's own mask."""
    query, key, value = tap.enter(query, key, value, scaling=1.0)
    scores = torch.matmul(query.to(torch.float32), key.to(torch.float32).transpose(-1, -2))
    queries, keys = scores.shape[-2:]
    seen = module.bias[:, :, keys - queries : keys, :keys]
    least = torch.tensor(torch.finfo(scores.dtype).min, dtype=scores.dtype, device=scores.device)
    scores = torch.where(seen, scores, least)
    if attention_mask is not None:
        scores = scores + attention_mask
    pattern = tap.pattern(scores, _own, value.dtype)
    return torch.matmul(pattern, value), pattern


def bloom(
    module: Any,
    tap: AttentionTap,
    hidden_states: Tensor,
    residual: Tensor,
    alibi: Tensor,
    attention_mask: Tensor | None,
    layer_past: Any = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """BLOOM: ALiBi is in the product of queries and keys, and the residual stream is added here."""
    query, key, value = module._reshape(module.query_key_value(hidden_states))
    if layer_past is not None:
        key, value = layer_past.update(key, value, module.layer_idx)
    query, key, value = tap.enter(query, key, value, scaling=module.inv_norm_factor)
    shape = (*query.shape[:3], key.shape[2])
    query, key, value = (x.reshape(-1, *x.shape[2:]) for x in (query, key, value))
    scores = alibi.baddbmm(query, key.transpose(-1, -2), beta=module.beta, alpha=module.inv_norm_factor).view(shape)
    if attention_mask is not None:
        scores = scores + attention_mask
    pattern = tap.pattern(scores, _float32, query.dtype)
    z = module._merge_heads(torch.bmm(pattern.view(-1, *shape[2:]), value))
    return residual + module.dense(z), pattern


def falcon(
    module: Any,
    tap: AttentionTap,
    hidden_states: Tensor,
    alibi: Tensor | None,
    attention_mask: Tensor,
    layer_past: Any = None,
    position_embeddings: Any = None,
    **_: Any,
) -> tuple[Tensor, Tensor | None]:
    """Falcon: rotary embedding or ALiBi; keys and values are repeated for each group of queries before either.

    transformers adds the ALiBi bias twice in eager attention (to the products, and in the mask) and once in sdpa. Each
    is done as it is there.
    """
    from transformers.models.falcon.modeling_falcon import apply_rotary_pos_emb

    query, key, value = (x.transpose(1, 2) for x in module._split_heads(module.query_key_value(hidden_states)))
    if alibi is None:
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
    if layer_past is not None:
        key, value = layer_past.update(key, value, module.layer_idx)
    copies = key.shape[1] // module.num_kv_heads
    query, key, value = tap.enter(query, key[:, ::copies], value[:, ::copies], scaling=module.inv_norm_factor)
    if copies > 1:  # in the same memory layout, on which the last bits of a product depend
        key, value = (x.transpose(1, 2).repeat_interleave(copies, 2).transpose(1, 2) for x in (key, value))
    pattern = None
    if module.config._attn_implementation == "sdpa" and not tap.inside:
        z = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask)
    else:
        scores = _falcon_scores(module, query @ key.transpose(-1, -2), alibi, attention_mask)
        pattern = tap.pattern(scores, partial(torch.softmax, dim=-1, dtype=query.dtype), query.dtype)
        z = pattern @ value
    return module.dense(z.transpose(1, 2).flatten(2)), pattern


def _falcon_scores(module: Any, products: Tensor, alibi: Tensor | None, mask: Tensor) -> Tensor:
    if module.config._attn_implementation == "sdpa":
        if mask.dtype == torch.bool:
            mask = torch.where(mask, 0.0, torch.finfo(products.dtype).min).to(products.dtype)
        return products * module.inv_norm_factor + mask
    if alibi is None:
        return products / math.sqrt(module.head_dim) + mask
    if products.dtype in (torch.float16, torch.bfloat16):
        products = products.to(torch.float32)
    return (products + alibi.view(*products.shape[:2], 1, -1)) * module.inv_norm_factor + mask


# By name in a family's row: the method that is replaced, and what takes its place, called with (module, tap, ...).
ADAPTERS: Mapping[str, tuple[str, Callable[..., tuple[Tensor, Tensor | None]]]] = {
    "gptj": ("_attn", gptj),
    "codegen": ("_attn", codegen),
    "gpt_neo": ("_attn", gpt_neo),
    "bloom": ("forward", bloom),
    "falcon": ("forward", falcon),
}
