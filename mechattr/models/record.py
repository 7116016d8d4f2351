"""Recordings that are kept: a cache bound to the model and the tokens that made it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from mechattr.artifact import Cache
from mechattr.base import Artifact
from mechattr.errors import MismatchError
from mechattr.models.base import Batch, HookedModel
from mechattr.provenance import provenance


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
    activations = model.run(batch, record=sites).activations
    return Cache(
        activations.tensors,
        settings={"sites": list(activations), "rows": len(batch)},
        provenance=provenance({**asdict(model.info), **model.fingerprint()}, tokens=batch.content),
    )


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
