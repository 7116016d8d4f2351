"""The graph of a circuit and the curves: what is drawn, what it says, and that lines keep clear of boxes and text."""

from __future__ import annotations

import re
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from mechattr import draw
from mechattr.draw.curves import apart
from mechattr.draw.graph import NEGATIVE, POSITIVE, circuit_graph, graph_size, node_name
from mechattr.draw.labels import along_lines, overlap
from mechattr.draw.routing import Line, Row, routes
from mechattr.draw.style import SMALL_POINTS, UNMEASURED
from mechattr.errors import SettingError
from mechattr.patching.graph import Graph

TINY, GPT2, GROUPED = Graph(4, 4, 4, True, False), Graph(12, 12, 12, True, False), Graph(2, 4, 2, True, False)


def some_edges(graph: Graph, n: int, seed: int = 0) -> list[tuple[str, str, float]]:
    """Edges of a few busy nodes, with heavy-tailed contributions of both signs."""
    rng = np.random.default_rng(seed)
    busy = rng.standard_t(3, size=(len(graph.writers), 1)) * rng.standard_t(3, size=(1, len(graph.readers)))
    weight = np.where(graph.mask.numpy(), np.abs(busy), 0.0)
    places = np.argsort(-weight, axis=None)[:n]
    values = rng.standard_t(2, size=n) * 0.1
    rows, columns = np.unravel_index(places, weight.shape)
    return [(graph.writers[i], graph.readers[j], float(v)) for i, j, v in zip(rows, columns, values, strict=True)]


def by_gid(ax: Any, gid: str) -> list[Any]:
    return ax.findobj(lambda artist: artist.get_gid() == gid)


def names(ax: Any) -> set[str]:
    return {text.get_text() for text in by_gid(ax, "node-name")}


def boxes_of(artists: list[Any]) -> list[Any]:
    return [artist.get_window_extent() for artist in artists]


def overlapping(artists: list[Any]) -> bool:
    return any(overlap(one, other) > 2.0 for one, other in combinations(boxes_of(artists), 2))


# --- the graph


def test_the_graph_shows_the_nodes_of_drawn_edges_by_the_names_that_users_type() -> None:
    edges = [("input", "a0.h1<k>", 0.5), ("a0.h1", "m2", -0.2), ("m2", "logits", 0.1), ("input", "a3.h0<q>", 0.001)]
    ax = circuit_graph(edges, n_layers=4, unit="logit")
    assert names(ax) == {"input", "logits", "L0H1", "MLP 2", "L3H0"}
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["0", "2", "3"]
    assert ax.get_title("left") == "4 edges between 5 nodes"
    fewer = circuit_graph(edges, n_layers=4, limit=3)
    assert names(fewer) == {"input", "logits", "L0H1", "MLP 2"}


@pytest.mark.parametrize("limit", [60, 200])
def test_at_most_so_many_edges_are_drawn_and_the_rest_are_counted(limit: int) -> None:
    edges = some_edges(GPT2, 230)
    ax = circuit_graph(edges, n_layers=12, limit=limit)
    assert len(by_gid(ax, "edge")) == limit
    sizes = sorted((abs(value) for *_, value in edges), reverse=True)
    share = f"{100 * sum(sizes[limit:]) / sum(sizes):.0f} %"
    assert ax.get_title("left") == (
        f"the {limit} strongest of 230 edges;\n{230 - limit} are not drawn, with {share} of the summed |contribution|"
    )


def test_width_grows_with_the_magnitude_and_colour_is_the_sign() -> None:
    values = [0.9, -0.7, 0.5, -0.3, 0.1, -0.05, 0.0, float("nan")]
    edges = [("input", f"a{i // 4}.h{i % 4}<v>", value) for i, value in enumerate(values)]
    drawn = by_gid(circuit_graph(edges[::-1], n_layers=2), "edge")[::-1]  # the strongest lies on top
    widths = [patch.get_linewidth() for patch in drawn]
    assert all(a >= b for a, b in pairwise(widths))
    assert np.allclose(np.diff(widths[1:7]) / np.diff(np.abs(values[1:7])), (widths[1] - widths[5]) / 0.65), "linear"
    colours = [to_hex(patch.get_edgecolor()) for patch in drawn]
    assert colours == [POSITIVE, NEGATIVE, POSITIVE, NEGATIVE, POSITIVE, NEGATIVE, UNMEASURED]


