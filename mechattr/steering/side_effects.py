"""Side effects of steering: what it does to texts that have nothing to do with the behaviour."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechattr.errors import SettingError
from mechattr.models.base import HookedModel
from mechattr.models.halving import Halving
from mechattr.steering.answers import (
    NUMBERS,
    Text,
    batch_of,
    by_length,
    check_causal,
    starts_of,
    token_log_probabilities,
    token_rows,
)
from mechattr.steering.numbers import check_count

OPENER = "give a function that opens a block: lambda: vector.apply(model, multiplier=2.0)"


def kl_of_logits(
    base: Float[Tensor, "text pos d_vocab"],
    steered: Float[Tensor, "row pos d_vocab"],
    mask: Bool[Tensor, "row pos"],
    text: Int[Tensor, " row"] | None = None,
) -> Float[Tensor, " row"]:
    r"""The mean over a row's tokens of how far what is predicted next moves, in nats.

    $$\frac{1}{n} \sum_{t=1}^{n} \sum_y p_t(y) \bigl(\log p_t(y) - \log q_t(y)\bigr)$$

    with $p$ the model without steering and $q$ the steered one. Equal logits give exactly 0.

    Args:
        base: without steering, once for each text.
        steered: with it; several rows may be of one text, such as those of several multipliers.
        mask: the real tokens of the rows of `steered`.
        text: for each row of `steered`, the row of `base` of the same text; the same number without it.

    Raises:
        SettingError: logits, mask and texts that do not fit.

    Cost:
        No passes. At most 2 × 2²⁴ logits are held a second time.
    """
    rows = torch.arange(len(steered), device=steered.device) if text is None else text.to(steered.device)
    fits = base.shape[1:] == steered.shape[1:] and mask.shape == steered.shape[:2] and len(rows) == len(steered)
    if not fits or bool(((rows < 0) | (rows >= len(base))).any()):
        found = f"base {list(base.shape)}, steered {list(steered.shape)}, mask {list(mask.shape)}"
        fix = "give logits of the same columns and tokens, a mask of them, and the text of each row where texts repeat"
        raise SettingError("logits to compare", found, fix)
    where, column = mask.nonzero(as_tuple=True)
    step = max(1, NUMBERS // steered.shape[-1])
    dtype = torch.promote_types(torch.promote_types(base.dtype, steered.dtype), torch.float32)
    total = torch.zeros(len(steered), dtype=dtype, device=steered.device)
    for begin in range(0, len(where), step):
        r, c = where[begin : begin + step], column[begin : begin + step]
        log_p = base[rows[r], c].to(dtype).log_softmax(-1)
        change = log_p - steered[r, c].to(dtype).log_softmax(-1)
        p = log_p.exp_()
        # a token that cannot come, as some models have them, has no share in the sum
        total.index_add_(0, r, change.masked_fill_(p == 0, 0).mul_(p).sum(-1))
    return total / mask.sum(1)


def kl_to_base(
    model: HookedModel,
    texts: Sequence[Text],
    steered: Callable[[], AbstractContextManager[Any]],
    *,
    batch_size: int = 16,
) -> Float[Tensor, " text"]:
    """The mean over a text's tokens of KL(model as it is || steered model), in nats; see `kl_of_logits`.

    Args:
        model: a causal language model; inside a block of `apply`, what is compared with is already steered.
        texts: neutral ones, as texts or ids.
        steered: what opens a block of the steered model, such as `lambda: vector.apply(model, multiplier=2.0)`.
        batch_size: texts of a forward pass, of similar lengths; halved when memory runs out.

    Raises:
        SettingError: no texts, a text without a token, or an opener that opens nothing.
        UnsupportedFeatureError: a model that does not predict next tokens.

    Cost:
        2 forward passes a text.
    """
    check_causal(model, "KL of next tokens")
    check_count("batch_size", batch_size)
    if not callable(steered):
        raise SettingError("the steered model", f"a {type(steered).__name__}", OPENER)
    rows = token_rows(model, texts)
    if not all(rows):
        raise SettingError(f"text {[bool(row) for row in rows].index(False)}", "no tokens", "leave it out")

    def values(part: Sequence[int]) -> list[Tensor]:
        batch = batch_of(model, [rows[i] for i in part])
        base = model.run(batch).logits
        block = steered()
        if not isinstance(block, AbstractContextManager):
            raise SettingError("the steered model", f"a function that gives a {type(block).__name__}", OPENER)
        with block:
            moved = model.run(batch).logits
        return list(kl_of_logits(base, moved, batch.mask))

    order = by_length(rows)
    found = dict(zip(order, Halving(batch_size)(order, values), strict=True))
    return torch.stack([found[i] for i in range(len(rows))])


def cross_entropy(
    model: HookedModel, texts: Sequence[Text], *, prompts: Sequence[Text] | None = None, batch_size: int = 32
) -> Float[Tensor, " text"]:
    r"""What each text costs the model as it is, in nats a token; inside a block of `vector.apply`, the steered one.

    $$-\frac{1}{n} \sum_t \log p(x_t | x_{<t})$$

    A text's first token counts where something stands before it: the special token of tokenizers that begin every text
    with one, or the prompt.

    Args:
        model: a causal language model.
        texts: texts or ids.
        prompts: what stands right before each text, and does not count.
        batch_size: texts of a forward pass, of similar lengths; halved when memory runs out.

    Returns:
        In float32 or wider; NaN for a text without a token that counts.

    Raises:
        SettingError: no texts, texts and prompts that do not fit, or ids that the model does not know.
        UnsupportedFeatureError: a model that does not predict next tokens.

    Cost:
        1 forward pass a text.
    """
    check_causal(model, "cross-entropy of texts")
    rows = token_rows(model, texts, prompts)
    starts = [1] * len(rows) if prompts is None else starts_of(rows, token_rows(model, prompts))
    found = token_log_probabilities(model, rows, starts, batch_size=batch_size)
    return torch.stack([-scores.mean() for scores in found])


def perplexity(
    model: HookedModel, texts: Sequence[Text], *, prompts: Sequence[Text] | None = None, batch_size: int = 32
) -> Float[Tensor, " text"]:
    """exp of `cross_entropy`: how surprising each text is, as a number of equally likely tokens.

    Of texts that a steered model wrote, measure it outside the block: what the model without steering thinks of them.

    Args:
        model, texts, prompts, batch_size: as `cross_entropy`.

    Raises:
        SettingError, UnsupportedFeatureError: as `cross_entropy`.

    Cost:
        1 forward pass a text.
    """
    return cross_entropy(model, texts, prompts=prompts, batch_size=batch_size).exp()
