"""Texts to batches and ids to readable tokens, with the model's own tokenizer, which is never changed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import torch

from mechattr.errors import SettingError
from mechattr.models.base import Batch


def encode(tokenizer: Any, text: str, *, chat: bool = False) -> list[int]:
    """Ids of one text with the tokenizer's own special tokens, but never a second BOS.

    A text may be longer than the model's context, since what is run may be a part of it: `run` checks the length.
    """
    if chat and not getattr(tokenizer, "chat_template", None):
        raise SettingError("tokenizing a chat", "the tokenizer has no chat template", "leave chat=True out")
    if chat:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
        )
    ids: list[int] = tokenizer(text, add_special_tokens=wants_special(tokenizer, text), verbose=False)["input_ids"]
    return ids


def wants_special(tokenizer: Any, text: str) -> bool:
    """Whether a text does not begin with the BOS that the tokenizer would add."""
    return not (tokenizer.bos_token and text.startswith(tokenizer.bos_token))


def decode_token(tokenizer: Any, token: int) -> str:
    """One token as text, with the leading space that decoding alone may drop; `<id>` without a tokenizer."""
    if tokenizer is None:
        return f"<{token}>"
    piece = tokenizer.convert_ids_to_tokens(int(token))
    if piece is not None and piece.startswith("▁"):  # sentencepiece's mark of a leading space
        return piece.replace("▁", " ")
    text: str = tokenizer.decode([int(token)], clean_up_tokenization_spaces=False)
    return text


def tokenize(
    tokenizer: Any, texts: str | Sequence[str], *, chat: bool, padding_side: str, device: torch.device
) -> Batch:
    """Texts -> padded batch.

    Raises:
        SettingError: no tokenizer or chat template, no text, an empty text, or an unknown padding side.
    """
    rows = [encode(tokenizer, text, chat=chat) for text in checked_texts(tokenizer, texts, padding_side)]
    if not all(rows):
        raise _nothing()
    return pad(rows, tokenizer, padding_side=padding_side, device=device)


def checked_texts(tokenizer: Any, texts: str | Sequence[str], padding_side: str) -> list[str]:
    """The texts as a list.

    Raises:
        SettingError: no tokenizer, no text, an empty text, something else than text, or an unknown padding side.
    """
    if tokenizer is None:
        raise SettingError(
            "tokenizing text",
            "this model has no tokenizer",
            "load it with tokenizer=..., or build a Batch of token ids",
        )
    if padding_side not in ("left", "right"):
        raise SettingError(f"padding_side={padding_side!r}", "unknown side", "use 'left' or 'right'")
    given = [texts] if isinstance(texts, str) else list(texts)
    other = next((type(text).__name__ for text in given if not isinstance(text, str)), None)
    if other is not None:
        raise SettingError("tokenizing text", f"a {other}", "give texts, or build a Batch of token ids")
    if not given or not all(given):
        raise _nothing()
    return given


def _nothing() -> SettingError:
    return SettingError("tokenizing text", "an empty list or an empty text", "give texts of at least one token")


def pad(rows: Sequence[Sequence[int]], tokenizer: Any, *, padding_side: str = "right", device: Any = "cpu") -> Batch:
    """Rows of ids -> padded batch with readable strings where there is a tokenizer."""
    ids = [getattr(tokenizer, name, None) for name in ("pad_token_id", "eos_token_id")]
    fill = next((i for i in ids if i is not None), 0)
    width = max(len(row) for row in rows)
    tokens = torch.full((len(rows), width), fill)
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    for i, row in enumerate(rows):
        place = slice(0, len(row)) if padding_side == "right" else slice(width - len(row), width)
        tokens[i, place] = torch.tensor(list(row))
        mask[i, place] = True
    strings = [] if tokenizer is None else [[decode_token(tokenizer, t) for t in row] for row in rows]
    return Batch.of(tokens, mask, strings).to(device)


def tokenizer_hash(tokenizer: Any) -> str:
    """sha256 of the vocabulary and of how it is applied; `"none"` without a tokenizer."""
    if tokenizer is None:
        return "none"
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
