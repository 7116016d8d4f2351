"""Multiple choice: how likely a model finds the right answers of a question, beside the wrong ones."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from mechattr.errors import NonFiniteError, SettingError
from mechattr.labelled import Labelled
from mechattr.models.base import HookedModel
from mechattr.provenance import provenance
from mechattr.steering.answers import check_causal, starts_of, token_log_probabilities, token_rows
from mechattr.steering.choice_scores import MultipleChoice

PLACE = "{question}"


@dataclass(frozen=True, slots=True)
class Question:
    """A question with its possible answers.

    Attributes:
        question: its text.
        correct: right answers, none twice.
        incorrect: wrong answers, none twice.
        best: which of the right ones is the best.
        category: what it is about; scores are also given category by category.

    Raises:
        SettingError: an empty text, no right or no wrong answer, one twice, or a best answer that does not exist.
    """

    question: str
    correct: tuple[str, ...]
    incorrect: tuple[str, ...]
    best: int = 0
    category: str = ""

    def __post_init__(self) -> None:
        shown = f"question {self.question!r:.60}"
        if not isinstance(self.question, str) or not self.question.strip():
            raise SettingError(shown, "no text", "give the text of the question")
        for name in ("correct", "incorrect"):
            given = getattr(self, name)
            texts = tuple(given) if isinstance(given, Iterable) and not isinstance(given, str) else ()
            if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
                raise SettingError(shown, f"{name}={given!r:.80}", "give at least one text, and none that is empty")
            if len(set(texts)) < len(texts):
                twice = next(text for i, text in enumerate(texts) if text in texts[:i])
                raise SettingError(shown, f"{name} answer twice: {twice!r:.60}", "give each answer once")
            object.__setattr__(self, name, texts)
        if isinstance(self.best, bool) or self.best not in range(len(self.correct)):
            found = f"{len(self.correct)} right answers"
            raise SettingError(f"best={self.best!r} of {shown}", found, "count them from 0")

    @property
    def answers(self) -> tuple[str, ...]:
        """The right answers, then the wrong ones."""
        return self.correct + self.incorrect


def multiple_choice(
    model: HookedModel,
    questions: Sequence[Question],
    *,
    template: str = "Q: {question}\nA:",
    separator: str = " ",
    batch_size: int = 32,
) -> MultipleChoice:
    r"""Scores every answer of every question by $\log p(\text{answer} \mid \text{question})$, in nats, with the model
    as it is: inside a block of `vector.apply` the steered one.

    - `mc1`: is the best answer more likely than every wrong one? The other right answers do not matter.
    - `mc2`: $\sum_{\text{right}} p / \sum_{\text{right and wrong}} p$.

    Args:
        model: a causal language model.
        questions: with their answers, such as those of `truthfulqa(path)`.
        template: what stands before an answer, with the question in the place of `{question}`. Examples of questions
            and answers can be put in front, as the published numbers of TruthfulQA have them.
        separator: what stands between that and the answer; it counts as a part of the answer.
        batch_size: rows of a forward pass, of similar lengths; halved when memory runs out.

    Raises:
        SettingError: no questions, a template without a place for them, an answer without a token of its own, or one
            that is too long for the model.
        NonFiniteError: a log-probability that is NaN.
        UnsupportedFeatureError: a model that does not predict next tokens.

    Cost:
        1 forward pass an answer.

    References:
        Lin, Hilton, Evans (2022), TruthfulQA, arXiv 2109.07958. Log-probabilities are summed there, which
        favours short answers; `per_token=True` of the result takes their means.
    """
    check_causal(model, "multiple choice")
    given = _checked(questions)
    if not isinstance(template, str) or PLACE not in template:
        raise SettingError(f"template={template!r:.60}", f"no {PLACE}", "say where the question stands")
    if not isinstance(separator, str):
        raise SettingError(f"separator={separator!r:.60}", f"a {type(separator).__name__}", "give a text")
    before = [template.replace(PLACE, question.question) for question in given]
    of = [i for i, question in enumerate(given) for _ in question.answers]
    answers = [separator + answer for question in given for answer in question.answers]
    prompts = token_rows(model, before)
    rows = token_rows(model, answers, [before[i] for i in of])
    starts = starts_of(rows, [prompts[i] for i in of])
    for i, row, start, answer in zip(of, rows, starts, answers, strict=True):
        if not max(start, 1) < len(row):
            raise SettingError(f"question {i}", f"no tokens for the answer {answer!r:.60}", "leave the answer out")
    _check_room(model, rows, of)
    found_log_p = token_log_probabilities(model, rows, starts, batch_size=batch_size)
    shape = len(given), max(len(question.answers) for question in given)
    log_p = torch.full(shape, torch.nan, dtype=found_log_p[0].dtype)
    lengths = torch.zeros(shape, dtype=torch.long)
    place = [j for question in given for j in range(len(question.answers))]
    log_p[of, place] = torch.stack([scores.sum() for scores in found_log_p]).cpu()
    lengths[of, place] = torch.tensor([len(scores) for scores in found_log_p])
    bad = (log_p.isnan() & (lengths > 0)).any(1)
    if bool(bad.any()):
        fix = "look at the weights, or at the multiplier of the vector"
        raise NonFiniteError(f"question {int(bad.nonzero()[0])}", "a log-probability that is NaN", fix)
    axes = ("question", "answer")
    return MultipleChoice(
        {"log_probability": Labelled(log_p, axes), "tokens": Labelled(lengths, axes)},
        settings={
            "method": "multiple_choice", "template": template, "separator": separator,
            "questions": [asdict(question) for question in given],
        },
        provenance=provenance(
            {**asdict(model.info), **model.fingerprint()}, tokens=torch.tensor([t for row in rows for t in row])
        ),
    )  # fmt: skip


def _check_room(model: HookedModel, rows: Sequence[Sequence[int]], of: Sequence[int]) -> None:
    most = max(len(row) for row in rows)
    if model.info.bounded is not False and most > model.info.n_ctx:
        long = sorted({i for i, row in zip(of, rows, strict=True) if len(row) > model.info.n_ctx})
        shown = ", ".join(map(str, long[:10])) + (", ..." if len(long) > 10 else "")
        found = f"up to {most} tokens with an answer; the model reads {model.info.n_ctx}"
        raise SettingError(f"questions {shown} ({len(long)})", found, "leave them out, or shorten the template")


def _checked(questions: Any) -> list[Question]:
    given = list(questions) if isinstance(questions, Iterable) and not isinstance(questions, str) else []
    if not given or not all(isinstance(question, Question) for question in given):
        found = f"a {type(questions).__name__}" if not given and questions else "none" if not given else "other things"
        raise SettingError("questions", found, "give a list of Question(question, correct, incorrect)")
    return given
