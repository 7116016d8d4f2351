"""What takes the place of a node that is ablated: zeros, means by place, or the values of another prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechattr.errors import AlignmentError
from mechattr.models.base import Batch, HookedModel
from mechattr.patching.interventions import PAIRS_AT_ONCE, Index, Interventions
from mechattr.patching.places import Places, by_place, chunks, feature_of
from mechattr.patching.recording import recorded
from mechattr.patching.source import shape_of
from mechattr.sites import SITES, of_rows, parse, reads_source
from mechattr.tasks.task import Task


@dataclass(frozen=True, eq=False, slots=True)
class Zeros:
    """Zeros in the shape of activations, without their memory."""

    model: HookedModel
    task: Task
    names: tuple[str, ...]

    def rows(self, pairs: Sequence[int]) -> tuple[dict[str, Tensor], Tensor | None]:
        clean = self.task.clean
        columns = clean.tokens.shape[1], clean.prompt.tokens.shape[1]
        shapes = {name: shape_of(name, self.model.info, len(pairs), *columns) for name in self.names}
        return {name: torch.zeros((), device=clean.device).expand(shape) for name, shape in shapes.items()}, None


@dataclass(frozen=True, eq=False, slots=True)
class Means:
    """Means over the real tokens of each place: [place, ...] by full name, the same for every pair."""

    values: dict[str, Tensor]

    def rows(self, _pairs: Sequence[int]) -> tuple[dict[str, Tensor], Tensor | None]:
        return self.values, None

    @classmethod
    def of(cls, model: HookedModel, task: Task, places: Places, names: Sequence[str], rows: int) -> Means:
        """Runs the clean prompts; adds differences from one token, so that equal values have exactly that mean."""
        first: dict[str, Tensor] = {}
        total: dict[str, Tensor] = {}
        dtypes = {}
        for part in chunks(len(task), min(rows, PAIRS_AT_ONCE)):
            found, _ = recorded(model, task.clean.rows(part), tuple(dict.fromkeys(names)))
            for name in dict.fromkeys(names):
                where = places.at(name).where[list(part)]
                pair, place, column = where.nonzero(as_tuple=True)
                x = found[name]
                dtypes[name] = x.dtype
                wide = x.to(torch.promote_types(x.dtype, torch.float32))
                if name not in first:
                    first[name] = wide[0, where[0].int().argmax(1)]
                    total[name] = torch.zeros_like(first[name])
                total[name] += by_place(wide[pair, column] - first[name][place], place, where.shape[1])
        values = {}
        for name, start in first.items():
            tokens = places.at(name).where.sum((0, 2))
            count = tokens.to(start.dtype).reshape(-1, *[1] * (start.ndim - 1))
            values[name] = (start + total[name] / count).to(dtypes[name])
        return cls(values)


class ByPlace(Interventions):
    """Interventions with one value a place, for all its tokens."""

    def changed(self, name: str, here: Float[Tensor, "pair ..."]) -> Bool[Tensor, "pair place ..."]:
        where = self.now.places.at(name).where
        pair, place, column = where.nonzero(as_tuple=True)
        differs = here[pair, column] != self.now.source[name][place]
        feature = feature_of(parse(name)[0])
        inside = differs.reshape(len(pair), *(() if feature is None else (differs.shape[1],)), -1).any(-1)
        counts = torch.zeros(*where.shape[:2], *inside.shape[1:], device=here.device)
        return counts.index_put_((pair, place), inside.float(), accumulate=True) != 0

    def replacement(self, name: str, index: Index, place: Int[Tensor, " entry"]) -> Tensor:
        return self.now.source[name][(place, *index[2:])]


@dataclass(frozen=True, eq=False, slots=True)
class Others:
    """Activations on other prompts, each moved to the column of the token whose place it takes.

    Attributes:
        batch: the other prompt of each pair.
        columns: for each pair and column of the task, the column of the other prompt; of the decoder's columns and of
            the source's, as far as nodes are there.
        names: the full names that are needed.
    """

    model: HookedModel
    batch: Batch
    columns: dict[bool, Int[Tensor, "pair column"]]
    names: tuple[str, ...]

    @classmethod
    def of(
        cls,
        model: HookedModel,
        task: Task,
        other: Task,
        places: Places,
        other_places: Places,
        chosen: Sequence[int],
        names: Sequence[str],
    ) -> Others:
        """Pairs the tokens of each place with those of the same place of the other prompt.

        Raises:
            AlignmentError: a place has more tokens in one of them, tokens of several places would have several
                partners, or attention rows have other keys.
        """
        batch = other.clean.rows(chosen)
        sides = {_side(name): name for name in names}
        found = {side: _partners(places.at(x), other_places.at(x), chosen) for side, x in sides.items()}
        rows = [name for name in names if of_rows(SITES[parse(name)[0]].axes)]
        masks = ((batch.mask, task.clean.mask), (batch.prompt.mask, task.clean.prompt.mask))
        if rows and not (all(torch.equal(*pair) for pair in masks) and all(map(_in_place, found.values()))):
            raise _misfit(f"{rows[0]} has rows over other keys")
        return cls(model, batch, {side: columns.clamp(min=0) for side, columns in found.items()}, tuple(names))

    def rows(self, pairs: Sequence[int]) -> tuple[dict[str, Tensor], Tensor | None]:
        found, _ = recorded(self.model, self.batch.rows(pairs), self.names)
        values = {}
        for name in self.names:
            columns = self.columns[_side(name)][list(pairs)]
            pair = torch.arange(len(columns), device=columns.device)[:, None]
            values[name] = found[name] if of_rows(SITES[parse(name)[0]].axes) else found[name][pair, columns]
        return values, None


def _side(name: str) -> bool:
    """Whether positions of a site are those of the source."""
    return reads_source(SITES[parse(name)[0]].axes)


def _in_place(columns: Int[Tensor, "pair column"]) -> bool:
    own = torch.arange(columns.shape[1], device=columns.device)
    return bool(((columns == own) | (columns == -1)).all())


def _partners(places: Places, others: Places, chosen: Sequence[int]) -> Int[Tensor, "pair column"]:
    """For each column that belongs to a place, the column of the other prompt; -1 elsewhere.

    Raises:
        AlignmentError: as `Others.of`.
    """
    there = others.where[list(chosen)]
    sizes, away = places.where.sum(2), there.sum(2)
    if not torch.equal(sizes, away):
        pair, place = (sizes != away).nonzero()[0].tolist()
        label = f"span {places.labels[place]!r}" if places.labels else "the prompt"
        here, more = int(sizes[pair, place]), int(away[pair, place])
        raise _misfit(f"{label} has {here} tokens in pair {pair} and {more} in the one it takes values from")
    columns = torch.full_like(places.where[:, 0], -1, dtype=torch.long)
    for place in range(places.where.shape[1]):
        pairs, column = places.where[:, place].nonzero(as_tuple=True)
        partner = there[:, place].nonzero(as_tuple=True)[1]
        before = columns[pairs, column]
        if bool(((before != -1) & (before != partner)).any()):
            raise _misfit(f"span {places.labels[place]!r} overlaps with others differently")
        columns[pairs, column] = partner
    return columns


def _misfit(found: str) -> AlignmentError:
    return AlignmentError(
        "kind='resample'",
        found,
        "use prompts of one layout, positions='named' with spans of equal length, or kind='mean'",
    )
