"""Labelled: selection by coordinate, strict arithmetic, and the edges to numpy, pandas and xarray."""

from __future__ import annotations

import copy
import operator
import sys
import types

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from mechattr.errors import AxisError, BackendError
from mechattr.labelled import Labelled


def table() -> Labelled:
    return Labelled(
        torch.arange(24, dtype=torch.float64).reshape(2, 3, 4), ("layer", "pos", "head"), {"pos": ["S1", "IO", "END"]}
    )


def test_default_coordinates_count_from_zero_and_given_ones_are_kept() -> None:
    assert dict(table().coords) == {"layer": range(2), "pos": ("S1", "IO", "END"), "head": range(4)}
    assert dict(Labelled(torch.zeros(3), ("pos",), {"pos": (0, 1, 2)}).explicit_coords) == {}


@pytest.mark.parametrize("index", [np.int64(1), torch.tensor(1), 1])
def test_one_coordinate_drops_its_axis(index: object) -> None:
    picked = table().sel(layer=index)
    assert picked.axes == ("pos", "head")
    # equal by definition: the same entries
    assert_close(picked.values, table().values[1], rtol=0, atol=0)


def test_a_list_keeps_its_axis_and_its_order() -> None:
    picked = table().sel(head=[3, 0], pos="END")
    assert picked.axes == ("layer", "head")
    assert picked.coords["head"] == (3, 0)
    assert_close(picked.values, table().values[:, 2][:, [3, 0]], rtol=0, atol=0)


def test_selection_is_by_coordinate_and_not_by_place() -> None:
    layers = Labelled(torch.tensor([20.0, 50.0, 70.0]), ("layer",), {"layer": (2, 5, 7)})
    assert layers.sel(layer=2).item() == 20.0
    assert layers.sel(layer=[7, 2]).sel(layer=7).item() == 70.0
    by_place = layers.values[2].item()  # the wrong implementation
    assert by_place != layers.sel(layer=2).item()


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        (slice(2, 7), (2, 5)),
        (slice(5, 8), (5, 7)),
        (slice(None, 5), (2,)),
        (slice(5, None), (5, 7)),
        (slice(7, 2), ()),
        (slice(None), (2, 5, 7)),
    ],
)
def test_slices_run_between_coordinates(chosen: slice, expected: tuple[int, ...]) -> None:
    layers = Labelled(torch.tensor([20.0, 50.0, 70.0]), ("layer",), {"layer": (2, 5, 7)})
    picked = layers.sel(layer=chosen)
    assert tuple(picked.coords["layer"]) == expected
    assert picked.values.tolist() == [10.0 * layer for layer in expected]


def test_slices_of_names_and_of_default_coordinates() -> None:
    assert table().sel(pos=slice("S1", "END")).coords["pos"] == ("S1", "IO")
    assert table().sel(head=slice(1, 4)).coords["head"] == (1, 2, 3)


@pytest.mark.parametrize("selector", [slice(-2, None), slice(0, 9), slice(0, 4, 2)])
def test_slices_outside_the_coordinates_or_with_steps_are_refused(selector: slice) -> None:
    with pytest.raises(AxisError, match="on axis 'head'"):
        table().sel(head=selector)


def test_unknown_coordinate_names_the_nearest() -> None:
    with pytest.raises(AxisError) as caught:
        table().sel(pos="EDN")
    assert str(caught.value) == (
        "coordinate 'EDN' on axis 'pos'\n  found: coordinates ('S1', 'IO', 'END')\n  fix: did you mean 'END'?"
    )


def test_unknown_axis_names_the_nearest() -> None:
    with pytest.raises(AxisError) as caught:
        table().sel(heads=1)
    assert str(caught.value) == ("axis 'heads'\n  found: axes ('layer', 'pos', 'head')\n  fix: did you mean 'head'?")


def test_a_dropped_axis_cannot_be_selected_again() -> None:
    with pytest.raises(AxisError, match="axis 'layer'"):
        table().sel(layer=0).sel(layer=0)


@pytest.mark.parametrize("selector", [True, 1.0, -1, None])
def test_bools_floats_none_and_negatives_are_no_coordinates(selector: object) -> None:
    with pytest.raises(AxisError):
        table().sel(layer=selector)


