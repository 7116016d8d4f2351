"""Decoders whose blocks have one attention and one MLP, one after the other."""

from __future__ import annotations

from typing import Any

from mechattr.models.families.family import Family
from mechattr.models.families.shapes import GATED, GEMMA_SHAPE, SMALL, ids

LLAMA = Family()
GEMMA = Family(
    attn_out="post_attention_layernorm",
    ln2="pre_feedforward_layernorm",
    mlp_out="post_feedforward_layernorm",
    norm="rms_plus_one",
)

ROWS: dict[str, Family] = {
    "gpt2": Family(
        layers="h",
        embed="wte",
        pos_embed="wpe",
        ln1="ln_1",
        attn="attn",
        o="attn.c_proj",
        attn_out="attn",
        ln2="ln_2",
        gate="mlp.c_fc",
        up=None,
        act="mlp.act",
        down="mlp.c_proj",
        final="ln_f",
        q=None,
        k=None,
        v=None,
        qkv="attn.c_attn",
        fused="thirds",
        rotary=False,
        norm="layer",
        softmax_float32=False,
    ),
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
    "phi3": Family(
        gate="mlp.gate_up_proj",
        up=None,
        act="mlp.activation_fn",
        q=None,
        k=None,
        v=None,
        qkv="self_attn.qkv_proj",
        fused="blocks",
    ),
    "olmo2": Family(ln1=None, attn_out="post_attention_layernorm", ln2=None, mlp_out="post_feedforward_layernorm"),
    "opt": Family(
        layers="decoder.layers",
        embed="decoder.embed_tokens",
        pos_embed="decoder.embed_positions",
        ln1="self_attn_layer_norm",
        o="self_attn.out_proj",
        ln2="final_layer_norm",
        gate="fc1",
        up=None,
        act="activation_fn",
        down="fc2",
        mlp_out="fc2",
        final="decoder.final_layer_norm",
        rotary=False,
        norm="layer",
    ),
}


def small() -> dict[str, Any]:
    """Configs of small models, by name; a family may have several."""
    import transformers as tf

    return {
        "gpt2": tf.GPT2Config(vocab_size=61, n_embd=24, n_layer=2, n_head=4, n_positions=64, **ids()),
        "llama": tf.LlamaConfig(**GATED, attention_bias=True, mlp_bias=True, **ids()),
        "mistral": tf.MistralConfig(**GATED, sliding_window=4, **ids()),
        "qwen2": tf.Qwen2Config(**GATED, **ids()),
        "qwen3": tf.Qwen3Config(**GATED, head_dim=8, attention_bias=True, **ids()),
        "gemma2": tf.Gemma2Config(**GEMMA_SHAPE, attn_logit_softcapping=3.0, final_logit_softcapping=20.0),
        "gemma3": tf.Gemma3TextConfig(**GEMMA_SHAPE),
        "phi3": tf.Phi3Config(**GATED, **ids()),
        "olmo2": tf.Olmo2Config(**GATED, **ids()),
        "opt": tf.OPTConfig(
            **SMALL,
            ffn_dim=40,
            max_position_embeddings=64,
            word_embed_proj_dim=24,
            **ids(),
            activation_function="gelu",  # a ReLU has kinks, which finite differences cannot cross
        ),
    }
