"""Which route? Tokens to the right, layers upward: the edges along which a prediction was made."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from mechattr.draw.style import INK, SMALL_POINTS, new_figure, style
from mechattr.draw.tokens import spell
from mechattr.errors import SettingError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# All lengths are inches
COLUMN = (0.2, 0.46)  # between tokens, least and most
WIDTH = 5.2  # of all tokens, where their number allows it
ROW = (0.13, 0.4)  # half a layer, least and most
HEIGHT = 6.0  # of all layers, where their number allows it
BULGE = 0.16  # how far edges within a column leave it
BESIDE = 0.045  # between edges of heads that go the same way
AROUND = (1.35, 1.3)  # what layer numbers and the legend, and tokens and prediction need besides

MANY = 40  # tokens; of longer prompts only those on the way are shown
LABELS = 14  # attention edges with their head written on them
THIN, THICK = 0.7, 4.2  # points
STREAM, MLP, BIAS, OTHER = "#b9b9b9", "#e08214", "#a08060", "#7f7f7f"
# Distinct on white, in print and for most colour-blind readers; none is the colour of an MLP
HEADS = (
    *("#1f6fb4", "#c0267e", "#1a9850", "#6a3d9a", "#d73027", "#17a2b8"),
    *("#8c6d00", "#5e3c58", "#7fa000", "#3949ab", "#a65628", "#006d5b"),
)


class RouteEdge(NamedTuple):
    """One edge: `into` is `resid_mid` or `resid_post`, `kind` attention, mlp, residual or bias; -1 is no head."""

    layer: int
    into: str
    query: int
    key: int
    kind: str
    head: int
    neuron: int
    weight: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteView:
    """What is drawn: a prompt, where its prediction is made, and the edges of its graph.

    Attributes:
        tokens: the prompt, as text.
        edges: the graph.
        n_layers: number of blocks.
        position: the column at which the graph ends, above the last layer.
        prediction, probability: the likeliest token there.
        threshold: least weight of an edge that is not its node's largest.
        parallel: MLPs read what the attention beside them reads.
    """

    tokens: Sequence[str]
    edges: Sequence[RouteEdge]
    n_layers: int
    position: int
    prediction: str
    probability: float
    threshold: float
    parallel: bool = False

    def source(self, edge: RouteEdge) -> tuple[int, str]:
        """Layer and half of the place that an edge comes from; `resid_post` of layer -1 are the tokens."""
        beside = edge.kind == "mlp" and self.parallel
        if edge.into == "resid_post" and not beside:
            return edge.layer, "resid_mid"
        return edge.layer - 1, "resid_post"


def head_colours(edges: Sequence[RouteEdge]) -> dict[int, str]:
    """A colour for each head that occurs, by index; grey for those that carry least, where there are too many."""
    total: Counter[int] = Counter()
    for edge in edges:
        if edge.kind == "attention":
            total[edge.head] += edge.weight  # type: ignore[assignment]
    strongest = sorted(head for head, _ in total.most_common(len(HEADS)))
    colours = dict(zip(strongest, HEADS, strict=False))
    return {head: colours.get(head, OTHER) for head in sorted(total)}


def route_map_size(view: RouteView) -> tuple[float, float]:
    """Width and height in inches of the figure that `route_map` needs."""
    return _Layout(view).size


def route_map(view: RouteView, *, ax: Axes | None = None) -> Axes:
    """Which route? From the tokens below to the prediction on top, along the edges of a graph of routes.

    Each layer has two rows of places: after attention, and, with larger squares, after the MLP. Width is the share of a
    part in the place it ends in. Attention edges have the colour of their head, and the strongest its number; edges of
    the stream are grey and straight, MLPs orange, biases stubs. Tokens without a route are grey; prompts of more than
    40 tokens leave them out.

    Args:
        view: a graph.
        ax: axes to draw into, best as large as `route_map_size` says; a new figure without it.

    Raises:
        SettingError: an edge that lies outside the prompt or the layers.
    """
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    for edge in view.edges:
        if not (0 <= edge.layer < view.n_layers and max(edge.query, edge.key) < len(view.tokens)):
            found = f"{len(view.tokens)} tokens and {view.n_layers} layers"
            raise SettingError(f"an edge {tuple(edge)}", found, "draw the edges of one prompt")
    layout = _Layout(view)
    with style():
        if ax is None:
            ax = new_figure(*layout.size).add_subplot()
        left, right = -0.3, layout.columns[-1] + 0.3
        ax.set(xlim=(left, right), ylim=(-0.12, layout.top + 0.12))
        for spine in ax.spines.values():
            spine.set_visible(False)
        _grounds(ax, layout, left, right)
        colours = head_colours(view.edges)
        for edge, corners in layout.curves():
            colour = {"mlp": MLP, "residual": STREAM, "bias": BIAS}.get(edge.kind) or colours[edge.head]
            width = THIN + (THICK - THIN) * min(edge.weight, 1.0)
            curve = Path(corners, [Path.MOVETO] + [Path.CURVE4] * 3)
            over = {"residual": 2.0, "bias": 2.1, "mlp": 2.2}.get(edge.kind, 2.3)
            look = {"edgecolor": colour, "linewidth": width, "capstyle": "butt", "zorder": over, "gid": edge.kind}
            ax.add_patch(PathPatch(curve, facecolor="none", alpha=0.9, **look))
        _nodes(ax, layout)
        _names(ax, layout, colours)
        _legend(ax, view, colours)
    return ax


class _Layout:
    """Where everything is."""

    def __init__(self, view: RouteView) -> None:
        self.view = view
        met = {view.position} | {place for edge in view.edges for place in (edge.query, edge.key)}
        self.met = met
        self.shown = sorted(met) if len(view.tokens) > MANY else list(range(len(view.tokens)))
        wide = float(np.clip(WIDTH / len(self.shown), *COLUMN))
        self.row = float(np.clip(HEIGHT / (2 * view.n_layers), *ROW))
        self.columns = np.arange(len(self.shown)) * wide
        self.x = dict(zip(self.shown, self.columns.tolist(), strict=True))
        self.wide = wide
        self.top = 2 * view.n_layers * self.row

    @cached_property
    def size(self) -> tuple[float, float]:
        """Width and height of the figure."""
        return float(self.columns[-1]) + 0.6 + AROUND[0], self.top + AROUND[1]

    def y(self, layer: int, into: str) -> float:
        """The height of a place; that of `resid_post` of layer -1 is that of the tokens."""
        return (2 * layer + (2 if into == "resid_post" else 1.3)) * self.row  # attention has more to show

    def curves(self) -> Iterator[tuple[RouteEdge, np.ndarray]]:
        """Edges, the weakest first, with the four corners of their curves."""
        edges = sorted(self.view.edges, key=lambda edge: edge.weight)
        along: Counter[tuple[int, str, int, int]] = Counter((e.layer, e.kind, e.query, e.key) for e in edges)
        drawn: Counter[tuple[int, str, int, int]] = Counter()
        for edge in edges:
            way = (edge.layer, edge.kind, edge.query, edge.key)
            aside = drawn[way] - (along[way] - 1) / 2
            drawn[way] += 1
            yield edge, self._curve(edge, aside, drawn[way])

    def _curve(self, edge: RouteEdge, aside: float, number: int) -> np.ndarray:
        over, under = self.x[edge.query], self.x[edge.key]
        top = self.y(edge.layer, edge.into)
        bottom = self.y(*self.view.source(edge))
        bulge = min(BULGE, 0.4 * self.wide)
        if edge.kind == "bias":
            start = np.array([over - bulge, top - 0.55 * self.row])
            return np.array([start, start, (over, top), (over, top)])
        if edge.kind == "mlp":
            out = over + bulge * (1.3 + 0.5 * (number - 1))
            return np.array([(over, bottom), (out, bottom), (out, top), (over, top)])
        if edge.kind == "attention" and edge.query == edge.key:
            out = over - bulge * (1.3 + 0.5 * (number - 1))
            return np.array([(over, bottom), (out, bottom), (out, top), (over, top)])
        shift = aside * BESIDE if edge.kind == "attention" else 0.0
        third = (top - bottom) * 0.55
        ends = (under + shift, over + shift)
        return np.array([(ends[0], bottom), (ends[0], bottom + third), (ends[1], top - third), (ends[1], top)])


def _grounds(ax: Axes, layout: _Layout, left: float, right: float) -> None:
    """A band and a number for each layer, and the tokens below."""
    view = layout.view
    for layer in range(view.n_layers):
        low, high = layout.y(layer - 1, "resid_post"), layout.y(layer, "resid_post")
        if layer % 2 == 0:
            ax.axhspan(low, high, color="#f5f6f8", zorder=0, linewidth=0)
    step = max(1, int(np.ceil(0.14 / (2 * layout.row))))
    layers = range(0, view.n_layers, step)
    ax.set_yticks([layout.y(layer, "resid_mid") for layer in layers], [f"L{layer}" for layer in layers])
    texts = [spell(view.tokens[place], longest=14) for place in layout.shown]
    flat = max(map(len, texts)) * 0.075 < layout.wide
    ax.set_xticks(layout.columns, texts, rotation=0 if flat else 60, fontsize=SMALL_POINTS + 0.5)
    for label, place in zip(ax.get_xticklabels(), layout.shown, strict=True):
        label.set_color(INK if place in layout.met else "#a0a0a0")
        if not flat:
            label.set(ha="right", rotation_mode="anchor")
        if place == view.position:
            label.set_fontweight("bold")
    ax.tick_params(length=0, pad=2)
    ax.set_xlim(left, right)


def _nodes(ax: Axes, layout: _Layout) -> None:
    """Squares at the places that are reached, and the prediction above the last one."""
    view = layout.view
    places = {(view.n_layers - 1, "resid_post", view.position)}
    for edge in view.edges:
        places.add((edge.layer, edge.into, edge.query))
        if edge.kind != "bias":
            places.add((*view.source(edge), edge.key))
    for into, size, face in (("resid_mid", 9, "white"), ("resid_post", 20, INK)):
        at = [(layout.x[place], layout.y(layer, half)) for layer, half, place in sorted(places) if half == into]
        if at:
            x, y = np.array(at).T
            ax.scatter(x, y, s=size, marker="s", c=face, edgecolors=INK, linewidths=0.7, zorder=4)
    says = f"{spell(view.prediction, longest=18)}  {view.probability:.0%}"
    end = layout.x[view.position]
    side = "center" if 0.5 < end < layout.columns[-1] - 0.5 else "right" if end > 0.5 else "left"
    shift = {"center": 0.0, "right": 0.25, "left": -0.25}[side]
    ax.annotate(
        says, (end, layout.top), (end + shift, layout.top + 0.1), fontsize=SMALL_POINTS + 1.5, fontweight="bold",
        ha=side, va="bottom", annotation_clip=False,
    )  # fmt: skip


def _names(ax: Axes, layout: _Layout, colours: dict[int, str]) -> None:
    """The head on the strongest attention edges, where there is room."""
    taken: list[tuple[float, float]] = []
    curves = [(edge, c) for edge, c in layout.curves() if edge.kind == "attention" and edge.head >= 0]
    for edge, corners in reversed(curves):
        if len(taken) == LABELS:
            return
        for share in (0.5, 0.38, 0.62, 0.28, 0.72):
            blend = np.array([(1 - share) ** 3, 3 * share * (1 - share) ** 2, 3 * share**2 * (1 - share), share**3])
            x, y = blend @ corners
            if all(abs(x - a) > 0.24 or abs(y - b) > 0.12 for a, b in taken):
                taken.append((x, y))
                ax.text(
                    x, y, f"H{edge.head}", fontsize=SMALL_POINTS - 0.5, color=colours[edge.head], ha="center",
                    va="center", zorder=5, bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.4, "alpha": 0.85},
                )  # fmt: skip
                break


def _legend(ax: Axes, view: RouteView, colours: dict[int, str]) -> None:
    from matplotlib.lines import Line2D

    kinds = {edge.kind for edge in view.edges}
    named = [(colour, "attention" if head < 0 else f"H{head}") for head, colour in colours.items() if colour != OTHER]
    named += [(OTHER, "other heads")] * (OTHER in colours.values())
    rest = (("mlp", MLP, "MLP"), ("residual", STREAM, "stream"), ("bias", BIAS, "bias"))
    named += [(colour, text) for kind, colour, text in rest if kind in kinds]
    handles = [Line2D([], [], color=colour, linewidth=2.2, label=text) for colour, text in named]
    handles.append(Line2D([], [], linestyle="none", label="share"))
    handles += [
        Line2D([], [], color=INK, linewidth=THIN + (THICK - THIN) * share, label=f"{share:g}")
        for share in (0.05, 0.2, 0.5, 1.0)
    ]
    ax.legend(
        handles=handles, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=SMALL_POINTS,
        handlelength=1.6, borderaxespad=0.2, labelspacing=0.35,
    )  # fmt: skip
    n = len(view.edges)
    ax.set_xlabel(f"{n} edges of at least {view.threshold:g}", loc="left", fontsize=SMALL_POINTS + 1)