@pytest.mark.parametrize(
    ("axes", "coords", "message"),
    [
        (("pos",), None, "a tensor of shape (2, 3)"),
        (("pos", "pos"), None, "one distinct name"),
        (("pos", "head"), {"head": (1, 1, 2)}, "3 coordinates, 2 of them distinct, for size 3"),
        (("pos", "head"), {"head": (1, 2)}, "2 coordinates, 2 of them distinct, for size 3"),
        (("pos", "head"), {"haed": (1, 2, 3)}, "did you mean 'head'?"),
        (("pos", "head"), {"head": (1, 2, 3.5)}, "coordinate 3.5 on axis 'head'"),
        (("pos", "head"), {"pos": (True, False)}, "coordinate True on axis 'pos'"),
    ],
)
def test_axes_and_coordinates_must_fit_the_shape(axes: tuple[str, ...], coords: dict | None, message: str) -> None:
    with pytest.raises(AxisError) as caught:
        Labelled(torch.zeros(2, 3), axes, coords)
    assert message in str(caught.value)


@pytest.mark.parametrize("function", [operator.add, operator.sub, operator.mul, operator.truediv])
def test_arithmetic_is_entry_by_entry_and_with_numbers_on_both_sides(function) -> None:
    left, right = table() + 1, table() * 2 + 3
    assert_close(function(left, right).values, function(left.values, right.values), rtol=0, atol=0)
    assert_close(function(left, 2).values, function(left.values, 2), rtol=0, atol=0)
    assert_close(function(2.5, left).values, function(2.5, left.values), rtol=0, atol=0)
    assert_close(function(np.float64(2.5), left).values, function(2.5, left.values), rtol=0, atol=0)
    assert function(left, right).coords == left.coords


def test_unary_operations_keep_the_labels() -> None:
    x = Labelled(torch.tensor([1.0, -2.0, float("nan")]), ("pos",), {"pos": ["a", "b", "c"]})
    assert (-x).values.tolist()[:2] == [-1.0, 2.0]
    assert abs(x).values.tolist()[:2] == x.abs().values.tolist()[:2] == [1.0, 2.0]
    assert x.isfinite().values.tolist() == [True, True, False]
    assert (-x).coords == abs(x).coords == x.isfinite().coords == x.coords


def mismatched() -> list[Labelled]:
    values = table().values
    pos = {"pos": ["S1", "IO", "END"]}
    return [
        Labelled(values, ("layer", "pos", "neuron"), pos),
        Labelled(values, ("layer", "pos", "head"), {"pos": ["S1", "END", "IO"]}),
        Labelled(values, ("layer", "pos", "head")),
        Labelled(values.permute(0, 2, 1), ("layer", "head", "pos"), pos),
        Labelled(values[:1], ("layer", "pos", "head"), pos),
        Labelled(values[0], ("pos", "head"), pos),
    ]


@pytest.mark.parametrize("other", mismatched(), ids=repr)
def test_arithmetic_refuses_other_axes_order_sizes_and_coordinates(other: Labelled) -> None:
    with pytest.raises(AxisError, match="to combine two labelled tensors"):
        _ = table() - other


def test_a_shape_check_alone_would_let_swapped_names_through() -> None:
    # negative control: the named wrong check, shapes only, accepts what must be refused
    accepted = [other for other in mismatched() if other.shape == table().shape]
    assert len(accepted) == 3


def test_the_error_of_a_mismatch_shows_both_sides() -> None:
    with pytest.raises(AxisError) as caught:
        _ = table() + table().sel(head=[1, 2])
    assert "head: (0, 1, 2, 3) against (1, 2)" in str(caught.value)
    assert "nothing is aligned or broadcast" in str(caught.value)


@pytest.mark.parametrize("other", [torch.zeros(2, 3, 4), np.zeros((2, 3, 4)), "1", None])
def test_arithmetic_with_plain_tensors_and_other_things_is_refused(other: object) -> None:
    with pytest.raises(TypeError):
        _ = table() + other
    with pytest.raises(TypeError):
        _ = other + table()


def test_sums_and_means_by_axis() -> None:
    x = table()
    # summing 24 float64 integers is exact
    assert_close(x.sum("pos").values, x.values.sum(1), rtol=0, atol=0)
    assert x.sum("pos").axes == ("layer", "head")
    assert x.mean("layer").coords["pos"] == ("S1", "IO", "END")
    assert_close(x.mean("layer", "head").values, x.values.mean((0, 2)), rtol=0, atol=0)
    assert x.sum().item() == 276.0
    assert x.mean().axes == ()
    assert Labelled(torch.tensor(2.0), ()).sum().item() == 2.0
    with pytest.raises(AxisError, match="axis 'batch'"):
        x.mean("batch")


