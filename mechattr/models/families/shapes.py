"""Sizes of the small models that families are verified on."""

from __future__ import annotations

from typing import Any

SMALL: dict[str, Any] = {"vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
GATED: dict[str, Any] = {**SMALL, "intermediate_size": 40, "num_key_value_heads": 2, "max_position_embeddings": 64}


def ids(start: int = 0) -> dict[str, int]:
    """Special tokens: BOS, EOS and padding, from `start` on."""
    return {"bos_token_id": start, "eos_token_id": start + 1, "pad_token_id": start + 2}


GEMMA_SHAPE: dict[str, Any] = {
    **GATED, "head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 6, **ids(),
    "layer_types": ["sliding_attention", "full_attention"], "tie_word_embeddings": True,
}  # fmt: skip
