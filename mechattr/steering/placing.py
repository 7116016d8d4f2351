"""Putting moves where they should act: every run and generation inside a `with` block, on any kind of model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mechattr import storage
from mechattr.errors import NonFiniteError, SettingError, nearest
from mechattr.models.base import Batch, HookedModel
from mechattr.models.edits import Edit
from mechattr.models.operators import Place
from mechattr.models.standing import StandingEdits
from mechattr.steering.gates import Decision, Given, Rows, check_gate, decided, digest_of, sites_read

WORDS = {"all": None, "prompt": "prompt", "generated": "generated", "last": [-1]}
Positions = str | Sequence[int] | Tensor
Multiplier = float | Sequence[float] | Tensor
# x [rows, positions, *axes of the site] and multiplier [rows, 1, 1], in float32 or wider -> x
Motion = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False, slots=True)
class Move:
    """What is done at one site.

    Attributes:
        site: its full name.
        motion: what is done to the selected rows and positions.
        position: the only position of a prompt at which it acts, where it says so itself.
    """

    site: str
    motion: Motion
    position: int | None = None


@contextmanager
def placed(
    model: Any,
    hooked: HookedModel,
    moves: Sequence[Move],
    multiplier: Multiplier,
    positions: Positions,
    gate: Given | None,
    digest: str,
) -> Iterator[Any]:
    """Moves a model's activations inside a `with` block; blocks nest, and nothing stays behind, whatever is raised.

    Args:
        model: a hooked model, or a transformers model, whose own `forward` and `generate` are then steered.
        hooked: what `hooked_model` has for it.
        moves: what is done, and where.
        multiplier: a number, or one for each row of what is run inside.
        positions: as `mechattr.steering.apply` has them, for moves without a position of their own.
        gate: which rows are steered; see `mechattr.steering.apply`.
        digest: what tells these moves from others, in the fingerprint of results that are made inside.

    Raises:
        SettingError: no such positions, a multiplier that is not finite, or one for another number of rows; a gate that
            reads a site behind one that is steered.
        MismatchError, UnsupportedFeatureError: a gate that reads what this model does not have or keep.
        NonFiniteError: inside the block, where a move makes NaN or infinity, with site and multiplier.
    """
    factors = _multiplier(multiplier)
    _check_positions(positions)
    own = next((move for move in moves if move.position is not None), None)
    if own is not None and not (isinstance(positions, str) and positions == "all"):
        found = f"a vector that has its own positions, at {own.site}"
        raise SettingError(f"positions={positions!r}", found, "leave positions out")

    sites = tuple(dict.fromkeys(move.site for move in moves))
    read: tuple[str, ...] = ()
    if gate is not None:
        check_gate(gate, hooked, sites)
        read = sites_read(gate)

    def edits(batch: Batch) -> list[Edit]:
        if factors.ndim and len(factors) != len(batch):
            found = f"a batch of {len(batch)} rows"
            raise SettingError(f"{len(factors)} multipliers", found, "give a number, or one multiplier for each row")
        opened = None if gate is None else decided(gate, batch)
        acts = opened.edits() if isinstance(opened, Decision) else []
        for move in moves:
            op = Steer(move.motion, factors, opened)
            if move.position is None:
                acts += _edits(move.site, op, positions, batch)
                continue
            rows = (batch.lengths > move.position).nonzero()[:, 0].tolist()
            acts += [Edit(move.site, op, positions=[move.position], rows=rows)] * bool(rows)
        return acts

    # a tensor's text leaves out the middle of a long one
    where = storage.checksum(positions) if isinstance(positions, Tensor) else str(positions)
    text = " ".join([digest, str(factors.tolist()), where, digest_of(gate)])
    added = StandingEdits(edits, tuple(dict.fromkeys([*read, *sites])), text)
    given: Any = hooked
    if given is model:
        with given.standing(added):
            yield given
    else:
        from mechattr.models.attached import attached

        with attached(given, added):
            yield model


@dataclass(frozen=True, eq=False, slots=True)
class Steer:
    """The operator of an edit: moves the selected rows and positions.

    Attributes:
        motion: what is done.
        multiplier: a number, or one a row of the batch; beams of a row share it.
        gate: which rows of the batch are steered, or a decision to come; all without one.
    """

    motion: Motion
    multiplier: Tensor
    gate: Rows | Decision | None = None

    def __call__(self, x: Tensor, place: Place) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        factors = _of_rows(self.multiplier, place, len(x)) if self.multiplier.ndim else self.multiplier
        steered = self.motion(x.to(wide), factors.reshape(-1, 1, 1).to(x.device, wide))
        if not isinstance(steered, Tensor) or steered.shape != x.shape:
            found = f"shape {list(steered.shape)}" if isinstance(steered, Tensor) else f"a {type(steered).__name__}"
            raise SettingError(f"an operator at {place.site}", found, f"return a tensor of shape {list(x.shape)}")
        steered = steered.to(x.dtype)
        if self.gate is not None:
            rows = self.gate if isinstance(self.gate, Tensor) else self.gate()
            opened = _of_rows(rows, place, len(x)).reshape(-1, *[1] * (x.ndim - 1))
            steered = torch.where(opened.to(x.device), steered, x)
        if bool((x.isfinite() & ~steered.isfinite()).any()):
            found = f"NaN or infinity in {x.dtype}, with the multiplier {self._shown()}"
            raise NonFiniteError(f"steering at {place.site}", found, "use a smaller multiplier, or a wider dtype")
        return steered

    def _shown(self) -> str:
        factors = self.multiplier.tolist()
        return f"{factors:g}" if isinstance(factors, float) else ", ".join(f"{one:g}" for one in factors)


def hooked_model(model: Any) -> Any:
    """The hooked model that steers: itself, or one around a transformers model.

    Raises:
        SettingError: neither of them.
    """
    if isinstance(model, HookedModel):
        return model
    if hasattr(model, "config") and hasattr(model, "forward"):
        from mechattr.models.attached import hooked_around

        return hooked_around(model)
    raise SettingError("a model to steer", f"a {type(model).__name__}", "give a hooked model or a transformers model")


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
    if isinstance(positions, str):
        return [Edit(name, op, positions=WORDS[positions])]
    numbers = dict.fromkeys(torch.as_tensor(positions).tolist())
    if all(p >= 0 for p in numbers):
        return [Edit(name, op, positions=list(numbers))]
    rows: dict[tuple[int, ...], list[int]] = {}  # two numbers can be one position of a row, which moves once
    for row, n in enumerate(batch.lengths.tolist()):
        at = tuple(dict.fromkeys(p if p >= 0 else n + p for p in numbers if p >= -n))
        rows.setdefault(at, []).append(row)
    return [Edit(name, op, positions=at, rows=those) for at, those in rows.items() if at]


def _of_rows(values: Tensor, place: Place, n: int) -> Tensor:
    """What belongs to each of the n selected rows, of values [row of the batch], which beams share."""
    copies = place.shape[0] // len(values)
    rows = torch.arange(n) if place.whole else place.index[0].flatten().cpu()
    return values[rows // copies]


def _multiplier(given: Multiplier) -> Tensor:
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
    if isinstance(given, str) or (isinstance(given, Tensor) and given.ndim == 2 and given.dtype == torch.bool):
        return
    numbers = given.tolist() if isinstance(given, Tensor) else given
    if not isinstance(numbers, Sequence) or any(isinstance(p, bool) or not isinstance(p, int) for p in numbers):
        raise SettingError(f"positions={given!r:.80}", "something else than whole numbers", fix)
    if not numbers:
        raise SettingError(f"positions={given!r:.80}", "no position", fix)
