"""Token alignment: pairs of texts -> pairs of token rows of equal length, answers as token ids, spans as positions.

1. Both prompts are tokenised by the model's own tokenizer and must have the same number of tokens.
2. An answer's tokens are those that follow the prompt's own when both are tokenised together, so an answer that merges
   with the end of the prompt is refused instead of being scored as a token that never stands there. An encoder-decoder
   model answers in a text of its own, of which they are the first tokens.
3. Character spans become position spans through the tokenizer's offsets; a span that begins or ends inside a token is
   refused, and so is one that is on other positions in the corrupt prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mechattr.errors import SettingError
from mechattr.models.base import HookedModel
from mechattr.models.images import RowImages
from mechattr.tasks import misfits
from mechattr.tasks.misfits import Misfit
from mechattr.tasks.pairtext import Answer, PairText, Span, members

SEQUENCE = "sequence_log_probability"
_SET_METRICS = frozenset({"probability_difference", "kl_divergence"})
_NO_SPACE_AFTER = tuple(",.;:!?)")
_ANCHOR = ":"  # stands before an answer whose prompt is given as ids; tokenizers do not merge it with a word


@dataclass(frozen=True, slots=True, kw_only=True)
class Aligned:
    """One pair as token ids. `answer` and `foil` are a set of single tokens, or the tokens of one continuation."""

    clean: tuple[int, ...]
    corrupt: tuple[int, ...]
    answer: tuple[int, ...]
    foil: tuple[int, ...] = ()
    spans: Mapping[str, Span] = field(default_factory=dict)
    factors: Mapping[str, Any] = field(default_factory=dict)
    images: tuple[RowImages, RowImages] = ({}, {})  # of the clean and the corrupt prompt
    dropped: int = 0  # members of the answer sets that are not one token, where the caller allows that


@dataclass(frozen=True, slots=True)
class _Encoded:
    """One text: the row that the model reads, and the text's own tokens within it with their offsets."""

    row: list[int]
    body: list[int]
    offsets: list[Span]


def align(
    model: HookedModel, pairs: Sequence[PairText], *, metric: str, labels: Sequence[str], partial_sets: bool = False
) -> list[Aligned | Misfit]:
    """Tokenise and align each pair on its own.

    Args:
        model: whose tokenizer is used.
        pairs: the texts.
        metric: name of the metric: it decides how many tokens an answer may have.
        labels: what each pair is called in errors, such as "pair 3".
        partial_sets: leave members of a set of answers out when they are not one token, instead of refusing the pair.

    Raises:
        SettingError: the model has no tokenizer.
    """
    encoded = _encode(model, [text for pair in pairs for text in (pair.clean, pair.corrupt)])
    joined = _continuations(model, pairs)
    results: list[Aligned | Misfit] = []
    for i, (pair, label) in enumerate(zip(pairs, labels, strict=True)):
        try:
            clean, corrupt = encoded[2 * i : 2 * i + 2]
            results.append(_align(model, pair, clean, corrupt, joined, metric, label, partial_sets))
        except Misfit as misfit:
            results.append(misfit)
    return results


def require_tokenizer(model: HookedModel) -> Any:
    """The model's tokenizer.

    Raises:
        SettingError: it has none.
    """
    if model.tokenizer is None:
        raise SettingError(
            "a task made of text",
            f"model {model.info.name!r}, which has no tokenizer",
            "load it with tokenizer=..., or give pairs as clean_tokens and corrupt_tokens",
        )
    return model.tokenizer


def align_ids(
    model: HookedModel,
    clean: Sequence[int],
    corrupt: Sequence[int],
    *,
    answer: Answer,
    foil: Answer = (),
    spans: Mapping[str, Span] | None = None,
    metric: str,
    label: str,
) -> Aligned:
    """Check a pair that is given as token ids, with spans in positions; raises a `Misfit`.

    Raises:
        SettingError: a token id or a span that is out of range, or text without a tokenizer.
    """
    _check_ids(model, (*clean, *corrupt), label)
    if len(clean) != len(corrupt):
        raise misfits.unequal_lengths(model.tokenizer, clean, corrupt, label)
    for name, (first, last) in (spans or {}).items():
        if not 0 <= first < last <= len(clean):
            raise SettingError(
                f"{label}: span {name!r}", f"[{first}, {last}) in {len(clean)} tokens", "use 0 <= start < end <= length"
            )

    def tokens_of(text: str, kind: str) -> list[int]:
        if model.info.n_encoder_layers:
            return list(require_tokenizer(model)(text, add_special_tokens=False)["input_ids"])
        prefix, joined = require_tokenizer(model)([_ANCHOR, _ANCHOR + text], add_special_tokens=False)["input_ids"]
        return _rest(prefix, joined, text, _ANCHOR, kind, label)

    answers, foils, _ = _answers(model, answer, foil, tokens_of, metric, label, partial_sets=False)
    return Aligned(clean=tuple(clean), corrupt=tuple(corrupt), answer=answers, foil=foils, spans=dict(spans or {}))


def _align(
    model: HookedModel,
    pair: PairText,
    clean: _Encoded,
    corrupt: _Encoded,
    joined: Mapping[str, list[int]],
    metric: str,
    label: str,
    partial_sets: bool,
) -> Aligned:
    if len(clean.row) != len(corrupt.row):
        raise misfits.unequal_lengths(model.tokenizer, clean.row, corrupt.row, label)

    def tokens_of(text: str, kind: str) -> list[int]:
        before = _before(model, pair)
        return _rest(clean.body if before else [], joined[before + text], text, before, kind, label)

    answers, foils, dropped = _answers(model, pair.answer, pair.foil, tokens_of, metric, label, partial_sets)
    spans = _spans(pair.clean, pair.spans, clean, label)
    for name, span in _spans(pair.corrupt, pair.corrupt_spans, corrupt, label).items():
        if span != spans.get(name):
            raise misfits.span_moved(name, spans.get(name), span, label)
    return Aligned(
        clean=tuple(clean.row),
        corrupt=tuple(corrupt.row),
        answer=answers,
        foil=foils,
        spans=spans,
        factors=pair.factors,
        dropped=dropped,
    )


