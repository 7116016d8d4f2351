"""What every patching result says about how it was made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from mechattr.models.base import HookedModel
from mechattr.patching.places import Direction
from mechattr.provenance import JSON, provenance
from mechattr.tasks.block import Block
from mechattr.tasks.task import Task


def settings_of(
    task: Task,
    *,
    method: str,
    direction: Direction,
    sites: Sequence[str],
    positions: str,
    base: Sequence[float],
    source: Sequence[float] | None,
    passes: tuple[float, float],
    trivial: Bool[Tensor, "..."] | int,
    **more: Any,
) -> dict[str, Any]:
    """The settings of an `Attribution`.

    Args:
        task: the prompt pairs.
        method: the name of the method.
        direction: noising or denoising.
        sites: short names.
        positions: what a position means.
        base: the metric of the base run by pair.
        source: that of the source run, where it was run.
        passes: forward and backward, in prompt rows.
        trivial: the nodes whose effect is zero by construction, or how many they are: their activation is the same in
            both runs. A block keeps which they are, in `"trivial"`, since another block may say otherwise.
        **more: what else identifies the result.
    """
    clean, corrupt = (base, source) if direction == "noising" else (source, base)
    return {
        "method": method,
        "direction": direction,
        "sites": list(sites),
        "positions": positions,
        "task": task.name,
        "task_hash": task.hash(),
        "metric": {"name": task.metric.name, "unit": task.metric.unit},
        "n_pairs": len(task),
        "n_identical_pairs": int((~task.clean.prompt.differs(task.corrupt.prompt).any(1)).sum()),
        "clean_metric": clean,
        "corrupt_metric": corrupt,
        "passes": {"forward": passes[0], "backward": passes[1]},
        "n_trivial_zero": trivial if isinstance(trivial, int) else int(trivial.sum()),
        **({"trivial": _bits(trivial)} if isinstance(task, Block) and isinstance(trivial, Tensor) else {}),
        **more,
    }


def _bits(mask: Bool[Tensor, "..."]) -> str:
    """A mask as hexadecimal digits, eight entries in two of them."""
    return np.packbits(mask.cpu().flatten().numpy()).tobytes().hex()


def provenance_of(model: HookedModel, task: Task) -> dict[str, JSON]:
    """The model as described and fingerprinted, versions, and the prompts of the task."""
    tokens = torch.cat([task.clean.content.flatten(), task.corrupt.content.flatten()])
    return provenance({**asdict(model.info), **model.fingerprint()}, tokens=tokens)
