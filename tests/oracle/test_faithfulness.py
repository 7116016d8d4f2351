"""Faithfulness curves and minimality, from single runs with edges cut put together by hand."""

from __future__ import annotations

import math
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from patching_cases import pairs_task, plain, repadded
from torch import Tensor

from mechattr.draw import node_name
from mechattr.errors import EmptyTaskError, MismatchError, SettingError, UnknownNameError
from mechattr.evaluation.faithfulness import Faithfulness, faithfulness
from mechattr.evaluation.minimality import Minimality, minimality
from mechattr.evaluation.scale import doubt
from mechattr.patching.edge_patching import edge_patching
from mechattr.patching.edge_run import EdgeRun

ROUNDING = 1e-10  # float64; ratios of metrics to a gap of order 0.1
SIZES = (0.05, 0.2, 0.5, 1.0)
LENGTHS = (6, 4, 5)


@pytest.fixture(scope="module")
def case() -> tuple[Any, Any, Any]:
    """A model, a task, and the exact effects of its edges."""
    model = plain("llama_like")
    task = pairs_task(model, LENGTHS)
    return model, task, edge_patching(model, task, progress=False)


def by_hand(model: Any, task: Any, masks: list[Tensor], wrong: str = "", **how: Any) -> Tensor:
    """f of masks; `wrong` names a mistake to make on purpose."""
    run = EdgeRun(model, task, **how)
    whole, empty = run.metric(run.graph.mask), run.metric(torch.zeros_like(run.graph.mask))
    if wrong == "mean of ratios":
        return torch.stack([((run.metric(mask) - empty) / (whole - empty)).mean() for mask in masks])
    return torch.stack([(run.metric(mask) - empty).mean() / (whole - empty).mean() for mask in masks])


@pytest.mark.parametrize("ablation", ["resample", "mean", "zero"])
@pytest.mark.parametrize(("by", "method"), [("contribution", "top"), ("score", "greedy")])
def test_curve(case: Any, ablation: str, by: Any, method: Any) -> None:
    model, task, edges = case
    result = faithfulness(
        model, task, edges, sizes=SIZES, by=by, method=method, ablation=ablation, random=2, seed=3, progress=False
    )
    total = edges.graph.n_edges
    assert result.sizes == tuple(round(size * total) for size in SIZES)
    circuits = [edges.circuit(n, by=by, method=method) for n in result.sizes]
    assert result.tensors["n_edges"].values.tolist() == [circuit.n_edges for circuit in circuits]
    masks = {
        "faithfulness": [circuit.mask for circuit in circuits],
        "complement": [circuit.graph.mask & ~circuit.mask for circuit in circuits],
        "random": [circuit.random_like(4).mask for circuit in circuits],
        "random_complement": [circuit.random_like(4).complement() for circuit in circuits],
    }
    for name, chosen in masks.items():
        expected = by_hand(model, task, chosen, ablation=ablation)
        found = result.tensors[name].values if "random" not in name else result.tensors[name].values[1]
        torch.testing.assert_close(found, expected, rtol=0, atol=ROUNDING)
    assert result.values[-1].item() == pytest.approx(1, abs=ROUNDING)
    assert result.tensors["complement"].values[-1].item() == pytest.approx(0, abs=ROUNDING)


def test_a_mean_of_ratios_is_told_apart(case: Any) -> None:
    model, task, edges = case
    found = faithfulness(model, task, edges, sizes=SIZES, random=0, progress=False).values
    masks = [edges.circuit(round(size * edges.graph.n_edges)).mask for size in SIZES]
    assert (found - by_hand(model, task, masks, wrong="mean of ratios")).abs().max() > 1e4 * ROUNDING


def test_a_swapped_complement_is_told_apart(case: Any) -> None:
    model, task, edges = case
    result = faithfulness(model, task, edges, sizes=SIZES, random=0, progress=False)
    assert (result.values - result.tensors["complement"].values).abs().min() > 1e4 * ROUNDING


def curve_of(
    values: list[float], sizes: list[int], total: int, random: list[list[float]] | None = None
) -> Faithfulness:
    from mechattr.labelled import Labelled

    coords = {"size": tuple(sizes)}
    draws = torch.tensor(random or [], dtype=torch.float64).reshape(-1, len(sizes))
    f = torch.tensor(values, dtype=torch.float64)
    tensors = {
        "n_edges": Labelled(torch.tensor(sizes), ("size",), coords),
        "faithfulness": Labelled(f, ("size",), coords),
        "complement": Labelled(1 - f, ("size",), coords),
        "random": Labelled(draws, ("draw", "size"), coords),
        "random_complement": Labelled(1 - draws, ("draw", "size"), coords),
    }
    return Faithfulness(tensors, settings={"graph_edges": total, "ablation": "resample"})


