"""Nodes in tensors: which sites can be scored, which positions are comparable, which run is patched into which."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechattr.errors import (
    AlignmentError,
    EmptyTaskError,
    SettingError,
    UnknownNameError,
    UnknownSiteError,
    UnsupportedFeatureError,
    nearest,
)
from mechattr.models.base import Batch, HookedModel
from mechattr.sites import SITES, expand, of_rows, parse, reads_source, site_spec
from mechattr.tasks.task import Task

Direction = Literal["noising", "denoising"]
Positions = Literal["aligned", "named", "all"]
DIRECTIONS = ("noising", "denoising")
DEFAULT_SITES = ("q", "k", "v", "z", "mlp_post")
EXPERT_SITES = ("q", "k", "v", "z", "mlp_out")  # a mixture of experts has no neurons that every token passes

# Replacing a whole vector before or after a map that acts on that vector alone is one intervention, so q and k are
# taken where attention uses them: an estimate then need not linearise rotary embedding and norms.
NEURONS = ("neuron", "latent", "expert")  # axes whose entries `Node.neuron` numbers
TAKEN_AT = {"q": "rot_q", "k": "rot_k"}


@dataclass(frozen=True, slots=True)
class Places:
    """Positions that mean the same in every pair.

    Attributes:
        labels: their coordinates on the axis `pos`: position numbers or span names; empty where all are merged.
        where: true at the columns of each pair that belong to each place.
        source: the places of what an encoder reads, where sites of it were asked for.
        identity: whether place i is column i in every pair.
    """

    labels: tuple[int | str, ...]
    where: Bool[Tensor, "pair place column"]
    source: Places | None = None
    identity: bool = field(init=False)

    def __post_init__(self) -> None:
        eye = torch.eye(*self.where.shape[1:], dtype=torch.bool, device=self.where.device)
        object.__setattr__(self, "identity", eye.shape[0] == eye.shape[1] and bool((self.where == eye).all()))

    @property
    def merged(self) -> bool:
        """Whether all positions of a prompt are one node."""
        return not self.labels

    def rows(self, index: Sequence[int]) -> Places:
        """The same places of some pairs."""
        source = None if self.source is None else self.source.rows(index)
        return Places(self.labels, self.where[list(index)], source)

    def at(self, site: str) -> Places:
        """The places of a site, by its short or full name: those of the source where its positions are."""
        if not reads_source(site_spec(site).axes):
            return self
        assert self.source is not None  # they are asked for with the sites
        return self.source

    def gather(self, x: Float[Tensor, "pair column ..."]) -> Float[Tensor, "pair place ..."]:
        """Sums the columns of each place."""
        if self.identity:
            return x
        outside = ~self.where.any(1).reshape(*x.shape[:2], *[1] * (x.ndim - 2))
        x = x.masked_fill(outside, 0)  # padding may hold anything, NaN too
        return torch.einsum("btc,bc...->bt...", self.where.to(x.dtype), x)


def by_place(x: Float[Tensor, "token ..."], place: Int[Tensor, " token"], places: int) -> Float[Tensor, "place ..."]:
    """Sums tokens by place, in a fixed order: adding at indices has none on accelerators."""
    return torch.einsum("tp,t...->p...", torch.nn.functional.one_hot(place, places).to(x.dtype), x)


SOURCES_TOO = "use activation_patching, attribution_patching or ablation"


def check_call(what: str, model: HookedModel, task: Task, *, sources: bool = False, instead: str = SOURCES_TOO) -> None:
    """Checks what every method is given; `sources`: the method holds for encoder-decoder models, `instead`: what else
    to do with them.

    Raises:
        SettingError: something else than a hooked model and a task.
        EmptyTaskError: no pairs.
        UnsupportedFeatureError: an encoder-decoder model, whose cross-attention the method does not know.
    """
    if not isinstance(model, HookedModel):
        fix = "give a hooked model, such as ma.load(model)"
        raise SettingError(f"the model of {what}", f"a {type(model).__name__}", fix)
    if not isinstance(task, Task):
        fix = "give a task, such as ma.tasks.from_pairs(model, pairs)"
        raise SettingError(f"the task of {what}", f"a {type(task).__name__}", fix)
    if not len(task):
        raise EmptyTaskError(what, "a task without pairs", "give at least one pair")
    if model.info.n_encoder_layers and not sources:
        found = "an encoder-decoder model, whose cross-attention reads and writes as well"
        raise UnsupportedFeatureError(what, found, instead)


def mode_of(task: Task, positions: Positions | None, sites: Sequence[str] = ()) -> Positions:
    """What positions mean for a task: as asked, or by default what its pairs have in common at some sites.

    The default is every position where all pairs align, else the spans that the task names in every pair. Prompts that
    share nothing but their end give no default: then the caller has to choose.

    Raises:
        AlignmentError: no default.
    """
    if positions is not None:
        return positions
    if sites and all(reads_source(SITES[short].axes) for short in sites):
        return "aligned"  # a source has no spans
    shared = set.intersection(*(set(spans) for spans in task.spans)) if task.spans else set()
    if not task.aligned and shared - {"END"}:
        return "named"
    task.positions("aligned")  # says what does not align, and what to choose
    return "aligned"


def places_of(task: Task, positions: Positions, sites: Sequence[str] = ()) -> Places:
    """The comparable positions of a task.

    Args:
        task: prompt pairs.
        positions: `"aligned"` (every position), `"named"` (the task's spans) or `"all"` (merged).
        sites: short names; where all of them are at positions of a source, or some, its places are made, too.

    Raises:
        AlignmentError: positions are not comparable across the pairs, or the two prompts of a pair are padded
            differently.
        UnknownNameError: another word for `positions`.
    """
    sides = [reads_source(SITES[short].axes) for short in sites]
    source = _places(task, positions, source=True) if any(sides) else None
    if source is not None and all(sides):
        return replace(source, source=source)
    own = _places(task, positions, source=False)
    return own if source is None else replace(own, source=source)


def _places(task: Task, positions: Positions, *, source: bool) -> Places:
    """The comparable positions of the prompts, or of what an encoder reads."""
    clean, corrupt = (task.clean.prompt, task.corrupt.prompt) if source else (task.clean, task.corrupt)
    if not torch.equal(clean.mask, corrupt.mask):
        raise AlignmentError(
            f"patching on task {task.name!r}",
            "clean and corrupt prompts with different lengths or padding",
            "build the task with ma.tasks.from_pairs, which checks each pair",
        )
    spans = task.positions(positions, source=source)
    columns = clean.positions
    masks = []
    for pairs in spans.values():
        low = torch.tensor([span[0] for span in pairs], device=columns.device)[:, None]
        high = torch.tensor([span[1] for span in pairs], device=columns.device)[:, None]
        masks.append((columns >= low) & (columns < high))
    labels: tuple[int | str, ...] = tuple(spans)
    if positions == "all":
        labels = ()
    elif positions == "aligned":
        labels = tuple(range(len(spans)))
    return Places(labels, torch.stack(masks, 1))


def node_sites(model: HookedModel, sites: str | Sequence[str] | None) -> tuple[str, ...]:
    """The short names to score, in the order given; those of every head and neuron unless given.

    Raises:
        UnknownSiteError: not a site, or not one of this model.
        SettingError: no names.
    """
    if sites is None:
        sites = EXPERT_SITES if model.info.n_experts else DEFAULT_SITES
    if not isinstance(sites, Iterable):
        fix = f"give short names, such as {', '.join(DEFAULT_SITES)}"
        raise SettingError("sites", f"a {type(sites).__name__}", fix)
    shorts: list[str] = []
    for name in [sites] if isinstance(sites, str) else sites:
        short = name if name in SITES else site_spec(name).short
        if short != name:
            raise UnknownSiteError(f"site {name!r}", "sites of a table are short names", f"use {short!r}")
        expand(short, model.sites())
        shorts.append(short)
    if not shorts:
        raise SettingError("sites", "an empty list", f"choose among {', '.join(DEFAULT_SITES)}, ...")
    return tuple(dict.fromkeys(shorts))


def taken_at(model: HookedModel, short: str) -> list[str]:
    """The full names at which a site's nodes are read and replaced."""
    return expand(TAKEN_AT.get(short, short), model.sites())


def feature_of(short: str) -> str | None:
    """The axis that tells the nodes of one place apart: `head`, `kv_head`, `neuron`, `latent`, `expert` or none."""
    return next((axis for axis in SITES[short].axes if axis in ("head", "kv_head", *NEURONS)), None)


def node_axes(short: str, merged: bool) -> tuple[str, ...]:
    """The axes of a site's scores."""
    feature = feature_of(short)
    return (
        *(("layer",) if SITES[short].layered else ()),
        *(() if merged else ("source" if reads_source(SITES[short].axes) else "pos",)),
        *(() if feature is None else (feature,)),
    )


def per_node(name: str, x: Tensor) -> Float[Tensor, "pair column ..."]:
    """Sums a tensor shaped like a site's activation over what is inside a node."""
    axes = SITES[parse(name)[0]].axes
    if of_rows(axes):  # a node is one query row of a head's pattern
        return x.sum(-1).transpose(1, 2)
    return x if axes[-1] in NEURONS or len(axes) == 2 else x.sum(-1)


def direction_of(direction: str) -> Direction:
    """Checks a direction."""
    if direction not in DIRECTIONS:
        raise UnknownNameError(f"direction {direction!r}", "no such direction", nearest(direction, DIRECTIONS))
    return cast(Direction, direction)


def base_and_source(task: Task, direction: Direction) -> tuple[Batch, Batch]:
    """The run that is intervened on, and the run that activations are taken from."""
    return (task.clean, task.corrupt) if direction == "noising" else (task.corrupt, task.clean)


def rows_at_once(batch_size: int | None, default: int) -> int:
    """Checks a batch size.

    Raises:
        SettingError: not a whole number from 1.
    """
    if batch_size is None:
        return default
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise SettingError(f"batch_size={batch_size!r}", "no number of rows", "give a whole number from 1, or None")
    return batch_size


def chunks(n: int, size: int) -> list[range]:
    """`range(n)` in consecutive parts."""
    return [range(i, min(i + size, n)) for i in range(0, n, size)]
