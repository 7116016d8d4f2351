"""What every patching result says about how it was made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from mechattr.models.base import HookedModel
from mechattr.provenance import JSON, provenance
from mechattr.tasks.task import Task


def settings_of(
    task: Task,
    *,
    method: str,
    direction: str,
    sites: Sequence[str],
    positions: str,
    clean: Tensor,
    corrupt: Tensor,
    passes: tuple[float, float],
    trivial: int,
    **more: Any,
) -> dict[str, Any]:
    """The settings of an `Attribution`; the metric's values on both runs, and the number of nodes whose activation is the
    same in both, so that their effect is zero by construction."""
    return {
        "method": method,
        "direction": direction,
        "sites": list(sites),
        "positions": positions,
        "task": task.name,
        "task_hash": task.hash(),
        "metric": {"name": task.metric.name, "unit": task.metric.unit},
        "n_pairs": len(task),
        "clean_metric": clean.tolist(),
        "corrupt_metric": corrupt.tolist(),
        "passes": {"forward": passes[0], "backward": passes[1]},
        "n_trivial_zero": trivial,
        **more,
    }


def provenance_of(model: HookedModel, task: Task) -> dict[str, JSON]:
    """The model as described and fingerprinted, versions, and the tokens of the task."""
    tokens = torch.cat([task.clean.tokens.flatten(), task.corrupt.tokens.flatten()])
    return provenance({**asdict(model.info), **model.fingerprint()}, tokens=tokens)
