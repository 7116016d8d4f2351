"""Log-probabilities of texts behind their prompts, token by token, for many texts of different lengths."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from mechattr.errors import SettingError, UnsupportedFeatureError
from mechattr.models.base import Batch, HookedModel
from mechattr.models.halving import Halving
from mechattr.models.tokenize import encode, pad
from mechattr.steering.numbers import check_count

# A text, or its tokens as ids: what a model generated need not come back from its text.
Text = str | Sequence[int]
NUMBERS = 2**24  # most logits that are held a second time


def check_causal(model: HookedModel, asked: str) -> None:
    """Whether a model predicts next tokens.

    Raises:
        UnsupportedFeatureError: it has an encoder.
    """
    if model.info.encoder or model.info.n_encoder_layers:
        raise UnsupportedFeatureError(asked, f"{model.info.name!r} has an encoder", "use a causal language model")


def token_rows(model: HookedModel, texts: Sequence[Text], prompts: Sequence[Text] | None = None) -> list[list[int]]:
    """The ids of texts, each right behind its prompt where there are prompts; an empty text has only those of its
    prompt, or the special token that every text begins with.

    Raises:
        SettingError: no texts, something else than texts or ids, not one prompt a text, a text and a prompt of which
            one has ids, an id that the model does not know, or no tokenizer.
    """
    if not hasattr(texts, "__len__"):
        raise SettingError("texts", f"a {type(texts).__name__}", "give a list of texts")
    if isinstance(texts, str) or not len(texts):
        raise SettingError("texts", "one text" if isinstance(texts, str) else "none", "give a list of texts")
    if prompts is not None and (isinstance(prompts, str) or len(prompts) != len(texts)):
        count = "one text" if isinstance(prompts, str) else f"{len(prompts)} for {len(texts)} texts"
        raise SettingError("prompts", count, "give one prompt for each text")
    if prompts is None:
        return [_ids(model, text, i) for i, text in enumerate(texts)]
    found: list[list[int]] = []
    for i, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        if isinstance(prompt, str) != isinstance(text, str):
            raise SettingError(f"text {i}", "ids behind a text, or a text behind ids", "give both as texts or as ids")
        both = prompt + text if isinstance(prompt, str) and isinstance(text, str) else [*prompt, *text]
        found.append(_ids(model, both, i))
    return found


def starts_of(rows: Sequence[Sequence[int]], prompts: Sequence[Sequence[int]]) -> list[int]:
    """Where each row's text begins: behind the tokens that it shares with its prompt."""
    found = []
    for row, prompt in zip(rows, prompts, strict=True):
        same = (a == b for a, b in zip(row, prompt, strict=False))
        found.append(next((i for i, equal in enumerate(same) if not equal), min(len(row), len(prompt))))
    return found


def batch_of(model: HookedModel, rows: Sequence[Sequence[int]]) -> Batch:
    """Rows of ids, padded, on the model's device."""
    return pad(rows, None, device=model.weight("embed.W_E").device)


def by_length(rows: Sequence[Sequence[int]]) -> list[int]:
    """The numbers of rows, longest first, so that rows of a batch have little padding and memory runs out early."""
    return sorted(range(len(rows)), key=lambda i: -len(rows[i]))


def token_log_probabilities(
    model: HookedModel, rows: Sequence[Sequence[int]], starts: Sequence[int], *, batch_size: int = 32
) -> list[Float[Tensor, " token"]]:
    """log p(token | tokens before it) of each row's tokens from its start on, in nats, in float32 or wider.

    The first token of a row is predicted by nothing, so it is left out; a row that ends before its start has none.

    Args:
        model: a causal language model.
        rows: ids.
        starts: a position for each row.
        batch_size: rows of a forward pass, of similar lengths; halved when memory runs out.

    Cost:
        1 forward pass a row. Of the logits, at most 2²⁴ are held a second time.
    """
    check_count("batch_size", batch_size)
    order = [i for i in by_length(rows) if len(rows[i]) > max(starts[i], 1)]

    def scores(part: Sequence[int]) -> list[Tensor]:
        batch = batch_of(model, [rows[i] for i in part])
        first = torch.tensor([max(starts[i], 1) for i in part], device=batch.device)
        return list(picked_log_probabilities(model.run(batch).logits, batch, first))

    found = dict(zip(order, Halving(batch_size)(order, scores), strict=True))
    weight = model.weight("embed.W_E")
    nothing = weight.new_zeros(0, dtype=torch.promote_types(weight.dtype, torch.float32))
    return [found.get(i, nothing) for i in range(len(rows))]


def picked_log_probabilities(
    logits: Float[Tensor, "row pos d_vocab"], batch: Batch, starts: Tensor
) -> tuple[Float[Tensor, " token"], ...]:
    """For each row, log p of its tokens at and behind its position `starts`, which is at least 1."""
    where, column = (batch.positions >= starts[:, None]).nonzero(as_tuple=True)
    step = max(1, NUMBERS // logits.shape[-1])
    parts = []
    for begin in range(0, len(where), step):
        r, c = where[begin : begin + step], column[begin : begin + step]
        x = logits[r, c - 1]  # the token in column c is predicted one column before it
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        parts.append(x.gather(1, batch.tokens[r, c][:, None])[:, 0] - x.logsumexp(-1))
    counts: list[int] = torch.bincount(where, minlength=len(batch)).tolist()
    return torch.cat(parts).split(counts)


def _ids(model: HookedModel, text: Text, number: int) -> list[int]:
    if isinstance(text, str):
        if model.tokenizer is None:
            raise SettingError(
                f"text {number}", "this model has no tokenizer", "give ids, or load it with tokenizer=..."
            )
        return encode(model.tokenizer, text)
    ids = list(text) if isinstance(text, Iterable) else [text]
    n = model.info.d_vocab
    if any(isinstance(i, bool) or not isinstance(i, int) or i not in range(n) for i in ids):
        raise SettingError(f"text {number}", f"{ids!r:.60}", f"give a text, or ids from 0 to {n - 1}")
    return ids
