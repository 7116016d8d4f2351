"""What steered models write: how likely, varied and repetitive it is, and what a judge says of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from mechattr.errors import SettingError
from mechattr.models.base import Batch, HookedModel
from mechattr.models.halving import Halving
from mechattr.models.tokenize import pad
from mechattr.steering.gates import Given
from mechattr.steering.operators import Operation
from mechattr.steering.prompted import Steering, Where, applied
from mechattr.steering.side_effects import perplexity
from mechattr.steering.text_measures import distinct_n, repetition

Judge = Callable[[list[str]], Sequence[float]]


@dataclass(frozen=True, eq=False, slots=True)
class Written:
    """What was written to some prompts, one row for each way to steer.

    Attributes:
        texts: the continuations.
        measures: `perplexity`, `repetition` and, where there is one, `judge` [way, prompt], and `distinct_2` [way].
    """

    texts: list[list[str]]
    measures: Mapping[str, Float[Tensor, "way ..."]]


@dataclass(frozen=True, eq=False, slots=True)
class Writing:
    """Greedy continuations of prompts under vectors at some multipliers, and measures of them.

    Attributes:
        tokens: how many are written to each prompt.
        judge: what gives each text of a list a number.
    """

    model: HookedModel
    multipliers: Sequence[float]
    positions: Where
    operator: str | Operation
    gate: Given | None
    tokens: int
    judge: Judge | None
    batch_size: int
    progress: bool | None

    def __call__(self, vectors: Sequence[Steering | None], prompts: Sequence[Sequence[int]]) -> Written:
        """Under each vector at each multiplier; without a vector unsteered, once. Measured are the perplexity under the
        unsteered model, the share of different pairs of tokens, over all prompts, and the share of sequences of four
        tokens that a text has said before.

        Raises:
            SettingError: a judge that does not give one finite number a text.
        """
        n, end = len(prompts), self.model.tokenizer.eos_token_id
        ways = [(0.0,) if vector is None else self.multipliers for vector in vectors]
        rows: list[list[int]] = []
        hidden = None if self.progress is None else not self.progress
        with tqdm(total=n * sum(map(len, ways)), desc="texts", unit="text", disable=hidden) as bar:
            batch, size = self._padded(prompts), Halving(self.batch_size)
            for vector, multipliers in zip(vectors, ways, strict=True):
                jobs = [(m, row) for m in multipliers for row in range(n)]
                rows += size(jobs, partial(self._continued, batch, vector, bar))
        rows = [row[: row.index(end) + 1] if end in row else row for row in rows]  # rows that ended are filled up
        before = [prompts[i % n] for i in range(len(rows))]
        surprise = perplexity(self.model, rows, prompts=before, batch_size=self.batch_size).cpu()
        again = torch.tensor(repetition(rows), dtype=torch.double)
        measures = {"perplexity": surprise.unflatten(0, (-1, n)), "repetition": again.unflatten(0, (-1, n))}
        measures["distinct_2"] = torch.tensor([distinct_n(rows[i : i + n]) for i in range(0, len(rows), n)])
        said = [self.model.tokenizer.decode(row, skip_special_tokens=True) for row in rows]
        texts = [said[i : i + n] for i in range(0, len(said), n)]
        if self.judge is not None:
            measures["judge"] = torch.stack([_judged(self.judge, part) for part in texts])
        return Written(texts, measures)

    def _padded(self, prompts: Sequence[Sequence[int]]) -> Batch:
        return pad(prompts, None, padding_side="left", device=self.model.weight("embed.W_E").device)

    def _continued(
        self, batch: Batch, vector: Steering | None, bar: Any, jobs: Sequence[tuple[float, int]]
    ) -> list[list[int]]:
        """Of (multiplier, prompt) pairs, the ids behind the prompt."""
        several = batch.rows([row for _, row in jobs])
        steered: AbstractContextManager[Any] = nullcontext()
        if vector is not None:
            factors = [multiplier for multiplier, _ in jobs]
            steered = applied(vector, self.model, factors, self.positions, self.operator, self.gate)
        with steered:
            found = self.model.generate(several, max_new_tokens=self.tokens, do_sample=False)
        bar.update(len(jobs))
        rows: list[list[int]] = found.tokens[:, found.prompt_columns :].tolist()
        return rows


def check_room(model: HookedModel, prompts: Sequence[Sequence[int]], tokens: int) -> None:
    """Whether what is to be written fits behind prompts.

    Raises:
        SettingError: the model has fewer positions.
    """
    longest, most = max(map(len, prompts)), model.info.n_ctx
    if model.info.bounded is not False and longest + tokens > most:
        found = f"a prompt of {longest} tokens, and a model of {most} positions"
        raise SettingError(f"generate={tokens}", found, "write fewer tokens, or use shorter prompts")


def _judged(judge: Judge, texts: list[str]) -> Float[Tensor, " prompt"]:
    try:
        found = torch.as_tensor(judge(texts), dtype=torch.double)
    except (TypeError, ValueError, RuntimeError) as error:
        raise SettingError("a judge", f"no numbers: {error}", "return one number for each text") from error
    if found.shape != (len(texts),) or not bool(found.isfinite().all()):
        fix = "return one finite number for each text"
        raise SettingError("a judge", f"shape {list(found.shape)} for {len(texts)} texts, or not finite", fix)
    return found
