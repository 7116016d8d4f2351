"""The command `steer evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mechattr.commands.options import AsJson, Device, Dtype, Model, Overwrite, load, numbers
from mechattr.commands.show import echo_json, records, show, table
from mechattr.commands.vectors import (
    Acts,
    AnyModel,
    Gate,
    Number,
    Operator,
    Split,
    Task,
    Triples,
    Vector,
    contrasts,
    gate_for,
    steering_for,
    where,
)

if TYPE_CHECKING:
    from mechattr.models.base import HookedModel


def evaluate(
    model: Model,
    vector: Vector,
    out: Annotated[Path, typer.Option(help="Folder for the page, the tables, the figures and the artifacts.")],
    triples: Triples = None,
    task: Task = None,
    n: Number = 32,
    split: Split = "test",
    neutral: Annotated[
        str | None,
        typer.Option(help="Texts for side effects: a UTF-8 file, one a line, or a task whose prompts they are."),
    ] = None,
    multipliers: Annotated[str, typer.Option(help="Numbers, separated by commas.")] = "-2,-1,-0.5,0,0.5,1,2",
    positions: Acts = "all",
    operator: Operator = "add",
    gate: Gate = None,
    random: Annotated[int, typer.Option(min=1, help="Random vectors of equal length beside it.")] = 3,
    shuffled: Annotated[
        Path | None, typer.Option(help="A vector of shuffled labels, of fit --shuffled, to stand beside it.")
    ] = None,
    prompting: Annotated[
        str | None, typer.Option(help="A text in front of each prompt, to be compared with; with its space at the end.")
    ] = None,
    generate: Annotated[int, typer.Option(min=0, help="Tokens that are written to each prompt, and measured.")] = 0,
    by_layer: Annotated[bool, typer.Option("--by-layer", help="Also each layer of the vector alone.")] = False,
    seed: Annotated[int, typer.Option(help="Of --task and of the random vectors.")] = 0,
    any_model: AnyModel = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows of one forward pass.")] = 32,
    device: Device = None,
    dtype: Dtype = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Measure what a vector does to a behaviour and to everything else, beside controls."""
    from mechattr import report

    if (triples is None) == (task is None):
        raise typer.BadParameter("give exactly one of --triples and --task")
    factors = numbers("--multipliers", multipliers)
    loaded = load(model, device, dtype)
    result = report.steer(
        loaded,
        steering_for(loaded, vector, any_model=any_model),
        contrasts(loaded, None, triples, task, n=n, seed=seed, split=split).triples,
        out=out,
        multipliers=factors,
        positions=where(positions),
        operator=operator,
        gate=gate_for(loaded, gate, any_model=any_model),
        neutral=() if neutral is None else _texts(loaded, neutral, seed),
        random=random,
        shuffled=None if shuffled is None else steering_for(loaded, shuffled, any_model=any_model),
        prompting=prompting,
        generate=generate,
        by_layer=by_layer,
        seed=seed,
        batch_size=batch_size,
        overwrite=overwrite,
    )
    rows = records(result.evaluation.to_pandas())
    if as_json:
        echo_json({"summary": result.summary, "report": str(result.report_path), "table": rows})
        return
    lines = [result.summary, f"Report: {result.report_path}"]
    show([table("Propensity in nats, and how steering changes it", [_shown(row) for row in rows])], lines)


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    """A row as it is read: intervals beside what they are of."""
    multiplier = "" if row["multiplier"] is None else f"{row['multiplier']:g}"
    change = f"{row['effect']:.3g} [{row['effect_low']:.3g}, {row['effect_high']:.3g}]"
    start = {"condition": row["condition"], "multiplier": multiplier, "propensity": row["propensity"]}
    return start | {"change [95 %]": change} | ({"KL [nats a token]": row["kl"]} if "kl" in row else {})


def _texts(model: HookedModel, given: str, seed: int) -> list[str]:
    """The lines of a file, or the prompts of a task."""
    from mechattr.erasure.documents import read_texts
    from mechattr.steering.contrasts import prompts
    from mechattr.tasks.table import TASKS

    return prompts(model, given, seed=seed) if given in TASKS else read_texts(given)
