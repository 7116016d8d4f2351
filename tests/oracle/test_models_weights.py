"""Weights and norms of every family: what a site holds follows from the site before it and `model.weight` alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import families
import pytest
import torch
from torch import Tensor

from mechattr.models import Batch, HookedHF
from mechattr.sites import parse

Weights = Callable[[str], Tensor]


def faults(model: HookedHF, weight: Weights | None = None) -> dict[str, float]:
    """The largest difference at each site between what was recorded and what the weights give, relative to 1.

    Everything is in float64, norms and softmaxes of transformers included.
    """
    w, info, config = weight or model.weight, model.info, model.config
    batch = Batch.of(families.tokens(2, 6))
    shorts = {parse(name)[0] for name in model.sites()}
    with families.widened():
        run = model.run(batch, record=[*(shorts - {"expert_out", "router_logits"})])
    found: dict[str, float] = {}

    def check(short: str, wanted: Tensor, layer: int | None = None) -> None:
        seen = run.activations[short if layer is None else (short, layer)].values
        found[short if layer is None else f"{short} {layer}"] = float((seen - wanted).abs().max())

    check("embed", w("embed.W_E")[batch.tokens])
    if not info.encoder:
        norm, last = model.norm("ln_final"), run.activations["resid_post", info.n_layers - 1].values
        assert norm is not None
        check("ln_final", norm.centre(last) / norm.scale(last)[..., None] * w("ln_final.w") + w("ln_final.b"))
        logits = run.activations["ln_final"].values @ w("unembed.W_U") + w("unembed.b_U")
        cap = getattr(config, "final_logit_softcapping", None)
        found["logits"] = float((run.logits - (logits if cap is None else cap * torch.tanh(logits / cap))).abs().max())
    if "pos_embed" in shorts:
        places = w("pos_embed.W_pos")[: batch.tokens.shape[1]]
        check("pos_embed", places.expand_as(run.activations["pos_embed"].values))
    clip = getattr(config, "clip_qkv", None) or float("inf")
    for layer in range(info.n_layers):
        p = f"blocks.{layer}."
        at = {parse(name)[0]: x.values for name, x in run.activations.items() if parse(name)[1] == layer}
        stream = at["resid_pre"] if info.parallel or info.post_norm else at["resid_mid"]
        if not info.post_norm:
            for ln, x in (("ln1", at["resid_pre"]), ("ln2", stream)):
                norm = model.norm(p + ln)
                assert norm is not None or ln not in at
                if norm is not None and ln in at:  # a parallel block may have one norm for both
                    check(ln, norm.centre(x) / norm.scale(x)[..., None] * w(p + ln + ".w") + w(p + ln + ".b"), layer)
        read = at["ln1"] if "ln1" in at and not info.post_norm else at["resid_pre"]
        for kind in "qkv":
            x = torch.einsum("bpd,hde->bphe", read, w(f"{p}attn.W_{kind.upper()}")) + w(f"{p}attn.b_{kind.upper()}")
            check(kind, x.clamp(-clip, clip) if kind == "v" else x, layer)
        result = torch.einsum("bphe,hed->bphd", at["z"], w(p + "attn.W_O"))
        check("result", result, layer)
        if not info.write_norm:
            check("attn_out", result.sum(2) + w(p + "attn.b_O"), layer)
        if info.n_experts:
            continue
        read = at["ln1"] if info.post_norm else at.get("ln2", at["ln1"] if info.parallel else stream)
        for short, part in (("mlp_pre", "gate" if info.gated else "in"), ("mlp_pre_linear", "in")):
            if short in at:
                check(short, read @ w(f"{p}mlp.W_{part}") + w(f"{p}mlp.b_{part}"), layer)
        if not info.write_norm:
            check("mlp_out", at["mlp_post"] @ w(p + "mlp.W_out") + w(p + "mlp.b_out"), layer)
    return {name: size for name, size in found.items() if size > 1e-10}  # rounding in float64 of numbers up to 100


@pytest.mark.parametrize("family", families.FAMILIES)
def test_every_site_follows_from_the_one_before_and_the_weights(family: str) -> None:
    assert faults(families.hooked(family, torch.float64)) == {}


def raw(path: str) -> Callable[[HookedHF], Tensor]:
    """A parameter as it is stored, transposed if it is a matrix."""
    return lambda model: model.model.get_parameter(path).detach().mT


# family, weight, what someone might take for it, and the sites at which that shows
WRONG: dict[str, tuple[str, str, Callable[[HookedHF], Any], set[str]]] = {
    "embeddings before their multiplier": (
        "granite",
        "embed.W_E",
        lambda m: m.model.model.embed_tokens.weight.detach(),
        {"embed"},
    ),
    "writes before their multiplier": (
        "granite",
        "blocks.1.mlp.W_out",
        raw("model.layers.1.mlp.down_proj.weight"),
        {"mlp_out 1"},
    ),
    "logits before their divisor": ("granite", "unembed.W_U", raw("lm_head.weight"), {"logits"}),
    "a norm's weight without the one": (
        "nemotron",
        "blocks.0.ln2.w",
        lambda m: m.model.model.layers[0].post_attention_layernorm.weight.detach(),
        {"ln2 0"},
    ),
    "gate and up exchanged": ("glm", "blocks.0.mlp.W_gate", lambda m: m.weight("blocks.0.mlp.W_in"), {"mlp_pre 0"}),
    "key and value exchanged": (
        "gpt_bigcode",
        "blocks.0.attn.W_K",
        lambda m: m.weight("blocks.0.attn.W_V"),
        {"k 0"},
    ),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_control_a_wrong_weight_shows_where_it_acts(mistake: str) -> None:
    family, name, taken, shows = WRONG[mistake]
    model = families.hooked(family, torch.float64)
    wrong = taken(model)
    assert set(faults(model, lambda asked: wrong if asked == name else model.weight(asked))) == shows
