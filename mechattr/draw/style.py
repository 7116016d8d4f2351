"""How every figure looks: fonts, ground, colours, limits and saving."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colorbar import Colorbar
    from matplotlib.colors import Colormap, Normalize
    from matplotlib.figure import Figure

    from mechattr.labelled import Labelled

    Values = np.ndarray | Tensor | Labelled | Sequence[float]

DPI = 150
TICK_POINTS = 9.0
LABEL_POINTS = 10.0
SMALL_POINTS = 7.5
UNMEASURED = "#d9d9d9"
INK = "#222222"
# The colours of ColorBrewer's RdBu and Blues, with a middle (or start) that is exactly white: matplotlib's own maps are
# a light grey there, which makes "no effect" look like something.
RED_BLUE = "#67001f #b2182b #d6604d #f4a582 #fddbc7 #ffffff #d1e5f0 #92c5de #4393c3 #2166ac #053061".split()
BLUES = "#ffffff #deebf7 #c6dbef #9ecae1 #6baed6 #4292c6 #2171b5 #08519c #08306b".split()
SPAN_TINTS = ("#fde9b8", "#cfe8cf", "#e3d6f0", "#cfe5f5", "#f9d5d5", "#e6e2c8", "#d5efe9", "#eedbe8")

_RC: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": TICK_POINTS,
    "xtick.labelsize": TICK_POINTS,
    "ytick.labelsize": TICK_POINTS,
    "axes.labelsize": LABEL_POINTS,
    "axes.titlesize": LABEL_POINTS,
    "legend.fontsize": TICK_POINTS,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.edgecolor": INK,
    "axes.facecolor": "white",
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "savefig.transparent": False,
    "savefig.dpi": DPI,
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "svg.fonttype": "path",
    "svg.hashsalt": "mechattr",
}


@contextmanager
def style() -> Iterator[None]:
    """The look of all figures, for the time of a `with` block: matplotlib's settings are the same after as before."""
    import matplotlib

    with matplotlib.rc_context(_RC):
        yield


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Colour limits: `bound` in the unit of the values, and how many of the measured values lie beyond it."""

    bound: float
    n_clipped: int
    n_values: int

    @property
    def clipped_share(self) -> float:
        """Share of the measured values whose magnitude is above `bound`, from 0 to 1."""
        return self.n_clipped / self.n_values if self.n_values else 0.0

    @property
    def note(self) -> str:
        """One phrase for the colour bar, empty when nothing is clipped."""
        return f"{self.n_clipped} of {self.n_values} clipped" if self.n_clipped else ""


def array(values: Values) -> np.ndarray:
    """Values of any of our kinds as float64 numpy, NaN where not measured."""
    if isinstance(values, Tensor):
        values = values.detach().cpu().double()  # numpy has no bfloat16
    return np.asarray(values.numpy() if hasattr(values, "numpy") else values, dtype=np.float64)


def limits(*values: Values) -> Limits:
    """Symmetric limits at the 99th percentile of |value|, over all arrays together.

    With fewer than 100 values the percentile is the second largest, so that one outlier never blanks the rest. Values
    that are not finite count as not measured.

    Args:
        values: arrays of any shape.
    """
    flat = np.concatenate([np.abs(array(v)).ravel() for v in values])
    flat = flat[np.isfinite(flat)]
    if not flat.size or not flat.max() > 0:
        return Limits(bound=1.0, n_clipped=0, n_values=int(flat.size))
    bound = float(np.percentile(flat, 99, method="lower")) or float(flat.max())
    return Limits(bound=bound, n_clipped=int((flat > bound).sum()), n_values=int(flat.size))


def colours(bound: float, *, signed: bool) -> tuple[Colormap, Normalize]:
    """Colour map and scale: red to blue over [-bound, bound], or white to blue over [0, bound]; exactly 0 is white."""
    from matplotlib.colors import LinearSegmentedColormap, Normalize

    names = RED_BLUE if signed else BLUES
    # an odd number of steps, so that the middle one is the middle colour itself
    cmap = LinearSegmentedColormap.from_list("mechattr", names, N=257).with_extremes(bad=UNMEASURED)
    return cmap, Normalize(-bound if signed else 0.0, bound)


def ink_on(rgba: tuple[float, ...]) -> str:
    """Black or white, whichever reads better on a ground (relative luminance)."""
    red, green, blue = rgba[:3]
    return "white" if 0.2126 * red + 0.7152 * green + 0.0722 * blue < 0.45 else INK


def new_figure(width: float, height: float) -> Figure:
    """A figure of its own, in inches, that no pyplot state knows about (for files; notebooks get pyplot's)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def pyplot_axes(width: float, height: float) -> Axes:
    """Axes in pyplot's new figure, in inches, which a notebook shows."""
    import matplotlib.pyplot as plt

    with style():
        return plt.figure(figsize=(width, height), layout="constrained").add_subplot()


def colour_bar(
    axes: list[Axes], cmap: Colormap, norm: Normalize, label: str, bounds: Limits, *, gaps: bool
) -> Colorbar:
    """One slim colour bar beside all axes, with its unit, and arrows and a note where values are clipped.

    Args:
        axes: the axes that share it.
        cmap: colour map.
        norm: scale.
        label: what the colour means, `"name [unit]"`.
        bounds: the limits behind `norm`.
        gaps: some cells are grey, and the label says why.
    """
    from matplotlib.cm import ScalarMappable

    figure = axes[0].figure
    boxes = [ax.get_position() for ax in axes]
    height = (max(box.y1 for box in boxes) - min(box.y0 for box in boxes)) * figure.bbox.height / figure.dpi
    if max(map(len, label.splitlines())) * 0.6 * LABEL_POINTS > height * 72:
        label = label.replace(" [", "\n[")
    notes = [bounds.note] * bool(bounds.n_clipped) + ["grey: not measured"] * gaps
    extend = ("both" if float(norm.vmin or 0.0) < 0 else "max") if bounds.n_clipped else "neither"
    bar = figure.colorbar(
        ScalarMappable(norm, cmap), ax=axes, extend=extend, aspect=height / 0.14, extendfrac=0.12 / height, pad=0.02
    )
    bar.set_label("\n".join([label, *notes]))
    bar.outline.set_linewidth(0.6)
    return bar


def save(figure: Figure, path: Path) -> Path:
    """Writes a figure on opaque white, as PNG (150 dpi) or SVG by the suffix; nothing in the file varies by day."""
    metadata = {"Date": None} if path.suffix == ".svg" else {"Software": None}
    with style():
        figure.savefig(path, dpi=DPI, facecolor="white", metadata=metadata)
    return path
