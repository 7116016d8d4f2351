"""How erasure probes are fitted: in closed form, or by gradient descent."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from mechattr.errors import SettingError


@dataclass(frozen=True, slots=True, kw_only=True)
class Closed:
    """Ridge regression on one-hot labels, in closed form, from one pass over the documents; each probe is then
    multiplied by the power of 4 at which its softmax fits best, so that it gives probabilities.

    Attributes:
        alpha: the penalty, in units of the mean of the diagonal of H'H.
    """

    alpha: float = 1e-3

    def __post_init__(self) -> None:
        _positive("alpha", self.alpha, zero=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Descent:
    """Softmax cross-entropy by AdamW, all probes together.

    Attributes:
        rate: learning rate.
        decay: weight decay.
        documents: documents of one step.
        average: whether a step's gradient is the mean over its documents (else their sum).
        flush: whether the last documents of an epoch, when they are fewer, make a step of their own; else they wait
            for those of the next epoch.
        clip: largest norm of the gradient of one probe; `None` for any.
        epochs: passes over the documents.
        warmup: steps over which the rate grows to its value.
        patience: epochs without a better held-out loss after which the rate falls to a tenth; `None` for never.
        scaled: divide the states of each layer by their root mean square over the first documents.
    """

    rate: float = 3e-3
    decay: float = 0.0
    documents: int = 8
    average: bool = True
    flush: bool = True
    clip: float | None = None
    epochs: int = 4
    warmup: int = 10
    patience: int | None = None
    scaled: bool = True

    def __post_init__(self) -> None:
        _positive("rate", self.rate)
        _positive("decay", self.decay, zero=True)
        for name in ("documents", "epochs"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise SettingError(f"{name}={getattr(self, name)!r}", "no count", "give a whole number from 1")

    @classmethod
    def reference(cls) -> Descent:
        """The settings of the source that accompanies Feucht et al. (2024): AdamW at 0.1 with decay 0.001, gradients
        of 30 documents added up and clipped at norm 0.1, 8 epochs, a linear warm-up over 2 / (1 - beta_2) steps, and a
        tenth of the rate after 3 epochs without a better held-out loss (of all probes together, where the source looks
        at each)."""
        return cls(
            rate=0.1,
            decay=1e-3,
            documents=30,
            average=False,
            flush=False,
            clip=0.1,
            epochs=8,
            warmup=2000,
            patience=3,
            scaled=False,
        )


Recipe = Closed | Descent


def _positive(name: str, value: Any, *, zero: bool = False) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number or value < 0 or (value == 0 and not zero):
        raise SettingError(f"{name}={value!r}", "no such number", f"give a number {'from' if zero else 'above'} 0")
