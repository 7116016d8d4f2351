"""Vision-language models: image features beside the tokens of a batch, and texts with images to a batch."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mechattr.errors import SettingError, UnsupportedFeatureError
from mechattr.models.base import Batch, ModelInfo
from mechattr.models.images import RowImages, joined, marked
from mechattr.models.tokenize import checked_texts, encode, pad, wants_special

_OF_TEXT = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")


def image_arguments(model: Any, batch: Batch, *, features: bool = True) -> dict[str, Any]:
    """What a transformers model is given beside token ids, so that image features stand at the image tokens.

    The vision tower has no sites: it runs once for each image of the batch however often its row is repeated, and no
    gradient enters it.

    Args:
        model: a vision-language model.
        batch: with images.
        features: run the tower; without it, only what positions need is given.

    Raises:
        SettingError: a row whose image tokens are not as many as the features of its images.
    """
    if batch.image is None or not any(batch.images):
        return {}
    tensors = joined(batch.images).items()
    given: dict[str, Any] = {name: x for name, x in tensors if name != "pixel_values" and _takes(model, name)}
    if _takes(model, "mm_token_type_ids"):
        given["mm_token_type_ids"] = batch.image.int()
    if features:
        given["mm_encoder_outputs"] = {"image": _features(model, batch, batch.image)}
    return given


def positions_of(model: Any, batch: Batch, first: int) -> Tensor | None:
    """Position ids of a run, from `first` on; `None` where the model makes them of time, height and width of images."""
    own = any(batch.images) and hasattr(model.base_model, "get_rope_index")
    return None if own else batch.positions.clamp(min=0) + first


@contextmanager
def unchanged(model: Any) -> Iterator[None]:
    """Puts back what a model of the Qwen-VL kind keeps of the positions of its last batch."""
    state = model.base_model.__dict__
    before = {name: state[name] for name in ("rope_deltas",) if name in state}
    try:
        yield
    finally:
        state.update(before)


def _takes(model: Any, name: str) -> bool:
    return name in inspect.signature(model.base_model.forward).parameters


def _features(model: Any, batch: Batch, image: Tensor) -> Any:
    """The tower's output for all images, in the order of the rows."""
    distinct = {id(row): row for row in batch.images if row}
    together, tower = joined(distinct.values()), model.base_model.get_image_features
    wanted = inspect.signature(tower).parameters
    with torch.no_grad():
        out = tower(**{name: x for name, x in together.items() if name in wanted}, return_dict=True)
    parts = iter(out.pooler_output)
    of_row = {key: [next(parts) for _ in range(_count(row))] for key, row in distinct.items()}
    for i, (row, tokens) in enumerate(zip(batch.images, image.sum(1).tolist(), strict=True)):
        made = sum(len(x) for x in of_row.get(id(row), ()))
        if tokens != made:
            raise SettingError(
                "a batch with images",
                f"row {i} has {tokens} image tokens, and its images give {made} features",
                "make it with model.tokenize(texts, images=...), or repeat the image token once for each feature",
            )
    every = [x for row in batch.images if row for x in of_row[id(row)]]
    out.pooler_output = torch.stack(every) if isinstance(out.pooler_output, Tensor) else every
    return out


def _count(row: RowImages) -> int:
    """Number of images of a row: every tensor has one entry for each image, or one for each of its patches."""
    return min(len(x) for x in row.values())


def tokenize_images(
    processor: Any,
    texts: str | Sequence[str],
    images: Any,
    *,
    info: ModelInfo,
    chat: bool,
    padding_side: str,
    device: torch.device,
) -> Batch:
    """Texts with images -> padded batch, each row prepared by the model's processor.

    Raises:
        UnsupportedFeatureError: a model without a vision tower.
        SettingError: no processor, other numbers of images than of texts or of image tokens in a text, something that
            is no image, or what `tokenize` refuses.
    """
    asked = "tokenizing text with images"
    if info.image_token is None:
        found = f"{info.name!r} has no vision tower"
        raise UnsupportedFeatureError(asked, found, "load a vision-language model, or leave images out")
    if processor is None:
        fix = "load it with tokenizer=processor, or use Batch.of(tokens, mask, images=..., image=...)"
        raise SettingError(asked, "this model has no processor", fix)
    given = checked_texts(processor.tokenizer, texts, padding_side)
    pictures = [_pictures(entry) for entry in ([images] if isinstance(texts, str) else images)]
    if len(pictures) != len(given):
        fix = "give each text its image, a list of images, or None"
        raise SettingError(asked, f"{len(given)} texts and images for {len(pictures)}", fix)
    rows = [_prepared(processor, text, own, chat) for text, own in zip(given, pictures, strict=True)]
    padded = pad([ids for ids, _ in rows], processor.tokenizer, padding_side=padding_side)
    if not any(row for _, row in rows):
        return padded.to(device)
    image = marked(padded.tokens, info.image_token)
    shown = [row for _, row in rows]
    return Batch.of(padded.tokens, padded.mask, padded.strings, images=shown, image=image).to(device)


def _pictures(entry: Any) -> list[Any]:
    return [] if entry is None else list(entry) if isinstance(entry, list | tuple) else [entry]


def _prepared(processor: Any, text: str, pictures: list[Any], chat: bool) -> tuple[list[int], RowImages]:
    """Ids of one text with its image tokens, and the tensors of its images."""
    mark = processor.image_token
    if chat and pictures and mark not in text:
        content = [*({"type": "image"} for _ in pictures), {"type": "text", "text": text}]
        message = [{"role": "user", "content": content}]
        text, chat = processor.apply_chat_template(message, tokenize=False, add_generation_prompt=True), False
    places = text.count(mark)
    if places != len(pictures):
        found = f"{len(pictures)} images, and {mark} {places} times in {text!r:.60}"
        raise SettingError("tokenizing text with images", found, f"write {mark} once where each image stands")
    if not pictures:
        return encode(processor.tokenizer, text, chat=chat), {}
    special = wants_special(processor.tokenizer, text)
    try:
        out = processor(text=[text], images=pictures, add_special_tokens=special, return_tensors="pt")
    except (ValueError, TypeError) as error:
        raise SettingError("an image", (str(error).splitlines() or ["?"])[0], "give PIL images, or arrays") from error
    return out["input_ids"][0].tolist(), {name: x for name, x in out.items() if name not in _OF_TEXT}
