"""What the tests of patching share: small tasks on token ids, and both methods straight from their definitions, one
node, one prompt and one run at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import families
import torch
from torch import Tensor

import mechattr as ma
from mechattr.models.base import Batch
from mechattr.models.edits import Edit
from mechattr.models.hf import HookedHF
from mechattr.models.plain import plain_model
from mechattr.models.plain_config import PlainConfig
from mechattr.sites import SITES, Node, expand, parse
from mechattr.tasks.task import Task

TAKEN = {"q": "rot_q", "k": "rot_k"}
SIZES: dict[str, Any] = {"n_layers": 2, "n_heads": 2, "n_kv_heads": 2, "d_mlp": 5, "d_model": 8}
PLAIN = {
    "linear": PlainConfig.linear(**SIZES),
    "gpt2_like": PlainConfig.gpt2_like(**SIZES),
    "llama_like": PlainConfig.llama_like(**{**SIZES, "n_heads": 4, "n_kv_heads": 2, "d_head": 2}),
}


def plain(kind: str) -> Any:
    """A float64 network with large random weights."""
    return plain_model(PLAIN[kind])


def hf(family: str) -> Any:
    """A small random float32 transformers model."""
    return HookedHF(families.model(family), name=family)


def shorts(model: Any) -> list[str]:
    """The short names of a model's sites."""
    return list(dict.fromkeys(parse(name)[0] for name in model.sites()))


def pairs_task(
    model: Any, lengths: Sequence[int] = (5, 5, 5), *, changed: Sequence[int] = (1, 2), seed: int = 0
) -> Task:
    """Random prompts; `corrupt` differs at the positions `changed`. The span A has several tokens and B one."""
    generator = torch.Generator().manual_seed(seed)
    pairs = []
    for length in lengths:
        clean = torch.randint(5, model.info.d_vocab, (length,), generator=generator).tolist()
        corrupt = [5 + (t - 5 + 3) % (model.info.d_vocab - 5) if i in changed else t for i, t in enumerate(clean)]
        answer, foil = torch.randperm(model.info.d_vocab, generator=generator)[:2].tolist()
        spans = {"A": [1, length - 1], "B": [length - 2, length - 1]}
        pairs.append({"clean_tokens": clean, "corrupt_tokens": corrupt, "answer": answer, "foil": foil, "spans": spans})
    return ma.tasks.from_pairs(model, pairs)


def repadded(task: Task, side: str, extra: int = 2) -> Task:
    """The same task with `extra` more columns of padding on one side of every row, full of a real token."""

    def pad(batch: Batch) -> Batch:
        width = int(batch.lengths.max()) + extra
        tokens = torch.full((len(batch), width), 7)
        mask = torch.zeros(len(batch), width, dtype=torch.bool)
        for row, (ids, real) in enumerate(zip(batch.tokens, batch.mask, strict=True)):
            n = int(real.sum())
            where = slice(0, n) if side == "right" else slice(width - n, width)
            tokens[row, where], mask[row, where] = ids[real], True
        return Batch(tokens, mask, batch.example)

    return replace(task, clean=pad(task.clean), corrupt=pad(task.corrupt))


def single(batch: Batch, row: int) -> Batch:
    """One prompt without padding."""
    real = batch.mask[row]
    return Batch(batch.tokens[row][real][None], real[real][None], batch.example[[row]])


def places(task: Task, row: int, positions: str) -> dict[int | str | None, tuple[int, int]]:
    """label -> (first position, one past the last) of one pair."""
    length = int(task.clean.lengths[row])
    if positions == "all":
        return {None: (0, length)}
    if positions == "named":
        return dict(task.spans[row])
    return {i: (i, i + 1) for i in range(length)}


def features(model: Any, short: str) -> list[int | None]:
    """The heads, kv heads or neurons of a site; `[None]` where a position is one node."""
    sizes = {"head": model.info.n_heads, "kv_head": model.info.n_kv_heads, "neuron": model.info.d_mlp}
    return next((list(range(sizes[axis])) for axis in SITES[short].axes if axis in sizes), [None])


def all_nodes(model: Any, task: Task, sites: Sequence[str], positions: str) -> list[Node]:
    """Every node."""
    found = []
    for short in sites:
        kind = "neuron" if "neuron" in SITES[short].axes else "head"
        for name in expand(short, model.sites()):
            for place in places(task, 0, positions):
                for i in features(model, short):
                    found.append(Node(short, parse(name)[1], place, **({} if i is None else {kind: i})))
    return found


