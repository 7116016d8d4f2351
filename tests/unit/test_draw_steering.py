"""Pictures of steering: that they show the numbers they are given, and those of evaluations and sweeps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

import mechattr as ma
from mechattr.errors import SettingError
from mechattr.labelled import Labelled
from mechattr.steering import SteeringEvaluation, SteeringSweep
from mechattr.steering.intervals import interval

MEASURE = {"name": "propensity", "unit": "nat"}
X = np.array([-1.0, 0.0, 2.0])
Ax = Any


def band(mean: list[float], width: float = 0.5) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return np.array(mean), np.array(mean) - width, np.array(mean) + width


def line(ax: Ax, gid: str) -> Ax:
    (found,) = (one for one in ax.get_lines() if one.get_gid() == gid)
    return found


def names(ax: Ax) -> list[str]:
    return [text.get_text() for text in ax.get_legend().get_texts()]


def axes() -> Ax:
    return Figure(layout="constrained").add_subplot()


def test_the_curve_has_its_interval_and_its_controls() -> None:
    curves = {"vector": band([-2.0, 0.5, 4.0]), "random": band([0.4, 0.5, 0.6]), "shuffled": band([0.5, 0.5, 0.4])}
    ax = ma.draw.propensity_curve(X, curves, base=0.5, prompting=(1.0, 0.8, 1.3), note="a remark", ax=axes())
    assert line(ax, "vector").get_ydata().tolist() == [-2.0, 0.5, 4.0]
    assert line(ax, "vector").get_xdata().tolist() == X.tolist()
    lows = {round(float(part.get_paths()[0].vertices[:, 1].min()), 6) for part in ax.collections}
    assert lows == {-2.5, -0.1, -0.1}  # of the three bands
    assert set(line(ax, "base").get_ydata()) == {0.5} and set(line(ax, "prompting").get_ydata()) == {1.0}
    assert names(ax) == ["vector", "random, equal length", "shuffled labels", "not steered", "prompting"]
    assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_title("left")) == ("multiplier", "propensity [nat]", "a remark")


def test_several_random_vectors_take_the_place_of_one() -> None:
    draws = np.array([[0.0, 0.5, 1.0], [1.0, 0.5, 0.0]])
    ax = ma.draw.propensity_curve(X, {"vector": band([0, 1, 2]), "random": band([9, 9, 9])}, draws=draws, ax=axes())
    drawn = [one.get_ydata().tolist() for one in ax.get_lines() if one.get_gid() == "random"]
    assert drawn == draws.tolist() and "2 random, equal length" in names(ax)


def test_one_multiplier_still_shows_its_interval_and_random_vectors() -> None:
    """A band and a line between points have no width then."""
    ax = ma.draw.propensity_curve([2.0], {"vector": band([3.0])}, draws=[[0.5], [1.0]], ax=axes())
    (bar,) = (one for one in ax.collections if one.get_gid() == "interval")
    assert [part.tolist() for part in bar.get_segments()] == [[[2.0, 2.5], [2.0, 3.5]]]
    assert all(one.get_marker() == "s" for one in ax.get_lines() if one.get_gid() == "random")


def test_the_frontier_names_points_and_marks_the_knee() -> None:
    points = {"vector": (band([0.3, 0.0, 0.9], 0.1), band([-2.0, 0.0, 4.0])), "random": (band([0.2, 0, 0.8]),) * 2}
    ax = ma.draw.side_effect_frontier(
        points, ["-1", "0", "2"], knee="2", budget=0.5, prompting=(1.0, 0.5, 1.5), ax=axes()
    )
    assert line(ax, "vector").get_xdata().tolist() == [0.3, 0.0, 0.9]
    assert line(ax, "vector").get_ydata().tolist() == [-2.0, 0.0, 4.0]
    assert (line(ax, "knee").get_xdata()[0], line(ax, "knee").get_ydata()[0]) == (0.9, 4.0)
    written = {text.get_text() for text in ax.texts if text.get_gid() == "multiplier"}
    assert written == {"−1", "2"}  # not the unsteered model at the origin
    assert names(ax)[0] == "vector, with its multipliers" and {"knee", "budget 0.5", "prompting"} <= set(names(ax))
    assert ax.get_xlabel() == "KL on neutral texts [nats a token]"
    dear = ma.draw.side_effect_frontier(points, ["-1", "0", "2"], budget=5.0, ax=axes())
    assert not [name for name in names(dear) if name.startswith("budget")]  # nothing costs so much


def test_the_map_is_white_at_no_effect_and_shows_the_price() -> None:
    effect, side = np.array([[-1.0, 0.0, 3.0], [-0.5, 0.0, 0.25]]), np.array([[0.6, 0.0, 0.7], [0.1, 0.0, 0.004]])
    left, right = ma.draw.steering_map(effect, side, layers=[2, 5], multipliers=["-1", "0", "1"], budget=0.5)
    image = left.get_images()[0]
    assert image.get_array().tolist() == effect.tolist()
    assert image.cmap(image.norm(0.0))[:3] == (1.0, 1.0, 1.0) and image.norm.vmin == -image.norm.vmax
    assert right.get_images()[0].norm.vmin == 0.0
    assert [text.get_text() for text in left.get_yticklabels()] == ["2", "5"] and left.get_ylim() == (1.5, -0.5)
    assert [text.get_text() for text in left.get_xticklabels()] == ["−1", "0", "1"]
    values = [text.get_text() for text in right.texts if text.get_gid() == "value"]
    assert values == ["0.60", "0", "0.70", "0.10", "0", "0.00"]
    (lines,) = (part for part in left.collections if part.get_gid() == "budget")
    border = {tuple(map(tuple, side.tolist())) for side in lines.get_segments()}
    assert border == {
        ((0.5, -0.5), (0.5, 0.5)),
        ((1.5, -0.5), (1.5, 0.5)),
        ((-0.5, 0.5), (0.5, 0.5)),
        ((1.5, 0.5), (2.5, 0.5)),
    }
    (alone,) = ma.draw.steering_map(effect, side, layers=[2, 5], multipliers=["-1", "0", "1"], axes=[axes()])
    assert alone.get_images()[0].get_array().tolist() == effect.tolist()


def test_values_that_do_not_fit_are_refused() -> None:
    with pytest.raises(SettingError, match=r"the condition 'vector'\n  found: 2 means, 2 and 2 ends of intervals, 3"):
        ma.draw.propensity_curve(X, {"vector": band([0, 1])})
    with pytest.raises(SettingError, match=r"random vectors\n  found: shape \(1, 2\), 3 multipliers"):
        ma.draw.propensity_curve(X, {"vector": band([0, 1, 2])}, draws=[[0.0, 1.0]])
    with pytest.raises(SettingError, match="the condition 'vector'"):
        ma.draw.side_effect_frontier({"vector": (band([0, 1]), band([0, 1, 2]))}, ["-1", "0", "2"])
    with pytest.raises(SettingError, match=r"a layer x multiplier map\n  found: \(1, 3\) for 2 layers and 3"):
        ma.draw.steering_map(np.zeros((1, 3)), layers=[0, 1], multipliers=["-1", "0", "1"])


def evaluation(multipliers: tuple[float, ...], *, kl: bool = True) -> SteeringEvaluation:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(9, generator=generator)
    m = torch.tensor(multipliers)
    found = base + torch.tensor([2.0, 0.2])[:, None, None] * m[:, None] + torch.zeros(9)
    coords: dict[str, Any] = {"condition": ("vector", "random"), "multiplier": [f"{x:g}" for x in multipliers]}
    tensors = {
        "propensity": Labelled(found, ("condition", "multiplier", "item"), coords),
        "base": Labelled(base, ("item",)),
        "random": Labelled(found[1:], ("draw", "multiplier", "item"), {"multiplier": coords["multiplier"]}),
        "prompting": Labelled(base + 1, ("item",)),
    }
    if kl:
        price = (m**2)[None, :, None].expand(2, -1, 4) * torch.rand(4, generator=generator)
        tensors["kl"] = Labelled(price, ("condition", "multiplier", "text"), coords)
    return SteeringEvaluation(tensors, settings={"multipliers": list(multipliers), "measure": MEASURE})


def test_the_pictures_of_an_evaluation_are_its_numbers() -> None:
    result = evaluation((1.0, -1.0, 0.0))  # in any order
    ax = result.plot(axes())
    assert line(ax, "vector").get_xdata().tolist() == [-1.0, 0.0, 1.0]
    mean, low, _ = interval(result.tensors["propensity"].values[0])
    assert line(ax, "vector").get_ydata().tolist() == mean[[1, 2, 0]].tolist()
    assert line(ax, "prompting").get_ydata()[0] == pytest.approx(float(result.base.mean()) + 1)
    assert float(ax.collections[0].get_paths()[0].vertices[:, 1].min()) == pytest.approx(float(low.min()))
    assert ax.get_ylabel() == "propensity [nat]" and "0 % of 9 items anti-steerable" in ax.get_title("left")
    ax = result.plot_frontier(axes(), budget=0.2)
    assert line(ax, "vector").get_ydata().tolist() == pytest.approx([-2.0, 0.0, 2.0])
    price = float(result.tensors["kl"].values[0, 0].double().mean())
    assert line(ax, "vector").get_xdata().tolist() == pytest.approx([price, 0.0, price])
    assert f"area {result.frontier(budget=0.2).area:.3g} nat" in ax.get_title("left")
    with pytest.raises(SettingError, match="no neutral texts were given"):
        evaluation((0.0, 1.0), kl=False).plot_frontier()


def test_the_picture_of_a_sweep_is_its_numbers() -> None:
    source = evaluation((1.0, -1.0, 0.0))
    coords = {"layer": (1, 3), "multiplier": source.tensors["kl"].coords["multiplier"]}
    tensors = {name: Labelled(source.tensors[name].values, ("layer", *source.tensors[name].axes[1:]), coords)
               for name in ("propensity", "kl")}  # fmt: skip
    result = SteeringSweep({**tensors, "base": source.tensors["base"]}, settings=source.settings)
    ax = result.plot()
    shown = ax.get_images()[0].get_array()
    assert shown.tolist() == [pytest.approx([-2.0, 0.0, 2.0]), pytest.approx([-0.2, 0.0, 0.2])]
    assert len([one for one in ax.figure.axes if one.get_images()]) == 2
    assert [text.get_text() for text in ax.get_yticklabels()] == ["1", "3"]
    bare = SteeringSweep({name: x for name, x in result.tensors.items() if name != "kl"}, settings=result.settings)
    assert len([one for one in bare.plot().figure.axes if one.get_images()]) == 1
