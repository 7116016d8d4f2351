"""`MultipleChoice`: the log-probabilities of answers, and what they say of a model."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from jaxtyping import Float
from torch import Tensor

from mechattr.base import Artifact
from mechattr.errors import MismatchError, SettingError, UnknownNameError, nearest
from mechattr.steering.intervals import Estimate, estimate

if TYPE_CHECKING:
    import pandas as pd

METRICS = ("mc1", "mc2")
ALL = "all"


class MultipleChoice(Artifact):
    """Answers of questions, scored one by one.

    `tensors`: `log_probability` [question, answer], in nats, right answers first, NaN behind a question's last answer;
    and `tokens` [question, answer], the number of tokens of each. `settings` has the `questions`.
    """

    kind: ClassVar[str] = "multiple_choice"

    def __len__(self) -> int:
        return len(self._questions)

    @property
    def mc1(self) -> Estimate:
        """The share of questions whose best answer is more likely than every wrong one."""
        return self.estimate("mc1")

    @property
    def mc2(self) -> Estimate:
        """The mean share of probability that right answers have of that of all answers."""
        return self.estimate("mc2")

    def values(self, metric: str = "mc1", *, per_token: bool = False) -> Float[Tensor, " question"]:
        """The score of each question, from 0 to 1.

        Args:
            metric: `"mc1"` or `"mc2"`.
            per_token: score answers by their mean log-probability a token and not by its sum.

        Raises:
            UnknownNameError: no such metric.
        """
        if metric not in METRICS:
            raise UnknownNameError(f"metric={metric!r}", "no such metric", nearest(str(metric), METRICS))
        lengths = self.tensors["tokens"].values
        real = lengths > 0
        scores = self.tensors["log_probability"].values.double()
        scores = (scores / lengths.clamp(min=1) if per_token else scores).masked_fill(~real, -torch.inf)
        counts = torch.tensor([len(question["correct"]) for question in self._questions])
        right = torch.arange(scores.shape[1]) < counts[:, None]
        if metric == "mc2":
            return (scores.masked_fill(~right, -torch.inf).logsumexp(1) - scores.logsumexp(1)).exp()
        best = torch.tensor([question["best"] for question in self._questions])
        wrong = scores.masked_fill(right, -torch.inf).amax(1)
        return (scores[torch.arange(len(scores)), best] > wrong).double()

    def estimate(self, metric: str = "mc1", *, per_token: bool = False, category: str | None = None) -> Estimate:
        """The mean over questions, with its 95 % bootstrap interval.

        Args:
            metric, per_token: as `values`.
            category: of the questions that count; all without it.

        Raises:
            UnknownNameError: no such metric or category.
        """
        return estimate(self.values(metric, per_token=per_token)[self._of(category)])

    def chance(self, metric: str = "mc1", *, category: str | None = None) -> float:
        """What `estimate` would be on average if the order of answers were random (`"mc1"`), or if all answers of a
        question were equally likely (`"mc2"`).

        Raises:
            UnknownNameError: no such metric or category.
        """
        if metric not in METRICS:
            raise UnknownNameError(f"metric={metric!r}", "no such metric", nearest(str(metric), METRICS))
        counts = [(len(question["correct"]), len(question["incorrect"])) for question in self._questions]
        shares = [1 / (1 + wrong) if metric == "mc1" else right / (right + wrong) for right, wrong in counts]
        return float(torch.tensor(shares, dtype=torch.double)[self._of(category)].mean())

    def gain(
        self, base: MultipleChoice, metric: str = "mc1", *, per_token: bool = False, category: str | None = None
    ) -> Estimate:
        """How much higher the mean is than in another result of the same questions, such as that of the model without
        steering, with the interval of the differences question by question.

        Raises:
            MismatchError: other questions, or another template.
            UnknownNameError: no such metric or category.
        """
        for name in ("questions", "template", "separator"):
            if self.settings[name] != base.settings[name]:
                found = f"their {name} differ" if name == "questions" else f"another {name}"
                raise MismatchError("to compare two results of multiple choice", found, "ask the same in the same way")
        change = self.values(metric, per_token=per_token) - base.values(metric, per_token=per_token)
        return estimate(change[self._of(category)])

    def of(self, question: int) -> list[tuple[str, bool, float]]:
        """The answers of one question, most likely first: (answer, whether it is right, log-probability in nats).

        Raises:
            SettingError: no such question.
        """
        if isinstance(question, bool) or question not in range(len(self)):
            raise SettingError(f"question {question!r}", f"{len(self)} questions", "count from 0")
        asked = self._questions[question]
        answers = [(text, True) for text in asked["correct"]] + [(text, False) for text in asked["incorrect"]]
        scores = self.tensors["log_probability"].values[question].tolist()
        found = [(text, right, score) for (text, right), score in zip(answers, scores, strict=False)]
        return sorted(found, key=lambda answer: -answer[2])

    def to_pandas(self, *, per_token: bool = False) -> pd.DataFrame:
        """Columns category, n, and of each metric mean, low, high and chance; all questions first, then by category."""
        import pandas as pd

        given = [str(question["category"]) for question in self._questions]
        names = sorted(set(given) - {""})
        rows = []
        for category in (None, *names):
            row: dict[str, Any] = {
                "category": ALL if category is None else category,
                "n": len(given) if category is None else given.count(category),
            }
            for metric in METRICS:
                mean, low, high = self.estimate(metric, per_token=per_token, category=category)
                chance = self.chance(metric, category=category)
                row |= {metric: mean, f"{metric}_low": low, f"{metric}_high": high, f"{metric}_chance": chance}
            rows.append(row)
        return pd.DataFrame(rows)

    def __repr__(self) -> str:
        texts = (f"{metric.upper()} {self.estimate(metric)} (chance {self.chance(metric):.3g})" for metric in METRICS)
        return f"MultipleChoice({len(self)} questions, {', '.join(texts)})"

    def _repr_html_(self) -> str:
        return f"<div>{escape(repr(self))}</div>{self.to_pandas().round(3).to_html(index=False)}"

    @property
    def _questions(self) -> list[Mapping[str, Any]]:
        return cast(list[Mapping[str, Any]], self.settings["questions"])

    def _of(self, category: str | None) -> Tensor:
        names = [str(question["category"]) for question in self._questions]
        if category is not None and category not in names:
            raise UnknownNameError(f"category {category!r}", "no question of it", nearest(category, sorted(set(names))))
        return torch.tensor([category is None or name == category for name in names])