def _answers(
    model: HookedModel,
    answer: Answer,
    foil: Answer,
    tokens_of: Callable[[str, str], list[int]],
    metric: str,
    label: str,
    partial_sets: bool,
) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """Token ids of answer and foil, and how many members of their sets were left out."""
    found, dropped = [], 0
    for kind, value in (("answer", answer), ("foil", foil)):
        ids: list[int] = []
        refused: list[Misfit] = []
        continuation = metric == SEQUENCE and not any(isinstance(item, str) for item in members(value))
        if isinstance(value, tuple) and len(value) > 1 and metric not in _SET_METRICS and not continuation:
            raise misfits.is_a_set(kind, len(value), label, metric)
        for item in members(value):
            try:
                ids += _tokens(model, item, tokens_of, kind, label, metric)
            except Misfit as misfit:
                if not (isinstance(value, tuple) and partial_sets):
                    raise
                refused.append(misfit)
        if refused and not ids:
            raise refused[0]
        dropped += len(refused)
        found.append(tuple(ids))
    shared = sorted(set(found[0]) & set(found[1]))
    if shared and metric != SEQUENCE:
        raise misfits.same_answers(model.tokenizer, shared, label)
    return found[0], found[1], dropped


def _tokens(
    model: HookedModel,
    item: str | int,
    tokens_of: Callable[[str, str], list[int]],
    kind: str,
    label: str,
    metric: str,
) -> list[int]:
    """The token ids of one answer: one, or several where the metric takes them."""
    if not isinstance(item, str):
        _check_ids(model, (item,), label)
        return [item]
    ids = tokens_of(item, kind)
    if len(ids) > 1 and metric != SEQUENCE:
        raise misfits.several_tokens(model.tokenizer, ids, kind, label, metric)
    return ids


def _check_ids(model: HookedModel, ids: Sequence[int], label: str) -> None:
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < model.info.d_vocab:
            raise SettingError(
                f"{label}: token id {token!r}",
                f"a vocabulary of ids 0 to {model.info.d_vocab - 1}",
                "use ids of this model",
            )


def _encode(model: HookedModel, texts: list[str]) -> list[_Encoded]:
    tokenizer = require_tokenizer(model)
    encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    batch = model.tokenize(texts)
    rows = [tokens[real].tolist() for tokens, real in zip(batch.prompt.tokens, batch.prompt.mask, strict=True)]
    return [_Encoded(*parts) for parts in zip(rows, encoded["input_ids"], encoded["offset_mapping"], strict=True)]


def _before(model: HookedModel, pair: PairText) -> str:
    """The text that an answer continues: that of a decoder beside an encoder begins with the answer."""
    return "" if model.info.n_encoder_layers else pair.clean


def _continuations(model: HookedModel, pairs: Sequence[PairText]) -> dict[str, list[int]]:
    """Prompt + answer -> its token ids, for every answer and foil, in one call of the tokenizer."""
    texts = {
        _before(model, pair) + item
        for pair in pairs
        for item in (*members(pair.answer), *members(pair.foil))
        if isinstance(item, str)
    }
    ordered = sorted(texts)
    if not ordered:
        return {}
    ids = model.tokenizer(ordered, add_special_tokens=False, verbose=False)["input_ids"]
    return dict(zip(ordered, ids, strict=True))


def _rest(prefix: list[int], joined: list[int], text: str, prompt: str, kind: str, label: str) -> list[int]:
    """The tokens that an answer adds to its prompt."""
    if text[:1].isascii() and text[:1].isalpha() and (prompt[-1:].isalnum() or prompt[-1:] in _NO_SPACE_AFTER):
        raise misfits.no_leading_space(text, prompt, kind, label)
    if joined[: len(prefix)] != prefix or len(joined) == len(prefix):
        raise misfits.merges_with_prompt(text, prompt, kind, label)
    return joined[len(prefix) :]


def _spans(text: str, spans: Mapping[str, Span], encoded: _Encoded, label: str) -> dict[str, Span]:
    """Character spans -> position spans."""
    if not spans:
        return {}
    shift = next((s for s in range(len(encoded.row)) if encoded.row[s : s + len(encoded.body)] == encoded.body), None)
    if shift is None:
        raise SettingError(
            f"{label}: named spans",
            "a tokenizer that cuts the text differently when it adds its special tokens",
            "give the pair as clean_tokens and corrupt_tokens, with spans in token positions",
        )
    found = {}
    for name, (first, last) in spans.items():
        inside = [i for i, (start, end) in enumerate(encoded.offsets) if start < last and end > first]
        covered = text[encoded.offsets[inside[0]][0] : encoded.offsets[inside[-1]][1]] if inside else ""
        # Tokenizers count a leading space as part of a token; spans leave it out.
        if not inside or covered.strip() != text[first:last].strip():
            pieces = [text[slice(*encoded.offsets[i])] for i in inside]
            raise misfits.span_within_token(text, name, (first, last), pieces, label)
        found[name] = (inside[0] + shift, inside[-1] + 1 + shift)
    return found
