"""What every backend that taps a forward pass of torch has in common: `run` and `tape`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor

from mechattr.models.base import Batch, Metric, ModelInfo, Run, Start, Visit
from mechattr.models.edits import Edit
from mechattr.models.rules import Rules
from mechattr.models.tape import Tape, execute, make_tape
from mechattr.models.taps import Taps


class Running(ABC):
    """A model whose forward pass calls the taps of a run."""

    info: ModelInfo

    @abstractmethod
    def sites(self) -> tuple[str, ...]:
        """The full site names, in the order of the forward pass."""

    @abstractmethod
    def _check(self, batch: Batch) -> None:
        """Refuses a batch, or a state of the model, that cannot be run."""

    @abstractmethod
    def _forward(self, batch: Batch, taps: Taps) -> Tensor:
        """The logits; every site that the taps want is handed to them."""

    def run(
        self,
        batch: Batch,
        *,
        record: str | Sequence[str] = (),
        edits: Sequence[Edit] = (),
        metric: Metric | None = None,
        gradients: str | Sequence[str] = (),
        rules: Rules | None = None,
        start: Start | None = None,
        visit: Visit | None = None,
    ) -> Run:
        """One forward pass and, if gradients are asked for, one backward pass.

        Args:
            batch: token rows.
            record: sites to keep.
            edits: applied in order, before a site is recorded.
            metric: `metric(logits, batch)`, one number a row.
            gradients: sites whose gradient of the metric is returned.
            rules: how the backward pass treats what is not linear.
            start: begin at a block with a given residual stream; the blocks below do not run.
            visit: called with (site, activation, gradient) during the backward pass, which then keeps no gradient.
        """
        self._check(batch)
        return execute(
            lambda taps: self._forward(batch, taps),
            self.info,
            self.sites(),
            batch,
            record=record,
            edits=edits,
            metric=metric,
            gradients=gradients,
            rules=rules,
            start=start,
            visit=visit,
        )

    def tape(
        self,
        batch: Batch,
        *,
        metric: Metric,
        gradients: str | Sequence[str],
        record: str | Sequence[str] = (),
        edits: Sequence[Edit] = (),
        rules: Rules | None = None,
        start: Start | None = None,
    ) -> Tape:
        """One forward pass that keeps its graph, for any number of backward passes; arguments as in `run`."""
        self._check(batch)
        return make_tape(
            lambda taps: self._forward(batch, taps),
            self.info,
            self.sites(),
            batch,
            record=record,
            edits=edits,
            metric=metric,
            gradients=gradients,
            rules=rules,
            start=start,
        )
