"""What a row of the family table says: where in the module tree of a transformers model the sites are.

Paths are relative to the base model (`layers`, `embed`, `pos_embed`, `final`) or to a block (the rest).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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
        auto: transformers' class that loads it.
        language: where in a vision-language model the language model is, whose sites these are; `embed` is then what
            it receives, image features among the token embeddings, and paths are relative to it.
        text: the family of that language model; by default the model type of the config's text part.
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
    auto: str = "AutoModelForCausalLM"
    language: str | None = None
    text: str | None = None

    @property
    def plain_qk(self) -> bool:
        """Whether q and k enter attention as they were projected: neither rotary embedding nor norm."""
        return not self.rotary


def text_config(config: Any, family: Family) -> Any:
    """The config of the model that has the sites: the text part of a vision-language model's."""
    return config if family.language is None else config.text_config


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
