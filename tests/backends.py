"""Small random models behind every backend that runs transformers models, with the weights of `families.hooked`."""

from __future__ import annotations

import warnings
from functools import cache, partial
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


@cache
def traced(
    family: str, dtype: torch.dtype = torch.float32, *, remote: bool | str = False, attention: str = "eager"
) -> Any:
    """The same model on the nnsight backend, shared between tests. nnsight is imported when it is needed."""
    from mechattr.models.nnsight import HookedNNsight

    return HookedNNsight(families.model(family, dtype, attention), name=family, remote=remote)


BACKENDS = {"lens": lens, "nnsight-local": partial(traced, remote="local"), "nnsight": traced}


def backend_model(kind: str) -> Any:
    """A model by backend and family, such as `"lens-gpt2"` or `"nnsight-local-llama"`."""
    backend, _, family = kind.rpartition("-")
    return BACKENDS[backend](family)
