"""What is explained: the logit of one token at one position, or the difference of two tokens' logits."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechattr.decomposition.prompt import Prompt
from mechattr.errors import AnswerError, SettingError
from mechattr.models.base import Batch, HookedModel
from mechattr.models.tokenize import decode_token
from mechattr.provenance import JSON

Token = int | str
BEFORE_CAP = "the logit before any cap"  # what linear read-outs explain; see `Readout`


@dataclass(frozen=True, eq=False, slots=True)
class Target:
    """One token for each row, and where it is predicted.

    Attributes:
        ids: the tokens whose logits are explained.
        foils: the tokens whose logits are subtracted, or `None`.
        columns: the explained position of each row.
        names, foil_names: the tokens as text.
    """

    ids: Int[Tensor, " batch"]
    foils: Int[Tensor, " batch"] | None
    columns: Int[Tensor, " batch"]
    names: tuple[str, ...]
    foil_names: tuple[str, ...]

    def at(self, x: Float[Tensor, "batch pos ..."]) -> Float[Tensor, "batch ..."]:
        """The explained position of each row."""
        return x[torch.arange(len(x), device=x.device), self.columns.to(x.device)]

    def metric(self, logits: Float[Tensor, "batch pos d_vocab"], batch: Batch) -> Float[Tensor, " batch"]:
        """The explained quantity, from logits, in float32 or wider."""
        rows = batch.example
        here = logits[torch.arange(len(logits), device=logits.device), self.columns[rows]]
        here = here.to(torch.promote_types(here.dtype, torch.float32))
        found = here.gather(1, self.ids[rows, None])[:, 0]
        return found if self.foils is None else found - here.gather(1, self.foils[rows, None])[:, 0]

    def direction(self, model: HookedModel) -> Float[Tensor, "batch d_model"]:
        """W_U[:, target] - W_U[:, foil], in float32 or wider."""
        return self._of(model.weight("unembed.W_U")).T

    def bias(self, model: HookedModel) -> Float[Tensor, " batch"]:
        """b_U[target] - b_U[foil], in float32 or wider."""
        return self._of(model.weight("unembed.b_U"))

    def _of(self, weight: Tensor) -> Tensor:
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
        found = weight[..., self.ids]
        return found if self.foils is None else found - weight[..., self.foils]

    def settings(self) -> dict[str, JSON]:
        """What a result says of its target."""
        return {
            "target": list(self.names),
            "target_ids": self.ids.tolist(),
            "foil": list(self.foil_names) or None,
            "foil_ids": None if self.foils is None else self.foils.tolist(),
            "position": self.columns.tolist(),
        }


def target_of(
    model: HookedModel,
    prompt: Prompt,
    target: Token | Sequence[Token] | Tensor,
    foil: Token | Sequence[Token] | Tensor | None = None,
    position: int = -1,
) -> Target:
    """Targets for the rows of a prompt.

    Args:
        model: a hooked model.
        prompt: its rows.
        target: a token id or the text of one token; or one for each row.
        foil: likewise; its logit is subtracted.
        position: the position whose prediction is explained, counted from 0 or, if negative, from the row's end.

    Raises:
        AnswerError: text that is not one token, or an id outside the vocabulary; a target that is its own foil.
        SettingError: another number of targets than rows, or a position outside a row.
    """
    columns = columns_of(prompt, position)
    ids = _ids(model, prompt, target, "target")
    foils = None if foil is None else _ids(model, prompt, foil, "foil")
    if foils is not None and bool((ids == foils).any()):
        row = int((ids == foils).nonzero()[0, 0])
        raise AnswerError(f"target and foil of row {row}", f"both are token {int(ids[row])}", "give two tokens")
    return Target(ids, foils, columns, _names(model, ids), () if foils is None else _names(model, foils))


def columns_of(prompt: Prompt, position: int) -> Int[Tensor, " batch"]:
    """The column of a position in every row.

    Raises:
        SettingError: a position that is no whole number, or outside a row.
    """
    whole = _whole(position)
    if whole is None:
        raise SettingError(f"position={position!r}", type(position).__name__, "give one whole number")
    return prompt.batch.columns(whole)


def token_id(model: HookedModel, token: Any, kind: str = "target") -> int:
    """The id of a token that is given as an id or as text.

    Raises:
        AnswerError: text that is not one token, or an id outside the vocabulary.
        SettingError: neither an id nor text.
    """
    if isinstance(token, str):
        if model.tokenizer is None:
            raise SettingError(f"{kind} {token!r}", "this model has no tokenizer", "give a token id")
        ids: list[int] = model.tokenizer(token, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            pieces = ", ".join(repr(decode_token(model.tokenizer, i)) for i in ids) or "none"
            spaced = "" if token.startswith(" ") else f" (with its leading space, as in {' ' + token!r}?)"
            raise AnswerError(
                f"{kind} {token!r} as one token", f"{len(ids)} tokens: {pieces}", f"give one token or an id{spaced}"
            )
        return ids[0]
    if isinstance(token, Tensor) and token.ndim == 0:
        token = token.item()
    found = _whole(token)
    if found is None:
        raise SettingError(f"{kind} {token!r}", f"a {type(token).__name__}", "give a token id or the text of one token")
    if not 0 <= found < model.info.d_vocab:
        vocabulary = f"a vocabulary of {model.info.d_vocab} tokens"
        raise AnswerError(f"{kind} {token}", vocabulary, f"give an id from 0 to {model.info.d_vocab - 1}")
    return found


def _whole(x: Any) -> int | None:
    """A whole number of Python or numpy as Python's."""
    try:
        return None if isinstance(x, bool) else operator.index(x)
    except TypeError:
        return None


def _ids(model: HookedModel, prompt: Prompt, given: Any, kind: str) -> Tensor:
    several = not isinstance(given, str | int) and not (isinstance(given, Tensor) and given.ndim == 0)
    each = list(given) if several and hasattr(given, "__iter__") else [given] * len(prompt)
    if len(each) != len(prompt):
        found = f"{len(each)} for {len(prompt)} prompts"
        raise SettingError(f"{kind}s", found, f"give one {kind}, or one for each prompt")
    ids = [token_id(model, token, kind) for token in each]
    return torch.tensor(ids, device=prompt.batch.device)


def _names(model: HookedModel, ids: Tensor) -> tuple[str, ...]:
    return tuple(decode_token(model.tokenizer, i) for i in ids.tolist())
