"""Small pictures, the batches that show them, and processors that need no torchvision."""

from __future__ import annotations

from typing import Any

import families
import torch
import transformers as tf
from PIL import Image
from tokenizers import AddedToken, models
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from mechattr.models import Batch
from mechattr.models.families.vision import IMAGE_TOKEN
from mechattr.models.images import RowImages, joined

FAMILIES = ("llava", "qwen2_vl", "qwen2_5_vl")
OTHERS = ("llava_next", "mistral3", "internvl")
ROWS = ((7, 8, 4, 4, 4, 4, 9, 10, 11), (12, 4, 4, 4, 4, 13), (5, 6, 7))


SIZES = {"image_sizes": torch.tensor([[8, 8]])}


def rows_of(family: str) -> tuple[tuple[int, ...], ...]:
    """`ROWS`, with as many image tokens as a picture of the family has features."""
    if family != "llava_next":
        return ROWS
    return (7, 8, *[4] * 10, 9, 10, 11), (12, *[4] * 10, 13), (5, 6, 7)


def picture(family: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> RowImages:
    """One picture as the processor of a family would give it."""
    generator = torch.Generator().manual_seed(seed)
    if family == "llava_next":  # the whole and one tile of it
        return {"pixel_values": torch.randn(1, 2, 3, 8, 8, generator=generator).to(dtype), **SIZES}
    if "qwen" not in family:
        pixels = torch.randn(1, 3, 8, 8, generator=generator).to(dtype)
        return {"pixel_values": pixels, **(SIZES if family == "mistral3" else {})}
    pixels = torch.randn(16, 24, generator=generator).to(dtype)
    return {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 4, 4]])}


def shown(family: str, side: str = "right", seed: int = 0, rows: Any = None, dtype: Any = torch.float32) -> Batch:
    """Rows of different lengths, with a picture each but for those without an image token."""
    rows = rows or rows_of(family)
    width = max(map(len, rows))
    tokens, mask = torch.full((len(rows), width), 2), torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        tokens[i, place], mask[i, place] = torch.tensor(row), True
    images = [picture(family, seed + i, dtype) if IMAGE_TOKEN in row else {} for i, row in enumerate(rows)]
    return Batch.of(tokens, mask, images=images, image=tokens == IMAGE_TOKEN)


def alone(batch: Batch, row: int) -> Batch:
    """One row without its padding; a text where it has no picture."""
    tokens = batch.tokens[row, batch.mask[row]]
    if not batch.images[row]:
        return Batch.of(tokens)
    return Batch.of(tokens, images=[batch.images[row]], image=tokens == IMAGE_TOKEN)


def native(family: str, batch: Batch) -> dict[str, Any]:
    """What transformers' own call is given."""
    given = {"attention_mask": batch.mask.long(), **joined(batch.images)}
    return given if "qwen" not in family else {**given, "mm_token_type_ids": batch.image.int()}


def image_tokenizer() -> Any:
    """The tokenizer of the other tests with an image token, whose id is that of the small models."""
    words = {w: i for i, w in enumerate(["<s>", "</s>", "<pad>", "a", "<image>", "b", "Ġa", "Ġb", "Ġ"])}
    backend = families.tokenizer().backend_tokenizer
    backend.model = models.BPE(words, [("Ġ", "a"), ("Ġ", "b")])
    backend.add_special_tokens([AddedToken("<image>", special=True)])
    return tf.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def llava_processor() -> tf.LlavaProcessor:
    """transformers' own, with the image processor that needs PIL alone."""
    size = CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    return tf.LlavaProcessor(
        size,
        image_tokenizer(),
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


class QwenProcessor:
    """Stands for Qwen2VLProcessor, whose video processor needs torchvision: transformers' own image processor, and the
    image token once for each feature."""

    image_token = "<image>"

    def __init__(self) -> None:
        self.tokenizer = image_tokenizer()
        self.image_processor = Qwen2VLImageProcessorPil(
            patch_size=2, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 64, "longest_edge": 64}
        )

    def __call__(self, text: list[str], images: list[Any], return_tensors: str, **settings: Any) -> dict[str, Any]:
        made = self.image_processor(images=images, return_tensors=return_tensors)
        (whole,) = text
        for grid in made["image_grid_thw"]:
            whole = whole.replace(self.image_token, "<here>" * (int(grid.prod()) // 4), 1)
        whole = whole.replace("<here>", self.image_token)
        return {**self.tokenizer([whole], return_tensors=return_tensors, **settings), **made}


def photo(seed: int = 0) -> Image.Image:
    """A random image of 8 by 8 pixels."""
    noise = torch.randint(0, 256, (8, 8, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(noise.numpy())
