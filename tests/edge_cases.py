"""What the tests of edges share: edge attribution straight from its definition, on plain models.

The network is written out once more with one addition: every reader has an offset of its own, zero, that is added to
its input alone. The gradient with respect to that offset is the gradient at the reader's own input.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import patching_cases as cases
import torch
from torch import Tensor
from torch.nn import functional as F

from mechattr.models.base import Batch
from mechattr.patching.graph import Graph
from mechattr.tasks.task import Task

ACTIVATIONS = {"gelu_new": lambda x: F.gelu(x, approximate="tanh"), "silu": F.silu, "identity": lambda x: x}


class Split:
    """One prompt through a plain model with split inputs; `offsets[reader]` and `written[writer]` are [pos, d_model].

    `wrong` names a mistake to make on purpose.
    """

    def __init__(self, model: Any, *, wrong: str = "", given: Mapping[str, Tensor] | None = None) -> None:
        self.model, self.c, self.wrong, self.given = model, model.config, wrong, given or {}
        self.graph = Graph.of(model.info)

    def embed(self, tokens: Tensor) -> Tensor:
        x = self.model.weight("embed.W_E")[tokens]
        learned = self.c.positions == "learned"
        return x + self.model.weight("pos_embed.W_pos")[: len(tokens)] if learned else x

    def logits(self, x: Tensor) -> Tensor:
        self.offsets: dict[str, Tensor] = {}
        self.written = {"input": x}
        for layer in range(self.c.n_layers):
            x = self.block(layer, x)
        x = self.norm("ln_final", self.read("logits", x)[0])
        return x @ self.model.weight("unembed.W_U") + self.model.weight("unembed.b_U")

    def block(self, layer: int, x: Tensor) -> Tensor:
        w, c, group = self.model.weight, self.c, self.c.n_heads // self.c.n_kv_heads
        p, n = f"blocks.{layer}.attn.", len(x)
        causal = torch.ones(n, n, dtype=torch.bool).tril()

        def project(kind: str, head: int, entry: Tensor | None = None) -> tuple[Tensor, Tensor]:
            """q, k or v of a head, and the stream as it goes on."""
            y, on = self.read(f"a{layer}.h{head}<{kind}>", x, f"blocks.{layer}.ln1") if entry is None else (entry, x)
            return y @ w(f"{p}W_{kind.upper()}")[head] + w(f"{p}b_{kind.upper()}")[head], on

        for kv in range(c.n_kv_heads):
            v, x = project("v", kv)
            if c.attention != "uniform":
                k, x = project("k", kv)
            for head in range(kv * group, (kv + 1) * group):
                if c.attention == "uniform":
                    pattern = causal / causal.sum(-1, keepdim=True)
                else:
                    q, x = project("q", head)
                    used = k.detach() if self.wrong == "keys of the group's first head only" and head % group else k
                    turned = (self.rotate(q), self.rotate(used)) if c.positions == "rotary" else (q, used)
                    scores = turned[0] @ turned[1].T / c.d_head**0.5
                    pattern = scores.masked_fill(~causal, -torch.inf).softmax(-1)
                self.written[f"a{layer}.h{head}"] = pattern.to(v.dtype) @ v @ w(p + "W_O")[head]
        x = x + sum(self.written[f"a{layer}.h{head}"] for head in range(c.n_heads)) + w(p + "b_O")
        if not c.d_mlp:
            return x
        y, x = self.read(f"m{layer}", x, f"blocks.{layer}.ln2")
        p, act = f"blocks.{layer}.mlp.", ACTIVATIONS[c.activation]
        inner = y @ w(p + "W_in") + w(p + "b_in")
        inner = act(y @ w(p + "W_gate") + w(p + "b_gate")) * inner if c.gated else act(inner)
        self.written[f"m{layer}"] = inner @ w(p + "W_out") + w(p + "b_out")
        return x + self.written[f"m{layer}"]

    def read(self, reader: str, x: Tensor, norm: str = "") -> tuple[Tensor, Tensor]:
        """What a reader sees, and the stream as it goes on."""
        offset = self.given.get(reader, torch.zeros_like(x)).requires_grad_()
        self.offsets[reader] = offset
        if self.wrong == "norm treated as identity" and norm:
            return self.norm(norm, x) + offset, x
        seen = x + offset
        return (self.norm(norm, seen) if norm else seen), (seen if self.wrong == "gradient of the whole stream" else x)

    def norm(self, name: str, x: Tensor) -> Tensor:
        if self.c.norm == "none":
            return x
        w = self.model.weight
        if self.c.norm == "layer":
            return F.layer_norm(x, x.shape[-1:], w(name + ".w"), w(name + ".b"), self.c.eps)
        return x / (x.pow(2).mean(-1, keepdim=True) + self.c.eps).sqrt() * w(name + ".w")

    def rotate(self, x: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        angle = torch.arange(len(x))[:, None] * self.c.rope_theta ** (-torch.arange(half, dtype=x.dtype) / half)
        turned = torch.view_as_complex(torch.stack([x[:, :half], x[:, half:]], -1)) * torch.polar(
            torch.ones_like(angle), angle
        )
        return torch.cat([turned.real, turned.imag], -1)


def metric_of(split: Split, x: Tensor, task: Task, batch: Batch) -> Tensor:
    """The metric of one prompt from its embeddings."""
    return task.metric(split.logits(x)[None], batch)[0]


def edge_effects(
    model: Any,
    task: Task,
    path: Sequence[tuple[float, float]] = ((1.0, 1.0),),
    *,
    direction: str = "noising",
    wrong: str = "",
) -> Tensor:
    """[pair, writer, reader] of a plain model; `path`: points from the source (0) to the base run (1), and weights."""
    graph = Graph.of(model.info)
    found = torch.zeros(len(task), len(graph.writers), len(graph.readers), dtype=torch.float64)
    for row in range(len(task)):
        sides = (cases.single(task.clean, row), cases.single(task.corrupt, row))
        base, source = sides if direction == "noising" else sides[::-1]
        split = Split(model, wrong=wrong)
        high, low = split.embed(base.tokens[0]), split.embed(source.tokens[0])
        written = []
        for x in (low, high):
            split.logits(x)
            written.append({name: value.detach() for name, value in split.written.items()})
        change = torch.stack([written[0][name] - written[1][name] for name in graph.writers])
        for point, weight in path:
            value = metric_of(split, low + point * (high - low), task, base)
            readers = [name for name in graph.readers if name in split.offsets]
            gradients = torch.autograd.grad(value, [split.offsets[name] for name in readers])
            for name, gradient in zip(readers, gradients, strict=True):
                column = graph.reader_index(name)
                found[row, :, column] += weight * (change * gradient).sum((1, 2)) * graph.mask[:, column]
    return found / len(task) if wrong == "gradient of the mean over pairs" else found
