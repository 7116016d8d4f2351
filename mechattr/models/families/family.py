"""What a row of the family table says: where in the module tree of a transformers model the sites are.

Paths are relative to the base model (`layers`, `embed`, `pos_embed`, `final`) or to a block (the rest).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mechattr.sites import OF_DICTIONARIES, SITES, SiteSpec, of_source


@dataclass(frozen=True, slots=True, kw_only=True)
class Cross:
    """Where a decoder's cross-attention is, as paths within a block.

    Attributes:
        attn: the module that calls the attention function, and whose output is added to the residual stream.
        o: its output projection.
        ln: the norm before it (after it where norms act on the stream).
        q, k, v: the projections.
    """

    attn: str
    o: str
    ln: str
    q: str
    k: str
    v: str


# The fields that are modules of a block.
PARTS = (
    "ln1", "attn", "o", "attn_out", "ln2", "gate", "up", "act", "down", "router", "experts", "mlp_out",
    "shared_act", "shared_down", "shared_weight", "q", "k", "v", "qkv",
)  # fmt: skip


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
        ln2: norm before the MLP (after it in a post-norm encoder). In a parallel block without one, attention and MLP
            share `ln1`.
        gate: the module whose output enters the activation function, `mlp_pre`.
        up: the linear second input of a gated MLP, `mlp_pre_linear`.
        act: the MLP's activation function.
        down: the last projection of the MLP.
        mlp_out: the module whose output is added to the residual stream.
        router, experts: in a mixture of experts, the module that gives logits, scores and chosen experts, and the
            module that runs the experts. `gate`, `up`, `act` and `down` are then `None`.
        shared_act, shared_down, shared_weight: of an expert that every token goes through, the activation function, the
            last projection and the projection to the logit of its weight.
        final: the last norm.
        q, k, v: the projections, `None` where they are one fused module `qkv`.
        qkv: a fused projection.
        fused: how it is split, see `mechattr.models.fused`.
        gate_up: the MLP's gate and up are one module (gate | up), which stands in `gate`.
        kv_heads: key and value heads, where they are not the config's `num_key_value_heads`.
        rotary: positions are rotations of q and k.
        alibi: positions are a bias of the scores that falls with distance.
        position_table: rotations come from a table of `n_ctx` positions, where others compute them for any.
        position_offset: the number of the first position.
        parallel: attention and MLP of a block read the same residual stream.
        adapter: name in `mechattr.models.adapters`, for attention that does not go through transformers' interface.
        returns_tuple: a block returns a tuple that begins with the residual stream.
        adds_in_place: a block adds to its MLP's output in place.
        norm: `"layer"` or `"rms"`, with `"_plus_one"` behind it where the weight is stored minus one.
        head_act: the activation function of an encoder's prediction head, as a path within the whole model.
        head_gelu: where that is an exact GELU without a module, what comes before it and what comes behind.
        clipped: the config's clip_qkv clips queries, keys and values, behind their norms where they have some.
        multiplied: the config's embedding_multiplier, residual_multiplier and logits_scaling act (Granite).
        softmax_float32: eager attention takes its softmax in float32.
        encoder, post_norm: see `ModelInfo`.
        auto: transformers' class that loads it.
        language: where in a vision-language model the language model is, whose sites these are; `embed` is then what
            it receives, image features among the token embeddings, and paths are relative to it.
        text: the family of that language model; by default the model type of the config's text part.
        variant: what of the row depends on the config: config -> fields that replace those of the row.
        cross: cross-attention, in the decoder of an encoder-decoder model.
        source: the row of its encoder.
        by_column: the position embedding counts columns and cannot be told positions.
    """

    layers: str = "layers"
    embed: str = "embed_tokens"
    pos_embed: str | None = None
    ln1: str | None = "input_layernorm"
    attn: str = "self_attn"
    o: str = "self_attn.o_proj"
    attn_out: str = "self_attn"
    ln2: str | None = "post_attention_layernorm"
    gate: str | None = "mlp.gate_proj"
    up: str | None = "mlp.up_proj"
    act: str | None = "mlp.act_fn"
    down: str | None = "mlp.down_proj"
    mlp_out: str = "mlp"
    router: str | None = None
    experts: str | None = None
    shared_act: str | None = None
    shared_down: str | None = None
    shared_weight: str | None = None
    final: str | None = "norm"
    q: str | None = "self_attn.q_proj"
    k: str | None = "self_attn.k_proj"
    v: str | None = "self_attn.v_proj"
    qkv: str | None = None
    fused: str | None = None
    gate_up: bool = False
    kv_heads: int | None = None
    head_act: str | None = None
    head_gelu: tuple[str, str] | None = None
    clipped: bool = False
    multiplied: bool = False
    rotary: bool = True
    alibi: bool = False
    position_table: bool = False
    position_offset: int = 0
    parallel: bool = False
    adapter: str | None = None
    returns_tuple: bool = False
    adds_in_place: bool = False
    norm: str = "rms"
    softmax_float32: bool = True
    encoder: bool = False
    post_norm: bool = False
    auto: str = "AutoModelForCausalLM"
    language: str | None = None
    text: str | None = None
    cross: Cross | None = None
    source: Family | None = None
    by_column: bool = False
    variant: Callable[[Any], Mapping[str, Any]] | None = None

    def of(self, config: Any) -> Family:
        """The row as it is for one config."""
        return self if self.variant is None else replace(self, **self.variant(config))

    @property
    def plain_qk(self) -> bool:
        """Whether q and k enter attention as they were projected: neither rotary embedding nor norm."""
        return not self.rotary

    @property
    def bounded(self) -> bool:
        """Whether positions run out at `n_ctx`."""
        return self.position_table or self.pos_embed is not None

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of the modules of a block."""
        return tuple(name for name in PARTS if getattr(self, name) is not None)

    @property
    def positions(self) -> str:
        """How positions enter: as rotations, a table of embeddings, or biases of scores."""
        if self.rotary or self.alibi:
            return "alibi" if self.alibi else "rotary"
        return "relative" if self.pos_embed is None else "learned"


def text_config(config: Any, family: Family) -> Any:
    """The config of the model that has the sites: the text part of a vision-language model's."""
    return config if family.language is None else config.text_config


