"""The report: its numbers are those of the artifacts, it needs nothing from outside, and a run can stop and go on."""

from __future__ import annotations

import csv
import importlib
import io
import json
import math
import re
import shlex
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import mechattr as ma
from mechattr.artifact import Attribution
from mechattr.errors import ArtifactError, OutputExistsError, SettingError
from mechattr.labelled import Labelled
from mechattr.models.plain import HookedPlain, plain_model
from mechattr.models.plain_config import PlainConfig
from mechattr.report import figures, html, summary, tables
from mechattr.report.record import ARTIFACTS, BOUND, CIRCUIT, FORMAT, RECORD, write
from mechattr.report.results import Results, at_sites
from mechattr.tasks import Task

# `mechattr.report.localise` is the function; its module is found by name
job = importlib.import_module("mechattr.report.localise")

TOKENS = ["<s>", "When", " Mary", "<script>alert(1)</script>", " John", " gave", "&amp;", " to"]
N_LAYERS, N_HEADS, N_PAIRS = 3, 4, 6
HEADS = ("layer", "pos", "head")


def attribution(parts: dict[str, tuple[torch.Tensor, tuple[str, ...]]], **settings: Any) -> Attribution:
    tensors = {}
    for site, (signed, axes) in parts.items():
        tensors[f"signed/{site}"] = Labelled(signed, axes)
        tensors[f"score/{site}"] = Labelled(signed.abs() * 1.25, axes)
    common = {
        "direction": "noising",
        "clean_metric": [3.0, 3.0, 3.0, 3.0, 3.0, -1.0],
        "corrupt_metric": [-2.0] * N_PAIRS,
        "passes": {"forward": 12.0, "backward": 6.0},
    }
    return Attribution(tensors, settings=common | settings, provenance={"versions": {"torch": "2"}})


def results(*, top: int = 10, tokens: list[str] = TOKENS, **changes: Any) -> Results:
    """A run with drawn effects; component L2H1 z at the last position has an exact effect of -3."""
    generator = torch.Generator().manual_seed(0)

    def effects(*shape: int) -> torch.Tensor:
        values = torch.randn(*shape, generator=generator, dtype=torch.float64)
        values[:, : min(2, shape[1])] = 0.0  # before the first difference
        return values

    n = len(tokens)
    parts = {site: (effects(N_LAYERS, n, N_HEADS) * 0.1, HEADS) for site in ("q", "z")}
    parts["z"][0][2, -1, 1] = -2.5
    maps = {site: (effects(N_LAYERS, n), ("layer", "pos")) for site in figures.MAPS}
    estimate = attribution(parts | maps)
    unmeasured = {site: (torch.full_like(values, math.nan), axes) for site, (values, axes) in parts.items()}
    for node in at_sites(estimate, list(parts)).top(top):
        found = 1.2 * estimate.value(node, "signed")
        unmeasured[node.site][0][node.layer, node.pos, node.head] = found  # type: ignore[index]
    wholes = {"z": (effects(N_LAYERS, N_HEADS), ("layer", "head")), "mlp_out": (effects(N_LAYERS, 1)[:, 0], ("layer",))}
    whole_exact = {site: (values * 1.1, axes) for site, (values, axes) in wholes.items()}
    spans = {"S2": [4, 5], "END": [n - 1, n]}
    sample = {
        "clean": tokens,
        "corrupt": [*tokens[:4], " Anna", *tokens[5:]],
        "differs": [4],
        "answers": [" Mary"],
        "foils": [" John"],
        "spans": spans,
    }
    record = {
        "format": FORMAT,
        "key": {
            "model": "toy", "weight_hash": "aa", "tokenizer_hash": "bb", "dtype": "float64", "task": "ioi",
            "task_hash": "cc", "direction": "noising", "sites": ["q", "z"], "positions": "aligned", "top": top,
            "seed": 0, "variant": "max", "bound": 0, "circuit": 0,
        },
        "model": {"n_layers": N_LAYERS, "n_heads": N_HEADS, "family": "plain", "revision": None},
        "task": {
            "n_pairs": N_PAIRS, "lengths": [n, n], "metric": "logit_difference", "unit": "logit", "contrast": True,
            "settings": {}, "skipped": {"a name of two <b>tokens</b>": 3}, "citation": "Wang et al. 2022",
            "spans": spans, "samples": [sample, sample],
        },
        "seconds": {"attribution": 0.5, "exact": 2.0},
        "command": "mechattr localise --model toy",
    }  # fmt: skip
    return Results(record | changes, estimate, attribution(unmeasured), attribution(wholes), attribution(whole_exact))


