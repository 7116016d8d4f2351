"""Steering vectors: directions at sites of one model, with how they were made."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from jaxtyping import Float
from torch import Tensor

from mechattr.base import Artifact
from mechattr.errors import MismatchError, SettingError
from mechattr.labelled import Labelled
from mechattr.provenance import JSON
from mechattr.sites import Node, full_name, parse, site_spec

if TYPE_CHECKING:
    import pandas as pd

    from mechattr.steering.gates import Given
    from mechattr.steering.operators import Operation


class SteeringVector(Artifact):
    """One direction a site: `tensors` maps full site names to [d_model], or [head, d_head] at sites of heads. With one
    more axis in front, `pos`, there is one for each of the first positions of a prompt.

    `settings` says how they were made, and has the mean length of the activations that they were made from
    (`"lengths"`, by site). Vectors of equal sites can be added, subtracted, negated and multiplied by numbers.
    """

    kind: ClassVar[str] = "steering_vector"

    @classmethod
    def of(
        cls,
        tensors: Mapping[str, Tensor],
        *,
        settings: Mapping[str, JSON] | None = None,
        provenance: Mapping[str, JSON] | None = None,
    ) -> Self:
        """A vector from plain tensors by full site name.

        Raises:
            UnknownSiteError: no such site.
            SettingError: no tensors, or one that is not of finite numbers.
            AxisError: a tensor with other axes than its site has behind batch and position.
        """
        if not tensors:
            raise SettingError("a steering vector", "no tensors", "give a direction for at least one site")
        labelled = {}
        for name, tensor in tensors.items():
            if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
                found = str(tensor.dtype) if isinstance(tensor, Tensor) else f"a {type(tensor).__name__}"
                raise SettingError(f"a direction at {name}", found, "give a tensor of floating point numbers")
            if not bool(torch.isfinite(tensor).all()):
                raise SettingError(f"a direction at {name}", "NaN or infinity", "look at the data it was made from")
            axes = axes_of(name)
            axes = ("pos", *axes) if tensor.ndim > len(axes) else axes
            labelled[name] = Labelled(tensor.detach().clone(), axes)
        return cls(labelled, settings=settings or {}, provenance=provenance or {})

    @property
    def sites(self) -> tuple[str, ...]:
        """The full names of its sites."""
        return tuple(self.tensors)

    @property
    def directions(self) -> dict[int, Float[Tensor, " d_model"]]:
        """The directions at `resid_post`, by layer; those of single positions are not among them."""
        found = ((parse(name), table.values) for name, table in self.tensors.items() if table.axes[0] != "pos")
        return {layer: x for (short, layer), x in found if short == "resid_post" and layer is not None}

    def apply(
        self,
        model: Any,
        multiplier: float | Sequence[float] | Tensor = 1.0,
        positions: str | Sequence[int] | Tensor = "all",
        operator: str | Operation = "add",
        gate: Given | None = None,
    ) -> AbstractContextManager[Any]:
        """Steers every run and generation inside a `with` block; see `mechattr.steering.apply`."""
        from mechattr.steering.apply import apply

        return apply(self, model, multiplier, positions, operator, gate)

    def merge_into_bias(
        self, model: Any, multiplier: float = 1.0, *, positions: Any = "all", operator: Any = "add"
    ) -> Any:
        """A copy of a transformers model with this vector in its biases; see `mechattr.steering.merge_into_bias`."""
        from mechattr.steering.merge import merge_into_bias

        return merge_into_bias(self, model, multiplier, positions=positions, operator=operator)

    def only(self, sites: str | Sequence[str | Node]) -> Self:
        """The same vector at some of its sites, by full name, or at some nodes, such as `result.top(10)`: directions of
        other heads or neurons become 0, which `apply` leaves alone. Where a node is at a position does not matter here.

        Raises:
            SettingError: a site, head or neuron that it does not have.
        """
        kept: dict[str, Tensor] = {}
        has = f"a vector at {', '.join(self.sites)}"
        for given in [sites] if isinstance(sites, str) else sites:
            name = full_name(given.site, given.layer) if isinstance(given, Node) else given
            if name not in self.tensors:
                raise SettingError(f"the direction at {name}", has, "name some of these")
            values = self.tensors[name].values
            part = (given.neuron if given.head is None else given.head) if isinstance(given, Node) else None
            if part is not None and self.tensors[name].axes[0] == "pos":
                found = "directions of single positions"
                raise SettingError(f"the direction of {given}", found, "name sites, not heads or neurons")
            if isinstance(given, Node) and given.head is not None and "head" not in self.tensors[name].axes[0]:
                raise SettingError(f"the direction of {given}", f"no heads at {name}", "name sites, or nodes of heads")
            if part is not None and part not in range(len(values)):
                raise SettingError(f"the direction of {given}", f"{len(values)} at {name}", "count from 0")
            mask = kept.setdefault(name, torch.zeros(len(values), dtype=torch.bool, device=values.device))
            mask[slice(None) if part is None else part] = True
        if not kept:
            raise SettingError("the direction at no site", has, "name some of these")
        whole = {name: (self.tensors[name].values, mask) for name, mask in kept.items()}
        return self._with({n: x * mask.reshape(-1, *[1] * (x.ndim - 1)) for n, (x, mask) in whole.items()})

    def normalised(self) -> Self:
        """The same directions at length 1; directions of length 0 stay."""
        return self._each(lambda x: x / x.norm().clamp(min=torch.finfo(x.dtype).tiny))

    def with_norms(self, norms: Mapping[str, float]) -> Self:
        """The same directions at given lengths by site, such as those of another vector: `other.norms()`.

        Raises:
            SettingError: a site without a length or without a direction, or a length that is negative or not finite.
        """
        scales = {}
        for site, length in self.norms().items():
            given = norms.get(site)
            if given is None or not 0 <= given < float("inf"):
                fix = "give a length for each site, such as other.norms()"
                raise SettingError(f"the length at {site}", f"{given!r}", fix)
            if not length and given:
                raise SettingError(f"the length {given:g} at {site}", "no direction there", "leave the site out: .only")
            scales[site] = given / length if length else 0.0
        return self._with({site: table.values * scales[site] for site, table in self.tensors.items()})

    def norms(self) -> dict[str, float]:
        """The length of the direction at each site."""
        return {name: float(table.values.norm()) for name, table in self.tensors.items()}

    def cosine(self, other: SteeringVector) -> dict[str, float]:
        """The cosine with another vector at each site that both have.

        Raises:
            MismatchError: no such site.
        """
        shared = [name for name in self.tensors if name in other.tensors]
        if not shared:
            found = f"{', '.join(self.sites)} and {', '.join(other.sites)}"
            raise MismatchError("the cosine of two steering vectors", found, "compare vectors at the same sites")
        pairs = {n: (self.tensors[n].values.double(), other.tensors[n].values.double()) for n in shared}
        return {name: float((a * b).sum() / (a.norm() * b.norm())) for name, (a, b) in pairs.items()}

    def to_pandas(self) -> pd.DataFrame:
        """Columns site, norm, length (of the activations), share (norm over length)."""
        import pandas as pd

        lengths: Any = self.settings.get("lengths") or {}
        rows = [
            {"site": n, "norm": norm, "length": lengths.get(n), "share": norm / lengths[n] if lengths.get(n) else None}
            for n, norm in self.norms().items()
        ]
        return pd.DataFrame(rows)

    def __add__(self, other: SteeringVector) -> Self:
        return self._both(other, torch.add)

    def __sub__(self, other: SteeringVector) -> Self:
        return self._both(other, torch.sub)

    def __mul__(self, factor: float) -> Self:
        number = _number(factor)
        return self._each(lambda x: x * number)

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> Self:
        number = _number(divisor)
        return self._each(lambda x: x / number)

    def __neg__(self) -> Self:
        return self._each(torch.neg)

    def _each(self, function: Callable[[Tensor], Tensor]) -> Self:
        return self._with({name: function(table.values) for name, table in self.tensors.items()})

    def _both(self, other: SteeringVector, function: Callable[[Tensor, Tensor], Tensor]) -> Self:
        if not isinstance(other, SteeringVector) or set(self.tensors) != set(other.tensors):
            found = f"{', '.join(self.sites)} and {', '.join(getattr(other, 'sites', ('no vector',)))}"
            raise MismatchError("arithmetic of steering vectors", found, "use vectors at the same sites: .only([...])")
        if self.provenance.get("weight_hash") != other.provenance.get("weight_hash"):
            raise MismatchError("arithmetic of steering vectors", "vectors of two models", "use vectors of one model")
        return self._with({n: function(t.values, other.tensors[n].values) for n, t in self.tensors.items()})

    def _with(self, tensors: Mapping[str, Tensor]) -> Self:
        return type(self).of(tensors, settings=self.settings, provenance=self.provenance)


def _number(given: Any) -> float:
    try:
        return float(given)
    except (TypeError, ValueError, RuntimeError) as error:
        fix = "multiply vectors by numbers"
        raise SettingError(f"a steering vector times {given!r:.60}", f"a {type(given).__name__}", fix) from error


def axes_of(site: str) -> tuple[str, ...]:
    """The axes of a direction at a site: those behind batch and position."""
    return site_spec(site).axes[2:]
