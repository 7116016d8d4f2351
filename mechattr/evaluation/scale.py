"""The scale on which circuits are judged: 1 is the whole model, 0 the model with every edge ablated."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from mechattr.errors import MismatchError, SettingError
from mechattr.models.base import HookedModel
from mechattr.patching.circuit import Circuit
from mechattr.patching.edge_artifact import EdgeAttribution
from mechattr.patching.interventions import whole_number
from mechattr.patching.places import Direction, direction_of
from mechattr.provenance import JSON

if TYPE_CHECKING:
    from mechattr.patching.edge_run import EdgeRun

SURE = 2.0  # standard errors that the gap must lie from 0, or f says nothing


def ratio(
    metric: Float[Tensor, "... pair"], whole: Float[Tensor, " pair"], empty: Float[Tensor, " pair"], model: HookedModel
) -> Float[Tensor, "..."]:
    """f of mean metrics: a ratio of means, since a mean of ratios would be ruled by pairs with a small gap.

    Raises:
        SettingError: no gap between the whole model and the empty circuit.
    """
    m, top, bottom = metric.mean(-1), whole.mean(), empty.mean()
    rounding = min(1000 * torch.finfo(getattr(torch, model.info.dtype)).eps, 0.01)
    if (top - bottom).abs() <= rounding * max(top.abs(), bottom.abs()):
        raise SettingError(
            f"the faithfulness of circuits over {whole.numel()} pairs",
            f"it is undefined: the mean metric is {top:.6g} with all edges and {bottom:.6g} with none",
            "choose pairs whose clean and corrupt metrics differ, such as task.rows(clean > corrupt)",
        )
    return (m - bottom) / (top - bottom)


def gap_of(whole: Float[Tensor, " pair"], empty: Float[Tensor, " pair"]) -> dict[str, float]:
    """The gap between the whole model and the empty circuit: its mean and standard error over pairs (NaN for one)."""
    gap, n = whole - empty, whole.numel()
    return {"mean": gap.mean().item(), "standard_error": gap.std().item() / math.sqrt(n) if n > 1 else math.nan}


def doubt(settings: Mapping[str, JSON]) -> str:
    """Why f is not meaningful: its denominator is less than 2 standard errors from 0. Empty where it is meaningful."""
    gap: Any = settings.get("gap")
    if not gap or gap["standard_error"] is None or abs(gap["mean"]) >= SURE * gap["standard_error"]:
        return ""
    metric: Any = settings.get("metric") or {}
    size = f"{gap['mean']:.3g} ± {gap['standard_error']:.2g} {metric.get('unit', '')}".rstrip()
    return f"The gap that f divides by, {size} over these pairs, cannot be told from 0, so f is not meaningful"


def scored_direction(edges: EdgeAttribution | Circuit, direction: str | None) -> Direction:
    """The direction in which edges were scored.

    Raises:
        UnknownNameError: no such direction.
        SettingError: another one is asked for.
    """
    known: Any = edges.settings.get("direction")
    asked = None if direction is None else direction_of(direction)
    if asked and known and asked != known:
        fix = f"leave direction out, or score the edges with direction={asked!r}"
        raise SettingError(f"direction={asked!r}", f"edges that were scored with direction={known!r}", fix)
    return asked or direction_of(known or "noising")


def counts_of(sizes: Sequence[float], n_edges: int) -> list[int]:
    """Shares as numbers of edges, ascending, each once and at least one edge.

    Raises:
        SettingError: no sizes, or one that is no share.
    """
    sizes = list(sizes) if isinstance(sizes, Iterable) else [sizes]
    bad = [size for size in sizes if isinstance(size, bool) or not isinstance(size, int | float) or not 0 < size <= 1]
    if bad or not len(sizes):
        found = repr(bad[0]) if bad else "an empty list"
        raise SettingError("sizes of circuits", found, "give shares of all edges above 0 and up to 1, such as 0.01")
    return sorted({max(1, round(size * n_edges)) for size in sizes})


def check_kind(edges: Any, kinds: tuple[type[EdgeAttribution | Circuit], ...]) -> None:
    """Whether edges are of one of these kinds.

    Raises:
        SettingError: they are something else.
    """
    if not isinstance(edges, kinds):
        fix = "give edge_attribution(...).circuit(top=50)" + ", or the scores" * (EdgeAttribution in kinds)
        raise SettingError("edges of a circuit", f"a {type(edges).__name__}", fix)


def check_graph(run: EdgeRun, edges: EdgeAttribution | Circuit) -> None:
    """Whether edges belong to the model's graph.

    Raises:
        MismatchError: they belong to another graph.
    """
    if edges.graph != run.graph:
        raise MismatchError(f"edges of {run.graph}", f"edges of {edges.graph}", "use scores or a circuit of this model")


def check_draws(random: Any, seed: Any) -> None:
    """Whether a number of random circuits and their seed are such.

    Raises:
        SettingError: one of them is not.
    """
    whole_number("seed", seed, 0)
    if isinstance(random, bool) or not isinstance(random, int) or random < 0:
        raise SettingError(f"random={random!r}", "no number of random circuits", "give a whole number from 0")
