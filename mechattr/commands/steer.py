"""The commands of steering: `steer fit`, `steer apply` and `steer evaluate`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from mechattr.commands.options import (
    AsJson,
    Device,
    Dtype,
    Model,
    Settings,
    check_settings,
    load,
    numbers,
    settings,
    whole_numbers,
)
from mechattr.commands.show import echo_json, records, show, table
from mechattr.commands.steer_evaluate import evaluate
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
from mechattr.errors import OutputExistsError, SettingError, UnknownNameError, nearest

if TYPE_CHECKING:
    from mechattr.base import Artifact
    from mechattr.sites import Node

# what each builder is made from
BUILDERS = {
    "mean_difference": "pairs",
    "mass_mean": "pairs",
    "pca": "pairs",
    "probe": "pairs",
    "iti": "pairs",
    "act_add": "pairs",
    "refusal": "pairs",
    "g_act": "pairs",
    "condition": "pairs",
    "grains": "triples",
    "learned": "triples",
    "reft": "triples",
}

steer = typer.Typer(
    help="Make steering vectors, generate with them, and measure what they do.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@steer.command()
def fit(
    model: Model,
    out: Annotated[Path, typer.Option(help="The file of the vector, such as vector.safetensors.")],
    pairs: Annotated[
        Path | None, typer.Option(help="JSONL with positive, negative: a text with the behaviour, and one without.")
    ] = None,
    triples: Triples = None,
    task: Task = None,
    n: Number = 32,
    split: Split = "train",
    builder: Annotated[str, typer.Option(help=f"{', '.join(BUILDERS)}.")] = "mean_difference",
    layers: Annotated[str | None, typer.Option(help="Blocks whose output is steered, such as 1,2.")] = None,
    sites: Annotated[
        str | None, typer.Option(help="In place of layers: sites such as z, by short or full name.")
    ] = None,
    nodes: Annotated[
        Path | None, typer.Option(help="In place of layers: an attribution of localise, whose --top nodes are steered.")
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="How many of --nodes.")] = 10,
    positions: Annotated[
        str | None, typer.Option(help="Where texts are read: last, mean, or a position [default: last]")
    ] = None,
    setting: Settings = None,
    shuffled: Annotated[
        bool, typer.Option("--shuffled", help="Let the sides of half of them change places: a control for evaluate.")
    ] = False,
    gguf: Annotated[Path | None, typer.Option(help="Also write a control vector of repeng and llama.cpp.")] = None,
    seed: Annotated[int, typer.Option(help="Of --task, and of what a builder draws.")] = 0,
    device: Device = None,
    dtype: Dtype = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that exist.")] = False,
    as_json: AsJson = False,
) -> None:
    """Make a steering vector from texts with and without a behaviour."""
    from mechattr import steering

    if sum(x is not None for x in (pairs, triples, task)) != 1:
        raise typer.BadParameter("give exactly one of --pairs, --triples and --task")
    if sum(x is not None for x in (layers, sites, nodes)) > 1:
        raise typer.BadParameter("give one of --layers, --sites and --nodes")
    given = settings(setting or [])
    if own := next((name for name in ("layers", "sites", "positions", "seed") if name in given), None):
        raise typer.BadParameter(f"--set {own}: give --{own}")
    chosen = given | {
        "layers": None if layers is None else whole_numbers("--layers", layers),
        "sites": _sites(sites, nodes, top),
        "positions": None if positions is None else _position(positions),
    }
    chosen = {name: value for name, value in chosen.items() if value is not None}
    function = _builder(builder, chosen)
    files = [file for file in (out, gguf) if file is not None]
    for file in files:
        _writable(file, overwrite)
    if out.suffix in (".gguf", ".json"):  # they are read as files of other programs
        raise SettingError(f"--out {out}", "a file of this program", "name it *.safetensors, and another with --gguf")
    if gguf is not None and gguf.suffix != ".gguf":
        raise SettingError(f"--gguf {gguf}", "another ending", "name it *.gguf")
    loaded = load(model, device, dtype)
    found = contrasts(loaded, pairs, triples, task, n=n, seed=seed, split=split)
    data: Sequence[Any] = getattr(found, BUILDERS[builder])
    if not data:
        raise SettingError(f"{builder} from --pairs", "it needs prompts with two answers", "give --triples or --task")
    if shuffled:
        function = partial(steering.shuffled, function)
    made = function(loaded, data, seed=seed, **chosen)
    if gguf is not None:
        if not isinstance(made, steering.SteeringVector):
            raise SettingError("--gguf", f"a {made.kind}", "control vectors are plain directions: leave it out")
        steering.to_gguf(made, gguf, model_hint=loaded.info.family)
    made.save(out)
    rows = _rows(made)
    if as_json:
        document = {"builder": builder, "settings": dict(made.settings), "table": rows}
        echo_json(document | {"files": [str(file) for file in files]})
        return
    lines = [f"From {len(data)} {BUILDERS[builder]}" + ", shuffled" * shuffled + "."]
    lines += ["Share: norm over the mean length of the activations."] * isinstance(made, steering.SteeringVector)
    show([table(builder, rows)], [*lines, *(f"Written: {file}" for file in files)])


@steer.command()
def apply(
    model: Model,
    vector: Vector,
    prompt: Annotated[list[str], typer.Option(help="The text that is continued; may be repeated.")],
    multiplier: Annotated[str, typer.Option(help="Numbers, separated by commas, such as -2,0,2.")] = "1",
    positions: Acts = "all",
    operator: Operator = "add",
    gate: Gate = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of a continuation.")] = 20,
    chat: Annotated[bool, typer.Option("--chat", help="Prompts are messages to a chat model.")] = False,
    any_model: AnyModel = False,
    device: Device = None,
    dtype: Dtype = None,
    as_json: AsJson = False,
) -> None:
    """Continue prompts greedily, as the model is and as it is when steered."""
    from mechattr.steering.prompted import applied

    factors = numbers("--multiplier", multiplier)
    loaded = load(model, device, dtype)
    given = steering_for(loaded, vector, any_model=any_model)
    opens = gate_for(loaded, gate, any_model=any_model)
    common: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": False}

    def continued(texts: Sequence[str]) -> tuple[str, ...]:
        batch = loaded.tokenize(texts, chat=chat, padding_side="left")
        return loaded.generate(batch, **common).texts

    base = continued(prompt)
    with applied(given, loaded, factors * len(prompt), where(positions), operator, opens):
        steered = continued([text for text in prompt for _ in factors])
    rows = [
        [{"multiplier": x, "text": steered[i * len(factors) + j]} for j, x in enumerate(factors)]
        for i in range(len(prompt))
    ]
    if as_json:
        found = [{"prompt": p, "base": b, "steered": r} for p, b, r in zip(prompt, base, rows, strict=True)]
        echo_json({"vector": str(vector), "operator": operator, "positions": positions, "continuations": found})
        return
    tables = []
    for text, plain, moved in zip(prompt, base, rows, strict=True):
        shown = [("base", plain), *((f"{x['multiplier']:g}", x["text"]) for x in moved)]
        tables.append(table(escape(text), [{"multiplier": x, "continuation": repr(y)} for x, y in shown]))
    show(tables, [f"{operator} at {', '.join(given.sites)}, positions {positions}"])


steer.command()(evaluate)


def _builder(name: str, chosen: dict[str, Any]) -> Any:
    """The function of a builder, which must know all settings and be given those that it needs."""
    from mechattr import steering

    if name not in BUILDERS:
        raise UnknownNameError(f"builder {name!r}", "no such builder", nearest(name, BUILDERS))
    function = getattr(steering, name)
    check_settings(function, name, chosen, "--set {}=...")
    return function


def _sites(named: str | None, attribution: Path | None, top: int) -> Sequence[str | Node] | None:
    """Sites by name, or the strongest nodes of an attribution."""
    from mechattr.artifact import Attribution

    if attribution is not None:
        return Attribution.load(attribution).top(top)
    return None if named is None else [site.strip() for site in named.split(",")]


def _rows(made: Artifact) -> list[dict[str, Any]]:
    """What was made, as a table."""
    from mechattr.steering import Condition, SteeringVector

    if isinstance(made, SteeringVector):
        return records(made.to_pandas())
    if isinstance(made, Condition):
        names = ("comparator", "threshold", "f1", "held_out_f1")
        return [{"site": made.site} | {name: made.settings[name] for name in names}]
    return [{"tensor": name, "shape": " × ".join(map(str, x.shape))} for name, x in made.tensors.items()]


def _position(given: str) -> str | int:
    """A number where it is one, else the word."""
    try:
        return int(given)
    except ValueError:
        return given


def _writable(file: Path, overwrite: bool) -> None:
    """Asked before anything is computed."""
    if file.is_dir() or not file.parent.is_dir():
        raise SettingError(
            f"to write {file}", "a folder" if file.is_dir() else "no such folder", "name a file in a folder that exists"
        )
    if file.exists() and not overwrite:
        raise OutputExistsError(f"to write {file}", "a file of this name", "name another file, or --overwrite")
