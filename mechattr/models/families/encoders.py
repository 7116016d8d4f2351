"""Encoders: every token sees every token, and a head predicts masked ones."""

from __future__ import annotations

from typing import Any

from mechattr.models.families.family import Family
from mechattr.models.families.shapes import SMALL

ROWS: dict[str, Family] = {
    "bert": Family(
        layers="encoder.layer",
        embed="embeddings.word_embeddings",
        pos_embed="embeddings.position_embeddings",
        ln1="attention.output.LayerNorm",
        attn="attention.self",
        o="attention.output.dense",
        attn_out="attention.output.dense",
        ln2="output.LayerNorm",
        gate="intermediate.dense",
        up=None,
        act="intermediate.intermediate_act_fn",
        down="output.dense",
        mlp_out="output.dense",
        final=None,
        q="attention.self.query",
        k="attention.self.key",
        v="attention.self.value",
        rotary=False,
        norm="layer",
        softmax_float32=False,
        auto="AutoModelForMaskedLM",
        encoder=True,
        post_norm=True,
    ),
}


def small() -> dict[str, Any]:
    """Configs of small models, by name; a family may have several."""
    import transformers as tf

    return {
        "bert": tf.BertConfig(**SMALL, intermediate_size=40, max_position_embeddings=64, pad_token_id=2),
    }
