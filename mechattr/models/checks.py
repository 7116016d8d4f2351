"""Whether a batch can be run on a model."""

from __future__ import annotations

import torch

from mechattr.errors import SettingError, UnsupportedFeatureError
from mechattr.models.base import Batch, ModelInfo
from mechattr.models.images import marked


def check_batch(batch: Batch, info: ModelInfo, device: torch.device) -> None:
    """Whether a model can run a batch at all.

    Raises:
        SettingError: no batch, no row, tokens on another device, ids outside the vocabulary, too long a prompt, or
            image tokens that are not marked as such.
        UnsupportedFeatureError: images for a model without a vision tower.
    """
    if not isinstance(batch, Batch):
        fix = "make a batch with model.tokenize(texts) or Batch.of(ids)"
        raise SettingError("a run", f"a {type(batch).__name__}", fix)
    if not len(batch):
        raise SettingError("a run", "a batch without rows", "give at least one row")
    if batch.device != device:
        raise SettingError(
            "a run", f"tokens on {batch.device}, model on {device}", "move the batch with batch.to(device)"
        )
    low, high = int(batch.tokens.min()), int(batch.tokens.max())
    if low < 0 or high >= info.d_vocab:
        raise SettingError(
            f"token id {low if low < 0 else high}",
            f"the vocabulary has {info.d_vocab} ids",
            "tokenize with this model's tokenizer",
        )
    check_room(info, int(batch.lengths.max()))
    _check_image_tokens(batch, info)


def _check_image_tokens(batch: Batch, info: ModelInfo) -> None:
    if info.image_token is None:
        if batch.image is not None:
            found = f"{info.name!r} has no vision tower, or its backend ({info.backend}) does not read images"
            fix = "load a vision-language model with backend='hf'"
            raise UnsupportedFeatureError("a batch with images", found, fix)
        return
    standing = marked(batch.tokens, info.image_token)
    if torch.equal(standing, torch.zeros_like(standing) if batch.image is None else batch.image):
        return
    if batch.image is None:
        raise SettingError(
            "a run of text with image tokens",
            f"token {info.image_token} stands in {int(standing.any(1).sum())} rows, and the batch has no images",
            "use model.tokenize(texts, images=...), or Batch.of(tokens, mask, images=..., image=...)",
        )
    raise SettingError(
        "a batch with images",
        f"image= marks other columns than those of token {info.image_token}",
        "use image=tokens == model.info.image_token",
    )


def check_room(info: ModelInfo, tokens: int) -> None:
    """Whether a row of so many tokens has a position for each.

    Raises:
        SettingError: it has not.
    """
    bounded = not info.rotary if info.bounded is None else info.bounded
    if bounded and tokens > info.n_ctx:
        raise SettingError(
            f"a prompt of {tokens} tokens", f"the model has {info.n_ctx} positions", "use shorter prompts"
        )
