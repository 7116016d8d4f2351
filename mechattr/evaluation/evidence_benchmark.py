"""Scores methods by whether they point at the words that decide."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechattr.errors import EmptyTaskError, MismatchError, SettingError
from mechattr.evaluation.evidence import METRICS, chance, ranks
from mechattr.evaluation.evidence_result import BASELINES, CHANCE, FIRST, LAST, EvidenceScores
from mechattr.evaluation.words import Placed, Reduction, of_words, place
from mechattr.labelled import Labelled
from mechattr.models.base import Batch, HookedModel
from mechattr.provenance import provenance
from mechattr.tasks.drawing import check_count
from mechattr.tasks.evidence import EvidenceSample

# (model, prompts, targets, foils) -> relevance of each column of the prompts for target minus foil at the last position
Method = Callable[
    [HookedModel, Batch, Int[Tensor, " sample"], Int[Tensor, " sample"]], Float[Tensor, "sample pos"] | Labelled
]


def evidence_benchmark(
    model: HookedModel,
    samples: Sequence[EvidenceSample],
    methods: Mapping[str, Method],
    *,
    phrase: bool = False,
    reduction: Reduction = "sum",
    absolute: bool = False,
    batch_size: int = 32,
) -> EvidenceScores:
    """Measures how well methods point at the words from which a continuation follows.

    1. Samples whose target and foil are one token each are run, and those on which the target has the larger logit are
       kept: where the model is wrong, the evidence explains nothing.
    2. Each method gives the tokens of the prompt relevance for target against foil; a word has the sum of its tokens.
    3. Words are ranked, and the metrics of `mechattr.evaluation.evidence` are taken. Tokens that the tokenizer adds
       take no part, and neither do words that tell the answer as well (`secondary`, and `evidence_plus` without
       `phrase`).

    Args:
        model: a hooked decoder with a tokenizer.
        samples: prompts with known evidence, such as `ma.tasks.agreement_samples(...)`.
        methods: by name, functions of (model, prompts, targets, foils) that return [sample, pos].
        phrase: the evidence is `evidence_plus`.
        reduction: `"sum"` of a word's tokens, or their `"max"`.
        absolute: rank by magnitude, for methods whose sign means nothing.
        batch_size: prompts that a method is given at a time.

    Raises:
        EmptyTaskError: no sample fits the tokenizer, or the model gets none right.
        SettingError: a method with the name of a baseline, or a batch size that is not a positive whole number.
        MismatchError: a method returns another shape than that of the prompts.
        UnknownNameError: no such reduction.

    Cost: 1 forward pass a sample, and what the methods cost for each sample that the model gets right.
    """
    check_count("batch_size", batch_size)
    taken = sorted(set(methods) & set(BASELINES))
    if taken:
        raise SettingError(f"method {taken[0]!r}", "the name of a baseline", "rename the method")
    placed = place(model, samples)
    right = np.flatnonzero(_right(model, placed, batch_size))
    if not right.size:
        found = f"the model prefers the foil on all {len(placed.samples)} samples"
        raise EmptyTaskError(f"evidence of {model.info.name!r}", found, "use samples that the model gets right")
    scored = placed.rows(right.tolist())
    evidence, counted = _marks(scored, phrase)
    relevance = {
        name: of_words(_run(model, scored, name, methods[name], batch_size), scored.word, reduction) for name in methods
    }
    relevance |= dict(zip((FIRST, LAST), _orders(scored), strict=True))
    if absolute:
        relevance = {name: np.abs(values) for name, values in relevance.items()}
    by_chance = chance(counted.sum(1), (evidence & counted).sum(1))
    names = [*methods, CHANCE, FIRST, LAST]
    tensors = {}
    for metric, measure in METRICS.items():
        rows = [by_chance[metric] if name == CHANCE else measure(relevance[name], evidence, counted) for name in names]
        tensors[metric] = Labelled(torch.from_numpy(np.stack(rows)), ("method", "sample"), {"method": names})
    first = np.stack([_first(scored, relevance[name], evidence, counted) for name in relevance])
    tensors["first"] = Labelled(torch.from_numpy(first), ("method", "sample"), {"method": list(relevance)})
    settings: dict[str, Any] = {
        "n_given": len(samples),
        "skipped": dict(placed.skipped),
        "n_fit": len(placed.samples),
        "n_right": len(scored.samples),
        "phrase": phrase,
        "reduction": reduction,
        "absolute": absolute,
        "factors": _factors(scored),
    }
    made = provenance({**asdict(model.info), **model.fingerprint()}, tokens=placed.batch.content)
    return EvidenceScores(tensors, settings=settings, provenance=made)


def _right(model: HookedModel, placed: Placed, batch_size: int) -> np.ndarray:
    """Whether the target has a larger logit than the foil."""
    found = []
    for index in _parts(len(placed.samples), batch_size):
        part = placed.rows(index)
        logits = model.run(part.batch).logits
        last = logits[torch.arange(len(index)), part.batch.columns(-1)]
        answer, foil = last.gather(1, torch.stack([part.answers, part.foils], 1)).T
        found.append(answer > foil)
    return torch.cat(found).cpu().numpy()


def _run(model: HookedModel, placed: Placed, name: str, method: Method, batch_size: int) -> Float[Tensor, "sample pos"]:
    """Relevance of every column, 0 at padding."""
    found = []
    for index in _parts(len(placed.samples), batch_size):
        part = placed.rows(index)
        result = method(model, part.batch, part.answers, part.foils)
        values = result.values if isinstance(result, Labelled) else result
        if values.shape != part.batch.tokens.shape:
            shapes = f"shape {tuple(values.shape)} for prompts of shape {tuple(part.batch.tokens.shape)}"
            raise MismatchError(f"the relevance of method {name!r}", shapes, "return one number a row and column")
        found.append(values.detach().cpu().double())
    return torch.cat(found)


def _parts(n: int, size: int) -> list[list[int]]:
    """The numbers below n in runs of at most `size`."""
    return [list(range(start, min(start + size, n))) for start in range(0, n, size)]


def _marks(placed: Placed, phrase: bool) -> tuple[np.ndarray, np.ndarray]:
    """[sample, word]: which words are evidence, and which count at all."""
    width = max(len(sample.words) for sample in placed.samples)
    evidence = np.zeros((len(placed.samples), width), dtype=bool)
    counted = np.zeros_like(evidence)
    for row, sample in enumerate(placed.samples):
        chosen = sample.evidence_plus or sample.evidence if phrase else sample.evidence
        counted[row, : len(sample.words)] = True
        counted[row, list({*sample.secondary, *sample.evidence_plus} - set(chosen))] = False
        evidence[row, list(chosen)] = True
    return evidence, counted


def _first(placed: Placed, relevance: np.ndarray, evidence: np.ndarray, counted: np.ndarray) -> np.ndarray:
    """Of each sample the kind of the word that is ranked first, as a number of `PLACES`; -1 without a rank."""
    rank = ranks(relevance, evidence, counted)
    found = np.full(len(rank), -1)
    for row in np.flatnonzero(np.isfinite(rank).any(1)):
        top, sample = int(np.nanargmin(rank[row])), placed.samples[row]
        kinds = (evidence[row, top], top in sample.attractors, top == len(sample.words) - 1, True)
        found[row] = kinds.index(True)
    return found


def _orders(placed: Placed) -> tuple[np.ndarray, np.ndarray]:
    """Relevance that falls from the first word on, and relevance that rises to the last."""
    lengths = np.array([[len(sample.words)] for sample in placed.samples])
    place = np.arange(lengths.max())[None]
    first = np.maximum(lengths - place, 0).astype(float)
    return first, np.where(place < lengths, place + 1.0, 0.0)


def _factors(placed: Placed) -> dict[str, list[Any]]:
    """By name, one value a sample; factors that not all samples have are left out."""
    shared = set.intersection(*(set(sample.factors) for sample in placed.samples))
    named = [name for name in placed.samples[0].factors if name in shared]
    lengths = [len(sample.words) for sample in placed.samples]
    return {"length": lengths, **{name: [sample.factors[name] for sample in placed.samples] for name in named}}
