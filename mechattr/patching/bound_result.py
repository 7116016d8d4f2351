"""The bound on missed effects as a result: theta*, the curve of p values and what each node contributed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from html import escape
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mechattr.artifact import Passes
from mechattr.base import Artifact
from mechattr.engines.subsampling import Contrast
from mechattr.errors import SettingError
from mechattr.labelled import Labelled
from mechattr.ranking import largest, node_columns, node_vector

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

POINTS = 61  # of a curve
_SHOWN = 20  # rows of a table in a notebook


class Bound(Artifact):
    r"""How large an effect can have been missed.

    $$p(\theta) = \min\big(1, J \max_n p_n(\theta)\big), \qquad \theta^* = \max_n \big(\Delta_n + t_{\nu_n, 1-\alpha/J}
    \, \mathrm{SE}_n\big), \qquad \alpha = 1 - \text{confidence}$$

    with J the number of planned looks. Rejecting "some covered node has an effect of at least $\theta$" needs every
    $p_n$ to be small, that of the node in question too, so the number of nodes needs no correction.

    `tensors` holds, with axes among `layer`, `pos` and `head`, `kv_head` or `neuron`: `difference/SITE` (size of the
    estimated effect), `signed/SITE` (mean estimated effect), `error/SITE`, `dof/SITE` and `inclusions/SITE` (samples
    that patched the node; of the pair with the fewest where pairs are kept apart). A node that is not covered has NaN
    as its error, one with too few samples infinity. `verified` holds the verified effects, largest first, where they
    are known.
    """

    kind = "bound"

    def _nodes(self, which: str) -> dict[str, Labelled]:
        prefix = f"{which}/"
        return {name.removeprefix(prefix): x for name, x in self.tensors.items() if name.startswith(prefix)}

    def _number(self, key: str) -> float:
        return float(cast(float, self.settings[key]))

    @cached_property
    def _covered(self) -> Tensor:
        """Places of the covered nodes in the node vector."""
        return (~node_vector(self._nodes("error")).isnan()).nonzero()[:, 0]

    @cached_property
    def _contrast(self) -> Contrast:
        columns = (node_vector(self._nodes(name))[self._covered] for name in ("difference", "signed", "error", "dof"))
        return Contrast(*columns)

    @cached_property
    def _upper(self) -> Tensor:
        return self._contrast.upper((1 - self.confidence) / self._number("looks_planned"))

    @property
    def confidence(self) -> float:
        """Of the bound."""
        return self._number("confidence")

    @property
    def unit(self) -> str:
        """Of effects: that of the metric."""
        return str(cast(dict[str, str], self.settings["metric"])["unit"])

    @property
    def theta(self) -> float:
        """The bound: with `confidence`, no covered node has a larger effect. 0 where no node is left to cover, and
        infinite where a node has fewer than two samples with it, or without it."""
        return float(self._upper.max()) if len(self._upper) else 0.0

    def p_of(self, theta: float) -> float:
        """The p value of "some covered node has an effect of at least `theta`"; 0 where no node is left to cover.

        Raises:
            SettingError: `theta` is not a size.
        """
        if isinstance(theta, bool) or not (isinstance(theta, int | float) and 0 <= theta < math.inf):
            raise SettingError(f"theta={theta!r}", "that is no size of an effect", "give a finite number from 0")
        if not len(self._covered):
            return 0.0
        return min(1.0, self._number("looks_planned") * float(self._contrast.tail(float(theta)).max()))

    def curve(
        self, thetas: Sequence[float] | Tensor | None = None
    ) -> tuple[Float[Tensor, " point"], Float[Tensor, " point"]]:
        """The curve p(theta).

        Args:
            thetas: effects; by default 61 from 0 to 1.5 theta* (where that is finite).

        Returns:
            The effects and their p values.

        Raises:
            SettingError: an effect that is not a size.
        """
        if thetas is None:
            end = next((x for x in (1.5 * self.theta, self.verified_kth) if x and math.isfinite(x)), 1.0)
            thetas = np.linspace(0, end, POINTS).tolist()
        at = [x.item() if isinstance(x, Tensor) else x for x in thetas]
        values = [self.p_of(x) for x in at]
        return torch.tensor(at, dtype=torch.float64), torch.tensor(values, dtype=torch.float64)

    @property
    def verified(self) -> tuple[float, ...]:
        """The verified effects, largest first: |mean effect|, or mean |effect| where pairs are kept apart. Empty where
        nodes were given without effects."""
        return tuple(self.tensors["verified"].values.tolist()) if "verified" in self.tensors else ()

    @property
    def verified_kth(self) -> float | None:
        """The smallest verified effect: that of the K-th node where the top K were verified. For scale."""
        return self.verified[-1] if self.verified else None

    @property
    def n_covered(self) -> int:
        """Number of nodes that the bound covers."""
        return len(self._covered)

    @property
    def passes(self) -> Passes:
        """What the result cost, in prompt rows."""
        return Passes(**cast(dict[str, float], self.settings["passes"]))

    @property
    def _sites(self) -> str:
        return ", ".join(cast(list[str], self.settings["sites"]))

    @property
    def _measure(self) -> str:
        return "mean |effect|" if self.settings["per_pair"] else "|mean effect|"

    @property
    def covers(self) -> str:
        """What the bound is about, and what it is not about."""
        pairs, p = self.settings["n_pairs"], self._number("p")
        looks, taken = self.settings["looks_planned"], self.settings["looks_taken"]
        text = (
            f"{self.n_covered} nodes of {self._sites}: all but {self.settings['n_verified']} that were verified and "
            f"{self.settings['n_trivial_zero']} whose activation is the same on both prompts of every pair. "
            f"It bounds the {self._measure} over {pairs} pair{'s' * (pairs != 1)}"
        )
        if not self.settings["per_pair"]:
            text += ", in which effects of opposite sign on different pairs cancel"
        text += (
            f". An effect is an average over contexts in which each other covered node is patched with probability "
            f"{100 * p:.4g} %; the effect of a node patched alone can differ where nodes interact."
        )
        if cast(int, looks) > 1:
            text += f" Look {taken} of {looks} planned ones, each at 1/{looks} of the error probability."
        return text

    @property
    def summary(self) -> str:
        """The result in one sentence."""
        sure = f"{100 * self.confidence:.4g} % confidence"
        if not self.n_covered:
            return (
                f"no node of {self._sites} is left to bound: each was verified or has the same activation on both "
                "prompts, so no effect can have been missed"
            )
        if math.isinf(self.theta):
            short = int(self._contrast.error.isinf().sum())
            return (
                f"no bound with {sure}: {short} of {self.n_covered} unverified nodes were in fewer than two samples, "
                f"or in all but one; a budget of about {self.settings['budget_needed']} forward passes is needed"
            )
        return (
            f"with {sure} no unverified component of {self._sites} has a {self._measure} (averaged over random "
            f"{100 * self._number('p'):.4g} % contexts) above {self.theta:.3g} {self.unit}"
        )

    def to_pandas(self) -> pd.DataFrame:
        """The covered nodes, largest upper bound first.

        Columns: site, layer, pos, head (kv head for k and v), neuron, difference (size of the estimated effect), signed
        (mean estimated effect), error, dof, inclusions and upper, whose maximum is theta*.
        """
        return self._frame(None)

    def _frame(self, k: int | None) -> pd.DataFrame:
        import pandas as pd

        order = largest(self._upper, self.n_covered if k is None else k)
        places = self._covered[order]
        frame = pd.DataFrame(node_columns(self._nodes("error"), places))
        words = {"pos"} if any(isinstance(pos, str) for pos in frame["pos"]) else set()
        frame = frame.astype(dict.fromkeys({"layer", "pos", "head", "neuron"} - words, "Int64"))
        for name in ("difference", "signed", "error", "dof"):
            frame[name] = node_vector(self._nodes(name))[places].numpy()
        frame["inclusions"] = node_vector(self._nodes("inclusions"))[places].long().numpy()
        frame["upper"] = self._upper[order].numpy()
        return frame

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draws the curve with theta* and the verified effects; see `mechattr.draw.curves.bound_curve`.

        Raises:
            SettingError: theta* is infinite, so there is no curve to draw.
        """
        if math.isinf(self.theta):
            raise SettingError("a plot of the bound", self.summary, "give a larger budget")
        from mechattr import draw

        return draw.bound_curve(
            *self.curve(),
            theta_star=self.theta,
            confidence=self.confidence,
            verified=self.verified,
            unit=self.unit,
            ax=draw.pyplot_axes(5.6, 3.4) if ax is None else ax,
        )

    def __repr__(self) -> str:
        return f"Bound({self.summary})"

    def _repr_html_(self) -> str:
        line = f"{self.passes.forward:g} forward passes. Covers {self.covers}"
        table = self._frame(_SHOWN).to_html(index=False, escape=True, na_rep="", float_format="{:.4g}".format)
        return f"<div><b>{escape(self.summary)}</b></div><div>{escape(line)}</div>{table}"
