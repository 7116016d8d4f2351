"""Results of steering: how behaviour follows the multiplier, what else changes, and what controls do."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from jaxtyping import Float
from torch import Tensor

from mechattr.artifact import Passes
from mechattr.base import Artifact
from mechattr.errors import SettingError, UnknownNameError, nearest
from mechattr.steering.frontier import BUDGET, Frontier
from mechattr.steering.intervals import Estimate, estimate, interval

if TYPE_CHECKING:
    import pandas as pd

SIDES = ("kl", "perplexity", "distinct_2", "repetition", "judge")  # of neutral texts, and of generated ones


class Curves(Artifact):
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
        """Propensity of each item without steering, in nats."""
        return self.tensors["base"].values

    @property
    def passes(self) -> Passes:
        """What the result cost, in rows of text."""
        return Passes(**cast(dict[str, float], self.settings["passes"]))

    def effects(self, name: Any) -> Float[Tensor, "multiplier item"]:
        """Propensity less that without steering, in nats."""
        return self._of("propensity", name) - self.base

    def slopes(self, name: Any) -> Float[Tensor, " item"]:
        """The least-squares slope of each item's propensity against the multiplier, in nats.

        Raises:
            SettingError: fewer than two multipliers.
        """
        m = torch.tensor(self.multipliers, dtype=torch.double)
        if len(m) < 2:
            raise SettingError("a slope over multipliers", f"multipliers {self.multipliers}", "give at least two")
        centred = m - m.mean()
        return centred @ self._of("propensity", name).double() / (centred @ centred)

    def frontier(self, name: Any = None, *, budget: float = BUDGET) -> Frontier:
        """Mean effect against mean KL, one point a multiplier; without a name those of all layers of a sweep, or of the
        vector.

        Raises:
            SettingError: no neutral texts were given, or a budget that is not above 0.
        """
        if "kl" not in self.tensors:
            raise SettingError("a frontier", "no neutral texts were given", "give neutral= texts")
        names = self._default() if name is None else (name,)
        effect = torch.cat([self.effects(one).double().mean(-1) for one in names])
        side = torch.cat([self._of("kl", one).double().mean(-1) for one in names])
        labels = tuple(self._label(one, m) for one in names for m in self.multipliers)
        return Frontier(effect, side, labels, budget)

    def to_pandas(self) -> pd.DataFrame:
        """One row a condition or layer and multiplier: propensity and effect (the change of it) with their intervals,
        and the means of kl and of what was measured of generated texts, where it was; 95 % intervals, over items or
        over texts, end in `_low` and `_high`."""
        import pandas as pd

        return pd.DataFrame(list(self._rows()))

    def _rows(self) -> Iterator[dict[str, Any]]:
        for name in self.names:
            columns = {"propensity": self._of("propensity", name), "effect": self.effects(name)}
            columns |= {side: self._of(side, name) for side in SIDES if side in self.tensors}
            found = {column: interval(values).tolist() for column, values in columns.items()}
            for k, multiplier in enumerate(self.multipliers):
                row = {self.axis: name, "multiplier": multiplier}
                for column, (mean, low, high) in found.items():
                    row |= {column: mean[k], f"{column}_low": low[k], f"{column}_high": high[k]}
                yield row

    def _of(self, tensor: str, name: Any) -> Tensor:
        if name not in self.names:
            raise UnknownNameError(f"{self.axis} {name!r}", "no such one", nearest(str(name), map(str, self.names)))
        return self.tensors[tensor].values[self.names.index(name)]

    def _default(self) -> tuple[Any, ...]:
        return self.names

    def _label(self, name: Any, multiplier: float) -> str:
        return f"layer {name}, {multiplier:g}"

    def _steerability(self, name: Any, over: Any = None) -> Estimate:
        return estimate(self.slopes(name) - (0 if over is None else self.slopes(over)))

    def _anti_steerable(self, name: Any) -> Estimate:
        return estimate((self.slopes(name) < 0).double())

    @property
    def summary(self) -> str:
        """The result in a sentence."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.summary})"

    def _repr_html_(self) -> str:
        shown = self.to_pandas()
        shown = shown[[column for column in shown if not str(column).endswith(("_low", "_high"))]]
        table = shown.to_html(index=False, escape=True, na_rep="", float_format="{:.4g}".format)
        return f"<div>{escape(self.summary)}</div>{table}"


