"""Decoders whose MLPs are mixtures of experts: a router sends each token to a few of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mechattr.models.families.family import Family
from mechattr.models.families.shapes import GATED, ids

MIXTURE = Family(gate=None, up=None, act=None, down=None, router="mlp.gate", experts="mlp.experts")

ROWS: dict[str, Family] = {
    "mixtral": MIXTURE,
    "qwen2_moe": replace(
        MIXTURE,
        shared_act="mlp.shared_expert.act_fn",
        shared_down="mlp.shared_expert.down_proj",
        shared_weight="mlp.shared_expert_gate",
    ),
    "qwen3_moe": MIXTURE,
    "olmoe": replace(MIXTURE, clipped=True),
    "gpt_oss": replace(MIXTURE, router="mlp.router", softmax_float32=False),
    "granitemoe": replace(
        MIXTURE,
        router="block_sparse_moe.router",
        experts="block_sparse_moe.experts",
        mlp_out="block_sparse_moe",
        multiplied=True,
    ),
}


def small() -> dict[str, Any]:
    """Configs of small models, by name; a family may have several."""
    import transformers as tf

    local: dict[str, Any] = {**GATED, "num_local_experts": 5, "num_experts_per_tok": 2, **ids()}
    many: dict[str, Any] = {**GATED, "num_experts": 5, "num_experts_per_tok": 2, **ids()}
    return {
        "mixtral": tf.MixtralConfig(**local, sliding_window=4),
        "qwen2_moe": tf.Qwen2MoeConfig(**many, moe_intermediate_size=12, shared_expert_intermediate_size=16),
        "qwen3_moe": tf.Qwen3MoeConfig(**many, moe_intermediate_size=12, norm_topk_prob=True, head_dim=8),
        "olmoe": tf.OlmoeConfig(**many, clip_qkv=2.0),
        "gpt_oss": tf.GptOssConfig(
            **local,
            head_dim=8,
            sliding_window=4,
            layer_types=["sliding_attention", "full_attention"],
            swiglu_limit=3.0,
            rope_parameters={"rope_theta": 10000.0, "rope_type": "default"},
        ),
        "granitemoe": tf.GraniteMoeConfig(
            **local,
            embedding_multiplier=4.0,  # a power of two, by which an embedding that is put in divides exactly
            residual_multiplier=0.22,
            attention_multiplier=0.3,
            logits_scaling=3.0,
        ),
    }
