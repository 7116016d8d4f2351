"""Recordings that are kept: a cache bound to the model and the tokens that made it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict

from torch import Tensor

from mechattr import storage
from mechattr.artifact import Cache
from mechattr.base import Artifact
from mechattr.errors import MismatchError, SettingError
from mechattr.labelled import Labelled
from mechattr.models.base import Batch, HookedModel
from mechattr.models.edits import Edit
from mechattr.models.operators import Place
from mechattr.provenance import JSON, provenance
from mechattr.sites import expand, site_spec
from mechattr.storage import ShardWriter


def record(model: HookedModel, batch: Batch, sites: str | Sequence[str]) -> Cache:
    """Records sites of one run as an artifact that can be saved and used again.

    Args:
        model: a hooked model.
        batch: token rows.
        sites: short or full site names.

    Returns:
        The activations by full site name. The provenance has what `model.info` says, the model's hashes and a hash of
        the tokens.

    Raises:
        UnknownSiteError: a site that this model does not have.

    Cost:
        1 forward pass a row.
    """
    names = expand(sites, model.sites())
    activations = model.run(batch, record=names).activations
    return Cache(activations.tensors, settings=_settings(names, batch), provenance=_made(model, batch))


def record_to(
    path: str | os.PathLike[str],
    model: HookedModel,
    batch: Batch,
    sites: str | Sequence[str],
    *,
    shard_bytes: int = 1 << 28,
) -> Cache:
    """Records sites of one run into a folder while the forward pass goes by, so that they are never in memory together.

    Args:
        path: the folder to make. It appears when the run is over, and not at all if the run fails.
        model: a hooked model.
        batch: token rows.
        sites: short or full site names.
        shard_bytes: a file of the folder is written once so many bytes wait.

    Returns:
        The recording, opened: what `record` gives, bit for bit, and read from the folder where it is asked for.

    Raises:
        UnknownSiteError: a site that this model does not have.
        OutputExistsError: something of this name exists.
        SettingError: no sites, or no such parent folder.

    Cost:
        1 forward pass a row. Memory: that of a run that records nothing, and the files' bytes that wait.
    """
    names = expand(sites, model.sites())
    if not names:
        raise SettingError("a recording", "no sites", "name sites, such as 'resid_post'")
    said, made = _settings(names, batch), _made(model, batch)
    with ShardWriter(path, settings=said, provenance=made, shard_bytes=shard_bytes) as writer:
        written: set[str] = set()

        def write(x: Tensor, place: Place) -> Tensor:
            if place.site not in written:  # the search for the first NaN runs once more
                written.add(place.site)
                writer.add(place.site, Labelled(x, site_spec(place.site).axes))
            return x

        model.run(batch, edits=[Edit(name, write) for name in names])
    return Cache.from_stored(storage.open(path), lazy=True)


def _settings(names: Sequence[str], batch: Batch) -> dict[str, JSON]:
    return {"sites": list(names), "rows": len(batch)}


def _made(model: HookedModel, batch: Batch) -> dict[str, JSON]:
    return provenance({**asdict(model.info), **model.fingerprint()}, tokens=batch.content)


def check_belongs(artifact: Artifact, model: HookedModel) -> None:
    """Whether a stored result was made by this model.

    Args:
        artifact: anything whose provenance has `weight_hash` and `tokenizer_hash`.
        model: a hooked model.

    Raises:
        MismatchError: other weights or another tokenizer, or a result that does not say which.
    """
    for what, now in model.fingerprint().items():
        then = artifact.provenance.get(what)
        if then != now:
            label = what.removesuffix("_hash") + ("s" if what == "weight_hash" else "")
            made = "does not say" if then is None else f"was made with {label} {str(then)[:12]}"
            name = artifact.provenance.get("name")
            raise MismatchError(
                f"{artifact.kind} of model {name!r} with model {model.info.name!r}",
                f"the result {made}, this model has {label} {now[:12]}",
                "use the model that made it, or compute the result again",
            )
