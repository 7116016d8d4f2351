"""How the contract tests call each method, and what its results become when pairs, batches or heads are put in another
order."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
from patching_cases import bigness
from torch import Tensor

import mechattr as ma
from mechattr.base import Artifact
from mechattr.evaluation.faithfulness import Faithfulness
from mechattr.evaluation.minimality import Minimality
from mechattr.methods import METHODS
from mechattr.models.plain import HookedPlain
from mechattr.patching.bound_result import Bound
from mechattr.patching.edge_artifact import EdgeAttribution, edge_tables
from mechattr.patching.graph import Graph
from mechattr.sites import Node
from mechattr.tasks.task import Task

SITES = ("q", "k", "v", "z", "mlp_out")
SWEPT = ("k", "z")  # of methods that run every node
NORMED = "norms act on what its blocks write"
NO_EDGES = dict.fromkeys(("gemma2", "gemma3", "olmo2", "bert"), NORMED) | {
    "mixtral": "the router reads the stream as well"
}
NODES = ("site", "layer", "pos", "head", "neuron")
EFFECTS = ("score", "signed", "contribution")


@dataclass(frozen=True)
class Heads:
    """Another order of a model's heads: new head i is the old head `heads[i]`; query heads move with their kv head."""

    heads: tuple[int, ...]
    kv: tuple[int, ...]

    @classmethod
    def of(cls, model: Any, order: Sequence[int] | None = None) -> Heads:
        """From the order of the kv heads."""
        kv = tuple(range(model.info.n_kv_heads)) if order is None else tuple(order)
        group = model.info.n_heads // model.info.n_kv_heads
        return cls(tuple(k * group + i for k in kv for i in range(group)), kv)

    def name(self, name: str) -> str:
        """The old name of a writer or reader such as `a0.h1` or `a0.h1<k>`, by its new one."""
        block, dot, head = name.partition(".h")
        number, bracket, kind = head.partition("<")
        which = self.kv if kind in ("k>", "v>") else self.heads
        return f"{block}.h{which[int(number)]}{bracket}{kind}" if dot else name

    def weights(self, model: HookedPlain) -> HookedPlain:
        """The same function with its heads in this order."""
        by_head = {"W_Q": self.heads, "b_Q": self.heads, "W_O": self.heads}
        by_head |= dict.fromkeys(("W_K", "b_K", "W_V", "b_V"), self.kv)
        found = {}
        for name, tensor in model._weights.items():
            order = by_head.get(name.rpartition(".")[2])
            found[name] = tensor if order is None else tensor[list(order)]
        return HookedPlain(model.config, found)


def nothing(_model: Any, _heads: Heads, _settings: Mapping[str, Any]) -> dict[str, Any]:
    return {}


def verified(_model: Any, heads: Heads, settings: Mapping[str, Any]) -> dict[str, Any]:
    """One node that the bound does not cover."""
    places: dict[str, int | str | None] = {"aligned": 2, "named": "B", "all": None}
    asked = settings.get("positions", "aligned")
    return {"verified": [Node("z", 0, places[asked], head=heads.heads.index(0))] if asked in places else []}


def receivers(model: Any, heads: Heads, _settings: Mapping[str, Any]) -> dict[str, Any]:
    return {"receivers": [Node("v", 1, head=heads.kv.index(0)), Node("resid_post", model.info.n_layers - 1)]}