def stored(folder: Path, run: Results) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    write(folder, dict(run.record))
    for name, file in ARTIFACTS.items():
        getattr(run, name).save(folder / file)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose report was built from stored artifacts alone."""
    out = stored(tmp_path_factory.mktemp("report"), results())
    ma.report.rebuild(out)
    return out


class Page(HTMLParser):
    """Tags, what they load, the text, and the cells of the component table."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.rows: list[list[tuple[str, str]]] = []
        self.text = ""
        self.sortable = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append(tag)
        self.loads += [str(found[name]) for name in ("src", "href", "srcset", "action", "data") if name in found]
        self.sortable = self.sortable or "sortable" in (found.get("class") or "")
        if tag == "tr":
            self.rows.append([])
        if tag == "td":
            self.rows[-1].append((found.get("data-value") or "", ""))

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.tags and self.tags[-1] in ("td", "b", "span") and self.rows and self.rows[-1]:
            value, text = self.rows[-1][-1]
            self.rows[-1][-1] = (value, text + data)


def components(page: Page) -> list[list[tuple[str, str]]]:
    """The rows of the component table: eight cells each."""
    return [row for row in page.rows if len(row) == 8]


# --- the page


def outside(text: str) -> list[str]:
    """What a page would load from somewhere else."""
    return [load for load in Page(text).loads if not load.startswith("data:")] + re.findall(
        r"https?://\S*|url\([^)]*|@import", text
    )


def test_the_page_loads_nothing_and_is_small(folder: Path) -> None:
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert outside(text) == []
    assert len(text.encode()) < 3_000_000
    assert outside(text.replace("</main>", '<img src="https://cdn.example/x.png"></main>'))
    assert outside(text.replace("</style>", "body { background: url(ground.png) }</style>"))


def test_a_long_prompt_and_many_components_stay_below_the_limit(tmp_path: Path) -> None:
    run = results(top=400, tokens=[f" word{i}" for i in range(60)])
    made = ma.report.rebuild(stored(tmp_path, run))
    text = made.report_path.read_text(encoding="utf-8")
    assert len(text.encode()) < 3_000_000
    assert len(components(Page(text))) == html.TABLE_ROWS
    assert f"The {html.TABLE_ROWS} strongest of them are shown" in text
    assert len((tmp_path / "table.csv").read_text().splitlines()) == 401


def test_tokens_and_reasons_are_escaped(folder: Path) -> None:
    page = Page((folder / "report.html").read_text(encoding="utf-8"))
    assert page.tags.count("script") == 1, "only the page's own"
    assert "<script>alert(1)</script>" in page.text
    assert "3 × a name of two <b>tokens</b>" in page.text
    assert "&amp;" in page.text


def test_sections_are_numbered_without_gaps(folder: Path) -> None:
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert [int(n) for n in re.findall(r"<h2>(\d+)\. ", text)] == [1, 2, 3, 4, 5, 6, 7]
    assert Page(text).tags.count("img") == 4


def test_the_opening_names_the_strongest_component_with_its_numbers() -> None:
    sentence = summary.sentence(results())
    # gap: mean(3 x 5, -1) + 2 = 4.333; exact effect of the planted component: 1.2 x 2.5 = 3
    assert "One of 192 components moves the logit difference by 10\u00a0% or more" in sentence
    assert "(4.33 logit): the strongest, L2H1 z at END, by 3 (69\u00a0%)" in sentence
    assert "measured by corrupting one component at a time, for the 10 with the largest estimates" in sentence


def test_the_opening_claims_nothing_that_was_not_found() -> None:
    run = results()
    same = attribution({}, clean_metric=[1.0], corrupt_metric=[1.0])
    flat = Attribution(run.attribution.tensors, settings=same.settings)
    sentence = summary.sentence(Results(run.record, flat, run.exact, run.whole_attribution, run.whole_exact))
    assert "there is nothing for the 192 components to carry" in sentence
    far = attribution({}, clean_metric=[1000.0], corrupt_metric=[-1000.0])
    weak = Attribution(run.attribution.tensors, settings=far.settings)
    sentence = summary.sentence(Results(run.record, weak, run.exact, run.whole_attribution, run.whole_exact))
    assert sentence.startswith("None of 192 components was found to move")


