"""The supported families of transformers models: one row says where in the module tree the sites are.

Paths are relative to the base model (`layers`, `embed`, `pos_embed`, `final`) or to a block (the rest).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mechattr.errors import UnsupportedModelError, nearest
from mechattr.sites import SITES


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Where the sites of one family are.

    Attributes:
        layers: the list of blocks.
        embed: token embedding.
        pos_embed: learned position embedding, if any.
        ln1: norm before attention (after it in a post-norm encoder); `None` if there is none.
        attn: the module that calls the attention function.
        o: the output projection of attention.
        attn_out: the module whose output is added to the residual stream (a post-norm where there is one).
        ln2: norm before the MLP (after it in a post-norm encoder).
        gate: the module whose output enters the activation function, `mlp_pre`.
        up: the linear second input of a gated MLP, `mlp_pre_linear`.
        act: the MLP's activation function.
        down: the last projection of the MLP.
        mlp_out: the module whose output is added to the residual stream.
        final: the last norm.
        q, k, v: the projections, `None` where they are one fused module `qkv`.
        qkv: a fused projection.
        fused: how it is split: `"thirds"` (q | k | v in equal columns), `"interleaved"` (q, k, v head by head) or
            `"blocks"` (q | k | v, where q has more heads; the MLP's gate and up are one module as well).
        rotary: positions are rotations of q and k.
        norm: `"layer"`, `"rms"` or `"rms_plus_one"` (the weight is stored minus one).
        softmax_float32: eager attention takes its softmax in float32.
        encoder, post_norm: see `ModelInfo`.
    """

    layers: str = "layers"
    embed: str = "embed_tokens"
    pos_embed: str | None = None
    ln1: str | None = "input_layernorm"
    attn: str = "self_attn"
    o: str = "self_attn.o_proj"
    attn_out: str = "self_attn"
    ln2: str | None = "post_attention_layernorm"
    gate: str = "mlp.gate_proj"
    up: str | None = "mlp.up_proj"
    act: str = "mlp.act_fn"
    down: str = "mlp.down_proj"
    mlp_out: str = "mlp"
    final: str | None = "norm"
    q: str | None = "self_attn.q_proj"
    k: str | None = "self_attn.k_proj"
    v: str | None = "self_attn.v_proj"
    qkv: str | None = None
    fused: str | None = None
    rotary: bool = True
    norm: str = "rms"
    softmax_float32: bool = True
    encoder: bool = False
    post_norm: bool = False

    @property
    def plain_qk(self) -> bool:
        """Whether q and k enter attention as they were projected: neither rotary embedding nor norm."""
        return not self.rotary


# What the tests prove for every family on small random models, and the transformers release that they run with.
VERIFIED = {
    "logits": "without taps they are the model's own to the last bit: float64, float32, bfloat16; eager attention and "
    "sdpa where the family has it",
    "taps": "recording, and an edit that changes nothing, keep every bit; scores, pattern and result keep 1e-5",
    "gradients": "at every site they agree with finite differences of an edit there, to a relative 1e-4",
    "padding": "rows of a batch that is padded on either side give what they give alone, to 1e-5",
    "restart": "a run from a cached residual stream is the whole run to the last bit",
    "generation": "edits of strength zero and padding on the left leave the tokens as they are; decoders only",
}
TESTED_TRANSFORMERS = "5.23.0"

LLAMA = Family()
GEMMA = Family(
    attn_out="post_attention_layernorm",
    ln2="pre_feedforward_layernorm",
    mlp_out="post_feedforward_layernorm",
    norm="rms_plus_one",
)

FAMILIES: dict[str, Family] = {
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
        encoder=True,
        post_norm=True,
    ),
}


def family_of(config: Any) -> tuple[str, Family]:
    """The table row of a transformers config, after the options that no row can describe were checked.

    Raises:
        UnsupportedModelError: no row, or an option under which the sites would not be what their names say.
    """
    name = config.model_type
    if name not in FAMILIES:
        raise UnsupportedModelError(
            f"a hooked model of family {name!r}",
            f"no row for it; supported are {', '.join(FAMILIES)}",
            f"use a supported family ({nearest(name, FAMILIES)})",
        )
    refused = {
        "reorder_and_upcast_attn": "its attention does not go through the attention interface",
        "is_decoder": "a decoder made of an encoder family" if FAMILIES[name].encoder else "",
        "add_cross_attention": "cross-attention has no sites yet",
        "_remove_final_layer_norm": "a model without its final norm",
    }
    for option, reason in refused.items():
        if reason and getattr(config, option, False):
            raise UnsupportedModelError(
                f"a hooked {name} model with {option}=True", reason, f"use a model with {option}=False"
            )
    if name == "opt" and (not config.do_layer_norm_before or config.word_embed_proj_dim != config.hidden_size):
        raise UnsupportedModelError(
            "a hooked opt model", "norms after the blocks, or projected embeddings (OPT-350m)", "use another OPT size"
        )
    return name, FAMILIES[name]


def short_sites(family: Family, *, parallel: bool) -> tuple[str, ...]:
    """The short names of the sites that a family has."""
    absent = {
        "pos_embed": family.pos_embed is None,
        "resid_mid": parallel or family.post_norm,
        "ln1": family.ln1 is None,
        "ln1_scale": family.ln1 is None,
        "ln2": family.ln2 is None,
        "ln2_scale": family.ln2 is None,
        "mlp_pre_linear": family.up is None and family.fused != "blocks",
        "ln_final": family.final is None,
        "ln_final_scale": family.final is None,
    }
    return tuple(short for short in SITES if not absent.get(short, False))


def full_sites(family: Family, *, parallel: bool, n_layers: int) -> tuple[str, ...]:
    """The full names in the order of the forward pass."""
    specs = [SITES[short] for short in short_sites(family, parallel=parallel)]
    before = [s.template for s in specs if not s.layered and "embed" in s.short]
    after = [s.template for s in specs if not s.layered and "embed" not in s.short]
    inside = [s.template.format(l=layer) for layer in range(n_layers) for s in specs if s.layered]
    return (*before, *inside, *after)


def table() -> list[dict[str, Any]]:
    """One row a family for `mechattr models`: its sites, what is particular about it, and what was verified.

    `verified` lists keys of `VERIFIED`, with the release of transformers that they were tested with.
    """
    rows = []
    for name, family in FAMILIES.items():
        sites = short_sites(family, parallel=name == "gpt_neox")
        checks = [check for check in VERIFIED if not (family.encoder and check == "generation")]
        rows.append(
            {
                "family": name,
                "kind": "encoder" if family.encoder else "decoder",
                "norm": family.norm.replace("_plus_one", ""),
                "positions": "rotary" if family.rotary else "learned",
                "sites": len(sites),
                "absent": ", ".join(s for s in SITES if s not in sites) or "none",
                "verified": f"{', '.join(checks)} (transformers {TESTED_TRANSFORMERS})",
            }
        )
    return rows


__all__ = ["FAMILIES", "TESTED_TRANSFORMERS", "VERIFIED", "Family", "family_of", "full_sites", "short_sites", "table"]
