"""ALTI-Logit: which token moves a logit, by what attention brings to it and where that came from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from mechattr.artifact import Cache
from mechattr.decomposition.mixing import mixing, of_row
from mechattr.decomposition.parts import AttentionParts, attention_parts, attention_sites
from mechattr.decomposition.prompt import Prompt, prompt_of
from mechattr.decomposition.readout import Readout, check_additive_stream, readout
from mechattr.decomposition.result import Decomposition
from mechattr.decomposition.target import BEFORE_CAP, Target, Token, target_of
from mechattr.errors import SettingError
from mechattr.labelled import Labelled
from mechattr.models.base import Batch, HookedModel
from mechattr.sites import full_name

Include = Literal["attention", "residual", "all"]


def alti_logit(
    model: HookedModel,
    prompt: str | Sequence[str] | Batch,
    *,
    target: Token | Sequence[Token] | Tensor,
    foil: Token | Sequence[Token] | Tensor | None = None,
    position: int = -1,
    include: Include = "attention",
) -> Decomposition:
    """The logit's attention updates, traced to the input tokens.

    With the scale of the final norm held fixed, the logit at position p is a sum of what was written there:

        logit = x^0_p . u + sum_l (sum_j a^l_j + b_O^l . u + MLP^l_p . u) + norm bias + unembedding bias
        a^l_j = sum_h A^lh_pj u_j^lh . u;   tokens = a^1 + sum_(l > 1) a^l M^(l-1),   M^l = C^l M^(l-1)

    where C^l are the contributions of `alti`: position j of block l holds a mixture of tokens, row j of M^(l-1).

    Args:
        model: a decoder whose blocks add to the residual stream.
        prompt: a text, texts or a batch.
        target: the token whose logit is explained; or one for each row.
        foil: a token whose logit is subtracted; or one for each row.
        position: where the token is predicted, counted from 0 or, if negative, from the row's end.
        include: what is given to tokens. `"attention"`, as published; `"residual"`: also x^0_p . u, to the token at p;
            `"all"`: also what MLPs write, as what they read is mixed (row p of M^l; of M^(l-1) where MLP and attention
            read the same stream). The rest stands in the ledger under its own name.

    Returns:
        `tokens` [pos]. `components`: `embed`, by layer `attn 0`, `b_O 0` and `MLP 0`, `norm bias` and `unembed bias`,
        where the model has them; they sum to the logit. `score/per_layer` [layer, pos], a^l, whose sum over layers is
        the baseline that takes a position for its token, and `score/heads` [layer, head, pos], which sums to it.
        `ledger`: `tokens`, `embed`, `MLP`, `b_O`, `norm bias`, `unembed bias`, their sum `logit`, and `remainder`: by
        how much that misses the logit. `settings["logit"]` is what is explained, before any soft cap,
        `settings["model_logit"]` what the model returned.

    Raises:
        UnsupportedFeatureError: an encoder, or an encoder-decoder model.
        AnswerError: a target that is not one token.
        SettingError: a position outside a row, another number of targets than rows, or no such `include`.

    Cost: 1 forward pass a prompt that keeps the attention patterns, and C of all layers but the last for the positions
    that p depends on; with `include="all"` also one row of the last one.

    Source: Ferrando et al. 2023, arXiv:2305.12535.
    """
    if include not in get_args(Include):
        raise SettingError(f"include={include!r}", "no such choice", f"use one of {', '.join(get_args(Include))}")
    check_additive_stream(model)
    rows = prompt_of(model, prompt)
    asked = target_of(model, rows, target, foil, position)
    run = model.run(rows.batch, record=_sites(model))
    final = asked.at(run.activations[full_name("resid_post", model.info.n_layers - 1)].values)
    read = readout(model, asked, final)
    logit = read.of(final) + read.norm_bias + read.head_bias
    embed = read.of(asked.at(run.activations["blocks.0.hook_resid_pre"].values))
    tokens, layers, clipped = _from_above(
        model, run.activations, rows.batch.lengths.tolist(), asked, read, include == "all"
    )
    if include != "attention":
        tokens = tokens + _placed(embed, asked, tokens)
    heads = torch.stack([layer.heads for layer in layers], 1)
    per_layer, none = heads.sum(2), torch.zeros_like(embed)
    components = {"embed": embed}
    for i, layer in enumerate(layers):
        components[f"attn {i}"] = per_layer[:, i].sum(-1)
        components |= {f"{name} {i}": values for name, values in layer.beside.items()}
    ends = {"norm bias": read.norm_bias, "unembed bias": read.head_bias}
    beside = {name: sum((layer.beside.get(name, none) for layer in layers), none) for name in ("MLP", "b_O")}
    given = {"attention": (), "residual": ("embed",), "all": ("embed", "MLP")}[include]
    ledger = {"tokens": tokens.sum(-1), "embed": embed, **beside, **ends} | dict.fromkeys(given, none)
    ledger["logit"] = sum(ledger.values(), none)
    ledger["remainder"] = logit - ledger["logit"]
    tensors = {
        "tokens": rows.table(tokens, ("pos",)),
        "components": _named(rows, "component", components | ends),
        "score/per_layer": rows.table(per_layer, ("layer", "pos")),
        "score/heads": rows.table(heads, ("layer", "head", "pos")),
        "ledger": _named(rows, "entry", ledger),
    }
    settings = rows.settings(
        method="alti_logit",
        passes=(len(rows), 0),
        main="tokens",
        include=include,
        logit=logit.tolist(),
        model_logit=asked.metric(run.logits, rows.batch).tolist(),
        explains=BEFORE_CAP,
        all_clipped_rows=list(clipped),
        **asked.settings(),
    )
    return Decomposition(tensors, settings=settings, provenance=rows.provenance(model))


@dataclass(frozen=True, eq=False, slots=True)
class _Layer:
    """The shares of one block in the logit: what each head brings from each position, and `b_O` and `MLP` if any."""

    heads: Float[Tensor, "batch head pos"]
    beside: dict[str, Float[Tensor, " batch"]]


def _sites(model: HookedModel) -> list[str]:
    """What is recorded, in the order of the forward pass."""
    layers = range(model.info.n_layers)
    wanted = {full_name("resid_post", layers[-1])}
    for layer in layers:
        wanted |= {*attention_sites(model, layer), full_name("mlp_out", layer)}
    return [site for site in model.sites() if site in wanted]


def _from_above(
    model: HookedModel, cache: Cache, lengths: Sequence[int], target: Target, read: Readout, with_mlps: bool
) -> tuple[Float[Tensor, "batch pos"], list[_Layer], list[int]]:
    """The traced updates, each block's shares, and the number of all-clipped rows that were met.

    sum_l a^l M^(l-1) needs no product of matrices from the last layer down: t = a^l + t C^l, of which only the rows
    that t has reached are formed. An MLP's share joins t, at p, where the MLP reads: above its block's C, or below it
    where MLP and attention read the same stream.
    """
    layers: list[_Layer] = []
    tokens = torch.zeros_like(read.of(cache["blocks.0.hook_resid_pre"].values))  # [batch, pos]
    clipped = [0] * len(lengths)
    for layer in reversed(range(model.info.n_layers)):
        parts = attention_parts(model, cache, layer)
        shares = _shares(cache, target, read, parts, layer)
        updates, above = shares.heads.sum(1), tokens
        if with_mlps and "MLP" in shares.beside:
            written = _placed(shares.beside["MLP"], target, tokens)
            updates, above = (updates + written, above) if model.info.parallel else (updates, above + written)
        tokens = updates
        for row, length in enumerate(lengths):
            reached = above[row].nonzero()[:, 0].tolist()
            if reached:
                queries = slice(reached[0], reached[-1] + 1)
                found = mixing(of_row(parts, row, length), queries)
                tokens[row, :length] += above[row, queries] @ found.shares
                clipped[row] += found.n_clipped
        layers.insert(0, shares)
    return tokens, layers, clipped


def _shares(cache: Cache, target: Target, read: Readout, parts: AttentionParts, layer: int) -> _Layer:
    looks = target.at(parts.pattern.transpose(1, 2))  # [batch, head, key]
    heads = looks * parts.along(read.direction).transpose(1, 2)
    beside = {}
    if bool(parts.bias.any()):
        beside["b_O"] = read.of(target.at(parts.bias))
    if (name := full_name("mlp_out", layer)) in cache:
        beside["MLP"] = read.of(target.at(cache[name].values))
    return _Layer(heads, beside)


def _placed(
    values: Float[Tensor, " batch"], target: Target, like: Float[Tensor, "batch pos"]
) -> Float[Tensor, "batch pos"]:
    """Values at the explained positions, zero elsewhere."""
    here = torch.arange(like.shape[1], device=like.device) == target.columns[:, None]
    return values[:, None] * here


def _named(prompt: Prompt, axis: str, values: Mapping[str, Tensor]) -> Labelled:
    return prompt.table(torch.stack(list(values.values()), 1), (axis,), **{axis: tuple(values)})
