"""Labelled: selection and arithmetic agree with plain tensors for any shape, order and coordinates."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from mechattr.errors import AxisError
from mechattr.labelled import Labelled


@st.composite
def tables(draw: st.DrawFn) -> Labelled:
    """Integers as float64, so that sums, differences and products are exact."""
    shape = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    seed = draw(st.integers(0, 2**16))
    values = torch.randint(-50, 50, shape, generator=torch.Generator().manual_seed(seed)).double()
    axes = draw(st.permutations(["layer", "pos", "head", "d_head"]))[: len(shape)]
    coordinate = st.one_of(st.integers(-9, 9), st.text(max_size=2))
    coords = {
        axis: draw(st.lists(coordinate, min_size=size, max_size=size, unique=True))
        for axis, size in zip(axes, shape, strict=True)
        if draw(st.booleans())
    }
    return Labelled(values, axes, coords)


def equal(one: Labelled, other: Labelled) -> None:
    one.check_aligned(other)
    assert_close(one.values, other.values, rtol=0, atol=0)  # exact: small integers in float64


@given(tables(), st.data())
def test_selecting_one_coordinate_is_indexing_at_its_place(table: Labelled, data: st.DataObject) -> None:
    axis = data.draw(st.sampled_from(table.axes))
    place = data.draw(st.integers(0, len(table.coords[axis]) - 1))
    picked = table.sel(**{axis: table.coords[axis][place]})
    assert_close(picked.values, table.values.select(table.axes.index(axis), place), rtol=0, atol=0)
    assert picked.axes == tuple(name for name in table.axes if name != axis)
    assert all(picked.coords[name] == table.coords[name] for name in picked.axes)


@given(tables(), st.data())
def test_selecting_a_list_and_then_one_of_it_is_selecting_that_one(table: Labelled, data: st.DataObject) -> None:
    axis = data.draw(st.sampled_from(table.axes))
    chosen = data.draw(st.lists(st.sampled_from(list(table.coords[axis])), min_size=1, unique=True))
    for coordinate in chosen:
        equal(table.sel(**{axis: chosen}).sel(**{axis: coordinate}), table.sel(**{axis: coordinate}))
    equal(table.sel(**{axis: list(table.coords[axis])}), table)
    equal(table.sel(**{axis: slice(None)}), table)


@given(tables(), st.data())
def test_selections_on_different_axes_commute(table: Labelled, data: st.DataObject) -> None:
    one = {axis: data.draw(st.sampled_from(list(table.coords[axis]))) for axis in table.axes}
    backwards = dict(reversed(one.items()))
    step_by_step = table
    for axis, coordinate in backwards.items():
        step_by_step = step_by_step.sel(**{axis: coordinate})
    equal(table.sel(**one), table.sel(**backwards))
    equal(table.sel(**one), step_by_step)


@given(tables())
def test_arithmetic_obeys_its_laws(table: Labelled) -> None:
    zero = table * 0
    equal(table + table, table * 2)
    equal(table + zero, table)
    equal(table - table, zero)
    negative = -table
    equal(-negative, table)
    equal(3 - table, -(table - 3))
    equal(table * table, abs(table) * abs(table))
    equal((table + 1000) / (table + 1000), zero + 1)
    equal(2 * (table + table), 2 * table + 2 * table)


@given(tables(), st.data())
def test_what_is_summed_first_does_not_matter(table: Labelled, data: st.DataObject) -> None:
    axis = data.draw(st.sampled_from(table.axes))
    equal(table.sum(axis).sum(), table.sum())
    equal(table.sum(*table.axes), table.sum())
    by_hand = [table.sel(**{axis: coordinate}) for coordinate in table.coords[axis]]
    equal(table.sum(axis), sum(by_hand[1:], by_hand[0]))


@given(tables(), st.data())
def test_any_difference_in_labels_is_refused(table: Labelled, data: st.DataObject) -> None:
    axis = data.draw(st.sampled_from(table.axes))
    renamed = Labelled(table.values, [f"{name}_" if name == axis else name for name in table.axes])
    names = [f"another{place}" for place in range(len(table.coords[axis]))]
    moved = Labelled(table.values, table.axes, {**table.explicit_coords, axis: names})
    for other in (renamed, moved, table.sel(**{axis: table.coords[axis][0]})):
        with pytest.raises(AxisError):
            _ = table + other


@given(tables())
def test_the_long_table_holds_each_entry_at_its_coordinates(table: Labelled) -> None:
    frame = table.to_pandas()
    for row in frame.sample(min(5, len(frame)), random_state=0).to_dict("records"):
        value = row.pop("value")
        assert table.sel(**row).item() == value
    assert len(frame) == table.values.numel()
