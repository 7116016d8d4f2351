"""What was verified already: exact effects, or just nodes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from mechattr.artifact import Attribution
from mechattr.errors import MismatchError, SettingError
from mechattr.models.base import HookedModel
from mechattr.models.record import check_belongs
from mechattr.patching.nodes import NodeTable
from mechattr.ranking import node_vector
from mechattr.sites import Node
from mechattr.tasks.task import Task


@dataclass(frozen=True, eq=False, slots=True)
class Verified:
    """Nodes that were verified.

    Attributes:
        nodes: they themselves.
        direction: of the patching, where it is known.
        positions: what their positions mean, where it is known.
        effects: their |mean effects|, or mean |effects| where pairs are kept apart; `None` where nodes were given.
    """

    nodes: list[Node]
    direction: str | None = None
    positions: Any = None
    effects: Tensor | None = None


def verified_of(
    model: HookedModel, task: Task, verified: Attribution | Sequence[Node], sites: Sequence[str], per_pair: bool
) -> Verified:
    """Checks what was given as verified; keeps the nodes of some sites.

    Raises:
        SettingError: neither exact effects nor nodes.
        MismatchError: effects of another model or task.
    """
    if not isinstance(verified, Attribution):
        nodes = list(verified) if isinstance(verified, Iterable) else [verified]
        strange = [type(node).__name__ for node in nodes if not isinstance(node, Node)]
        if strange:
            raise SettingError("verified", f"a {strange[0]}", "give exact effects or a list of Node")
        kinds = {"all" if n.pos is None else "named" if isinstance(n.pos, str) else "aligned" for n in nodes}
        kind = kinds.pop() if len(kinds) == 1 else None  # several kinds: the table of these nodes says so
        return Verified([node for node in nodes if node.site in sites], positions=kind)
    settings = verified.settings
    if settings.get("method") != "activation_patching":
        raise SettingError(
            "verified",
            f"results of {settings.get('method')}",
            "give exact effects: activation_patching(model, task, nodes=attribution.top(50))",
        )
    check_belongs(verified, model)
    if settings["task_hash"] != task.hash():
        raise MismatchError(
            f"verified effects on task {task.name!r}",
            f"they were measured on other pairs (task {settings['task']!r})",
            "verify nodes on this task",
        )
    measured = verified.scores if per_pair else {site: abs(signed) for site, signed in verified.signed.items()}
    effects = node_vector({site: table for site, table in measured.items() if site in sites})
    nodes = [node for node in verified.nodes() if node.site in sites]
    return Verified(nodes, str(settings["direction"]), settings["positions"], effects[~effects.isnan()])


def agreed(name: str, asked: Any, known: Any) -> Any:
    """A setting as asked for, or else as it was when nodes were verified.

    Raises:
        SettingError: both are given and differ.
    """
    if asked is not None and known is not None and asked != known:
        raise SettingError(f"{name}={asked!r}", f"nodes verified with {known!r}", f"leave {name} out, or verify again")
    return asked if known is None else known


def among(table: NodeTable, part: NodeTable) -> Bool[Tensor, " node"]:
    """Which nodes of a table are in another table of the same task."""
    features = 2 + int(table.feature.max())

    def codes(t: NodeTable) -> Tensor:
        name = torch.tensor([table.names.index(n) for n in t.names])[t.name]
        return (name * max(1, len(table.labels)) + t.place) * features + t.feature + 1

    return torch.isin(codes(table), codes(part))