def test_edges_that_contribute_nothing_are_counted_but_not_drawn_as_positive() -> None:
    edges = [("input", "m0", 0.5), ("m0", "logits", -0.5), ("input", "a0.h0<v>", 0.0), ("a0.h0", "logits", -0.0)]
    ax = circuit_graph(edges, n_layers=1)
    assert names(ax) == {"input", "logits", "MLP 0"}
    assert [to_hex(patch.get_edgecolor()) for patch in by_gid(ax, "edge")[::-1]] == [POSITIVE, NEGATIVE]
    assert ax.get_title("left") == "2 edges between 3 nodes;\n2 more have contribution 0, not drawn"
    assert circuit_graph(edges[:3], n_layers=1).get_title("left").endswith("1 more has contribution 0, not drawn")
    assert circuit_graph(edges, n_layers=1, limit=1).get_title("left") == (
        "the 1 strongest of 4 edges, 2 of contribution 0;\n3 are not drawn, with 50 % of the summed |contribution|"
    )
    assert circuit_graph(edges[2:], n_layers=1).get_title("left").startswith("0 edges between 0 nodes;\n2 more")


def test_nodes_are_named_as_in_the_graph() -> None:
    assert [node_name(name) for name in ("a0.h1<q>", "a10.h2", "m3", "logits")] == [
        "L0H1 q",
        "L10H2",
        "MLP 3",
        "logits",
    ]
    with pytest.raises(SettingError, match="no such name"):
        node_name("L0H1")


def test_queries_keys_and_values_are_told_apart_by_dash() -> None:
    edges = [("input", f"a0.h0<{kind}>", value) for kind, value in (("q", 3.0), ("k", 2.0), ("v", 1.0))]
    ax = circuit_graph([*edges, ("input", "m0", 0.5)], n_layers=1)
    query, key, value, mlp = (patch.get_linestyle() for patch in by_gid(ax, "edge")[::-1])
    assert value == mlp == "solid"
    assert len({str(style) for style in (query, key, value)}) == 3
    legend = {text.get_text() for text in ax.get_legend().get_texts()}
    assert {"into queries", "into keys", "into values, MLPs, logits", "positive", "negative"} <= legend


CASES = [(TINY, 40, 60), (TINY, 200, 200), (GPT2, 230, 60), (GPT2, 230, 200)]


@pytest.mark.parametrize(("graph", "n", "limit"), CASES)
def test_no_label_overlaps_and_each_lies_in_its_box(graph: Graph, n: int, limit: int) -> None:
    ax = circuit_graph(some_edges(graph, n), n_layers=graph.n_layers, limit=limit)
    ax.figure.draw_without_rendering()
    labels, nodes = by_gid(ax, "node-name"), by_gid(ax, "node")
    assert len(labels) == len(nodes) > 5
    assert not overlapping(nodes)
    assert not overlapping([*labels, ax.title, *ax.get_yticklabels(), *ax.get_legend().get_texts()])
    for label, box in zip(boxes_of(labels), boxes_of(nodes), strict=True):
        assert overlap(label, box) >= 0.999 * label.width * label.height
    assert min(text.get_fontsize() for text in (*labels, *ax.get_legend().get_texts())) >= 7


def crossings(ax: Any) -> list[tuple[int, int]]:
    """Edges (by place) that pass through a node (by place) at which they neither begin nor end."""
    boxes = [node.get_path().transformed(node.get_patch_transform()).get_extents() for node in by_gid(ax, "node")]
    found = []
    for number, patch in enumerate(by_gid(ax, "edge")):
        points = np.concatenate([sub for sub in patch.get_path().to_polygons(closed_only=False)])
        line = np.concatenate([np.linspace(a, b, 5) for a, b in pairwise(points)])
        for place, box in enumerate(boxes):
            inside = (np.abs(line - (box.min + box.max) / 2) < (box.max - box.min) / 2 - 0.005).all(1)
            if inside.any():
                found.append((number, place))
    return found


