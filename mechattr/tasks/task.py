"""`Task`: aligned prompt pairs, their answers, a metric, and named places in the prompts."""

from __future__ import annotations

import hashlib
import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from mechattr.errors import AlignmentError, EmptyTaskError, SettingError, UnknownNameError, nearest
from mechattr.models.base import Batch, HookedModel, row_numbers
from mechattr.models.halving import Halving
from mechattr.models.images import digest
from mechattr.tasks.metrics import PADDING, Metric

Span = tuple[int, int]
PositionMode = Literal["aligned", "named", "all"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Task:
    """Prompt pairs that are ready to run.

    Attributes:
        name: name of the generator, or "pairs".
        clean: the clean prompts.
        corrupt: the corrupt prompts; row i has as many tokens as row i of `clean`.
        answers: token ids; one axis where every pair has one answer, else padded with -1 to the longest.
        foils: the same for what the answers are compared with; None where the metric needs none.
        metric: one number a row from the logits.
        spans: for each pair, name -> (first position, one past the last). "END" is the last token of the prompt.
        settings: how the task was made.
        skipped: reason -> number of drawn pairs that could not be used with this tokenizer.
        citation: where the task comes from.
        factors: for each pair, what was drawn (template, order, construction, ...).
    """

    name: str
    clean: Batch
    corrupt: Batch
    answers: Int[Tensor, "pair ..."]
    foils: Int[Tensor, "pair ..."] | None
    metric: Metric
    spans: tuple[Mapping[str, Span], ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    skipped: Mapping[str, int] = field(default_factory=dict)
    citation: str = ""
    factors: tuple[Mapping[str, Any], ...] = ()

    def __len__(self) -> int:
        return len(self.clean)

    @property
    def aligned(self) -> bool:
        """Whether a position means the same in every pair: equal token lengths, and where it is known how the pairs
        were drawn, one template and the named spans on the same positions."""
        return self._aligns(self.clean)

    def _aligns(self, rows: Batch) -> bool:
        return len(set(rows.lengths.tolist())) == 1 and self._layouts <= 1

    @property
    def _layouts(self) -> int:
        """Number of templates with their spans, among pairs that were drawn from templates."""
        return len({(f.get("template"), *sorted(s.items())) for f, s in zip(self.factors, self.spans, strict=False)})

    def rows(self, index: Tensor | Sequence[int]) -> Task:
        """The pairs `index`, in that order. Rows keep their `example` number, so the metric stays right.

        Args:
            index: numbers of pairs, or one bool a pair, such as `metric > 0`.

        Raises:
            EmptyTaskError: `index` is empty.
            SettingError: a pair that does not exist.
        """
        chosen = row_numbers(index, len(self)).tolist()
        if not chosen:
            raise EmptyTaskError("a part of a task", "no pair index", "choose at least one pair")
        return replace(
            self,
            clean=self.clean.rows(chosen),
            corrupt=self.corrupt.rows(chosen),
            answers=self.answers[chosen],
            foils=None if self.foils is None else self.foils[chosen],
            spans=tuple(self.spans[i] for i in chosen),
            factors=tuple(self.factors[i] for i in chosen) if self.factors else (),
        )

    def positions(self, mode: PositionMode, *, source: bool = False) -> dict[str, tuple[Span, ...]]:
        """Places that are comparable across pairs: label -> for each pair (first position, one past the last).

        Args:
            mode: "aligned": every position is a place; "named": the spans that all pairs have; "all": one place, the
                whole prompt.
            source: places of what the encoder of an encoder-decoder model reads, instead of its decoder.

        Raises:
            AlignmentError: the pairs do not align, or have no span in common; or spans in a source.
            UnknownNameError: another mode.
        """
        rows = self.clean.prompt if source else self.clean
        if mode == "all":
            return {"all": tuple((0, int(length)) for length in rows.lengths)}
        if mode == "named" and source:
            found = "spans of an encoder-decoder model's task are positions of its decoder"
            raise AlignmentError("positions='named' in a source", found, "use positions='aligned' or positions='all'")
        if mode == "named":
            shared = [name for name in self.spans[0] if all(name in spans for spans in self.spans)]
            if not shared:
                raise AlignmentError(
                    "positions='named'",
                    f"no span name that all {len(self)} pairs of task {self.name!r} have",
                    "use positions='all', or give every pair the same span names",
                )
            return {name: tuple(spans[name] for spans in self.spans) for name in shared}
        if mode != "aligned":
            raise UnknownNameError("positions", repr(mode), nearest(str(mode), ("aligned", "named", "all")))
        if not self._aligns(rows):
            lengths, named = rows.lengths, "positions='named' (the task's spans) or "  # a source has no spans
            raise AlignmentError(
                f"a table by {'source ' * source}position over the {len(self)} pairs of task {self.name!r}",
                f"{'sources' if source else 'prompts'} of {int(lengths.min())} to {int(lengths.max())} tokens, of "
                f"{max(1, self._layouts)} template(s) with their spans",
                f"use {'' if source else named}positions='all', or make the task from one template (and of one order "
                "or kind, where it has these)",
            )
        return {str(i): ((i, i + 1),) * len(self) for i in range(int(rows.lengths[0]))}

    def sample(self, pair: int = 0) -> tuple[list[tuple[str, bool]], list[tuple[str, bool]]]:
        """One pair for reading: for the clean and the corrupt prompt, (token text, whether it differs)."""
        clean, corrupt = self.clean.prompt, self.corrupt.prompt
        differs = clean.differs(corrupt)[pair][clean.mask[pair]].tolist()
        return (
            list(zip(_strings(clean, pair), differs, strict=True)),
            list(zip(_strings(corrupt, pair), differs, strict=True)),
        )

    def hash(self) -> str:
        """sha256 of tokens, sources, images, answers, foils, metric and spans: what a stored result belongs to."""
        document = {
            "clean": _ids(self.clean),
            "corrupt": _ids(self.corrupt),
            "answers": self.answers.tolist(),
            "foils": None if self.foils is None else self.foils.tolist(),
            "metric": self.metric.name,
            "spans": [dict(spans) for spans in self.spans],
        }
        if self.clean.source is not None and self.corrupt.source is not None:
            document["sources"] = [_ids(self.clean.source), _ids(self.corrupt.source)]
        if self.clean.images or self.corrupt.images:
            document["images"] = [[digest(row).hex() for row in batch.images] for batch in (self.clean, self.corrupt)]
        return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()

    def __repr__(self) -> str:
        skipped = f", skipped {sum(self.skipped.values())}" if self.skipped else ""
        return f"Task({self.name!r}, {len(self)} pairs, {self.metric.name}{skipped})"

    def _repr_html_(self) -> str:
        skipped = "; ".join(f"{count} × {reason}" for reason, count in self.skipped.items()) or "none"
        clean, corrupt = (_coloured(side) for side in self.sample())
        lengths = self.clean.lengths
        rows = {
            "pairs": str(len(self)),
            "tokens": f"{int(lengths.min())} to {int(lengths.max())}",
            "metric": html.escape(f"{self.metric.name} ({self.metric.unit})"),
            "skipped": html.escape(skipped),
            "clean": clean,
            "corrupt": corrupt,
            "source": html.escape(self.citation),
        }
        cells = "".join(
            f"<tr><th>{name}</th><td style='text-align:left'>{text}</td></tr>" for name, text in rows.items()
        )
        return f"<table><caption>Task {html.escape(self.name)}</caption>{cells}</table>"


def accuracy(model: HookedModel, task: Task, *, batch_size: int = 64) -> float:
    """Share of pairs whose metric is positive on the clean prompt.

    Cost: one forward pass a pair, in batches that halve when memory runs out.

    Raises:
        SettingError: the metric has no foil to compare with, so that its sign decides nothing; or no rows at a time.
    """
    if batch_size < 1:
        raise SettingError(f"batch_size={batch_size!r}", "no number of rows", "give a whole number from 1")
    if not task.metric.contrast:
        raise SettingError(
            "accuracy",
            f"metric {task.metric.name!r}, whose sign does not say whether an answer is right",
            "make the task with metric='logit_difference' or metric='probability_difference'",
        )

    def right(rows: Sequence[int]) -> list[bool]:
        batch = task.clean.rows(rows)
        positive: list[bool] = (task.metric(model.run(batch).logits, batch) > 0).tolist()
        return positive

    return sum(Halving(batch_size)(range(len(task)), right)) / len(task)


def padded_ids(rows: Sequence[Sequence[int]]) -> Int[Tensor, "pair ..."]:
    """Token ids of every pair as one tensor: one axis where each has one, else padded on the right with -1."""
    width = max(len(row) for row in rows)
    if width == 1:
        return torch.tensor([row[0] for row in rows])
    return torch.tensor([[*row, *[PADDING] * (width - len(row))] for row in rows])


def _ids(batch: Batch) -> list[list[int]]:
    return [row[real].tolist() for row, real in zip(batch.tokens, batch.mask, strict=True)]


def _strings(batch: Batch, row: int) -> Sequence[str]:
    return (
        batch.strings[row] if batch.strings else [str(token) for token in batch.tokens[row][batch.mask[row]].tolist()]
    )


def _coloured(tokens: list[tuple[str, bool]]) -> str:
    return "".join(
        f"<span style='padding:0 2px;white-space:pre;background:{'#ffd48a' if differs else '#eeeeee'}'>"
        f"{html.escape(text)}</span> "
        for text, differs in tokens
    )
