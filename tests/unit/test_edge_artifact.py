"""The result of edge attribution: ranking, signs, tables, files and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mechattr.errors import ArtifactError, AxisError, SettingError, UnknownNameError
from mechattr.labelled import Labelled
from mechattr.patching.edge_artifact import EdgeAttribution, edge_tables
from mechattr.patching.graph import Graph

GRAPH = Graph(1, 2, 1, True, False)  # 4 writers, 6 readers
SETTINGS: dict[str, Any] = {
    "method": "edge_attribution", "direction": "noising", "n_pairs": 3, "passes": {"forward": 6.0, "backward": 3.0},
    "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "has_mlp": True, "parallel": False,
}  # fmt: skip


def made(signed: torch.Tensor | None = None, **settings: Any) -> EdgeAttribution:
    if signed is None:
        signed = torch.arange(24, dtype=torch.float64).reshape(4, 6) - 10
    tables = edge_tables(GRAPH, signed.abs() + 1, signed)
    return EdgeAttribution(tables, settings={**SETTINGS, **settings})


def test_entries_without_an_edge_are_nan() -> None:
    result = made()
    assert result.graph == GRAPH
    assert torch.equal(result.score.values.isnan(), ~GRAPH.mask)
    assert result.score.axes == ("source", "target")
    assert float(result.score.sel(source="a0.h1", target="logits").item()) == result.value("a0.h1", "logits")


def test_contribution_is_what_noising_takes_away() -> None:
    noising, denoising = made(), made(direction="denoising")
    edge = ("input", "m0")
    assert noising.value(*edge, "signed") == -6
    assert noising.value(*edge, "contribution") == 6
    assert denoising.value(*edge, "contribution") == -6
    zero = made(torch.zeros(4, 6)).contribution.values[0]
    assert not bool(zero.signbit().any())  # an effect of zero stays +0


def test_top_ranks_edges_by_each_measure() -> None:
    result = made()
    values = {(s, t): result.value(s, t, "signed") for i, s in enumerate(GRAPH.writers) for j, t in
              enumerate(GRAPH.readers) if GRAPH.mask[i, j]}  # fmt: skip
    by_size = sorted(values, key=lambda edge: -abs(values[edge]))
    assert set(result.top(5)) == set(by_size[:5]) and result.top(1) == by_size[:1]
    assert result.top(3, by="abs_signed") == by_size[:3]
    assert result.top(2, by="contribution") == sorted(values, key=lambda edge: values[edge])[:2]
    assert len(result.top(10**6)) == GRAPH.n_edges
    assert result.top(0) == []


def test_ties_keep_the_order_of_the_graph() -> None:
    result = made(torch.ones(4, 6))
    expected = [(GRAPH.writers[i], GRAPH.readers[j]) for i, j in GRAPH.mask.nonzero().tolist()]
    assert result.top(GRAPH.n_edges) == expected


def test_table_of_edges() -> None:
    frame = made().to_pandas()
    assert list(frame.columns) == ["source", "target", "score", "signed", "contribution"]
    assert len(frame) == GRAPH.n_edges
    assert frame["score"].is_monotonic_decreasing
    assert bool((frame["contribution"] == -frame["signed"]).all())
    assert frame.notna().all(axis=None)
    narrow = made(torch.arange(24, dtype=torch.float32).reshape(4, 6)).to_pandas()
    assert {str(narrow[name].dtype) for name in ("score", "signed", "contribution")} == {"float64"}


def test_notebook_view_names_cost_and_edges() -> None:
    html = made()._repr_html_()
    assert "edge_attribution, 11 edges, 3 pairs, 6 forward and 3 backward passes" in html
    assert "a0.h0&lt;q&gt;" in html and "<q>" not in html
    said = "EdgeAttribution(edge_attribution, 11 edges, 3 pairs, 6 forward and 3 backward passes)"
    assert repr(made()) == said
    sizes = {name: SETTINGS[name] for name in SETTINGS if name not in ("method", "n_pairs", "passes")}
    assert repr(EdgeAttribution(made().tensors, settings=sizes)) == "EdgeAttribution(11 edges)"


def test_saved_and_loaded(tmp_path: Path) -> None:
    result = made()
    result.save(tmp_path / "edges.safetensors")
    again = EdgeAttribution.load(tmp_path / "edges.safetensors")
    again.verify()
    assert again.settings == result.settings and again.graph == GRAPH
    for name in ("score", "signed"):
        torch.testing.assert_close(
            again.tensors[name].values, result.tensors[name].values, rtol=0, atol=0, equal_nan=True
        )
    assert again.top(3) == result.top(3)


def test_a_file_of_another_shape_is_refused(tmp_path: Path) -> None:
    class Loose(EdgeAttribution):
        def __post_init__(self) -> None:
            super(EdgeAttribution, self).__post_init__()

    Loose(made().tensors, settings={**SETTINGS, "n_heads": 4}).save(tmp_path / "edges.safetensors")
    with pytest.raises(ArtifactError, match="make the artifact again"):
        EdgeAttribution.load(tmp_path / "edges.safetensors")


def test_bad_input() -> None:
    with pytest.raises(SettingError, match=r"settings\['direction'\]"):
        made(direction="up")
    with pytest.raises(SettingError, match=r"settings without \['parallel'\]"):
        EdgeAttribution(made().tensors, settings={k: v for k, v in SETTINGS.items() if k != "parallel"})
    with pytest.raises(AxisError, match=r"tensor 'signed' of an edge attribution(.|\n)*found: nothing"):
        EdgeAttribution({"score": made().score}, settings=SETTINGS)
    with pytest.raises(AxisError, match="label 4 writers and 6 readers"):
        bare = Labelled(torch.zeros(4, 6), ("source", "target"))
        EdgeAttribution({"score": bare, "signed": bare}, settings=SETTINGS)
    with pytest.raises(SettingError, match=r"top\(k=-1\)"):
        made().top(-1)
    with pytest.raises(UnknownNameError, match="measure 'size'"):
        made().top(1, by="size")
    with pytest.raises(UnknownNameError, match="writer 'm7'"):
        made().value("m7", "logits")


def test_figure_and_circuit_are_those_of_the_best_edges() -> None:
    result = made()
    circuit = result.circuit(8)
    assert circuit.edges and set(circuit.edges) <= set(result.top(8, by="contribution"))
    axes = result.plot()
    assert axes.figure is not None
