"""Pictures of whole results: what `Attribution.plot` shows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mechattr.draw.heatmap import head_map
from mechattr.draw.style import array, style
from mechattr.errors import SettingError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from mechattr.artifact import Attribution
    from mechattr.labelled import Labelled

CROSS_SITES = ("cross_z", "cross_result", "cross_q", "cross_v", "cross_k")
HEAD_SITES = ("z", "result", "q", "v", "k", "rot_q", "rot_k", *CROSS_SITES, "expert_out", "router_logits")
COLUMNS = ("head", "kv_head", "expert")
MLP_SITES = ("mlp_out", "mlp_post", "mlp_pre")
MERGED = {
    "pos": "position",
    "neuron": "neuron",
    "latent": "latent",
    "expert": "expert",
    "source": "source position",
}  # axes that the map sums over


def attribution(result: Attribution, ax: Axes | None = None) -> Axes:
    """Which heads and MLPs matter? The map of mean |effect|, summed over the positions (and neurons) of each.

    Magnitudes are shown, since effects of single positions may cancel in a signed sum. Nor do they add up to the effect
    of the whole head: patching with `positions="all"` measures that. Heads are those of z, or of the first site of a
    decoder with heads or experts; a result without such a site shows a column for each site.

    Args:
        result: scores with an axis "layer".
        ax: axes to draw into; pyplot's new figure without it, so that a notebook shows it.

    Raises:
        SettingError: the result has no scores by layer.
    """
    scores = {site: values for site, values in result.scores.items() if "layer" in values.axes}
    if not scores:
        found = f"scores of {', '.join(result.scores) or 'no site'}"
        raise SettingError("a plot by layer", found, "plot a result with a layer axis")
    heads = next((site for site in HEAD_SITES if site in scores), None)
    mlp = next((site for site in MLP_SITES if site in scores), None) if heads else None
    shown = [scores[site] for site in (heads, mlp) if site] if heads else list(scores.values())
    kept = next((axis for axis in COLUMNS if heads and axis in scores[heads].axes), None)
    metric: Any = result.settings.get("metric") or {}
    merged = [f"{name}s" for axis, name in MERGED.items() if axis != kept and any(axis in x.axes for x in shown)]
    unit = f" [{metric['unit']}]" if metric.get("unit") else ""
    label = f"mean |effect|{unit}" if not merged else f"mean |effect| summed over\n{' and '.join(merged)}{unit}"
    layers = sorted({int(layer) for values in shown for layer in values.coords["layer"]})
    if ax is None:
        import matplotlib.pyplot as plt

        columns = shown[0].shape[-1] if heads else len(shown)
        with style():
            size = (min(max(0.55 * columns + 3.2, 5.6), 9.5), min(max(0.34 * len(layers) + 1.2, 3.0), 9.0))
            ax = plt.figure(figsize=size, layout="constrained").add_subplot()
    if heads is None or kept is None:
        grid = np.stack([_by_layer(values, layers) for values in scores.values()], axis=1)
        drawn = head_map(grid, label=label, signed=False, layers=layers, column="site", n_outlined=0, ax=ax)
        drawn.set_xticks(range(len(scores)), list(scores), rotation=0 if len(scores) < 5 else 45)
        return drawn
    column = f"{kept.replace('_', ' ')} ({heads})"
    side = None if mlp is None else _by_layer(scores[mlp], layers)
    return head_map(
        _by_layer(scores[heads], layers, kept), side, label=label, signed=False, layers=layers, column=column, ax=ax
    )


def _by_layer(values: Labelled, layers: Sequence[int], *keep: str) -> np.ndarray:
    """[layer, *keep] at some layers: summed over all other axes; NaN only where nothing was measured."""
    order: Sequence[str] = ("layer", *keep)
    others = [axis for axis in values.axes if axis not in order]
    grid = np.transpose(array(values), [values.axes.index(axis) for axis in (*order, *others)])
    flat = grid.reshape(*grid.shape[: len(order)], -1)
    found = np.where(np.isfinite(flat).any(-1), np.nansum(np.where(np.isfinite(flat), flat, 0.0), -1), np.nan)
    whole = np.full((len(layers), *found.shape[1:]), np.nan)
    whole[[layers.index(int(layer)) for layer in values.coords["layer"]]] = found
    return whole
