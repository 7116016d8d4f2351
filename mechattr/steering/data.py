"""Contrastive data: pairs of texts, and the activations that builders make vectors from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechattr.errors import SettingError, nearest
from mechattr.models.base import Batch, HookedModel
from mechattr.sites import Node, expand, full_name, parse, site_spec
from mechattr.steering.numbers import check_count

POSITIONS = ("last", "mean")
Sites = str | Sequence[str | Node] | None


@dataclass(frozen=True, eq=False, slots=True)
class Sides:
    """The activations of some pairs at one site, one vector a side.

    Attributes:
        site: its full name.
        positive, negative: of each pair, in float32 or wider, flattened over heads.
    """

    site: str
    positive: Float[Tensor, "pair d"]
    negative: Float[Tensor, "pair d"]

    @property
    def difference(self) -> Float[Tensor, "pair d"]:
        """Positive minus negative."""
        return self.positive - self.negative


def check_pairs(pairs: Any) -> list[tuple[str, str]]:
    """Pairs of texts (positive, negative).

    Raises:
        SettingError: no pairs, something else than two texts, an empty text, or a pair of equal texts.
    """
    given = list(pairs) if isinstance(pairs, Iterable) and not isinstance(pairs, str) else []
    if not given:
        raise SettingError("pairs", "none", "give (positive text, negative text) pairs")
    for i, pair in enumerate(given):
        two = isinstance(pair, Sequence) and not isinstance(pair, str) and len(pair) == 2
        if not two or not all(isinstance(text, str) and text for text in pair):
            raise SettingError(f"pair {i}", f"{pair!r:.80}", "give two texts that are not empty: (positive, negative)")
        if pair[0] == pair[1]:
            raise SettingError(f"pair {i}", f"two equal texts: {pair[0]!r:.60}", "texts must differ in the behaviour")
    return [(pair[0], pair[1]) for pair in given]


def chosen_sites(model: HookedModel, layers: Sequence[int] | None, sites: Sites) -> list[str]:
    """Full site names: `resid_post` of some layers, or sites by name or of nodes.

    Raises:
        SettingError: both or neither, a layer that does not exist, or a site whose vectors cannot be added to.
        UnknownSiteError: a site that the model does not have.
    """
    if (layers is None) == (sites is None):
        raise SettingError(
            "where to steer", "neither" if layers is None else "layers and sites", "give layers= or sites=, not both"
        )
    if layers is not None:
        n = model.info.n_layers
        given = list(layers) if isinstance(layers, Iterable) else [layers]
        wrong = [x for x in given if isinstance(x, bool) or not isinstance(x, Integral) or x not in range(n)]
        if wrong or not given:
            found = f"a model with layers 0 to {n - 1}"
            raise SettingError(f"layers={given}", found, "name existing layers")
        return [full_name("resid_post", layer) for layer in dict.fromkeys(given)]
    asked: list[Any] = [sites] if isinstance(sites, str) or not isinstance(sites, Iterable) else list(sites)
    if not asked:
        raise SettingError("where to steer", "no sites", "name at least one")
    if any(not isinstance(x, str | Node) for x in asked) or isinstance(sites, Node):
        raise SettingError(f"sites={sites!r:.60}", "no list of sites", "give a name, or a list of names or nodes")
    names = expand([full_name(x.site, x.layer) if isinstance(x, Node) else x for x in asked], model.sites())
    for name in names:
        axes = site_spec(name).axes
        if axes[:2] != ("batch", "pos") or len(axes) < 3:
            found = f"axes {', '.join(axes)}"
            raise SettingError(
                f"steering at {name}", found, "use sites with a vector at each position, such as resid_post"
            )
    return names


def sides(
    model: HookedModel,
    pairs: Sequence[tuple[str, str]],
    sites: Sequence[str],
    *,
    positions: str | int = "last",
    batch_size: int = 16,
) -> Iterator[list[Sides]]:
    """The activations of pairs, some pairs at a time, at every site.

    Args:
        model: a hooked model.
        pairs: (positive, negative) texts.
        sites: full names.
        positions: `"last"` token, the `"mean"` over all tokens, or one position (negative: from the end).
        batch_size: pairs of one forward pass.

    Raises:
        SettingError: no such positions, or one that a text does not have; a pair of the same tokens; no batch.

    Cost:
        2 forward passes a pair.
    """
    check_count("batch_size", batch_size)
    for begin in range(0, len(pairs), batch_size):
        part = pairs[begin : begin + batch_size]
        batch = model.tokenize([text for side in range(2) for text in (pair[side] for pair in part)])
        n = len(part)
        tokens = batch.tokens.masked_fill(~batch.mask, -1)
        equal = (tokens[:n] == tokens[n:]).all(1)
        if bool(equal.any()):
            pair = f"pair {begin + int(equal.nonzero()[0])}"
            raise SettingError(pair, "two texts of the same tokens", "texts must differ to the model")
        cache = model.run(batch, record=sites).activations
        found = []
        for site in sites:
            both = picked(cache[site].values, batch, positions).flatten(1)
            found.append(Sides(site, *both.split(n)))
        yield found


def collected(
    model: HookedModel, pairs: Any, sites: Sequence[str], positions: str | int, batch_size: int
) -> dict[str, Sides]:
    """The activations of all pairs by site, on the CPU; see `sides`."""
    parts = sides(model, check_pairs(pairs), sites, positions=positions, batch_size=batch_size)
    return {
        site: Sides(site, torch.cat([p.positive.cpu() for p in part]), torch.cat([p.negative.cpu() for p in part]))
        for site, part in zip(sites, zip(*parts, strict=True), strict=True)
    }


def nodes_of(sites: Sites) -> list[Node]:
    """The nodes among sites."""
    return [] if sites is None or isinstance(sites, str) else [node for node in sites if isinstance(node, Node)]


def shape_at(model: HookedModel, site: str) -> tuple[int, ...]:
    """The shape of a direction at a site."""
    sizes = model.info.sizes_at(parse(site)[0])
    return tuple(sizes[axis] for axis in site_spec(site).axes[2:])


def check_positions(positions: str | int, words: Sequence[str] = POSITIONS) -> None:
    """Whether `positions` names a place at which builders read.

    Raises:
        SettingError: it does not.
    """
    if isinstance(positions, bool) or (not isinstance(positions, int) and positions not in words):
        raise SettingError(f"positions={positions!r}", "no such place", nearest(str(positions), words))


def picked(
    x: Float[Tensor, "row pos ..."], batch: Batch, positions: str | int | Int[Tensor, " row"]
) -> Float[Tensor, "row ..."]:
    """The activations at the last token, at one position or one a row, or their mean over all tokens, in float32 or
    wider.

    Raises:
        SettingError: no such positions, or one that a row does not have.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    rows = torch.arange(len(x), device=x.device)
    if isinstance(positions, Tensor):
        return x[rows, batch.columns(0) + positions]
    check_positions(positions)
    if positions == "mean":
        mask = batch.mask.reshape(*batch.mask.shape, *([1] * (x.ndim - 2)))
        counts = batch.lengths.reshape(-1, *([1] * (x.ndim - 2)))
        return x.masked_fill(~mask, 0).sum(1) / counts
    columns = batch.columns(-1 if positions == "last" else int(positions))
    return x[rows, columns]
