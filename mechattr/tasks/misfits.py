"""What can be wrong with a pair: each function gives a short reason to count by, and the error to raise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mechattr.errors import AlignmentError, AnswerError, MechattrError
from mechattr.models.tokenize import decode_token
from mechattr.tasks.pairtext import Span


class Misfit(Exception):
    """Why a pair cannot be used. Generators count the reason, pairs of the user raise the error."""

    def __init__(self, reason: str, error: MechattrError) -> None:
        super().__init__(reason, error)
        self.reason, self.error = reason, error


def token_texts(tokenizer: Any, ids: Sequence[int]) -> tuple[str, ...]:
    """Each token as text, with its leading space; the ids as digits where there is no tokenizer."""
    return tuple(str(token) if tokenizer is None else decode_token(tokenizer, token) for token in ids)


def unequal_lengths(tokenizer: Any, clean: Sequence[int], corrupt: Sequence[int], label: str) -> Misfit:
    """Prompts of unequal token length; the error shows both tokenisations side by side."""
    left, right = ([repr(text) for text in token_texts(tokenizer, row)] for row in (clean, corrupt))
    width = max(len("clean"), *map(len, left))
    lines = [f"    {'':>4}   {'clean':<{width}}   corrupt"]
    for i in range(max(len(left), len(right))):
        a, b = (side[i] if i < len(side) else "(none)" for side in (left, right))
        lines.append(f"    {i:>4} {'|' if a == b else '*'} {a:<{width}}   {b}")
    return Misfit(
        "prompts of unequal token length",
        AlignmentError(
            f"{label}: a clean and a corrupt prompt of the same number of tokens",
            f"{len(clean)} and {len(corrupt)} tokens (* where they differ)\n" + "\n".join(lines),
            "exchange words for words that have equally many tokens under this tokenizer",
        ),
    )


def several_tokens(tokenizer: Any, ids: Sequence[int], kind: str, label: str, metric: str) -> Misfit:
    """An answer or foil of several tokens under a metric that wants one."""
    pieces = ", ".join(repr(piece) for piece in token_texts(tokenizer, ids))
    return Misfit(
        f"{kind} of several tokens",
        AnswerError(
            f"{label}: {kind} {''.join(token_texts(tokenizer, ids))!r} as one token, under metric={metric!r}",
            f"{len(ids)} tokens: {pieces}",
            'use metric="sequence_log_probability", which takes answers of several tokens, or a one-token answer',
        ),
    )


def merges_with_prompt(text: str, prompt: str, kind: str, label: str) -> Misfit:
    """An answer that is not the continuation of the prompt's own tokens."""
    fix = f"give the {kind} as a token id, or as text that begins a new token"
    if prompt[-1:].isspace():
        fix = f"end the prompt without a space and write the {kind} as {' ' + text.lstrip()!r}"
    return Misfit(
        f"{kind} merges with the end of the prompt",
        AnswerError(
            f"{label}: {kind} {text!r} as new tokens after {prompt[-20:]!r}",
            "no token of its own: the tokenizer joins it with the end of the prompt",
            fix,
        ),
    )


def no_leading_space(text: str, prompt: str, kind: str, label: str) -> Misfit:
    """An answer that reads as a new word but would be glued to the last one."""
    return Misfit(
        f"{kind} without its leading space",
        AnswerError(
            f"{label}: {kind} {text!r} after {prompt[-20:]!r}",
            f"{prompt.split()[-1] + text!r}: no space between the two",
            f"write the {kind} as {' ' + text!r}; if it does continue the last word, give its token id",
        ),
    )


def is_a_set(kind: str, size: int, label: str, metric: str) -> Misfit:
    """A set of answers under a metric that wants one."""
    return Misfit(
        f"{kind} is a set",
        AnswerError(
            f"{label}: one {kind}, under metric={metric!r}",
            f"a set of {size}",
            'use metric="probability_difference", which takes sets of one-token answers',
        ),
    )


def same_answers(tokenizer: Any, ids: Sequence[int], label: str) -> Misfit:
    """An answer that is also a foil, so that the two cannot be compared."""
    return Misfit(
        "answer and foil share a token",
        AnswerError(
            f"{label}: an answer and a foil that differ",
            f"both have {', '.join(repr(text) for text in token_texts(tokenizer, ids))}",
            "choose a foil that is not an answer",
        ),
    )


def span_within_token(text: str, name: str, span: Span, pieces: Sequence[str], label: str) -> Misfit:
    """A span that does not cover whole tokens."""
    return Misfit(
        "a named span begins or ends inside a token",
        AlignmentError(
            f"{label}: span {name!r}, characters {span[0]} to {span[1]}: {text[span[0] : span[1]]!r}",
            f"tokens {list(pieces)}" if pieces else f"no token there; the prompt has {len(text)} characters",
            "choose a span of whole tokens, with 0 <= start < end <= length of the prompt",
        ),
    )


def span_moved(name: str, clean: Span | None, corrupt: Span, label: str) -> Misfit:
    """A span that is not on the same positions of the two prompts."""
    return Misfit(
        "a named span is on other tokens in the corrupt prompt",
        AlignmentError(
            f"{label}: span {name!r} on the same positions of both prompts",
            f"positions {clean} in the clean and {corrupt} in the corrupt prompt",
            "exchange words for words that have equally many tokens under this tokenizer",
        ),
    )
