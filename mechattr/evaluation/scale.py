"""The scale on which circuits are judged: 1 is the whole model, 0 the model with every edge ablated."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from mechattr.errors import MismatchError, SettingError
from mechattr.models.base import HookedModel
from mechattr.patching.circuit import Circuit
from mechattr.patching.edge_artifact import EdgeAttribution
from mechattr.patching.interventions import whole_number

if TYPE_CHECKING:
    from mechattr.patching.edge_run import EdgeRun


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


def check_graph(run: EdgeRun, edges: Any, kinds: tuple[type[EdgeAttribution | Circuit], ...]) -> None:
    """Whether edges are of one of these kinds, and belong to the model's graph.

    Raises:
        SettingError: they are something else.
        MismatchError: they belong to another graph.
    """
    if not isinstance(edges, kinds):
        fix = "give edge_attribution(...).circuit(top=50)" + ", or the scores" * (EdgeAttribution in kinds)
        raise SettingError("edges of a circuit", f"a {type(edges).__name__}", fix)
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
