"""The tape of a trace: its backward pass is over, and its gradients are handed over when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from mechattr.models.base import Visit
from mechattr.models.run_checks import check_batched, check_pass
from mechattr.models.tape import Tape


class Replay(Tape):
    """A trace that came back. A pass that starts from gradients at sites is another trace, forward pass included.

    Args:
        found: what the trace gave back.
        gradients: the gradient at each gradient site, in the order of the forward pass; `None` without influence.
        again: the trace from given gradients.
    """

    def __init__(
        self, found: Mapping[str, Any], gradients: dict[str, Tensor | None], again: Callable[..., dict[str, Any]]
    ) -> None:
        self.logits, self.metric, self.activations = found["logits"], found["metric"], found["activations"]
        self._at, self._blanks = found["nodes"], found["blanks"]
        self._gradients, self._again, self._open = gradients, again, True

    @property
    def repeats(self) -> float:
        """Forward passes that a backward pass from given gradients needs."""
        return 1.0

    def pull_back(self, visit: Visit, at: Mapping[str, Tensor] | None = None, *, last: bool = False) -> None:
        """One backward pass; see `Tape.pull_back`."""
        check_pass(self._open, at, self._gradients)
        gradients = self._gradients if at is None else self._again(at=at)["gradients"]
        self._open = not last
        for name in reversed(self._gradients):
            gradient = gradients.get(name)
            if gradient is not None:
                visit(name, self._at[name], gradient)

    def pull_backs(
        self, at: Mapping[str, Tensor], sites: Iterable[str] | None = None, *, last: bool = False
    ) -> dict[str, Tensor]:
        """Several backward passes, each a trace of its own; see `Tape.pull_backs`."""
        wanted = list(self._gradients if sites is None else sites)
        check_pass(self._open, (*at, *wanted), self._gradients)
        n = check_batched(at, {name: self._blanks[name] for name in at})
        self._open = not last
        passes = [self._again(at={name: g[i] for name, g in at.items()})["gradients"] for i in range(n)]
        blanks = {name: torch.zeros_like(self._blanks[name]) for name in wanted}
        return {
            name: torch.stack([blank if p.get(name) is None else p[name] for p in passes])
            for name, blank in blanks.items()
        }

    def gradients(self) -> dict[str, Tensor]:
        """The gradient at every gradient site, zero where the metric does not depend on it."""
        return {name: torch.zeros_like(self._blanks[name]) if g is None else g for name, g in self._gradients.items()}
