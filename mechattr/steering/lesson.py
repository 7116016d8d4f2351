"""What steering is trained on: triples, the losses of their answers, and the gradients in what is added."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import log
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import softplus

from mechattr.errors import SettingError, UnknownNameError, UnsupportedFeatureError, nearest
from mechattr.models.base import Batch, HookedModel
from mechattr.models.edits import Edit
from mechattr.models.halving import Halving
from mechattr.models.operators import Place
from mechattr.steering.numbers import check_count, check_positive
from mechattr.steering.placing import WORDS
from mechattr.steering.preference import Triples, answer_log_probabilities, sequences
from mechattr.steering.prompted import columns

# rows of a triple: the preferred answer only, both, or both under steering forwards and backwards
LOSSES = {"cross_entropy": 1, "preference": 2, "bidirectional": 4}
# x [row, pos, *axes], a factor a row that broadcasts to x, and the parameters of a site -> x
Formula = Callable[..., Tensor]


@dataclass(frozen=True, eq=False, slots=True)
class Trainee:
    """What is trained.

    Attributes:
        formula: the motion of any site, given its parameters.
        parameters: by full site name.
        rates: how far a step moves each number of them, by full site name.
        reads: whether the gradient of the formula in its parameters depends on x.
        settle: called after each step, to bring parameters back to where they may be.
    """

    formula: Formula
    parameters: dict[str, list[Tensor]]
    rates: dict[str, list[float]]
    reads: bool
    settle: Callable[[], None] = lambda: None


class Lesson:
    """Triples, where steering acts in them, and what the model says of them as it is.

    Args:
        model: a causal language model.
        triples: (prompt, preferred answer, dispreferred answer).
        sites: full names.
        positions: `"all"` tokens, those of the `"prompt"`, the `"generated"` ones (of the answer), the `"last"` one of
            the prompt, or position numbers, negative ones counting from the prompt's end.
        loss: one of `LOSSES`; see `mechattr.steering.learned`.
        beta: of the preference losses.
        batch_size: rows of a forward pass; halved when memory runs out.

    Attributes:
        lengths: the mean length of the activations at which steering acts, by full site name.

    Raises:
        UnknownNameError: no such loss.
        SettingError: triples, positions or numbers that do not fit, or positions that no answer depends on.
        UnsupportedFeatureError: a model that does not predict next tokens.
    """

    def __init__(
        self,
        model: HookedModel,
        triples: Triples,
        sites: Sequence[str],
        *,
        positions: str | Sequence[int],
        loss: str,
        beta: float,
        batch_size: int,
    ) -> None:
        if loss not in LOSSES:
            raise UnknownNameError(f"loss={loss!r}", "no such loss", nearest(str(loss), LOSSES))
        check_positive("beta", beta)
        check_count("batch_size", batch_size)
        self.model, self.sites, self.loss, self.beta, self.rows = model, list(sites), loss, beta, LOSSES[loss]
        self.batch, self.starts = sequences(model, triples)
        self.where = steered(self.batch, self.starts, positions)
        found = Halving(batch_size)(range(len(self.batch)), self._as_it_is)
        self.base = torch.stack([log_p for log_p, _ in found])
        sizes = torch.stack([lengths for _, lengths in found]).sum(0) / self.where.sum()
        self.lengths = dict(zip(self.sites, sizes.tolist(), strict=True))
        self._halving = Halving(max(1, batch_size // self.rows))

    def __len__(self) -> int:
        return len(self.batch) // 2

    @property
    def base_loss(self) -> float:
        """The mean loss of the model as it is: where nothing is gained, both preference losses are log 2."""
        return float(-self.base[: len(self)].mean()) if self.loss == "cross_entropy" else log(2)

    def measure(
        self, trainee: Trainee, triples: Sequence[int], *, gradients: bool = True
    ) -> tuple[Float[Tensor, " triple"], dict[str, list[Tensor]]]:
        """The loss of some triples, and the gradient of their mean in the parameters, by full site name.

        A parameter enters the loss through what it adds at its site only, so that the loss's gradient behind the edit,
        which has everything above in it, is pulled back through the formula alone.

        Raises:
            UnsupportedFeatureError: states that are needed stay where the model is.
        """
        total = {name: [torch.zeros_like(p) for p in found] for name, found in trainee.parameters.items()}

        def run(part: Sequence[int]) -> list[Tensor]:
            chosen, factors = self._rows(part)
            seen: dict[str, Tensor] = {}
            where = self.where[chosen]
            edits = [
                Edit(name, Acting(trainee.formula, found, factors, where, seen if trainee.reads else None))
                for name, found in trainee.parameters.items()
            ]
            loss = Loss(self.loss, self.beta, self.starts[chosen], self.base[chosen], factors)
            batch, sites = self.batch.rows(chosen), self.sites if gradients else ()
            done = self.model.run(batch, edits=edits, metric=loss, gradients=sites)
            assert done.metric is not None
            for name in sites:
                behind = done.gradients[name].values
                behind = behind.to(torch.promote_types(behind.dtype, torch.float32))
                behind = behind * _over(where, behind.ndim)
                if trainee.reads and name not in seen:
                    found = f"backend {self.model.info.backend!r} keeps states where the model runs"
                    raise UnsupportedFeatureError("to train what reads states", found, "use backend='hf'")
                x = seen[name] if trainee.reads else torch.zeros_like(behind)
                for into, g in zip(total[name], _pulled(trainee, name, x, behind, factors), strict=True):
                    into += g / len(triples)
            return list(done.metric.reshape(-1, len(part)).sum(0).detach())

        return torch.stack(self._halving(list(triples), run)), total

    def _rows(self, triples: Sequence[int]) -> tuple[Int[Tensor, " row"], Float[Tensor, " row"]]:
        """The rows of some triples in turn (preferred, dispreferred, both once more), and their factors."""
        first = torch.tensor(triples, device=self.batch.device)
        sides = [first, first + len(self), first, first + len(self)][: self.rows]
        factors = self.base.new_ones(self.rows, len(first))
        factors[2:] = -1
        return torch.cat(sides), factors.flatten()

    def _as_it_is(self, rows: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        index = torch.tensor(rows, device=self.batch.device)
        part, where = self.batch.rows(index), self.where[index]
        run = self.model.run(part, record=self.sites)
        tables = [run.activations[name].values.flatten(2) for name in self.sites]
        lengths = [(x.double().norm(dim=-1) * where).sum(1) for x in tables]
        log_p = answer_log_probabilities(run.logits, part, self.starts[index])
        return list(zip(log_p, torch.stack(lengths, 1), strict=True))


@dataclass(frozen=True, eq=False, slots=True)
class Acting:
    """The operator of an edit: a formula where a mask is true."""

    formula: Formula
    parameters: Sequence[Tensor]
    factors: Float[Tensor, " row"]
    where: Bool[Tensor, "row pos"]
    seen: dict[str, Tensor] | None

    def __call__(self, x: Tensor, place: Place) -> Tensor:
        before = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.seen is not None:
            self.seen[place.site] = before.detach()
        moved = self.formula(before, _over(self.factors, x.ndim), *(p.detach() for p in self.parameters))
        return torch.where(_over(self.where, x.ndim), moved.to(x.dtype), x)


@dataclass(frozen=True, eq=False, slots=True)
class Loss:
    """The loss of rows as `Lesson` orders them: each row has its share, and the shares of a triple add up."""

    kind: str
    beta: float
    starts: Int[Tensor, " row"]
    base: Float[Tensor, " row"]
    factors: Float[Tensor, " row"]

    def __call__(self, logits: Float[Tensor, "row pos d_vocab"], batch: Batch) -> Float[Tensor, " row"]:
        log_p = answer_log_probabilities(logits, batch, self.starts)
        if self.kind == "cross_entropy":
            return -log_p
        gain = self.beta * self.factors * (log_p - self.base)
        better, worse = gain.reshape(LOSSES[self.kind] // 2, 2, -1).unbind(1)
        shares = softplus(worse - better) / LOSSES[self.kind]
        return torch.stack([shares, shares], 1).flatten()


def steered(batch: Batch, starts: Int[Tensor, " row"], positions: str | Sequence[int]) -> Bool[Tensor, "row pos"]:
    """Where steering acts in prompts with their answers, as it does in a generation from these prompts.

    Raises:
        SettingError: no such positions, or none that an answer depends on.
    """
    if isinstance(positions, str) and positions not in WORDS:
        raise SettingError(f"positions={positions!r}", "no such place", nearest(positions, WORDS))
    if not isinstance(positions, str):
        given: list[Any] = list(positions) if isinstance(positions, Sequence) else [None]
        if any(isinstance(p, bool) or not isinstance(p, int) for p in given):
            fix = "give one of " + ", ".join(map(repr, WORDS)) + ", or a list of position numbers"
            raise SettingError(f"positions={positions!r}", "no place in a text", fix)
    chosen = columns(positions, batch, starts)
    if not bool((chosen & (batch.positions < batch.lengths[:, None] - 1)).any()):
        found = "no token there comes before one of an answer"
        raise SettingError(f"positions={positions!r}", found, "name others, or give longer answers")
    return chosen


def _pulled(trainee: Trainee, name: str, x: Tensor, behind: Tensor, factors: Tensor) -> list[Tensor]:
    """The gradient in the parameters of a site, from that behind the edit."""
    leaves = [p.detach().requires_grad_() for p in trainee.parameters[name]]
    with torch.enable_grad():
        value = (trainee.formula(x, _over(factors, x.ndim), *leaves) * behind).sum()
    return list(torch.autograd.grad(value, leaves))


def _over(x: Tensor, ndim: int) -> Tensor:
    """A tensor with axes of length 1 behind, up to so many."""
    return x.reshape(*x.shape, *([1] * (ndim - x.ndim)))