def scored(model: Any, heads: Heads, settings: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Random scores of the edges of a model's graph, in the direction in which the method runs."""
    direction = "denoising" if (settings or {}).get("direction") == "denoising" else "noising"
    graph = Graph.of(model.info)
    signed = torch.randn(graph.mask.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    signed = signed[[graph.writer_index(heads.name(name)) for name in graph.writers]]
    signed = signed[:, [graph.reader_index(heads.name(name)) for name in graph.readers]]
    sizes = {name: getattr(graph, name) for name in ("n_layers", "n_heads", "n_kv_heads", "has_mlp", "parallel")}
    tables = edge_tables(graph, signed.abs(), signed)
    return {"edges": EdgeAttribution(tables, settings={"direction": direction, **sizes}, provenance={})}


def circuit(model: Any, heads: Heads, settings: Mapping[str, Any]) -> dict[str, Any]:
    edges = scored(model, heads, settings)["edges"]
    return {"circuit": edges.circuit(edges.graph.n_edges * 3 // 4)}


@dataclass(frozen=True, kw_only=True)
class Case:
    """How a method is called.

    Attributes:
        method: its name.
        result: the kind of its result.
        columns: of the result as a table.
        settings: small ones.
        inputs: what it needs besides a model and a task, from the model, the order of its heads and the settings.
        sites: those that are scored; none where it takes no `sites`.
        placed: whether it takes `positions`.
        ragged: whether its prompts may have different lengths.
        refuses: the families that it must refuse.
        by_order: why another order of the pairs gives other numbers; empty where it must not.
        by_head: why another order of the heads gives other numbers; empty where it must not.
    """

    method: str
    result: type[Artifact]
    columns: tuple[str, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    inputs: Callable[[Any, Heads, Mapping[str, Any]], dict[str, Any]] = nothing
    sites: tuple[str, ...] = SITES
    placed: bool = True
    ragged: bool = True
    refuses: frozenset[str] = frozenset()
    by_order: str = ""
    by_head: str = ""

    @property
    def promises(self) -> frozenset[str]:
        return METHODS[self.method].promises


def _nodes(method: str, **more: Any) -> Case:
    return Case(method=method, result=ma.Attribution, columns=(*NODES, *EFFECTS), **more)


def _edges(method: str, **settings: Any) -> Case:
    columns = ("source", "target", *EFFECTS)
    return Case(
        method=method, result=EdgeAttribution, columns=columns, settings=settings, sites=(), placed=False,
        refuses=frozenset(NO_EDGES),
    )  # fmt: skip


CASES = {
    "activation_patching": _nodes("activation_patching", sites=SWEPT),
    "attribution_patching": _nodes("attribution_patching"),
    "attribution_patching two_point": _nodes("attribution_patching", settings={"variant": "two_point"}),
    "missed_effect_bound": Case(
        method="missed_effect_bound",
        result=Bound,
        columns=(*NODES, "difference", "signed", "error", "dof", "inclusions", "upper"),
        settings={"p": 0.3, "budget": 80, "control": True},
        inputs=verified,
        by_order="a sample names its pair by number",
        by_head="a sample names its nodes by number",
    ),
    "ablation": _nodes("ablation", sites=SWEPT),
    "ablation resample": _nodes(
        "ablation",
        sites=SWEPT,
        settings={"kind": "resample", "seed": 1},
        ragged=False,
        by_order="the other prompt of a pair is named by number",
    ),
    "causal_tracing": _nodes("causal_tracing", sites=SWEPT, settings={"samples": 2, "window": 3}),
    "path_patching": _nodes("path_patching", inputs=receivers, sites=()),
    "edge_attribution": _edges("edge_attribution", steps=2),
    "edge_patching": _edges("edge_patching"),
    "faithfulness": Case(
        method="faithfulness",
        result=Faithfulness,
        columns=(
            "size", "share", "n_edges", "faithfulness", "complement", "random", "random_low", "random_high",
            "random_complement",
        ),
        settings={"sizes": (0.3, 0.6), "random": 2},
        inputs=scored,
        sites=(),
        placed=False,
        refuses=frozenset(NO_EDGES),
    ),
    "minimality": Case(
        method="minimality",
        result=Minimality,
        columns=("part", "drop", "chance"),
        settings={"random": 1},
        inputs=circuit,
        sites=(),
        placed=False,
        refuses=frozenset(NO_EDGES),
    ),
}  # fmt: skip


def call(case: Case, model: Any, task: Task, *, heads: Heads | None = None, **settings: Any) -> Any:
    """A method's result; `sites` that it does not take are left out."""
    module, name = METHODS[case.method].function.split(":")
    chosen = {"sites": case.sites, "progress": False, **case.settings, **settings}
    if not case.sites:
        del chosen["sites"]
    inputs = case.inputs(model, Heads.of(model) if heads is None else heads, chosen)
    return getattr(import_module(module), name)(model, task, **inputs, **chosen)


def gaps(result: Artifact) -> Tensor:
    """Of each pair, between the clean and the corrupt metric."""
    clean, corrupt = (result.settings[f"{side}_metric"] for side in ("clean", "corrupt"))
    return torch.tensor(clean, dtype=torch.float64) - torch.tensor(corrupt, dtype=torch.float64)


def tolerance(model: Any, task: Task, result: Artifact) -> float:
    """Other batch shapes add in another order: rounding of the dtype, in units of the largest logit, and where effects
    are shares of the gap of the metric, of that."""
    rounding = (1e-12 if model.info.dtype == "float64" else 1e-5) * bigness(model, task)
    shares = isinstance(result, Faithfulness | Minimality)
    return rounding / min(1.0, float(gaps(result).mean().abs())) if shares else rounding


def assert_equal(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], close: float) -> None:
    """Equal tables; what is NaN is NaN in both."""
    assert found.keys() == expected.keys()
    for name, table in expected.items():
        # degrees of freedom are ratios of squared variances, which may be rounding alone
        rtol = 1e-3 if name.startswith("dof/") and close else 0
        torch.testing.assert_close(
            found[name], table, rtol=rtol, atol=close, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
        )


def tables(result: Artifact, rows: Sequence[int] | None = None) -> dict[str, Tensor]:
    """All tables of a result; of a task with its pairs in another order, put back in order."""
    found = {}
    for name, table in result.tensors.items():
        back = "pair" in table.axes and rows is not None
        found[name] = table.values[..., torch.tensor(rows).argsort()] if back else table.values
    return found


def combined(results: Sequence[Any]) -> dict[str, Tensor]:
    """What a whole task must give, from the results of its single pairs. Effects are means over pairs; faithfulness is
    a ratio of means, so that pairs count by their gaps."""
    first, each = results[0], [tables(result) for result in results]
    if not isinstance(first, Faithfulness | Minimality):
        return {name: torch.stack([one[name] for one in each]).mean(0) for name in each[0]}
    gap = torch.cat([gaps(result) for result in results])
    found = {}
    for name, table in each[0].items():
        if name == "metric":
            found[name] = torch.cat([one[name] for one in each], -1)
        elif name == "n_edges":
            found[name] = table
        elif not (isinstance(first, Minimality) and name == "random"):  # sorted: ranks belong to other parts
            stacked = torch.stack([one[name] for one in each], -1)
            found[name] = (stacked * gap).sum(-1) / gap.sum()
    return found


def renamed(result: Artifact, heads: Heads, like: Artifact) -> dict[str, Tensor]:
    """The tables that a model with its heads in another order must give, with the labels of its result."""
    found = {}
    for name, table in result.tensors.items():
        values = table.values
        for axis, names in enumerate(table.axes):
            order: Sequence[int] | None = {"head": heads.heads, "kv_head": heads.kv}.get(names)
            if names in ("source", "target", "part"):
                labels, new = (list(x.tensors[name].coords[names]) for x in (result, like))
                order = [labels.index(heads.name(str(label))) for label in new]
            values = values if order is None else values.index_select(axis, torch.tensor(order))
        found[name] = values
    return found
