"""Direct logit attribution: the logit as the sum of what each component wrote to the last residual stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from mechattr.artifact import Cache
from mechattr.decomposition.parts import attention_parts, attention_sites
from mechattr.decomposition.prompt import prompt_of
from mechattr.decomposition.readout import Readout, check_additive_stream, readout
from mechattr.decomposition.result import Decomposition
from mechattr.decomposition.target import BEFORE_CAP, Target, Token, target_of
from mechattr.models.base import Batch, HookedModel
from mechattr.sites import full_name


@dataclass(eq=False, slots=True)
class _Shares:
    """Shares in the logit, as they are found from the embedding upward."""

    named: dict[str, Float[Tensor, " batch"]] = field(default_factory=dict)
    heads: list[Float[Tensor, "batch head"]] = field(default_factory=list)
    sources: list[Float[Tensor, "batch head pos"]] = field(default_factory=list)
    neurons: list[Float[Tensor, "batch neuron"]] = field(default_factory=list)


def direct_logit_attribution(
    model: HookedModel,
    prompt: str | Sequence[str] | Batch,
    *,
    target: Token | Sequence[Token] | Tensor,
    foil: Token | Sequence[Token] | Tensor | None = None,
    position: int = -1,
) -> Decomposition:
    """What each component adds to a logit directly, with the scale of the final norm held fixed.

    The last residual stream is a sum of what was written to it, x = sum_c c, and so is the logit:

        logit = sum_c c . u + norm bias + unembedding bias,

    where u is the target's column of the unembedding (minus the foil's) taken back through the final norm at its real
    scale. Norms on what a block writes (Gemma-2) are held fixed in the same way. A soft cap on logits is left out: the
    logit before it is explained.

    Args:
        model: a decoder whose blocks add to the residual stream.
        prompt: a text, several, or a batch.
        target: the token whose logit is explained; or one for each row.
        foil: a token whose logit is subtracted; or one for each row.
        position: where the token is predicted, counted from 0 or, if negative, from the row's end.

    Returns:
        `components`: `embed`, `pos_embed`, heads (`L3H5`), MLPs without their bias (`MLP 3`), biases by layer (`b_O 3`,
        `b_out 3`), `norm bias` and `unembed bias`, where the model has them; they sum to the logit.
        `score/heads` [layer, head]; `score/head_source` [layer, head, pos], which sums to it over source positions;
        `score/neurons` [layer, neuron], which sums to the MLPs (not in a mixture of experts, whose MLP is one
        component with all biases). `settings["logit"]` is what is explained, `settings["remainder"]` what rounding
        leaves of it, `settings["model_logit"]` what the model returned.

    Raises:
        UnsupportedFeatureError: an encoder, or an encoder-decoder model.
        AnswerError: a target that is not one token.
        SettingError: a position outside a row, or another number of targets than rows.

    Cost: 1 forward pass a prompt, which keeps attention patterns and neurons.
    """
    check_additive_stream(model)
    rows = prompt_of(model, prompt)
    asked = target_of(model, rows, target, foil, position)
    run = model.run(rows.batch, record=_sites(model))
    cache = run.activations
    final = asked.at(cache[full_name("resid_post", model.info.n_layers - 1)].values)
    read = readout(model, asked, final)
    shares = _shares(model, cache, asked, read)
    logit = read.of(final) + read.norm_bias + read.head_bias
    values = torch.stack(list(shares.named.values()), 1)
    tensors = {
        "components": rows.table(values, ("component",), component=tuple(shares.named)),
        "score/heads": rows.table(torch.stack(shares.heads, 1), ("layer", "head")),
        "score/head_source": rows.table(torch.stack(shares.sources, 1), ("layer", "head", "pos")),
    }
    if shares.neurons:
        tensors["score/neurons"] = rows.table(torch.stack(shares.neurons, 1), ("layer", "neuron"))
    settings = rows.settings(
        method="direct_logit_attribution",
        passes=(len(rows), 0),
        main="components",
        logit=logit.tolist(),
        remainder=(logit - values.sum(1)).tolist(),
        model_logit=asked.metric(run.logits, rows.batch).tolist(),
        explains=BEFORE_CAP,
        **asked.settings(),
    )
    return Decomposition(tensors, settings=settings, provenance=rows.provenance(model))


def _sites(model: HookedModel) -> list[str]:
    """What is recorded, in the order of the forward pass."""
    layers = range(model.info.n_layers)
    wanted = {"hook_embed", "hook_pos_embed", full_name("resid_post", layers[-1])}
    wanted |= {site for layer in layers for site in attention_sites(model, layer)}
    wanted |= {full_name(short, layer) for layer in layers for short in ("mlp_post", "mlp_out")}
    return [site for site in model.sites() if site in wanted]


def _shares(model: HookedModel, cache: Cache, target: Target, read: Readout) -> _Shares:
    found = _Shares()
    start = read.of(target.at(cache["blocks.0.hook_resid_pre"].values))
    if "hook_pos_embed" in cache:
        found.named["pos_embed"] = read.of(target.at(cache["hook_pos_embed"].values))
    found.named = {"embed": start - sum(found.named.values()), **found.named}
    for layer in range(model.info.n_layers):
        _attention(model, cache, layer, target, read, found)
        if full_name("mlp_out", layer) in cache:
            _mlp(model, cache, layer, target, read, found)
    norm = model.norm("ln_final")
    if norm is not None and norm.bias is not None:
        found.named["norm bias"] = read.norm_bias
    if bool(model.weight("unembed.b_U").any()):
        found.named["unembed bias"] = read.head_bias
    return found


def _attention(model: HookedModel, cache: Cache, layer: int, target: Target, read: Readout, found: _Shares) -> None:
    parts = attention_parts(model, cache, layer)
    pattern = target.at(parts.pattern.transpose(1, 2))  # [batch, head, key]
    each = pattern * parts.along(read.direction).transpose(1, 2)
    found.sources.append(each)
    found.heads.append(each.sum(-1))
    found.named |= {f"L{layer}H{head}": each[:, head].sum(-1) for head in range(each.shape[1])}
    if bool(parts.bias.any()):
        found.named[f"b_O {layer}"] = read.of(target.at(parts.bias))


def _mlp(model: HookedModel, cache: Cache, layer: int, target: Target, read: Readout, found: _Shares) -> None:
    if full_name("mlp_post", layer) not in cache:  # a mixture of experts
        found.named[f"MLP {layer}"] = read.of(target.at(cache[full_name("mlp_out", layer)].values))
        return
    kind = read.direction.dtype
    post = target.at(cache[full_name("mlp_post", layer)].values).to(kind)
    w_out, bias = (model.weight(f"blocks.{layer}.mlp.{name}_out").to(kind) for name in "Wb")
    bias = bias.expand(len(post), -1)
    norm = model.norm(f"blocks.{layer}.ln2_post")
    if norm is not None:  # on what the MLP writes: linear at its real scale
        scale, weight = norm.scale(post @ w_out + bias).to(kind)[:, None], norm.weight.to(kind)
        w_out, post = norm.centre(w_out).to(kind) * weight, post / scale
        bias = norm.centre(bias).to(kind) * weight / scale
        if norm.bias is not None:
            bias = bias + norm.bias.to(kind)
    each = post * (read.direction @ w_out.T)
    found.neurons.append(each)
    found.named[f"MLP {layer}"] = each.sum(-1)
    if bool(bias.any()):
        found.named[f"b_out {layer}"] = read.of(bias)
