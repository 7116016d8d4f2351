"""Edits: what is done to an activation, and where.

`Edit("z", Zero(), layers=[3], heads=[5], positions=[-1])` sets one head's output to zero at the last token. An operator is
a callable `op(x, place) -> x` on the selected part of an activation; the classes here and a plain function are used alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mechattr.errors import MismatchError, SettingError, UnsupportedFeatureError

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
    selected: tuple[int, int] = (0, 0)


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
    values: Tensor = getattr(found, "values", found)
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
            return _reference(self.value, x, place)[place.index]
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

    def __call__(self, x: Tensor, place: Place) -> Tensor:
        return torch.zeros_like(x)


@dataclass(frozen=True, eq=False, slots=True)
class Mean:
    """Replace by the mean over the rows of a recording, position by position."""

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
        return _reference(self.reference, x, place)[torch.as_tensor(self.rows, device=x.device)][place.index]


@dataclass(frozen=True, eq=False, slots=True)
class Ablate:
    """Remove the component along a direction of the last axis: x - (x.d) d with d normalised."""

    direction: Tensor

    def __call__(self, x: Tensor, place: Place) -> Tensor:
        unit = _like(self.direction / self.direction.norm(), x)
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


@dataclass(frozen=True, eq=False, slots=True)
class Edit:
    """One operator at one site.

    Args:
        site: short name (all layers, or those of `layers`) or full name.
        op: an operator of this module, or a function `op(x, place) -> x` on the selected part.
        layers: restricts a short name.
        positions: real-token positions, the same in every selected row (negative: from the end of the prompt);
            `"prompt"` or `"generated"` during generation; `None` is everywhere. At `pattern` and `attn_scores`
            they are query positions.
        heads: heads, or kv heads at `k`, `rot_k` and `v`.
        neurons: indices of the last axis of `mlp_pre`, `mlp_pre_linear` and `mlp_post`.
        rows: rows of the batch.
    """

    site: str
    op: Operator
    layers: Sequence[int] | None = None
    positions: Sequence[int] | str | None = None
    heads: Sequence[int] | None = None
    neurons: Sequence[int] | None = None
    rows: Sequence[int] | None = None


@dataclass(frozen=True, eq=False, slots=True)
class Frame:
    """Which positions the columns of the current forward pass are: all of them in a run, few while decoding.

    Attributes:
        lengths: prompt length of each row.
        queries: position of each column that is being computed, -1 at padding.
        keys: position of each column that attention can see.
    """

    lengths: Tensor
    queries: Tensor
    keys: Tensor

    def of(self, columns: int) -> Tensor:
        """The positions of an activation's columns: those computed now, or the last `columns` that attention sees."""
        return self.queries if columns == self.queries.shape[1] else self.keys[:, -columns:]


def apply(edit: Edit, x: Tensor, site: str, axes: tuple[str, ...], frame: Frame) -> Tensor:
    """The activation `x` after the edit; `x` itself is not written to."""
    if edit.positions is None:
        return _at(edit, x, site, axes, None)
    positions = frame.queries if "query" in axes else frame.of(x.shape[1])
    copies = len(x) // len(frame.lengths)  # beams repeat each prompt's row
    lengths = frame.lengths.repeat_interleave(copies)
    if isinstance(edit.positions, str):  # prompts end in one column, so the same columns are generated in every row
        generated = positions[0] >= lengths[0]
        columns = (generated == (edit.positions == "generated")).nonzero()[:, 0]
        if len(columns) == len(generated):
            return _at(edit, x, site, axes, None)
        rows = torch.arange(len(x), device=x.device) if edit.rows is None else _rows(edit.rows, copies, x.device)
        return _at(edit, x, site, axes, (rows, columns.expand(len(rows), -1))) if len(columns) else x
    chosen = torch.arange(len(x), device=x.device) if edit.rows is None else _rows(edit.rows, copies, x.device)
    wanted = torch.tensor(list(edit.positions), device=x.device).expand(len(chosen), -1)
    wanted = torch.where(wanted < 0, lengths[chosen, None] + wanted, wanted)
    hits = positions[chosen][:, None, :] == wanted[:, :, None]  # [rows, slots, columns]
    if bool(hits.any(2).all()):
        return _at(edit, x, site, axes, (chosen, hits.int().argmax(2)))
    for slot in range(wanted.shape[1]):
        here = hits[:, slot].any(1).nonzero()[:, 0]
        if len(here):
            columns = hits[here, slot].int().argmax(1)[:, None]
            x = _at(edit, x, site, axes, (chosen[here], columns), (here, slot), (len(chosen), wanted.shape[1]))
    return x


