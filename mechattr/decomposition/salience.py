"""Token salience: one number for each input token, by methods that follow how tokens are mixed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from mechattr.artifact import Cache
from mechattr.decomposition.decompx import decompx_vectors
from mechattr.decomposition.lengths import MATRICES, sites_of
from mechattr.decomposition.lrp import lrp
from mechattr.decomposition.prompt import Prompt, prompt_of
from mechattr.decomposition.result import Decomposition
from mechattr.decomposition.target import Token, columns_of
from mechattr.errors import SettingError, UnknownNameError, nearest
from mechattr.labelled import Labelled
from mechattr.models.base import Batch, HookedModel

METHODS = ("decompx", "globenc", "rollout", "norms")
PARTS = ("heads", "sum", "residual", "norm")
_MIXES = ("rollout", "globenc", "residual", "norm")  # kinds whose matrices hold what passes by, and can be multiplied


def token_salience(
    model: HookedModel,
    prompt: str | Sequence[str] | Batch,
    *,
    method: Literal["decompx", "globenc", "rollout", "norms"] = "globenc",
    target: Token | Sequence[Token] | Tensor | None = None,
    foil: Token | Sequence[Token] | Tensor | None = None,
    position: int = -1,
    parts: Literal["heads", "sum", "residual", "norm"] = "norm",
    normalise: bool = False,
    aggregate: Literal["rollout", "mean"] | None = None,
    layers: bool = False,
) -> Decomposition:
    """How much each input token counts at a position; never negative.

    With u_j^h = v_j^h W_O^h what head h moves from j, and A its pattern, the matrix of a block is

        rollout    mean_h A_ij^h / 2 + [i = j] / 2
        norms      ||sum_h A_ij^h u_j^h + [i = j] x_i||, through the norms behind attention; see `parts`
        globenc    the same through both norms of a post-norm block (BERT); without them, the parts as they are

    and tokens have row `position` of the product of all blocks, the last block's first, or of their mean. `decompx`
    is no product: with a target it is the size of each token's share in the logit, as CP-LRP finds it (`score/share`
    keeps its sign); without one the length of each token's vector in the last stream (see `decompx_vectors`).

    Args:
        model: a hooked model.
        prompt: a text, texts, or a batch.
        method: see above.
        target, foil: of `decompx`; see `lrp`. The others know no target.
        position: whose row is read, counted from 0 or, if negative, from the row's end.
        parts: of `norms`: `"heads"` is sum_h ||A u||, `"sum"` ||sum_h A u||, `"residual"` adds x_i where i = j,
            `"norm"` goes through the norms behind attention too.
        normalise: divide the rows of each matrix by their sum; those of rollout sum to 1 anyway.
        aggregate: `"rollout"` multiplies the matrices, `"mean"` averages them; by default the first where they hold the
            stream that passes by.
        layers: keep the matrices as `score/layers` [layer, query, key].

    Returns:
        `tokens` [pos]; with `decompx` and a target `score/share`, `components` and `ledger` of `lrp`.

    Raises:
        UnknownNameError: no such method, kind of parts or aggregate.
        SettingError: a target or settings that the method does not know; a position outside a row.
        UnsupportedFeatureError: an encoder-decoder model, or a site that a backend does not have.

    Cost:
        1 forward pass that keeps patterns; `decompx` 1 forward and 1 backward pass, or without a target as much as a
        forward pass for each token. Lengths come from Gram matrices of heads: no vector is formed for a pair of
        positions.

    References:
        Abnar and Zuidema (2020), Quantifying Attention Flow in Transformers, arXiv 2005.00928 (rollout).
        Kobayashi et al. (2020), Attention is Not Only a Weight; (2021) Incorporating Residual and Normalization Layers
        into Analysis of Masked Language Models (norms).
        Modarressi et al. (2022), GlobEnc; (2023), DecompX.
    """
    _check(method, target, foil, parts, aggregate)
    given = prompt_of(model, prompt)
    columns = columns_of(given, position)
    if method == "decompx":
        return _decompx(model, prompt, given, target, foil, position)
    kind = parts if method == "norms" else method
    cache = model.run(given.batch, record=sites_of(model, kind)).activations
    how = aggregate or ("rollout" if kind in _MIXES else "mean")
    tokens, kept = _aggregate(model, cache, kind, columns, how, normalise=normalise, layers=layers)
    tensors = {"tokens": given.table(tokens, ("pos",))}
    if layers:
        tensors["score/layers"] = given.table(torch.stack(kept, 1), ("layer", "query", "key"))
    settings = given.settings(
        method="token_salience",
        passes=(len(given), 0),
        main="tokens",
        salience=method,
        parts=parts if method == "norms" else None,
        aggregate=how,
        normalise=normalise,
        position=columns.tolist(),
    )
    return Decomposition(tensors, settings=settings, provenance=given.provenance(model))


def _check(method: str, target: Any, foil: Any, parts: str, aggregate: str | None) -> None:
    for asked, name, known in (("method", method, METHODS), ("parts", parts, PARTS)):
        if name not in known:
            raise UnknownNameError(f"{asked} {name!r}", "no such one", nearest(str(name), known))
    if aggregate not in (None, "rollout", "mean"):
        raise UnknownNameError(f"aggregate {aggregate!r}", "no such one", nearest(str(aggregate), ("rollout", "mean")))
    if method != "decompx" and (target is not None or foil is not None):
        found = f"{method} follows how tokens are mixed, whatever is predicted"
        raise SettingError("a target of token_salience", found, "leave target out, or use method='decompx' or ma.lrp")
    if foil is not None and target is None:
        raise SettingError("a foil of token_salience", "no target", "give target, too")


def _aggregate(
    model: HookedModel, cache: Cache, kind: str, columns: Tensor, how: str, *, normalise: bool, layers: bool
) -> tuple[Float[Tensor, "batch key"], list[Tensor]]:
    """The row of a position, and the matrices if they are wanted, those of low blocks first."""
    rows, row, kept, total = torch.arange(len(columns), device=columns.device), None, [], None
    for layer in reversed(range(model.info.n_layers)):
        matrix = MATRICES[kind](model, cache, layer)
        if normalise:
            matrix = matrix / matrix.sum(-1, keepdim=True)
        here = matrix[rows, columns]
        row = here if row is None or how == "mean" else (row[:, None] @ matrix)[:, 0]
        total = row if total is None or how == "rollout" else total + row
        kept += [matrix] if layers else []
    assert total is not None  # a model has blocks
    return (total / model.info.n_layers if how == "mean" else total), kept[::-1]


def _decompx(
    model: HookedModel,
    prompt: str | Sequence[str] | Batch,
    given: Prompt,
    target: Any,
    foil: Any,
    position: int,
) -> Decomposition:
    if target is None:
        vectors = decompx_vectors(model, given.batch).sel(layer=model.info.n_layers).values[:, :-1]
        columns = columns_of(given, position).to(vectors.device)
        tokens = vectors[torch.arange(len(vectors)), :, columns].norm(dim=-1)
        settings = given.settings(
            method="token_salience",
            passes=(float(len(given) + int(given.batch.lengths.sum())), 0.0),
            main="tokens",
            salience="decompx",
            position=columns.tolist(),
        )
        tensors = {"tokens": given.table(tokens.to(given.batch.device), ("pos",))}
        return Decomposition(tensors, settings=settings, provenance=given.provenance(model))
    found = lrp(model, prompt, target=target, foil=foil, position=position)
    shares: Labelled = found.tokens
    tensors = {"tokens": abs(shares), "score/share": shares, "components": found.components, "ledger": found.ledger}
    settings = {**found.settings, "method": "token_salience", "salience": "decompx"}
    return Decomposition(tensors, settings=settings, provenance=found.provenance)
