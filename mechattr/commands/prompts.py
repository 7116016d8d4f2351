"""The commands that take a prompt: `decompose` and `lens`."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.markup import escape

from mechattr.commands.options import AsJson, Device, Dtype, Model, Overwrite, Settings, check_settings, load, settings
from mechattr.commands.show import echo_json, records, show, table
from mechattr.errors import OutputExistsError, UnknownNameError, nearest
from mechattr.methods import METHODS

if TYPE_CHECKING:
    import pandas as pd

    from mechattr.decomposition.result import Decomposition

WHOLE = 40  # rows of a table that is shown in full and in its own order
LARGEST = 20  # rows shown of a longer one
TOKENS = {"pos": "token", "query": "query_token", "key": "key_token"}  # shown in one column
SHORT = {"dla": "direct_logit_attribution", "routes": "information_flow_routes"}

Prompt = Annotated[str, typer.Option(help="The text.")]
Foil = Annotated[str | None, typer.Option(help="A token whose logit is subtracted from the target's.")]
Out = Annotated[
    Path | None, typer.Option(help="Folder for the artifact, the table as CSV, the figure, and a page of routes.")
]


def decompose(
    model: Model,
    prompt: Prompt,
    target: Annotated[
        str | None, typer.Option(help='The token whose logit is explained, with its leading space: " Mary".')
    ] = None,
    foil: Foil = None,
    position: Annotated[
        int | None, typer.Option(help="Where it is predicted: from 0, or negative from the end [default: the last]")
    ] = None,
    method: Annotated[
        str, typer.Option(help="A method that takes prompts, such as dla, alti_logit, lrp or routes.")
    ] = "dla",
    setting: Settings = None,
    out: Out = None,
    device: Device = None,
    dtype: Dtype = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Take a prediction apart: what tokens, heads, layers and components add to a logit."""
    name = _method(method)
    given = {"target": target, "foil": foil, "position": position}
    chosen = {key: value for key, value in given.items() if value is not None} | settings(setting or [])
    result: Decomposition = _function(name, chosen)(load(model, device, dtype), prompt, **chosen)
    frame = result.to_pandas()
    files = [] if out is None else _written(result, name, out, overwrite)
    _show(result, frame, name, files, as_json)


