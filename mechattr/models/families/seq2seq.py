"""Encoder-decoder models: an encoder reads a source, and a decoder that attends to it predicts the next token."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mechattr.models.families.family import Cross, Family
from mechattr.models.families.shapes import SMALL

_T5_ENCODER = Family(
    layers="encoder.block",
    embed="encoder.embed_tokens",
    ln1="layer.0.layer_norm",
    attn="layer.0.SelfAttention",
    o="layer.0.SelfAttention.o",
    attn_out="layer.0.SelfAttention",
    ln2="layer.1.layer_norm",
    gate="layer.1.DenseReluDense.wi",
    up=None,
    act="layer.1.DenseReluDense.act",
    down="layer.1.DenseReluDense.wo",
    mlp_out="layer.1.DenseReluDense",
    final="encoder.final_layer_norm",
    q="layer.0.SelfAttention.q",
    k="layer.0.SelfAttention.k",
    v="layer.0.SelfAttention.v",
    rotary=False,
    softmax_float32=False,
    auto="AutoModelForSeq2SeqLM",
)

_T5 = replace(
    _T5_ENCODER,
    layers="decoder.block",
    embed="decoder.embed_tokens",
    ln2="layer.2.layer_norm",
    gate="layer.2.DenseReluDense.wi",
    act="layer.2.DenseReluDense.act",
    down="layer.2.DenseReluDense.wo",
    mlp_out="layer.2.DenseReluDense",
    final="decoder.final_layer_norm",
    cross=Cross(
        attn="layer.1.EncDecAttention",
        o="layer.1.EncDecAttention.o",
        ln="layer.1.layer_norm",
        q="layer.1.EncDecAttention.q",
        k="layer.1.EncDecAttention.k",
        v="layer.1.EncDecAttention.v",
    ),
    source=_T5_ENCODER,
)

_BART_ENCODER = Family(
    layers="encoder.layers",
    embed="encoder.embed_tokens",
    pos_embed="encoder.embed_positions",
    ln1="self_attn_layer_norm",
    o="self_attn.out_proj",
    ln2="final_layer_norm",
    gate="fc1",
    up=None,
    act="activation_fn",
    down="fc2",
    mlp_out="fc2",
    final=None,
    rotary=False,
    norm="layer",
    softmax_float32=False,
    post_norm=True,
    by_column=True,
    auto="AutoModelForSeq2SeqLM",
)

_BART = replace(
    _BART_ENCODER,
    layers="decoder.layers",
    embed="decoder.embed_tokens",
    pos_embed="decoder.embed_positions",
    cross=Cross(
        attn="encoder_attn",
        o="encoder_attn.out_proj",
        ln="encoder_attn_layer_norm",
        q="encoder_attn.q_proj",
        k="encoder_attn.k_proj",
        v="encoder_attn.v_proj",
    ),
    source=_BART_ENCODER,
)


def _gated(family: Family) -> Family:
    """The row of a T5 whose MLP has a linear second input, as that of version 1.1 has."""
    mlp = family.mlp_out
    source = None if family.source is None else _gated(family.source)
    return replace(family, gate=f"{mlp}.wi_0", up=f"{mlp}.wi_1", source=source)


def _mlp_of(config: Any) -> dict[str, Any]:
    row = _gated(_T5) if config.is_gated_act else _T5
    return {"gate": row.gate, "up": row.up, "source": row.source}


ROWS: dict[str, Family] = {
    "t5": replace(_T5, variant=_mlp_of),
    "mt5": replace(_gated(_T5), variant=_mlp_of),
    "bart": _BART,
    "mbart": replace(
        _BART,
        post_norm=False,
        final="decoder.layer_norm",
        source=replace(_BART_ENCODER, post_norm=False, final="encoder.layer_norm"),
    ),
    "marian": _BART,
}


def small() -> dict[str, Any]:
    """Configs of small models, by name; a family may have several."""
    import transformers as tf

    ids = {"vocab_size": SMALL["vocab_size"], "pad_token_id": 2, "eos_token_id": 1, "decoder_start_token_id": 3}
    t5 = {
        "d_model": 24, "d_kv": 6, "d_ff": 40, "num_layers": 2, "num_heads": 4, "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 12, "feed_forward_proj": "gelu", **ids,
    }  # fmt: skip
    bart = {"d_model": 24, "max_position_embeddings": 64, "forced_eos_token_id": None, **ids}
    for stack in ("encoder", "decoder"):
        bart |= {f"{stack}_layers": 2, f"{stack}_attention_heads": 4, f"{stack}_ffn_dim": 40}
    return {
        "t5": tf.T5Config(**t5),
        "mt5": tf.MT5Config(**{**t5, "num_layers": 3, "num_decoder_layers": 2, "feed_forward_proj": "gated-gelu"}),
        "bart": tf.BartConfig(**bart),
        "mbart": tf.MBartConfig(**bart, scale_embedding=True),
        "marian": tf.MarianConfig(**bart),
    }
