"""The state of probes in training: weights, the optimiser's moments, and what a file keeps of them between epochs."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from jaxtyping import Float
from torch import Tensor

from mechattr.base import Artifact
from mechattr.erasure.recipes import Descent
from mechattr.erasure.work import Work
from mechattr.errors import MismatchError
from mechattr.labelled import Labelled

_AXES = ("probe", "label", "d_model")
_COUNTERS = ("epoch", "waiting", "steps", "factor", "best", "stale", "losses")


class TrainingState(Artifact):
    """What `resume=` keeps: `weights`, `gradient`, the optimiser's `exp_avg` and `exp_avg_sq`, and `scale`."""

    kind: ClassVar[str] = "erasure_training"


@dataclass(eq=False)
class Training:
    """Probes and their optimiser.

    Attributes:
        weights: of all probes, for states that were divided by `scale`.
        scale: of the states of each probe.
        recipe: how they are trained.
        key: which work this is.
        epoch: epochs that are over.
        gradient: of the documents that wait for a step, and `waiting` their number.
        steps: steps that are over.
        factor: what a plateau has left of the learning rate.
        best: the lowest held-out loss so far, and `stale` the epochs since then.
        losses: of each epoch.
    """

    weights: Float[Tensor, "probe vocab d_model"]
    scale: Float[Tensor, "probe 1 1"]
    recipe: Descent
    key: str
    epoch: int = 0
    waiting: int = 0
    steps: int = 0
    factor: float = 1.0
    best: float | None = None
    stale: int = 0
    losses: list[dict[str, Any]] = field(default_factory=list)
    gradient: Float[Tensor, "probe vocab d_model"] = field(init=False)
    optimiser: torch.optim.AdamW = field(init=False)

    def __post_init__(self) -> None:
        self.gradient = torch.zeros_like(self.weights)
        self.optimiser = torch.optim.AdamW(
            [self.weights], lr=self.recipe.rate, weight_decay=self.recipe.decay, fused=True
        )

    @classmethod
    def begin(cls, work: Work, recipe: Descent, resume: str | os.PathLike[str] | None) -> Training:
        """At zero weights, or where a file says that an earlier training stopped.

        Raises:
            MismatchError: the file belongs to other documents, probes, settings or another model.
        """
        device = work.model.weight("embed.W_E").device
        key = f"{work.key} {asdict(recipe) | {'epochs': None}}"
        if resume is not None and Path(resume).exists():
            return cls._read(resume, recipe, key, device)
        info = work.model.info
        scale = torch.ones(work.n_probes, 1, 1, device=device)
        if recipe.scaled:
            squares = torch.stack([d.states.square().mean((1, 2)) for d in work.documents(work.train[:16], "scales")])
            scale = squares.mean(0).sqrt().float().repeat_interleave(len(work.offsets))[:, None, None]
        weights = torch.zeros(work.n_probes, info.d_vocab, info.d_model, device=device)
        return cls(weights, scale, recipe, key)

    def step(self) -> None:
        """One step of AdamW with what waits, each probe's gradient clipped by itself."""
        gradient = self.gradient.div_(self.waiting) if self.recipe.average else self.gradient
        if self.recipe.clip is not None:
            norms = gradient.flatten(1).norm(dim=1)
            gradient *= (self.recipe.clip / norms.clamp(min=self.recipe.clip))[:, None, None]
        self.steps += 1
        warm = min(1.0, self.steps / max(1, self.recipe.warmup))
        self.optimiser.param_groups[0]["lr"] = self.recipe.rate * self.factor * warm
        self.weights.grad = gradient
        self.optimiser.step()
        self.weights.grad = None
        self.gradient.zero_()
        self.waiting = 0

    def settle(self) -> None:
        """After an epoch: lowers the rate where held-out losses no longer fall."""
        measured = [row["held_out"] for row in self.losses if row["epoch"] == self.epoch]
        known = [loss for loss in measured if loss is not None]
        if self.recipe.patience is None or not known:
            return
        now = sum(known) / len(known)
        if self.best is None or now < self.best:
            self.best, self.stale = now, 0
        else:
            self.stale += 1
        if self.stale > self.recipe.patience:
            self.factor, self.stale = self.factor / 10, 0

    def write(self, path: str | os.PathLike[str]) -> None:
        """Puts the state into a file, in one piece."""
        moments = self.optimiser.state[self.weights]  # empty before the first step
        tensors = {name: moments.get(name, torch.zeros_like(self.weights)) for name in ("exp_avg", "exp_avg_sq")}
        tensors |= {"weights": self.weights, "gradient": self.gradient}
        labelled = {name: Labelled(tensor.clone(), _AXES) for name, tensor in tensors.items()}
        labelled["scale"] = Labelled(self.scale.flatten(), ("probe",))
        kept = {name: getattr(self, name) for name in ("key", *_COUNTERS)}
        fresh = Path(path).with_name(Path(path).name + ".part")
        fresh.unlink(missing_ok=True)
        TrainingState(labelled, settings=kept, provenance={}).save(fresh)
        fresh.replace(path)

    @classmethod
    def _read(cls, path: str | os.PathLike[str], recipe: Descent, key: str, device: torch.device) -> Training:
        stored = TrainingState.load(path)
        if stored.settings["key"] != key:
            raise MismatchError(
                f"to resume from {Path(path).name}",
                "it belongs to other texts, layers, offsets, settings or another model",
                "choose another file, or repeat the call as it was",
            )
        kept = {name: stored.settings[name] for name in _COUNTERS}
        tensors = {name: table.values.to(device, copy=True) for name, table in stored.tensors.items()}
        scale = tensors["scale"][:, None, None]
        state = cls(tensors["weights"], scale, recipe, key, **cast(Any, kept))
        state.gradient = tensors["gradient"]
        moments = {name: tensors[name] for name in ("exp_avg", "exp_avg_sq")}
        state.optimiser.state[state.weights] = {"step": torch.tensor(float(state.steps), device=device), **moments}
        return state