def lens(
    model: Model,
    prompt: Prompt,
    target: Annotated[str | None, typer.Option(help="A token that is followed through the layers.")] = None,
    foil: Foil = None,
    position: Annotated[
        int | None, typer.Option(help="One position, from 0 or negative from the end; by default all [shown: the last]")
    ] = None,
    sites: Annotated[
        str | None, typer.Option(help="resid_pre, resid_mid, resid_post or full names, separated by commas.")
    ] = None,
    k: Annotated[int, typer.Option(min=1, help="How many of the likeliest tokens are kept.")] = 5,
    tuned: Annotated[Path | None, typer.Option(exists=True, help="A tuned lens, as `TunedLens.save` wrote it.")] = None,
    out: Out = None,
    device: Device = None,
    dtype: Dtype = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Show what each layer would predict: the logit lens, or a tuned one."""
    from mechattr.decomposition.logit_lens import logit_lens
    from mechattr.decomposition.tuned_lens import TunedLens

    result = logit_lens(
        load(model, device, dtype),
        prompt,
        sites=None if sites is None else [site.strip() for site in sites.split(",")],
        target=target,
        foil=foil,
        position=position,
        k=k,
        tuned=None if tuned is None else TunedLens.load(tuned),
    )
    files = [] if out is None else _written(result, "logit_lens", out, overwrite)
    if as_json:
        echo_json(_document(result, result.to_pandas(), "logit_lens", files))
        return
    from mechattr.draw.tokens import spell  # imports torch

    at_end = result.tensors["score/kl"].axes == ("site",)
    place = len(result.strings[0]) - 1 if not at_end else cast(list[int], result.settings["position"])[0]
    scores = {name: (x if at_end else x.sel(pos=place)).values.tolist() for name, x in result.scores.items()}
    top = result.to_pandas()
    top = top if at_end else top[top["pos"] == place]
    rows = []
    for row, (site, words) in enumerate(top.groupby("site", sort=False)):
        shown = " ".join(f"{spell(word)}({p:.2f})" for word, p in zip(words["top_token"], words["value"], strict=True))
        rows.append({"site": site, "likeliest": shown, **{name: values[row] for name, values in scores.items()}})
    title = f"Predictions at position {place}, after {result.strings[0][place]!r}"
    show([table(escape(title), rows)], [f"Written: {file}" for file in files])


def _method(asked: str) -> str:
    """The name of a method that `decompose` runs."""
    name = SHORT.get(asked, asked)
    known = [row.name for row in METHODS.values() if row.command == "decompose"]
    if name not in known:
        fix = nearest(asked, [*known, *SHORT])
        raise UnknownNameError(f"method {asked!r}", f"decompose has {', '.join(known)}", fix)
    return name


def _function(name: str, chosen: dict[str, Any]) -> Any:
    """The function of a method, which must know all settings and be given those that it needs."""
    module, _, attribute = METHODS[name].function.partition(":")
    function = getattr(import_module(module), attribute)
    check_settings(function, name, chosen, "--{}")
    return function


def _written(result: Decomposition, name: str, out: Path, overwrite: bool) -> list[str]:
    """Writes the artifact, the table and the figure of a result, and the interactive page of routes."""
    import matplotlib

    from mechattr import draw
    from mechattr.artifact import open as open_artifact
    from mechattr.decomposition.routes import Routes

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    artifact = out / f"{name}.safetensors"
    if artifact.exists() and not overwrite:
        old = open_artifact(artifact)
        if (dict(old.settings), dict(old.provenance)) != (dict(result.settings), dict(result.provenance)):
            raise OutputExistsError(
                f"to write into {out}", f"{artifact.name} of other settings", "choose another folder or --overwrite"
            )
    out.mkdir(parents=True, exist_ok=True)
    result.save(artifact)
    result.to_pandas().to_csv(out / f"{name}.csv", index=False)
    figure = cast(Any, result.plot().figure)
    draw.save(figure, out / f"{name}.png")
    plt.close(figure)  # pyplot keeps what it made
    kinds = ["safetensors", "csv", "png"]
    if isinstance(result, Routes):
        (out / f"{name}.html").write_text(result.page(), encoding="utf-8")
        kinds.append("html")
    return [str(out / f"{name}.{kind}") for kind in kinds]


def _document(result: Decomposition, frame: pd.DataFrame, name: str, files: list[str]) -> dict[str, Any]:
    settings = {key: value for key, value in result.settings.items() if key != "vocabulary"}
    return {"method": name, "settings": settings, "table": records(frame), "files": files}


def _show(result: Decomposition, frame: pd.DataFrame, name: str, files: list[str], as_json: bool) -> None:
    if as_json:
        echo_json(_document(result, frame, name, files))
        return
    title, column = name, "value" if "value" in frame else "weight"
    if len(frame) > WHOLE:
        title = f"{name}: the {LARGEST} largest of {len(frame)}"
        frame = frame.reindex(frame[column].abs().sort_values(ascending=False, kind="stable").index[:LARGEST])
    from mechattr.draw.tokens import spell  # imports torch

    for place, text in TOKENS.items():
        if text in frame:
            frame[place] = [f"{i} {spell(token)}" for i, token in zip(frame[place], frame.pop(text), strict=True)]
    lines = []
    target, foil, logit = (cast(Any, result.settings.get(key)) for key in ("target", "foil", "logit"))
    if target and logit:
        lines.append(f"logit of {target[0]!r}" + (f" minus {foil[0]!r}" if foil else "") + f": {logit[0]:.4f}")
    show([table(title, records(frame))], [*lines, *(f"Written: {file}" for file in files)])
