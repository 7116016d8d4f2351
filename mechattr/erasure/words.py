"""Where the words of a text are among its tokens."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mechattr.erasure.documents import WINDOW, room
from mechattr.errors import SettingError
from mechattr.models.base import HookedModel
from mechattr.models.tokenize import wants_special

Span = tuple[int, int]  # first and last token, both inclusive
_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")


@dataclass(frozen=True, slots=True)
class Words:
    """The words of one document.

    Attributes:
        tokens: its ids.
        spans: of words that are made of whole tokens, in order; a token may have the space before its word.
        texts: the words.
    """

    tokens: tuple[int, ...]
    spans: tuple[Span, ...]
    texts: tuple[str, ...]

    @property
    def multi(self) -> tuple[Span, ...]:
        """Words of several tokens."""
        return tuple(span for span in self.spans if span[1] > span[0])

    @property
    def single(self) -> tuple[Span, ...]:
        """Words of one token."""
        return tuple(span for span in self.spans if span[1] == span[0])


def words_of(model: HookedModel, text: str, *, window: int = WINDOW) -> Words:
    """The words of a text (runs of letters, apostrophes between them) and the tokens that spell them.

    A word counts where its tokens cover it and nothing else but one space before it; what is cut by a token that
    reaches into its neighbour is no word here.

    Raises:
        SettingError: a tokenizer that does not say where its tokens are in the text, or a window that is no count.
    """
    ids, places = _with_places(model.tokenizer, text)
    most = room(model, window)
    ids, places = ids[:most], places[:most]
    spans, texts, token = [], [], 0
    for match in _WORD.finditer(text):
        begin, end = match.span()
        while token < len(ids) and (places[token][1] <= begin or places[token][0] == places[token][1]):
            token += 1
        last = token
        while last < len(ids) and places[last][1] < end:
            last += 1
        if last >= len(ids):
            break
        head = places[token][0]
        exact = head == begin or (head == begin - 1 and text[head].isspace())
        if exact and places[last][1] == end:
            spans.append((token, last))
            texts.append(match[0])
    return Words(tuple(ids), tuple(spans), tuple(texts))


def entities_of(words: Words, model: HookedModel, names: Sequence[str]) -> tuple[Span, ...]:
    """Where names are in a document: the tokens of each, alone or after a space, one after another.

    Args:
        words: a document.
        model: whose tokenizer spells the names.
        names: such as named entities that the user found.

    Returns:
        Spans of several tokens, each once, in order.
    """
    found: set[Span] = set()
    for name in names:
        for spelled in (name, f" {name}"):
            piece = tuple(model.tokenizer(spelled, add_special_tokens=False)["input_ids"])
            n = len(piece)
            if n > 1:
                tokens = words.tokens
                found |= {(i, i + n - 1) for i in range(len(tokens) - n + 1) if tokens[i : i + n] == piece}
    return tuple(sorted(found))


def _with_places(tokenizer: Any, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    if not getattr(tokenizer, "is_fast", False):
        raise SettingError(
            "the words of a text",
            f"a tokenizer ({type(tokenizer).__name__}) that does not say where its tokens are",
            "load a fast tokenizer, or give spans of your own",
        )
    given = {"add_special_tokens": wants_special(tokenizer, text), "return_offsets_mapping": True, "verbose": False}
    found = tokenizer(text, **given)
    return list(found["input_ids"]), [tuple(place) for place in found["offset_mapping"]]
