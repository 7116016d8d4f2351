"""A picture of a vocabulary: which tokens were never learned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from mechattr.draw.style import RED_BLUE, array, new_figure, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from mechattr.draw.style import Values

FLOOR = 1e-6  # probabilities below it are drawn there


def indicator_scatter(
    indicator: Values,
    probability: Values,
    *,
    unused: Sequence[bool] = (),
    label: str = "indicator",
    threshold: float = 0.01,
    ax: Axes | None = None,
) -> Axes:
    """Does the indicator find what the model cannot repeat? The probability of a repetition against the indicator for
    what was asked about, above the histogram of the indicator over all tokens.

    Args:
        indicator: [token], lower is less trained.
        probability: [token], NaN where the model was not asked.
        unused: [token], which are known to be unused.
        label: the name of the indicator.
        threshold: probability below which a token counts as under-trained, as a grey dashed line.
        ax: axes to draw into; a new figure without it.
    """
    x, y = array(indicator).ravel(), array(probability).ravel()
    asked, known = np.isfinite(y), np.zeros(len(x), dtype=bool) if not len(unused) else np.array(unused, dtype=bool)
    with style():
        if ax is None:
            ax = new_figure(5.6, 3.6).add_subplot()
        behind = ax.twinx()
        behind.hist(x, bins=60, color="#d9d9d9", zorder=0)
        behind.set(ylabel="tokens", yscale="log")
        behind.set_zorder(0)
        ax.set_zorder(1)
        ax.patch.set_visible(False)
        low = asked & (y < threshold)
        for which, colour, name in ((asked & ~low, RED_BLUE[-2], "repeated"), (low, RED_BLUE[1], "not repeated")):
            if which.any():
                text = f"{name} ({int(which.sum())})"
                ax.plot(x[which], np.maximum(y[which], FLOOR), ".", color=colour, markersize=5, label=text)
        if known.any():
            ax.plot(x[known], np.full(int(known.sum()), FLOOR), "|", color="#222222", label="known to be unused")
        ax.axhline(threshold, color="#888888", linewidth=0.9, linestyle="--")
        ax.set(yscale="log", ylim=(FLOOR / 2, 2), xlabel=f"{label} (lower: less trained)")
        ax.set_ylabel("largest probability of a repetition")
        if asked.any() or known.any():
            ax.legend(loc="lower right", frameon=True)
    return ax
