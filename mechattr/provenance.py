"""Provenance: what made a result, as plain JSON.

The time of day is left out on purpose: identical runs give byte-identical files.
"""

from __future__ import annotations

import hashlib
import math
import numbers
import platform
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import metadata
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from mechattr.errors import SettingError

JSON = None | bool | int | float | str | list["JSON"] | dict[str, "JSON"]

_PACKAGES = ("mechattr", "torch", "transformers", "numpy", "safetensors")


def json_value(value: Any, where: str = "settings") -> JSON:
    """A copy of `value` as strict JSON: what comes back when it is stored and read again.

    Mappings become dicts, sequences lists, numpy and torch scalars Python numbers, and NaN becomes `None`: JSON has no
    NaN, and in settings it means "not measured".

    Args:
        value: nested mappings, sequences, strings, numbers, bools and None.
        where: name of the value for error messages.

    Raises:
        SettingError: something else, an infinite number, or a key that is not a string.
    """
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise SettingError(f"key {key!r} of {where}", type(key).__name__, "use strings as keys")
        return {key: json_value(item, f"{where}[{key!r}]") for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        return [json_value(item, f"{where}[{place}]") for place, item in enumerate(value)]
    if getattr(value, "ndim", None) == 0:  # a numpy or torch scalar
        value = value.item()
    if isinstance(value, bool):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        number = float(value)
        if math.isinf(number):
            raise SettingError(f"{where} = {number}", "an infinite number", "JSON has none: store a finite one or None")
        return None if math.isnan(number) else number
    raise SettingError(
        f"{where} = {value!r}", type(value).__name__, "use JSON: dicts, lists, strings, numbers, bools, None"
    )


def provenance(
    model_info: Mapping[str, Any], *, seed: int | None = None, tokens: Int[Tensor, "*dims"] | None = None
) -> dict[str, JSON]:
    """What made a result: the model as described, versions, seed and a hash of the input.

    Args:
        model_info: description of the model, such as `model`, `revision`, `weight_hash`, `tokenizer_hash`, `dtype`
            and `device`; kept as given, with torch dtypes and devices as strings (`"float32"`, `"cuda:0"`).
        seed: the seed that the method was given.
        tokens: the token ids of the input; only their sha256 (shape included) is kept.

    Returns:
        The keys of `model_info`, and `seed`, `tokens_sha256` and `versions`.
    """
    described = {
        key: str(value).removeprefix("torch.") if isinstance(value, torch.dtype | torch.device) else value
        for key, value in model_info.items()
    }
    versions = {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}}
    hashed = None if tokens is None else _tokens_hash(tokens)
    return {
        key: json_value(value, f"provenance[{key!r}]")
        for key, value in {**described, "seed": seed, "tokens_sha256": hashed, "versions": versions}.items()
    }


@cache
def _version(name: str) -> str:
    """The installed version; `0+unknown` when the package is used from a folder without being installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "0+unknown"


def _tokens_hash(tokens: Int[Tensor, "*dims"]) -> str:
    ids = tokens.detach().cpu().to(torch.int64).contiguous().numpy().astype("<i8")
    return hashlib.sha256(str(ids.shape).encode() + ids.tobytes()).hexdigest()