def _rows(rows: Sequence[int], copies: int, device: torch.device) -> Tensor:
    first = torch.as_tensor(rows, device=device)[:, None] * copies
    return (first + torch.arange(copies, device=device)).flatten()


def _at(
    edit: Edit,
    x: Tensor,
    site: str,
    axes: tuple[str, ...],
    grid: tuple[Tensor, Tensor] | None,
    part: tuple[Tensor, int] | None = None,
    selected: tuple[int, int] = (0, 0),
) -> Tensor:
    """Applies the operator to the selected part: `grid` gives rows [R] and columns [R, P], `None` all columns."""
    picks: dict[int, Tensor] = {}
    if grid is not None:
        picks[0], picks[axes.index("query") if "query" in axes else 1] = grid
    elif edit.rows is not None:
        picks[0] = _rows(edit.rows, 1, x.device)
    features = edit.heads if edit.heads is not None else edit.neurons
    if features is not None:
        picks[axes.index(feature_axis(axes))] = torch.as_tensor(features, device=x.device)
    index = _grid_index(picks, x.shape, x.device)
    place = Place(site, index, tuple(x.shape), part, selected)
    if index == (slice(None),):
        return edit.op(x, place)
    out = x.clone()
    out[index] = edit.op(x[index], place)
    return out


def _grid_index(picks: dict[int, Tensor], shape: Sequence[int], device: torch.device) -> Index:
    """One index tensor a dimension, shaped so that they broadcast to the selected block in the order of the axes."""
    if not picks:
        return (slice(None),)
    n = max(picks) + 1
    index = []
    for dim in range(n):
        pick = picks.get(dim, torch.arange(shape[dim], device=device))
        view = [1] * n
        view[dim] = -1
        if pick.ndim == 2:  # columns differ from row to row
            view[0] = len(pick)
        index.append(pick.reshape(view))
    return tuple(index)


def feature_axis(axes: tuple[str, ...]) -> str:
    """The axis that `heads` or `neurons` select: `head`, `kv_head` or `neuron`; empty if there is none."""
    return next((axis for axis in axes if axis in ("head", "kv_head", "neuron")), "")


def validate(edit: Edit, site: str, axes: tuple[str, ...], sizes: Mapping[str, int], lengths: Tensor) -> None:
    """Checks an edit against a model and a batch, before anything runs.

    Raises:
        SettingError: a selection that the site does not have, or that is out of range.
        UnsupportedFeatureError: a named group of positions that does not exist.
    """
    if not callable(edit.op):
        raise SettingError(f"an edit of {site} with op {edit.op!r}", "that is not callable", "use Set, Add, Zero, ...")
    axis = feature_axis(axes)
    for name, values, wanted in (("heads", edit.heads, ("head", "kv_head")), ("neurons", edit.neurons, ("neuron",))):
        if values is None:
            continue
        if axis not in wanted:
            raise SettingError(f"{name}={list(values)} at {site}", f"its axes are {', '.join(axes)}", f"leave {name} out")
        bad = [v for v in values if not 0 <= v < sizes[axis]]
        if bad:
            raise SettingError(f"{name}={bad} at {site}", f"{axis} runs from 0 to {sizes[axis] - 1}", "name existing ones")
    if edit.rows is not None:
        bad = [row for row in edit.rows if not 0 <= row < len(lengths)]
        if bad:
            raise SettingError(f"rows={bad}", f"a batch of {len(lengths)} rows", "count rows from 0")
    if isinstance(edit.positions, str):
        if edit.positions not in ("prompt", "generated"):
            raise UnsupportedFeatureError(
                f"positions={edit.positions!r}", "unknown group", "use 'prompt', 'generated' or position numbers"
            )
    elif edit.positions is not None:
        if "pos" not in axes and "query" not in axes:
            raise SettingError(f"positions at {site}", f"its axes are {', '.join(axes)}", "leave positions out")
        rows = lengths if edit.rows is None else lengths[torch.as_tensor(edit.rows, device=lengths.device)]
        low = [p for p in edit.positions if p < -int(rows.min())]
        if low:
            raise SettingError(
                f"positions={low}", f"the shortest row has {int(rows.min())} tokens", "name positions that every row has"
            )
