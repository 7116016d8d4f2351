"""Probes that were published as checkpoints, read without running any code of theirs."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from pickle import UnpicklingError  # noqa: TID251 (the name of an error, which the safe loader raises)
from typing import Any

import torch
from torch import Tensor

from mechattr.erasure.documents import check_layers
from mechattr.erasure.probes import ErasureProbes
from mechattr.errors import ArtifactError, MismatchError
from mechattr.models.base import HookedModel
from mechattr.provenance import provenance

KEY = "fc.weight"
_NAME = re.compile(r"layer(-?\d+)_tgtidx(-?\d+)\.ckpt")


def import_probes(folder: str | os.PathLike[str], model: HookedModel) -> ErasureProbes:
    """Reads the published probes of a model: files `layer{L}_tgtidx{O}.ckpt` with one tensor `fc.weight` [vocab, d].

    Layers are numbered as here: -1 is the embedding, the one after the last block follows the final norm. Each layer
    must have all offsets that the folder has.

    Args:
        folder: with the files.
        model: the model that they were made for; they do not say, so only shapes are compared.

    Raises:
        ArtifactError: no such files, a file that holds more than tensors, or one without `fc.weight`.
        MismatchError: probes of other shapes or layers than the model's, or a layer that lacks an offset.

    References:
        Feucht et al. (2024), arXiv 2406.20086, and the checkpoints that accompany it.
    """
    matches = [(path, m) for path in sorted(Path(folder).glob("*.ckpt")) if (m := _NAME.fullmatch(path.name))]
    if not matches:
        found = "no file named layer0_tgtidx-1.ckpt or the like"
        raise ArtifactError(f"probes from {Path(folder).name!r}", found, "give the folder with the checkpoints")
    by_layer: dict[int, dict[int, Tensor]] = defaultdict(dict)
    for path, match in matches:
        by_layer[int(match[1])][int(match[2])] = _weight(path, (model.info.d_vocab, model.info.d_model))
    offsets = sorted({offset for probes in by_layer.values() for offset in probes})
    for layer, probes in by_layer.items():
        missing = sorted(set(offsets) - set(probes))
        if missing:
            raise MismatchError(
                f"probes of layer {layer} at offset {missing[0]}",
                f"other layers of {Path(folder).name!r} have it",
                "complete the folder, or take the files of this offset away",
            )
    unknown = sorted(set(by_layer) - set(check_layers(model, None)))
    if unknown:
        found = f"a model with {model.info.n_layers} blocks"
        raise MismatchError(f"probes of layer {unknown[0]}", found, "give the model that they were made for")
    weights = {layer: torch.stack([by_layer[layer][o] for o in offsets]) for layer in sorted(by_layer)}
    settings: dict[str, Any] = {"method": "import_probes", "layers": sorted(by_layer), "offsets": offsets}
    made = provenance({**asdict(model.info), **model.fingerprint()})
    return ErasureProbes.of(weights, offsets, settings=settings, provenance=made)


def _weight(path: Path, shape: tuple[int, int]) -> Tensor:
    try:
        # weights_only refuses whatever is not a tensor or a plain container
        state = torch.load(path, map_location="cpu", weights_only=True)  # noqa: TID251
    except (RuntimeError, EOFError, OSError, UnpicklingError) as error:
        asked = f"tensors from {path.name}"
        fix = "get the file again; one that holds more than tensors is not read"
        raise ArtifactError(asked, str(error).splitlines()[0], fix) from error
    weight = state.get(KEY) if isinstance(state, dict) else None
    if not isinstance(weight, Tensor):
        found = f"keys {sorted(state)[:4]}" if isinstance(state, dict) else f"a {type(state).__name__}"
        raise ArtifactError(f"{KEY} in {path.name}", found, "give checkpoints of linear probes")
    if tuple(weight.shape) != shape:
        raise MismatchError(
            f"a probe of shape {list(shape)} in {path.name}",
            f"shape {list(weight.shape)}",
            "give the model they are of",
        )
    return weight.float()
