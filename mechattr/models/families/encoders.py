"""Encoders: every token sees every token, and a head predicts masked ones."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mechattr.models.families.family import Family
from mechattr.models.families.shapes import SMALL

BERT = Family(
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
    head_act="cls.predictions.transform.transform_act_fn",
    norm="layer",
    softmax_float32=False,
    auto="AutoModelForMaskedLM",
    encoder=True,
    post_norm=True,
)


def roberta_variant(config: Any) -> dict[str, Any]:
    """Positions are counted from behind the padding token's id."""
    return {"position_offset": config.pad_token_id + 1}


ROBERTA = replace(BERT, variant=roberta_variant, head_act=None, head_gelu=("lm_head.dense", "lm_head.layer_norm"))

ROWS: dict[str, Family] = {
    "bert": BERT,
    "electra": replace(BERT, head_act="generator_predictions.activation"),
    "roberta": ROBERTA,
    "xlm-roberta": ROBERTA,
    "distilbert": replace(
        BERT,
        layers="transformer.layer",
        ln1="sa_layer_norm",
        attn="attention",
        o="attention.out_lin",
        attn_out="attention.out_lin",
        ln2="output_layer_norm",
        gate="ffn.lin1",
        act="ffn.activation",
        down="ffn.lin2",
        mlp_out="ffn.lin2",
        q="attention.q_lin",
        k="attention.k_lin",
        v="attention.v_lin",
        head_act="activation",
    ),
    "modernbert": Family(  # the first block has no norm before attention: the embedding's is all it needs
        embed="embeddings.tok_embeddings",
        ln1="attn_norm",
        attn="attn",
        o="attn.Wo",
        attn_out="attn",
        ln2="mlp_norm",
        gate="mlp.Wi",
        up=None,
        act="mlp.act",
        down="mlp.Wo",
        final="final_norm",
        q=None,
        k=None,
        v=None,
        qkv="attn.Wqkv",
        fused="blocks",
        gate_up=True,
        head_act="head.act",
        norm="layer",
        auto="AutoModelForMaskedLM",
        encoder=True,
    ),
}


def small() -> dict[str, Any]:
    """Configs of small models, by name; a family may have several."""
    import transformers as tf

    sizes: dict[str, Any] = {**SMALL, "intermediate_size": 40, "max_position_embeddings": 64, "pad_token_id": 2}
    return {
        "bert": tf.BertConfig(**sizes),
        "electra": tf.ElectraConfig(**sizes, embedding_size=24),
        "roberta": tf.RobertaConfig(**sizes, bos_token_id=0, eos_token_id=1),
        "xlm-roberta": tf.XLMRobertaConfig(**sizes, bos_token_id=0, eos_token_id=1),
        "distilbert": tf.DistilBertConfig(
            vocab_size=61, dim=24, n_layers=2, n_heads=4, hidden_dim=40, max_position_embeddings=64, pad_token_id=2
        ),
        "modernbert": tf.ModernBertConfig(
            **sizes,
            bos_token_id=0,
            eos_token_id=1,
            cls_token_id=0,
            sep_token_id=1,
            local_attention=4,
            layer_types=["full_attention", "sliding_attention"],
        ),
    }
