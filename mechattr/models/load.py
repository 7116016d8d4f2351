"""`load`: a name, a folder, a loaded model or a hooked model -> a hooked model."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from mechattr.errors import SettingError, UnknownModelError, UnknownNameError, nearest
from mechattr.models.base import HookedModel
from mechattr.models.families import FAMILIES, Family

PACKAGE = Path(__file__).resolve().parent.parent
BUNDLED = ("tiny",)
BACKENDS = ("hf", "plain", "nnsight", "transformer_lens")
DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def bundled_path(name: str) -> Path:
    """The folder of a bundled model: inside an installed wheel, or in the `data/` folder of a checkout.

    Raises:
        UnknownModelError: the folder is in neither place.
    """
    places = [PACKAGE / "_data" / "models" / name, PACKAGE.parent / "data" / "models" / name]
    for place in places:
        if (place / "model.safetensors").exists():
            return place
    raise UnknownModelError(
        f"the bundled model {name!r}",
        "its folder is neither in the installed package nor in a checkout",
        "reinstall mechattr, or load another model",
    )


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
) -> HookedModel:
    """A hooked model.

    Args:
        source: `"tiny"` (the bundled model), a folder, a hub name, a loaded transformers model, a hooked model, a
            `TransformerBridge`, or a model of nnsight.
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

    Raises:
        UnknownModelError: nothing found under this name, or files that cannot be read or are incomplete.
        UnsupportedModelError: a family that cannot be hooked faithfully.
        BackendError: a backend that this version does not have.
        SettingError: a dtype or device that does not exist, settings for a model that is loaded already, or a model
            that the plain backend cannot copy.
    """
    if backend not in BACKENDS:
        raise UnknownNameError(f"backend {backend!r}", "no such backend", nearest(backend, BACKENDS))
    if remote is not False and backend != "nnsight":
        raise SettingError(f"remote={remote!r} with backend={backend!r}", "only nnsight runs elsewhere", "leave it out")
    if backend == "transformer_lens" and hasattr(source, "original_model"):
        from mechattr.models.lens import HookedLens

        _no_settings(device=device, dtype=dtype, family=family)
        return HookedLens(source, tokenizer, revision=revision)
    wanted = None if dtype is None else dtype_of(dtype)
    if backend == "nnsight":
        return _traced(source, tokenizer, attention, revision, remote, device=device, dtype=wanted, family=family)
    if backend == "hf":
        return _hooked(source, tokenizer, device, wanted, attention, revision, family)
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
) -> Any:
    if hasattr(source, "run") and hasattr(source, "sites"):
        _no_settings(device=device, dtype=dtype, tokenizer=tokenizer, family=family)
        return source
    from mechattr.models.hf import HookedHF

    if hasattr(source, "original_model"):
        fix = "use backend='transformer_lens'"
        raise SettingError(f"a {type(source).__name__} on this backend", "TransformerLens has rewritten the model", fix)
    if isinstance(source, torch.nn.Module):
        _no_settings(device=device, dtype=dtype)
        found = _tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
        return HookedHF(source, found, revision=revision, family=family)
    return _from_files(str(source), tokenizer, device, dtype, attention, revision, family)


def _traced(
    source: Any, tokenizer: Any, attention: str, revision: str | None, remote: bool | str, **settings: Any
) -> Any:
    from mechattr.models import nnsight_remote
    from mechattr.models.nnsight import HookedNNsight

    nnsight_remote.check_remote(source, remote)
    family = settings.pop("family")
    found = _tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
    if hasattr(source, "_module") or remote is True:
        _no_settings(**settings)
        if isinstance(source, str):
            found = found or _tokenizer(source, revision)
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


def _no_settings(**settings: Any) -> None:
    given = [name for name, value in settings.items() if value is not None]
    if given:
        raise SettingError(
            f"{', '.join(given)} for a model that is loaded already",
            "load() never converts or moves a model that it did not load",
            "load it with these settings, or call model.to(...) first",
        )


def _tokenizer(source: str, revision: str | None = None) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source, revision=revision)
    except (OSError, ValueError, KeyError) as error:
        raise UnknownModelError(
            f"the tokenizer {source!r}", _first_line(error), "give tokenizer=, a tokenizer object, a folder or a name"
        ) from error


def _processor(source: str, revision: str | None) -> Any:
    from transformers import AutoProcessor

    try:
        return AutoProcessor.from_pretrained(source, revision=revision)
    except (OSError, ValueError, KeyError, ImportError, AttributeError) as error:  # the last two: without torchvision
        fix = (
            "give tokenizer=, a processor, or a tokenizer for texts alone; processors of videos need the torchvision "
            "that belongs to this torch"
        )
        raise UnknownModelError(f"the processor of {source!r}", _first_line(error), fix) from error


def _from_files(
    source: str,
    tokenizer: Any,
    device: Any,
    dtype: torch.dtype | None,
    attention: str,
    revision: str | None,
    family: Family | None,
) -> Any:
    from mechattr.models.hf import HookedHF

    folder = str(bundled_path(source) if source in BUNDLED else Path(source).expanduser() if _local(source) else source)
    model = _weights(source, folder, dtype, attention, revision, family).eval().requires_grad_(False)
    if device is not None:
        try:
            model = model.to(device)
        except (RuntimeError, AssertionError) as error:
            fix = "use a device that torch has here"
            raise SettingError(f"device {str(device)!r}", _first_line(error), fix) from error
    row = family or FAMILIES.get(model.config.model_type)
    if tokenizer is None and row is not None and row.language is not None:
        tokenizer = _processor(folder, revision)
    elif tokenizer is None or isinstance(tokenizer, str):
        tokenizer = _tokenizer(tokenizer or folder, revision if tokenizer is None else None)
    name = source if source in BUNDLED else Path(folder).name
    return HookedHF(model, tokenizer, name=name, revision=revision, family=family)


def _weights(
    source: str,
    folder: str,
    dtype: torch.dtype | None,
    attention: str,
    revision: str | None,
    family: Family | None,
) -> Any:
    import transformers
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    from mechattr.models.architectures import family_of

    complete = "a model folder needs config.json and model.safetensors, saved with save_pretrained"
    if _local(source):
        _check_folder(source, folder)
    try:
        config = transformers.AutoConfig.from_pretrained(folder, revision=revision)
    except (OSError, ValueError, StrictDataclassError) as error:
        fix = complete if _local(source) else f"bundled: {', '.join(BUNDLED)}; else give a folder or a hub name"
        raise UnknownModelError(f"model {source!r}", _first_line(error), fix) from error
    if family is None:  # one without a row is looked at once it is loaded
        family = family_of(config)[1] if config.model_type in FAMILIES else Family()
    auto = getattr(transformers, family.auto)
    fused = family.experts is not None and dtype == torch.float64  # transformers' fused experts have no float64
    try:
        with _no_bar(source):
            model, report = auto.from_pretrained(
                folder,
                dtype=dtype or "auto",
                attn_implementation=attention,
                revision=revision,
                use_safetensors=True,
                output_loading_info=True,
                **({"experts_implementation": "eager"} if fused else {}),
            )
    except (OSError, SafetensorError, RuntimeError, KeyError) as error:  # also a config that does not fit the weights
        raise UnknownModelError(f"the weights of {source!r}", _first_line(error), complete) from error
    except (ValueError, ImportError) as error:  # an attention implementation that the family or machine does not have
        raise SettingError(f"attention={attention!r} for {source!r}", _first_line(error), "use 'eager'") from error
    if report["missing_keys"]:  # transformers would leave them random
        missing = sorted(report["missing_keys"])
        found = f"{len(missing)} are missing, such as {missing[0]}"
        raise UnknownModelError(f"the weights of {source!r}", found, complete)
    return model


@contextmanager
def _no_bar(source: str) -> Iterator[None]:
    """transformers' bars stay away from logs, and from the bundled model, which loads at once."""
    from transformers.utils import logging

    if source not in BUNDLED and sys.stderr.isatty():
        yield
        return
    before = logging.set_tqdm_hook(lambda make, args, settings: make(*args, **{**settings, "disable": True}))
    try:
        yield
    finally:
        logging.set_tqdm_hook(before)


def _local(source: str) -> bool:
    return source.startswith((".", "~", os.sep)) or Path(source).exists()


def _check_folder(source: str, folder: str) -> None:
    path, fix = Path(folder), "give a folder with config.json and model.safetensors"
    if not (path / "config.json").is_file():
        found = ", ".join(sorted(p.name for p in path.iterdir())[:8]) if path.is_dir() else "no such folder"
        raise UnknownModelError(f"model folder {source!r}", found or "an empty folder", fix)
    try:
        json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        found = f"config.json is not JSON ({error})"
        raise UnknownModelError(f"model folder {source!r}", found, "save the model again") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