def test_the_mean_of_bools_is_their_share() -> None:
    assert (table().isfinite().mean().item(), table().isfinite().mean().dtype) == (1.0, torch.get_default_dtype())


def test_item_wants_one_entry() -> None:
    assert table().sel(layer=1, pos="IO", head=2).item() == 18.0
    with pytest.raises(AxisError, match="select single coordinates"):
        table().item()


def test_a_labelled_is_read_only_and_keeps_its_tensor() -> None:
    values = torch.zeros(2, requires_grad=True)
    x = Labelled(values, ["pos"])
    assert x.values is values
    with pytest.raises(AttributeError, match="read-only"):
        x.values = torch.ones(2)
    with pytest.raises(AttributeError, match="read-only"):
        del x._axes
    with pytest.raises(TypeError):
        x.coords["pos"] = (1, 2)


def test_copies_are_independent() -> None:
    x = table()
    twin = copy.deepcopy(x)
    twin.values[0, 0, 0] = 99.0
    assert x.values[0, 0, 0] == 0.0
    assert twin.coords == x.coords


def test_numpy_of_bfloat16_is_float32_and_gradients_are_left_behind() -> None:
    values = torch.tensor([1.5, -2.25], dtype=torch.bfloat16, requires_grad=True)
    array = Labelled(values, ("pos",)).numpy()
    assert array.dtype == np.float32
    assert array.tolist() == [1.5, -2.25]


def test_the_long_table_has_one_row_an_entry() -> None:
    frame = table().to_pandas()
    assert list(frame.columns) == ["layer", "pos", "head", "value"]
    assert len(frame) == 24
    assert frame["layer"].dtype == np.int64
    row = frame[(frame["layer"] == 1) & (frame["pos"] == "IO") & (frame["head"] == 2)]
    assert row["value"].tolist() == [18.0]


def test_the_long_table_follows_the_labels_of_a_transposed_tensor() -> None:
    turned = Labelled(table().values.permute(2, 0, 1), ("head", "layer", "pos"), {"pos": ["S1", "IO", "END"]})
    keys = ["layer", "pos", "head"]
    one, other = (x.to_pandas().set_index(keys)["value"].sort_index() for x in (table(), turned))
    assert one.equals(other)
    unaware = Labelled(table().values.reshape(4, 2, 3), ("head", "layer", "pos"), {"pos": ["S1", "IO", "END"]})
    assert not one.equals(unaware.to_pandas().set_index(keys)["value"].sort_index())  # a writer that ignores strides


def test_long_tables_of_scalars_and_of_nothing() -> None:
    assert Labelled(torch.tensor(3.0), ()).to_pandas()["value"].tolist() == [3.0]
    assert len(Labelled(torch.zeros(0, 3), ("pos", "head")).to_pandas()) == 0


def test_an_axis_called_value_has_no_long_table() -> None:
    with pytest.raises(AxisError, match="rename the axis"):
        Labelled(torch.zeros(1), ("value",)).to_pandas()


def test_xarray_gets_the_same_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = types.ModuleType("xarray")
    fake.DataArray = lambda values, dims, coords: (values, dims, coords)
    monkeypatch.setitem(sys.modules, "xarray", fake)
    values, dims, coords = table().to_xarray()
    assert values.tolist() == table().values.tolist()
    assert (dims, coords["pos"], coords["head"]) == (("layer", "pos", "head"), ["S1", "IO", "END"], [0, 1, 2, 3])


def test_a_missing_xarray_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xarray", None)
    with pytest.raises(BackendError, match="fix: pip install xarray"):
        table().to_xarray()


def test_the_repr_is_short_and_the_notebook_view_is_escaped() -> None:
    assert repr(table()) == "Labelled(layer=2, pos=3, head=4; float64, cpu, 192 bytes)"
    assert repr(Labelled(torch.tensor(1.0), ())) == "Labelled(scalar; float32, cpu, 4 bytes)"
    shown = Labelled(torch.zeros(2), ("pos",), {"pos": ["<b>", "&"]})._repr_html_()
    assert "&lt;b&gt;" in shown
    assert "<b>" not in shown
    assert "100 in all" in Labelled(torch.zeros(100), ("pos",))._repr_html_()
