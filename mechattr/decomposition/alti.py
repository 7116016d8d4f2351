"""ALTI: how much of each token is in each position of each layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mechattr.decomposition.mixing import mixing, of_row
from mechattr.decomposition.parts import attention_parts, attention_sites
from mechattr.decomposition.prompt import prompt_of
from mechattr.decomposition.result import Decomposition
from mechattr.models.base import Batch, HookedModel


def alti(model: HookedModel, prompt: str | Sequence[str] | Batch, *, rollouts: bool = False) -> Decomposition:
    """Token-to-token contributions: how near the part of each source comes to what attention leaves at a position.

    y_i = sum_j T_i(x_j) + bias_i, T_i(x_j) = sum_h A_ij^h u_j^h + [i = j] x_i
    C_ij = max(0, ||y_i||_1 - ||y_i - T_i(x_j)||_1), each row divided by its sum;   M^l = C^l M^(l-1), M^0 = 1

    MLPs work on each position by itself and mix nothing. A row of C whose contributions are all 0 becomes one-hot at
    the query itself; `settings["all_clipped_rows"]` counts them, prompt by prompt.

    Args:
        model: a hooked model; post-norm encoders, too.
        prompt: a text, texts or a batch.
        rollouts: return M of every layer, not of the last one only.

    Returns:
        `score/alti` [layer, query, key], C of each layer; `score/rollout` [query, key], M of the last one, and with
        `rollouts` `score/rollouts` [layer, query, key]. Every row sums to 1.

    Raises:
        SettingError: no prompt.
        UnsupportedFeatureError: an encoder-decoder model.

    Cost: 1 forward pass a prompt that keeps the attention patterns, and T^2 H d multiplications a layer (half of them
    in a causal model); no tensor of [head, query, key, d_model] is made.

    Source: Ferrando et al. 2022, arXiv:2203.04212.
    """
    asked = prompt_of(model, prompt)
    layers, lengths = range(model.info.n_layers), asked.batch.lengths.tolist()
    sites = [site for layer in layers for site in attention_sites(model, layer)]
    activations = model.run(asked.batch, record=sites).activations
    clipped = [0] * len(asked)
    shares: list[Tensor] = []
    mixed: list[Tensor] = []
    for layer in layers:
        parts = attention_parts(model, activations, layer)
        each = parts.residual.new_zeros(len(asked), *parts.pattern.shape[2:])
        for row, n in enumerate(lengths):
            found = mixing(of_row(parts, row, n))
            each[row, :n, :n] = found.shares
            clipped[row] += found.n_clipped
        shares.append(each)
        mixed.append(each @ mixed[-1] if mixed else each)
    tensors = {
        "score/alti": asked.table(torch.stack(shares, 1), ("layer", "query", "key")),
        "score/rollout": asked.table(mixed[-1], ("query", "key")),
    }
    if rollouts:
        tensors["score/rollouts"] = asked.table(torch.stack(mixed, 1), ("layer", "query", "key"))
    settings = asked.settings(
        method="alti", passes=(len(asked), 0), main="score/rollout", all_clipped_rows=list(clipped)
    )
    return Decomposition(tensors, settings=settings, provenance=asked.provenance(model))
