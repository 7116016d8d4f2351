"""Results of steering: how behaviour follows the multiplier, what else changes, and what controls do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from html import escape
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from jaxtyping import Float
from torch import Tensor

from mechattr.artifact import Passes
from mechattr.base import Artifact
from mechattr.errors import SettingError, UnknownNameError, nearest
from mechattr.provenance import JSON
from mechattr.steering.frontier import BUDGET, Frontier
from mechattr.steering.intervals import Estimate, estimate, interval

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

SIDES = ("kl", "perplexity", "distinct_2", "repetition", "judge")  # of neutral texts, and of generated ones


class Curves(Artifact, ABC):
    """Propensity by multiplier, for each condition or layer: what evaluations and sweeps have in common."""

    axis: ClassVar[str]

    @property
    def multipliers(self) -> tuple[float, ...]:
        """The multipliers."""
        return tuple(cast(list[float], self.settings["multipliers"]))

    @property
    def names(self) -> tuple[Any, ...]:
        """The conditions or layers."""
        return tuple(self.tensors["propensity"].coords[self.axis])

    @property
    def base(self) -> Float[Tensor, " item"]:
        """Propensity of each item without steering."""
        return self.tensors["base"].values

    @property
    def passes(self) -> Passes:
        """What the result cost, in rows of text."""
        return Passes(**cast(dict[str, float], self.settings["passes"]))

    @property
    def unit(self) -> str:
        """The unit of what is measured of items: `"nat"` for the propensity, else that of the task's metric."""
        return str(cast(dict[str, JSON], self.settings["measure"])["unit"])

    @property
    def graded(self) -> bool:
        """Whether there is a slope: several multipliers, and an operator to which they matter."""
        return len(self.multipliers) > 1 and self.settings.get("operator") != "ablate"

    def effects(self, name: Any) -> Float[Tensor, "multiplier item"]:
        """Propensity less that without steering.

        Raises:
            UnknownNameError: no such condition or layer.
        """
        return self._of("propensity", name) - self.base

    def slopes(self, name: Any) -> Float[Tensor, " item"]:
        """The least-squares slope of each item's propensity against the multiplier.

        Raises:
            UnknownNameError: no such condition or layer.
            SettingError: fewer than two multipliers.
        """
        return self._slopes(self._of("propensity", name))

    def steerability(self, name: Any, *, over: Any = None) -> Estimate:
        """The mean slope of propensity against the multiplier, with its bootstrap interval over items; or how much
        larger it is than that of another condition or layer, over the same items.

        Raises:
            UnknownNameError: no such condition or layer.
            SettingError: fewer than two multipliers.
        """
        return estimate(self.slopes(name) - (0 if over is None else self.slopes(over)))

    def anti_steerable(self, name: Any) -> Estimate:
        """The share of items whose slope is negative, with its bootstrap interval over items.

        Raises:
            UnknownNameError: no such condition or layer.
            SettingError: fewer than two multipliers.
        """
        return estimate((self.slopes(name) < 0).double())

    def frontier(self, name: Any = None, *, budget: float = BUDGET) -> Frontier:
        """Mean effect against mean KL, one point a multiplier, labelled (condition or layer, multiplier); without a
        name those of the vector, or of all layers of a sweep.

        Raises:
            UnknownNameError: no such condition or layer.
            SettingError: no neutral texts were given, or a budget that is not above 0.
        """
        if "kl" not in self.tensors:
            raise SettingError("a frontier", "no neutral texts were given", "give neutral= texts")
        names = self._main if name is None else (name,)
        effect = torch.cat([self.effects(one).double().mean(-1) for one in names])
        side = torch.cat([self._of("kl", one).double().mean(-1) for one in names])
        return Frontier(effect, side, tuple((one, m) for one in names for m in self.multipliers), budget)

    def to_pandas(self) -> pd.DataFrame:
        """One row a condition or layer and multiplier: propensity and effect (the change of it), and the means of kl
        and of what was measured of written texts, where it was; 95 % intervals, over items or over texts, end in `_low`
        and `_high`. Plain prompting, where it was measured, has a row without a multiplier."""
        import pandas as pd

        return pd.DataFrame(list(self._rows()))

    @property
    @abstractmethod
    def summary(self) -> str:
        """The result in a sentence or two."""

    @property
    def _main(self) -> tuple[Any, ...]:
        return self.names

    def _rows(self) -> Iterator[dict[str, Any]]:
        for name in self.names:
            columns = {"propensity": self._of("propensity", name), "effect": self.effects(name)}
            columns |= {side: self._of(side, name) for side in SIDES if side in self.tensors}
            for k, multiplier in enumerate(self.multipliers):
                yield _row({self.axis: name, "multiplier": multiplier}, {c: x[k] for c, x in columns.items()})

    def _of(self, tensor: str, name: Any) -> Tensor:
        if name not in self.names:
            raise UnknownNameError(f"{self.axis} {name!r}", "no such one", nearest(str(name), map(str, self.names)))
        return self.tensors[tensor].values[self.names.index(name)]

    def _slopes(self, values: Float[Tensor, "... multiplier item"]) -> Float[Tensor, "... item"]:
        m = torch.tensor(self.multipliers, dtype=torch.double)
        if len(m) < 2:
            raise SettingError("a slope over multipliers", f"multipliers {self.multipliers}", "give at least two")
        centred = m - m.mean()
        return centred @ values.double() / (centred @ centred)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.summary})"

    def _repr_html_(self) -> str:
        shown = self.to_pandas()
        shown = shown[[column for column in shown if not str(column).endswith(("_low", "_high"))]]
        table = shown.to_html(index=False, escape=True, na_rep="", float_format="{:.4g}".format)
        return f"<div>{escape(self.summary)}</div>{table}"


