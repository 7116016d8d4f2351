"""The supported families of transformers models, and what was verified of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mechattr.errors import UnsupportedModelError, nearest
from mechattr.models.families import FAMILIES
from mechattr.models.families.family import Family, short_sites
from mechattr.sites import OF_DICTIONARIES, SITES, of_source

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
EXPERT_SITES = ("router_logits", "expert_out")

_STATE_SPACE = (
    "its blocks, or some of them, are recurrent: a state space in place of attention over earlier positions",
    "use a transformer; sites of attention (q, k, v, pattern, z) do not exist there",
)
# Families that no row can describe: what was found, and what to do.
REFUSED: dict[str, tuple[str, str]] = {
    **dict.fromkeys(
        ("mamba", "mamba2", "falcon_mamba", "rwkv", "recurrent_gemma", "jamba", "bamba", "zamba", "zamba2", "xlstm",
         "falcon_h1", "granitemoehybrid", "nemotron_h", "qwen3_next", "qwen3_5", "qwen3_5_text", "qwen3_5_moe",
         "qwen3_5_moe_text", "olmo_hybrid", "kimi_linear", "minimax", "lfm2", "lfm2_moe"),
        _STATE_SPACE,
    ),
    "albert": ("all its layers are one block, so that a site cannot tell them apart", "use bert or roberta"),
    "mpt": ("its attention does not go through transformers' interface", "use bloom or falcon, which have ALiBi too"),
}  # fmt: skip


def check_known(name: str) -> None:
    """Whether a family may be supported.

    Raises:
        UnsupportedModelError: no row can describe it.
    """
    if name in REFUSED:
        found, fix = REFUSED[name]
        raise UnsupportedModelError(f"a hooked model of family {name!r}", found, fix)


def family_of(config: Any) -> tuple[str, Family]:
    """The table row of a transformers config, after the options that no row can describe were checked.

    Raises:
        UnsupportedModelError: no row, or an option under which the sites would not be what their names say.
    """
    name = config.model_type
    if name in FAMILIES and FAMILIES[name].language is not None:
        return name, _language_model(name, config)
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
        "apply_residual_connection_post_layernorm": "its residual stream is what norms return",
        "slow_but_exact": "it does not call the output projections as modules",
        "mlp_only_layers": "blocks without experts among blocks with experts",
        "use_bidirectional_attention": "attention looks ahead",
    }
    for option, reason in refused.items():
        if reason and getattr(config, option, False):
            value = getattr(config, option)
            raise UnsupportedModelError(
                f"a hooked {name} model with {option}={value}", reason, f"use a model without {option}"
            )
    if getattr(config, "decoder_sparse_step", 1) != 1:
        step = config.decoder_sparse_step
        raise UnsupportedModelError(
            f"a hooked {name} model with decoder_sparse_step={step}", refused["mlp_only_layers"], "use another model"
        )
    if name == "opt" and (not config.do_layer_norm_before or config.word_embed_proj_dim != config.hidden_size):
        raise UnsupportedModelError(
            "a hooked opt model", "norms after the blocks, or projected embeddings (OPT-350m)", "use another OPT size"
        )
    if name == "electra" and config.embedding_size != config.hidden_size:
        raise UnsupportedModelError(
            "a hooked electra model", "projected embeddings", "use a size with embedding_size equal to hidden_size"
        )
    if FAMILIES[name].source is not None:
        _check_stacks(config)
    return name, FAMILIES[name].of(config)


def _check_stacks(config: Any) -> None:
    """Whether encoder and decoder have the same shapes, which sites and weights are described by.

    Raises:
        UnsupportedModelError: they have not.
    """
    for what in ("attention_heads", "ffn_dim"):
        encoder, decoder = (getattr(config, f"{stack}_{what}", None) for stack in ("encoder", "decoder"))
        if encoder != decoder:
            raise UnsupportedModelError(
                f"a hooked {config.model_type} model",
                f"encoder_{what}={encoder} and decoder_{what}={decoder}",
                "use a model whose encoder and decoder have the same shapes",
            )


def _language_model(name: str, config: Any) -> Family:
    """The row of the language model inside a vision-language model, placed where that model has it."""
    outer = FAMILIES[name]
    inside, row = (outer.text, FAMILIES[outer.text]) if outer.text else family_of(config.text_config)
    if row.auto != "AutoModelForCausalLM":
        found = f"its language model is of family {inside!r}, which is no decoder"
        raise UnsupportedModelError(f"a hooked {name} model", found, "use one whose language model is a decoder")
    return replace(row, language=outer.language, text=inside, auto=outer.auto)


def table() -> list[dict[str, Any]]:
    """One row a family for `mechattr models`: its sites, what is particular about it, and what was verified.

    `verified` lists keys of `VERIFIED`, with the release of transformers that they were tested with.
    """
    rows = []
    for name, family in FAMILIES.items():
        sites = short_sites(family)
        expected = [
            s
            for s in SITES
            if (family.experts is not None or s not in EXPERT_SITES)
            and (family.cross is not None or not of_source(s))
            and s not in OF_DICTIONARIES
        ]
        checks = [check for check in VERIFIED if not (family.encoder and check == "generation")]
        rows.append(
            {
                "family": name,
                "kind": ("encoder" if family.encoder else "decoder" if family.source is None else "encoder-decoder")
                + " of experts" * (family.experts is not None),
                "norm": family.norm.replace("_plus_one", ""),
                "positions": family.positions,
                "sites": len(sites),
                "absent": ", ".join(s for s in expected if s not in sites) or "none",
                "verified": f"{', '.join(checks)} (transformers {TESTED_TRANSFORMERS})",
            }
        )
    return rows


__all__ = ["FAMILIES", "TESTED_TRANSFORMERS", "VERIFIED", "family_of", "table"]