def short_sites(family: Family, parts: Collection[str] | None = None) -> tuple[str, ...]:
    """The short names of the sites that a family has, or a block of it with these parts."""
    parts = family.parts if parts is None else parts
    absent = {
        "pos_embed": family.pos_embed is None,
        "resid_mid": family.parallel or family.post_norm,
        "ln1": "ln1" not in parts,
        "ln1_scale": "ln1" not in parts,
        "ln2": "ln2" not in parts,
        "ln2_scale": "ln2" not in parts,
        "mlp_pre": "gate" not in parts,
        "mlp_pre_linear": "up" not in parts and not family.gate_up,
        "mlp_post": "down" not in parts,
        "router_logits": "router" not in parts,
        "expert_out": "experts" not in parts,
        "ln_final": family.final is None,
        "ln_final_scale": family.final is None,
        "resid_mid_cross": family.cross is None or family.post_norm,
    }
    if family.cross is None:
        absent |= {short: True for short in SITES if of_source(short)}
    if family.source is not None:
        there = [f"encoder_{short}" for short in short_sites(family.source)]
        absent |= {short: short not in there for short in SITES if short.startswith("encoder_")}
    return tuple(short for short in SITES if not absent.get(short, short in OF_DICTIONARIES))


def full_sites(
    family: Family, blocks: Sequence[Collection[str]], source: Sequence[Collection[str]] = ()
) -> tuple[str, ...]:
    """The full names in the order of the forward pass.

    Args:
        family: the row.
        blocks: the parts of each block.
        source: those of each block of the encoder beside a decoder, which comes first.
    """
    encoder = () if family.source is None else _in_order(family.source, source, "encoder_")
    return (*encoder, *_in_order(family, blocks, ""))


def _in_order(family: Family, blocks: Sequence[Collection[str]], prefix: str) -> tuple[str, ...]:
    def specs(parts: Collection[str] | None = None) -> list[SiteSpec]:
        shorts = [prefix + s for s in short_sites(family, parts) if not s.startswith("encoder_")]
        return [SITES[short] for short in shorts if short in SITES]

    ends = [spec for spec in specs() if not spec.layered]
    before = [spec.template for spec in ends if "embed" in spec.short]
    after = [spec.template for spec in ends if "embed" not in spec.short]
    inside = [spec.template.format(l=i) for i, parts in enumerate(blocks) for spec in specs(parts) if spec.layered]
    return (*before, *inside, *after)
