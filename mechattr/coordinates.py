"""Coordinates: what the entries along an axis are called, ints or strings; 0, 1, 2, ... unless given."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

from mechattr.errors import AxisError, nearest

Coordinate = int | str
Coordinates = Sequence[Coordinate]

_SHOWN = 6  # coordinates shown in a repr or an error before the rest is counted


def check_coords(
    shape: Sequence[int], axes: Sequence[str], coords: Mapping[str, Coordinates] | None
) -> dict[str, tuple[Coordinate, ...]]:
    """The coordinates that differ from the default 0, 1, 2, ..., after checking that all of them fit.

    Args:
        shape: sizes of the tensor's dimensions.
        axes: one name a dimension.
        coords: for some axes one int or string an entry.

    Raises:
        AxisError: names do not match dimensions or repeat, or coordinates do not fit, repeat or have another type.
    """
    if len(axes) != len(shape) or len(set(axes)) != len(axes):
        raise AxisError(
            f"axes {tuple(axes)}",
            f"a tensor of shape {tuple(shape)}",
            "give one distinct name for each dimension",
        )
    if not coords:
        return {}
    sizes = dict(zip(axes, shape, strict=True))
    explicit = {}
    for axis, given in coords.items():
        if axis not in sizes:
            raise AxisError(f"coordinates of axis {axis!r}", f"axes {tuple(axes)}", nearest(axis, axes))
        values = tuple(_as_coordinate(value, axis) for value in given)
        if len(values) != sizes[axis] or len(set(values)) != len(values):
            raise AxisError(
                f"coordinates {shorten(values)} of axis {axis!r}",
                f"{len(values)} coordinates, {len(set(values))} of them distinct, for size {sizes[axis]}",
                "give one distinct int or string for each entry of the axis",
            )
        if values != tuple(range(len(values))):
            explicit[axis] = values
    return explicit


def _as_coordinate(value: Any, axis: str) -> Coordinate:
    """A string as it is and anything integral (numpy and torch included) as an int."""
    if isinstance(value, str):
        return value
    try:
        if not isinstance(value, bool):
            return operator.index(value)
    except TypeError:
        pass
    raise AxisError(f"coordinate {value!r} on axis {axis!r}", type(value).__name__, "use an int or a string")


def shorten(values: Coordinates) -> str:
    """The first coordinates, and how many there are in all."""
    shown = ", ".join(repr(value) for value in values[:_SHOWN])
    return f"({shown}, ... {len(values)} in all)" if len(values) > _SHOWN else f"({shown})"


def place_of(value: Any, coords: Coordinates, axis: str) -> int:
    """Where a coordinate is on its axis.

    Raises:
        AxisError: there is no such coordinate.
    """
    wanted = _as_coordinate(value, axis)
    if wanted in coords:
        return coords.index(wanted)
    raise AxisError(
        f"coordinate {wanted!r} on axis {axis!r}",
        f"coordinates {shorten(coords)}",
        nearest(str(wanted), [str(coord) for coord in coords]),
    )


def places_between(selector: slice, coords: Coordinates, axis: str) -> tuple[int, int]:
    """First and end place of `slice(a, b)`: from coordinate `a` up to, without it, `b` or the last coordinate plus one.

    Raises:
        AxisError: no such coordinates, or a step.
    """
    if selector.step is not None:
        raise AxisError(f"{selector} on axis {axis!r}", "a step", "give a list of coordinates")
    start = 0 if selector.start is None else place_of(selector.start, coords, axis)
    past_last = coords[-1] + 1 if coords and isinstance(coords[-1], int) else None
    if selector.stop is None or (selector.stop == past_last and selector.stop not in coords):
        return start, len(coords)
    return start, max(start, place_of(selector.stop, coords, axis))
