"""Asking a model to repeat a token: one that it never learned does not come back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from mechattr.errors import SettingError
from mechattr.models.base import Batch, HookedModel

PLACE = "Qxz"  # stands where the token will be; a prompt is tokenized once, and the token put in its place
WORDS = (
    "apple river stone garden window silver morning paper music forest "
    "yellow engine winter market bridge candle ocean doctor pencil summer"
).split()
STEPS = 3


def prompts(shots: int) -> str:
    """A prompt that asks for a repetition, with so many examples before it."""
    lines = [f"Repeat: {word}. Answer: {word}." for word in (WORDS * (shots // len(WORDS) + 1))[:shots]]
    return " ".join([*lines, f"Repeat: {PLACE}. Answer: "]).rstrip()


def repetition(
    model: HookedModel,
    ids: Sequence[int],
    *,
    shots: Sequence[int] = (0, 5, 20),
    batch_size: int = 64,
    progress: bool | None = None,
) -> Float[Tensor, " token"]:
    """The largest probability that a token gets when the model is asked to repeat it: over prompts with so many
    examples, and over the next three places of the greedy answer.

    Args:
        model: a hooked model with a tokenizer.
        ids: the tokens.
        shots: examples of each prompt; prompts that do not fit the model's context are left out.
        batch_size: rows of one forward pass.
        progress: `None` shows a bar on a terminal only.

    Raises:
        SettingError: no prompt fits the context.

    Cost:
        3 forward passes a token and prompt.

    References:
        Land, Bartolo (2024), Fishing for Magikarp, arXiv 2405.05417; prompts of our own.
    """
    room = model.info.n_ctx if model.info.bounded is not False else None
    made = [_template(model, prompts(n)) for n in shots]
    made = [(before, after) for before, after in made if room is None or len(before) + len(after) + 1 + STEPS <= room]
    if not made:
        fix = "ask with fewer examples: shots=[0]"
        raise SettingError(f"prompts with {list(shots)} examples", f"a context of {room} tokens", fix)
    device, best = model.weight("embed.W_E").device, torch.zeros(len(ids), dtype=torch.float64)
    hidden = None if progress is None else not progress
    with tqdm(total=len(ids) * len(made), desc="repetition", disable=hidden) as bar:
        for before, after in made:
            for begin in range(0, len(ids), batch_size):
                part = torch.tensor(list(ids[begin : begin + batch_size]))
                n = len(part)
                rows = torch.cat(
                    [torch.tensor(before).expand(n, -1), part[:, None], torch.tensor(after).expand(n, -1)], 1
                ).to(device)
                found = _largest(model, rows, part.to(device))
                best[begin : begin + n] = torch.maximum(best[begin : begin + n], found.double().cpu())
                bar.update(n)
    return best


def _largest(model: HookedModel, rows: Int[Tensor, "n pos"], ids: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    best = torch.zeros(len(ids), device=rows.device)
    for _ in range(STEPS):
        logits = model.run(Batch.of(rows)).logits[:, -1].float()
        best = torch.maximum(best, logits.softmax(-1).gather(1, ids[:, None])[:, 0])
        rows = torch.cat([rows, logits.argmax(-1, keepdim=True)], 1)
    return best


def _template(model: HookedModel, prompt: str) -> tuple[list[int], list[int]]:
    """The ids before and after the place of a token."""
    tokenizer: Any = model.tokenizer
    before, after = prompt.split(f" {PLACE}")
    first = model.tokenize(before).tokens[0].tolist()
    return first, list(tokenizer(after, add_special_tokens=False, verbose=False)["input_ids"])
