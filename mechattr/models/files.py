"""What is read with transformers from a folder or the hub, and how that can fail."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from mechattr.errors import MechattrError, SettingError, UnknownModelError
from mechattr.models.families import FAMILIES, Family

PACKAGE = Path(__file__).resolve().parent.parent
BUNDLED = ("tiny", "agreement-gpt2", "agreement-llama")


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


def read_weights(
    source: str,
    folder: str,
    dtype: torch.dtype | None,
    attention: str,
    revision: str | None,
    family: Family | None,
    device_map: Any,
) -> Any:
    """A model with every weight of its checkpoint.

    Raises:
        UnknownModelError: no such model, or files that cannot be read or lack weights.
        SettingError: an attention implementation, or a device map, that does not fit.
    """
    import transformers
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    from mechattr.models.architectures import family_of

    complete = "a model folder needs config.json and model.safetensors, saved with save_pretrained"
    if is_local(source):
        _check_folder(source, folder)
    try:
        config = transformers.AutoConfig.from_pretrained(folder, revision=revision)
    except (OSError, ValueError, StrictDataclassError) as error:
        fix = complete if is_local(source) else f"bundled: {', '.join(BUNDLED)}; else give a folder or a hub name"
        raise UnknownModelError(f"model {source!r}", first_line(error), fix) from error
    if family is None:  # one without a row is looked at once it is loaded
        family = family_of(config)[1] if config.model_type in FAMILIES else Family()
    auto = getattr(transformers, family.auto)
    fused = family.experts is not None and dtype == torch.float64  # transformers' fused experts have no float64
    try:
        with _no_bar(source), _placing(source, device_map):
            model, report = auto.from_pretrained(
                folder,
                dtype=dtype or "auto",
                attn_implementation=attention,
                revision=revision,
                use_safetensors=True,
                output_loading_info=True,
                **({"experts_implementation": "eager"} if fused else {}),
                **({} if device_map is None else {"device_map": device_map}),
            )
    except MechattrError:
        raise
    except (OSError, SafetensorError, RuntimeError, KeyError) as error:  # also a config that does not fit the weights
        raise UnknownModelError(f"the weights of {source!r}", first_line(error), complete) from error
    except (ValueError, ImportError) as error:  # an attention implementation that the family or machine does not have
        raise SettingError(f"attention={attention!r} for {source!r}", first_line(error), "use 'eager'") from error
    if report["missing_keys"]:  # transformers would leave them random
        missing = sorted(report["missing_keys"])
        found = f"{len(missing)} are missing, such as {missing[0]}"
        raise UnknownModelError(f"the weights of {source!r}", found, complete)
    return model


def read_tokenizer(source: str, revision: str | None = None) -> Any:
    """A tokenizer; UnknownModelError where there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source, revision=revision)
    except (OSError, ValueError, KeyError) as error:
        raise UnknownModelError(
            f"the tokenizer {source!r}", first_line(error), "give tokenizer=, a tokenizer object, a folder or a name"
        ) from error


def read_processor(source: str, revision: str | None) -> Any:
    """A processor of texts and images; UnknownModelError where there is none."""
    from transformers import AutoProcessor

    try:
        return AutoProcessor.from_pretrained(source, revision=revision)
    except (OSError, ValueError, KeyError, ImportError, AttributeError) as error:  # the last two: without torchvision
        fix = (
            "give tokenizer=, a processor, or a tokenizer for texts alone; processors of videos need the torchvision "
            "that belongs to this torch"
        )
        raise UnknownModelError(f"the processor of {source!r}", first_line(error), fix) from error


@contextmanager
def _placing(source: str, device_map: Any) -> Iterator[None]:
    """The error of a device map that does not fit the model or the machine."""
    try:
        yield
    except (ValueError, RuntimeError, AssertionError) as error:
        if device_map is None or not any(word in str(error) for word in ("device", "CUDA", "offload")):
            raise
        fix = "use 'auto', or a device that torch has here for every module (MoE: load it with offload_folder yourself)"
        raise SettingError(f"device_map={device_map!r} for {source!r}", first_line(error), fix) from error


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


def is_local(source: str) -> bool:
    """Whether a source is a folder, and not a name of the hub."""
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


def first_line(error: BaseException) -> str:
    """What an error of another library says, in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
