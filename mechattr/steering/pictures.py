"""Pictures of evaluations and sweeps, from their numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mechattr import draw
from mechattr.draw.style import pyplot_axes, style
from mechattr.steering.intervals import interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from mechattr.steering.evaluation import Curves, SteeringEvaluation, SteeringSweep


def curve(result: SteeringEvaluation, ax: Axes | None) -> Axes:
    """Propensity against the multiplier."""
    prompting, note = None, ""
    if "prompting" in result.tensors:
        mean, low, high = interval(result.tensors["prompting"].values).tolist()
        prompting = (mean, low, high)
    if result.graded:
        note = (
            f"steerability {result.steerability()} {result.unit}, {100 * result.anti_steerable().value:.0f} % of "
            f"{len(result.base)} items anti-steerable"
        )
    order = sorted(range(len(result.multipliers)), key=result.multipliers.__getitem__)
    return draw.propensity_curve(
        [result.multipliers[i] for i in order],
        {name: tuple(interval(_of(result, "propensity", name))[:, order]) for name in result.conditions},
        base=float(result.base.double().mean()),
        prompting=prompting,
        draws=result.tensors["random"].values.double().mean(-1)[:, order],
        label=f"{_measure(result)} [{result.unit}]",
        note=note,
        ax=pyplot_axes(6.4, 3.6) if ax is None else ax,
    )


def price(result: SteeringEvaluation, budget: float, ax: Axes | None) -> Axes:
    """Effect against KL."""
    frontier = result.frontier(budget=budget)
    order = sorted(range(len(result.multipliers)), key=result.multipliers.__getitem__)
    points: dict[str, Any] = {
        name: tuple(tuple(interval(x)[:, order]) for x in (_of(result, "kl", name), result.effects(name)))
        for name in result.conditions
    }
    which, most = frontier.best
    note = f"KL ≤ {budget:g}: {most:.3g} {result.unit}" + ("" if which is None else f" at {which[1]:g}")
    return draw.side_effect_frontier(
        points,
        [f"{result.multipliers[i]:g}" for i in order],
        knee=None if frontier.knee is None else f"{frontier.knee[1]:g}",
        budget=budget,
        prompting=result.prompting,
        label=f"change of {_measure(result)} [{result.unit}]",
        note=f"{note}; area {frontier.area:.3g} {result.unit}",
        ax=pyplot_axes(6.4, 4.0) if ax is None else ax,
    )


def by_layer(result: SteeringSweep, budget: float, ax: Axes | None) -> Axes:
    """Effect and KL by layer and multiplier."""
    order = sorted(range(len(result.multipliers)), key=result.multipliers.__getitem__)
    effect = (result.tensors["propensity"].values.double() - result.base).mean(-1)[:, order]
    side = result.tensors["kl"].values.double().mean(-1)[:, order] if "kl" in result.tensors else None
    axes = [] if ax is None else [ax]
    if ax is None:
        import matplotlib.pyplot as plt

        n_maps = 1 if side is None else 2
        with style():
            size = draw.map_size(*effect.shape, n_maps=n_maps)
            figure = plt.figure(figsize=size, layout="constrained")
            axes = list(figure.subplots(1, n_maps, sharey=True, squeeze=False)[0])
    return draw.steering_map(
        effect,
        side,
        layers=result.layers,
        multipliers=[f"{result.multipliers[i]:g}" for i in order],
        budget=budget,
        label=f"change of {_measure(result)}\n[{result.unit}]",
        axes=axes,
    )[0]


def _measure(result: Curves) -> str:
    measure: Any = result.settings["measure"]
    return str(measure["name"]).replace("_", " ")


def _of(result: SteeringEvaluation, tensor: str, name: str) -> Any:
    return result.tensors[tensor].values[result.conditions.index(name)]
