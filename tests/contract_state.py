"""What no method may change."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from typing import Any

import torch

from mechattr.models import Batch
from mechattr.models.plain import HookedPlain


def state(model: Any, batches: Sequence[Batch]) -> tuple[Any, ...]:
    """What no method may change."""
    tokens = [batch.tokens.tolist() for batch in batches]
    seeds = torch.get_rng_state().tolist(), random.getstate()
    if isinstance(model, HookedPlain):
        weights = {name: tensor for name, tensor in model._weights.items()}
        rest: tuple[Any, ...] = ()
    else:
        weights = model.model.state_dict()
        rest = tuple(
            (
                name,
                len(m._forward_hooks),
                len(m._forward_pre_hooks),
                len(m._backward_hooks),
                m.training,
                sorted(name for name in m.__dict__ if not name.startswith("_fired_")),  # notes of TransformerLens
            )
            for name, m in model.model.named_modules()
        )
        rest += (model.config._attn_implementation, [p.requires_grad for p in model.model.parameters()])
        rest += ([p.grad for p in model.model.parameters()],)
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(name.encode() + tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest(), tokens, seeds, rest
