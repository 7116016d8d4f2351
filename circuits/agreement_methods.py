"""The methods of the agreement benchmark: functions of (model, prompts, targets, foils) -> [prompt, position]."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

import mechattr as ma
from mechattr.decomposition.routes import KINDS

Method = Callable[[Any, Any, Tensor, Tensor], Tensor]
INPUT = "blocks.0.hook_resid_pre"


def gradients(model: Any, batch: Any, targets: Tensor, foils: Tensor) -> tuple[Tensor, Tensor]:
    """The residual stream below the first block, and the gradient of the logit difference there."""

    def difference(logits: Tensor, rows: Any) -> Tensor:
        last = logits[torch.arange(len(logits)), rows.columns(-1)]
        answer, foil = last.gather(1, torch.stack([targets, foils], 1)).T
        return answer - foil

    run = model.run(batch, record=[INPUT], gradients=[INPUT], metric=difference)
    return run.activations[INPUT].values, run.gradients[INPUT].values


def gradient_times_input(model: Any, batch: Any, targets: Tensor, foils: Tensor) -> Tensor:
    """Gradient times input, summed over the stream."""
    x, gradient = gradients(model, batch, targets, foils)
    return (x * gradient).sum(-1)


def gradient_norm(model: Any, batch: Any, targets: Tensor, foils: Tensor) -> Tensor:
    """The L2 norm of the gradient: never negative."""
    return gradients(model, batch, targets, foils)[1].norm(dim=-1)


def lrp(variant: str) -> Method:
    """Relevance of tokens by LRP."""

    def method(model: Any, batch: Any, targets: Tensor, foils: Tensor) -> Tensor:
        return ma.lrp(model, batch, target=targets, foil=foils, variant=variant).tokens.values

    return method


def alti_logit(model: Any, batch: Any, targets: Tensor, foils: Tensor) -> Tensor:
    """What attention writes about the logit difference, rolled out to the tokens."""
    return ma.alti_logit(model, batch, target=targets, foil=foils).tokens.values


def direct(model: Any, batch: Any, targets: Tensor, foils: Tensor) -> Tensor:
    """What heads bring directly from each position to the logit difference, as if it still were the token there."""
    found = ma.direct_logit_attribution(model, batch, target=targets, foil=foils)
    return found.tensors["score/head_source"].sum("layer").sum("head").values


def alti(model: Any, batch: Any, _targets: Tensor, _foils: Tensor) -> Tensor:
    """The tokens in the last position; knows no target."""
    mixed = ma.alti(model, batch).tensors["score/rollout"].values
    return mixed[torch.arange(len(batch)), batch.columns(-1)]


def routes(model: Any, batch: Any, _targets: Tensor, _foils: Tensor) -> Tensor:
    """The sum, over all kept routes from a token to the prediction, of the product of the shares along the route."""
    found = ma.information_flow_routes(model, batch)
    edges = {name: found.column(name) for name in ("batch", "layer", "into", "query", "key", "kind", "weight")}
    here = torch.zeros(batch.tokens.shape, dtype=edges["weight"].dtype)
    here[torch.arange(len(batch)), batch.columns(-1)] = 1.0
    for layer in reversed(range(model.info.n_layers)):
        for into in (1, 0):  # what reaches the stream after the MLP, and then what reaches it after attention
            chosen = (edges["layer"] == layer) & (edges["into"] == into) & (edges["kind"] != KINDS.index("bias"))
            row, query, key, weight = (edges[name][chosen] for name in ("batch", "query", "key", "weight"))
            here = torch.zeros_like(here).index_put((row, key), here[row, query] * weight, accumulate=True)
    return here


def salience(**settings: Any) -> Method:
    """Salience of tokens for the last position; knows no target."""

    def relevance(model: Any, batch: Any, _targets: Tensor, _foils: Tensor) -> Tensor:
        return ma.token_salience(model, batch, **settings).tokens.values

    return relevance


def decompx(model: Any, batch: Any, targets: Tensor, foils: Tensor) -> Tensor:
    """The size of each token's share in the logit difference, without its sign (with it, it is CP-LRP)."""
    return ma.token_salience(model, batch, method="decompx", target=targets, foil=foils).tokens.values


METHODS: Mapping[str, Method] = {
    "CP-LRP": lrp("cp"),
    "AttnLRP": lrp("attn"),
    "ALTI-Logit": alti_logit,
    "direct (heads, no rollout)": direct,
    "ALTI": alti,
    "information flow routes": routes,
    "DecompX, magnitudes": decompx,
    "GlobEnc": salience(method="globenc"),
    "value-weighted norms": salience(method="norms", parts="heads"),
    "attention rollout": salience(method="rollout"),
    "gradient × input": gradient_times_input,
    "gradient norm": gradient_norm,
}
