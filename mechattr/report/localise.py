"""The main job: estimate every component, check the best exactly, and write a report.

1. Attribution patching at the asked sites and at the sites of the maps, in one pass.
2. Exact activation patching of the components with the largest estimates.
3. Both again for every whole head (z) and MLP: the picture by head, and how far the estimates can be trusted.
4. A bound on the effects of the components that were not checked, from random sets of them.
5. If asked for: all edges, a circuit of the best of them, and how faithful it is.
6. Figures, table and report.

Each result is saved as soon as it exists, so that a run that fails or is killed goes on where it stopped.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

from mechattr.artifact import Attribution
from mechattr.artifact import open as open_artifact
from mechattr.engines.executors import NAMES, Executor, executor_of
from mechattr.errors import ArtifactError, EmptyTaskError, SettingError
from mechattr.evaluation.faithfulness import faithfulness
from mechattr.models.base import HookedModel
from mechattr.patching.activation import activation_patching
from mechattr.patching.attribution import attribution_patching
from mechattr.patching.bound import missed_effect_bound
from mechattr.patching.circuit import extracted
from mechattr.patching.edges import edge_attribution
from mechattr.patching.graph import check_additive, count_edges
from mechattr.patching.places import Direction, Positions, direction_of, node_sites, places_of
from mechattr.patching.variants import DEFAULT_VARIANT, variant_of
from mechattr.report import figures, html, summary, tables
from mechattr.report.record import (
    BLOCKS,
    FIGURES,
    PARTIAL,
    REPORT,
    TABLE,
    Record,
    artifacts,
    describe,
    prepare,
    read,
    write,
)
from mechattr.report.reproduce import PAIRS, command, pairs_jsonl
from mechattr.report.results import Results, at_sites
from mechattr.sites import parse
from mechattr.tasks.task import Task


@dataclass(frozen=True)
class Localisation:
    """What `localise` found, and where its report is.

    Attributes:
        results: the stored results and the numbers drawn from them.
        report_path: the HTML report.
    """

    results: Results
    report_path: Path

    @property
    def attribution(self) -> Attribution:
        """Estimates of all components."""
        return self.results.scored

    @property
    def exact(self) -> Attribution:
        """Exact effects of the components with the largest estimates."""
        return self.results.exact

    @property
    def summary(self) -> str:
        """The answer in one sentence."""
        return summary.sentence(self.results)

    def __repr__(self) -> str:
        return f"Localisation({self.summary!r}, report {str(self.report_path)!r})"

    def table(self, k: int = 20) -> list[dict[str, Any]]:
        """The k strongest verified components, a dict a row; see `mechattr.report.tables.rows`."""
        return tables.rows(self.results, k)

    def _repr_html_(self) -> str:
        png = self.report_path.parent / FIGURES / "head_map.png"
        picture = base64.b64encode(png.read_bytes()).decode()
        cells = "".join(
            f"<tr><td>{escape(row['component'])}</td><td>{escape(row['position'])}</td><td>{row['estimate']:+.3f}</td>"
            f"<td>{row['exact']:+.3f}</td><td>{row['share']:.1%}</td></tr>"
            for row in self.table(10)
        )
        return (
            f"<div style='background:#ffffff;color:#222222;padding:8px'><p>{escape(self.summary)}</p>"
            f"<img alt='head map' style='max-width:640px' src='data:image/png;base64,{picture}'>"
            "<table><thead><tr><th>component</th><th>position</th><th>estimate</th><th>exact</th><th>share</th></tr></thead>"
            f"<tbody>{cells}</tbody></table><p>Report: {escape(str(self.report_path))}</p></div>"
        )


def localise(
    model: HookedModel,
    task: Task,
    *,
    out: Path | str,
    top: int = 50,
    variant: str = DEFAULT_VARIANT,
    bound: int | None = None,
    circuit: int = 0,
    direction: Direction = "noising",
    sites: Sequence[str] | None = None,
    positions: Positions | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    overwrite: bool = False,
    progress: bool | None = None,
    executor: str | Executor | None = None,
) -> Localisation:
    """Finds which components cause a behaviour: estimates all, checks the best exactly, and writes a report.

    Writes into `out`: `report.html`, `table.csv`, `figures/`, the results as `.safetensors`, `settings.json` and
    `pairs.jsonl`. A folder that holds a run with the same settings is reused, and a run that stopped goes on where it
    stopped.

    Args:
        model: what is looked into.
        task: prompt pairs.
        out: folder of the report.
        top: how many components are checked exactly.
        variant: the score of attribution patching by which they are chosen.
        bound: forward passes spent on the bound; 0 leaves it out, by default it takes what every component needs to be
            drawn 30 times.
        circuit: how many edges the circuit has before dead ends are pruned; 0 leaves edges out.
        direction: corrupt activations into the clean run, or clean ones into the corrupt run.
        sites: sites whose components are scored, by default those of activation patching.
        positions: score each position ("aligned"), named spans ("named"), or all positions replaced together ("all").
            Without it: each position where pairs align, else the spans that all pairs have, else all together.
        seed: of the random sets of the bound and of the random circuits.
        batch_size: prompt rows of one forward pass.
        overwrite: replace the result of other settings.
        progress: show progress bars.
        executor: `"ray"`, `"inprocess"` or an executor, to run estimates, checks, the bound, edges and the test of the
            circuit block by block elsewhere.

    Returns:
        The results and the path of the report.

    Raises:
        OutputExistsError: `out` holds the result of other settings.
        EmptyTaskError: the task has no pair.
        SettingError: `top`, `bound` or `circuit` is not a count.
        UnknownSiteError, UnknownNameError: no such site, direction or kind of positions.
        AlignmentError: positions that are not comparable across the pairs.
        BackendError, ExecutorError: Ray is not installed, there is no cluster, or a block failed for good.

    Cost: estimates take twice what `attribution_patching` states for the variant; each check takes up to one forward
        pass a pair and component, `top` + heads + MLPs in all; the bound takes its budget; edges and circuit take what
        `edge_attribution` (10 steps) and `faithfulness` state.
    """
    if not len(task):
        raise EmptyTaskError("to localise a behaviour", "a task without pairs", "give at least one pair")
    for name, value, least in (("top", top, 1), ("bound", bound, 0), ("circuit", circuit, 0)):
        if not _count(value, least) and not (name == "bound" and value is None):
            raise SettingError(f"localise with {name}={value!r}", "no count", f"give a whole number from {least}")
    variant_of(model.info, model.sites(), variant, "block")
    if circuit:
        check_additive(model.info)
        if circuit > (edges := count_edges(model.info)):
            raise SettingError(f"a circuit of {circuit} edges", f"{edges} edges in the graph", "ask for fewer")
    where = positions or _comparable(task)
    # what cannot be used is refused before anything is written
    direction_of(direction)
    sites = node_sites(model, sites)
    places_of(task, where)
    asked: dict[str, Any] = {"direction": direction, "sites": list(sites), "positions": where, "top": top, "seed": seed}
    asked |= {"variant": variant, "bound": bound, "circuit": circuit}
    folder = Path(out)
    spreading = None if executor is None else executor_of(executor)
    words = {**asked, "executor": spreading.name if spreading and spreading.name in NAMES else None}
    described = {**describe(model, task, asked), "command": command(model.info, task, words, folder)}
    record = prepare(folder, described, overwrite=overwrite)
    (folder / PAIRS).write_text(pairs_jsonl(task), encoding="utf-8")
    bars: dict[str, Any] = {"direction": direction, "progress": progress}
    rows: dict[str, Any] = {} if batch_size is None else {"batch_size": batch_size}

    def spread(name: str) -> dict[str, Any]:
        return {} if spreading is None else {"executor": spreading, "resume": folder / BLOCKS[name]}

    def estimate(name: str, at: Sequence[str], by: Positions) -> Attribution:
        chosen = {"sites": at, "variant": variant, "positions": by, **spread(name)}
        return attribution_patching(model, task, **chosen, **bars, **rows)

    def check(name: str, **what: Any) -> Attribution:
        journal = spread(name) or {"resume": folder / PARTIAL[name]}
        return activation_patching(model, task, **what, **journal, **bars, **rows)

    present = {parse(name)[0] for name in model.sites()}  # a model without MLPs has no mlp_out
    every_site = tuple(dict.fromkeys((*sites, *(site for site in figures.MAPS if site in present))))
    whole = tuple(site for site in figures.WHOLE if site in present)
    found: dict[str, Any] = {}
    with nullcontext() if spreading is None else spreading.session():
        attribution = _step(folder, record, "attribution", lambda: estimate("attribution", every_site, where))
        best = at_sites(attribution, sites).top(top)
        exact = _step(folder, record, "exact", lambda: check("exact", nodes=best))
        whole_attribution = _step(
            folder, record, "whole_attribution", lambda: estimate("whole_attribution", whole, "all")
        )
        whole_exact = _step(folder, record, "whole_exact", lambda: check("whole_exact", sites=whole, positions="all"))
        if bound != 0:
            journal = spread("bound") or {"resume": folder / PARTIAL["bound"]}
            chance: dict[str, Any] = {"sites": sites, "budget": bound, "seed": seed, **journal, **rows}
            bounding = partial(missed_effect_bound, model, task, verified=exact, progress=progress, **chance)
            found["bound"] = _step(folder, record, "bound", bounding)
        if circuit:
            edges = _step(
                folder, record, "edges", partial(edge_attribution, model, task, **spread("edges"), **bars, **rows)
            )
            found["edges"] = edges
            found["circuit"] = _step(folder, record, "circuit", lambda: extracted(edges, circuit))
            testing = partial(faithfulness, model, task, edges, seed=seed, **spread("faithfulness"), **bars, **rows)
            found["faithfulness"] = _step(folder, record, "faithfulness", testing)
    return _write(folder, Results(record, attribution, exact, whole_attribution, whole_exact, **found))


def _count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def rebuild(path: Path | str) -> Localisation:
    """Makes figures, table and report again from what an earlier `localise` stored; runs no model.

    Args:
        path: the folder of that run.

    Raises:
        ArtifactError: there is no result in the folder, or it is damaged or not finished.
    """
    folder = Path(path)
    record = read(folder)
    files = artifacts(record["key"])
    missing = [name for name in files.values() if not (folder / name).exists()]
    if missing:
        raise ArtifactError(
            f"to rebuild the report of {folder}",
            f"no {', '.join(missing)}: the run did not finish",
            "run localise again: it goes on from there",
        )
    stored: dict[str, Any] = {name: open_artifact(folder / file) for name, file in files.items()}
    return _write(folder, Results(record, **stored))


def _step(folder: Path, record: Record, name: str, make: Callable[[], Any]) -> Any:
    """A result from the folder, or made now and saved there with the seconds it took."""
    path = folder / artifacts(record["key"])[name]
    if path.exists():
        return open_artifact(path)
    start = time.perf_counter()
    result = make()
    result.save(path)
    for journal in (names[name] for names in (PARTIAL, BLOCKS) if name in names):
        (folder / journal).unlink(missing_ok=True)
    record["seconds"][name] = round(time.perf_counter() - start, 3)
    write(folder, record)
    return result


def _write(folder: Path, results: Results) -> Localisation:
    """Figures, table and report into the folder."""
    (folder / TABLE).write_text(tables.csv_text(results), encoding="utf-8")
    pictures = figures.save(results, folder / FIGURES)
    (folder / REPORT).write_text(html.page(results, pictures), encoding="utf-8")
    return Localisation(results, folder / REPORT)


def _comparable(task: Task) -> Positions:
    """The finest positions that mean the same in every pair."""
    if task.aligned:
        return "aligned"
    shared = task.spans and set.intersection(*(set(spans) for spans in task.spans))
    return "named" if shared else "all"
