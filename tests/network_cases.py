"""A plain transformer spelled out for one prompt, write by write and head by head, with a say in what each reader sees.

It shares nothing with the package but the weights: readers get the sum of all earlier writes, not a residual stream."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mechattr.models.base import Batch
from mechattr.models.plain_config import ACTIVATIONS

See = Callable[[str, str, Tensor], Tensor]  # (writer, reader, what it wrote) -> what the reader sees of it
Change = Callable[[str, Tensor], Tensor]


def as_it_is(_name: str, x: Tensor) -> Tensor:
    return x


def sees_all(_writer: str, _reader: str, out: Tensor) -> Tensor:
    return out


def network(
    model: Any,
    tokens: Tensor,
    *,
    see: See = sees_all,
    write: Change = as_it_is,
    project: Change = as_it_is,
    scale: Change = as_it_is,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits [pos, vocab], and every writer's output [pos, d_model] by name.

    Args:
        see: what a reader sees of a writer.
        write: replaces a writer's output.
        project: replaces what a reader makes of its input: `"a0.h1<q>"` [pos, d_head], `"m0"` [pos, d_mlp].
        scale: replaces what a reader's norm divides by, [pos, 1].
    """
    c, w = model.config, model.weight
    outs: dict[str, Tensor] = {}
    constant = torch.zeros(len(tokens), c.d_model, dtype=torch.float64)
    x = w("embed.W_E")[tokens]
    outs["input"] = write("input", x + w("pos_embed.W_pos")[: len(tokens)] if c.positions == "learned" else x)

    def read(reader: str, norm: str) -> Tensor:
        x = constant + sum(see(writer, reader, out) for writer, out in outs.items())
        if c.norm == "none":
            return x
        x = x - x.mean(-1, keepdim=True) if c.norm == "layer" else x
        y = x / scale(reader, (x.pow(2).mean(-1, keepdim=True) + c.eps).sqrt()) * w(f"{norm}.w")
        return y + w(f"{norm}.b") if c.norm == "layer" else y

    seen = torch.ones(len(tokens), len(tokens), dtype=torch.bool).tril()
    for layer in range(c.n_layers):
        p, heads = f"blocks.{layer}.", {}

        def part(kind: str, head: int, p: str = p, layer: int = layer) -> Tensor:
            name = f"a{layer}.h{head}<{kind}>"
            x = read(name, p + "ln1") @ w(f"{p}attn.W_{kind.upper()}")[head] + w(f"{p}attn.b_{kind.upper()}")[head]
            return project(name, x)

        for head in range(c.n_heads):
            group = head // (c.n_heads // c.n_kv_heads)
            if c.attention == "uniform":
                pattern = seen / seen.sum(-1, keepdim=True)
            else:
                q, k = part("q", head), part("k", group)
                if c.positions == "rotary":
                    q, k = _rotated(q, c.rope_theta), _rotated(k, c.rope_theta)
                pattern = (q @ k.T / c.d_head**0.5).masked_fill(~seen, -torch.inf).softmax(-1)
            heads[f"a{layer}.h{head}"] = pattern.double() @ part("v", group) @ w(p + "attn.W_O")[head]
        outs |= {name: write(name, out) for name, out in heads.items()}
        constant = constant + w(p + "attn.b_O")
        if c.d_mlp:
            name, act = f"m{layer}", ACTIVATIONS[c.activation]
            y = read(name, p + "ln2")
            if c.gated:
                pre = y @ w(p + "mlp.W_gate") + w(p + "mlp.b_gate")
                post = act(pre) * (y @ w(p + "mlp.W_in") + w(p + "mlp.b_in"))
            else:
                post = act(y @ w(p + "mlp.W_in") + w(p + "mlp.b_in"))
            outs[name] = write(name, project(name, post) @ w(p + "mlp.W_out") + w(p + "mlp.b_out"))
    return read("logits", "ln_final") @ w("unembed.W_U") + w("unembed.b_U"), outs


def measured(task: Any, batch: Batch, row: int, logits: Tensor) -> float:
    """The metric of one prompt, from the logits of its real tokens."""
    prompt = batch.rows([row])
    whole = torch.zeros(1, prompt.tokens.shape[1], logits.shape[-1], dtype=logits.dtype)
    whole[prompt.mask] = logits
    return float(task.metric(whole, prompt).item())


def prompt(batch: Batch, row: int) -> Tensor:
    """The real tokens of one prompt."""
    return batch.tokens[row][batch.mask[row]]


def _rotated(x: Tensor, theta: float) -> Tensor:
    half = x.shape[-1] // 2
    angle = torch.arange(len(x), dtype=x.dtype)[:, None] * theta ** (-torch.arange(half, dtype=x.dtype) / half)
    turned = torch.view_as_complex(torch.stack([x[:, :half], x[:, half:]], -1)) * torch.polar(
        torch.ones_like(angle), angle
    )
    return torch.cat([turned.real, turned.imag], -1)
