"""Labelled: a tensor whose axes have names and whose entries have coordinates.

Arithmetic never aligns, joins or broadcasts: both sides must have the same axes in the same order and the same
coordinates, so a result is never computed over half of the layers by accident.
"""

from __future__ import annotations

import html
import operator
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Never, cast

import numpy as np
import torch
from jaxtyping import Shaped
from torch import Tensor

from mechattr.coordinates import Coordinate, Coordinates, check_coords, place_of, places_between, shorten
from mechattr.errors import AxisError, BackendError, nearest

if TYPE_CHECKING:
    import pandas as pd

Selector = int | str | slice | Sequence[Coordinate]


class Labelled:
    """A tensor with named axes and coordinates; read-only.

    Args:
        values: the tensor, kept as it is (no copy, no detach).
        axes: one name a dimension, such as `("batch", "pos", "head", "d_head")`.
        coords: coordinates by axis, distinct ints or strings; 0, 1, 2, ... where not given.

    Raises:
        AxisError: names or coordinates do not fit the shape.
    """

    __slots__ = ("_axes", "_explicit", "_values")
    __array_ufunc__ = None  # numpy must not take a Labelled apart entry by entry

    _axes: tuple[str, ...]
    _explicit: dict[str, tuple[Coordinate, ...]]
    _values: Tensor

    def __init__(
        self,
        values: Shaped[Tensor, "*dims"],
        axes: Sequence[str],
        coords: Mapping[str, Coordinates] | None = None,
    ) -> None:
        set_slot = object.__setattr__
        set_slot(self, "_explicit", check_coords(values.shape, axes, coords))
        set_slot(self, "_values", values)
        set_slot(self, "_axes", tuple(axes))

    def __setattr__(self, name: str, value: object) -> Never:
        raise AttributeError(f"Labelled is read-only: cannot set {name!r}")

    def __delattr__(self, name: str) -> Never:
        raise AttributeError(f"Labelled is read-only: cannot delete {name!r}")

    def __reduce__(self) -> tuple[Any, ...]:  # copy.copy and copy.deepcopy go through here
        return Labelled, (self._values, self._axes, self._explicit)

    @property
    def values(self) -> Tensor:
        """The plain tensor."""
        return self._values

    @property
    def axes(self) -> tuple[str, ...]:
        """Axis names in the order of the dimensions."""
        return self._axes

    @property
    def coords(self) -> Mapping[str, Coordinates]:
        """Coordinates by axis: a tuple, or a range where they are 0, 1, 2, ..."""
        return MappingProxyType(
            {axis: self._explicit.get(axis, range(n)) for axis, n in zip(self._axes, self.shape, strict=True)}
        )

    @property
    def explicit_coords(self) -> Mapping[str, tuple[Coordinate, ...]]:
        """Only the coordinates that differ from 0, 1, 2, ..."""
        return MappingProxyType(self._explicit)

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the axes."""
        return tuple(self._values.shape)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the entries."""
        return self._values.dtype

    @property
    def device(self) -> torch.device:
        """Where the entries are."""
        return self._values.device

    def __len__(self) -> int:
        return len(self._values)

    def item(self) -> float | int | bool:
        """The one entry as a Python number."""
        if self._values.numel() != 1:
            raise AxisError("the one entry", f"{self!r}", "select single coordinates with .sel(...) first")
        return self._values.item()

    def sel(self, **selectors: Selector) -> Labelled:
        """Entries by coordinate (not by place).

        Args:
            **selectors: by axis one coordinate (drops the axis), a list of coordinates (keeps it, in this order), or
                `slice(a, b)`: from coordinate `a` up to, without it, coordinate `b` (or the last coordinate plus one).

        Raises:
            AxisError: no such axis or coordinate.
        """
        values, axes, explicit = self._values, list(self._axes), dict(self._explicit)
        for axis, selector in selectors.items():
            dim = self._dim(axis, axes)
            coords = explicit.pop(axis, None) or range(values.shape[dim])
            if isinstance(selector, slice):
                start, stop = places_between(selector, coords, axis)
                values, kept = values.narrow(dim, start, stop - start), coords[start:stop]
                explicit[axis] = tuple(kept)
            elif not isinstance(selector, str) and (isinstance(selector, Sequence) or getattr(selector, "ndim", False)):
                places = [place_of(value, coords, axis) for value in cast(Coordinates, selector)]
                values = values.index_select(dim, torch.tensor(places, dtype=torch.long, device=values.device))
                explicit[axis] = tuple(coords[place] for place in places)
            else:
                values = values.select(dim, place_of(selector, coords, axis))
                axes.pop(dim)
        return Labelled(values, axes, explicit)

    def _dim(self, axis: str, axes: Sequence[str] | None = None) -> int:
        axes = self._axes if axes is None else axes
        if axis not in axes:
            raise AxisError(f"axis {axis!r}", f"axes {tuple(axes)}", nearest(axis, axes))
        return axes.index(axis)

    def numpy(self) -> np.ndarray:
        """The entries as a numpy array on the CPU; bfloat16, which numpy lacks, as float32 (exact)."""
        values = self._values.detach().cpu()
        return (values.float() if values.dtype == torch.bfloat16 else values).numpy()

    def to_pandas(self) -> pd.DataFrame:
        """Long form: one column an axis with its coordinates, and the column `value`.

        Raises:
            AxisError: an axis is called `value`.
        """
        import pandas as pd

        if "value" in self._axes:
            raise AxisError("a table with column 'value'", f"axes {self._axes}", "rename the axis")
        columns = {}
        for dim, (axis, coords) in enumerate(self.coords.items()):
            integral = all(isinstance(value, int) for value in coords)
            column = np.array(coords, dtype=np.int64 if integral else object)
            along = [-1 if d == dim else 1 for d in range(len(self._axes))]
            columns[axis] = np.broadcast_to(column.reshape(along), self.shape).ravel()
        return pd.DataFrame({**columns, "value": self.numpy().ravel()})

    def to_xarray(self) -> Any:
        """An `xarray.DataArray` with the same axes and coordinates.

        Raises:
            BackendError: xarray is not installed.
        """
        try:
            import xarray
        except ImportError as error:
            raise BackendError("an xarray.DataArray", f"xarray is missing: {error}", "pip install xarray") from error
        return xarray.DataArray(
            self.numpy(), dims=self._axes, coords={axis: list(values) for axis, values in self.coords.items()}
        )

    def _combine(self, other: object, function: Callable[..., Tensor], swap: bool = False) -> Labelled:
        if isinstance(other, Labelled):
            self.check_aligned(other)
            operand: Any = other._values
        elif isinstance(other, int | float):
            operand = other
        else:
            return NotImplemented
        values = function(operand, self._values) if swap else function(self._values, operand)
        return Labelled(values, self._axes, self._explicit)

    def check_aligned(self, other: Labelled) -> None:
        """Raises `AxisError` unless both have the same axes, sizes and coordinates."""
        if (self._axes, self.shape, self._explicit) == (other._axes, other.shape, other._explicit):
            return
        differ = [axis for axis in self._axes if axis in other._axes and self.coords[axis] != other.coords[axis]]
        detail = "; ".join(f"{a}: {shorten(self.coords[a])} against {shorten(other.coords[a])}" for a in differ)
        raise AxisError(
            "to combine two labelled tensors",
            f"axes {self._axes} against {other._axes}" + (f"; {detail}" if detail else ""),
            "select the same coordinates on both sides with .sel(...); nothing is aligned or broadcast",
        )

    def __add__(self, other: object) -> Labelled:
        return self._combine(other, operator.add)

    def __radd__(self, other: object) -> Labelled:
        return self._combine(other, operator.add, swap=True)

    def __sub__(self, other: object) -> Labelled:
        return self._combine(other, operator.sub)

    def __rsub__(self, other: object) -> Labelled:
        return self._combine(other, operator.sub, swap=True)

    def __mul__(self, other: object) -> Labelled:
        return self._combine(other, operator.mul)

    def __rmul__(self, other: object) -> Labelled:
        return self._combine(other, operator.mul, swap=True)

    def __truediv__(self, other: object) -> Labelled:
        return self._combine(other, operator.truediv)

    def __rtruediv__(self, other: object) -> Labelled:
        return self._combine(other, operator.truediv, swap=True)

    def __neg__(self) -> Labelled:
        return Labelled(-self._values, self._axes, self._explicit)

    def __abs__(self) -> Labelled:
        return Labelled(self._values.abs(), self._axes, self._explicit)

    abs = __abs__

    def isfinite(self) -> Labelled:
        """Where entries are neither NaN nor infinite."""
        return Labelled(self._values.isfinite(), self._axes, self._explicit)

    def sum(self, *axes: str) -> Labelled:
        """Sum over the named axes; over all of them when none is named."""
        return self._reduce(self._values, torch.sum, axes)

    def mean(self, *axes: str) -> Labelled:
        """Mean over the named axes, over all of them when none is named; ints and bools in torch's default dtype."""
        values = self._values if self.dtype.is_floating_point else self._values.to(torch.get_default_dtype())
        return self._reduce(values, torch.mean, axes)

    def _reduce(self, values: Tensor, function: Callable[..., Tensor], axes: Sequence[str]) -> Labelled:
        gone = set(axes or self._axes)
        dims = [self._dim(axis) for axis in gone]
        kept = [axis for axis in self._axes if axis not in gone]
        # torch reads an empty list of dimensions as all of them, which for a scalar is the same
        explicit = {axis: coords for axis, coords in self._explicit.items() if axis not in gone}
        return Labelled(function(values, dim=dims), kept, explicit)

    def __repr__(self) -> str:
        sizes = ", ".join(f"{axis}={size}" for axis, size in zip(self._axes, self.shape, strict=True))
        kind = str(self.dtype).removeprefix("torch.")
        return f"Labelled({sizes or 'scalar'}; {kind}, {self.device}, {self._values.nbytes:,} bytes)"

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><th>{html.escape(axis)}</th><td>{len(coords)}</td><td>{html.escape(shorten(coords))}</td></tr>"
            for axis, coords in self.coords.items()
        )
        return (
            f"<div>{html.escape(repr(self))}</div>"
            f"<table><thead><tr><th>axis</th><th>size</th><th>coordinates</th></tr></thead><tbody>{rows}</tbody></table>"
        )
