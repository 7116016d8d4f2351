"""Token rows with what belongs to them: `Batch`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mechattr.errors import SettingError
from mechattr.models.images import RowImages, check_images, digest, equal, moved, spans_of


@dataclass(frozen=True, eq=False)
class Batch:
    """Token rows with their attention mask. The batch axis is always there.

    Attributes:
        tokens: token ids.
        mask: true at real tokens; each row's real tokens are contiguous.
        example: for each row, the index of the pair it belongs to, so that rows may repeat and metrics find answers.
        strings: for each row, its real tokens as text.
        images: for each row, the tensors that a processor made of its images, empty for a row without one; the rows'
            tensors are joined along their first axis when they are run.
        image: true at the image tokens; always there beside `images`.
        source: what the encoder of an encoder-decoder model reads, row by row; the tokens are then its decoder's.
    """

    tokens: Int[Tensor, "batch pos"]
    mask: Bool[Tensor, "batch pos"]
    example: Int[Tensor, " batch"]
    strings: tuple[tuple[str, ...], ...] = field(default=(), repr=False)
    images: tuple[RowImages, ...] = field(default=(), repr=False)
    image: Bool[Tensor, "batch pos"] | None = field(default=None, repr=False)
    source: Batch | None = None

    def __post_init__(self) -> None:
        if self.tokens.ndim != 2 or self.tokens.shape != self.mask.shape or len(self.example) != len(self.tokens):
            shapes = [tuple(t.shape) for t in (self.tokens, self.mask, self.example)]
            raise SettingError(
                "a batch",
                f"tokens {shapes[0]}, mask {shapes[1]}, example {shapes[2]}",
                "give tokens and mask of one shape [batch, pos] and one example index a row",
            )
        if len(self.strings) not in (0, len(self.tokens)):
            found = f"{len(self.tokens)} rows and the strings of {len(self.strings)}"
            raise SettingError("a batch", found, "give strings for all rows or for none")
        if self.tokens.dtype != torch.long or self.mask.dtype != torch.bool:
            raise SettingError(
                "a batch", f"tokens {self.tokens.dtype}, mask {self.mask.dtype}", "use int64 tokens and a bool mask"
            )
        if not bool(self.mask.any(1).all()):
            raise SettingError("a batch", "a row without any real token", "drop empty prompts")
        starts = (self.mask[:, 1:] & ~self.mask[:, :-1]).sum(1) + self.mask[:, 0]
        if bool((starts > 1).any()):
            raise SettingError("a batch", "padding between real tokens", "pad at one end of each row")
        check_images(self.images, self.image, self.mask)
        if self.source is not None and len(self.source) != len(self.tokens):
            found = f"{len(self.tokens)} rows and a source of {len(self.source)}"
            raise SettingError("a batch", found, "give one source row for each row")

    @classmethod
    def of(
        cls,
        tokens: Tensor,
        mask: Tensor | None = None,
        strings: Sequence[Sequence[str]] = (),
        *,
        images: Sequence[RowImages] = (),
        image: Tensor | None = None,
    ) -> Batch:
        """A batch of token ids; without a mask every token is real."""
        tokens = torch.atleast_2d(tokens)
        mask = torch.ones_like(tokens, dtype=torch.bool) if mask is None else torch.atleast_2d(mask).bool()
        example = torch.arange(len(tokens), device=tokens.device)
        marked = None if image is None else torch.atleast_2d(image)
        return cls(tokens, mask, example, tuple(tuple(row) for row in strings), tuple(images), marked)

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def device(self) -> torch.device:
        """Where the tokens are."""
        return self.tokens.device

    @property
    def prompt(self) -> Batch:
        """What a prompt's text became: the source's rows where there is a source, else the rows themselves."""
        return self if self.source is None else self.source

    @cached_property
    def lengths(self) -> Int[Tensor, " batch"]:
        """Number of real tokens of each row."""
        return self.mask.sum(1)

    @cached_property
    def padded(self) -> bool:
        """Whether any row has padding."""
        return not bool(self.mask.all())

    @property
    def padding_side(self) -> str:
        """`"left"` when some row starts with padding, else `"right"`."""
        return "left" if not bool(self.mask[:, 0].all()) else "right"

    @cached_property
    def positions(self) -> Int[Tensor, "batch pos"]:
        """The position of each column, -1 at padding."""
        return torch.where(self.mask, self.mask.cumsum(1) - 1, -1)

    @property
    def image_spans(self) -> tuple[list[tuple[int, int]], ...]:
        """For each row, its runs of image tokens as (first position, one past the last)."""
        return tuple([] for _ in range(len(self))) if self.image is None else spans_of(self.image, self.mask)

    def differs(self, other: Batch) -> Bool[Tensor, "batch pos"]:
        """The columns at which two batches of one shape do not say the same: other tokens, or other images there."""
        found = self.tokens != other.tokens
        if self.image is not None and other.image is not None:
            changed = [not equal(x, y) for x, y in zip(self.images, other.images, strict=True)]
            found |= (self.image | other.image) & torch.tensor(changed, device=self.device)[:, None]
        return found & self.mask

    @property
    def content(self) -> Int[Tensor, "*dims"]:
        """What a hash of the batch is taken of: its tokens with those of its source or, for images, 32 bytes a row."""
        if self.source is not None:
            return torch.cat([self.tokens.flatten(), self.source.content.flatten()])
        if not self.images:
            return self.tokens
        digests = torch.frombuffer(bytearray(b"".join(digest(row) for row in self.images)), dtype=torch.long)
        return torch.cat([self.tokens.flatten(), digests.to(self.device)])

    def columns(self, position: int) -> Int[Tensor, " batch"]:
        """The column of a position in every row.

        Raises:
            SettingError: the position lies outside some row.
        """
        wanted = self.lengths + position if position < 0 else torch.full_like(self.lengths, position)
        if bool(((wanted < 0) | (wanted >= self.lengths)).any()):
            raise SettingError(
                f"position {position}",
                f"rows of {int(self.lengths.min())} to {int(self.lengths.max())} real tokens",
                "name a position that every row has (negative ones count from the row's end)",
            )
        return self.mask.int().argmax(1) + wanted

    def rows(self, index: Tensor | Sequence[int]) -> Batch:
        """The rows `index`, in that order; rows may repeat. One bool a row is a selection, too.

        Raises:
            SettingError: a row that does not exist.
        """
        index = row_numbers(index, len(self)).to(self.device)
        strings = tuple(self.strings[i] for i in index.tolist()) if self.strings else ()
        images = tuple(self.images[i] for i in index.tolist()) if self.images else ()
        image = None if self.image is None else self.image[index]
        source = None if self.source is None else self.source.rows(index)
        return Batch(self.tokens[index], self.mask[index], self.example[index], strings, images, image, source)

    def shortened(self) -> Batch:
        """The same rows without the columns behind the last real token of all."""
        width = int(self.mask.any(0).nonzero()[-1]) + 1
        image = None if self.image is None else self.image[:, :width]
        return replace(self, tokens=self.tokens[:, :width], mask=self.mask[:, :width], image=image)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        image = None if self.image is None else self.image.to(device)
        parts = self.tokens.to(device), self.mask.to(device), self.example.to(device)
        source = None if self.source is None else self.source.to(device)
        return Batch(*parts, self.strings, moved(self.images, device), image, source)


def row_numbers(index: Tensor | Sequence[int], n: int) -> Int[Tensor, " chosen"]:
    """Row numbers as a tensor, from numbers (negative: from the end) or from one bool for each of the `n` rows.

    Raises:
        SettingError: something else, or a row that does not exist.
    """
    chosen = torch.as_tensor(index)
    if chosen.dtype == torch.bool and chosen.shape == (n,):
        return chosen.nonzero()[:, 0]
    numbers = chosen.long()
    whole = chosen.dtype != torch.bool and bool((numbers == chosen).all())
    if chosen.ndim != 1 or not whole or bool(((numbers < -n) | (numbers >= n)).any()):
        raise SettingError(f"rows {index}", f"{n} rows", "give a list of row numbers, or one bool for each row")
    return numbers
