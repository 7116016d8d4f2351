"""Which edges? A circuit as a graph: the input at the bottom, the logits on top."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from mechattr.draw.curves import apart
from mechattr.draw.routing import Line, Row, routes
from mechattr.draw.style import INK, RED_BLUE, SMALL_POINTS, UNMEASURED, limits, new_figure, style
from mechattr.errors import SettingError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    Edge = tuple[str, str, float]

# All lengths are inches
BOX, TALL, BETWEEN = 0.50, 0.2, 0.14  # width and height of a node, least distance between neighbours
GAPS = (0.16, 0.36)  # between rows, least and most
HEIGHT = 8.5  # of the graph, where the rows allow it
WIDTH = (2.6, 8.6)  # of the heads, where the rows allow it
COLUMN = 0.35  # between the heads and the MLPs
SIDE = 0.3  # room for edges beside the nodes
AROUND = (0.6, 1.45)  # what the layer numbers, and the caption and legend, need besides

POSITIVE, NEGATIVE = RED_BLUE[-2], RED_BLUE[1]
THIN, THICK = 0.8, 4.0  # points
DASHES = {"q": (0, (4.0, 1.6)), "k": (0, (1.1, 1.1)), "v": "solid", "": "solid"}
PORTS = {"q": (-0.42, -0.2), "k": (-0.1, 0.1), "v": (0.2, 0.42), "": (-0.4, 0.4)}  # where edges arrive, in box widths
BARS = ("input", "logits")
BAR_PORT = (-0.49, 0.49)
_NAME = re.compile(r"^(?:a(?P<layer>\d+)\.h(?P<head>\d+)(?:<(?P<kind>[qkv])>)?|m(?P<mlp>\d+)|input|logits)$")


@dataclass(frozen=True, slots=True)
class _End:
    """A node, and through what an edge enters it: its row is (layer, is MLP); the input is below, the logits above."""

    name: str
    row: tuple[float, bool]
    head: int
    kind: str


def circuit_graph(
    edges: Iterable[Edge], *, n_layers: int, group: int = 1, unit: str = "", limit: int = 60, ax: Axes | None = None
) -> Axes:
    """Which edges? Layers upward, heads to the right by index, MLPs in a column beside them.

    Width by |contribution|, linear up to the 99th percentile; blue where positive, red where negative, grey where not
    measured. Queries are dashed, keys dotted. Only the edges of largest |contribution| are drawn, those of exactly 0
    never, and nodes with such an edge; the others are counted above. Layers without a drawn node are left out.

    Args:
        edges: source, target and contribution: `"input"`, `"a0.h1"`, `"m0"` to `"a2.h3<q>"`, `"m1"`, `"logits"`.
        n_layers: number of blocks.
        group: how many heads share keys and values: `"a0.h1<k>"` enters heads `group` to `2 * group - 1`, and is drawn
            into the first of those that the graph shows.
        unit: unit of the contributions.
        limit: how many edges are drawn at most.
        ax: axes to draw into, best as large as `graph_size` says; a new figure without it.

    Raises:
        SettingError: a name that is no node, a layer that does not exist, or a limit below 1.
    """
    from matplotlib.patches import FancyBboxPatch, PathPatch, Rectangle
    from matplotlib.path import Path

    rows = list(edges)
    graph = _Layout(rows, group, limit)
    deepest = max((row[0] for row in graph.rows if math.isfinite(row[0])), default=-1)
    if deepest >= n_layers:
        raise SettingError(f"a graph of {n_layers} layers", f"a node in layer {deepest:g}", "layers count from 0")
    with style():
        if ax is None:
            ax = new_figure(*graph.size).add_subplot()
        left, right = graph.width
        ax.set(xlim=(left, right), ylim=(graph.bottoms[0] - 0.06, graph.bottoms[-1] + TALL + 0.06))
        for spine in ax.spines.values():
            spine.set_visible(False)
        _layers(ax, graph)
        shown = [value for *_, value in graph.drawn]
        bound = limits(np.array(shown, dtype=float)).bound
        paths = graph.paths()
        for (_, target, value), path in reversed(list(zip(graph.ends, paths, strict=True))):
            width = THIN + (THICK - THIN) * min(abs(value) / bound, 1.0) if math.isfinite(value) else THIN
            colour = UNMEASURED if math.isnan(value) else (POSITIVE if value > 0 else NEGATIVE)
            curve = Path(path, [Path.MOVETO] + [Path.CURVE4] * (len(path) - 1))
            casing = {"edgecolor": "white", "linewidth": width + 1.2, "alpha": 0.7}
            look = {"edgecolor": colour, "linewidth": width, "linestyle": DASHES[target.kind], "gid": "edge"}
            for drawn in (casing, look):  # the white below sets crossing edges apart
                ax.add_patch(PathPatch(curve, facecolor="none", capstyle="butt", zorder=3, **drawn))
        for name, (x, bottom, wide) in graph.boxes().items():
            bar = name in BARS
            shape = (
                Rectangle((x - wide / 2, bottom), wide, TALL, facecolor="#ececec", edgecolor="#999999", linewidth=0.8)
                if bar
                else FancyBboxPatch(
                    (x - wide / 2 + 0.05, bottom + 0.05), wide - 0.1, TALL - 0.1, "round,pad=0.05,rounding_size=0.05",
                    facecolor="white", edgecolor=INK, linewidth=0.8, mutation_aspect=1,
                )
            )  # fmt: skip
            shape.set(zorder=4, gid="node")
            ax.add_patch(shape)
            ax.text(
                x, bottom + TALL / 2, name, ha="center", va="center_baseline", fontsize=SMALL_POINTS, zorder=5,
                gid="node-name",
            )  # fmt: skip
        _legend(ax, bound, unit, graph, clipped=sum(abs(value) > bound for value in shown))
        ax.set_title(_caption(rows, graph), loc="left", fontsize=SMALL_POINTS + 1.5)
    return ax


def graph_size(edges: Iterable[Edge], *, group: int = 1, limit: int = 60) -> tuple[float, float]:
    """Width and height in inches of the figure that `circuit_graph` needs; errors are its errors."""
    return _Layout(list(edges), group, limit).size


def node_name(name: str) -> str:
    """A node as the graph names it, with how an edge enters it: "L0H1 q" for `"a0.h1<q>"`, "MLP 2" for `"m2"`.

    Raises:
        SettingError: a name that is no node.
    """
    end = _end(name)
    return f"{end.name} {end.kind}".rstrip()


class _Layout:
    """Where nodes stand: rows from the lowest up, and by row the middle of each node."""

    def __init__(self, edges: Sequence[Edge], group: int, limit: int) -> None:
        if limit < 1:
            raise SettingError("edges to draw", f"limit = {limit}", "draw at least 1")
        # strongest first, what was not measured last
        some = [edge for edge in edges if edge[2] != 0]
        self.drawn = sorted(some, key=lambda edge: -abs(edge[2]) if math.isfinite(edge[2]) else 1.0)[:limit]
        self.n_zero = len(edges) - len(some)
        pairs = _in_groups([(_end(source), _end(target), value) for source, target, value in self.drawn], group)
        heads = {end.head for pair in pairs for end in pair[:2]}
        wide = min(max((max(heads, default=0) + 1) * (BOX + BETWEEN), WIDTH[0]), WIDTH[1])
        rows: dict[tuple[float, bool], dict[str, int]] = {(-math.inf, False): {}, (math.inf, False): {}}
        for pair in pairs:
            for end in pair[:2]:
                if end.name not in BARS:
                    rows.setdefault(end.row, {})[end.name] = end.head
        self.rows = sorted(rows)
        self.ends, self.group = pairs, group
        fullest = max((len(nodes) for row, nodes in rows.items() if not row[1]), default=0)
        wide = max(wide, fullest * (BOX + BETWEEN) - BETWEEN)
        column = wide + COLUMN + BOX / 2
        has_column = any(row[1] for row in self.rows)
        self.width = (-SIDE, (column + BOX / 2 if has_column else wide) + SIDE)
        gap = min(max(HEIGHT / len(self.rows) - TALL, GAPS[0]), GAPS[1])
        self.bottoms = [index * (TALL + gap) for index in range(len(self.rows))]
        last = max(*heads, 1) if heads else 1
        self.middles: dict[str, float] = {}
        for row in self.rows:
            names = sorted(rows[row], key=lambda name: rows[row][name])
            wanted = np.array([BOX / 2 + rows[row][name] / last * (wide - BOX) for name in names])
            places = [column] * len(names) if row[1] else apart(wanted, BOX + BETWEEN, BOX / 2, wide - BOX / 2)
            self.middles.update(zip(names, map(float, places), strict=True))
        self.gap = gap

    @property
    def size(self) -> tuple[float, float]:
        """Of the figure, with caption and legend."""
        return max(self.width[1] - self.width[0], 4.6) + AROUND[0], self.bottoms[-1] + TALL + AROUND[1]

    def boxes(self) -> dict[str, tuple[float, float, float]]:
        """By node: middle, bottom, width."""
        whole = (self.width[0] + self.width[1]) / 2, self.width[1] - self.width[0]
        found = {BARS[0]: (whole[0], self.bottoms[0], whole[1]), BARS[1]: (whole[0], self.bottoms[-1], whole[1])}
        heights = dict(zip(self.rows, self.bottoms, strict=True))
        rows = {end.name: end.row for *ends, _ in self.ends for end in ends}
        return {**found, **{name: (x, heights[rows[name]], BOX) for name, x in self.middles.items()}}

    def paths(self) -> list[np.ndarray]:
        """The curve of each drawn edge."""
        boxes, index = self.boxes(), {row: i for i, row in enumerate(self.rows)}
        standing: list[list[tuple[float, float]]] = [[] for _ in self.rows]
        for x, bottom, wide in boxes.values():
            standing[self.bottoms.index(bottom)].append((x - wide / 2, x + wide / 2))
        rows = [Row(low, low + TALL, tuple(spans)) for low, spans in zip(self.bottoms, standing, strict=True)]
        lines = []
        for source, target, _ in self.ends:
            spans = []
            for end, kind in ((source, ""), (target, target.kind)):
                x, _, wide = boxes[end.name]
                low, high = BAR_PORT if end.name in BARS else PORTS[kind]
                spans.append((x + low * wide, x + high * wide))
            lines.append(Line(index[source.row], spans[0], index[target.row], spans[1]))
        return routes(rows, lines, self.width)


def _end(name: str) -> _End:
    match = _NAME.match(name)
    if match is None:
        raise SettingError(
            f"node {name!r} in a graph", "no such name", "use 'input', 'a0.h1', 'a0.h1<q>', 'm2' or 'logits'"
        )
    if match["head"] is not None:
        return _End(
            f"L{match['layer']}H{match['head']}",
            (float(match["layer"]), False),
            int(match["head"]),
            match["kind"] or "",
        )
    if match["mlp"] is not None:
        return _End(f"MLP {match['mlp']}", (float(match["mlp"]), True), 0, "")
    return _End(name, (-math.inf if name == BARS[0] else math.inf, False), 0, "")


def _in_groups(pairs: list[tuple[_End, _End, float]], group: int) -> list[tuple[_End, _End, float]]:
    """Edges into shared keys and values end at the first head of the group that another edge shows."""
    if group == 1:
        return pairs
    shown = {end.name for source, target, _ in pairs for end in (source, target) if target.kind == "q" or end is source}
    found = []
    for source, target, value in pairs:
        if target.kind in ("k", "v"):
            heads = range(target.head * group, (target.head + 1) * group)
            layer = f"L{target.row[0]:g}"
            head = next((head for head in heads if f"{layer}H{head}" in shown), heads[0])
            target = replace(target, name=f"{layer}H{head}", head=head)
        found.append((source, target, value))
    return found


def _layers(ax: Axes, graph: _Layout) -> None:
    """A number for each layer, and a faint ground behind every other one."""
    spans: dict[float, list[float]] = {}
    for (layer, _), bottom in zip(graph.rows, graph.bottoms, strict=True):
        if math.isfinite(layer):
            spans.setdefault(layer, []).append(bottom)
    for index, bottoms in enumerate(spans.values()):
        if index % 2 == 0:
            ax.axhspan(bottoms[0] - graph.gap / 2, bottoms[-1] + TALL + graph.gap / 2, color="#f7f7f7", zorder=0)
    middles = [(bottoms[0] + bottoms[-1] + TALL) / 2 for bottoms in spans.values()]
    ax.set_yticks(middles, [f"{layer:g}" for layer in spans])
    ax.set_xticks([])
    ax.tick_params(length=0)
    ax.set_ylabel("layer" if spans else "")


def _legend(ax: Axes, bound: float, unit: str, graph: _Layout, *, clipped: int) -> None:
    """Three columns of three: widths, signs, dashes."""
    from matplotlib.lines import Line2D

    def sample(label: str, width: float = 1.6, color: str = INK, dash: object = "solid") -> Line2D:
        return Line2D([], [], linewidth=width, color=color, linestyle=dash, label=label)

    suffix = f" {unit}" if unit else ""
    widths = [
        sample(f"{'≥ ' if share == 1 and clipped else ''}{share * bound:.2g}{suffix}", THIN + (THICK - THIN) * share)
        for share in (1.0, 0.5, 0.1)
    ]
    signs = [sample("positive", 2.4, POSITIVE), sample("negative", 2.4, NEGATIVE)]
    missing = any(not math.isfinite(value) for *_, value in graph.ends)
    signs.append(sample("not measured", 2.4, UNMEASURED) if missing else sample("", 0.0))
    dashes = [
        sample("into queries", dash=DASHES["q"]),
        sample("into keys", dash=DASHES["k"]),
        sample("into values, MLPs, logits"),
    ]
    ax.legend(
        handles=[*widths, *signs, *dashes], ncols=3, loc="upper left", bbox_to_anchor=(0.0, -0.005), frameon=False,
        fontsize=SMALL_POINTS, handlelength=2.6, columnspacing=1.4, labelspacing=0.35, borderpad=0.2,
        title="|contribution|, sign and kind of edge", title_fontsize=SMALL_POINTS, alignment="left",
    )  # fmt: skip


def _caption(edges: Sequence[Edge], graph: _Layout) -> str:
    """How many edges are drawn, and what the others amount to."""
    rest, zero = len(edges) - len(graph.drawn), graph.n_zero
    nodes = len({end.name for *ends, _ in graph.ends for end in ends})
    lines = [f"{len(graph.drawn)} edges between {nodes} nodes"]
    if zero == rest > 0:
        lines = [f"{lines[0]};", f"{zero} more {'has' if zero == 1 else 'have'} contribution 0, not drawn"]
    elif rest:
        total, shown = (float(np.nansum(np.abs([value for *_, value in some]))) for some in (edges, graph.drawn))
        share = f", with {100 * (total - shown) / total:.0f} % of the summed |contribution|" if total > 0 else ""
        of_zero = f", {zero} of contribution 0" if zero else ""
        lines = [f"the {len(graph.drawn)} strongest of {len(edges)} edges{of_zero};", f"{rest} are not drawn{share}"]
    if graph.group > 1 and any(target.kind in ("k", "v") for _, target, _ in graph.ends):
        lines.append(f"keys and values that {graph.group} heads share end at one of them")
    return "\n".join(lines)
