"""Induction: a block of random tokens is repeated, so the next token can be looked up in its first copy."""

from __future__ import annotations

from typing import Any

from mechattr.errors import SettingError
from mechattr.models.base import HookedModel
from mechattr.tasks.align import Aligned
from mechattr.tasks.build import build
from mechattr.tasks.drawing import check_count, check_split, require_decoder, stream
from mechattr.tasks.metrics import Metric
from mechattr.tasks.pairtext import Split
from mechattr.tasks.task import Task

CITATION = "Olsson et al. 2022, In-context Learning and Induction Heads, arXiv:2209.11895"


def induction(
    model: HookedModel,
    *,
    n: int,
    seed: int = 0,
    split: Split = "test",
    block: int = 12,
    metric: str | Metric = "logit_difference",
) -> Task:
    """Induction on repeated random tokens: $r_1 \\ldots r_b\\, r_1 \\ldots r_j$ -> $r_{j+1}$, with $j = b / 2$.

    The tokens of a block are drawn without repetition from those that are not special. The corrupt prompt has another
    token, the foil, in place of $r_{j+1}$ in the first copy, so there the foil is right. All prompts have the same
    length. Spans: PREVIOUS ($r_j$ in the first copy), TARGET ($r_{j+1}$ in the first copy), START (the first token of
    the second copy), END ($r_j$ in the second copy).

    Args:
        model: any model that predicts next tokens; it needs no tokenizer.
        n: number of pairs.
        seed: seed of the draws.
        split: "train" or "test": separate random numbers; there is no filler to hold out.
        block: number of tokens of the block, at least 2.
        metric: name of a metric, or a `Metric`.

    Raises:
        SettingError: a block that is too short, or longer than the vocabulary or the context allow.
        UnsupportedFeatureError: the model is an encoder.

    Cost: no forward pass.

    References:
        Olsson et al. 2022, In-context Learning and Induction Heads.
    """
    check_count("n", n)
    check_count("block", block)
    check_split(split)
    require_decoder("induction", model)
    prefix, vocabulary = prefix_ids(model.tokenizer), plain_ids(model)
    half = block // 2
    longest = min(len(vocabulary) - 1, (model.info.n_ctx - len(prefix)) * 2 // 3)
    if not 2 <= block <= longest:
        raise SettingError(
            f"block={block!r}",
            f"a vocabulary of {len(vocabulary)} and {model.info.n_ctx} positions",
            f"use 2 to {longest}",
        )
    rng = stream("induction", {"split": split, "seed": seed})
    start = len(prefix)
    spans = {
        "PREVIOUS": (start + half - 1, start + half),
        "TARGET": (start + half, start + half + 1),
        "START": (start + block, start + block + 1),
    }
    pairs = []
    for _ in range(n):
        *first, foil = rng.sample(vocabulary, block + 1)
        other = [*first[:half], foil, *first[half + 1 :]]
        clean, corrupt = ((*prefix, *copy, *first[:half]) for copy in (first, other))
        pairs.append(Aligned(clean=clean, corrupt=corrupt, answer=(first[half],), foil=(foil,), spans=spans))
    settings = {"task": "induction", "n": n, "seed": seed, "split": split, "block": block}
    return build("induction", model, pairs, metric=metric, settings=settings, citation=CITATION)


def prefix_ids(tokenizer: Any) -> tuple[int, ...]:
    """The special tokens that this tokenizer puts before every text."""
    return () if tokenizer is None else tuple(tokenizer("")["input_ids"])


def plain_ids(model: HookedModel) -> list[int]:
    """The ids of the vocabulary that are not special tokens."""
    if model.tokenizer is None:
        return list(range(model.info.d_vocab))
    special = set(model.tokenizer.all_special_ids)
    return [token for token in range(min(model.info.d_vocab, len(model.tokenizer))) if token not in special]
