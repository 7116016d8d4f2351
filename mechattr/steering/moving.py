"""Steering that reads the state which it changes: x + m f(x), with a function f for each site."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Self

from jaxtyping import Float
from torch import Tensor

from mechattr import storage
from mechattr.base import Artifact
from mechattr.errors import MismatchError, SettingError
from mechattr.labelled import Labelled
from mechattr.models.base import HookedModel
from mechattr.provenance import provenance
from mechattr.steering.data import Sites, chosen_sites, nodes_of, shape_at
from mechattr.steering.gates import Given
from mechattr.steering.placing import Move, Multiplier, Positions, hooked_model, placed

if TYPE_CHECKING:
    from collections.abc import Iterator

# x [..., d] and the tensors of a site -> what is added to x
Addition = Callable[..., Tensor]


class Moving(Artifact):
    """Steering with a function of the state at each site. `tensors` are named `site/part`; heads are taken together."""

    addition: ClassVar[Addition]
    axes: ClassVar[Mapping[str, tuple[str, ...]]]  # of each part, in the order in which `addition` takes them

    @classmethod
    def made(
        cls, model: HookedModel, parts: Mapping[str, Sequence[Tensor]], method: str, seed: int, **settings: Any
    ) -> Self:
        """From the tensors of each site, with what made them."""
        tensors = {
            f"{site}/{part}": Labelled(tensor.detach().float().cpu().clone(), axes)
            for site, found in parts.items()
            for (part, axes), tensor in zip(cls.axes.items(), found, strict=True)
        }
        stamp = provenance({**asdict(model.info), **model.fingerprint()}, seed=seed)
        return cls(tensors, settings={"method": method, "seed": seed, **settings}, provenance=stamp)

    @property
    def sites(self) -> tuple[str, ...]:
        """The full names of its sites."""
        return tuple(dict.fromkeys(name.rpartition("/")[0] for name in self.tensors))

    def parts(self, site: str) -> list[Tensor]:
        """The tensors of a site.

        Raises:
            SettingError: a site that it does not have.
        """
        if site not in self.sites:
            raise SettingError(f"{self.kind} at {site!r}", f"it acts at {', '.join(self.sites)}", "name one of these")
        return [self.tensors[f"{site}/{part}"].values for part in self.axes]

    def added(self, site: str, x: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows d"]:
        """What is added to states of a site, flattened over heads, at multiplier 1."""
        return type(self).addition(x, *(part.to(x) for part in self.parts(site)))

    @contextmanager
    def apply(
        self, model: Any, multiplier: Multiplier = 1.0, positions: Positions = "all", gate: Given | None = None
    ) -> Iterator[Any]:
        """Steers every run and generation inside a `with` block: x + m f(x). Blocks nest, and nothing stays behind.

        Args:
            model: a hooked model, or a transformers model, whose own `forward` and `generate` are then steered.
            multiplier: m: a number, or one for each row of what is run inside.
            positions: as for vectors; see `mechattr.steering.apply`.
            gate: which rows are steered; as for vectors.

        Raises:
            MismatchError: a model without such sites, or of another width.
            SettingError: no such positions, a multiplier that is not finite, or one for another number of rows.
            NonFiniteError: inside the block, where steering itself makes NaN or infinity.

        Cost:
            No passes of its own.
        """
        hooked = hooked_model(model)
        self._check_fit(hooked)
        moves = [Move(site, partial(moved, type(self).addition, self.parts(site))) for site in self.sites]
        digest = " ".join([self.kind, *(storage.checksum(table.values) for table in self.tensors.values())])
        with placed(model, hooked, moves, multiplier, positions, gate, digest) as steered:
            yield steered

    def _check_fit(self, model: HookedModel) -> None:
        known = set(model.sites())
        fix = "apply it to the model that it was made for"
        for site in self.sites:
            asked = f"{self.kind} at {site}"
            if site not in known:
                raise MismatchError(asked, f"{model.info.name!r} has no such site", fix)
            width, wanted = self.parts(site)[0].shape[-1], width_at(model, site)
            if width != wanted:
                raise MismatchError(f"{asked}, of width {width}", f"{model.info.name!r} has {wanted} there", fix)


def moved(addition: Addition, parts: Sequence[Tensor], x: Tensor, factors: Tensor) -> Tensor:
    """x + m f(x)."""
    flat = x.flatten(2)
    return (flat + factors * addition(flat, *(part.to(flat) for part in parts))).view_as(x)


def whole_sites(model: HookedModel, layers: Sequence[int] | None, sites: Sites) -> list[str]:
    """Full site names, where steering takes all numbers of a site together.

    Raises:
        SettingError: also for nodes that are a part of a site.
    """
    names = chosen_sites(model, layers, sites)
    part = next((node for node in nodes_of(sites) if node.head is not None or node.neuron is not None), None)
    if part is not None:
        found = "a function of the whole state"
        raise SettingError(f"steering at {part}", found, "name sites, such as 'resid_post'")
    return names


def width_at(model: HookedModel, site: str) -> int:
    """How many numbers a state has at a site."""
    return math.prod(shape_at(model, site))
