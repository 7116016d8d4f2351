"""Where steering acts in texts that are scored: positions count from the prompt, although the answer is there, too."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mechattr.errors import SettingError, UnknownNameError, nearest
from mechattr.models.base import Batch, HookedModel
from mechattr.steering.gates import Gate, Given
from mechattr.steering.moving import Moving
from mechattr.steering.operators import OPERATORS, Operation
from mechattr.steering.placing import WORDS, Multiplier, Positions
from mechattr.steering.vector import SteeringVector

Where = str | Sequence[int]


Steering = SteeringVector | Moving


@dataclass(frozen=True, eq=False, slots=True)
class _Masked:
    """An operation at some columns of each row."""

    operation: Operation
    mask: Bool[Tensor, "row column 1"]

    def __call__(self, x: Tensor, v: Tensor, factors: Tensor) -> Tensor:
        return torch.where(self.mask.to(x.device), self.operation(x, v, factors), x)


def applied(
    steering: Steering,
    model: HookedModel,
    factors: Multiplier,
    positions: Positions,
    operator: str | Operation,
    gate: Given | None = None,
) -> AbstractContextManager[Any]:
    """A block of `apply`.

    Raises:
        SettingError: an operator for a function of the state, which says itself what it does; and what `apply` raises.
    """
    if isinstance(steering, SteeringVector):
        return steering.apply(model, factors, positions, operator, gate)
    if operator != "add":
        found = f"{steering.kind}, which says itself what is added"
        raise SettingError(f"operator={operator!r}", found, "leave operator out")
    return steering.apply(model, factors, positions, gate)


def applied_to(
    steering: Steering,
    model: HookedModel,
    factors: Multiplier,
    positions: Where,
    operator: str | Operation,
    batch: Batch,
    starts: Int[Tensor, " row"],
) -> AbstractContextManager[Any]:
    """A block for one batch of prompts with what follows them, that steers at `positions` as a generation does, in
    which only the prompt is given: an answer counts as generated, `"last"` and negative positions count from the end of
    the prompt.

    Raises:
        SettingError: a position before the first of a prompt, or positions for a vector that has its own.
    """
    if isinstance(positions, str) and positions == "all":
        return applied(steering, model, factors, "all", operator)
    mask = columns(positions, batch, starts)
    if not isinstance(steering, SteeringVector):
        return applied(steering, model, factors, mask, operator)
    own = next((name for name, table in steering.tensors.items() if table.axes[0] == "pos"), None)
    if own is not None:
        raise SettingError(f"positions={positions!r}", f"a vector that has its own, at {own}", "leave positions out")
    operation = OPERATORS[operator] if isinstance(operator, str) else operator
    # one operation on all rows: a mask of `apply` has an edit for each row
    return applied(steering, model, factors, "all", _Masked(operation, mask[..., None]))


def columns(positions: Where, batch: Batch, starts: Int[Tensor, " row"]) -> Bool[Tensor, "row column"]:
    """The columns of prompts with what follows them at which steering acts in a generation from these prompts.

    Raises:
        SettingError: a position before the first of a prompt.
    """
    at, begins = batch.positions, starts[:, None]
    if isinstance(positions, str):
        words = {"all": at >= 0, "prompt": at < begins, "generated": at >= begins, "last": at == begins - 1}
        return words[positions] & batch.mask
    if min(positions, default=0) < -int(starts.min()):
        found = f"a prompt of {int(starts.min())} tokens"
        raise SettingError(f"positions={list(positions)}", found, "name positions that every prompt has")
    mask = torch.zeros_like(batch.mask)
    for position in positions:
        mask |= at == (position if position >= 0 else begins + position)
    return mask & batch.mask


def check_reached(positions: Where, batch: Batch, starts: Int[Tensor, " row"]) -> None:
    """Whether a text has one of the positions: where none has, nothing would be steered, and nothing said.

    Raises:
        SettingError: it has not.
    """
    whole = isinstance(positions, str) and positions == "all"
    if not whole and not bool(columns(positions, batch, starts).any()):
        found = f"texts of up to {int(batch.lengths.max())} tokens"
        if positions == "generated":
            found = "prompts without answers"
        shown = repr(positions) if isinstance(positions, str) else list(positions)
        raise SettingError(f"positions={shown}", found, "name positions that texts have")


def check_steering(name: str, given: Any) -> None:
    """Whether something steers.

    Raises:
        SettingError: it does not.
    """
    if not isinstance(given, Steering):
        fix = "give what a builder makes, or from_direction(model, direction)"
        raise SettingError(name, f"a {type(given).__name__}", fix)


def check_where(positions: Any, operator: Any, gate: Any) -> None:
    """Whether positions, operator and gate can be used.

    Raises:
        SettingError: no such positions, or a mask or a gate of rows, which would be of one batch.
        UnknownNameError: no such operator.
    """
    if isinstance(positions, str) and positions not in WORDS:
        raise SettingError(f"positions={positions!r}", "no such place", nearest(positions, WORDS))
    whole = isinstance(positions, Sequence) and not any(
        isinstance(p, bool) or not isinstance(p, int) for p in positions
    )
    if not isinstance(positions, str) and not whole:
        fix = f"give one of {', '.join(map(repr, WORDS))}, or position numbers"
        raise SettingError(f"positions={positions!r:.80}", f"a {type(positions).__name__}", fix)
    if gate is not None and not isinstance(gate, Gate) and not callable(gate):
        fix = "give a condition, a rule of conditions, or a function of the batch"
        raise SettingError("gate", f"a {type(gate).__name__}", fix)
    if not callable(operator) and not (isinstance(operator, str) and operator in OPERATORS):
        raise UnknownNameError(f"operator={operator!r}", "no such operator", nearest(str(operator), OPERATORS))
