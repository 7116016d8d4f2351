"""The commands about tokens and words: `erase` and `vocabulary`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from mechattr.commands.options import AsJson, Device, Dtype, Model, Overwrite, load, whole_numbers
from mechattr.commands.show import echo_json, records, show, table

if TYPE_CHECKING:
    from mechattr.erasure.recipes import Recipe

SHOWN = 20


def erase(
    model: Model,
    text: Annotated[
        list[Path],
        typer.Option(
            help="UTF-8 file, .txt or .txt.xz: documents between <|endoftext|>, else one a line; may be repeated."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the page, the probes, the tables and the figure.")],
    probes: Annotated[
        Path | None, typer.Option(exists=True, help="Probes of this model from an earlier run; none are fitted.")
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(help="Layers with probes, such as -1,0,3: -1 is the embedding, the last the final norm [all]"),
    ] = None,
    recipe: Annotated[
        Literal["descent", "closed", "reference"], typer.Option(help="How probes are fitted.")
    ] = "descent",
    epochs: Annotated[int | None, typer.Option(min=1, help="Passes over the fitted documents, of a descent.")] = None,
    documents: Annotated[int, typer.Option(min=1, help="Most documents, drawn by --seed.")] = 600,
    held_out: Annotated[float, typer.Option(help="Share of the documents that is measured on.")] = 0.25,
    start: Annotated[int | None, typer.Option(help="Layer from which probabilities drop [1 of 32, scaled]")] = None,
    end: Annotated[int | None, typer.Option(help="Layer to which they drop [9 of 32, scaled]")] = None,
    longest: Annotated[int | None, typer.Option(min=1, help="Most tokens of a segment.")] = None,
    window: Annotated[int, typer.Option(min=1, help="Most tokens of a document; longer ones are cut up.")] = 256,
    seed: Annotated[int, typer.Option(help="Of which documents are taken and held out, and of training.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Documents of one forward pass.")] = 8,
    device: Device = None,
    dtype: Dtype = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Find which tokens a model forgets inside words, and read out the words it seems to have."""
    from mechattr import report
    from mechattr.erasure import ErasureProbes, drawn

    if probes is not None and (layers is not None or epochs is not None or recipe != "descent"):
        raise typer.BadParameter("--layers, --recipe and --epochs are of probes that are fitted, not of --probes")
    chosen = None if layers is None else whole_numbers("--layers", layers)
    settings = _recipe(recipe, epochs)
    texts = drawn(text, characters=3 * window, most=documents, seed=seed)
    result = report.erase(
        load(model, device, dtype),
        texts,
        out=out,
        probes=None if probes is None else ErasureProbes.load(probes),
        layers=chosen,
        recipe=settings,
        held_out=held_out,
        start=start,
        end=end,
        longest=longest,
        window=window,
        seed=seed,
        batch_size=batch_size,
        overwrite=overwrite,
    )
    items = result.vocabulary.to_pandas().drop(columns="ids")
    often = items[items["count"] > 1]
    shown = (often if len(often) else items).head(SHOWN).assign(text=lambda frame: frame["text"].map(repr))
    if as_json:
        agreement = result.agreement
        document = {"summary": result.summary, "report": str(result.report_path)}
        echo_json(document | {"items": records(items.head(SHOWN)), "agreement": records(agreement)})
        return
    show(
        [table("Read out more than once, by mean psi" if len(often) else "Read out, by psi", records(shown))],
        [result.summary, f"Report: {result.report_path}"],
    )


def vocabulary(
    model: Model,
    by: Annotated[
        str | None,
        typer.Option(help="input_norm, cosine, cosine_centred, cosine_without_first or distance [by the weights]"),
    ] = None,
    unused: Annotated[
        str | None, typer.Option(help="Ids known to be unused, such as 177-187,50256 [bytes that no text has]")
    ] = None,
    share: Annotated[
        float, typer.Option(help="Share of the reachable tokens that the model is asked to repeat.")
    ] = 0.02,
    verify: Annotated[bool, typer.Option("--verify/--no-verify", help="Ask the model at all.")] = True,
    out: Annotated[Path | None, typer.Option(help="Folder for the page, the table and the figure.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts of one forward pass.")] = 64,
    device: Device = None,
    dtype: Dtype = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Find tokens that no text produces, and those that training never reached."""
    from mechattr import report
    from mechattr.vocabulary.reach import CATEGORIES

    known = None if unused is None else _ids(unused)
    result = report.vocabulary(
        load(model, device, dtype),
        out=out,
        by=by,
        unused=known,
        share=share,
        verify=verify,
        batch_size=batch_size,
        overwrite=overwrite,
    )
    frame = result.found.to_pandas().head(SHOWN)
    if as_json:
        document = {"summary": result.summary, "categories": result.found.counts, "tokens": records(frame)}
        place = None if result.report_path is None else str(result.report_path)
        echo_json(document | {"calibration": result.found.calibration, "report": place})
        return
    counts = [{"category": name, "ids": n, "meaning": CATEGORIES[name]} for name, n in result.found.counts.items()]
    title = f"Lowest {result.found.settings['indicator']} of the reachable tokens"
    lines = [result.summary] if result.report_path is None else [result.summary, f"Report: {result.report_path}"]
    show(
        [table("Can a text produce it?", counts), table(title, records(frame.assign(text=frame["text"].map(repr))))],
        lines,
    )


def _recipe(name: str, epochs: int | None) -> Recipe:
    from dataclasses import replace

    from mechattr.erasure import Closed, Descent

    if name == "closed":
        if epochs is not None:
            raise typer.BadParameter("--epochs goes with a descent; --recipe closed needs one pass")
        return Closed()
    found = Descent.reference() if name == "reference" else Descent()
    return found if epochs is None else replace(found, epochs=epochs)


def _ids(given: str) -> list[int]:
    """Ids and ranges of ids, separated by commas."""
    found: list[int] = []
    for part in given.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if match is None:
            raise typer.BadParameter(f"--unused {given}: give ids and ranges such as 177-187, separated by commas")
        found += range(int(match[1]), int(match[2] or match[1]) + 1)
    return found
