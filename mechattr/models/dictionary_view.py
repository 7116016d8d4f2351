"""A model with dictionaries: the same model, with more sites."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from mechattr.errors import SettingError
from mechattr.models.base import Batch
from mechattr.models.dictionary import Dictionary
from mechattr.sites import parse

if TYPE_CHECKING:
    from mechattr.models.running import Running

Model = TypeVar("Model", bound="Running")


def with_dictionaries(model: Model, dictionaries: Sequence[Dictionary]) -> Model:
    """See `Running.with_dictionaries`."""
    if isinstance(dictionaries, Dictionary) or not all(isinstance(d, Dictionary) for d in dictionaries):
        raise SettingError("dictionaries", f"{dictionaries!r:.60}", "give a list of Dictionary")
    if not dictionaries:
        raise SettingError("dictionaries", "an empty list", "give at least one")
    by_host = dict(model._dictionaries)
    for d in dictionaries:
        if d.host in by_host:
            raise SettingError(f"two dictionaries at {d.host}", "a host has one", "join them into one")
        by_host[d.host] = d
    sizes = dict(model.info.latents)
    for d, n in zip(dictionaries, _latents(model, dictionaries), strict=True):
        short = f"{d.site}_latents"
        if sizes.setdefault(short, n) != n:
            found = f"{n} latents at layer {d.layer} and {sizes[short]} at another"
            raise SettingError(f"dictionaries at {d.site}", found, "use one size for all layers of a site")
    added = {d.host: d for d in dictionaries}
    view = copy.copy(model)
    view.info = replace(model.info, latents=tuple(sorted(sizes.items())))
    view._sites = tuple(s for name in model.sites() for s in (*(added[name].sites if name in added else ()), name))
    view._dictionaries = MappingProxyType(by_host)
    return view


def _latents(model: Running, dictionaries: Sequence[Dictionary]) -> list[int]:
    """The number of latents of each, from what they make of a run of two tokens."""
    sites = model.sites()
    for d in dictionaries:
        for name in (d.host, d.read):
            if name not in sites:
                shorts = ", ".join(dict.fromkeys(parse(s)[0] for s in sites))
                found = f"{model.info.name!r} has {model.info.n_layers} layers with {shorts}"
                raise SettingError(f"a dictionary at {d.host} that reads {d.read}", found, "name sites of this model")
        if sites.index(d.read) > sites.index(d.host):
            found = f"{d.read} is computed after {d.host}"
            raise SettingError(f"a dictionary at {d.host}", found, "read something that comes before")
    names = {name for d in dictionaries for name in (d.host, d.read)}
    tokens = torch.arange(2, device=model.weight("embed.W_E").device)[None] % model.info.d_vocab
    source = Batch.of(tokens) if model.info.n_encoder_layers else None
    seen = model.run(replace(Batch.of(tokens), source=source), record=tuple(names)).activations
    return [_fits(d, seen[d.read].values, seen[d.host].values) for d in dictionaries]


def _fits(d: Dictionary, read: Tensor, held: Tensor) -> int:
    latents = _called(d, "encode", read, held, None)
    if not torch.equal(latents, _called(d, "encode", read, held, None)):
        found = "encode returned another value the second time"
        raise SettingError(f"the dictionary at {d.host}", found, "put it in eval mode, without noise")
    _called(d, "decode", latents, held, held.shape[2])
    return latents.shape[2]


def _called(d: Dictionary, what: str, x: Tensor, held: Tensor, width: int | None) -> Tensor:
    """What one of the two functions makes of x, checked to have the host's rows, columns, dtype and device."""
    asked = f"the dictionary {d.name!r} at {d.host}" if d.name else f"the dictionary at {d.host}"
    given = f"{what} of {x.dtype} {tuple(x.shape)} on {x.device}"
    fix = "encode [batch, pos, d] to [batch, pos, latent] and decode back, in the model's dtype and on its device"
    with torch.no_grad():
        try:
            y = d.encode(x) if what == "encode" else d.decode(x)
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            raise SettingError(asked, f"{given} fails: {str(error).splitlines()[0]}", fix) from error
    if not isinstance(y, Tensor):
        raise SettingError(asked, f"{given} returned a {type(y).__name__}", fix)
    fits = y.ndim == 3 and y.shape[:2] == held.shape[:2] and width in (None, y.shape[2])
    if not fits or (y.dtype, y.device) != (held.dtype, held.device):
        raise SettingError(asked, f"{given} returned {y.dtype} {tuple(y.shape)} on {y.device}", fix)
    if not bool(y.isfinite().all()):
        raise SettingError(asked, f"{given} returned NaN or infinity", "look at its weights")
    return y
