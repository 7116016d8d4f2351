"""Applying a steering vector: every run and generation inside a `with` block is steered, where it should be."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mechattr import storage
from mechattr.errors import MismatchError, NonFiniteError, SettingError, nearest
from mechattr.models.base import Batch, HookedModel
from mechattr.models.edits import Edit
from mechattr.models.operators import Place
from mechattr.models.standing import StandingEdits
from mechattr.sites import parse
from mechattr.steering.operators import OPERATORS, Operation
from mechattr.steering.vector import SteeringVector

WORDS = {"all": None, "prompt": "prompt", "generated": "generated", "last": [-1]}
Positions = str | Sequence[int] | Tensor


@contextmanager
def apply(
    vector: SteeringVector,
    model: Any,
    multiplier: float | Sequence[float] | Tensor = 1.0,
    positions: Positions = "all",
    operator: str | Operation = "add",
    gate: Any = None,
) -> Iterator[Any]:
    """Steers a model inside a `with` block; blocks nest, and nothing stays behind, whatever is raised inside.

    Args:
        vector: directions at sites of this model.
        model: a hooked model, or a transformers model, whose own `forward` and `generate` are then steered.
        multiplier: a number, or one for each row of what is run inside.
        positions: `"all"`, `"prompt"` and `"generated"` tokens, the `"last"` one of the prompt, position numbers
            (absolute, whatever a cache of keys and values holds; negative ones count from the prompt's end), or a mask
            [row, column of the prompt]. A vector with directions of single positions says itself where it acts: at
            those that a prompt has.
        operator: `"add"`, `"norm_preserving"`, `"ablate"`, `"ablate_then_add"`, `"clamp"`, `"angular"`, `"scale"`, or a
            function `(x, v, multiplier) -> x`.
        gate: not there yet.

    Raises:
        MismatchError: a vector of another width, or of sites that the model does not have.
        SettingError: no such operator or positions, a multiplier that is not finite, or one for another number of rows.
        NonFiniteError: inside the block, where steering itself makes NaN or infinity, with site and multiplier.

    Cost:
        No passes of its own; one operation of d_model numbers a site and position.
    """
    if gate is not None:
        raise SettingError("gate", "steering has no gates yet", "leave it out, or give a multiplier for each row")
    hooked = _hooked(model)
    operation = _operation(operator)
    factors = _multiplier(multiplier)
    _check_positions(positions)
    tensors = _fitting(vector, hooked)
    _check_own_positions(vector, positions)

    def edits(batch: Batch) -> list[Edit]:
        if factors.ndim and len(factors) != len(batch):
            found = f"a batch of {len(batch)} rows"
            raise SettingError(f"{len(factors)} multipliers", found, "give a number, or one multiplier for each row")
        acts: list[Edit] = []
        for name, x in tensors.items():
            if vector.tensors[name].axes[0] != "pos":
                acts += _edits(name, Steer(x, factors, operation), positions, batch)
                continue
            for p, v in enumerate(x):
                rows = (batch.lengths > p).nonzero()[:, 0].tolist()
                acts += [Edit(name, Steer(v, factors, operation), positions=[p], rows=rows)] * bool(rows)
        return acts

    # a tensor's text leaves out the middle of a long one, and a function's has its address
    where = storage.checksum(positions) if isinstance(positions, Tensor) else str(positions)
    how = operator if isinstance(operator, str) else getattr(operator, "__qualname__", type(operator).__qualname__)
    digest = " ".join([*map(storage.checksum, tensors.values()), str(factors.tolist()), where, how])
    added = StandingEdits(edits, tuple(tensors), digest)
    if hooked is model:
        with hooked.standing(added):
            yield hooked
    else:
        from mechattr.models.attached import attached

        with attached(hooked, added):
            yield model


@dataclass(frozen=True, eq=False, slots=True)
class Steer:
    """The operator of an edit: steers the selected rows and positions along a vector.

    Attributes:
        v: [d_model], or [head, d_head], where heads without a direction are left alone.
        multiplier: a number, or one a row of the batch; beams of a row share it.
        operation: what is done.
    """

    v: Tensor
    multiplier: Tensor
    operation: Operation

    def __call__(self, x: Tensor, place: Place) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        factors = self._factors(place, len(x)).to(x.device, wide)
        v, y = self.v.to(x.device, wide), x.to(wide)
        if v.ndim == 1:
            out = self.operation(y, v, factors)
        else:
            out = y.clone()
            for head in range(len(v)):
                if bool(v[head].any()):
                    out[:, :, head] = self.operation(y[:, :, head], v[head], factors)
        steered = out.to(x.dtype)
        if bool((x.isfinite() & ~steered.isfinite()).any()):
            found = f"NaN or infinity in {x.dtype}, with the multiplier {self._shown()}"
            raise NonFiniteError(f"steering at {place.site}", found, "use a smaller multiplier, or a wider dtype")
        return steered

    def _shown(self) -> str:
        factors = self.multiplier.tolist()
        return f"{factors:g}" if isinstance(factors, float) else ", ".join(f"{one:g}" for one in factors)

    def _factors(self, place: Place, n: int) -> Tensor:
        """[rows, 1, 1]."""
        if not self.multiplier.ndim:
            return self.multiplier.reshape(1, 1, 1)
        copies = place.shape[0] // len(self.multiplier)
        rows = torch.arange(n) if place.whole else place.index[0].flatten().cpu()
        return self.multiplier[rows // copies].reshape(-1, 1, 1)


def _edits(name: str, op: Steer, positions: Positions, batch: Batch) -> list[Edit]:
    if isinstance(positions, Tensor) and positions.dtype == torch.bool:
        if tuple(positions.shape) != tuple(batch.tokens.shape):
            found = f"a batch of shape {list(batch.tokens.shape)}"
            fix = "give one bool for each row and column of the prompt"
            raise SettingError(f"a mask of positions of shape {list(positions.shape)}", found, fix)
        mask = positions.to(batch.device) & batch.mask
        return [
            Edit(name, op, positions=batch.positions[row, mask[row]].tolist(), rows=[row])
            for row in range(len(batch))
            if bool(mask[row].any())
        ]
    where: Any = WORDS[positions] if isinstance(positions, str) else torch.as_tensor(positions).tolist()
    return [Edit(name, op, positions=where)]


def _hooked(model: Any) -> Any:
    if isinstance(model, HookedModel):
        return model
    if hasattr(model, "config") and hasattr(model, "forward"):
        from mechattr.models.attached import hooked_around

        return hooked_around(model)
    raise SettingError("a model to steer", f"a {type(model).__name__}", "give a hooked model or a transformers model")


def _operation(given: str | Operation) -> Operation:
    if callable(given):
        return given
    if given not in OPERATORS:
        raise SettingError(f"operator={given!r}", "no such operator", nearest(str(given), OPERATORS))
    return OPERATORS[given]


def _multiplier(given: float | Sequence[float] | Tensor) -> Tensor:
    try:
        factors = torch.as_tensor(given, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):
        factors = torch.full((), torch.nan, dtype=torch.float64)
    if factors.ndim > 1 or isinstance(given, bool) or not bool(torch.isfinite(factors).all()):
        raise SettingError(f"multiplier={given!r}", "no finite number", "give a number, or one for each row")
    return factors


def _check_positions(given: Positions) -> None:
    if isinstance(given, str) and given not in WORDS:
        raise SettingError(f"positions={given!r}", "no such place", nearest(given, WORDS))
    fix = "give one of " + ", ".join(map(repr, WORDS)) + ", position numbers, or a mask"
    if not isinstance(given, str | Sequence | Tensor):
        raise SettingError(f"positions={given!r}", f"a {type(given).__name__}", fix)
    numbers = given.tolist() if isinstance(given, Tensor) and given.ndim == 1 else given
    listed = not isinstance(numbers, str | Tensor)
    if listed and any(isinstance(p, bool) or not isinstance(p, int) for p in numbers):
        raise SettingError(f"positions={given!r}", "something else than whole numbers", fix)


def _check_own_positions(vector: SteeringVector, positions: Positions) -> None:
    own = next((name for name, table in vector.tensors.items() if table.axes[0] == "pos"), None)
    if own is not None and not (isinstance(positions, str) and positions == "all"):
        found = f"a vector that has its own positions, at {own}"
        raise SettingError(f"positions={positions!r}", found, "leave positions out")


def _fitting(vector: SteeringVector, model: HookedModel) -> Mapping[str, Tensor]:
    sites = set(model.sites())
    for name, table in vector.tensors.items():
        if name not in sites:
            found = f"{model.info.name!r} has no such site"
            raise MismatchError(f"steering at {name}", found, "apply the vector to the model that it was made for")
        sizes = model.info.sizes_at(parse(name)[0])
        wanted = tuple(sizes.get(axis, size) for axis, size in zip(table.axes, table.shape, strict=True))
        if wanted != tuple(table.shape):
            raise MismatchError(
                f"a direction of shape {list(table.shape)} at {name}",
                f"{model.info.name!r} has {list(wanted)} there",
                "apply the vector to the model that it was made for",
            )
    return {name: table.values for name, table in vector.tensors.items()}
