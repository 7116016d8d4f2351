"""Curves: what may still be missed, how fast the strongest nodes are found, how faithful a circuit is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from mechattr.draw.labels import along_lines, make_room, place, title
from mechattr.draw.scatter import GROUP_COLOURS
from mechattr.draw.style import INK, RED_BLUE, SMALL_POINTS, TICK_POINTS, array, new_figure, style
from mechattr.errors import SettingError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from mechattr.draw.style import Values

    Point = tuple[float, float]
    _Name = tuple[str, Point, str, str]  # text, where, colour, gid

BLUE, GREY, PALE = RED_BLUE[-2], "#888888", "#dddddd"
BAND = (10.0, 90.0)  # percentiles over pairs or draws
SHORT = 1e-3  # how close to 1 counts as reached
DECADES = 12.0  # beyond this ratio of the largest effect to the bound, effects are drawn on a log axis


def bound_curve(
    theta: Values,
    p: Values,
    *,
    theta_star: float,
    confidence: float,
    verified: Values = (),
    unit: str = "",
    ax: Axes | None = None,
) -> Axes:
    """What may be missed? The curve p(θ) with θ* marked, and the verified effects as a rug on the same axis.

    p(θ) is the p value of "some node that was not verified has an effect of at least θ"; θ* is where it falls to
    1 - confidence. Effects lie on a log axis when the largest is more than 12 times θ*.

    Args:
        theta: [point], effects.
        p: [point], from 0 to 1.
        theta_star: the bound.
        confidence: its confidence, such as 0.99.
        verified: effects measured exactly; their magnitudes are drawn, NaN is left out.
        unit: unit of effects.
        ax: axes to draw into; a new figure without it.

    Raises:
        SettingError: the lengths differ, or the confidence is not between 0 and 1.
    """
    x, y, effects = array(theta).ravel(), array(p).ravel(), np.abs(array(verified)).ravel()
    if x.shape != y.shape or not 0 < confidence < 1:
        found = f"{x.size} effects, {y.size} values of p, confidence {confidence}"
        raise SettingError("the curve of p(θ)", found, "give one p an effect, and a confidence between 0 and 1")
    effects, alpha, order = effects[np.isfinite(effects)], 1.0 - confidence, np.argsort(x, kind="stable")
    x, y = x[order], y[order]
    widest = max(float(effects.max(initial=0.0)), float(theta_star)) or 1.0
    logarithmic = 0 < DECADES * theta_star < widest
    with style():
        if ax is None:
            ax = new_figure(5.6, 3.4).add_subplot()
        floor = alpha / 30
        right = widest * (1.6 if logarithmic else 1.06)
        left = min(theta_star / 10, float(effects[effects > 0].min(initial=theta_star))) if logarithmic else 0.0
        ax.set(xscale="log" if logarithmic else "linear", yscale="log", xlim=(left, right), ylim=(floor, 1.6))
        ax.axvspan(theta_star, right, color="#eef4fa", linewidth=0, zorder=0)
        ax.axhline(alpha, color=GREY, linewidth=0.9, linestyle="--", zorder=1)
        ax.plot(x, np.clip(y, floor / 10, None), color=BLUE, linewidth=1.8, zorder=3, gid="p")
        ax.axvline(theta_star, color=INK, linewidth=0.9, zorder=2, gid="theta-star")
        ax.plot([theta_star], [alpha], "o", color=INK, markersize=4.5, zorder=4)
        end = theta_star > (left**0.4 * right**0.6 if logarithmic else 0.6 * right)
        # on its left it stands below the plateau of the curve and off its slope
        shift, side, height = (-56, "right", alpha**0.5) if end else (6, "left", 1.0)
        suffix = f" {unit}" if unit else ""
        star = f"θ* = {theta_star:.3g}{suffix}\nwith {100 * confidence:.4g} % confidence\nnothing unverified is larger"
        ax.annotate(
            star, (theta_star, height), (shift, 0), textcoords="offset points", ha=side, va="top", gid="star-name"
        )
        ax.annotate(
            f"p = {alpha:.3g}", (1.0, alpha), (-2, 3), xycoords=("axes fraction", "data"), color="#666666",
            textcoords="offset points", ha="right", va="bottom", fontsize=SMALL_POINTS,
        )  # fmt: skip
        if effects.size:
            rug = ax.vlines(
                np.maximum(effects, left),
                0,
                0.05,
                transform=ax.get_xaxis_transform(),
                color=INK,
                linewidth=1.0,
                zorder=5,
            )
            rug.set_gid("rug")
            above = int((effects > theta_star).sum())
            ax.annotate(
                f"{effects.size} verified nodes, {above} above θ*", (1.0, 0.0), (-2, 15), xycoords="axes fraction",
                textcoords="offset points", ha="right", va="bottom", fontsize=SMALL_POINTS, gid="rug-name",
            )  # fmt: skip
        ax.set(xlabel=_with_unit("|effect| θ", unit), ylabel="p(θ) of an unverified effect ≥ θ")
    return ax


def discovery_curve(
    found: Mapping[str, Values],
    visited: Values,
    *,
    k: int,
    ideal: Values | None = None,
    random: Values | None = None,
    cost: str = "nodes verified",
    ax: Axes | None = None,
) -> Axes:
    """How fast is it found? Share of the true top k found against the cost so far (log x).

    Where values are given by pair, the line is their mean and the band runs from their 10th to their 90th percentile.

    Args:
        found: by method, [point] or [pair, point], shares from 0 to 1; the first is drawn strongest. NaN where a method
            has no value yet.
        visited: [point], above 0.
        k: how many true nodes are looked for.
        ideal: [point]; min(visited / k, 1) without it.
        random: [point] or [draw, point], the share of a random order.
        cost: what `visited` counts.
        ax: axes to draw into, whose figure gets the constrained layout if it has none; a new figure without it.

    Raises:
        SettingError: shapes that do not fit, or a cost that a log axis cannot show.
    """
    x = array(visited).ravel()
    curves = {name: _curve(values, x.size, name) for name, values in found.items()}
    if k < 1 or not (x > 0).all():
        raise SettingError(
            "a discovery curve", f"k = {k}, smallest cost {x.min(initial=math.inf):g}", "both must be above 0"
        )
    best = np.minimum(x / k, 1.0) if ideal is None else _curve(ideal, x.size, "ideal")[0]
    with style():
        if ax is None:
            ax = new_figure(5.8, 3.5).add_subplot()
        make_room(ax)
        ax.set(xscale="log", xlim=(x.min(), x.max()), ylim=(-0.02, 1.04), xlabel=f"{cost} (log)")
        ax.set_ylabel(f"share of the true top {k} found")
        ax.axhline(1.0, color=PALE, linewidth=0.8, zorder=0)
        for index, (name, values) in enumerate(curves.items()):
            colour = GROUP_COLOURS[index % len(GROUP_COLOURS)]
            width, label = 1.4 if index else 2.2, f"{name}\n{_complete(x, _mean(values), k)}"
            _line(ax, x, values, color=colour, linewidth=width, zorder=4 - index / 10, gid="method", label=label)
        if random is not None:
            chance = _curve(random, x.size, "random")
            _line(
                ax, x, chance, color=GREY, linewidth=1.1, linestyle="--", zorder=2, gid="random", label="random order"
            )
        ax.plot(x, best, color=INK, linewidth=0.9, zorder=2, gid="ideal", label="ideal")
        ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, handlelength=1.4, labelspacing=0.7)
    return ax


def faithfulness_curve(
    sizes: Values,
    values: Values,
    *,
    random: Values | None = None,
    cpr: float | None = None,
    cmd: float | None = None,
    crossing: float | None = None,
    note: str = "",
    ax: Axes | None = None,
) -> Axes:
    """How faithful is the circuit? Faithfulness against circuit size (log x), random circuits as a band.

    1 is the whole model, 0 the model with every edge ablated. An open circle marks where the line that is drawn first
    reaches 1. A single size is a point, its random circuits a point with a bar.

    Args:
        sizes: [size], edges, above 0.
        values: [size] faithfulness, or [pair, size]: then mean and 10th to 90th percentile.
        random: [size] or [draw, size], random circuits of the same sizes.
        cpr: area under the curve, over the share of edges.
        cmd: area between the curve and 1.
        crossing: the smallest circuit that reached 1, in edges: the circle says so.
        note: what to say above the axes besides, such as why the values cannot be trusted.
        ax: axes to draw into, whose figure gets the constrained layout if it has none; a new figure without it.

    Raises:
        SettingError: shapes that do not fit, or a size that a log axis cannot show.
    """
    x = array(sizes).ravel()
    ours = _curve(values, x.size, "faithfulness")
    if not (x > 0).all():
        raise SettingError("a faithfulness curve", f"a circuit of {x.min():g} edges", "sizes must be above 0")
    with style():
        if ax is None:
            ax = new_figure(5.8, 3.4).add_subplot()
        make_room(ax)
        first, last = (float(x.min()), float(x.max())) if x.size else (1.0, 10.0)
        beside = (last / first) ** 0.03 if last > first else 10.0  # room for whole markers, or a decade for one
        ax.set(xscale="log", xlim=(first / beside, last * beside))
        for level, name in ((1.0, "whole model"), (0.0, "every edge\nablated")):
            ax.axhline(level, color=GREY, linewidth=0.7, zorder=1, gid="level")
            ax.annotate(
                name, (1.0, level), (5, 0), xycoords=("axes fraction", "data"), textcoords="offset points",
                va="center", color="#666666", gid="level-name", annotation_clip=False,
            )  # fmt: skip
        names: list[_Name] = []
        if random is not None:
            chance = _curve(random, x.size, "random")
            look = {"color": GREY, "linewidth": 1.1, "linestyle": "--", "markersize": 3.5}
            if x.size == 1 and np.isfinite(chance).any():
                ax.plot([x[0], x[0]], np.nanpercentile(chance, BAND), color=GREY, linewidth=1.1, zorder=2, gid="range")
            _line(ax, x, chance, zorder=2, gid="random", marker="o" if x.size == 1 else "", **look)  # type: ignore[arg-type]
            names.append(("random circuits", _reaches(x, _mean(chance), 0.35), "#666666", "line-name"))
        _line(ax, x, ours, color=BLUE, linewidth=2.0, marker="o", markersize=3.5, zorder=3, gid="circuit")
        names.append(("circuit", _reaches(x, _mean(ours), 0.6), BLUE, "line-name"))
        low, high = ax.get_ylim()
        ax.set_ylim(min(low, -0.06), max(high, 1.12))
        ax.set(xlabel="edges in the circuit (log)", ylabel="faithfulness")
        if crossing is not None and math.isfinite(crossing):
            at = _reaches(x, _mean(ours), 1.0, SHORT)
            ax.plot(*at, "o", markersize=6, mfc="white", mec=INK, zorder=4, gid="reached")
            names.insert(0, (f"reaches 1 by {crossing:,.0f} edges", at, INK, "crossing"))
        areas = [f"{name} {area:.3g}" for name, area in (("CPR", cpr), ("CMD", cmd)) if area is not None]
        title(ax, note, ", ".join(areas))
        _name(ax, [name for name in names if np.isfinite(name[1]).all()])
    return ax


def _curve(values: Values, n: int, name: str) -> np.ndarray:
    """[row, point], from one curve or from one a row."""
    rows = np.atleast_2d(array(values))
    if rows.ndim != 2 or rows.shape[1] != n:
        raise SettingError(f"the curve {name!r}", f"shape {array(values).shape}, {n} points", "give one value a point")
    return rows


def _mean(rows: np.ndarray) -> np.ndarray:
    """Mean over rows of what is there, NaN where nothing is."""
    there = np.isfinite(rows)
    count = there.sum(0)
    return np.where(count > 0, np.where(there, rows, 0.0).sum(0) / np.maximum(count, 1), np.nan)


def _complete(x: np.ndarray, mean: np.ndarray, k: int) -> str:
    """When all pairs had all of the top k."""
    whole = np.flatnonzero(mean >= 1.0 - 1e-9)
    return f"all {k} after {x[whole[0]]:,.0f}" if whole.size else f"{100 * np.nanmax(mean, initial=0.0):.0f} % at most"


def _line(ax: Axes, x: np.ndarray, rows: np.ndarray, *, color: str, zorder: float, **look: object) -> None:
    """The mean, and a band where there are several rows."""
    there = np.isfinite(rows).any(0)
    if len(rows) > 1 and there.any():
        low, high = np.nanpercentile(rows[:, there], BAND, axis=0)
        ax.fill_between(x[there], low, high, color=color, alpha=0.16, linewidth=0, zorder=zorder - 0.5)
    ax.plot(x, _mean(rows), color=color, zorder=zorder, **look)  # type: ignore[arg-type]


def _reaches(x: np.ndarray, y: np.ndarray, level: float, short: float = 0.0) -> Point:
    """Where a line (log x) first reaches a level, or the first point that falls short of it by no more than `short`;
    its last point where it does not."""
    if not len(x):
        return math.nan, math.nan
    reached = np.flatnonzero(y >= level - short)
    at = int(reached[0]) if reached.size else len(x) - 1
    if not reached.size or not at or y[at] <= level:
        return float(x[at]), float(y[at])
    share = (level - y[at - 1]) / (y[at] - y[at - 1])
    return float(np.exp(np.interp(share, (0.0, 1.0), np.log(x[at - 1 : at + 1])))), level


def _name(ax: Axes, names: list[_Name]) -> None:
    """Writes names beside places of lines, where they cover no line."""
    texts, places = [name[0] for name in names], [name[1] for name in names]
    for text, (_, _, color, gid) in zip(
        place(ax, places, texts, size=TICK_POINTS, others=along_lines(ax)), names, strict=True
    ):
        text.set(color=color, gid=gid)


def apart(wanted: np.ndarray, gap: float, low: float = -math.inf, high: float = math.inf) -> np.ndarray:
    """Places nearest to the ascending ones wanted (least squares), at least `gap` apart, from `low` to `high`.

    Less their index times the gap, places that keep apart do not descend: isotonic regression. Where there is no room
    for all, the last ones lie above `high`.
    """
    from scipy.optimize import isotonic_regression

    if not len(wanted):
        return wanted
    steps = gap * np.arange(len(wanted))
    flat = isotonic_regression(wanted - steps).x
    return np.clip(flat, low, max(high - steps[-1], low)) + steps


def _with_unit(name: str, unit: str) -> str:
    return f"{name} [{unit}]" if unit else name