@pytest.mark.parametrize(("graph", "n", "limit"), CASES)
def test_edges_avoid_the_nodes_between_their_ends(
    graph: Graph, n: int, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    edges = some_edges(graph, n)
    assert not crossings(circuit_graph(edges, n_layers=graph.n_layers, limit=limit))

    def straight(rows: list[Row], lines: list[Line], width: object) -> list[np.ndarray]:
        ends = [
            [(np.mean(line.leaves), rows[line.start].top), (np.mean(line.arrives), rows[line.end].bottom)]
            for line in lines
        ]
        return [np.linspace(start, end, 4) for start, end in ends]

    monkeypatch.setattr("mechattr.draw.graph.routes", straight)
    assert crossings(circuit_graph(edges, n_layers=graph.n_layers, limit=limit)), "straight lines cut through nodes"


def test_shared_keys_end_at_a_head_of_their_group() -> None:
    edges = [("input", "a0.h1<k>", 1.0), ("a0.h3", "logits", 0.5)]
    assert names(circuit_graph(edges, n_layers=1, group=2)) == {"input", "logits", "L0H3"}
    assert names(circuit_graph(edges[:1], n_layers=1, group=2)) == {"input", "logits", "L0H2"}
    title = circuit_graph(edges, n_layers=1, group=2).get_title("left")
    assert title == "2 edges between 3 nodes\nkeys and values that 2 heads share end at one of them"
    assert names(circuit_graph(edges, n_layers=1)) == {"input", "logits", "L0H1", "L0H3"}


def test_layers_go_up_and_heads_to_the_right() -> None:
    ax = circuit_graph(some_edges(TINY, 60), n_layers=4)
    where = {text.get_text(): text.get_position() for text in by_gid(ax, "node-name")}
    heads = {tuple(map(int, re.findall(r"\d+", name))): at for name, at in where.items() if name.startswith("L")}
    for (one, a), (other, b) in combinations(heads.items(), 2):
        assert np.sign(a[1] - b[1]) == np.sign(one[0] - other[0])
        assert one[0] != other[0] or np.sign(a[0] - b[0]) == np.sign(one[1] - other[1])
    assert where["input"][1] == min(y for _, y in where.values())
    assert where["logits"][1] == max(y for _, y in where.values())
    mlps = [at for name, at in where.items() if name.startswith("MLP")]
    assert len({x for x, _ in mlps}) == 1
    assert mlps[0][0] > max(x for x, _ in heads.values())


def test_the_picture_of_a_circuit_is_the_same_each_time(tmp_path: Path) -> None:
    files = []
    for name in ("one.png", "two.png"):
        files.append(draw.save(circuit_graph(some_edges(TINY, 50), n_layers=4).figure, tmp_path / name).read_bytes())
    assert files[0] == files[1]
    other = draw.save(circuit_graph(some_edges(TINY, 50, seed=1), n_layers=4).figure, tmp_path / "three.png")
    assert other.read_bytes() != files[0]


def test_nothing_can_be_drawn_too() -> None:
    ax = circuit_graph([], n_layers=2)
    assert names(ax) == {"input", "logits"}
    assert ax.get_title("left") == "0 edges between 0 nodes"


def test_the_figure_has_the_size_that_was_announced() -> None:
    edges = some_edges(GPT2, 100)
    assert tuple(circuit_graph(edges, n_layers=12).figure.get_size_inches()) == graph_size(edges)


@pytest.mark.parametrize(
    ("edges", "more", "said"),
    [
        ([("a0.h0", "q3", 1.0)], {}, "use 'input', 'a0.h1', 'a0.h1<q>', 'm2' or 'logits'"),
        ([("input", "m5", 1.0)], {}, "a node in layer 5"),
        ([("input", "m0", 1.0)], {"limit": 0}, "draw at least 1"),
    ],
)
def test_graphs_that_cannot_be_drawn(edges: Any, more: dict[str, int], said: str) -> None:
    with pytest.raises(SettingError, match=re.escape(said)):
        circuit_graph(edges, n_layers=4, **more)


def test_routes_go_straight_where_they_can_and_apart_from_each_other() -> None:
    rows = [Row(0.0, 0.2, ((0.0, 4.0),)), Row(0.5, 0.7, ((1.0, 2.0),)), Row(1.0, 1.2, ((0.0, 4.0),))]
    wanted = [((3.0, 3.0), (3.0, 3.0)), ((1.5, 1.5), (1.5, 1.5)), ((0.0, 4.0), (3.0, 3.0))]
    free, blocked, again = routes(rows, [Line(0, leaves, 2, arrives) for leaves, arrives in wanted], (0.0, 4.0))
    assert np.allclose(free[:, 0], 3.0, atol=0.021)  # half a lane
    between = blocked[(blocked[:, 1] >= 0.5) & (blocked[:, 1] <= 0.7), 0]
    assert ((between < 0.95 + 0.021) | (between > 2.05 - 0.021)).all()
    assert (np.abs(again[2:-2, 0] - 3.0) > 0.03).any(), "the second line into one place takes another lane"


# --- curves


def bound(theta_star: float = 0.1, verified: Any = (0.3, -0.2, 0.05, float("nan"))) -> Any:
    theta = np.linspace(0, 0.2, 50)
    return draw.bound_curve(
        theta, np.exp(-((theta / 0.0466) ** 2)), theta_star=theta_star, confidence=0.99, verified=verified, unit="logit"
    )


def test_the_bound_is_marked_with_its_value_and_verified_effects_lie_on_the_same_axis() -> None:
    ax = bound()
    (star,), (line,), (rug,), (count,) = (by_gid(ax, name) for name in ("star-name", "theta-star", "rug", "rug-name"))
    assert star.get_text().splitlines()[0] == "θ* = 0.1 logit"
    assert "99 % confidence" in star.get_text()
    assert list(line.get_xdata()) == [0.1, 0.1]
    assert sorted(segment[0, 0] for segment in rug.get_segments()) == [0.05, 0.2, 0.3]
    assert count.get_text() == "3 verified nodes, 2 above θ*"
    assert (ax.get_xlabel(), ax.get_xscale(), ax.get_yscale()) == ("|effect| θ [logit]", "linear", "log")
    ax.figure.draw_without_rendering()
    assert not overlapping([*ax.texts])


def test_effects_far_above_the_bound_are_drawn_on_a_log_axis() -> None:
    assert bound(verified=[3.0]).get_xscale() == "log"
    assert bound(verified=[1.0]).get_xscale() == "linear"
    assert not by_gid(bound(verified=[]), "rug")


def test_discovery_draws_a_mean_and_a_band_for_each_method() -> None:
    x = np.array([1.0, 2.0, 4.0, 8.0])
    ours = np.array([[0.5, 0.5, 1.0, 1.0], [0.0, 1.0, 1.0, 1.0]])
    late = np.array([np.nan, np.nan, 0.25, 0.75])
    ax = draw.discovery_curve({"ours": ours, "late": late}, x, k=2, random=x / 8, cost="passes")
    first, second = by_gid(ax, "method")
    assert np.allclose(first.get_ydata(), [0.25, 0.75, 1.0, 1.0])
    assert np.allclose(second.get_ydata(), late, equal_nan=True)
    assert np.allclose(by_gid(ax, "ideal")[0].get_ydata(), [0.5, 1.0, 1.0, 1.0])
    (chance,) = by_gid(ax, "random")
    assert chance.get_linestyle() == "--"
    assert len(ax.collections) == 1  # the band of the method with pairs
    assert [text.get_text() for text in ax.get_legend().get_texts()] == [
        "ours\nall 2 after 4", "late\n75 % at most", "random order", "ideal",
    ]  # fmt: skip
    assert (ax.get_xscale(), ax.get_xlabel()) == ("log", "passes (log)")


def test_faithfulness_names_both_levels_and_the_areas() -> None:
    sizes, ours = [1, 10, 100, 1000], [0.0, 0.4, 1.2, 1.0]
    random = np.array([[0.0, 0.0, 0.1, 1.0], [0.0, 0.1, 0.3, 1.0]])
    ax = draw.faithfulness_curve(sizes, ours, random=random, cpr=1.134, cmd=0.0871, crossing=75)
    assert np.allclose(by_gid(ax, "circuit")[0].get_ydata(), ours)
    assert np.allclose(by_gid(ax, "random")[0].get_ydata(), random.mean(0))
    assert {line.get_ydata()[0] for line in by_gid(ax, "level")} == {0.0, 1.0}
    assert ax.get_title("left") == "CPR 1.13, CMD 0.0871"
    assert by_gid(ax, "crossing")[0].get_text() == "reaches 1 by 75 edges"
    assert len(ax.collections) == 1
    ax.figure.draw_without_rendering()
    assert not overlapping([*ax.texts])
    bare = draw.faithfulness_curve([5], [0.3], note="f is not meaningful")
    assert bare.get_title("left") == "f is not meaningful"


SIZES = [32, 65, 162, 325, 650, 1625, 3249, 6498, 16246, 32491]
SHAPES = {
    "rising": [0.0, 0.1, 0.28, 0.45, 0.7, 0.93, 1.15, 1.22, 1.1, 1.0],
    "at once": [1.0] * 10,
    "a hair below": [0.0, 0.2, 0.9, 0.9995, 0.9995, 1.0, 1.0, 1.0, 1.0, 1.0],
    "humped": [0.9, 0.99, 0.4, 0.2, 0.99, 1.4, 0.8, 0.9, 0.95, 1.0],
}


@pytest.mark.parametrize("shape", SHAPES)
def test_the_circle_lies_on_the_line_and_no_name_on_any_line(shape: str) -> None:
    values = np.array(SHAPES[shape])
    first = int(np.flatnonzero(values >= 0.999)[0])
    random = np.clip(np.linspace(-1, 1, 10) ** 3, -0.02, 1) * np.ones((3, 1))
    ax = draw.faithfulness_curve(SIZES, values, random=random, crossing=SIZES[first])
    ((x,), (y,)) = by_gid(ax, "reached")[0].get_data()
    assert np.interp(np.log(x), np.log(SIZES), values) == pytest.approx(y, abs=1e-9)
    assert y == pytest.approx(1.0, abs=1e-3)
    on_size = np.interp(np.log(SIZES[first]), np.log(SIZES), values)
    if shape in ("rising", "humped"):
        assert abs(on_size - 1.0) > 0.1, "a circle at the size that reached 1 and at height 1 would lie off the line"
    figure = ax.figure
    figure.draw_without_rendering()
    boxes = boxes_of([*by_gid(ax, "line-name"), *by_gid(ax, "crossing")])
    leaders = [line for line in ax.get_lines() if line.get_linewidth() == 0.5]
    for leader in leaders:
        leader.remove()
    points = ax.transData.transform(along_lines(ax))
    assert len(boxes) == 3
    for box in boxes:
        assert not ((points > [box.x0, box.y0]) & (points < [box.x1, box.y1])).all(1).any()
    assert not overlapping(texts(ax))


def texts(ax: Any) -> list[Any]:
    """What is written in and above the axes."""
    return [text for text in (*ax.texts, ax._left_title) if text.get_text()]


def inside(ax: Any) -> bool:
    """Whether no text and no marker reaches over the figure's edge."""
    figure = ax.figure
    figure.draw_without_rendering()
    boxes = boxes_of([*texts(ax), *(ax.get_legend().get_texts() if ax.get_legend() else [])])
    width, height = figure.bbox.size
    return all(box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height for box in boxes)


@pytest.mark.parametrize("values", [[0.03], [0.95], [-3.5]])
def test_a_single_size_is_a_whole_point_with_its_names_clear_of_the_levels(values: list[float]) -> None:
    ax = draw.faithfulness_curve([60], values, random=[[0.0], [0.02], [-0.01]])
    low, high = ax.get_xlim()
    assert low < 60 / 2 and high > 60 * 2
    assert by_gid(ax, "random")[0].get_marker() == by_gid(ax, "circuit")[0].get_marker() == "o"
    assert inside(ax) and not overlapping([*ax.texts])
    heights = [ax.transData.transform((60, level))[1] for level in (0.0, 1.0)]
    for box in boxes_of(by_gid(ax, "line-name")):
        assert not any(box.y0 < height < box.y1 for height in heights)


def test_nothing_is_cut_off_where_a_figure_is_saved_as_it_is() -> None:
    x = np.arange(1, 200)
    found = {"attribution patching": np.minimum(x / 12, 1), "exact": np.minimum(x / 10, 1)}
    curves = (
        draw.faithfulness_curve(SIZES, SHAPES["rising"], crossing=3249, cpr=1.0, cmd=0.1, note="a remark " * 20),
        draw.discovery_curve(found, x, k=10, random=x / 200),
        draw.drop_bars(["L0H1", "MLP 2"], [0.4, -0.1], chance=0.05, note="a remark " * 20),
    )
    assert all(inside(ax) for ax in curves)
    bare = Figure().add_subplot()
    draw.faithfulness_curve(SIZES, SHAPES["rising"], ax=bare)
    assert inside(bare), "also in a figure that came without a layout"
    figure = curves[0].figure
    figure.set_layout_engine("none")
    curves[0].set_position((0.1, 0.1, 0.9, 0.8))
    assert not inside(curves[0]), "names beyond the right edge are noticed"


def test_bars_show_the_largest_drops_first_with_chance() -> None:
    drops = np.linspace(-0.2, 0.3, 26)
    ax = draw.drop_bars([f"L{i}H0" for i in range(26)], drops, chance=0.1, label="most of chance", kind="nodes")
    widths = [bar.get_width() for bar in ax.patches]
    assert np.allclose(widths, drops[::-1][:20])
    assert [tick.get_text() for tick in ax.get_yticklabels()][:2] == ["L25H0", "L24H0"]
    assert ax.get_ylim()[0] > ax.get_ylim()[1], "the largest on top"
    assert ax.get_title("left") == "the 20 largest of 26 nodes"
    (line,) = by_gid(ax, "chance")
    assert (list(line.get_xdata()), line.get_linestyle()) == ([0.1, 0.1], "--")
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["most of chance"]
    colours = [to_hex(bar.get_facecolor()) for bar in ax.patches]
    assert colours == [POSITIVE if width > 0 else NEGATIVE for width in widths]
    bare = draw.drop_bars(["L0H1"], [0.1])
    assert bare.get_legend() is None and bare.get_title("left") == ""
    with pytest.raises(SettingError, match="1 drops, 2 names"):
        draw.drop_bars(["a", "b"], [0.1])


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: draw.bound_curve([1.0], [1.0, 0.5], theta_star=1, confidence=0.9), "1 effects, 2 values of p"),
        (lambda: draw.bound_curve([1.0], [1.0], theta_star=1, confidence=99), "a confidence between 0 and 1"),
        (lambda: draw.discovery_curve({"a": [1.0]}, [1.0, 2.0], k=1), "the curve 'a'"),
        (lambda: draw.discovery_curve({}, [0.0, 2.0], k=1), "smallest cost 0"),
        (lambda: draw.faithfulness_curve([0, 1], [0.0, 1.0]), "a circuit of 0 edges"),
        (lambda: draw.faithfulness_curve([1, 2], [0.0]), "the curve 'faithfulness'"),
    ],
)
def test_curves_of_the_wrong_shape_are_refused(call: Any, said: str) -> None:
    with pytest.raises(SettingError, match=re.escape(said)):
        call()


