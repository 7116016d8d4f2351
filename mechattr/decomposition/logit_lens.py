"""The logit lens: what the model would predict if the residual stream of some layer were its last."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechattr.decomposition.lens_result import Lens
from mechattr.decomposition.prompt import prompt_of
from mechattr.decomposition.target import Target, Token, columns_of, target_of
from mechattr.decomposition.vocabulary import last_stream, log_probabilities, pieces, read_out, summary
from mechattr.errors import SettingError
from mechattr.models.base import Batch, HookedModel
from mechattr.models.tokenize import decode_token
from mechattr.sites import Node, expand, full_name, parse

if TYPE_CHECKING:
    from mechattr.decomposition.tuned_lens import TunedLens

STREAMS = ("resid_pre", "resid_mid", "resid_post")


def logit_lens(
    model: HookedModel,
    prompt: str | Sequence[str] | Batch,
    *,
    sites: str | Sequence[str] | None = None,
    target: Token | Sequence[Token] | Tensor | None = None,
    foil: Token | Sequence[Token] | Tensor | None = None,
    position: int | None = None,
    k: int = 5,
    tuned: TunedLens | None = None,
) -> Lens:
    """The model's predictions from the residual stream x of each layer:

        p = softmax(unembed(final_norm(x))),

    by the model's own modules: the norm has the scale of x itself, and a soft cap on logits acts. The entry of the last
    stream is the model's prediction, taken from the same run.

    Args:
        model: a hooked model.
        prompt: a text, several, or a batch.
        sites: where the stream is read, among `resid_pre`, `resid_mid` and `resid_post`, by short or full name; by
            default the first block's input and each block's output.
        target: a token that is followed through the layers; or one for each row.
        foil: a token whose logit is subtracted from the target's.
        position: one position, counted from 0 or from the row's end; by default every position.
        k: how many of the likeliest tokens are kept.
        tuned: translators that are applied first; see `mechattr.decomposition.tuned_lens`.

    Returns:
        tables over `site` (such as `"L3 resid_post"`) and `pos`: `score/kl`, KL(p || prediction of the model) in nats;
        `top/token` and `top/probability` [..., rank]; and of a target `score/logit` (minus the foil's),
        `score/probability` and `score/rank`, 1 for the likeliest token.

    Raises:
        AnswerError: a target that is not one token.
        SettingError: a site that is not a residual stream, a position outside a row, a foil without a target, or a
            wrong k.
        MismatchError: translators of another model, or of other sites.

    Cost: 1 forward pass a prompt, and for each site one block and the unembedding. Logits are made in pieces and
    summed up at once: in memory there are those of the model and of one piece.
    """
    rows = prompt_of(model, prompt)
    names = streams(model, sites)
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= model.info.d_vocab:
        raise SettingError(f"k={k!r}", f"a vocabulary of {model.info.d_vocab} tokens", "give a number from 1")
    if target is None and foil is not None:
        raise SettingError(f"foil={foil!r}", "no target from which it is subtracted", "give target=, too")
    if tuned is not None:
        tuned.check(model, names)
    asked = None if target is None else target_of(model, rows, target, foil)
    columns = None if position is None else columns_of(rows, position)
    run = model.run(rows.batch, record=names)
    real = _picked(rows.batch.mask[..., None], columns)
    read = {name: _picked(run.activations[name].values, columns).masked_fill(~real, 0) for name in names}
    tables = _tables(model, read, _picked(run.logits, columns), k, asked, tuned)
    labels = tuple(Node(*parse(name)).label for name in names)
    tensors = {}
    for name, values in tables.items():
        axes = ["site", *(["pos"] if columns is None else []), *(["rank"] if name.startswith("top/") else [])]
        ranks = {"rank": tuple(range(1, k + 1))} if "rank" in axes else {}
        tensors[name] = rows.table(values if columns is None else values[:, :, 0], axes, site=labels, **ranks)
    kept = sorted({token for token in tensors["top/token"].values.flatten().tolist() if token >= 0})
    settings = rows.settings(
        method="logit_lens",
        passes=(len(rows) * (1 + len(names) / model.info.n_layers), 0),
        main="top/probability",
        sites=list(names),
        vocabulary={str(token): decode_token(model.tokenizer, token) for token in kept},
        tuned=None if tuned is None else dict(tuned.settings),
        **{**({} if asked is None else asked.settings()), "position": None if columns is None else columns.tolist()},
    )
    return Lens(tensors, settings=settings, provenance=rows.provenance(model))


def streams(model: HookedModel, sites: str | Sequence[str] | None) -> list[str]:
    """Full names of residual streams, in the order of the forward pass.

    Raises:
        SettingError: a site that is not one.
        UnknownSiteError: a site that the model does not have.
    """
    if sites is None:
        last = [full_name("resid_post", layer) for layer in range(model.info.n_layers)]
        return [full_name("resid_pre", 0), *last]
    names = expand(sites, model.sites())
    other = next((name for name in names if parse(name)[0] not in STREAMS), None)
    if other is not None or not names:
        found = "no sites" if other is None else f"{other} is not a residual stream"
        raise SettingError(f"a lens at {sites!r}", found, f"use {', '.join(STREAMS)}, or token_lens for attention")
    return names


def _picked(x: Float[Tensor, "batch pos ..."], columns: Int[Tensor, " batch"] | None) -> Tensor:
    """Everything, or one column of each row."""
    return x if columns is None else x[torch.arange(len(x), device=x.device), columns][:, None]


def _tables(
    model: HookedModel,
    read: dict[str, Float[Tensor, "batch pos d_model"]],
    final: Float[Tensor, "batch pos d_vocab"],
    k: int,
    target: Target | None,
    tuned: TunedLens | None,
) -> dict[str, Float[Tensor, "batch site pos ..."]]:
    tables: dict[str, Tensor] = {}
    for rows, columns in pieces(*final.shape):
        ids = None if target is None else target.ids[rows]
        foils = None if target is None or target.foils is None else target.foils[rows]
        log_q = log_probabilities(final[rows, columns])
        for place, (name, stream) in enumerate(read.items()):
            x = stream[rows, columns]
            if tuned is not None:
                x = tuned.translate(name, x)
            logits = final[rows, columns] if name == last_stream(model) else read_out(model, x).logits
            for table, values in summary(logits, log_q, k, ids, foils).items():
                if table not in tables:
                    shape = (len(final), len(read), final.shape[1], *values.shape[2:])
                    tables[table] = values.new_zeros(shape)
                tables[table][rows, place, columns] = values
    return tables