def part(x: Tensor, node: Node, span: tuple[int, int]) -> Tensor:
    """A node's part of an activation of one prompt."""
    i = node.head if node.head is not None else node.neuron
    x = x[0].transpose(0, 1) if "query" in SITES[node.site].axes else x[0]
    return x[slice(*span)] if i is None else x[slice(*span), i]


def full(model: Any, node: Node) -> str:
    """Where a node is read and replaced."""
    return next(n for n in expand(TAKEN.get(node.site, node.site), model.sites()) if parse(n)[1] == node.layer)


def _runs(task: Task, row: int, direction: str) -> tuple[Batch, Batch]:
    sides = (single(task.clean, row), single(task.corrupt, row))
    return sides if direction == "noising" else sides[::-1]


def atp_effects(
    model: Any,
    task: Task,
    nodes: Sequence[Node],
    *,
    positions: str = "aligned",
    direction: str = "noising",
    wrong: str = "",
) -> Tensor:
    """[pair, node]: change of the activation times gradient; `wrong` names a mistake to make on purpose."""
    names = list(dict.fromkeys(full(model, node) for node in nodes))
    found = torch.zeros(len(task), len(nodes), dtype=torch.float64)
    for row in range(len(task)):
        base, source = _runs(task, row, direction)
        at = source if wrong == "gradient at the source run" else base
        here = model.run(base, record=names)
        there = model.run(source, record=names)
        gradients = model.run(at, gradients=names, metric=task.metric).gradients
        for j, node in enumerate(nodes):
            span = places(task, row, positions)[node.pos]
            name = full(model, node)
            x, y = (part(run.activations[name].values, node, span).double() for run in (here, there))
            if wrong == "gradient of the layer above" and node.layer == 0:
                name = full(model, replace(node, layer=1))
            gradient = part(gradients[name].values, node, span).double()
            found[row, j] = ((x - y if wrong == "sign flipped" else y - x) * gradient).sum()
    return found / len(task) if wrong == "gradient of the mean over pairs" else found


def exact_effects(
    model: Any, task: Task, nodes: Sequence[Node], *, positions: str = "aligned", direction: str = "noising"
) -> Tensor:
    """[pair, node]: one full run for each node, patched with `Set`."""
    names = list(dict.fromkeys(full(model, node) for node in nodes))
    found = torch.zeros(len(task), len(nodes), dtype=torch.float64)
    for row in range(len(task)):
        base, source = _runs(task, row, direction)
        before = model.run(base, metric=task.metric).metric
        there = model.run(source, record=names).activations
        for j, node in enumerate(nodes):
            heads = None if node.head is None else [node.head]
            neurons = None if node.neuron is None else [node.neuron]
            where = list(range(*places(task, row, positions)[node.pos]))
            edit = Edit(full(model, node), ma.models.Set(there), positions=where, heads=heads, neurons=neurons)
            found[row, j] = (model.run(base, edits=[edit], metric=task.metric).metric - before).item()
    return found


def means(effects: Tensor, wrong: str = "") -> tuple[Tensor, Tensor]:
    """score and signed over pairs."""
    signed = effects.mean(0)
    return (signed.abs() if wrong == "abs after the mean" else effects.abs().mean(0)), signed


def values(result: ma.Attribution, nodes: Sequence[Node]) -> tuple[Tensor, Tensor]:
    """score and signed of some nodes of a result."""
    score, signed = ([result.value(node, which) for node in nodes] for which in ("score", "signed"))
    return torch.tensor(score, dtype=torch.float64), torch.tensor(signed, dtype=torch.float64)


def tables(result: ma.Attribution) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a result."""
    for name, labelled in result.tensors.items():
        yield name, labelled.values


def assert_same(left: ma.Attribution, right: ma.Attribution, tolerance: float) -> None:
    """Equal tables."""
    assert dict(tables(left)).keys() == dict(tables(right)).keys()
    for name, table in tables(left):
        torch.testing.assert_close(
            table, right.tensors[name].values, rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def bigness(model: Any, task: Task) -> float:
    """The largest |logit|, to which float32 tolerances refer."""
    return float(model.run(task.clean).logits[task.clean.mask].abs().max())


def averaged(results: Sequence[ma.Attribution]) -> Mapping[str, Tensor]:
    """Means of tables over results of single pairs."""
    return {name: torch.stack([r.tensors[name].values for r in results]).mean(0) for name in results[0].tensors}