def test_an_exhaustive_sweep_costs_what_a_loop_over_the_nodes_counts() -> None:
    run = results()
    by_loop = sum(
        N_PAIRS * (N_LAYERS - node.layer) / N_LAYERS  # type: ignore[operator]
        for node in run.scored.nodes()
        if run.scored.value(node) != 0
    )
    assert math.isclose(run.exhaustive_passes, by_loop, rel_tol=1e-12)  # the same sum in another order
    assert run.n_components == 2 * N_LAYERS * len(TOKENS) * N_HEADS
    assert run.n_zero == 2 * N_LAYERS * 2 * N_HEADS
    assert not math.isclose(by_loop, N_PAIRS * run.n_components, rel_tol=0.1), (
        "zeros and partial passes must matter here"
    )


# --- the table


def agrees(page: Page, run: Results, first: str, second: str) -> bool:
    """Whether the two columns of effects hold these numbers of the artifacts, to every digit."""
    shown = [(float(row[4][0]), float(row[5][0])) for row in components(page)]
    wanted = [
        (getattr(run, first).value(n, "contribution"), getattr(run, second).value(n, "contribution"))
        for n in run.verified
    ]
    return shown == wanted


def test_the_table_shows_the_numbers_of_the_artifacts(folder: Path) -> None:
    page, run = Page((folder / "report.html").read_text(encoding="utf-8")), results()
    assert page.sortable
    assert agrees(page, run, "scored", "exact")
    assert not agrees(page, run, "exact", "scored"), "columns that were swapped would be seen"
    top = components(page)[0]
    assert [text for _, text in top[1:4]] == ["L2H1 z", "blocks.2.attn.hook_z", "7 ␣to (END)"]
    assert math.isclose(float(top[7][0]), 100 * 3.0 / (14 / 6 + 2), rel_tol=1e-12)  # one division in float64


def test_the_csv_holds_every_row_in_full_precision(folder: Path) -> None:
    rows = list(csv.DictReader(io.StringIO((folder / "table.csv").read_text(encoding="utf-8"))))
    run = results()
    assert tuple(rows[0]) == tables.CSV_COLUMNS
    assert [float(row["exact"]) for row in rows] == [run.exact.value(node, "contribution") for node in run.verified]
    assert [float(row["score"]) for row in rows] == sorted((float(row["score"]) for row in rows), reverse=True)
    assert {row["neuron"] for row in rows} == {""}


def test_a_share_without_a_gap_is_empty_and_not_a_number() -> None:
    run = results()
    settings = dict(run.attribution.settings) | {"corrupt_metric": run.attribution.settings["clean_metric"]}
    flat = Results(
        run.record,
        Attribution(run.attribution.tensors, settings=settings),
        run.exact,
        run.whole_attribution,
        run.whole_exact,
    )
    assert all(math.isnan(row["share"]) for row in tables.rows(flat))
    assert next(csv.DictReader(io.StringIO(tables.csv_text(flat))))["share"] == ""
    assert "nan" not in tables.html_table(flat)


def test_rows_of_merged_positions_and_spans_name_them() -> None:
    run = results()
    assert run.position(None) == "all"
    assert run.position("S1") == "S1"
    assert run.position(4) == "4 ␣John (S2)"
    assert run.position(1) == "1 When"


# --- the figures


def test_figures_are_drawn_from_the_artifacts() -> None:
    run = results()
    drawn = figures.figures(run)
    assert list(drawn) == ["head_map", "position_map", "agreement", "agreement_top"]
    grid = drawn["head_map"].axes[0].get_images()[0]
    exact = run.whole_exact.contribution["z"].numpy()
    np.testing.assert_array_equal(grid.get_array(), exact)
    assert not np.array_equal(grid.get_array(), run.whole_exact.signed["z"].numpy()), "the sign must matter here"
    panel = drawn["position_map"].axes[2].get_images()[0]
    np.testing.assert_array_equal(panel.get_array(), run.attribution.contribution["mlp_out"].numpy())


# --- the job on a small model


WORDS = ["<s>", "When", " Mary", " John", " Anna", " Paul", " and", " went", " gave", " to"]


@pytest.fixture(scope="module")
def model() -> HookedPlain:
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<s>"))
    core.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_next")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", unk_token="<s>", pad_token="<s>")
    return plain_model(
        PlainConfig.gpt2_like(n_layers=2, n_heads=2, n_kv_heads=2, d_vocab=len(WORDS), d_mlp=8), tokenizer=tokenizer
    )


