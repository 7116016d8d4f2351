"""Scores of edges against a circuit that is known because it was built in."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Literal

from mechattr.errors import EmptyTaskError, MismatchError, SettingError

if TYPE_CHECKING:
    from mechattr.patching.edge_artifact import EdgeAttribution


def edge_auroc(
    edges: EdgeAttribution,
    truth: Collection[tuple[str, str]],
    by: Literal["score", "contribution", "abs_signed"] = "score",
) -> float:
    r"""How well scores tell the edges of a known circuit from all others: the area under the ROC curve.

    $$\mathrm{AUROC} = P(s_{\text{in}} > s_{\text{out}}) + \tfrac12 P(s_{\text{in}} = s_{\text{out}})$$

    over all pairs of an edge inside and an edge outside the circuit: 1 where every edge of the circuit scores higher
    than every other, 1/2 by chance. Only edges that were measured (not NaN) count.

    Args:
        edges: scores of edges.
        truth: the circuit's edges as (writer, reader); one that comes twice counts once. Prompt pairs reveal an edge
            only if its writer differs between the two prompts, so leave out edges that carry, say, positions alone.
        by: the table that ranks: `"score"`, `"contribution"` or `"abs_signed"`.

    Raises:
        UnknownNameError: no such writer, reader or measure.
        SettingError: two nodes that no edge joins.
        MismatchError: an edge of the circuit was not measured.
        EmptyTaskError: no edge in the circuit, or none outside it.

    Cost:
        No passes.

    References:
        Conmy et al. 2023, arXiv:2304.14997 (ROC curves over edges).
    """
    from sklearn.metrics import roc_auc_score

    graph, values = edges.graph, edges.measure(by).values
    measured = ~values.isnan()
    inside = measured & False
    for source, target in truth:
        place = graph.writer_index(source), graph.reader_index(target)
        if not graph.mask[place]:
            raise SettingError(f"edge {source} -> {target}", "the reader comes before the writer", "name a real edge")
        if not measured[place]:
            fix = "score all edges, or leave it out of the truth"
            raise MismatchError(f"edge {source} -> {target} of the circuit", "it was not measured", fix)
        inside[place] = True
    n, total = int(inside.sum()), int(measured.sum())
    if n in (0, total):
        found = f"{n} of {total} measured edges belong to the circuit"
        raise EmptyTaskError("a ROC curve", found, "have edges inside and outside the circuit")
    return float(roc_auc_score(inside[measured].numpy(), values[measured].double().numpy()))
