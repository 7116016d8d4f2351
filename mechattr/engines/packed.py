"""A result as JSON: what a worker sends back, and what a journal keeps of a finished block."""

from __future__ import annotations

import base64
import importlib
from typing import Any

import torch
from torch import Tensor

from mechattr.base import Artifact
from mechattr.kinds import KINDS
from mechattr.labelled import Labelled


def packed(artifact: Artifact) -> dict[str, Any]:
    """An artifact as JSON; the bytes of its tensors are kept as they are."""
    tensors = {
        name: {
            "axes": list(table.axes),
            "coords": {axis: list(values) for axis, values in table.explicit_coords.items()},
            **bytes_of(table.values),
        }
        for name, table in artifact.tensors.items()
    }
    settings, provenance = dict(artifact.settings), dict(artifact.provenance)
    return {"kind": artifact.kind, "tensors": tensors, "settings": settings, "provenance": provenance}


def unpacked(document: dict[str, Any]) -> Artifact:
    """The artifact in a document of `packed`."""
    module, name = KINDS[document["kind"]].split(":")
    kind: type[Artifact] = getattr(importlib.import_module(module), name)
    tensors = {
        name: Labelled(tensor_of(table), table["axes"], table["coords"]) for name, table in document["tensors"].items()
    }
    return kind(tensors, settings=document["settings"], provenance=document["provenance"])


def bytes_of(values: Tensor) -> dict[str, Any]:
    """A tensor as JSON."""
    flat = values.detach().cpu().contiguous().flatten().view(torch.uint8)
    return {
        "dtype": str(values.dtype).removeprefix("torch."),
        "shape": list(values.shape),
        "data": base64.b64encode(flat.numpy().tobytes()).decode(),
    }


def tensor_of(table: dict[str, Any]) -> Tensor:
    """The tensor in a document of `bytes_of`."""
    flat = torch.empty(table["shape"], dtype=getattr(torch, table["dtype"]))
    if flat.numel():
        data = bytearray(base64.b64decode(table["data"]))
        flat.flatten().view(torch.uint8)[:] = torch.frombuffer(data, dtype=torch.uint8)
    return flat
