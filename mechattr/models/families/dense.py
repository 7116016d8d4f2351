"""Decoders whose blocks have one attention and one MLP, one after the other."""

from __future__ import annotations

from dataclasses import replace
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
OLMO2 = Family(ln1=None, attn_out="post_attention_layernorm", ln2=None, mlp_out="post_feedforward_layernorm")
GLM = Family(gate="mlp.gate_up_proj", up=None, act="mlp.activation_fn", gate_up=True)
GPT2 = Family(
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
)
OPT = Family(
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
)


def bigcode_variant(config: Any) -> dict[str, Any]:
    """One head of keys and values for all queries, or one for each."""
    return {"fused": "blocks" if config.multi_query else "interleaved"}


ROWS: dict[str, Family] = {
    "gpt2": GPT2,
    "gpt_bigcode": replace(GPT2, softmax_float32=True, variant=bigcode_variant),
    "llama": LLAMA,
    "mistral": LLAMA,
    "ministral": LLAMA,
    "ministral3": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "smollm3": LLAMA,
    "seed_oss": LLAMA,
    "helium": LLAMA,
    "ernie4_5": LLAMA,
    "hunyuan_v1_dense": LLAMA,
    "cwm": LLAMA,
    "granite": replace(LLAMA, multiplied=True),
    "arcee": replace(LLAMA, gate="mlp.up_proj", up=None),
    "apertus": replace(LLAMA, ln1="attention_layernorm", ln2="feedforward_layernorm", gate="mlp.up_proj", up=None),
    "gemma": replace(LLAMA, norm="rms_plus_one"),
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
    "vaultgemma": replace(LLAMA, ln2="pre_feedforward_layernorm", norm="rms_plus_one"),
    "phi3": replace(GLM, q=None, k=None, v=None, qkv="self_attn.qkv_proj", fused="blocks"),
    "glm": GLM,
    "glm4": replace(GLM, attn_out="post_self_attn_layernorm", mlp_out="post_mlp_layernorm"),
    "olmo": replace(LLAMA, norm="layer", clipped=True),
    "olmo2": OLMO2,
    "olmo3": OLMO2,
    "exaone4": OLMO2,
    "starcoder2": replace(LLAMA, gate="mlp.c_fc", up=None, act="mlp.act", down="mlp.c_proj", norm="layer"),
    "nemotron": replace(LLAMA, gate="mlp.up_proj", up=None, norm="layer_plus_one"),
    "jais2": replace(LLAMA, gate="mlp.up_proj", up=None, norm="layer"),
    "opt": OPT,
    "biogpt": replace(
        OPT,
        layers="layers",
        embed="embed_tokens",
        pos_embed="embed_positions",
        final="layer_norm",
        softmax_float32=False,
    ),
}


def small() -> dict[str, Any]:
    """Configs of small models, by name; a family may have several."""
    import transformers as tf

    tiny: dict[str, Any] = {"vocab_size": 61, "n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 64, **ids()}
    wide: dict[str, Any] = {**GATED, "head_dim": 8, **ids()}
    rotary: dict[str, Any] = {"rope_theta": 10000.0, "rope_type": "default"}
    partial: dict[str, Any] = {**rotary, "partial_rotary_factor": 0.5}
    mixed: dict[str, Any] = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
    learned: dict[str, Any] = {**SMALL, "max_position_embeddings": 64, **ids()}
    return {
        "gpt2": tf.GPT2Config(**tiny),
        "gpt_bigcode": tf.GPTBigCodeConfig(**tiny),
        "gpt_bigcode_heads": tf.GPTBigCodeConfig(**tiny, multi_query=False),
        "llama": tf.LlamaConfig(**GATED, attention_bias=True, mlp_bias=True, **ids()),
        "mistral": tf.MistralConfig(**GATED, sliding_window=4, **ids()),
        "ministral": tf.MinistralConfig(**wide, **mixed),
        "ministral3": tf.Ministral3Config(
            **wide,
            rope_parameters={
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 16.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "original_max_position_embeddings": 4,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "llama_4_scaling_beta": 0.1,
            },
        ),
        "qwen2": tf.Qwen2Config(**GATED, **ids()),
        "qwen3": tf.Qwen3Config(**GATED, head_dim=8, attention_bias=True, **ids()),
        "smollm3": tf.SmolLM3Config(**GATED, no_rope_layers=[1, 0], **ids()),
        "seed_oss": tf.SeedOssConfig(**wide),
        "helium": tf.HeliumConfig(**GATED, head_dim=6, **ids()),
        "ernie4_5": tf.Ernie4_5Config(**wide, use_bias=True),
        "hunyuan_v1_dense": tf.HunYuanDenseV1Config(**wide),
        "cwm": tf.CwmConfig(**wide, **mixed, rope_parameters=rotary),
        "granite": tf.GraniteConfig(
            **GATED,
            **ids(),
            embedding_multiplier=4.0,  # a power of two, by which an embedding that is put in divides exactly
            residual_multiplier=0.22,
            attention_multiplier=0.3,
            logits_scaling=3.0,
        ),
        "arcee": tf.ArceeConfig(**wide),
        "apertus": tf.ApertusConfig(**GATED, **ids(), rope_parameters=rotary),
        "gemma": tf.GemmaConfig(**wide),
        "gemma2": tf.Gemma2Config(**GEMMA_SHAPE, attn_logit_softcapping=3.0, final_logit_softcapping=20.0),
        "gemma3": tf.Gemma3TextConfig(**GEMMA_SHAPE),
        "vaultgemma": tf.VaultGemmaConfig(**GEMMA_SHAPE, attn_logit_softcapping=3.0, final_logit_softcapping=20.0),
        "phi3": tf.Phi3Config(**GATED, **ids()),
        "glm": tf.GlmConfig(**wide, rope_parameters=partial),
        "glm4": tf.Glm4Config(**wide, rope_parameters=partial),
        "olmo": tf.OlmoConfig(**GATED, **ids(), clip_qkv=3.0),
        "olmo2": tf.Olmo2Config(**GATED, **ids()),
        "olmo3": tf.Olmo3Config(**GATED, **ids(), **mixed),
        "exaone4": tf.Exaone4Config(**wide, **mixed),
        "starcoder2": tf.Starcoder2Config(**GATED, **ids(), sliding_window=4),
        "nemotron": tf.NemotronConfig(**wide, rope_parameters=partial),
        "jais2": tf.Jais2Config(**wide),
        "opt": tf.OPTConfig(
            **SMALL,
            ffn_dim=40,
            max_position_embeddings=64,
            word_embed_proj_dim=24,
            **ids(),
            activation_function="gelu",  # a ReLU has kinks, which finite differences cannot cross
        ),
        "biogpt": tf.BioGptConfig(**learned, intermediate_size=40),
    }
