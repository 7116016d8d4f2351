"""Whether a batch can be run on a model, from where and under which rules."""

from __future__ import annotations

import torch

from mechattr.errors import SettingError, UnsupportedFeatureError
from mechattr.models.base import Batch, ModelInfo, Start
from mechattr.models.images import marked
from mechattr.models.rules import Rules


def check_block(info: ModelInfo, layer: int) -> None:
    """Whether a model has this block.

    Raises:
        SettingError: it has not.
    """
    if layer not in range(info.n_layers):
        found = f"blocks 0 to {info.n_layers - 1}"
        raise SettingError(f"the attention of block {layer}", found, "name an existing block")


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


def check_start(start: Start | None, info: ModelInfo, batch: Batch) -> None:
    """Whether a run can begin at a residual stream.

    Raises:
        SettingError: no such block, or a stream of another shape, dtype or device.
    """
    if start is None:
        return
    if not 0 <= start.layer < info.n_layers:
        found = f"blocks 0 to {info.n_layers - 1}"
        raise SettingError(f"a run from block {start.layer}", found, "name an existing block")
    shape, wanted = tuple(start.resid_pre.shape), (*batch.tokens.shape, info.d_model)
    if shape != wanted:
        found = f"a residual stream of shape {shape}"
        raise SettingError(f"a run from block {start.layer} with shape {wanted}", found, "give one row for each prompt")
    kind, device = str(start.resid_pre.dtype).removeprefix("torch."), start.resid_pre.device
    if (kind, device) != (info.dtype, batch.device):
        found = f"a residual stream in {kind} on {device}"
        asked = f"a run from block {start.layer} in {info.dtype} on {batch.device}"
        raise SettingError(asked, found, "give a residual stream of this model")


def check_hold(rules: Rules | None, info: ModelInfo) -> None:
    """Whether the blocks that rules hold exist.

    Raises:
        SettingError: they do not.
    """
    bad = sorted(layer for layer in (rules or Rules()).hold if not 0 <= layer < info.n_layers)
    if bad:
        raise SettingError(f"Rules(hold={bad})", f"blocks 0 to {info.n_layers - 1}", "name existing blocks")
