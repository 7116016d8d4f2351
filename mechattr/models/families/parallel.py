"""Decoders whose attention and MLP read the same residual stream, or whose attention is their own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mechattr.models.families.family import Family
from mechattr.models.families.shapes import GATED, SMALL, ids

PHI = Family(
    o="self_attn.dense",
    ln2=None,
    gate="mlp.fc1",
    up=None,
    act="mlp.activation_fn",
    down="mlp.fc2",
    final="final_layernorm",
    parallel=True,
    norm="layer",
)
COHERE = Family(ln2=None, parallel=True, norm="layer")
# Attention that is not transformers' interface, in blocks that return a tuple.
GPTJ = Family(
    layers="h",
    embed="wte",
    ln1="ln_1",
    attn="attn",
    o="attn.out_proj",
    attn_out="attn",
    ln2=None,
    gate="mlp.fc_in",
    up=None,
    act="mlp.act",
    down="mlp.fc_out",
    final="ln_f",
    q="attn.q_proj",
    k="attn.k_proj",
    v="attn.v_proj",
    position_table=True,
    parallel=True,
    adapter="gptj",
    returns_tuple=True,
    norm="layer",
    softmax_float32=False,
)
BLOOM = Family(
    layers="h",
    embed="word_embeddings",
    attn="self_attention",
    o="self_attention.dense",
    attn_out="self_attention.dense",  # the module itself adds the residual stream, as the MLP does
    gate="mlp.dense_h_to_4h",
    up=None,
    act="mlp.gelu_impl",
    down="mlp.dense_4h_to_h",
    mlp_out="mlp.dense_4h_to_h",
    final="ln_f",
    q=None,
    k=None,
    v=None,
    qkv="self_attention.query_key_value",
    fused="interleaved",
    rotary=False,
    alibi=True,
    adapter="bloom",
    returns_tuple=True,
    norm="layer",
)


def neox_variant(config: Any) -> dict[str, Any]:
    """Both kinds of block have two norms."""
    return {"parallel": config.use_parallel_residual}


def stablelm_variant(config: Any) -> dict[str, Any]:
    """A parallel block has one norm."""
    return {"parallel": True, "ln2": None} if config.use_parallel_residual else {}


def falcon_variant(config: Any) -> dict[str, Any]:
    """Three generations: ALiBi in sequential blocks, one key/value head and one norm, groups of heads and two norms."""
    new = config.new_decoder_architecture
    parallel = new or config.parallel_attn
    norms: dict[str, Any] = {} if parallel else {"ln2": "post_attention_layernorm"}
    if new and config.num_ln_in_parallel_attn in (None, 2):
        norms = {"ln1": "ln_attn", "ln2": "ln_mlp"}
    return {
        **norms,
        "kv_heads": config.num_kv_heads if new or not config.multi_query else 1,
        "parallel": parallel,
        "adds_in_place": parallel,
        "rotary": not config.alibi,
        "alibi": config.alibi,
    }


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
        parallel=True,
        norm="layer",
        variant=neox_variant,
    ),
    "stablelm": Family(norm="layer", variant=stablelm_variant),
    "phi": PHI,
    "cohere": COHERE,
    "cohere2": COHERE,
    "gptj": GPTJ,
    "codegen": replace(GPTJ, q=None, k=None, v=None, qkv="attn.qkv_proj", fused="quarters", adapter="codegen"),
    "gpt_neo": Family(
        layers="h",
        embed="wte",
        pos_embed="wpe",
        ln1="ln_1",
        attn="attn.attention",
        o="attn.attention.out_proj",
        attn_out="attn",
        ln2="ln_2",
        gate="mlp.c_fc",
        up=None,
        act="mlp.act",
        down="mlp.c_proj",
        final="ln_f",
        q="attn.attention.q_proj",
        k="attn.attention.k_proj",
        v="attn.attention.v_proj",
        rotary=False,
        adapter="gpt_neo",
        returns_tuple=True,
        norm="layer",
        softmax_float32=False,
    ),
    "bloom": BLOOM,
    "falcon": replace(
        BLOOM,
        attn_out="self_attention",
        ln2=None,
        act="mlp.act",
        mlp_out="mlp",
        rotary=True,
        alibi=False,
        parallel=True,
        adapter="falcon",
        softmax_float32=False,
        variant=falcon_variant,
    ),
}


def small() -> dict[str, Any]:
    """Configs of small models, by name; a family may have several."""
    import transformers as tf

    neox: dict[str, Any] = {**SMALL, "intermediate_size": 40, "max_position_embeddings": 64, **ids()}
    table: dict[str, Any] = {
        **{"vocab_size": 61, "n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 4},
        **ids(),
        "tie_word_embeddings": False,
    }
    partial = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.7}}
    falcon: dict[str, Any] = {**SMALL, "ffn_hidden_size": 40, "max_position_embeddings": 64, "bias": True, **ids()}
    return {
        "gpt_neox": tf.GPTNeoXConfig(**neox),
        "gpt_neox_sequential": tf.GPTNeoXConfig(**neox, use_parallel_residual=False),
        "stablelm": tf.StableLmConfig(**GATED, **ids(), **partial, use_qkv_bias=True),
        "stablelm_parallel": tf.StableLmConfig(
            **GATED, **ids(), **partial, use_parallel_residual=True, qk_layernorm=True
        ),
        "phi": tf.PhiConfig(**GATED, **ids(), **partial),
        "cohere": tf.CohereConfig(**GATED, **ids(), logit_scale=0.5, use_qk_norm=True),
        "cohere2": tf.Cohere2Config(
            **GATED, **ids(), logit_scale=0.5, sliding_window=4, layer_types=["sliding_attention", "full_attention"]
        ),
        "gptj": tf.GPTJConfig(**table),
        "codegen": tf.CodeGenConfig(**table, n_ctx=64),
        "gpt_neo": tf.GPTNeoConfig(
            vocab_size=61,
            hidden_size=24,
            num_layers=2,
            num_heads=4,
            intermediate_size=40,
            max_position_embeddings=64,
            window_size=4,
            attention_types=[[["global", "local"], 1]],
            **ids(),
        ),
        "bloom": tf.BloomConfig(vocab_size=61, hidden_size=24, n_layer=2, n_head=4, **ids()),
        "falcon": tf.FalconConfig(**falcon),
        "falcon_groups": tf.FalconConfig(**falcon, new_decoder_architecture=True, num_kv_heads=2),
        "falcon_alibi": tf.FalconConfig(**falcon, alibi=True, multi_query=False, parallel_attn=False),
    }
