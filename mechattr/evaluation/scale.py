"""The scale on which circuits are judged: 1 is the whole model, 0 the model with every edge ablated."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from mechattr.errors import MismatchError, SettingError
from mechattr.models.base import HookedModel

if TYPE_CHECKING:
    from mechattr.patching.circuit import Circuit
    from mechattr.patching.edge_artifact import EdgeAttribution
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


def check_graph(run: EdgeRun, edges: EdgeAttribution | Circuit) -> None:
    """Whether edges belong to the model's graph.

    Raises:
        MismatchError: they do not.
    """
    if edges.graph != run.graph:
        raise MismatchError(f"edges of {run.graph}", f"edges of {edges.graph}", "use scores or a circuit of this model")


def check_draws(random: Any) -> None:
    """Whether a number of random circuits is one.

    Raises:
        SettingError: it is not.
    """
    if isinstance(random, bool) or not isinstance(random, int) or random < 0:
        raise SettingError(f"random={random!r}", "no number of random circuits", "give a whole number from 0")
