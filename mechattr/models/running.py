"""What every backend that taps a forward pass of torch has in common: `run` and `tape`."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import ClassVar, Self

from torch import Tensor

from mechattr.errors import ModelStateError, UnsupportedFeatureError
from mechattr.models.base import Batch, Metric, ModelInfo, Run, Start, Visit
from mechattr.models.dictionary import Dictionary
from mechattr.models.dictionary_view import with_dictionaries
from mechattr.models.edits import Edit
from mechattr.models.rules import Rules, check_rules, refused
from mechattr.models.standing import Standing
from mechattr.models.tape import Tape, execute, make_tape
from mechattr.models.taps import Taps


class Running(Standing, ABC):
    """A model whose forward pass calls the taps of a run."""

    info: ModelInfo
    _sites: tuple[str, ...]
    _dictionaries: Mapping[str, Dictionary] = MappingProxyType({})  # by the full name of their host
    checkpoints: ClassVar[bool] = False  # whether a block can be computed again during a backward pass

    def sites(self) -> tuple[str, ...]:
        """The full site names of this model, in the order of its forward pass."""
        return self._sites

    @abstractmethod
    def weight(self, name: str) -> Tensor:
        """A weight by its standard name."""

    def _refusal(self, rules: Rules) -> UnsupportedFeatureError | None:
        """The error of rules that this model cannot obey, if they are such."""
        return refused(rules, self.info)

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
        checkpoint: bool = False,
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
            checkpoint: keep the input of each block only, and compute a block again when the backward pass reaches it:
                the same numbers for the memory of one block, and one more forward pass for each backward pass. Edits
                act again, so operators must give the same value each time.

        Raises:
            UnsupportedFeatureError: `checkpoint` on a backend that cannot compute a block again; a site that did not
                fire; rules in a model that has a module which they do not reach, or in float16.
            SettingError, UnknownSiteError, NonFiniteError: see `mechattr.models.tape`.
        """
        self._check(batch)
        self._check_checkpoint(checkpoint)
        self._check_rules(rules)
        return execute(
            lambda taps: self._forward(batch, taps),
            self.info,
            self.sites(),
            batch,
            record=record,
            edits=self._edited(batch, edits),
            metric=metric,
            gradients=gradients,
            rules=rules,
            start=start,
            visit=visit,
            checkpoint=checkpoint,
            dictionaries=self._dictionaries,
        )

    def tape(
        self,
        batch: Batch,
        *,
        metric: Metric | None = None,
        gradients: str | Sequence[str],
        record: str | Sequence[str] = (),
        edits: Sequence[Edit] = (),
        rules: Rules | None = None,
        start: Start | None = None,
        checkpoint: bool = False,
    ) -> Tape:
        """One forward pass that keeps its graph, for any number of backward passes; arguments as in `run`."""
        self._check(batch)
        self._check_checkpoint(checkpoint)
        self._check_rules(rules)
        return make_tape(
            lambda taps: self._forward(batch, taps),
            self.info,
            self.sites(),
            batch,
            record=record,
            edits=self._edited(batch, edits),
            metric=metric,
            gradients=gradients,
            rules=rules,
            start=start,
            checkpoint=checkpoint,
            dictionaries=self._dictionaries,
        )

    def with_dictionaries(self, dictionaries: Sequence[Dictionary]) -> Self:
        """The same model, with the latents and the error of each dictionary as sites; this one stays as it is.

        A dictionary splits what its host holds, x, into decode(f), which its latents f explain, and an error e = x -
        decode(f). Where nothing is edited x goes on to the last bit; edited latents f' and error e' make it
        x + (decode(f') - decode(f)) + (e' - e). A dictionary acts before the edits of its host. Weights are shared.

        Args:
            dictionaries: beside those that the model has already, one a host.

        Raises:
            SettingError: no dictionaries, two at one host, hosts or sites that the model does not have, layers with
                different numbers of latents, or an `encode` and `decode` that do not fit what they get: another shape,
                dtype or device, NaN, or another value each time. (One run of two tokens shows.)
        """
        return with_dictionaries(self, dictionaries)

    def _check_rules(self, rules: Rules | None) -> None:
        check_rules(rules)
        if rules is not None and (error := self._refusal(rules)) is not None:
            raise error

    def _check_checkpoint(self, checkpoint: bool) -> None:
        if checkpoint and not self.checkpoints:
            raise UnsupportedFeatureError(
                "checkpoint=True",
                f"backend {self.info.backend!r} cannot compute a block again during a backward pass",
                "leave checkpoint out, or use backend='hf' or 'plain'",
            )


class Turns:
    """One run at a time: hooks are on the modules, where a run of another thread, or one inside an edit, would meet
    them."""

    def __init__(self) -> None:
        self._lock, self._thread = threading.Lock(), -1

    def __reduce__(self) -> tuple[type[Turns], tuple[()]]:
        return Turns, ()  # a model that travels to another process has a lock of its own there

    @contextmanager
    def __call__(self) -> Iterator[None]:
        here = threading.get_ident()
        if self._thread == here:
            raise ModelStateError("a run inside a run", "an edit runs the model that it edits", "record beforehand")
        with self._lock:
            self._thread = here
            try:
                yield
            finally:
                self._thread = -1
