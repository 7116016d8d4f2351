"""Operators: what an edit does to the selected part of an activation.

An operator is a callable `op(x, place) -> x`; the classes here and plain functions are used alike. It gets a tensor of
its own, with the axes of the site restricted to what the edit selects, and returns one of the same shape and dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mechattr.errors import MismatchError, SettingError

Index = tuple[Any, ...]


@dataclass(frozen=True, eq=False, slots=True)
class Place:
    """Where an operator is being applied.

    Attributes:
        site: the full site name.
        index: what was selected of the whole activation, as an index tuple.
        shape: the shape of the whole activation.
        part: set while a selection is applied position by position during generation: the rows (within the selected
            rows) and the slot (within the selected positions) that this call covers.
        selected: number of selected rows and positions.
    """

    site: str
    index: Index
    shape: tuple[int, ...]
    part: tuple[Tensor, int] | None = None
    selected: tuple[int, ...] = (0, 0)

    @property
    def whole(self) -> bool:
        """Whether the whole activation was selected."""
        return len(self.index) == 1 and isinstance(self.index[0], slice)


Operator = Callable[[Tensor, Place], Tensor]


def _like(value: Tensor, x: Tensor) -> Tensor:
    return value.to(device=x.device, dtype=x.dtype)


def _reference(source: Mapping[str, Any], x: Tensor, place: Place) -> Tensor:
    """The whole activation of `source` at the place, checked to fit."""
    if place.site not in source:
        raise MismatchError(
            f"values of {place.site} from a recording", "the recording has no such site", "record that site as well"
        )
    found = source[place.site]
    values: Tensor = found if isinstance(found, Tensor) else found.values
    if values.shape[1:] != place.shape[1:]:
        raise MismatchError(
            f"values of {place.site} with shape {tuple(place.shape)}",
            f"the recording has shape {tuple(values.shape)}",
            "record on prompts with the same number of tokens and the same padding",
        )
    return _like(values, x)


@dataclass(frozen=True, eq=False, slots=True)
class Set:
    """Replace by a tensor that broadcasts to the selection, or by the same place of a recording (a `Cache`)."""

    value: Tensor | Mapping[str, Any] | float

    def __call__(self, x: Tensor, place: Place) -> Tensor:
        if isinstance(self.value, Mapping):
            values = _reference(self.value, x, place)
            if len(values) != place.shape[0]:
                raise MismatchError(
                    f"values of {place.site} for {place.shape[0]} rows",
                    f"the recording has {len(values)}",
                    "record a batch of the same rows, or use Resample to choose among them",
                )
            return values[place.index]
        return _broadcast(torch.as_tensor(self.value), x, place)


@dataclass(frozen=True, eq=False, slots=True)
class Add:
    """Add a tensor that broadcasts to the selection."""

    value: Tensor | float

    def __call__(self, x: Tensor, place: Place) -> Tensor:
        return x + _broadcast(torch.as_tensor(self.value), x, place)


@dataclass(frozen=True, eq=False, slots=True)
class Scale:
    """Multiply by a number or by a tensor that broadcasts to the selection."""

    factor: Tensor | float

    def __call__(self, x: Tensor, place: Place) -> Tensor:
        return x * _broadcast(torch.as_tensor(self.factor), x, place)


@dataclass(frozen=True, slots=True)
class Zero:
    """Replace by zeros."""

    def __call__(self, x: Tensor, place: Place) -> Tensor:  # noqa: ARG002 (the signature of operators)
        return torch.zeros_like(x)


@dataclass(frozen=True, eq=False, slots=True)
class Mean:
    """Replace by the mean over the rows of a recording, column by column; padding of the recording counts as well."""

    reference: Mapping[str, Any]

    def __call__(self, x: Tensor, place: Place) -> Tensor:
        whole = _reference(self.reference, x, place).mean(0, keepdim=True)
        return whole.expand(place.shape)[place.index]


@dataclass(frozen=True, eq=False, slots=True)
class Resample:
    """Replace by other rows of a recording: row `i` takes row `rows[i]`."""

    reference: Mapping[str, Any]
    rows: Sequence[int]

    def __call__(self, x: Tensor, place: Place) -> Tensor:
        if len(self.rows) != place.shape[0]:
            raise SettingError(
                f"Resample with {len(self.rows)} rows",
                f"a batch of {place.shape[0]} rows",
                "name one source row for every row of the batch",
            )
        values = _reference(self.reference, x, place)
        bad = [row for row in self.rows if not 0 <= row < len(values)]
        if bad:
            raise SettingError(f"Resample from rows {bad}", f"a recording of {len(values)} rows", "count rows from 0")
        return values[list(self.rows)][place.index]


@dataclass(frozen=True, eq=False, slots=True)
class Ablate:
    """Remove the component along a direction of the last axis: x - (x.d) d with d normalised."""

    direction: Tensor

    def __call__(self, x: Tensor, place: Place) -> Tensor:
        length = self.direction.norm()
        if self.direction.shape != x.shape[-1:] or not bool(length > 0):
            raise SettingError(
                f"Ablate at {place.site}",
                f"a direction of shape {tuple(self.direction.shape)} and length {float(length):g}",
                f"give a non-zero direction of {x.shape[-1]} numbers",
            )
        unit = _like(self.direction / length, x)
        return x - (x @ unit)[..., None] * unit


def _broadcast(value: Tensor, x: Tensor, place: Place) -> Tensor:
    value = _like(value, x)
    try:
        if place.part is not None and value.ndim == x.ndim:  # one slot of a selection that spans several decoding steps
            rows, slot = place.part
            value = value.expand(*place.selected, *value.shape[2:])[rows, slot : slot + 1]
        return value.expand(x.shape)
    except RuntimeError as error:
        raise SettingError(
            f"a value of shape {tuple(value.shape)} at {place.site}",
            f"the selection has shape {tuple(x.shape)}",
            "give a value that broadcasts to [selected rows, selected positions, ...]",
        ) from error
