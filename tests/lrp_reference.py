"""LRP of a plain network from its definition: a forward pass of its own, whose every factor is written out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mechattr.models.plain import HookedPlain, _rotate
from mechattr.models.plain_config import ACTIVATIONS


def half(x: Tensor) -> Tensor:
    """The value of x, with half of its gradient."""
    return x / 2 + (x / 2).detach()


class Reference:
    """One row of tokens through a plain network under the rules of a variant.

    Attributes:
        tokens, positions: relevance of the embeddings, by position.
        biases: relevance of each bias by its standard name.
        leaks: of each block's softmaxes: relevance of the pattern less that of the scores, row by row.
        streams: relevance of the stream before each block, by position.
        logit: what is explained.
    """

    def __init__(self, model: HookedPlain, ids: Tensor, target: int, foil: int, variant: str) -> None:
        self.c, self.attn = model.config, variant == "attn"
        self.w: dict[str, Any] = {n: w.clone() for n, w in model._weights.items()}
        added = {n: w.requires_grad_() for n, w in self.w.items() if ".b" in n}
        ones = torch.ones(len(ids), len(ids), dtype=torch.bool)
        self.seen, self.inner = ones.tril(), []
        embed = self.w["embed.W_E"][ids].requires_grad_()
        place = self.w["pos_embed.W_pos"][: len(ids)].clone().requires_grad_() if "pos_embed.W_pos" in self.w else None
        x, streams = embed if place is None else embed + place, []
        for layer in range(self.c.n_layers):
            x.retain_grad()
            streams.append(x)
            x = self.block(x, f"blocks.{layer}.")
        logits = self.norm(x[-1:], "ln_final") @ self.w["unembed.W_U"] + self.w["unembed.b_U"]
        self.logit = logits[0, target] - logits[0, foil]
        kept = [t for pair in self.inner for t in pair]
        wanted = [embed, *([] if place is None else [place]), *streams, *added.values(), *kept]
        grads = torch.autograd.grad(self.logit, wanted, allow_unused=True)
        found = iter(0 * x if g is None else x * g for x, g in zip(wanted, grads, strict=True))
        self.tokens = next(found).sum(-1).detach()
        self.positions = self.tokens * 0 if place is None else next(found).sum(-1).detach()
        self.streams = [next(found).sum(-1).detach() for _ in streams]
        self.biases = {name: next(found).sum().detach() for name in added}
        # a masked score of minus infinity has no gradient, and no relevance
        pairs = [(next(found), next(found)) for _ in self.inner]
        self.leaks = [(a.sum(-1) - torch.where(self.seen, s, 0.0).sum(-1)).sum().detach() for a, s in pairs]
        self.logit = self.logit.detach()

    def norm(self, x: Tensor, name: str) -> Tensor:
        if self.c.norm == "none":
            return x
        c = x - x.mean(-1, keepdim=True) if self.c.norm == "layer" else x
        y = c / (c.pow(2).mean(-1, keepdim=True) + self.c.eps).sqrt().detach() * self.w[f"{name}.w"]
        return y + self.w[f"{name}.b"] if self.c.norm == "layer" else y

    def act(self, z: Tensor) -> Tensor:
        return z * (ACTIVATIONS[self.c.activation](z) / z).detach()

    def block(self, x: Tensor, p: str) -> Tensor:
        w, y = self.w, self.norm(x, p + "ln1")
        q, k, v = (torch.einsum("pm,hmd->phd", y, w[f"{p}attn.W_{n}"]) + w[f"{p}attn.b_{n}"] for n in "QKV")
        if self.c.positions == "rotary":
            places = torch.arange(len(x))[None]
            q, k = (_rotate(t[None], places, self.c.rope_theta)[0] for t in (q, k))
        groups = self.c.n_heads // self.c.n_kv_heads
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        if self.attn:
            q, k, v = half(q), half(k), half(v)
        scores = torch.einsum("qhd,khd->hqk", q, k) * self.c.d_head**-0.5
        pattern = scores.masked_fill(~self.seen, -torch.inf).softmax(-1)
        if self.attn:
            self.inner.append((pattern, scores))
            pattern = half(pattern)
        else:
            pattern = pattern.detach()
        z = torch.einsum("hqk,khd->qhd", pattern, v)
        x = x + torch.einsum("phd,hdm->pm", z, w[p + "attn.W_O"]) + w[p + "attn.b_O"]
        y = self.norm(x, p + "ln2")
        inner = y @ w[p + "mlp.W_in"] + w[p + "mlp.b_in"]
        if not self.c.gated:
            inner = self.act(inner)
        elif self.attn:
            inner = half(self.act(y @ w[p + "mlp.W_gate"] + w[p + "mlp.b_gate"]) * inner)
        else:
            inner = self.act(y @ w[p + "mlp.W_gate"] + w[p + "mlp.b_gate"]).detach() * inner
        return x + inner @ w[p + "mlp.W_out"] + w[p + "mlp.b_out"]
