"""Edits: which operator acts where.

`Edit("z", Zero(), layers=[3], heads=[5], positions=[-1])` sets one head's output to zero at the last token.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mechattr.errors import SettingError, UnsupportedFeatureError
from mechattr.models.operators import Index, Operator, Place
from mechattr.sites import parse, position_axis, reads_source

if TYPE_CHECKING:
    from mechattr.models.base import Batch


@dataclass(frozen=True, eq=False, slots=True)
class Edit:
    """One operator at one site.

    Args:
        site: short name (all layers, or those of `layers`) or full name.
        op: an operator (`mechattr.models.operators`), or a function `op(x, place) -> x` on the selected part.
        layers: restricts a short name.
        positions: real-token positions, the same in every selected row (negative: from the end of the prompt);
            `"prompt"` or `"generated"` during generation; `None` is everywhere. At `pattern` and `attn_scores`
            they are query positions. At sites of an encoder, and at `cross_k` and `cross_v`, they count the tokens of
            the source.
        heads: heads, or kv heads at `k`, `rot_k` and `v`.
        neurons: indices of the last axis of `mlp_pre`, `mlp_pre_linear` and `mlp_post`, or of latents.
        experts: experts at `router_logits` and `expert_out`.
        rows: rows of the batch.
    """

    site: str
    op: Operator
    layers: Sequence[int] | None = None
    positions: Sequence[int] | str | None = None
    heads: Sequence[int] | None = None
    neurons: Sequence[int] | None = None
    experts: Sequence[int] | None = None
    rows: Sequence[int] | None = None


@dataclass(frozen=True, eq=False, slots=True)
class Frame:
    """Which positions the columns of the current forward pass are: all of them in a run, few while decoding.

    Attributes:
        lengths: prompt length of each row.
        queries: position of each column that is being computed, -1 at padding.
        keys: position of each column that attention can see.
        source: prompt lengths and the position of each column, of what an encoder reads.
    """

    lengths: Tensor
    queries: Tensor
    keys: Tensor
    source: tuple[Tensor, Tensor] | None = None

    @classmethod
    def whole(cls, batch: Batch) -> Frame:
        """All columns of a batch."""
        source = None if batch.source is None else (batch.source.lengths, batch.source.positions)
        return cls(batch.lengths, batch.positions, batch.positions, source)

    def of(self, axes: tuple[str, ...], shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Prompt lengths, and the positions of an activation's columns: those computed now, or at keys and values the
        last ones that attention sees."""
        if reads_source(axes):
            assert self.source is not None  # sites of an encoder fire where there is one
            return self.source
        columns = shape[position_axis(axes)]
        return self.lengths, self.queries if columns == self.queries.shape[1] else self.keys[:, -columns:]


def apply(edit: Edit, x: Tensor, site: str, axes: tuple[str, ...], frame: Frame) -> Tensor:
    """The activation `x` after the edit; `x` itself is not written to."""
    for place in places(edit, tuple(x.shape), site, axes, frame, x.device):
        if place.whole:
            x = _operate(edit.op, x.clone(), place)
        else:
            out = x.clone()
            out[place.index] = _operate(edit.op, x[place.index], place)
            x = out
    return x


