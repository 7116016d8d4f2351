"""Steering vectors in the files of other programs: GGUF control vectors and the JSON of conditional steering."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mechattr.errors import ArtifactError, SettingError
from mechattr.sites import full_name, parse
from mechattr.steering import gguf
from mechattr.steering.vector import SteeringVector

_DIRECTION = re.compile(r"direction\.(0|[1-9]\d*)", re.ASCII)
_LAYER = re.compile(r"0|[1-9]\d*", re.ASCII)


def to_gguf(vector: SteeringVector, path: str | Path, *, model_hint: str) -> None:
    """Writes the directions at `resid_post` as a GGUF control vector: `direction.{layer}` in float32. Layers count from
    0, as in `vector.directions` and in repeng. How the vector was made is not kept.

    Args:
        vector: directions at `resid_post`.
        path: the file.
        model_hint: the architecture, such as `"llama"`.

    Raises:
        SettingError: a vector with other sites, numbers that float32 does not hold, or no architecture.
        ArtifactError: no such folder.
    """
    layers = _layers(vector)
    meta: dict[str, str | int] = {
        "general.architecture": "controlvector",
        "controlvector.model_hint": model_hint,
        "controlvector.layer_count": len(layers),
    }
    _check_target(path, model_hint)
    gguf.write(Path(path), meta, {f"direction.{layer}": x for layer, x in layers.items()})


def from_gguf(path: str | Path) -> SteeringVector:
    """A GGUF control vector, as a vector at `resid_post`. `settings["model_hint"]` names the architecture that it was
    made for.

    Raises:
        ArtifactError: no such file, a damaged or truncated one, another format, or GGUF of something else.
    """
    file = Path(path)
    meta, tensors = gguf.read(file)
    kind = meta.get("general.architecture")
    if kind != "controlvector":
        fix = "give a file of the architecture 'controlvector'"
        raise ArtifactError(f"a control vector in {file}", f"the architecture {kind!r}", fix)
    found: dict[int, Tensor] = {}
    for name, tensor in tensors.items():
        match = _DIRECTION.fullmatch(name)
        if match is None:
            raise ArtifactError(f"a control vector in {file}", f"a tensor {name!r}", "name tensors direction.{layer}")
        found[int(match[1])] = tensor
    count = meta.get("controlvector.layer_count", len(found))
    if count != len(found):
        fix = "write the file again"
        raise ArtifactError(f"a control vector in {file}", f"{len(found)} directions of {count}", fix)
    return _vector(file, found, {"method": "gguf", "model_hint": meta.get("controlvector.model_hint")})


def to_json(vector: SteeringVector, path: str | Path, *, model_type: str) -> None:
    """Writes the directions at `resid_post` as JSON of activation steering (CAST): `model_type`, `directions` by layer,
    and `explained_variances`, which are 0 where the vector does not know them.

    Args:
        vector: directions at `resid_post`.
        path: the file.
        model_type: the architecture, such as `"llama"`.

    Raises:
        SettingError: a vector with other sites, numbers that float32 does not hold, or no architecture.
        ArtifactError: no such folder.
    """
    layers = _layers(vector)
    known: Any = vector.settings.get("explained_variances") or {}
    document = {
        "model_type": model_type,
        "directions": {str(layer): x.tolist() for layer, x in layers.items()},
        "explained_variances": {str(layer): known.get(str(layer), 0.0) for layer in layers},
    }
    _check_target(path, model_type)
    partial = Path(path).with_name(Path(path).name + ".partial")
    partial.write_text(json.dumps(document))
    partial.replace(path)


def from_json(path: str | Path) -> SteeringVector:
    """The JSON of activation steering (CAST), as a vector at `resid_post`.

    Raises:
        ArtifactError: no such file, or one that is not such a document.
    """
    file = Path(path)
    try:
        document = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        fix = "give the path of a JSON file with 'directions'"
        raise ArtifactError(f"a steering vector in {file}", str(error), fix) from error
    given = document.get("directions") if isinstance(document, Mapping) else None
    known = document.get("explained_variances") or {} if isinstance(document, Mapping) else {}
    if not isinstance(given, Mapping) or not isinstance(known, Mapping):
        fix = "give a JSON file with model_type, directions and explained_variances"
        found_text = "no 'directions'" if not isinstance(given, Mapping) else "'explained_variances' not by layer"
        raise ArtifactError(f"a steering vector in {file}", found_text, fix)
    unnamed = next((layer for layer in given if not _LAYER.fullmatch(layer)), None)
    if unnamed is not None:
        fix = "name layers '0', '1', ..."
        raise ArtifactError(f"a steering vector in {file}", f"directions of the layer {unnamed!r}", fix)
    try:
        found = {int(layer): torch.tensor(values, dtype=torch.float32) for layer, values in given.items()}
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        found_text = f"directions that are no lists of numbers by layer: {error}"
        raise ArtifactError(f"a steering vector in {file}", found_text, "write the file again") from error
    settings = {"method": "cast", "model_hint": document.get("model_type")}
    return _vector(file, found, {**settings, "explained_variances": known})


def _check_target(path: str | Path, architecture: Any) -> None:
    if not isinstance(architecture, str) or not architecture:
        fix = "give its name, such as model.info.family"
        raise SettingError("the architecture that a vector is for", f"{architecture!r:.60}", fix)
    if not Path(path).parent.is_dir():
        raise ArtifactError(f"to write {path}", f"no folder {Path(path).parent}", "create the folder first")


def _layers(vector: SteeringVector) -> dict[int, Tensor]:
    other = [n for n, x in vector.tensors.items() if parse(n)[0] != "resid_post" or x.axes != ("d_model",)]
    if other:
        found = f"axes {', '.join(vector.tensors[other[0]].axes)} at {other[0]}"
        raise SettingError("one direction a layer", found, "use .only([...]) with sites of resid_post, or .save()")
    rounded = {layer: x.to(torch.float32) for layer, x in sorted(vector.directions.items())}
    wrong = [layer for layer, x in vector.directions.items() if not torch.equal(rounded[layer].to(x.dtype), x)]
    if wrong:
        found = f"numbers of layer {wrong[0]} that float32 does not hold"
        raise SettingError("one direction a layer", found, "round them to float32, or use .save()")
    return rounded


def _vector(file: Path, directions: Mapping[int, Tensor], settings: Mapping[str, Any]) -> SteeringVector:
    shapes = {tuple(x.shape) for x in directions.values()}
    finite = all(bool(x.isfinite().all()) for x in directions.values())
    if len(shapes) != 1 or len(next(iter(shapes))) != 1 or not finite:
        found = f"directions of shapes {sorted(shapes)}" + ", with NaN or infinity" * (not finite)
        raise ArtifactError(f"a steering vector in {file}", found, "one finite vector of one width a layer is needed")
    tensors = {full_name("resid_post", layer): x for layer, x in sorted(directions.items())}
    return SteeringVector.of(tensors, settings=settings)
