"""Artifacts: the cache of activations, the attribution of an effect to components, and opening one of any kind."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, NamedTuple, Self, cast

import torch
from torch import Tensor

from mechattr import storage
from mechattr.base import Artifact
from mechattr.errors import ArtifactError, AxisError, SettingError, UnknownNameError, UnknownSiteError, nearest
from mechattr.kinds import KINDS
from mechattr.labelled import Labelled
from mechattr.provenance import JSON
from mechattr.ranking import FIELDS, is_node_table, largest, node_columns, node_vector
from mechattr.sites import SITES, Node, full_name, parse, site_spec

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes


_MEASURES = ("score", "signed", "contribution", "abs_signed")
_RANKINGS = ("score", "contribution", "abs_signed")
_SIGNS = {"noising": -1.0, "denoising": 1.0}  # contribution = sign * signed
_SHOWN = 20  # rows of a table in a notebook


def open(path: str | os.PathLike[str], *, lazy: bool = False) -> Artifact:
    """Opens an artifact of any kind.

    Args:
        path: a file, or a folder of shards.
        lazy: read a tensor from disk each time it is asked for, instead of all of them now; meant for large caches.

    Raises:
        ArtifactError: damaged, truncated, foreign, of a newer format or of an unknown kind.
    """
    stored = storage.open(path)
    if stored.kind not in KINDS:
        raise ArtifactError(f"to open {path}", f"kind {stored.kind!r}", nearest(stored.kind, KINDS))
    module, name = KINDS[stored.kind].split(":")
    kind: type[Artifact] = getattr(importlib.import_module(module), name)
    return kind.from_stored(stored, lazy=lazy)


class Cache(Artifact, Mapping[str, Labelled]):
    """Activations or gradients by site: a read-only mapping from full site name to tensor; holds no model.

    `cache["blocks.3.attn.hook_z"]` and `cache["z", 3]` are one tensor. `cache["z"]` stacks (and so copies) that site
    over the layers present, axis `layer` first, with the layer numbers as coordinates.

    Raises:
        UnknownSiteError: a key that is not a full site name.
    """

    kind = "cache"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.tensors:
            parse(name)

    @classmethod
    def from_tensors(
        cls,
        tensors: Mapping[str, Tensor],
        *,
        settings: Mapping[str, JSON] | None = None,
        provenance: Mapping[str, JSON] | None = None,
    ) -> Self:
        """Labels plain tensors by full site name with the axes of the site table.

        Raises:
            UnknownSiteError: a key that is not a full site name.
            AxisError: a tensor with another number of dimensions than its site.
        """
        labelled = {name: Labelled(tensor, SITES[parse(name)[0]].axes) for name, tensor in tensors.items()}
        return cls(labelled, settings=settings or {}, provenance=provenance or {})

    def layers(self, short: str) -> tuple[int, ...]:
        """The layers in which a site was recorded, ascending.

        Raises:
            UnknownSiteError: not a short site name.
        """
        site_spec(short)
        found = (parse(name) for name in self.tensors)
        return tuple(sorted(layer for site, layer in found if site == short and layer is not None))

    def __getitem__(self, key: str | tuple[str, int | None]) -> Labelled:
        name = full_name(*key) if isinstance(key, tuple) else key
        if name in self.tensors:
            return self.tensors[name]
        if name in SITES and not SITES[name].layered and full_name(name) in self.tensors:
            return self.tensors[full_name(name)]
        if name in SITES and self.layers(name):
            return self._stacked(name)
        site_spec(name)
        recorded = dict.fromkeys(parse(full)[0] for full in self.tensors)
        raise UnknownSiteError(
            f"site {key!r} in a cache",
            f"recorded sites: {', '.join(recorded) or 'none'}",
            "record this site too; " + nearest(name, self.tensors if "hook_" in name else recorded),
        )

    def _stacked(self, short: str) -> Labelled:
        layers = self.layers(short)
        parts = [self.tensors[full_name(short, layer)] for layer in layers]
        for part in parts[1:]:
            parts[0].check_aligned(part)
        coords = {**parts[0].explicit_coords, "layer": layers}
        return Labelled(torch.stack([part.values for part in parts]), ("layer", *parts[0].axes), coords)

    def __contains__(self, key: object) -> bool:
        if isinstance(key, tuple):
            return any(parse(name) == key for name in self.tensors)
        return key in self.tensors or any(parse(name)[0] == key for name in self.tensors)

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


class Passes(NamedTuple):
    """Cost in passes over one prompt; a pass through some of the blocks counts as their share."""

    forward: float
    backward: float


class Attribution(Artifact):
    """Scores of components.

    `tensors` holds `score/SITE` (mean over pairs of |effect|) and, where the method has it, `signed/SITE` (mean
    effect), with axes among `layer`, `pos`, and `head`, `kv_head` or `neuron`. NaN means not measured. Some methods add
    `tokens`, `components` or `ledger`.

    Raises:
        AxisError: signed values with other axes or coordinates than their scores.
        SettingError: `settings["direction"]` is neither noising nor denoising, or settings are not JSON.
    """

    kind = "attribution"

    def __post_init__(self) -> None:
        super().__post_init__()
        direction = self.settings.get("direction")
        if direction is not None and direction not in _SIGNS:
            raise SettingError("settings['direction']", repr(direction), "use 'noising' or 'denoising'")
        for site, signed in self.signed.items():
            if site not in self.scores:
                raise AxisError(f"signed values of {site!r}", "no scores of this site", f"add 'score/{site}'")
            self.scores[site].check_aligned(signed)

    def _group(self, prefix: str) -> dict[str, Labelled]:
        names = (name for name in self.tensors if name.startswith(prefix))
        return {name.removeprefix(prefix): self.tensors[name] for name in names}

    @property
    def scores(self) -> dict[str, Labelled]:
        """Mean over pairs of |effect|, by site."""
        return self._group("score/")

    @property
    def signed(self) -> dict[str, Labelled]:
        """Mean effect over pairs, by site."""
        return self._group("signed/")

    @property
    def contribution(self) -> dict[str, Labelled]:
        """Metric lost by noising, by site: `-signed` under noising, `+signed` under denoising.

        Raises:
            SettingError: the settings name no direction.
        """
        direction = self.settings.get("direction")
        if direction is None:
            raise SettingError("contribution", "settings without 'direction'", "use .signed instead")
        # 0.0 - x and not -x: an effect of zero stays +0
        return {site: 0.0 - x if direction == "noising" else x for site, x in self.signed.items()}

    @property
    def passes(self) -> Passes:
        """What the result cost, in prompt rows."""
        passes = self.settings.get("passes")
        if not isinstance(passes, dict) or passes.keys() != {"forward", "backward"}:
            raise SettingError("passes", f"settings['passes'] = {passes!r}", "use a method that counts its passes")
        return Passes(**cast(dict[str, float], passes))

    @property
    def tokens(self) -> Labelled:
        """Attribution of input tokens, where the method gives it."""
        return self._extra("tokens")

    @property
    def components(self) -> Labelled:
        """Attribution of named components, where the method gives it."""
        return self._extra("components")

    @property
    def ledger(self) -> Labelled:
        """Where the explained quantity went, where the method keeps account."""
        return self._extra("ledger")

    def _extra(self, name: str) -> Labelled:
        if name not in self.tensors:
            found = f"method {self.settings.get('method')!r} with {', '.join(self.tensors) or 'no tensors'}"
            raise UnknownNameError(f"{name!r} of an attribution", found, "use a method that gives it")
        return self.tensors[name]

    def _measure(self, which: str, allowed: Sequence[str]) -> dict[str, Labelled]:
        if which not in allowed:
            raise UnknownNameError(f"measure {which!r}", "no such measure", nearest(which, allowed))
        if which == "score":
            return self.scores
        lacking = self.scores.keys() - self.signed.keys()
        if lacking:
            raise UnknownNameError(f"measure {which!r}", f"no signed values of {sorted(lacking)}", "use 'score'")
        if which == "contribution":
            return self.contribution
        return {site: abs(signed) if which == "abs_signed" else signed for site, signed in self.signed.items()}

    def top(self, k: int, by: str = "score") -> list[Node]:
        """The k largest nodes, largest first; ties in node order, nodes that were not measured left out.

        Args:
            k: how many; fewer come back when fewer were measured.
            by: `"score"`, `"contribution"` or `"abs_signed"`.

        Raises:
            SettingError: k is not a count.
            UnknownNameError: no such measure, or a site lacks it.
            AxisError: scores of something that is not a node, such as a pair of positions.
        """
        if isinstance(k, bool) or not isinstance(k, int) or k < 0:
            raise SettingError(f"top(k={k!r})", type(k).__name__, "give a whole number from 0")
        values = self._measure(by, _RANKINGS)
        return _nodes(node_columns(values, largest(node_vector(values), k)))

    def nodes(self) -> list[Node]:
        """All measured nodes in node order."""
        scores = self._measure("score", _MEASURES)
        places = torch.nonzero(~node_vector(scores).isnan()).squeeze(1)
        return _nodes(node_columns(scores, places))

    def value(self, node: Node, which: str = "score") -> float:
        """One node's `"score"`, `"signed"`, `"contribution"` or `"abs_signed"`; NaN if it was not measured.

        Raises:
            AxisError: the node lacks a coordinate, or has one that the scores do not have.
            UnknownSiteError: no scores of this site.
        """
        values = self._measure(which, _MEASURES)
        if node.site not in values:
            raise UnknownSiteError(f"{which} of {node}", f"scores of {', '.join(values)}", nearest(node.site, values))
        axis_of = {FIELDS.get(axis, axis): axis for axis in values[node.site].axes}
        where = {axis_of.get(name, name): getattr(node, name) for name in dict.fromkeys(FIELDS.values())}
        picked = values[node.site].sel(**{axis: value for axis, value in where.items() if value is not None})
        if picked.axes:
            raise AxisError(f"{which} of {node!r}", f"scores with axes {picked.axes} left", "give the node all of them")
        return float(picked.item())

    def to_pandas(self) -> pd.DataFrame:
        """All measured nodes, largest score first.

        Columns: site, layer, pos, head (kv head for k and v), neuron (or latent, or expert), score, signed,
        contribution. Where a node has no such coordinate the entry is `<NA>`, and where the method has no such measure
        NaN.

        Raises:
            AxisError: scores of something that is not a node.
        """
        return self._frame(None)

    def _frame(self, k: int | None) -> pd.DataFrame:
        import pandas as pd

        vector = node_vector(self.scores)
        places = largest(vector, len(vector) if k is None else k)
        explicit = [item for score in self.scores.values() for item in score.explicit_coords.items()]
        words = {"site", *(FIELDS[axis] for axis, coords in explicit if any(isinstance(x, str) for x in coords))}
        columns = {
            name: pd.Series(column, dtype=object if name in words else "Int64")
            for name, column in node_columns(self.scores, places).items()
        }
        contribution = self.contribution if "direction" in self.settings else {}
        blank = {site: score * float("nan") for site, score in self.scores.items()}
        for name, values in (("score", self.scores), ("signed", self.signed), ("contribution", contribution)):
            columns[name] = pd.Series(node_vector({**blank, **values})[places].numpy())
        return pd.DataFrame(columns)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draws the scores; see `mechattr.draw.attribution`."""
        from mechattr import draw

        return draw.attribution(self, ax=ax)

    def _repr_html_(self) -> str:
        if not self.scores or not all(map(is_node_table, self.scores.values())):
            return super()._repr_html_()
        line = f"method {self.settings.get('method')}, {self.settings.get('n_pairs')} pairs"
        if "passes" in self.settings:
            line += f", {self.passes.forward:g} forward and {self.passes.backward:g} backward passes"
        table = self._frame(_SHOWN).to_html(index=False, escape=True, na_rep="", float_format="{:.4g}".format)
        return f"<div>{escape(line)}</div>{table}"


def _nodes(columns: Mapping[str, Iterable[object]]) -> list[Node]:
    return [Node(*row) for row in zip(*columns.values(), strict=True)]