def test_places_are_moved_apart_as_little_as_possible() -> None:
    wanted = np.array([0.0, 0.1, 0.2, 5.0])
    found = apart(wanted, 1.0)
    assert np.allclose(found, [-0.9, 0.1, 1.1, 5.0])
    assert np.allclose(apart(wanted, 1.0, 0.0, 4.0), [0.0, 1.0, 2.0, 4.0])
    pushed = np.array([0.0, 1.0, 2.0, 5.0])  # from the left only
    assert ((found - wanted) ** 2).sum() < ((pushed - wanted) ** 2).sum()


def test_a_circuit_draws_itself() -> None:
    import matplotlib.pyplot as plt
    import torch

    from mechattr.patching.circuit import circuit_of
    from mechattr.patching.edge_artifact import EdgeAttribution, edge_tables

    settings: Any = {"direction": "denoising", "metric": {"unit": "nat"}, **vars(GROUPED)}
    sizes = ("n_layers", "n_heads", "n_kv_heads", "has_mlp", "parallel", "direction", "metric")
    values = torch.rand(GROUPED.mask.shape, generator=torch.Generator().manual_seed(0))
    edges = EdgeAttribution(edge_tables(GROUPED, values, values), settings={key: settings[key] for key in sizes})
    ax = circuit_of(edges, 20, method="greedy").plot(limit=10)
    assert len(by_gid(ax, "edge")) <= 10
    assert plt.fignum_exists(ax.figure.number), "a notebook shows pyplot's figures only"
    assert any("nat" in text.get_text() for text in ax.get_legend().get_texts())
    assert by_gid(ax, "node-name")[0].get_fontsize() == SMALL_POINTS
    plt.close(ax.figure)