def test_areas() -> None:
    """f = 0, 2, 1 at a tenth, a half and all edges: trapezoids over the share itself."""
    result = curve_of([0.0, 2.0, 1.0], [10, 50, 100], 100, [[0.0, 0.0, 1.0]])
    assert result.cpr == pytest.approx(0.4 * 1.0 + 0.5 * 1.5)
    assert result.cmd == pytest.approx(0.4 * 1.0 + 0.5 * 0.5)
    assert result.random_cpr == [pytest.approx(0.25)]
    assert result.random_cmd == [pytest.approx(0.4 + 0.25)]
    assert (result.crossing, result.random_crossing) == (50, [100])
    over_log = torch.trapezoid(result.values, result.shares.log()).item()  # wrong: trapezoids over log k
    assert abs(over_log - result.cpr) > 0.1


def test_what_a_curve_says() -> None:
    result = curve_of([0.2, 1.25, 1.0], [10, 50, 100], 100, [[0.1, 0.0, 1.0]])
    assert result.summary == (
        "50 of 100 edges reach the whole model; 10 edges (10.0%) keep 20% of its gap to the model with every edge "
        "ablated (resample), random circuits of that size 10%. CPR 0.85, CMD 0.27."
    )
    never = curve_of([0.2, 0.5], [10, 50], 100)
    assert never.crossing is None
    assert never.summary.startswith("No circuit reaches the whole model; 10 edges (10.0%) keep 20% of its gap")
    alone = curve_of([0.8], [10], 100)
    assert math.isnan(alone.cpr) and math.isnan(alone.cmd)
    assert alone.summary == (
        "A circuit of 10 of 100 edges keeps 80% of the gap between the whole model and the model with every edge "
        "ablated (resample), the other edges 20%."
    )
    assert repr(alone) == f"Faithfulness({alone.summary})"
    table = result.to_pandas()
    names = "size share n_edges faithfulness complement random random_low random_high random_complement"
    assert list(table) == names.split()
    assert table["size"].tolist() == [10, 50, 100]
    assert "reach the whole model" in result._repr_html_()
    assert never.to_pandas()["random"].isna().all()
    result.plot()
    alone.plot()


def test_a_gap_within_its_standard_error_is_called_out(case: Any) -> None:
    model, task, edges = case
    circuit = edges.circuit(30)
    run = EdgeRun(model, task)
    gap = run.metric(run.graph.mask) - run.metric(torch.zeros_like(run.graph.mask))
    mean, error = gap.mean().item(), gap.std().item() / math.sqrt(len(task))
    assert error < abs(mean) < 2 * error
    size = f"{mean:.3g} ± {error:.2g} logit"
    said = f"The gap that f divides by, {size} over these pairs, cannot be told from 0, so f is not meaningful"
    for result in (
        faithfulness(model, task, edges, sizes=SIZES, random=1, progress=False),
        minimality(model, task, circuit, random=1, progress=False),
    ):
        assert result.settings["gap"] == pytest.approx({"mean": mean, "standard_error": error})
        assert result.summary.startswith(f"{said}. ")
        assert said in result._repr_html_() and said in repr(result)
        assert said in result.plot().get_title("left").replace("\n", " ")
    clear = task.rows([0, 0, 0])  # the same pair again and again: no spread
    for result in (
        faithfulness(model, clear, edges, sizes=SIZES, random=1, progress=False),
        minimality(model, clear, circuit, random=1, progress=False),
    ):
        assert "meaningful" not in result.summary + result._repr_html_() + result.plot().get_title("left")


@pytest.mark.parametrize(
    ("gap", "doubtful"), [((2.1, 1.0), False), ((-2.1, 1.0), False), ((1.9, 1.0), True), ((-1.9, 1.0), True)]
)
def test_two_standard_errors_are_the_limit(gap: tuple[float, float], doubtful: bool) -> None:
    known = {"gap": {"mean": gap[0], "standard_error": gap[1]}, "metric": {"unit": "nat"}}
    assert bool(doubt(known)) == doubtful


def test_one_pair_and_an_old_result_have_no_standard_error(case: Any) -> None:
    model, task, edges = case
    result = faithfulness(model, task.rows([0]), edges, sizes=SIZES, random=0, progress=False)
    assert result.settings["gap"]["standard_error"] is None  # type: ignore[index, call-overload]
    assert doubt(result.settings) == doubt({}) == ""


