"""Pictures of steering: behaviour against the multiplier, and what an effect costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mechattr.draw.curves import BLUE, GREY, PALE
from mechattr.draw.labels import along_lines, make_room, place, title
from mechattr.draw.style import INK, SMALL_POINTS, array, new_figure, style
from mechattr.errors import SettingError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from mechattr.draw.style import Values

    Band = tuple[Values, Values, Values]  # mean, low, high

VECTOR = "vector"  # drawn strongest
ORANGE, GREEN = "#e08214", "#3a8a45"
_LOOKS: dict[str, dict[str, Any]] = {
    VECTOR: {"color": BLUE, "linewidth": 2.0, "marker": "o", "markersize": 4.0},
    "random": {"color": GREY, "linewidth": 1.2, "linestyle": "--", "marker": "s", "markersize": 3.0},
    "shuffled": {"color": ORANGE, "linewidth": 1.2, "linestyle": "-.", "marker": "^", "markersize": 3.5},
}
_NAMES = {"random": "random, equal length", "shuffled": "shuffled labels"}


def propensity_curve(
    multipliers: Values,
    curves: Mapping[str, Band],
    *,
    base: float | None = None,
    prompting: tuple[float, float, float] | None = None,
    draws: Values | None = None,
    label: str = "propensity [nat]",
    note: str = "",
    ax: Axes | None = None,
) -> Axes:
    """Does the vector work? Propensity against the multiplier with its interval, beside controls.

    Args:
        multipliers: [point], ascending.
        curves: (mean, low, high) by condition, each [point]: `"vector"`, `"random"`, `"shuffled"`, or others.
        base: mean propensity without steering, a dashed line.
        prompting: (mean, low, high) under plain prompting, a line with its interval.
        draws: [draw, point], means of random vectors, drawn thin; they take the place of the curve `"random"`.
        label: what is measured, with its unit.
        note: a line above.
        ax: axes to draw into; a new figure without it.

    Raises:
        SettingError: a curve with another number of points.
    """
    x = array(multipliers).ravel()
    bands = {name: _band(name, band, x.size) for name, band in curves.items()}
    random = None if draws is None else np.atleast_2d(array(draws))
    if random is not None and random.shape[1:] != x.shape:
        raise SettingError("random vectors", f"shape {random.shape}, {x.size} multipliers", "give [draw, multiplier]")
    with style():
        if ax is None:
            ax = new_figure(6.2, 3.5).add_subplot()
        make_room(ax)
        ax.axhline(0.0, color=PALE, linewidth=0.8, zorder=0)
        if base is not None:
            ax.axhline(base, color=INK, linewidth=0.9, linestyle=":", zorder=1, gid="base", label="not steered")
        if prompting is not None:
            _prompting(ax, prompting)
        if random is not None:
            look = {**_LOOKS["random"], "linewidth": 0.9, "marker": "" if x.size > 1 else "s"}
            lines = ax.plot(x, random.T, zorder=2, gid="random", **look)
            lines[0].set_label(f"{len(random)} random, equal length" if len(random) > 1 else _NAMES["random"])
        for name, (mean, low, high) in bands.items():
            if name == "random" and random is not None:
                continue
            look = _look(name)
            if x.size > 1:
                ax.fill_between(x, low, high, color=look["color"], alpha=0.16, linewidth=0, zorder=2)
            else:  # a band of no width
                ax.vlines(x, low, high, color=look["color"], linewidth=0.9, alpha=0.6, zorder=2, gid="interval")
            ax.plot(x, mean, zorder=4 if name == VECTOR else 3, gid=name, label=_NAMES.get(name, name), **look)
        ax.set(xlabel="multiplier", ylabel=label)
        ax.locator_params(axis="x", nbins=6)
        _legend(ax)
        title(ax, *[note] * bool(note))
    return ax


def side_effect_frontier(
    points: Mapping[str, tuple[Band, Band]],
    labels: Sequence[str],
    *,
    knee: str | None = None,
    budget: float | None = None,
    prompting: tuple[float, float, float] | None = None,
    label: str = "change of propensity [nat]",
    note: str = "",
    ax: Axes | None = None,
) -> Axes:
    """At what price? Effect against side effect, a point for each multiplier, with intervals both ways.

    Args:
        points: by condition, (side effect, effect), each (mean, low, high) of [point]: KL in nats a token, and
            the change of propensity. The points of `"vector"` are named.
        labels: what each point is: its multiplier.
        knee: the label of the point that is ringed.
        budget: the side effect up to which vectors are compared; what is beyond has a grey ground.
        prompting: (mean, low, high) of the effect of plain prompting, which has no KL.
        label: what is measured, with its unit.
        note: a line above.
        ax: axes to draw into; a new figure without it.

    Raises:
        SettingError: a condition with another number of points.
    """
    bands = {
        name: (_band(name, side, len(labels)), _band(name, effect, len(labels)))
        for name, (side, effect) in points.items()
    }
    with style():
        if ax is None:
            ax = new_figure(6.2, 3.9).add_subplot()
        make_room(ax)
        ax.axhline(0.0, color=PALE, linewidth=0.8, zorder=0)
        if prompting is not None:
            _prompting(ax, prompting)
        for name, (side, effect) in bands.items():
            look = _look(name)
            ax.errorbar(
                side[0], effect[0], xerr=_errors(side), yerr=_errors(effect), fmt="none", ecolor=look["color"],
                elinewidth=0.7, alpha=0.45, zorder=2,
            )  # fmt: skip
            text = "vector, with its multipliers" if name == VECTOR else _NAMES.get(name, name)
            ax.plot(side[0], effect[0], zorder=4 if name == VECTOR else 3, gid=name, label=text, **look)
        right = 1.08 * max(float(side[0].max()) for side, _ in bands.values()) or 1.0
        ax.set(xlim=(-0.03 * right, right), xlabel="KL on neutral texts [nats a token]")
        ax.set_ylabel(label)
        if budget is not None and budget < right:
            ax.axvspan(budget, right, color="#f1f1f1", linewidth=0, zorder=-1)
            ax.axvline(budget, color=GREY, linewidth=0.8, linestyle=":", zorder=0, label=f"budget {budget:g}")
        marked = [i for i, name in enumerate(labels) if name == knee] if VECTOR in bands else []
        for i in marked:
            x, y = (float(part[0][i]) for part in bands[VECTOR])
            ax.plot(x, y, "o", markersize=10, mfc="none", mec=INK, zorder=3.9, gid="knee", label="knee")
        _legend(ax)
        if VECTOR in bands:
            _write(ax, *bands[VECTOR], labels, marked)
        title(ax, *[note] * bool(note))
    return ax


def _write(
    ax: Axes, side: tuple[np.ndarray, ...], effect: tuple[np.ndarray, ...], labels: Sequence[str], first: list[int]
) -> None:
    """Names points beside themselves, but for the model as it is."""
    order = [*first, *(i for i in range(len(labels)) if i not in first and (side[0][i] or effect[0][i]))]
    where = [(float(side[0][i]), float(effect[0][i])) for i in order]
    names = [labels[i].replace("-", "−") for i in order]
    for note in place(ax, where, names, size=SMALL_POINTS + 0.5, others=along_lines(ax)):
        note.set(color=BLUE, gid="multiplier")


def _prompting(ax: Axes, prompting: tuple[float, float, float]) -> None:
    mean, low, high = prompting
    ax.axhspan(low, high, color=GREEN, alpha=0.10, linewidth=0, zorder=0)
    ax.axhline(mean, color=GREEN, linewidth=1.2, zorder=1, gid="prompting", label="prompting")


def _band(name: str, band: Band, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    mean, low, high = (array(values).ravel() for values in band)
    if not mean.size == low.size == high.size == n:
        found = f"{mean.size} means, {low.size} and {high.size} ends of intervals, {n} points"
        raise SettingError(f"the condition {name!r}", found, "give one of each a point")
    return mean, low, high


def _errors(band: tuple[np.ndarray, np.ndarray, np.ndarray]) -> np.ndarray:
    mean, low, high = band
    return np.clip(np.stack([mean - low, high - mean]), 0, None)


def _look(name: str) -> dict[str, Any]:
    return _LOOKS.get(name, {"color": INK, "linewidth": 1.2, "marker": "D", "markersize": 3.0})


def _legend(ax: Axes) -> None:
    """Beside the axes, where it can cover no line; what was drawn first, the lines of reference, comes last."""
    handles, names = ax.get_legend_handles_labels()
    order = sorted(range(len(names)), key=lambda i: (-handles[i].get_zorder(), i))
    ax.legend(
        [handles[i] for i in order],
        [names[i] for i in order],
        loc="upper left",
        bbox_to_anchor=(1.0, 1.02),
        frameon=False,
        handlelength=1.8,
        labelspacing=0.6,
    )
