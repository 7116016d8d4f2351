"""Conditions: whether a prompt's activations lie along a direction, decided row by row."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechattr import storage
from mechattr.base import Artifact
from mechattr.errors import SettingError, UnknownNameError, nearest
from mechattr.labelled import Labelled
from mechattr.models.base import Batch, HookedModel
from mechattr.provenance import JSON
from mechattr.sites import site_spec
from mechattr.steering.data import check_positions, picked
from mechattr.steering.gates import Reading
from mechattr.steering.vector import axes_of

COMPARATORS = ("above", "below")


def tanh(h: Float[Tensor, "row d"], c: Float[Tensor, " d"]) -> Float[Tensor, " row"]:
    r"""$\cos(h, \tanh(P h))$ with $P = c c^\top / (c \cdot c)$, the published similarity of conditional
    activation steering. It is the same for h and -h, and for c and -c."""
    return torch.cosine_similarity(h, torch.tanh((h @ c / (c @ c))[:, None] * c), dim=-1)


def cosine(h: Float[Tensor, "row d"], c: Float[Tensor, " d"]) -> Float[Tensor, " row"]:
    """cos(h, c)."""
    return torch.cosine_similarity(h, c[None], dim=-1)


def projection(h: Float[Tensor, "row d"], c: Float[Tensor, " d"]) -> Float[Tensor, " row"]:
    """h.c / |c|, in units of the activations."""
    return h @ c / c.norm()


SIMILARITIES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cosine": cosine,
    "projection": projection,
    "tanh": tanh,
}


class Condition(Artifact, Reading):
    """Opens a gate for the rows whose similarity to a direction is above (or below) a threshold.

    `tensors` has the direction by the full name of the site at which it reads. `settings` has the `threshold`, the
    `comparator` (`"above"` or `"below"`), the `similarity` (`"cosine"`, `"projection"` or `"tanh"`, see
    `mechattr.steering.conditions`) and the `positions` that are read: the `"last"` token of the prompt, the `"mean"`
    over its tokens, or one position. Conditions combine: `a & b`, `a | b`, `~a`.
    """

    kind: ClassVar[str] = "steering_condition"

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.tensors) != 1:
            raise SettingError("a condition", f"{len(self.tensors)} directions", "give one")
        axes = site_spec(self.site).axes
        if axes[:2] != ("batch", "pos"):
            fix = "use a site with a vector at each position, such as resid_post"
            raise SettingError(f"a condition at {self.site}", f"axes {', '.join(axes)}", fix)
        direction, threshold = self.direction, self.settings.get("threshold")
        if not bool(direction.isfinite().all()) or not bool(direction.any()):
            raise SettingError(f"a condition at {self.site}", "a direction of zeros, NaN or infinity", "give another")
        if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not math.isfinite(threshold):
            raise SettingError(f"threshold={threshold!r}", "no finite number", "give a number")
        for name, known in (("comparator", COMPARATORS), ("similarity", tuple(SIMILARITIES))):
            if self.settings.get(name) not in known:
                value = self.settings.get(name)
                raise UnknownNameError(f"{name}={value!r}", "no such name", nearest(str(value), known))
        positions: Any = self.settings.get("positions")
        check_positions(positions)

    @classmethod
    def of(
        cls,
        site: str,
        direction: Float[Tensor, "*axes"],
        threshold: float,
        *,
        comparator: str = "above",
        similarity: str = "cosine",
        positions: str | int = "last",
        settings: Mapping[str, JSON] | None = None,
        provenance: Mapping[str, JSON] | None = None,
    ) -> Self:
        """A condition from its parts.

        Raises:
            UnknownSiteError: no such site.
            AxisError: a direction with other axes than the site has behind batch and position.
            SettingError: a direction of zeros or NaN, a threshold that is not finite, or no such positions.
            UnknownNameError: no such comparator or similarity.
        """
        if not isinstance(direction, Tensor):
            raise SettingError(f"a condition at {site}", f"a {type(direction).__name__}", "give a tensor")
        if isinstance(threshold, float) and not math.isfinite(threshold):  # JSON has none
            raise SettingError(f"threshold={threshold!r}", "no finite number", "give a number")
        own: dict[str, JSON] = {"threshold": threshold, "comparator": comparator}
        own |= {"similarity": similarity, "positions": positions}
        table = {site: Labelled(direction.detach().clone(), axes_of(site))}
        return cls(table, settings={**own, **(settings or {})}, provenance=provenance or {})

    @property
    def site(self) -> str:
        """The full name of the site that it reads."""
        return next(iter(self.tensors))

    @property
    def direction(self) -> Float[Tensor, "*axes"]:
        """The direction."""
        return self.tensors[self.site].values

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the direction."""
        return tuple(self.direction.shape)

    @property
    def threshold(self) -> float:
        """The similarity that divides rows."""
        value: Any = self.settings["threshold"]
        return float(value)

    @property
    def digest(self) -> str:
        """What tells it from others."""
        own = [str(self.settings[name]) for name in ("threshold", "comparator", "similarity", "positions")]
        return " ".join([self.site, storage.checksum(self.direction), *own])

    def similarity(self, x: Float[Tensor, "row pos *axes"], batch: Batch) -> Float[Tensor, " row"]:
        """The similarity of each row's activations at the site to the direction."""
        positions: Any = self.settings["positions"]
        h = picked(x, batch, positions).flatten(1)
        return SIMILARITIES[str(self.settings["similarity"])](h, self.direction.flatten().to(h))

    def decide(self, x: Float[Tensor, "row pos *axes"], batch: Batch) -> Bool[Tensor, " row"]:
        """Which rows it opens for."""
        found = self.similarity(x, batch)
        return found > self.threshold if self.settings["comparator"] == "above" else found < self.threshold

    def scores(self, model: HookedModel, batch: Batch) -> Float[Tensor, " row"]:
        """The similarity that it finds in a model, one number a row.

        Cost:
            1 forward pass a row.
        """
        return self.similarity(model.run(batch, record=self.site).activations[self.site].values, batch)
