"""Small random models behind every backend that runs transformers models, with the weights of `families.hooked`."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import families
import torch

from mechattr.models.lens import HookedLens
from mechattr.models.lens_boot import boot


def bridge(family: str, dtype: torch.dtype = torch.float32) -> Any:
    """A TransformerBridge of its own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # of TransformerLens's sources, when they are first compiled
        return boot(families.hooked(family, dtype).model, families.tokenizer())


@cache
def lens(family: str, dtype: torch.dtype = torch.float32) -> HookedLens:
    """The same model on the TransformerLens backend, shared between tests."""
    return HookedLens(bridge(family, dtype), name=family)


BACKENDS = {"lens": lens}


def backend_model(kind: str) -> Any:
    """A model by backend and family, such as `"lens-gpt2"`."""
    backend, _, family = kind.partition("-")
    return BACKENDS[backend](family)