def test_the_direction_is_that_of_the_edges(case: Any) -> None:
    model, task, _ = case
    edges = edge_patching(model, task, direction="denoising", progress=False)
    circuit = edges.circuit(30)
    kept = faithfulness(model, task, circuit, random=0, progress=False)
    assert kept.settings["direction"] == "denoising"
    torch.testing.assert_close(
        kept.values, by_hand(model, task, [circuit.mask], direction="denoising"), rtol=0, atol=ROUNDING
    )
    assert (kept.values - by_hand(model, task, [circuit.mask])).abs().max() > 1e4 * ROUNDING  # wrong: always noising
    assert minimality(model, task, circuit, random=0, progress=False).settings["direction"] == "denoising"
    same = faithfulness(model, task, circuit, direction="denoising", random=0, progress=False)
    assert torch.equal(same.values, kept.values)
    for call in (
        lambda: faithfulness(model, task, edges, direction="noising"),
        lambda: minimality(model, task, circuit, direction="noising"),
    ):
        with pytest.raises(SettingError) as error:
            call()
        assert str(error.value) == (
            "direction='noising'\n  found: edges that were scored with direction='denoising'\n"
            "  fix: leave direction out, or score the edges with direction='noising'"
        )
    with pytest.raises(UnknownNameError, match="did you mean 'noising'"):
        faithfulness(model, task, edges, direction="noise")


def test_what_is_for_scores_is_refused_with_a_circuit(case: Any) -> None:
    model, task, edges = case
    circuit = edges.circuit(40)
    for more, said in [
        ({"sizes": (0.1, 0.2)}, "sizes=(0.1, 0.2)"),
        ({"by": "score"}, "by='score'"),
        ({"by": "score", "method": "greedy"}, "by='score', method='greedy'"),
    ]:
        with pytest.raises(SettingError) as error:
            faithfulness(model, task, circuit, progress=False, **more)  # type: ignore[arg-type]
        assert str(error.value).startswith(
            f"the faithfulness of one circuit with {said}\n  found: a circuit is one size"
        )


def test_a_size_without_a_path_is_the_empty_circuit(case: Any) -> None:
    model, task, edges = case
    with pytest.raises(SettingError, match="none of them on a path"):
        edges.circuit(1)
    result = faithfulness(model, task, edges, sizes=(1 / edges.graph.n_edges, 1.0), random=1, progress=False)
    assert (result.sizes[0], result.tensors["n_edges"].values.tolist()[0]) == (1, 0)
    torch.testing.assert_close(result.values, torch.tensor([0.0, 1.0]).double(), rtol=0, atol=ROUNDING)


def test_one_circuit(case: Any) -> None:
    model, task, edges = case
    circuit = edges.circuit(40)
    result = faithfulness(model, task, circuit, random=1, progress=False)
    assert result.sizes == (circuit.n_edges,)
    torch.testing.assert_close(result.values, by_hand(model, task, [circuit.mask]), rtol=0, atol=ROUNDING)


def test_cost(case: Any) -> None:
    """All edges are a size too, where circuit and random circuits are the whole model and their complements empty."""
    model, task, edges = case
    result = faithfulness(model, task, edges, sizes=SIZES, random=2, progress=False)
    circuits = 2 * 3 * (len(SIZES) - 1)
    assert result.passes == (3 * (circuits + 3), 0)
    zero = faithfulness(model, task, edges, sizes=SIZES, random=2, ablation="zero", progress=False)
    assert zero.passes == (3 * (circuits + 2), 0)


def test_batches_padding_and_a_journal_do_not_matter(case: Any, tmp_path: Path) -> None:
    model, task, edges = case
    how: dict[str, Any] = {"sizes": SIZES, "random": 1, "progress": False}
    journal = tmp_path / "journal"
    first = faithfulness(model, task, edges, resume=journal, batch_size=5, **how)
    journal.write_bytes(b"".join(journal.read_bytes().splitlines(keepends=True)[:2]))
    again = faithfulness(model, task, edges, resume=journal, batch_size=5, **how)
    padded = faithfulness(model, repadded(task, "left"), edges, **how)
    for name in first.tensors:
        assert torch.equal(again.tensors[name].values, first.tensors[name].values)
        torch.testing.assert_close(padded.tensors[name].values, first.tensors[name].values, rtol=0, atol=ROUNDING)
    first.save(tmp_path / "f.safetensors")
    assert Faithfulness.load(tmp_path / "f.safetensors").summary == first.summary


