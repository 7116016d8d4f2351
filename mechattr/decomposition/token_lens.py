"""The token lens: what attention brings from chosen source tokens, read as tokens of the vocabulary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from mechattr.artifact import Cache
from mechattr.decomposition.lens_result import Lens
from mechattr.decomposition.parts import attention_parts, attention_sites
from mechattr.decomposition.prompt import Prompt, prompt_of
from mechattr.decomposition.readout import check_additive_stream
from mechattr.decomposition.target import BEFORE_CAP, Target, Token, columns_of, target_of
from mechattr.decomposition.vocabulary import last_stream, pieces
from mechattr.errors import SettingError, UnknownNameError, nearest
from mechattr.models.base import Batch, HookedModel
from mechattr.models.tokenize import decode_token
from mechattr.sites import full_name

Scale = Literal["frozen", "own"]


def token_lens(
    model: HookedModel,
    prompt: str | Sequence[str] | Batch,
    *,
    target: Token | Sequence[Token] | Tensor,
    foil: Token | Sequence[Token] | Tensor | None = None,
    position: int = -1,
    sources: Mapping[str, Sequence[int]] | None = None,
    norm: Scale = "frozen",
    k: int = 5,
) -> Lens:
    """What each block's attention moves from source tokens S to the explained position, decoded:

        u_S = sum_{j in S} sum_h A_pj^h v_j^h W_O^h,    logits = (w * c(u_S) / s) W_U,

    with c the centring of the final norm (none for an RMSNorm), w its weight and s its scale.

    Args:
        model: a decoder whose blocks add to the residual stream.
        prompt: a text, several, or a batch.
        target: the token whose logit is reported; or one for each row.
        foil: a token whose logit is subtracted; or one for each row.
        position: where attention writes, counted from 0 or, if negative, from the row's end.
        sources: positions by name, such as `{"subject": [3, 4]}`; by default every position for itself.
        norm: `"frozen"`, s of the last stream, so that decoded vectors add up to the logit; `"own"`, s of u_S,
            which shows the direction of small updates.
        k: how many of the most promoted tokens are kept.

    Returns:
        `score/source` [layer, pos] (of named sources [layer, source]), the target's logit; likewise of the whole of
        what attention and MLP write, `score/attention` and `score/mlp` [layer], and of the output bias, `score/bias`;
        `top/token` and `top/logit` [layer, pos, rank]. With `norm="frozen"` sources that have each position once sum to
        `score/attention - score/bias`.

    Raises:
        UnsupportedFeatureError: an encoder, or an encoder-decoder model.
        AnswerError: a target that is not one token.
        UnknownNameError: another `norm`.
        SettingError: a position outside a row, no sources, or a wrong k.

    Cost: 1 forward pass a prompt, and the unembedding of each source in each layer.
    """
    check_additive_stream(model, "decoded updates")
    if norm not in get_args(Scale):
        raise UnknownNameError(f"norm={norm!r}", "no such scale", nearest(norm, get_args(Scale)))
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= model.info.d_vocab:
        raise SettingError(f"k={k!r}", f"a vocabulary of {model.info.d_vocab} tokens", "give a number from 1")
    rows = prompt_of(model, prompt)
    asked = target_of(model, rows, target, foil, position)
    members = _members(rows, sources)
    layers = range(model.info.n_layers)
    wanted = {last_stream(model), *(full_name("mlp_out", layer) for layer in layers)}
    wanted |= {site for layer in layers for site in attention_sites(model, layer)}
    cache = model.run(rows.batch, record=[site for site in model.sites() if site in wanted]).activations
    reader = _Reader(model, asked, None if norm == "own" else asked.at(cache[last_stream(model)].values))
    found: dict[str, list[Tensor]] = {}
    for layer in layers:
        for name, values in _layer(model, cache, layer, asked, members, reader, k).items():
            found.setdefault(name, []).append(values)
    over = "pos" if sources is None else "source"
    coords = {} if sources is None else {"source": tuple(sources)}
    tensors = {}
    for name, parts in found.items():
        values, axes = torch.stack(parts, 1), ["layer", over, "rank"][: parts[0].ndim]
        ranks = {"rank": tuple(range(1, k + 1))} if "rank" in axes else {}
        tensors[name] = rows.table(values, axes, **ranks, **(coords if over in axes else {}))
    kept = sorted({token for token in tensors["top/token"].values.flatten().tolist() if token >= 0})
    settings = rows.settings(
        method="token_lens",
        passes=(len(rows), 0),
        main="score/source",
        norm=norm,
        explains=BEFORE_CAP,
        sources=None
        if sources is None
        else {name: [int(place) for place in places] for name, places in sources.items()},
        vocabulary={str(token): decode_token(model.tokenizer, token) for token in kept},
        **asked.settings(),
    )
    return Lens(tensors, settings=settings, provenance=rows.provenance(model))


class _Reader:
    """Vectors of the residual stream as logits, without biases."""

    def __init__(self, model: HookedModel, target: Target, final: Float[Tensor, "batch d_model"] | None) -> None:
        self.norm = model.norm("ln_final")
        self.direction = target.direction(model)
        self.unembedding = model.weight("unembed.W_U").to(self.direction.dtype)
        self.scale = None if self.norm is None or final is None else self.norm.scale(final)[:, None, None]

    def normed(self, x: Float[Tensor, "batch some d_model"]) -> Float[Tensor, "batch some d_model"]:
        """Through the final norm, at the frozen scale or its own, without the norm's bias."""
        if self.norm is None:
            return x.to(self.direction.dtype)
        scale = self.norm.scale(x)[..., None] if self.scale is None else self.scale
        return (self.norm.centre(x) * self.norm.weight / scale).to(self.direction.dtype)

    def of(self, x: Float[Tensor, "batch some d_model"]) -> Float[Tensor, "batch some"]:
        """The target's logit, minus the foil's."""
        return einsum(self.normed(x), self.direction, "b s d, b d -> b s")

    def top(self, x: Float[Tensor, "batch some d_model"], k: int) -> tuple[Tensor, Tensor]:
        """The k largest logits and their tokens, [batch, some, k]."""
        y = self.normed(x)
        values, tokens = y.new_zeros(*y.shape[:2], k), torch.zeros(*y.shape[:2], k, dtype=torch.long, device=y.device)
        for rows, some in pieces(len(y), y.shape[1], self.unembedding.shape[1]):
            values[rows, some], tokens[rows, some] = (y[rows, some] @ self.unembedding).topk(k)
        return values, tokens