def _row(start: dict[str, Any], columns: Mapping[str, Tensor]) -> dict[str, Any]:
    """A row of a table: of each column's items the mean and interval, or the number that there is for all of them."""
    row = dict(start)
    for column, values in columns.items():
        if values.ndim:
            row |= dict(zip((column, f"{column}_low", f"{column}_high"), interval(values).tolist(), strict=True))
        else:
            row[column] = float(values)
    return row


class SteeringEvaluation(Curves):
    """What a vector does to a behaviour, beside controls.

    `tensors`: `propensity` [condition, multiplier, item] (or a task's metric), with the conditions `"vector"`,
    `"random"` (of equal length) and, where it was given, `"shuffled"`; `base` [item] without steering; `random` [draw,
    multiplier, item], of which the condition `"random"` is the first; where they were asked for `kl` [condition,
    multiplier, text] in nats a token, of written texts `perplexity`, `repetition` and `judge` [condition, multiplier,
    item] and `distinct_2` [condition, multiplier], and `prompting` [item], `prompting_perplexity` and so on.
    Multipliers are coordinates as text, and numbers in `multipliers`; the written texts are in `settings["texts"]`.
    """

    kind: ClassVar[str] = "steering_evaluation"
    axis: ClassVar[str] = "condition"

    @property
    def conditions(self) -> tuple[str, ...]:
        """`"vector"` and its controls."""
        return self.names

    def steerability(self, name: str = "vector", *, over: str | None = None) -> Estimate:
        """As of `Curves`, of the vector unless another condition is named. Over `"random"`, each random vector
        is turned the way that it steers towards the behaviour, and the mean over all of them is taken."""
        if over != "random":
            return super().steerability(name, over=over)
        draws = self._slopes(self.tensors["random"].values)
        return estimate(self.slopes(name) - (draws.mean(-1, keepdim=True).sign() * draws).mean(0))

    def anti_steerable(self, name: str = "vector") -> Estimate:
        """As of `Curves`, of the vector unless another condition is named."""
        return super().anti_steerable(name)

    @property
    def random_steerability(self) -> list[float]:
        """The mean slope of each random vector.

        Raises:
            SettingError: fewer than two multipliers.
        """
        slopes: list[float] = self._slopes(self.tensors["random"].values).mean(-1).tolist()
        return slopes

    @property
    def random_effects(self) -> list[float]:
        """The mean change of propensity by each random vector, at the first multiplier."""
        effects: list[float] = (self.tensors["random"].values[:, 0] - self.base).double().mean(-1).tolist()
        return effects

    @property
    def prompting(self) -> Estimate | None:
        """The change of propensity by plain prompting, with its interval; `None` without a prompt."""
        if "prompting" not in self.tensors:
            return None
        return estimate(self.tensors["prompting"].values - self.base)

    @property
    def summary(self) -> str:
        """The result in a sentence or two."""
        n, m = len(self.base), self.multipliers
        if not self.graded:
            random = ", ".join(f"{effect:.3g}" for effect in self.random_effects)
            how = "ablation" if self.settings.get("operator") == "ablate" else f"multiplier {m[0]:g}"
            parts = [
                f"{n} items, {how}: effect {estimate(self.effects('vector')[0])} {self.unit}; random vectors {random}"
            ]
            if "shuffled" in self.names:
                parts.append(f"shuffled labels {estimate(self.effects('shuffled')[0])}")
        else:
            random = ", ".join(f"{slope:.3g}" for slope in self.random_steerability)
            parts = [
                f"{n} items, multipliers {min(m):g} to {max(m):g}: steerability {self.steerability()} {self.unit}, "
                f"{self.anti_steerable().value:.0%} of items anti-steerable; random vectors {random}"
            ]
            parts += [f"shuffled labels {self.steerability('shuffled')}"] if "shuffled" in self.names else []
        parts += [f"prompting changes it by {self.prompting}"] if self.prompting else []
        return "; ".join(parts)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draws propensity against the multiplier, beside controls; see `mechattr.draw.propensity_curve`."""
        from mechattr.steering.pictures import curve

        return curve(self, ax)

    def plot_frontier(self, ax: Axes | None = None, *, budget: float = BUDGET) -> Axes:
        """Draws the effect against its price, beside controls; see `mechattr.draw.side_effect_frontier`.

        Raises:
            SettingError: no neutral texts were given, or a budget that is not above 0.
        """
        from mechattr.steering.pictures import price

        return price(self, budget, ax)

    @property
    def _main(self) -> tuple[str, ...]:
        return ("vector",)

    def _rows(self) -> Iterator[dict[str, Any]]:
        yield from super()._rows()
        if "prompting" in self.tensors:
            values = self.tensors["prompting"].values
            columns = {"propensity": values, "effect": values - self.base}
            sides = (side for side in SIDES if f"prompting_{side}" in self.tensors)
            columns |= {side: self.tensors[f"prompting_{side}"].values for side in sides}
            yield _row({"condition": "prompting", "multiplier": float("nan")}, columns)


class SteeringSweep(Curves):
    """What vectors of several layers do to a behaviour, at each multiplier.

    `tensors`: `propensity` [layer, multiplier, item] (or a task's metric), `base` [item] without steering and, where
    neutral texts were given, `kl` [layer, multiplier, text] in nats a token.
    """

    kind: ClassVar[str] = "steering_sweep"
    axis: ClassVar[str] = "layer"

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers."""
        return self.names

    def plot(self, ax: Axes | None = None, *, budget: float = BUDGET) -> Axes:
        """Draws the effect by layer and multiplier, and KL beside it where it was measured (in axes of your own the
        effect alone); see `mechattr.draw.steering_map`."""
        from mechattr.steering.pictures import by_layer

        return by_layer(self, budget, ax)

    @property
    def summary(self) -> str:
        """The result in a sentence."""
        mean = self.tensors["propensity"].values.double().mean(-1) - self.base.double().mean()
        layer, k = divmod(int(mean.argmax()), len(self.multipliers))
        return (
            f"{len(self.base)} items, layers {self.layers[0]} to {self.layers[-1]}: the largest effect is "
            f"{float(mean.max()):.3g} {self.unit}, at layer {self.layers[layer]} with the multiplier "
            f"{self.multipliers[k]:g}"
        )