class SteeringEvaluation(Curves):
    """What a vector does to a behaviour, beside controls.

    `tensors`: `propensity` [condition, multiplier, item] in nats, with the conditions `"vector"`, `"random"` (of equal
    length) and, where it was given, `"shuffled"`; `base` [item] without steering; `random` [draw, multiplier, item], of
    which the condition `"random"` is the first; where they were asked for `prompting` [item], `kl` [condition,
    multiplier, text] in nats a token, and `perplexity`, `distinct_2`, `repetition` and `judge` [condition, multiplier,
    item] of generated texts. Multipliers are coordinates as text, and numbers in `multipliers`.
    """

    kind: ClassVar[str] = "steering_evaluation"
    axis: ClassVar[str] = "condition"

    @property
    def conditions(self) -> tuple[str, ...]:
        """`"vector"` and its controls."""
        return self.names

    def steerability(self, condition: str = "vector", *, over: str | None = None) -> Estimate:
        """The mean slope of propensity against the multiplier, in nats, with its bootstrap interval over items; or how
        much larger it is than that of another condition, over the same items.

        Raises:
            UnknownNameError: no such condition.
            SettingError: fewer than two multipliers.
        """
        return self._steerability(condition, over)

    def anti_steerable(self, condition: str = "vector") -> Estimate:
        """The share of items whose slope is negative, with its bootstrap interval over items.

        Raises:
            UnknownNameError: no such condition.
            SettingError: fewer than two multipliers.
        """
        return self._anti_steerable(condition)

    @property
    def random_steerability(self) -> list[float]:
        """The mean slope of each random vector, in nats."""
        m = torch.tensor(self.multipliers, dtype=torch.double)
        centred = m - m.mean()
        draws = self.tensors["random"].values.double().mean(-1)
        return (draws @ centred / (centred @ centred)).tolist()

    @property
    def prompting(self) -> Estimate | None:
        """The effect of plain prompting on propensity, in nats, with its interval; `None` without a prompt."""
        if "prompting" not in self.tensors:
            return None
        return estimate(self.tensors["prompting"].values - self.base)

    @property
    def summary(self) -> str:
        """The result in a sentence or two."""
        n, m = len(self.base), self.multipliers
        if len(m) < 2:
            return f"{n} items, multiplier {m[0]:g}: effect {estimate(self.effects('vector')[0])} nats"
        random = ", ".join(f"{slope:.3g}" for slope in self.random_steerability)
        parts = [
            f"{n} items, multipliers {m[0]:g} to {m[-1]:g}: steerability {self.steerability()} nats, "
            f"anti-steerable items {self.anti_steerable().value:.0%}",
            f"random vectors {random}",
        ]
        parts += [f"shuffled labels {self.steerability('shuffled')}"] if "shuffled" in self.names else []
        parts += [f"prompting changes propensity by {self.prompting}"] if self.prompting else []
        return "; ".join(parts)

    def _default(self) -> tuple[str, ...]:
        return ("vector",)

    def _label(self, name: Any, multiplier: float) -> str:
        return f"{multiplier:g}" if name == "vector" else f"{name}, {multiplier:g}"


class SteeringSweep(Curves):
    """What vectors of several layers do to a behaviour, at each multiplier.

    `tensors`: `propensity` [layer, multiplier, item] in nats, `base` [item] without steering and, where neutral texts
    were given, `kl` [layer, multiplier, text] in nats a token.
    """

    kind: ClassVar[str] = "steering_sweep"
    axis: ClassVar[str] = "layer"

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers."""
        return self.names

    def steerability(self, layer: int) -> Estimate:
        """The mean slope of propensity against the multiplier, in nats, with its bootstrap interval over items.

        Raises:
            UnknownNameError: no such layer.
            SettingError: fewer than two multipliers.
        """
        return self._steerability(layer)

    def anti_steerable(self, layer: int) -> Estimate:
        """The share of items whose slope is negative, with its bootstrap interval over items.

        Raises:
            UnknownNameError: no such layer.
            SettingError: fewer than two multipliers.
        """
        return self._anti_steerable(layer)

    @property
    def summary(self) -> str:
        """The result in a sentence."""
        mean = self.tensors["propensity"].values.double().mean(-1) - self.base.double().mean()
        layer, k = divmod(int(mean.argmax()), len(self.multipliers))
        return (
            f"{len(self.base)} items, layers {self.layers[0]} to {self.layers[-1]}: the largest effect is "
            f"{float(mean.max()):.3g} nats, at layer {self.layers[layer]} with the multiplier {self.multipliers[k]:g}"
        )