def _layer(
    model: HookedModel,
    cache: Cache,
    layer: int,
    target: Target,
    members: Float[Tensor, "batch source key"] | None,
    reader: _Reader,
    k: int,
) -> dict[str, Tensor]:
    parts = attention_parts(model, cache, layer)
    v = parts.v.repeat_interleave(len(parts.w_o) // parts.v.shape[2], 2)
    moved = einsum(target.at(parts.pattern.transpose(1, 2)), v, "b h k, b k h e -> b k h e")
    u = einsum(moved, parts.w_o, "b k h e, h e d -> b k d")
    if members is not None:
        u = einsum(members.to(u.dtype), u, "b s k, b k d -> b s d")
    values, tokens = reader.top(u, k)
    found = {"score/source": reader.of(u), "top/token": tokens, "top/logit": values}
    whole = {"attention": parts.whole - parts.residual, "bias": parts.bias}
    if full_name("mlp_out", layer) in cache:
        whole["mlp"] = cache[full_name("mlp_out", layer)].values
    return found | {f"score/{name}": reader.of(target.at(x)[:, None])[:, 0] for name, x in whole.items()}


def _members(rows: Prompt, sources: Mapping[str, Sequence[int]] | None) -> Float[Tensor, "batch source key"] | None:
    """Which positions each source has, row by row."""
    if sources is None:
        return None
    named = isinstance(sources, Mapping) and sources
    if not named or not all(isinstance(places, Sequence | Tensor) and len(places) for places in sources.values()):
        raise SettingError(f"sources={sources!r}", "no positions by name", 'name some, such as {"subject": [3, 4]}')
    found = torch.zeros(len(rows), len(sources), rows.batch.tokens.shape[1], device=rows.batch.device)
    each = torch.arange(len(rows), device=found.device)
    for place, positions in enumerate(sources.values()):
        for position in positions:
            found[each, place, columns_of(rows, position)] = 1
    return found
