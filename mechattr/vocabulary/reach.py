"""Which tokens a text can produce: the round trip of every id through its tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mechattr.errors import SettingError
from mechattr.models.base import HookedModel

# What becomes of an id that is decoded and encoded again.
CATEGORIES = {
    "ok": "its text gives it back",
    "special": "a special token whose text gives it back",
    "undecodable": "it is no text by itself, such as a part of a character",
    "unreachable_special": "a special token whose text gives other tokens",
    "unreachable_single": "its text gives one other token",
    "unreachable_multi": "its text gives several tokens",
    "missing": "the model has a row for it, the tokenizer no token",
}
REACHABLE = ("ok", "special")
_NEVER = (0xC0, 0xC1, *range(0xF5, 0x100))  # bytes that no UTF-8 text has
_BYTES = frozenset([*map(chr, _NEVER), *(f"<0x{byte:02X}>" for byte in _NEVER)])  # as tokenizers of bytes write them
_BEFORE = "«"  # a text before the token, for tokenizers that treat the beginning of a text in their own way


@dataclass(frozen=True, slots=True)
class RoundTrip:
    """One id through its tokenizer.

    Attributes:
        id: the token.
        text: what it decodes to.
        category: one of `CATEGORIES`.
        encoded: what the text encodes to.
    """

    id: int
    text: str
    category: str
    encoded: tuple[int, ...]

    @property
    def reachable(self) -> bool:
        """Whether some text gives this token."""
        return self.category in REACHABLE


def round_trips(model: HookedModel, ids: Sequence[int] | None = None) -> list[RoundTrip]:
    """Decodes and encodes tokens: which of them can a text produce?

    A token counts as reached when its text gives it back by itself or behind another character, since some tokenizers
    put a space before the first word of a text.

    Args:
        model: a hooked model with a tokenizer.
        ids: which tokens; all rows of the embedding without it.

    Raises:
        SettingError: no tokenizer.

    References:
        Land, Bartolo (2024), Fishing for Magikarp, arXiv 2405.05417, whose categories these are.
    """
    tokenizer = _tokenizer(model)
    known = len(tokenizer)
    special = set(getattr(tokenizer, "all_special_ids", ()))
    before = _encode(tokenizer, _BEFORE)
    found = []
    for token in range(model.info.d_vocab) if ids is None else ids:
        if token >= known:
            found.append(RoundTrip(token, "", "missing", ()))
            continue
        text = tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        alone, behind = _encode(tokenizer, text), _encode(tokenizer, _BEFORE + text)
        reached = alone == [token] or behind == [*before, token]
        encoded = alone if len(alone) <= 1 or behind[: len(before)] != before else behind[len(before) :]
        found.append(RoundTrip(token, text, _category(text, encoded, reached, token in special), tuple(encoded)))
    return found


def never_in_text(model: HookedModel, trips: Sequence[RoundTrip]) -> list[int]:
    """Ids that no text can have produced, in training either: rows without a token, and bytes that UTF-8 never uses.

    Args:
        model: a hooked model with a tokenizer.
        trips: of `round_trips`.
    """
    tokenizer = _tokenizer(model)
    bare = [t.id for t in trips if t.category == "undecodable" and tokenizer.convert_ids_to_tokens(t.id) in _BYTES]
    return sorted([*bare, *(trip.id for trip in trips if trip.category == "missing")])


def consistent(model: HookedModel, ids: Sequence[int]) -> bool:
    """Whether encode(decode(ids)) is ids again; where it is not, a text and its tokens are not the same prompt.

    Raises:
        SettingError: no tokenizer.
    """
    tokenizer = _tokenizer(model)
    text = tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return _encode(tokenizer, text) == [int(token) for token in ids]


def _category(text: str, encoded: Sequence[int], reached: bool, special: bool) -> str:
    if reached:
        return "special" if special else "ok"
    if "\N{REPLACEMENT CHARACTER}" in text or not text:
        return "unreachable_special" if special else "undecodable"
    if special:
        return "unreachable_special"
    return "unreachable_single" if len(encoded) == 1 else "unreachable_multi"


def _encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _tokenizer(model: HookedModel) -> Any:
    if model.tokenizer is None:
        raise SettingError("round trips of tokens", "this model has no tokenizer", "load it with tokenizer=...")
    return model.tokenizer
