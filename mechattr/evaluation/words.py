"""Samples of words on a model's tokens, and relevance of tokens as relevance of words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechattr.errors import EmptyTaskError, UnknownNameError, nearest
from mechattr.models.base import Batch, HookedModel
from mechattr.models.tokenize import pad
from mechattr.tasks.align import align
from mechattr.tasks.drawing import require_decoder
from mechattr.tasks.evidence import EvidenceSample
from mechattr.tasks.misfits import Misfit
from mechattr.tasks.pairtext import PairText

Reduction = Literal["sum", "max"]
REDUCTIONS: tuple[Reduction, ...] = ("sum", "max")
ABSENT = "a sample without evidence"


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class Placed:
    """Samples as token rows.

    Attributes:
        samples: those that fit the tokenizer.
        batch: their prompts.
        answers: token ids of the targets.
        foils: token ids of the foils.
        word: of each column the number of its word, -1 at padding and at tokens that the tokenizer adds.
        skipped: samples that were left out, counted by reason.
    """

    samples: tuple[EvidenceSample, ...]
    batch: Batch
    answers: Int[Tensor, " sample"]
    foils: Int[Tensor, " sample"]
    word: Int[Tensor, "sample pos"]
    skipped: Mapping[str, int]

    def rows(self, index: Sequence[int]) -> Placed:
        """The samples `index`, in that order."""
        chosen = torch.as_tensor(index, dtype=torch.long)
        return Placed(
            samples=tuple(self.samples[i] for i in chosen.tolist()), batch=self.batch.rows(chosen),
            answers=self.answers[chosen], foils=self.foils[chosen], word=self.word[chosen], skipped=self.skipped,
        )  # fmt: skip


def place(model: HookedModel, samples: Sequence[EvidenceSample]) -> Placed:
    """Tokenises samples; what does not fit is left out and counted.

    A sample fits when target and foil are one token each after its prompt, no token covers parts of two words, and it
    has evidence.

    Raises:
        SettingError: the model has no tokenizer.
        UnsupportedFeatureError: the model is an encoder.
        EmptyTaskError: no sample fits.
    """
    require_decoder("evidence", model)
    skipped = Counter(ABSENT for sample in samples if not sample.evidence)
    wanted = [sample for sample in samples if sample.evidence]
    labels = [f"sample {i}" for i in range(len(wanted))]
    fitted = (
        align(model, [_pair(sample) for sample in wanted], metric="logit_difference", labels=labels) if wanted else []
    )
    kept, rows, ids, spans = [], [], [], []
    for sample, found in zip(wanted, fitted, strict=True):
        if isinstance(found, Misfit):
            skipped[found.reason] += 1
            continue
        kept.append(sample)
        rows.append(found.clean)
        ids.append((found.answer[0], found.foil[0]))
        spans.append(found.spans)
    if not kept:
        reasons = "; ".join(f"{count} × {reason}" for reason, count in skipped.items()) or "no samples were given"
        raise EmptyTaskError(
            f"{len(samples)} samples on {model.info.name!r}", reasons, "use samples whose words it knows"
        )
    device = model.weight("embed.W_E").device
    batch = pad(rows, model.tokenizer, device=device)
    word = torch.full(batch.tokens.shape, -1)
    for row, places in enumerate(spans):
        for name, (start, end) in places.items():
            word[row, start:end] = int(name)
    answers, foils = torch.tensor(ids, device=batch.device).T
    return Placed(samples=tuple(kept), batch=batch, answers=answers, foils=foils, word=word, skipped=dict(skipped))


def _pair(sample: EvidenceSample) -> PairText:
    """The prompt beside itself, with a span for every word."""
    spans, start = {}, 0
    for i, word in enumerate(sample.words):
        spans[str(i)] = (start, start + len(word))
        start += len(word) + 1
    prompt = sample.text
    return PairText(
        clean=prompt,
        corrupt=prompt,
        answer=f" {sample.target}",
        foil=f" {sample.foil}",
        spans=spans,
        corrupt_spans=spans,
    )


def of_words(
    relevance: Float[Tensor, "sample pos"], word: Int[Tensor, "sample pos"], reduction: Reduction = "sum"
) -> Float[np.ndarray, "sample word"]:
    """Relevance of words from that of their tokens; 0 beyond the last word of a row. Other tokens are left out.

    Args:
        relevance: of each column.
        word: the word of each column, -1 for none.
        reduction: `"sum"` adds the signed relevance of a word's tokens, `"max"` takes the largest.

    Raises:
        UnknownNameError: another reduction.
    """
    if reduction not in REDUCTIONS:
        raise UnknownNameError(f"reduction {reduction!r}", "no such reduction", nearest(reduction, REDUCTIONS))
    values, place = relevance.detach().cpu().double().numpy(), word.cpu().numpy()
    row, column = np.nonzero(place >= 0)
    shape = (len(values), int(place.max(initial=-1)) + 1)
    add, empty = (np.add, 0.0) if reduction == "sum" else (np.maximum, -np.inf)
    found = np.full(shape, empty)
    add.at(found, (row, place[row, column]), values[row, column])
    return np.where(np.isneginf(found), 0.0, found) if reduction == "max" else found
