"""Options that several commands have, and the model that they name."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from mechattr.models.base import HookedModel

Model = Annotated[str, typer.Option(help='"tiny" (bundled), a folder, or a name on the model hub.')]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps, ...")]
Dtype = Annotated[str | None, typer.Option(help="float32, float64, bfloat16, ...")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a result made with other settings.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", help="A setting of the method, NAME=VALUE; may be repeated.")
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")]


def load(model: str, device: str | None, dtype: str | None) -> HookedModel:
    """The model of a command."""
    from mechattr.models.load import load as hooked

    return hooked(model, device=device, dtype=dtype)


def settings(given: list[str]) -> dict[str, Any]:
    """NAME=VALUE pairs; a value that is JSON is read as such, else as text."""
    found = {}
    for pair in given:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise typer.BadParameter(f"--set {pair}: give NAME=VALUE")
        try:
            found[name] = json.loads(value)
        except json.JSONDecodeError:
            found[name] = value
    return found


def check_settings(function: Callable[..., Any], name: str, chosen: Mapping[str, Any], option: str) -> None:
    """Whether a function knows all settings that were chosen, and was given those that it needs.

    Args:
        function: what takes them as keywords.
        name: what it is called.
        chosen: settings by name.
        option: how a setting is given, with `{}` where its name stands.

    Raises:
        SettingError: it does not, or was not.
    """
    from mechattr.errors import SettingError

    taken = {key: p for key, p in inspect.signature(function).parameters.items() if p.kind is p.KEYWORD_ONLY}
    for key in chosen:
        if key not in taken:
            raise SettingError(f"{key} for {name}", f"it takes {', '.join(taken) or 'no settings'}", "leave it out")
    lacking = [key for key, p in taken.items() if p.default is p.empty and key not in chosen]
    if lacking:
        raise SettingError(name, f"no {lacking[0]}", f"give {option.format(lacking[0])}")


def whole_numbers(option: str, given: str) -> list[int]:
    """Whole numbers, separated by commas."""
    try:
        return [int(part) for part in given.split(",")]
    except ValueError as error:
        raise typer.BadParameter(f"{option} {given}: give whole numbers, separated by commas") from error


def numbers(option: str, given: str) -> list[float]:
    """Numbers, separated by commas."""
    try:
        return [float(part) for part in given.split(",")]
    except ValueError as error:
        raise typer.BadParameter(f"{option} {given}: give numbers, separated by commas") from error
