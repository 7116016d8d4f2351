"""The figures of a report, from its results alone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mechattr import draw
from mechattr.artifact import Attribution
from mechattr.report.results import Results
from mechattr.sites import SITES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PANELS = {"resid_pre": "residual stream", "attn_out": "attention", "mlp_out": "MLP"}
MAPS = tuple(PANELS)
WHOLE = ("z", "mlp_out")


def figures(results: Results) -> dict[str, Figure]:
    """The figures by file name without suffix: `head_map`, `agreement`, `agreement_top`, where positions were told
    apart `position_map`, and of what was computed `bound`, `circuit` and `faithfulness`."""
    made = {"head_map": head_map(results)}
    if "pos" in results.attribution.scores[MAPS[0]].axes:
        made["position_map"] = position_map(results)
    made["agreement"] = agreement(results)
    made["agreement_top"] = agreement_top(results)
    if results.bound is not None and math.isfinite(results.bound.theta):
        made["bound"] = draw.new_figure(5.6, 3.4)
        results.bound.plot(made["bound"].add_subplot())
    if results.circuit is not None and results.faithfulness is not None:
        rows = list(results.circuit.to_pandas().itertuples(index=False, name=None))
        group = results.circuit.graph.n_heads // results.circuit.graph.n_kv_heads
        made["circuit"] = draw.new_figure(*draw.graph_size(rows, group=group))
        results.circuit.plot(made["circuit"].add_subplot())
        made["faithfulness"] = draw.new_figure(5.8, 3.4)
        results.faithfulness.plot(made["faithfulness"].add_subplot())
    return made


def save(results: Results, folder: Path) -> dict[str, Path]:
    """Writes every figure as PNG and SVG; returns the PNGs by name."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for name, figure in figures(results).items():
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # the layout is final: running it again for each file costs more than drawing
        draw.save(figure, folder / f"{name}.svg")
        paths[name] = draw.save(figure, folder / f"{name}.png")
    return paths


def head_map(results: Results) -> Figure:
    """Exact contribution of whole heads and MLPs, all positions replaced together."""
    effects = _by_name(results.whole_exact)
    ax = draw.head_map(
        effects["z"],
        effects.get("mlp_out"),
        label=f"contribution [{results.unit}]",
        title="Exact effect of whole heads and MLPs",
    )
    return ax.figure  # type: ignore[return-value]


def position_map(results: Results) -> Figure:
    """Estimated contribution of the residual stream, attention and MLP writes by position or span."""
    effects = _by_name(results.attribution)
    coords = list(results.attribution.scores[MAPS[0]].coords["pos"])
    named = any(isinstance(coord, str) for coord in coords)
    tokens = [coord if isinstance(coord, str) else results.tokens[coord] for coord in coords]
    axes = draw.position_map(
        {title: effects[site] for site, title in PANELS.items() if site in effects},
        tokens,
        label=f"contribution [{results.unit}]",
        spans=None if named else results.spans,
        column="span" if named else "token of the first pair",
    )
    return axes[0].figure  # type: ignore[return-value]


def agreement(results: Results) -> Figure:
    """Estimate against exact over every whole head and MLP."""
    nodes = sorted(results.whole_exact.nodes(), key=lambda node: WHOLE.index(node.site))
    ax = draw.scatter(
        [results.whole_attribution.value(node, "contribution") for node in nodes],
        [results.whole_exact.value(node, "contribution") for node in nodes],
        [node.label.removesuffix(" z") for node in nodes],
        groups=["head" if node.site == "z" else "MLP" for node in nodes],
        unit=results.unit,
        title="Every whole head and MLP",
    )
    return ax.figure  # type: ignore[return-value]


def agreement_top(results: Results) -> Figure:
    """Estimate against exact over the verified components."""
    order = list(SITES)
    nodes = sorted(results.verified, key=lambda node: order.index(node.site))
    ax = draw.scatter(
        [results.scored.value(node, "contribution") for node in nodes],
        [results.exact.value(node, "contribution") for node in nodes],
        [str(node) for node in nodes],
        groups=[node.site for node in nodes],
        unit=results.unit,
        title=f"The {len(nodes)} strongest by estimate",
    )
    return ax.figure  # type: ignore[return-value]


def _by_name(result: Attribution) -> dict[str, np.ndarray]:
    return {site: values.numpy() for site, values in result.contribution.items()}
