"""Options that several commands have, and the model that they name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from mechattr.models.base import HookedModel

Model = Annotated[str, typer.Option(help='"tiny" (bundled), a folder, or a name on the model hub.')]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps, ...")]
Dtype = Annotated[str | None, typer.Option(help="float32, float64, bfloat16, ...")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a result made with other settings.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")]


def load(model: str, device: str | None, dtype: str | None) -> HookedModel:
    """The model of a command."""
    from mechattr.models.load import load as hooked

    return hooked(model, device=device, dtype=dtype)
