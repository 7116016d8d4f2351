"""The prompts of a decomposition: texts or a batch, padded on the right so that columns are positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mechattr.errors import SettingError, UnsupportedFeatureError
from mechattr.labelled import Labelled
from mechattr.models.base import Batch, HookedModel
from mechattr.provenance import JSON, provenance

OVER_POSITIONS = ("pos", "query", "key")


@dataclass(frozen=True, eq=False, slots=True)
class Prompt:
    """What a method is asked about.

    Attributes:
        batch: rows padded on the right; `example` counts them.
        single: whether results have no batch axis, as for one text.
        strings: each row's tokens as text.
    """

    batch: Batch
    single: bool
    strings: tuple[tuple[str, ...], ...]

    def __len__(self) -> int:
        return len(self.batch)

    def table(self, values: Tensor, axes: Sequence[str], **coords: Sequence[int | str]) -> Labelled:
        """A tensor whose axes begin with `batch` as a table: NaN (whole numbers: -1) at padding, and without that axis
        for one text.

        Args:
            values: [batch, *axes].
            axes: the names of the rest; those of positions have the columns of the batch.
            **coords: of axes that are not counted from 0.
        """
        blank = torch.nan if values.is_floating_point() else -1
        if self.batch.padded:
            for place, axis in enumerate(axes, start=1):
                if axis in OVER_POSITIONS:
                    shape = [len(self), *([1] * len(axes))]
                    shape[place] = values.shape[place]
                    values = values.masked_fill(~self.batch.mask.reshape(shape), blank)
        values = values.detach().cpu()
        if self.single:
            return Labelled(values[0], tuple(axes), coords)
        return Labelled(values, ("batch", *axes), coords)

    def settings(self, *, method: str, passes: tuple[float, float], **more: JSON) -> dict[str, Any]:
        """The settings of a result: the tokens as text, the cost for all rows together, and what else it depends on."""
        return {
            "method": method,
            "n_prompts": len(self),
            "strings": [list(row) for row in self.strings],
            "passes": {"forward": passes[0], "backward": passes[1]},
            **more,
        }

    def provenance(self, model: HookedModel) -> dict[str, JSON]:
        """The model as described and fingerprinted, versions, and the tokens."""
        return provenance({**asdict(model.info), **model.fingerprint()}, tokens=self.batch.content)


def prompt_of(model: HookedModel, given: str | Sequence[str] | Batch) -> Prompt:
    """A text, texts or a batch as rows that the model can run.

    Raises:
        SettingError: something else, or an empty text.
        UnsupportedFeatureError: an encoder-decoder model, whose prompt and continuation are two sequences.
    """
    if model.info.n_encoder_layers:
        raise UnsupportedFeatureError(
            f"a decomposition of {model.info.name!r} ({model.info.family})",
            "an encoder-decoder model: part of what it reads comes from another sequence",
            "use activation_patching or attribution_patching, which take its sites",
        )
    if isinstance(given, Batch):
        batch = right_padded(given)
    elif isinstance(given, str) or (isinstance(given, Sequence) and all(isinstance(x, str) for x in given)):
        batch = model.tokenize(given if isinstance(given, str) else list(given))
    else:
        found = f"a {type(given).__name__}"
        raise SettingError("a prompt", found, "give a text, a list of texts or a Batch (such as task.clean)")
    batch = replace(batch, example=torch.arange(len(batch), device=batch.device))
    strings = batch.strings or tuple(
        tuple(f"<{token}>" for token in row[real].tolist()) for row, real in zip(batch.tokens, batch.mask, strict=True)
    )
    return Prompt(batch, isinstance(given, str), strings)


def right_padded(batch: Batch) -> Batch:
    """The same rows with their padding at the end."""
    if batch.padding_side == "right":
        return batch
    order = (~batch.mask).int().argsort(dim=1, stable=True)
    image = None if batch.image is None else batch.image.gather(1, order)
    return replace(batch, tokens=batch.tokens.gather(1, order), mask=batch.mask.gather(1, order), image=image)
