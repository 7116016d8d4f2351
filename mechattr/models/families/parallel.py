"""Decoders whose attention and MLP read the same residual stream."""

from __future__ import annotations

from typing import Any

from mechattr.models.families.family import Family
from mechattr.models.families.shapes import SMALL, ids

ROWS: dict[str, Family] = {
    "gpt_neox": Family(
        embed="embed_in",
        attn="attention",
        o="attention.dense",
        attn_out="attention",
        gate="mlp.dense_h_to_4h",
        up=None,
        act="mlp.act",
        down="mlp.dense_4h_to_h",
        final="final_layer_norm",
        q=None,
        k=None,
        v=None,
        qkv="attention.query_key_value",
        fused="interleaved",
        norm="layer",
    ),
}


def small() -> dict[str, Any]:
    """Configs of small models, by name; a family may have several."""
    import transformers as tf

    neox: dict[str, Any] = {**SMALL, "intermediate_size": 40, "max_position_embeddings": 64, **ids()}
    return {
        "gpt_neox": tf.GPTNeoXConfig(**neox),
        "gpt_neox_sequential": tf.GPTNeoXConfig(**neox, use_parallel_residual=False),
    }
