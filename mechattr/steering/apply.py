"""Applying a steering vector: its directions, an operator, and where they act."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor

from mechattr import storage
from mechattr.errors import MismatchError, SettingError, nearest
from mechattr.models.base import HookedModel
from mechattr.sites import parse
from mechattr.steering.gates import Given
from mechattr.steering.operators import OPERATORS, Operation
from mechattr.steering.placing import Move, Multiplier, Positions, hooked_model, placed
from mechattr.steering.vector import SteeringVector


@contextmanager
def apply(
    vector: SteeringVector,
    model: Any,
    multiplier: Multiplier = 1.0,
    positions: Positions = "all",
    operator: str | Operation = "add",
    gate: Given | None = None,
) -> Iterator[Any]:
    """Steers a model inside a `with` block; blocks nest, and nothing stays behind, whatever is raised inside.

    Args:
        vector: directions at sites of this model.
        model: a hooked model, or a transformers model, whose own `forward` and `generate` are then steered.
        multiplier: a number, or one for each row of what is run inside.
        positions: `"all"`, `"prompt"` and `"generated"` tokens, the `"last"` one of the prompt, position numbers
            (absolute, whatever a cache of keys and values holds; negative ones count from the prompt's end; rows that
            are shorter are left alone), or a mask [row, column of the prompt]. A vector with directions of single
            positions says itself where it acts: at those that a prompt has.
        operator: `"add"`, `"norm_preserving"`, `"ablate"`, `"ablate_then_add"`, `"clamp"`, `"angular"`, `"scale"`, or a
            function `(x, v, multiplier) -> x`.
        gate: which rows are steered: one bool for each prompt, a `mechattr.steering.Condition`, a rule of conditions
            (`c1 & c2`, `c1 | c2`, `~c1`), or a function of the batch that gives one bool a row. Conditions decide for
            each row alone, in the first forward pass, from its prompt; what is generated does not change that. They
            see what outer blocks steer. Where the gate is closed a row stays as it is to the last bit.

    Raises:
        MismatchError: a vector of another width, or of sites that the model does not have.
        SettingError: no such operator or positions, a multiplier that is not finite, a multiplier or gate for another
            number of rows, or a condition at a site behind one that is steered.
        UnsupportedFeatureError: a condition on a model on a server; inside the block, a condition whose site is not
            computed with the whole prompt: a run that starts above it, or a prompt handed over in parts.
        NonFiniteError: inside the block, where steering itself makes NaN or infinity, with site and multiplier.

    Cost:
        No passes of its own; one operation of d_model numbers a site and position.
    """
    operation = _operation(operator)
    hooked = hooked_model(model)
    check_fit(vector, hooked)
    moves = []
    for name, table in vector.tensors.items():
        if table.axes[0] == "pos":
            moves += [Move(name, partial(along, v, operation), p) for p, v in enumerate(table.values)]
        else:
            moves.append(Move(name, partial(along, table.values, operation)))
    # a function's text has its address
    how = operator if isinstance(operator, str) else getattr(operator, "__qualname__", type(operator).__qualname__)
    digest = " ".join([*(storage.checksum(table.values) for table in vector.tensors.values()), how])
    with placed(model, hooked, moves, multiplier, positions, gate, digest) as steered:
        yield steered


def along(v: Tensor, operation: Operation, x: Tensor, factors: Tensor) -> Tensor:
    """An operation along v [d_model], or along v [head, d_head], where heads without a direction are left alone."""
    v = v.to(x.device, x.dtype)
    if v.ndim == 1:
        return operation(x, v, factors)
    out = x.clone()
    for head in range(len(v)):
        if bool(v[head].any()):
            out[:, :, head] = operation(x[:, :, head], v[head], factors)
    return out


def _operation(given: str | Operation) -> Operation:
    if callable(given):
        return given
    if not isinstance(given, str) or given not in OPERATORS:
        raise SettingError(f"operator={given!r}", "no such operator", nearest(str(given), OPERATORS))
    return OPERATORS[given]


def check_fit(vector: SteeringVector, model: HookedModel) -> None:
    """Whether a model has the sites of a vector, with their widths.

    Raises:
        MismatchError: it has not.
    """
    sites = set(model.sites())
    for name, table in vector.tensors.items():
        if name not in sites:
            found = f"{model.info.name!r} has no such site"
            raise MismatchError(f"steering at {name}", found, "apply the vector to the model that it was made for")
        sizes = model.info.sizes_at(parse(name)[0])
        wanted = tuple(sizes.get(axis, size) for axis, size in zip(table.axes, table.shape, strict=True))
        if wanted != tuple(table.shape):
            raise MismatchError(
                f"a direction of shape {list(table.shape)} at {name}",
                f"{model.info.name!r} has {list(wanted)} there",
                "apply the vector to the model that it was made for",
            )
