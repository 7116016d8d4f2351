"""Taps on what modules receive and return, in the shapes and with the factors that sites have."""

from __future__ import annotations

from contextlib import ExitStack

import torch
from torch import Tensor, nn

from mechattr.models.anatomy import Anatomy
from mechattr.models.hooks import Hooks
from mechattr.models.placement import stored
from mechattr.models.rules import frozen_like
from mechattr.models.taps import Taps
from mechattr.models.weights import w_o


class Tapping(Hooks):
    """Hooks of one run on one stack of blocks: a model, or the encoder beside its decoder."""

    def __init__(self, anatomy: Anatomy, taps: Taps, stack: ExitStack) -> None:
        super().__init__(stack)
        self.anatomy, self.taps = anatomy, taps
        self.decodes = anatomy.stack == "blocks"
        self.start = taps.start if self.decodes else None  # an encoder always runs as a whole

    @property
    def positions(self) -> Tensor:
        """The position of each column of the present forward pass."""
        frame = self.taps.frame
        return frame.queries if self.decodes or frame.source is None else frame.source[1]

    def multiplied(self, name: str, x: Tensor, factor: float) -> Tensor:
        """Taps factor * x, where the model multiplies x by the factor on its way to the residual stream. What the tap
        leaves as it is keeps every bit; what it changes is divided by the factor again."""
        if factor == 1.0:
            return self.tap(name, x)
        total = factor * x
        tapped = self.tap(name, total)
        return frozen_like(torch.where(tapped == total, x, tapped / factor), tapped / factor)

    def tap(self, name: str, x: Tensor) -> Tensor:
        if not self.taps.wants(name):
            return x
        columns = self.positions.shape[1]
        spread = 2 if name.endswith("hook_scale") else 3
        if x.ndim < spread or (x.ndim == 2 and x.shape[1] == 1):  # some families flatten batch and position
            shape = (-1, columns) if spread == 2 else (-1, columns, x.shape[-1])
            return self.taps(name, x.reshape(shape)).reshape(x.shape)
        return self.taps(name, x)

    def per_head(self, name: str, x: Tensor) -> Tensor:
        if not self.taps.wants(name):
            return x
        heads = self.anatomy.n_kv_heads if name.endswith("hook_k") else self.anatomy.n_heads
        return self.taps(name, x.unflatten(-1, (self.taps.here(name, heads), -1))).flatten(-2)

    def result(self, name: str, o: nn.Module, z: Tensor) -> Tensor:
        heads, factor, weight = self.anatomy.n_heads, self.anatomy.factors.write, w_o(o, self.anatomy.n_heads)
        of_heads = name.replace("hook_result", "hook_z")
        z = z.unflatten(-1, (self.taps.here(of_heads, heads), -1))
        split = self.taps.split
        z = split.whole(of_heads, z) if split is not None and of_heads in split.axes else z
        per_head = torch.einsum("bphd,hdm->bphm", z.to(weight.device), weight)
        total = self.taps(name, per_head if factor == 1.0 else factor * per_head).sum(2)
        total = total if factor == 1.0 else total / factor
        bias = stored(o, "bias")
        return total if bias is None else total + bias