def make_task(model: HookedPlain, **changes: Any) -> Task:
    """Two pairs in which the repeated name differs."""
    pairs = [
        {
            "clean_tokens": [0, 1, one, 6, two, 7, two, 8, 9],
            "corrupt_tokens": [0, 1, one, 6, two, 7, 4, 8, 9],
            "answer": one,
            "foil": two,
            "spans": {"S2": [6, 7]},
        }
        | changes
        for one, two in ((2, 3), (3, 5))
    ]
    return ma.tasks.from_pairs(model, pairs)


@pytest.fixture(scope="module")
def task(model: HookedPlain) -> Task:
    return make_task(model)


@pytest.fixture(scope="module")
def done(model: HookedPlain, task: Task, tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("job") / "run"
    return ma.report.localise(model, task, out=out, top=12, bound=3006, circuit=20, progress=False)


def test_a_run_writes_all_its_files(done: Any) -> None:
    out = done.report_path.parent
    expected = {
        "report.html",
        "table.csv",
        "pairs.jsonl",
        "figures",
        RECORD,
        *ARTIFACTS.values(),
        *BOUND.values(),
        *CIRCUIT.values(),
    }
    assert {path.name for path in out.iterdir()} == expected
    drawn = {path.name for path in (out / "figures").iterdir()}
    assert drawn == {f"{name}.{kind}" for name in figures.figures(done.results) for kind in ("png", "svg")}


def test_its_numbers_are_those_of_the_methods(done: Any, model: HookedPlain, task: Task) -> None:
    atp = ma.attribution_patching(model, task, progress=False)
    assert done.attribution.top(12) == atp.top(12)
    exact = ma.activation_patching(model, task, nodes=atp.top(12), progress=False)
    assert [row["component"] for row in done.table(12)] == [node.label for node in exact.top(12)]
    for row, node in zip(done.table(12), exact.top(12), strict=True):
        assert (row["exact"], row["score"]) == (exact.value(node, "contribution"), exact.value(node))
    whole = ma.activation_patching(model, task, sites=("z", "mlp_out"), positions="all", progress=False)
    for site, values in done.results.whole_exact.signed.items():
        torch.testing.assert_close(values.values, whole.signed[site].values, rtol=0, atol=0)  # the same computation


def test_the_bound_and_the_circuit_are_those_of_the_methods(done: Any, model: HookedPlain, task: Task) -> None:
    run = done.results
    bound = ma.missed_effect_bound(model, task, verified=done.exact, budget=3006, progress=False)
    assert run.bound.theta == bound.theta
    assert (
        run.bound.theta != ma.missed_effect_bound(model, task, verified=done.exact, budget=2800, progress=False).theta
    )
    edges = ma.edge_attribution(model, task, progress=False)
    assert run.circuit.edges == edges.circuit(20).edges != edges.circuit(20, by="score").edges
    kept = ma.faithfulness(model, task, edges, progress=False)
    torch.testing.assert_close(run.faithfulness.values, kept.values, rtol=0, atol=0)  # the same computation
    assert summary.capital(bound.summary) in done.summary
    text = done.report_path.read_text(encoding="utf-8")
    assert [name for name in re.findall(r"<h2>\d+\. ([^<]*)", text)][5:7] == [
        "What may have been missed",
        "Edges and circuit",
    ]


def test_a_bound_that_the_budget_is_too_small_for_says_so(model: HookedPlain, task: Task, tmp_path: Path) -> None:
    done = ma.report.localise(model, task, out=tmp_path / "run", top=3, bound=20, progress=False)
    text = done.report_path.read_text(encoding="utf-8")
    assert "No bound with 99 % confidence" in text and "What may have been missed" in text
    assert "bound.png" not in {path.name for path in (tmp_path / "run" / "figures").iterdir()}


@pytest.mark.parametrize(
    ("name", "value", "least"), [("top", 0, 1), ("bound", -1, 0), ("circuit", True, 0), ("circuit", 2.0, 0)]
)
def test_a_number_that_is_no_count_is_refused(
    model: HookedPlain, task: Task, tmp_path: Path, name: str, value: Any, least: int
) -> None:
    with pytest.raises(SettingError, match=f"localise with {name}={value!r}\n.*\n.*whole number from {least}"):
        ma.report.localise(model, task, out=tmp_path / "run", **{name: value})
    assert not (tmp_path / "run").exists()


def test_a_notebook_shows_the_answer_and_the_map(done: Any) -> None:
    shown = done._repr_html_()
    assert done.summary in shown.replace("&lt;", "<").replace("&#x27;", "'")
    assert "data:image/png;base64," in shown
    assert outside(shown) == []


def test_the_stored_pairs_make_the_same_task(done: Any, model: HookedPlain, task: Task) -> None:
    again = ma.tasks.from_pairs(model, done.report_path.parent / "pairs.jsonl", metric=task.metric.name)
    assert again.hash() == task.hash()
    assert make_task(model, answer=4).hash() != task.hash(), "another answer must be another task"


def test_the_command_names_all_settings(done: Any) -> None:
    words = shlex.split(done.results.record["command"].replace("\\\n", " "))
    options = dict(zip(words[2::2], words[3::2], strict=True))
    out = done.report_path.parent
    assert words[:2] == ["mechattr", "localise"]
    assert options == {
        "--model": "plain", "--dtype": "float64", "--pairs": str(out / "pairs.jsonl"), "--metric": "logit_difference",
        "--seed": "0", "--sites": "q,k,v,z,mlp_post", "--positions": "aligned", "--direction": "noising", "--top": "12",
        "--variant": "hedged", "--bound": "3006", "--circuit": "20", "--out": f"{out}-again",
    }  # fmt: skip


@pytest.mark.usefixtures("undrawn")
def test_a_finished_run_is_reused(
    model: HookedPlain, task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = ma.report.localise(model, task, out=tmp_path / "run", top=3, bound=0, progress=False)
    before = first.report_path.read_bytes()
    monkeypatch.setattr(job, "attribution_patching", refuse)
    monkeypatch.setattr(job, "activation_patching", refuse)
    again = ma.report.localise(model, task, out=tmp_path / "run", top=3, bound=0, progress=False)
    assert again.report_path.read_bytes() == before
    with pytest.raises(Stop):
        ma.report.localise(model, task, out=tmp_path / "other", top=3, bound=0, progress=False)


def test_rebuild_gives_the_same_bytes_without_a_model(done: Any) -> None:
    out = done.report_path.parent
    before = {path: path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}
    done.report_path.unlink()
    (out / "figures" / "head_map.png").unlink()
    assert ma.report.rebuild(out).summary == done.summary
    assert {path: path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()} == before


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Empty pictures in place of figures, for tests that are about files and not about what is drawn."""

    def save(run: Results, folder: Path) -> dict[str, Path]:
        folder.mkdir(parents=True, exist_ok=True)
        paths = {name: folder / f"{name}.png" for name in ("head_map", "position_map", "agreement", "agreement_top")}
        for path in paths.values():
            path.write_bytes(bytes(24))
        return paths

    monkeypatch.setattr(job.figures, "save", save)


class Stop(RuntimeError):
    """Raised in place of a computation."""


def refuse(*arguments: Any, **settings: Any) -> Any:
    raise Stop


def test_other_settings_are_refused_and_named(done: Any, model: HookedPlain, task: Task) -> None:
    out = done.report_path.parent
    before = (out / RECORD).read_bytes()
    with pytest.raises(
        OutputExistsError, match='direction is "noising" there and "denoising" here; top is 12 there and 5'
    ):
        ma.report.localise(model, task, out=out, top=5, direction="denoising", progress=False)
    with pytest.raises(OutputExistsError, match=r"task_hash is \w{12} there and \w{12} here"):
        ma.report.localise(model, make_task(model, answer=4), out=out, top=12, progress=False)
    assert (out / RECORD).read_bytes() == before


@pytest.mark.usefixtures("undrawn")
def test_a_folder_of_other_files_is_refused_and_kept(model: HookedPlain, task: Task, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(OutputExistsError, match="1 files or folders that no localise wrote"):
        ma.report.localise(model, task, out=tmp_path, top=2, bound=0, progress=False)
    made = ma.report.localise(model, task, out=tmp_path, top=2, bound=0, overwrite=True, progress=False)
    (tmp_path / "figures" / "old_map.png").write_bytes(b"")
    other = ma.report.localise(model, task, out=tmp_path, top=3, overwrite=True, positions="all", progress=False)
    assert (len(made.table(9)), len(other.table(9))) == (2, 3)
    assert (tmp_path / "thesis.tex").read_text() == "mine"
    assert not (tmp_path / "figures" / "old_map.png").exists(), "a figure of the replaced run must not stay"


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("failing", ["exact", "whole_exact"])
def test_a_run_that_fails_leaves_what_it_had_and_goes_on_from_there(
    failing: str, done: Any, model: HookedPlain, task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real: Callable[..., Attribution] = job.activation_patching

    def fail(*arguments: Any, resume: Path, **settings: Any) -> Attribution:
        if resume.name.startswith(f"{failing}."):
            raise Stop
        return real(*arguments, resume=resume, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(job, "activation_patching", fail)
        with pytest.raises(Stop):
            ma.report.localise(model, task, out=tmp_path, top=12, progress=False)
    kept = [name for name in ARTIFACTS if (tmp_path / ARTIFACTS[name]).exists()]
    assert kept == list(ARTIFACTS)[: list(ARTIFACTS).index(failing)]
    with pytest.raises(ArtifactError, match=f"no .*{failing}.safetensors.*: the run did not finish"):
        ma.report.rebuild(tmp_path)
    monkeypatch.setattr(job, "attribution_patching", only_missing(kept))
    again = ma.report.localise(model, task, out=tmp_path, top=12, progress=False)
    assert again.table(12) == done.table(12)


def only_missing(kept: list[str]) -> Callable[..., Attribution]:
    """Attribution patching for what is missing; what was kept must not be computed again."""
    real: Callable[..., Attribution] = job.attribution_patching

    def method(*arguments: Any, positions: Any, **settings: Any) -> Attribution:
        name = "whole_attribution" if positions == "all" else "attribution"
        assert name not in kept, f"{name} was computed twice"
        return real(*arguments, positions=positions, **settings)

    return method


def test_positions_follow_the_task(model: HookedPlain, task: Task, tmp_path: Path) -> None:
    pairs = [
        {
            "clean_tokens": [*start, 7, 3, 9],
            "corrupt_tokens": [*start, 7, 4, 9],
            "answer": 2,
            "foil": 3,
            "spans": {"S2": [len(start) + 1, len(start) + 2]},
        }
        for start in ([0, 1, 2], [0, 1, 2, 6])
    ]
    named = ma.report.localise(model, ma.tasks.from_pairs(model, pairs), out=tmp_path, top=5, progress=False)
    assert named.results.key["positions"] == "named"
    assert {row["position"] for row in named.table(5)} <= {"S2", "END"}
    assert (tmp_path / "figures" / "position_map.png").exists()


def test_a_model_without_mlps_has_a_report(tmp_path: Path, model: HookedPlain) -> None:
    config = PlainConfig.attention_only(n_layers=2, n_heads=2, n_kv_heads=2, d_vocab=len(WORDS))
    small = plain_model(config, tokenizer=model.tokenizer)
    made = ma.report.localise(small, make_task(small), out=tmp_path, sites=("z",), top=3, progress=False)
    assert set(made.results.whole_exact.scores) == {"z"}


@pytest.mark.parametrize(
    ("settings", "error", "text"),
    [
        ({"top": 0}, SettingError, "top=0"),
        ({"direction": "sideways"}, ValueError, "sideways"),
        ({"positions": "some"}, ValueError, "some"),
        ({"sites": ("zz",)}, KeyError, "zz"),
    ],
)
def test_what_cannot_be_used_is_refused_before_anything_is_written(
    settings: dict[str, Any], error: type[Exception], text: str, model: HookedPlain, task: Task, tmp_path: Path
) -> None:
    with pytest.raises(error, match=text):
        ma.report.localise(model, task, out=tmp_path / "new", **settings)
    assert not (tmp_path / "new").exists()


def test_a_file_in_place_of_the_folder_is_refused(model: HookedPlain, task: Task, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(SettingError, match="it is a file"):
        ma.report.localise(model, task, out=tmp_path / "out")


@pytest.mark.parametrize("content", [None, "{", "[]", '{"format": "mechattr/localise/99", "key": {}}'])
def test_a_folder_without_a_readable_run_is_refused(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / RECORD).write_text(content)
    with pytest.raises(ArtifactError, match="the result of a localise"):
        ma.report.rebuild(tmp_path)


def test_the_record_is_plain_json(done: Any) -> None:
    record = json.loads((done.report_path.parent / RECORD).read_text(encoding="utf-8"))
    assert set(record["seconds"]) == {*ARTIFACTS, *BOUND, *CIRCUIT}
    assert record["task"]["samples"][0]["answers"] == [" Mary"]
    assert record["task"]["samples"][0]["differs"] == [6]
    assert record["task"]["spans"] == {"S2": [6, 7], "END": [8, 9]}
