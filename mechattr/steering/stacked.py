"""Scores of rows under many vectors and multipliers: what vectors leave as it is runs once, multipliers are rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from mechattr.errors import NonFiniteError
from mechattr.models.base import Batch, HookedModel, Run, Start
from mechattr.models.halving import Halving
from mechattr.sites import full_name, parse
from mechattr.steering.gates import Decision, Gate, Given, check_gate, decided
from mechattr.steering.numbers import check_count
from mechattr.steering.operators import Operation
from mechattr.steering.prompted import Steering, Where, applied, applied_to, check_reached

UNCHANGED = ("add", "norm_preserving", "angular")  # with the multiplier 0 they give x itself
# (logits of rows, these rows, their starts, the logits of unsteered rows, which of those each row is) -> one a row
Score = Callable[[Tensor, Batch, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False, slots=True)
class Rows:
    """Rows that are scored.

    Attributes:
        batch: prompts with what follows them.
        starts: the position of each row's first token behind its prompt.
        score: one number a row from its logits.
    """

    batch: Batch
    starts: Int[Tensor, " row"]
    score: Score


@dataclass(frozen=True, eq=False, slots=True)
class Scores:
    """What rows scored.

    Attributes:
        base: unsteered.
        steered: under each vector and multiplier.
        forward: rows of forward passes; a pass through some of the blocks counts as their share.
    """

    base: Float[Tensor, " row"]
    steered: Float[Tensor, "vector multiplier row"]
    forward: float


@dataclass(frozen=True, eq=False, slots=True)
class Steered:
    """A model under each of some vectors at each of some multipliers.

    Rows run once without steering. The runs of a vector then begin at the first block that it changes, from the
    residual stream of that run, with a row for each multiplier. What cannot begin there begins at the embeddings: a
    vector at the embeddings themselves, and any vector inside a block of another `apply`. The scores are the same.
    """

    model: HookedModel
    vectors: Sequence[Steering]
    multipliers: Sequence[float]
    positions: Where
    operator: str | Operation
    gate: Given | None
    batch_size: int
    progress: bool | None
    inner: Halving = field(init=False)

    def __post_init__(self) -> None:
        check_count("batch_size", self.batch_size)
        object.__setattr__(self, "inner", Halving(self.batch_size))

    def scores(self, rows: Rows, label: str) -> Scores:
        """Scores rows without steering, and under each vector and multiplier.

        Raises:
            MismatchError: a vector of another model.
            SettingError: positions that no row has.
            NonFiniteError: a run has NaN or infinity; sites and multipliers are named.
        """
        check_reached(self.positions, rows.batch, rows.starts)
        for vector in self.vectors:
            with applied(vector, self.model, 1.0, "all", self.operator):
                pass  # does it fit? asked before anything runs
        standing = "standing_hash" in self.model.fingerprint()
        routes = [(vector, 0) if standing else begun(self.model, vector) for vector in self.vectors]
        n, n_layers = len(rows.batch), self.model.info.n_layers
        share = sum(1 - layer / n_layers for _, layer in routes)
        asked, opened = self._asked(), self._opened(rows)
        runs = len(asked) * sum(opened)
        hidden = None if self.progress is None else not self.progress
        with tqdm(total=n + len(routes) * runs, desc=label, unit="row", disable=hidden) as bar:
            found = Halving(self.batch_size)(range(n), partial(self._some, rows, routes, asked, opened, bar))
        table = torch.stack(found).cpu()
        shape = len(routes), len(self.multipliers)
        steered = table[:, 1:].unflatten(1, shape).permute(1, 2, 0).contiguous()
        read = n if isinstance(self.gate, Gate) else 0
        return Scores(table[:, 0].clone(), steered, n + read + runs * share)

    def _asked(self) -> list[int]:
        """The multipliers that need runs of their own: at 0 most operators change nothing."""
        same = isinstance(self.operator, str) and self.operator in UNCHANGED
        return [k for k, multiplier in enumerate(self.multipliers) if multiplier or not same]

    def _opened(self, rows: Rows) -> list[bool]:
        """The rows that are steered: a gate decides from the prompt alone, of a text without one from the text."""
        if self.gate is None:
            return [True] * len(rows.batch)
        for vector in self.vectors:
            check_gate(self.gate, self.model, vector.sites)
        lengths = torch.where(rows.starts > 0, rows.starts, rows.batch.lengths)
        seen = rows.batch.mask & (rows.batch.positions < lengths[:, None])
        prompts = replace(rows.batch, mask=seen, strings=())

        def decide(part: Sequence[int]) -> list[bool]:
            some = prompts.rows(part)
            decision = decided(self.gate, some)  # type: ignore[arg-type]
            if isinstance(decision, Decision):
                self.model.run(some, edits=decision.edits())
            found: list[bool] = (decision() if isinstance(decision, Decision) else decision).tolist()
            return found

        return Halving(self.batch_size)(range(len(prompts)), decide)

    def _some(
        self,
        rows: Rows,
        routes: Sequence[tuple[Steering, int]],
        asked: list[int],
        opened: list[bool],
        bar: Any,
        part: Sequence[int],
    ) -> list[Tensor]:
        """Of some rows, the score without steering, and then those of each vector and multiplier."""
        index = torch.tensor(part, device=rows.batch.device)
        some = Rows(rows.batch.rows(index), rows.starts[index], rows.score)
        every = torch.arange(len(part), device=index.device)
        record = [full_name("resid_pre", layer) for layer in dict.fromkeys(layer for _, layer in routes) if layer]
        run = self.model.run(some.batch, record=record)
        base = some.score(run.logits, some.batch, some.starts, run.logits, every)
        bar.update(len(part))
        found = base[:, None, None].repeat(1, len(routes), len(self.multipliers))
        jobs = [(k, row) for k in asked for row in range(len(part)) if opened[part[row]]]
        for place, route in enumerate(routes if jobs else ()):
            values = self.inner(jobs, partial(self._stack, some, run, route, self.vectors[place].sites, bar))
            k, row = torch.tensor(jobs, device=found.device).T
            found[row, place, k] = torch.stack(values)
        return list(torch.cat([base[:, None], found.flatten(1)], 1))

    def _stack(
        self,
        some: Rows,
        run: Run,
        route: tuple[Steering, int],
        sites: Sequence[str],
        bar: Any,
        jobs: Sequence[tuple[int, int]],
    ) -> list[Tensor]:
        """Of (multiplier, row) pairs, the scores under one vector."""
        vector, layer = route
        of = torch.tensor([row for _, row in jobs], device=some.batch.device)
        factors = torch.tensor([self.multipliers[k] for k, _ in jobs], dtype=torch.double)
        batch, starts = some.batch.rows(of), some.starts[of]
        start = Start(layer, run.activations["resid_pre", layer].values[of]) if layer else None
        try:
            with applied_to(vector, self.model, factors, self.positions, self.operator, batch, starts):
                logits = self.model.run(batch, start=start).logits
        except NonFiniteError as error:
            found = f"NaN or infinity, with a multiplier among {', '.join(f'{m:g}' for m in factors.unique().tolist())}"
            fix = "use smaller multipliers, or a wider dtype"
            raise NonFiniteError(f"steering at {', '.join(sites)}", found, fix) from error
        bar.update(len(jobs))
        return list(some.score(logits, batch, starts, run.logits, of))


def begun(model: HookedModel, steering: Steering) -> tuple[Steering, int]:
    """Steering of the same effect, and the block from which its runs can begin. The output of a block is the input of
    the next one, so what acts there is moved to where a run can begin; behind the last block nothing can."""
    names = {}
    for site in steering.sites:
        short, layer = parse(site)
        after = full_name("resid_pre", (layer or 0) + 1)
        shifts = short == "resid_post" and after in model.sites() and after not in steering.sites
        names[site] = after if shifts else site
    parts = ((*name.partition("/"), table) for name, table in steering.tensors.items())  # functions have several a site
    tensors = {names[site] + slash + part: table for site, slash, part, table in parts}
    again = type(steering)(tensors, settings=steering.settings, provenance=steering.provenance)
    whole = model.info.n_encoder_layers or not all(name.startswith("blocks.") for name in names.values())
    return again, 0 if whole else min(parse(name)[1] or 0 for name in names.values())
