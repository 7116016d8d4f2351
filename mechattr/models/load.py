"""`load`: a name, a folder, a loaded model or a hooked model -> a hooked model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mechattr.errors import SettingError, UnknownNameError, nearest
from mechattr.models.base import HookedModel
from mechattr.models.families import FAMILIES, Family
from mechattr.models.files import (
    BUNDLED,
    bundled_path,
    first_line,
    is_local,
    read_processor,
    read_tokenizer,
    read_weights,
)

BACKENDS = ("hf", "plain", "nnsight", "transformer_lens")
DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def load(
    source: Any,
    *,
    tokenizer: Any = None,
    backend: str = "hf",
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    attention: str = "eager",
    revision: str | None = None,
    family: Family | None = None,
    remote: bool | str = False,
    device_map: str | Mapping[str, Any] | None = None,
) -> HookedModel:
    """A hooked model.

    Args:
        source: a bundled model (`"tiny"`, `"agreement-gpt2"`, `"agreement-llama"`), a folder, a hub name, a loaded
            transformers model, a hooked model, a `TransformerBridge`, or a model of nnsight.
        tokenizer: a tokenizer object, a folder or a name, or the processor object of a vision-language model; by
            default what is beside the weights.
        backend: `"hf"`; `"plain"` for a copy of a GPT-2 or Llama in plain torch; `"transformer_lens"` for a bridge, or
            for a copy of a transformers model behind one; `"nnsight"` for runs as traces, here or on a server.
        device: where to put the weights; by default the CPU, or where a loaded model is.
        dtype: by default that of the checkpoint, and `"float64"` for `backend="plain"`.
        attention: implementation for names and folders; a loaded model keeps its own.
        revision: hub revision.
        family: where the sites of the model are; by default its row of the table, or what `discover` finds.
        remote: of `backend="nnsight"`: `"local"` serialises each run as for a server and runs it here, `True` sends it
            to an NDIF server, for a model by its hub name.
        device_map: of `backend="hf"` and names and folders: spreads the model over devices, the CPU's memory and the
            disk, as transformers does: `"auto"`, or a device for each module, such as `{"model.layers.0": 0, ...}`.

    Raises:
        UnknownModelError: nothing found under this name, or files that cannot be read or are incomplete.
        UnsupportedModelError: a family that cannot be hooked faithfully.
        BackendError: a backend that this version does not have.
        SettingError: a dtype or device that does not exist, settings for a model that is loaded already, a model that
            the plain backend cannot copy, or no model or tokenizer at all.
    """
    if backend not in BACKENDS:
        raise UnknownNameError(f"backend {backend!r}", "no such backend", nearest(backend, BACKENDS))
    tokenizer = os.fspath(tokenizer) if isinstance(tokenizer, os.PathLike) else tokenizer
    if not (tokenizer is None or isinstance(tokenizer, str) or callable(tokenizer)):
        fix = "give a tokenizer object, a folder or a name, or leave it out"
        raise SettingError(f"tokenizer={tokenizer!r:.60}", f"a {type(tokenizer).__name__}", fix)
    if remote is not False and backend != "nnsight":
        raise SettingError(f"remote={remote!r} with backend={backend!r}", "only nnsight runs elsewhere", "leave it out")
    if backend == "transformer_lens" and hasattr(source, "original_model"):
        from mechattr.models.lens import HookedLens

        _no_settings(device=device, dtype=dtype, family=family)
        return HookedLens(source, tokenizer, revision=revision)
    wanted = None if dtype is None else dtype_of(dtype)
    if device_map is not None:
        _check_spread(source, backend, device)
    if backend == "nnsight":
        return _traced(source, tokenizer, attention, revision, remote, device=device, dtype=wanted, family=family)
    if backend == "hf":
        return _hooked(source, tokenizer, device, wanted, attention, revision, family, device_map)
    if backend == "transformer_lens":
        from mechattr.models.lens_boot import lens_model

        return lens_model(_hooked(source, tokenizer, device, wanted, attention, revision, family), source)
    from mechattr.models.plain import plain_copy

    return plain_copy(_hooked(source, tokenizer, device, None, attention, revision, family), wanted or torch.float64)


def _hooked(
    source: Any,
    tokenizer: Any,
    device: Any,
    dtype: Any,
    attention: str,
    revision: str | None,
    family: Family | None,
    device_map: Any = None,
) -> Any:
    if hasattr(source, "run") and hasattr(source, "sites"):
        _no_settings(device=device, dtype=dtype, tokenizer=tokenizer, family=family)
        return source
    from mechattr.models.hf import HookedHF

    if hasattr(source, "original_model"):
        fix = "use backend='transformer_lens'"
        raise SettingError(f"a {type(source).__name__} on this backend", "TransformerLens has rewritten the model", fix)
    if not isinstance(source, torch.nn.Module | str | os.PathLike) or hasattr(source, "_module"):
        traced = hasattr(source, "_module")
        found = "a model of nnsight" if traced else f"{source!r:.60}"
        fix = "use backend='nnsight'" if traced else "give a name, a folder or a loaded model"
        raise SettingError(f"a {type(source).__name__} as a model", found, fix)
    if isinstance(source, torch.nn.Module):
        _no_settings(device=device, dtype=dtype)
        found = read_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
        return HookedHF(source, found, revision=revision, family=family)
    return _from_files(str(source), tokenizer, device, dtype, attention, revision, family, device_map)


def _traced(
    source: Any, tokenizer: Any, attention: str, revision: str | None, remote: bool | str, **settings: Any
) -> Any:
    from mechattr.models import nnsight_remote
    from mechattr.models.nnsight import HookedNNsight

    nnsight_remote.check_remote(source, remote)
    family = settings.pop("family")
    found = read_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
    if hasattr(source, "_module") or remote is True:
        _no_settings(**settings)
        if isinstance(source, str):
            found = found or read_tokenizer(source, revision)
            source = nnsight_remote.on_server(source, found, revision, attention)
        return HookedNNsight(source, found, revision=revision, remote=remote, family=family)
    bare = _hooked(source, found, settings["device"], settings["dtype"], attention, revision, family)
    return HookedNNsight(
        bare.model, bare.tokenizer, name=bare.info.name, revision=revision, remote=remote, family=family
    )


def dtype_of(dtype: str | torch.dtype) -> torch.dtype:
    """A dtype by its name.

    Raises:
        SettingError: no such dtype.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise SettingError(f"dtype {dtype!r}", "no such dtype", nearest(dtype, DTYPES))
    return DTYPES[dtype]