@pytest.mark.parametrize("unit", ["node", "edge"])
def test_minimality(case: Any, unit: Any) -> None:
    model, task, edges = case
    circuit = edges.circuit(30)
    result = minimality(model, task, circuit, unit=unit, random=2, progress=False)
    drop = result.tensors["drop"]
    whole = by_hand(model, task, [circuit.mask])
    graph, rest = circuit.graph, []
    for part in drop.coords["part"]:
        kept = circuit.mask.clone()
        if unit == "edge":
            source, target = str(part).split(" -> ")
            kept[graph.writer_index(source), graph.reader_index(target)] = False
        else:
            kept = circuit.without(str(part)).mask
        rest.append(kept)
    parts = by_hand(model, task, rest)
    torch.testing.assert_close(drop.values, whole - parts, rtol=0, atol=ROUNDING)
    assert (drop.values - parts).abs().max() > 1e4 * ROUNDING  # wrong: f without the part, not what is lost
    assert len(drop) == (circuit.n_edges if unit == "edge" else len(set(circuit.nodes) - {"input", "logits"}))
    random = result.tensors["random"].values
    assert len(random) == 2
    known = random[0][~random[0].isnan()]
    assert torch.equal(known, known.sort(descending=True).values)
    table = result.to_pandas()
    assert table["drop"].is_monotonic_decreasing and table["chance"].between(0, 1).all()
    assert (
        f"A circuit of {circuit.n_edges} edges has f = {whole.item():.3g}; of its {len(drop)} {unit}s" in result.summary
    )
    assert f"{table['part'][0]} is worth most, {table['drop'][0]:.3g}." in result.summary
    known = random[~random.isnan()]
    assert result.chance_level == pytest.approx(float(np.quantile(known.numpy(), 0.95)))
    above = int((drop.values > result.chance_level).sum())
    assert f" {above} of {len(drop)} " in result.summary and "95% of those of random circuits" in result.summary
    assert escape(result.summary) in result._repr_html_()
    assert repr(result) == f"Minimality({result.summary})"
    ax = result.plot()
    bars = [bar.get_width() for bar in ax.patches]
    assert bars == pytest.approx(table["drop"].tolist()[:20])
    labels = [tick.get_text() for tick in ax.get_yticklabels()]
    ends = table["part"][0].split(" -> ")
    assert labels[0] == " → ".join(node_name(end) for end in ends) and not labels[0].startswith("a")
    assert result.passes.forward <= 3 * (3 + 3 + len(drop) + int((~random.isnan()).sum()))


def test_minimality_is_stored(case: Any, tmp_path: Path) -> None:
    model, task, edges = case
    result = minimality(model, task, edges.circuit(30), random=0, progress=False)
    result.save(tmp_path / "m.safetensors")
    assert Minimality.load(tmp_path / "m.safetensors").to_pandas().equals(result.to_pandas())
    assert result.to_pandas()["chance"].isna().all()
    assert math.isnan(result.chance_level) and "random" not in result.summary
    assert result.plot().get_legend() is None


def test_bad_input(case: Any) -> None:
    model, task, edges = case
    same = pairs_task(model, changed=())
    with pytest.raises(SettingError, match=r"undefined: the mean metric is (\S+) with all edges and \1 with none"):
        faithfulness(model, same, edges, progress=False)
    with pytest.raises(SettingError, match="found: 0"):
        faithfulness(model, task, edges, sizes=[0, 0.1])
    with pytest.raises(SettingError, match="an empty list"):
        faithfulness(model, task, edges, sizes=[])
    with pytest.raises(SettingError, match="random=-1"):
        faithfulness(model, task, edges, random=-1)
    with pytest.raises(SettingError, match="found: None"):
        faithfulness(model, task, edges, sizes=None)  # type: ignore[arg-type]
    with pytest.raises(SettingError, match="found: a list"):
        faithfulness(model, task, edges.top(3))  # type: ignore[arg-type]
    with pytest.raises(SettingError, match=r"found: a EdgeAttribution\n  fix: give edge_attribution\(.*\)$"):
        minimality(model, task, edges)
    with pytest.raises(UnknownNameError, match="did you mean 'zero'"):
        faithfulness(model, task, edges, ablation="zeros")
    other = plain("gpt2_like")
    with pytest.raises(MismatchError, match="use scores or a circuit of this model"):
        faithfulness(other, pairs_task(other), edges)
    circuit = edges.circuit(30)
    with pytest.raises(UnknownNameError, match="did you mean 'edge'"):
        minimality(model, task, circuit, unit="edges")  # type: ignore[arg-type]
    nothing = circuit
    for node in set(circuit.nodes) - {"input", "logits"}:
        nothing = nothing.without(node) if node in nothing.nodes else nothing
    with pytest.raises(EmptyTaskError, match="a circuit without any node"):
        minimality(model, task, nothing)
