"""Images of a batch: for each row the tensors that a processor made of them, and the columns that stand for them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mechattr.errors import SettingError

RowImages = Mapping[str, Tensor]  # a processor's tensors of one row, such as `pixel_values`; empty without an image


def check_images(images: Sequence[RowImages], image: Tensor | None, mask: Tensor) -> None:
    """Whether the images of a batch fit its rows.

    Raises:
        SettingError: they do not.
    """
    if not images and image is None:
        return
    if len(images) != len(mask):
        found = f"{len(mask)} rows and the images of {len(images)}"
        raise SettingError("a batch with images", found, "give one mapping a row, an empty one where there is no image")
    bad = next((x for row in images for x in row.values() if not isinstance(x, Tensor) or not x.ndim), None)
    if bad is not None:
        fix = "give the processor's tensors of each row (return_tensors='pt')"
        raise SettingError("a batch with images", f"a {type(bad).__name__} among them", fix)
    if len({frozenset(row) for row in images if row}) > 1:
        raise SettingError(
            "a batch with images", "rows with tensors of different names", "prepare all rows with one processor"
        )
    if image is None or image.shape != mask.shape or image.dtype != torch.bool:
        found = "no image=" if image is None else f"image= of shape {tuple(image.shape)}, {image.dtype}"
        fix = "say which columns are image tokens: image=tokens == model.info.image_token"
        raise SettingError("a batch with images", found, fix)
    if bool((image & ~mask).any()):
        raise SettingError("a batch with images", "image tokens in the padding", "pad with another token")
    for row, (given, there) in enumerate(zip(images, image.any(1).tolist(), strict=True)):
        if bool(given) != there:
            found = f"row {row} has " + ("image tokens and no image" if there else "an image and no image token")
            raise SettingError("a batch with images", found, "give each row its images, and a place for them")


def marked(tokens: Int[Tensor, "*dims"], token: int | None) -> Bool[Tensor, "*dims"]:
    """Where the image token of a model stands."""
    return torch.zeros_like(tokens, dtype=torch.bool) if token is None else tokens.eq(token)


def spans_of(image: Bool[Tensor, "batch pos"], mask: Bool[Tensor, "batch pos"]) -> tuple[list[tuple[int, int]], ...]:
    """For each row, the runs of image tokens as (first position, one past the last)."""
    rows = []
    for shown, real in zip(image.cpu(), mask.cpu(), strict=True):
        edges = torch.nn.functional.pad(shown[real].int(), (1, 1)).diff()
        starts, ends = (edges == 1).nonzero()[:, 0].tolist(), (edges == -1).nonzero()[:, 0].tolist()
        rows.append(list(zip(starts, ends, strict=True)))
    return tuple(rows)


def moved(images: Sequence[RowImages], device: torch.device | str) -> tuple[RowImages, ...]:
    """The images on another device; rows that share their images still do."""
    there = {id(row): {name: x.to(device) for name, x in row.items()} for row in images}
    return tuple(there[id(row)] for row in images)


def joined(images: Iterable[RowImages]) -> dict[str, Tensor]:
    """The tensors of several rows, one after the other along their first axis. Where `image_sizes` are among them,
    images of other sizes or other numbers of tiles are filled with zeros at their ends, as processors do.

    Raises:
        SettingError: tensors whose other axes do not agree, and no sizes.
    """
    rows = [row for row in images if row]
    together = {}
    for name in rows[0] if rows else ():
        parts = [row[name] for row in rows]
        shapes = {x.shape[1:] for x in parts}
        if len(shapes) > 1:
            if "image_sizes" not in rows[0] or len({len(shape) for shape in shapes}) > 1:
                found = f"{name} of shapes {' and '.join(str(tuple(shape)) for shape in sorted(shapes))}"
                raise SettingError("a batch with images", found, "prepare all rows with one processor")
            largest = [max(sizes) for sizes in zip(*shapes, strict=True)]
            parts = [_filled(x, largest) for x in parts]
        together[name] = torch.cat(parts)
    return together


def _filled(x: Tensor, largest: Sequence[int]) -> Tensor:
    missing = [m - n for n, m in zip(x.shape[1:], largest, strict=True)]
    return torch.nn.functional.pad(x, [pad for m in reversed(missing) for pad in (0, m)])


def equal(one: RowImages, other: RowImages) -> bool:
    """Whether two rows show the same images."""
    return one is other or (one.keys() == other.keys() and all(torch.equal(x, other[name]) for name, x in one.items()))


def digest(row: RowImages) -> bytes:
    """sha256 of the images of a row."""
    sha = hashlib.sha256()
    for name, x in sorted(row.items()):
        sha.update(f"{name} {x.dtype} {tuple(x.shape)}".encode())
        sha.update(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return sha.digest()
