"""What the commands of steering read: contrasts, vectors, and where these act."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from mechattr.errors import ArtifactError, MismatchError

if TYPE_CHECKING:
    from mechattr.models.base import HookedModel
    from mechattr.steering import Condition
    from mechattr.steering.contrasts import Contrasts
    from mechattr.steering.prompted import Steering

Triples = Annotated[
    Path | None, typer.Option(help="JSONL with prompt, preferred, dispreferred: a text and two answers to it.")
]
Task = Annotated[
    str | None, typer.Option(help="Contrasts made here: subject_verb (plural verbs) or gendered_pronoun (she).")
]
Number = Annotated[int, typer.Option(min=1, help="Number of pairs to make for --task.")]
Split = Annotated[Literal["train", "test"], typer.Option(help="Templates and fillers of --task.")]
Vector = Annotated[Path, typer.Option(help="The vector: .safetensors, .gguf, or .json of conditional steering.")]
Acts = Annotated[
    str, typer.Option(help="Where it acts: all, prompt, generated, last, or numbers of positions such as 0,1,-1.")
]
Operator = Annotated[str, typer.Option(help="add, norm_preserving, ablate, ablate_then_add, clamp, angular or scale.")]
Gate = Annotated[
    Path | None,
    typer.Option(help="A condition, of fit --builder condition: steer only prompts that it opens for."),
]
AnyModel = Annotated[
    bool, typer.Option("--any-model", help="Also take a vector that was made with other weights, where its sites fit.")
]


def contrasts(
    model: HookedModel, pairs: Path | None, triples: Path | None, task: str | None, *, n: int, seed: int, split: str
) -> Contrasts:
    """The contrasts that the options name."""
    from mechattr.steering.contrasts import behaviour, read_pairs, read_triples

    if pairs is not None:
        return read_pairs(pairs)
    return behaviour(model, str(task), n=n, seed=seed, split=split) if triples is None else read_triples(triples)


def steering_for(model: HookedModel, path: Path, *, any_model: bool) -> Steering:
    """What a file steers with, which must be of this model where it says of which it is.

    Raises:
        ArtifactError: no such file, or one that is damaged or holds something else.
        MismatchError: steering that was made with other weights, unless any model will do.
    """
    from mechattr.artifact import open as open_artifact
    from mechattr.steering import GAct, ReFT, SteeringVector, from_gguf, from_json

    readers: dict[str, Any] = {".gguf": from_gguf, ".json": from_json}
    found = readers.get(path.suffix, open_artifact)(path)
    if not isinstance(found, SteeringVector | ReFT | GAct):
        raise ArtifactError(f"steering from {path}", f"kind {found.kind!r}", "give what mechattr steer fit has written")
    return _own(found, model, any_model)


def gate_for(model: HookedModel, path: Path | None, *, any_model: bool) -> Condition | None:
    """The condition of a file; errors are those of `steering_for`."""
    from mechattr.steering import Condition

    return None if path is None else _own(Condition.load(path), model, any_model)


def _own(found: Any, model: HookedModel, any_model: bool) -> Any:
    from mechattr.models.record import check_belongs

    if found.provenance and not any_model:  # files of other programs do not say whose they are
        try:
            check_belongs(found, model)
        except MismatchError as error:
            fix = f"{error.fix}; --any-model takes it where its sites fit, as in another --dtype"
            raise MismatchError(error.asked, error.found, fix) from error
    return found


def where(positions: str) -> str | list[int]:
    """Position numbers where they are numbers, else the word."""
    try:
        return [int(part) for part in positions.split(",")]
    except ValueError:
        return positions
