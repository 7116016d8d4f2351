"""Greedy continuation of prompts by whole forward passes, for backends without a generator of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from mechattr.errors import SettingError
from mechattr.models.base import Batch

STEPS = 20


def continue_greedily(
    forward: Callable[[Batch], Tensor],
    batch: Batch,
    backend: str,
    settings: Mapping[str, Any],
    *,
    ends: int | Sequence[int] | None = None,
    pad: int = 0,
) -> Int[Tensor, "batch total"]:
    """Prompts and their continuations.

    Args:
        forward: logits of a batch, which grows by one column at each step.
        batch: prompts that end in one column.
        backend: what error messages call it.
        settings: `max_new_tokens`, 20 unless given, and `do_sample=False`.
        ends: tokens after which a row is over.
        pad: what fills rows that are over.

    Raises:
        SettingError: other settings, or a right-padded batch.
    """
    rest = {name: value for name, value in settings.items() if name != "max_new_tokens"}
    if not rest.get("do_sample", True):
        del rest["do_sample"]
    if rest:
        raise SettingError(
            f"generate on the {backend} backend", f"settings {sorted(rest)}", "it is greedy: use backend='hf'"
        )
    if not bool(batch.mask[:, -1].all()):
        raise SettingError(
            "generate from a right-padded batch", "rows end in padding", "tokenize with padding_side='left'"
        )
    stops = torch.tensor([] if ends is None else [ends] if isinstance(ends, int) else list(ends), device=batch.device)
    tokens, mask = batch.tokens, batch.mask
    over = torch.zeros(len(batch), dtype=torch.bool, device=batch.device)
    with torch.no_grad():
        for _ in range(settings.get("max_new_tokens", STEPS)):
            new = forward(Batch(tokens, mask, batch.example))[:, -1].argmax(-1).masked_fill(over, pad)
            tokens, mask = torch.cat([tokens, new[:, None]], 1), torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            over |= torch.isin(new, stops)
            if bool(over.all()):
                break
    return tokens
