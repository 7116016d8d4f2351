"""What the tests of backward rules share: every rule alone, the presets, and combinations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mechattr.models import Batch, Rules

RELP, GIM, CP, ATTN = Rules.relp(), Rules.gim(), Rules.cp_lrp(), Rules.attn_lrp()
SINGLE = [
    Rules(norm="frozen"), Rules(activation="secant"), Rules(gate="half"), Rules(gate="detached"),
    Rules(pattern="detached"),
    Rules(temperature=3.0), Rules(qk_factor=0.25), Rules(v_factor=0.5), Rules(hold={0}),
    Rules(softcap="secant"), Rules(router="detached"), Rules(linear_epsilon=0.1), Rules(linear_gamma=0.25),
]  # fmt: skip
EVERY = [
    RELP, GIM, CP, ATTN, *SINGLE,
    replace(RELP, hold=frozenset({1})), replace(GIM, activation="secant", hold=frozenset({0})),
]  # fmt: skip


def close(found: Tensor, wanted: Tensor, relative: float = 1e-10) -> None:
    """Equal up to `relative` of the largest entry; the default is for sums in float64."""
    torch.testing.assert_close(found, wanted, rtol=0, atol=relative * max(1.0, float(wanted.abs().max())))


def allowed(sites: Sequence[str], rule: Rules) -> list[str]:
    """The sites that a run under a rule can have: under gamma the output projection is not taken apart into heads."""
    return [name for name in sites if not (rule.linear_gamma and name.endswith("hook_result"))]


def real(x: Tensor, axes: tuple[str, ...], batch: Batch) -> Tensor:
    """The values at real tokens."""
    return (x.movedim(2, 1) if "query" in axes else x)[batch.mask]


class Tempered(torch.autograd.Function):
    """A softmax whose backward pass is written out."""

    @staticmethod
    def forward(ctx, scores, temperature, divided):
        ctx.save_for_backward(torch.softmax(scores / temperature, -1))
        ctx.factor = 1 / temperature if divided else 1.0
        return torch.softmax(scores, -1)

    @staticmethod
    def backward(ctx, g):
        (p,) = ctx.saved_tensors
        return ctx.factor * p * (g - (p * g).sum(-1, keepdim=True)), None, None
