"""The command line: each command reads its options, calls one function and shows what comes back.

Exit codes: 0 when all went well; 1 when `doctor` finds something wrong, or for an error that mechattr did not foresee
(with its traceback); 2 for wrong use, and for every error of mechattr's own (as text, without a traceback).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape

import mechattr as ma
from mechattr.commands.prompts import decompose, lens
from mechattr.commands.show import echo_json, table
from mechattr.commands.steer import steer
from mechattr.commands.words import erase, vocabulary
from mechattr.errors import MechattrError

if TYPE_CHECKING:
    from mechattr.models.base import HookedModel
    from mechattr.tasks import Task

ROWS_SHOWN = 20

app = typer.Typer(
    name="mechattr",
    help="Find the components of a transformer that cause a behaviour, and check them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain messages: a box would wrap them, and logs keep the box
)


app.command()(decompose)
app.command()(lens)
app.command()(erase)
app.command()(vocabulary)
app.add_typer(steer, name="steer")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line on `argv` (default: the arguments of this process) and exits."""
    try:
        app(args=None if argv is None else list(argv), prog_name="mechattr")
    except MechattrError as error:
        Console(stderr=True, soft_wrap=True).print(f"[red]{escape(str(error))}[/red]", highlight=False)
        sys.exit(2)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"mechattr {ma.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def localise(
    model: Annotated[str, typer.Option(help='"tiny" (bundled), a folder, or a name on the model hub.')],
    out: Annotated[Path, typer.Option(help="Folder for the report, the figures, the tables and the artifacts.")],
    task: Annotated[
        str | None, typer.Option(help="ioi, greater_than, subject_verb, gendered_pronoun, induction or resampled.")
    ] = None,
    pairs: Annotated[Path | None, typer.Option(help="Your own pairs: JSONL with clean, corrupt, answer, foil.")] = None,
    texts: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Texts for --task resampled, one a line.")
    ] = None,
    metric: Annotated[str | None, typer.Option(help="Such as sequence_log_probability, for long answers.")] = None,
    n: Annotated[int, typer.Option(min=1, help="Number of prompt pairs to make for --task.")] = 32,
    split: Annotated[Literal["train", "test"], typer.Option(help="Which templates and fillers to use.")] = "test",
    seed: Annotated[int, typer.Option(help="Seed of the pairs and of everything else that is drawn.")] = 0,
    sites: Annotated[
        str | None,
        typer.Option(help="Sites whose components are scored, separated by commas; by default all heads and neurons."),
    ] = None,
    positions: Annotated[
        Literal["aligned", "named", "all"] | None,
        typer.Option(help="Score each position, the task's named spans, or all together; by default the finest."),
    ] = None,
    direction: Annotated[
        Literal["noising", "denoising"], typer.Option(help="Corrupt into clean, or clean into corrupt.")
    ] = "noising",
    top: Annotated[int, typer.Option(min=1, help="Number of components to check by exact patching.")] = 50,
    variant: Annotated[
        str | None,
        typer.Option(help="Score by which they are chosen: atp, qk, graddrop, star, max, two_point or hedged."),
    ] = None,
    bound: Annotated[
        int | None,
        typer.Option(min=0, help="Forward passes spent on bounding what was not checked; 0 for none [default: 30/p]"),
    ] = None,
    circuit: Annotated[
        int, typer.Option(min=0, help="Edges of a circuit to extract and test for faithfulness; 0 for none.")
    ] = 0,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps, ...")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, float64, bfloat16, ...")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Rows of one forward pass.")] = None,
    executor: Annotated[
        Literal["inprocess", "ray"] | None, typer.Option(help="Run the pairs in blocks, here or on a Ray cluster.")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Blocks that --executor ray runs at once.")] = None,
    cluster: Annotated[
        str | None, typer.Option(help='A running Ray cluster: "auto" or host:port; by default one is started.')
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a result made with other settings.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")] = False,
) -> None:
    """Find which components cause a behaviour: estimate all, check the best exactly, write a report."""
    if (task is None) == (pairs is None):
        raise typer.BadParameter("give exactly one of --task and --pairs")
    if (task == "resampled") != (texts is not None):
        raise typer.BadParameter("--texts FILE and --task resampled go together")
    if executor != "ray" and (workers is not None or cluster is not None):
        raise typer.BadParameter("--workers and --cluster go with --executor ray")
    chosen: dict[str, Any] = {} if variant is None else {"variant": variant}
    if executor is not None:
        from mechattr.engines.ray_executor import RayExecutor

        chosen["executor"] = RayExecutor(workers=workers, address=cluster) if executor == "ray" else executor
    loaded = ma.load(model, device=device, dtype=dtype)
    result = ma.report.localise(
        loaded,
        _make_task(loaded, task, pairs, texts, n=n, seed=seed, split=split, metric=metric),
        out=out,
        top=top,
        bound=bound,
        circuit=circuit,
        direction=direction,
        sites=None if sites is None else tuple(site.strip() for site in sites.split(",")),
        positions=positions,
        seed=seed,
        batch_size=batch_size,
        overwrite=overwrite,
        **chosen,
    )
    if as_json:
        document = {"summary": result.summary, "report": str(result.report_path), "components": result.table(top)}
        echo_json(document)
        return
    console = Console(soft_wrap=True)
    rows = [{name: value for name, value in row.items() if name != "site"} for row in result.table(ROWS_SHOWN)]
    console.print(table("Top components", rows))
    console.print(escape(result.summary), highlight=False)
    console.print(f"Report: {escape(str(result.report_path))}", highlight=False)


@app.command()
def report(
    path: Annotated[Path, typer.Argument(help="The folder of an earlier localise.")],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")] = False,
) -> None:
    """Build the report of a folder again from the artifacts stored there."""
    result = ma.report.rebuild(path)
    if as_json:
        echo_json({"summary": result.summary, "report": str(result.report_path)})
    else:
        typer.echo(f"Report: {result.report_path}")


@app.command()
def models(
    verify: Annotated[bool, typer.Option("--verify", help="Measure it on small random models.")] = False,
    family: Annotated[list[str] | None, typer.Option(help="With --verify: this family only; may be repeated.")] = None,
    write: Annotated[Path | None, typer.Option(help="With --verify of all families: a page of documentation.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")] = False,
) -> None:
    """List the model families, their sites and what was verified of each; --verify measures it here."""
    from mechattr.models import architectures

    if not verify and (family or write):
        raise typer.BadParameter("--family and --write need --verify")
    if write and family:
        raise typer.BadParameter("--write needs all families")
    if write and (write.is_dir() or not write.parent.is_dir()):  # asked before, since measuring takes minutes
        raise typer.BadParameter(f"--write {write}: give a file in a folder that exists")
    if verify:
        _verify(family or [], write, as_json)
        return
    rows = architectures.table()
    if as_json:
        echo_json(rows)
    else:
        console = Console(soft_wrap=True)
        console.print(table("Model families", [{k: v for k, v in row.items() if k != "verified"} for row in rows]))
        for checks in dict.fromkeys(row["verified"] for row in rows):  # a column of its own would be most of the table
            families = ", ".join(row["family"] for row in rows if row["verified"] == checks)
            console.print(f"verified of {families}: {checks}", markup=False, highlight=False)


def _verify(family: Sequence[str], write: Path | None, as_json: bool) -> None:
    """Measures families, shows the deviations, and fails if one is over its limit."""
    from tqdm.auto import tqdm

    from mechattr.report import families

    names = families.chosen(family)
    bar = tqdm(families.verified(names), total=len(names), desc="verifying families", disable=None)
    results = dict(bar)
    if write is not None:
        write.write_text(families.page(results), encoding="utf-8")
    if as_json:
        echo_json({name: [asdict(check) for check in checks] for name, checks in results.items()})
    else:
        console = Console(soft_wrap=True)
        console.print(table("Largest relative deviations", families.rows(results)))
    wrong = [name for name, checks in results.items() if not all(check.passed for check in checks)]
    if wrong:
        typer.echo(f"over their limits: {', '.join(wrong)}", err=True)
        raise typer.Exit(1)


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")] = False,
) -> None:
    """Say what is installed, what is wrong with it and how to mend it."""
    from mechattr.doctor import diagnose

    with Console(stderr=True).status("Importing every backend, each in a process of its own"):
        findings = diagnose()
    wrong = [finding for finding in findings if finding.fix]
    if as_json:
        echo_json({"healthy": not wrong, "findings": [asdict(finding) for finding in findings]})
    else:
        console = Console(soft_wrap=True)
        for finding in findings:
            mark = "[red]wrong[/red]" if finding.fix else "[green]ok[/green]   "
            console.print(f"{mark} {escape(finding.topic)}: {escape(finding.found)}", highlight=False)
            if finding.fix:
                console.print(f"      fix: {escape(finding.fix)}", highlight=False)
        console.print(f"{len(wrong)} of {len(findings)} are wrong." if wrong else "All is well.", highlight=False)
    if wrong:
        raise typer.Exit(1)


def _make_task(
    model: HookedModel,
    task: str | None,
    pairs: Path | None,
    texts: Path | None,
    *,
    n: int,
    seed: int,
    split: Literal["train", "test"],
    metric: str | None,
) -> Task:
    """The task that the options name."""
    chosen: dict[str, Any] = {} if metric is None else {"metric": metric}
    if pairs is not None:
        return ma.tasks.from_pairs(model, pairs, **chosen)
    if texts is not None:
        return ma.tasks.resampled(model, _lines(texts), n=n, seed=seed, **chosen)
    return ma.tasks.make(model, str(task), n=n, seed=seed, split=split, **chosen)


def _lines(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise typer.BadParameter(f"{path} is not UTF-8 text: {error}") from error
    return [line for line in lines if line.strip()]
