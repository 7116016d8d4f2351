"""The diagram of routes and its page: what is drawn, where, and what is refused."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

import mechattr as ma
from mechattr.draw import RouteEdge, RouteView, route_map, route_map_size, route_page
from mechattr.draw.routes import HEADS, LABELS, MANY, MLP, OTHER, head_colours
from mechattr.errors import SettingError

EDGES = [
    RouteEdge(1, "resid_post", 2, 2, "mlp", -1, -1, 0.6),
    RouteEdge(1, "resid_post", 2, 2, "residual", -1, -1, 0.4),
    RouteEdge(1, "resid_mid", 2, 0, "attention", 3, -1, 0.5),
    RouteEdge(1, "resid_mid", 2, 2, "attention", 1, -1, 0.2),
    RouteEdge(1, "resid_mid", 2, 2, "bias", -1, -1, 0.1),
    RouteEdge(0, "resid_post", 0, 0, "residual", -1, -1, 1.0),
    RouteEdge(0, "resid_mid", 0, 0, "residual", -1, -1, 1.0),
]
VIEW = RouteView(
    tokens=["When", " Mary", " to"], edges=EDGES, n_layers=2, position=2, prediction=" Mary", probability=0.75,
    threshold=0.1,
)  # fmt: skip


def lines(ax: Axes, kind: str) -> list[Any]:
    return [patch for patch in ax.patches if patch.get_gid() == kind]


def test_edges_run_from_their_source_to_their_place() -> None:
    ax = route_map(VIEW)
    assert {kind: len(lines(ax, kind)) for kind in ("attention", "mlp", "residual", "bias")} == {
        "attention": 2, "mlp": 1, "residual": 3, "bias": 1,
    }  # fmt: skip
    ticks = dict(zip([0, 1, 2], ax.get_xticks(), strict=True))
    (mlp,), moved = lines(ax, "mlp"), max(lines(ax, "attention"), key=lambda patch: patch.get_linewidth())
    begin, end = mlp.get_path().vertices[[0, -1]]
    assert begin[0] == end[0] == ticks[2] and begin[1] < end[1]
    begin, end = moved.get_path().vertices[[0, -1]]
    assert begin[0] == pytest.approx(ticks[0]) and end[0] == pytest.approx(ticks[2]) and begin[1] < end[1]
    assert to_hex(mlp.get_edgecolor()) == MLP and to_hex(moved.get_edgecolor()) == head_colours(EDGES)[3]
    beside = route_map(replace(VIEW, parallel=True))
    # an MLP beside its attention reads what the layer below left
    assert lines(beside, "mlp")[0].get_path().vertices[0][1] < mlp.get_path().vertices[0][1]
    texts = [text.get_text() for text in ax.texts]
    assert "␣Mary  75%" in texts and {"H1", "H3"} <= set(texts)
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["When", "␣Mary", "␣to"]
    assert ax.get_xticklabels()[1].get_color() != ax.get_xticklabels()[0].get_color()  # no route through " Mary"
    assert ax.get_xlabel() == "7 edges of at least 0.1"
    named = [text.get_text() for text in ax.get_legend().get_texts()]
    assert named == ["H1", "H3", "MLP", "stream", "bias", "share", "0.05", "0.2", "0.5", "1"]


def test_many_heads_share_a_colour_and_many_tokens_leave_out_those_without_a_route() -> None:
    many = [RouteEdge(0, "resid_mid", 2, 1, "attention", h, -1, (1 + h) / 999) for h in range(len(HEADS) + 3)]
    colours = head_colours(many)
    assert len(set(colours.values()) - {OTHER}) == len(HEADS) and [colours[h] for h in range(4)] == [
        *[OTHER] * 3,
        HEADS[0],
    ]
    assert sum(text.get_text().startswith("H") for text in route_map(replace(VIEW, edges=many)).texts) <= LABELS
    long = replace(VIEW, tokens=["x"] * (MANY + 1), edges=EDGES)
    assert (
        len(route_map(long).get_xticks()) == 2
        and len(route_map(replace(long, tokens=["x"] * MANY)).get_xticks()) == MANY
    )
    assert route_map_size(replace(long, n_layers=48))[1] < 15
    merged = route_map(replace(VIEW, edges=[edge._replace(head=-1) for edge in EDGES]))
    assert merged.get_legend().get_texts()[0].get_text() == "attention"


def test_a_page_carries_its_data_and_needs_no_network() -> None:
    page = route_page(replace(VIEW, tokens=["</script>", "<&b", " to"]), title="a < b", threshold=0.3)
    assert page.count("</script>") == 1 and "<title>a &lt; b</title>" in page
    addresses = set(re.findall(r"https?://[^\"' ]+", page))
    assert addresses == {"http://www.w3.org/2000/svg"}  # the name of the format, never fetched
    data = json.loads(re.search(r"const DATA = (.*);\n", page)[1])  # type: ignore[index]
    assert data["tokens"] == ["</script>", "<&b", "␣to"] and data["prediction"] == "␣Mary 75%"
    assert data["edges"][2] == [1, 0, 2, 0, 0, 3, -1, 0.5] and len(data["edges"]) == len(EDGES)
    assert 'data-begin="0.3"' in page and "@media print" in page
    crowd = [EDGES[2]] * 20_000
    assert len(route_page(replace(VIEW, edges=crowd)).encode()) < 1_000_000


def test_what_cannot_be_drawn_is_refused() -> None:
    with pytest.raises(SettingError, match=r"found: 3 tokens and 2 layers\n  fix: draw the edges of one prompt"):
        route_map(replace(VIEW, edges=[EDGES[0]._replace(query=3)]))
    with pytest.raises(SettingError, match=r"found: 20,001 edges\n  fix: raise the threshold until"):
        route_page(replace(VIEW, edges=[EDGES[0]] * 20_001))
    for wrong in (0.05, 1.5):
        with pytest.raises(SettingError, match=r"found: a graph of edges from 0.1\n  fix: start between 0.1 and 1"):
            route_page(VIEW, threshold=wrong)


def test_routes_are_drawn_by_prompt() -> None:
    routes = ma.information_flow_routes(ma.load("tiny"), ["When Mary and John went", "The cat sat"], neurons=True)
    assert routes.view(1).tokens == routes.strings[1] and routes.view(1).position == len(routes.strings[1]) - 1
    ax = Figure().add_subplot()
    assert routes.plot(ax, prompt=1) is ax and len(ax.get_xticks()) == len(routes.strings[1])
    assert json.dumps(routes.view(1).prediction[1:])[1:-1] in routes.page(prompt=1)