def places(
    edit: Edit, shape: tuple[int, ...], site: str, axes: tuple[str, ...], frame: Frame, device: torch.device
) -> list[Place]:
    """Where an edit acts on an activation of a given shape, in turn: one place, or while decoding any number."""
    copies = shape[0] // len(frame.lengths)  # beams repeat each prompt's row
    every = torch.arange(shape[0], device=device).view(-1, copies)
    rows = None if edit.rows is None else every[list(edit.rows)].flatten()

    def at(rows: Tensor | None, columns: Tensor | None = None) -> Index:
        picks: dict[int, Tensor] = {}
        if rows is not None:
            picks[0] = rows
        if columns is not None:
            picks[position_axis(axes)] = columns
        features = next((given for given in (edit.heads, edit.neurons, edit.experts) if given is not None), None)
        if features is not None:
            picks[axes.index(feature_axis(axes))] = torch.as_tensor(features, dtype=torch.long, device=device)
        return _grid_index(picks, shape, device)

    if edit.positions is None:
        return [Place(site, at(rows), shape)]
    lengths, positions = frame.of(axes, shape)
    lengths, positions = lengths.repeat_interleave(copies), positions.repeat_interleave(shape[0] // len(positions), 0)
    chosen = every.flatten() if rows is None else rows
    if isinstance(edit.positions, str):  # prompts end in one column, so the same columns are generated in every row
        generated = positions[0] >= lengths[0]
        columns = (generated == (edit.positions == "generated")).nonzero()[:, 0]
        if len(columns) == len(generated):
            return [Place(site, at(rows), shape)]
        return [Place(site, at(chosen, columns.expand(len(chosen), -1)), shape)] if len(columns) else []
    wanted = torch.tensor(list(edit.positions), dtype=torch.long, device=device).expand(len(chosen), -1)
    wanted = torch.where(wanted < 0, lengths[chosen, None] + wanted, wanted)
    hits = positions[chosen][:, None, :] == wanted[:, :, None]  # [rows, slots, columns]
    if bool(hits.any(2).all()):
        return [Place(site, at(chosen, hits.int().argmax(2)), shape)]
    found: list[Place] = []
    for slot in range(wanted.shape[1]):  # while decoding, a forward pass has some of the positions only
        here = hits[:, slot].any(1).nonzero()[:, 0]
        if len(here):
            columns = hits[here, slot].int().argmax(1)[:, None]
            found.append(Place(site, at(chosen[here], columns), shape, (here, slot), tuple(wanted.shape)))
    return found


def _operate(op: Operator, x: Tensor, place: Place) -> Tensor:
    """The operator's value, which must fit: assigning another shape or dtype would broadcast or cast unseen."""
    value = op(x, place)
    fits = isinstance(value, Tensor) and (value.shape, value.dtype, value.device) == (x.shape, x.dtype, x.device)
    if not fits:
        found = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise SettingError(
            f"an edit of {place.site}",
            f"its operator got {x.dtype} {tuple(x.shape)} and returned {found}",
            "return a tensor of the same shape, dtype and device",
        )
    return value


def _grid_index(picks: dict[int, Tensor], shape: Sequence[int], device: torch.device) -> Index:
    """One index tensor a dimension, shaped so that they broadcast to the selected block in the order of the axes."""
    if not picks:
        return (slice(None),)
    n = max(picks) + 1
    index = []
    for dim in range(n):
        pick = picks.get(dim, torch.arange(shape[dim], device=device))
        view = [1] * n
        view[dim] = pick.shape[-1]
        if pick.ndim == 2:  # columns differ from row to row
            view[0] = len(pick)
        index.append(pick.reshape(view))
    return tuple(index)


def feature_axis(axes: tuple[str, ...]) -> str:
    """The axis that an edit selects by `heads`, `neurons` or `experts`; empty if there is none."""
    return next((axis for axis in axes if axis in ("head", "kv_head", "neuron", "latent", "expert")), "")


def validate(edit: Edit, site: str, axes: tuple[str, ...], sizes: Mapping[str, int], lengths: Tensor) -> None:
    """Checks an edit against a model and a batch, before anything runs.

    Args:
        edit: the edit.
        site: one of the full names that it applies to.
        axes: the axes of that site.
        sizes: length of `layer` and of the axes `head`, `kv_head`, `neuron`, `latent` and `expert`.
        lengths: number of real tokens of each row.

    Raises:
        SettingError: a selection that the site does not have, or that is out of range.
        UnsupportedFeatureError: a named group of positions that does not exist.
    """
    if not callable(edit.op):
        raise SettingError(f"an edit of {site} with op {edit.op!r}", "that is not callable", "use Set, Add, Zero, ...")
    for name in ("layers", "positions", "heads", "neurons", "experts", "rows"):
        _check_numbers(name, getattr(edit, name), site)
    if edit.layers is not None and (edit.site == site or parse(site)[1] is None):
        found = "the full name says the layer" if edit.site == site else "the site exists once in the model"
        raise SettingError(f"layers={list(edit.layers)} at {site}", found, "leave layers out")
    _in_range("layers", edit.layers, sizes["layer"], "the model's layers")
    axis = feature_axis(axes)
    for name, values, wanted in (
        ("heads", edit.heads, ("head", "kv_head")),
        ("neurons", edit.neurons, ("neuron", "latent")),
        ("experts", edit.experts, ("expert",)),
    ):
        if values is None:
            continue
        if axis not in wanted:
            shown = f"{name}={list(values)} at {site}"
            raise SettingError(shown, f"its axes are {', '.join(axes)}", f"leave {name} out")
        _in_range(name, values, sizes[axis], f"the axis {axis} of {site}")
    _in_range("rows", edit.rows, len(lengths), "the batch")
    if isinstance(edit.positions, str):
        if edit.positions not in ("prompt", "generated"):
            fix = "use 'prompt', 'generated' or position numbers"
            raise UnsupportedFeatureError(f"positions={edit.positions!r}", "unknown group", fix)
    elif edit.positions is not None and (edit.rows is None or len(edit.rows)):
        shortest = int((lengths if edit.rows is None else lengths[list(edit.rows)]).min())
        low = [position for position in edit.positions if position < -shortest]
        if low:
            found = f"the shortest row has {shortest} tokens"
            raise SettingError(f"positions={low}", found, "name positions that every row has")


def _check_numbers(name: str, values: Any, site: str) -> None:
    """Whether a selection is a list of whole numbers: torch would cut off 1.5, and take a bool for row 0 or 1."""
    if values is None or (name == "positions" and isinstance(values, str)):
        return
    if isinstance(values, int):
        raise SettingError(f"{name}={values} at {site}", "a single number", f"give a list: {name}=[{values}]")
    try:
        good = not any(isinstance(v, bool) or getattr(v, "dtype", None) == torch.bool for v in values)
        for value in values:
            operator.index(value)
    except TypeError:
        good = False
    if not good:
        fix = f"give one, such as {name}=[0, 1]"
        raise SettingError(f"{name}={values!r} at {site}", "no list of whole numbers", fix)


def _in_range(name: str, values: Sequence[int] | None, size: int, of: str) -> None:
    bad = [value for value in values or () if not 0 <= value < size]
    if bad:
        raise SettingError(f"{name}={bad}", f"{of} has 0 to {size - 1}", "name existing ones")
