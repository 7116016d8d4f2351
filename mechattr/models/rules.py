"""Backward rules: the same forward pass, another backward pass.

A rule never changes a value, only what flows back through it. Rules are one frozen value that is given to a run and
forgotten with it; nothing is patched on classes.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

from torch import Tensor

from mechattr.errors import SettingError, nearest

NORMS = ("full", "frozen")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """How a backward pass treats the non-linear parts of a network.

    Attributes:
        norm: `"full"` differentiates layer norms as they are; `"frozen"` holds each norm's scale at its value, so that
            a norm is linear (centring, weight and bias stay).
        hold: blocks whose writes to the residual stream (attention and MLP together) are held fixed while the skip path
            stays, as GradDrop does.
    """

    norm: str = "full"
    hold: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        if self.norm not in NORMS:
            raise SettingError(f"Rules(norm={self.norm!r})", "no such rule", nearest(self.norm, NORMS))
        try:
            hold = frozenset(operator.index(layer) for layer in self.hold)
        except TypeError:
            raise SettingError(f"Rules(hold={self.hold!r})", "no set of layers", "give one, such as hold={3}") from None
        object.__setattr__(self, "hold", hold)


def frozen_like(exact: Tensor, linear: Tensor) -> Tensor:
    """The value of `exact`, bit for bit, with the gradient of `linear`.

    `linear - linear.detach()` is exactly zero for finite values, and adding zero changes no bit but the sign of zero.
    """
    return exact.detach() + (linear - linear.detach())