def _check_spread(source: Any, backend: str, device: Any) -> None:
    if backend != "hf":
        found, fix = f"only backend='hf' spreads a model, this is {backend!r}", "leave device_map out"
    elif device is not None:
        found, fix = f"device={device!r} as well, which is one device for all", "give one of the two"
    elif not isinstance(source, str | Path):
        found, fix = "a model that is loaded already", "load it with a device_map by transformers, and give it as it is"
    else:
        return
    raise SettingError("load with device_map", found, fix)


def _no_settings(**settings: Any) -> None:
    given = [name for name, value in settings.items() if value is not None]
    if given:
        raise SettingError(
            f"{', '.join(given)} for a model that is loaded already",
            "load() never converts or moves a model that it did not load",
            "load it with these settings, or call model.to(...) first",
        )


def _from_files(
    source: str,
    tokenizer: Any,
    device: Any,
    dtype: torch.dtype | None,
    attention: str,
    revision: str | None,
    family: Family | None,
    device_map: Any,
) -> Any:
    from mechattr.models.hf import HookedHF

    folder = str(
        bundled_path(source) if source in BUNDLED else Path(source).expanduser() if is_local(source) else source
    )
    model = read_weights(source, folder, dtype, attention, revision, family, device_map).eval().requires_grad_(False)
    if device is not None:
        try:
            model = model.to(device)
        except (RuntimeError, AssertionError) as error:
            fix = "use a device that torch has here"
            raise SettingError(f"device {str(device)!r}", first_line(error), fix) from error
    row = family or FAMILIES.get(model.config.model_type)
    if tokenizer is None and row is not None and row.language is not None:
        tokenizer = read_processor(folder, revision)
    elif tokenizer is None or isinstance(tokenizer, str):
        tokenizer = read_tokenizer(tokenizer or folder, revision if tokenizer is None else None)
    name = source if source in BUNDLED else Path(folder).name
    return HookedHF(model, tokenizer, name=name, revision=revision, family=family)
