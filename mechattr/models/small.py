"""Small random models of every family: large weights and non-zero biases, so that no bug hides in a zero."""

from __future__ import annotations

from typing import Any

import torch

from mechattr.errors import UnknownNameError, nearest
from mechattr.models.families import FAMILIES, small_configs


def small_model(name: str, dtype: torch.dtype = torch.float32, attention: str = "eager", *, seed: int = 0) -> Any:
    """A seeded random transformers model in eval mode: weights of scale 0.3, biases and norms away from 0 and 1.

    Args:
        name: a name of `small_configs()`.
        dtype: of the weights.
        attention: transformers' attention implementation.
        seed: of the weights.

    Raises:
        UnknownNameError: no small model of this name.
    """
    import transformers

    configs = small_configs()
    if name not in configs:
        raise UnknownNameError(f"a small model {name!r}", "no such model", nearest(name, configs))
    family = FAMILIES[configs[name].model_type]
    # transformers' fused experts do not run in float64
    experts = {"experts_implementation": "eager"} if family.experts is not None else {}
    built = getattr(transformers, family.auto).from_config(configs[name], attn_implementation=attention, **experts)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for label, parameter in sorted(built.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            is_norm = "norm" in label.lower() or ".ln_" in label
            centred = family.norm.endswith("plus_one") or not (is_norm and label.endswith("weight"))
            parameter.copy_((0.0 if centred else 1.0) + 0.3 * noise)
    return built.to(dtype).eval()
