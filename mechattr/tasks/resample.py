"""`resampled`: in-distribution pairs for any model, from texts that it knows.

1. The first `length` tokens of a text are the clean prompt.
2. At `changed` random positions, from left to right, the token is drawn again from the model's own distribution after
   the (already changed) prefix, without the clean token and without special tokens: that is the corrupt prompt.
3. The answer is the most probable next token of the clean prompt, the foil that of the corrupt one; where the two
   agree, the foil is the second most probable token of the clean prompt.

A small model may solve no task that was written for large ones; here it is right by construction (the logit difference
is positive on every clean prompt), and what is localised is where it takes its prediction from.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechattr.errors import EmptyTaskError, SettingError
from mechattr.models.base import Batch, HookedModel
from mechattr.tasks.align import Aligned, require_tokenizer
from mechattr.tasks.build import build, device_of
from mechattr.tasks.drawing import REPEATED, check_count, require_all, require_decoder, stream
from mechattr.tasks.metrics import Metric
from mechattr.tasks.repeated import plain_ids
from mechattr.tasks.task import Task

FIRST = 4  # earlier positions say too little: there, pairs often do not differ in anything that matters
MINIMUM = 8  # prompts tried together when few pairs are missing
TRIES = 10  # tried pairs for each pair that is asked for, before the rest count as impossible
FIXED = "a place where the model leaves no probability for another token"


def resampled(
    model: HookedModel,
    texts: Sequence[str] | Batch,
    *,
    n: int,
    seed: int = 0,
    changed: int = 2,
    length: int = 16,
    metric: str | Metric = "logit_difference",
    batch_size: int = 64,
) -> Task:
    """Pairs from the model's own texts: a few tokens of each prompt are drawn again from the model.

    Every prompt has `length` tokens, so positions are comparable. Each text is used once before any is used again (with
    other positions). Texts that are too short, and places where the model leaves no probability for another token, make
    no pair; both are counted. Spans: CHANGED1 ... (the tokens that differ), END.

    Args:
        model: a model that predicts next tokens.
        texts: texts of its training distribution (a model's own samples will do), or a batch of token ids.
        n: number of pairs.
        seed: seed of the positions and of the draws.
        changed: how many tokens are drawn again, from position 4 up to the one before the last.
        length: tokens of each prompt, with the special ones that the tokenizer puts first.
        metric: name of a metric, or a `Metric`.
        batch_size: prompts a forward pass.

    Raises:
        SettingError: no text, an unusable number, or `changed` tokens that do not fit into `length`.
        UnsupportedFeatureError: the model is an encoder.
        EmptyTaskError: no pair could be made.
        AlignmentError: fewer than `n` pairs could be made.

    Cost: `changed` + 2 forward passes for each pair that is tried.
    """
    for name, value in {"n": n, "changed": changed, "length": length, "batch_size": batch_size}.items():
        check_count(name, value)
    require_decoder("resampled", model)
    if FIRST + changed > length - 1:
        raise SettingError(
            f"changed={changed!r} of length={length!r} tokens",
            f"{max(0, length - 1 - FIRST)} positions from {FIRST} to the one before the last",
            "use longer prompts or change fewer tokens",
        )
    prompts, skipped = _prompts(model, texts, length)
    if not prompts:
        raise EmptyTaskError(
            f"{n} pairs of task 'resampled'",
            f"{skipped.total()} texts, none of {length} tokens",
            f"give longer texts, or a length below {length}",
        )
    rng = stream("resampled", {"seed": seed})
    rng.shuffle(prompts)
    pairs: list[Aligned] = []
    seen: set[tuple[tuple[int, ...], tuple[int, ...]]] = set()
    supply, tried = itertools.cycle(prompts), 0
    while len(pairs) < n and tried < TRIES * n:
        rows = list(itertools.islice(supply, min(max(n - len(pairs), MINIMUM), batch_size)))
        tried += len(rows)
        for pair in _make(model, rows, changed, rng):
            if pair is None:
                skipped[FIXED] += 1
            elif (pair.clean, pair.corrupt) in seen:
                skipped[REPEATED] += 1
            else:
                seen.add((pair.clean, pair.corrupt))
                pairs.append(pair)
            if len(pairs) == n:
                break
    require_all("resampled", len(pairs), n, skipped, "give more or other texts, or change more tokens")
    settings = {"task": "resampled", "n": n, "seed": seed, "changed": changed, "length": length}
    return build("resampled", model, pairs, metric=metric, settings=settings, skipped=skipped)


def _prompts(model: HookedModel, texts: Sequence[str] | Batch, length: int) -> tuple[list[list[int]], Counter[str]]:
    """The first `length` tokens of each text that has so many, and how many have not."""
    if not isinstance(texts, Batch):
        require_tokenizer(model)
        if isinstance(texts, str) or not texts:
            raise SettingError("resampled pairs", "no list of texts", "give at least one text, in a list")
        texts = model.tokenize(texts)
    rows = [tokens[real].tolist() for tokens, real in zip(texts.tokens, texts.mask, strict=True)]
    prompts = [row[:length] for row in rows if len(row) >= length]
    short = len(rows) - len(prompts)
    return prompts, Counter({f"a text of fewer than {length} tokens": short} if short else {})


def _make(model: HookedModel, prompts: list[list[int]], changed: int, rng: random.Random) -> list[Aligned | None]:
    """One pair a prompt, or None where no other token can stand."""
    places = range(FIRST, len(prompts[0]) - 1)
    # All draws of one prompt come in a row, so the pairs do not depend on the batch size.
    draws = [(sorted(rng.sample(places, changed)), [rng.random() for _ in range(changed)]) for _ in prompts]
    positions = torch.tensor([at for at, _ in draws])
    quantiles = torch.tensor([quantile for _, quantile in draws], dtype=torch.float64)
    clean = torch.tensor(prompts)
    corrupt, rows = clean.clone(), torch.arange(len(clean))
    possible = torch.ones(len(clean), dtype=torch.bool)
    allowed = torch.zeros(model.info.d_vocab, dtype=torch.bool)
    allowed[plain_ids(model)] = True
    for at, quantile in zip(positions.T, quantiles.T, strict=True):
        p = _logits(model, corrupt)[rows, at - 1].softmax(-1) * allowed
        p[rows, clean[rows, at]] = 0
        possible &= p.sum(-1) > 0
        corrupt[rows, at] = torch.where(possible, _draw(p, quantile), clean[rows, at])
    top = _logits(model, clean)[:, -1].topk(2).indices
    foil = _logits(model, corrupt)[:, -1].argmax(-1)
    foil = torch.where(foil == top[:, 0], top[:, 1], foil)
    return [
        Aligned(
            clean=tuple(clean[i].tolist()),
            corrupt=tuple(corrupt[i].tolist()),
            answer=(int(top[i, 0]),),
            foil=(int(foil[i]),),
            spans={f"CHANGED{k}": (int(at), int(at) + 1) for k, at in enumerate(positions[i], start=1)},
        )
        if possible[i]
        else None
        for i in range(len(clean))
    ]


def _logits(model: HookedModel, tokens: Int[Tensor, "row pos"]) -> Float[Tensor, "row pos d_vocab"]:
    return model.run(Batch.of(tokens.to(device_of(model)))).logits.detach().double().cpu()


def _draw(p: Float[Tensor, "row d_vocab"], quantile: Float[Tensor, " row"]) -> Int[Tensor, " row"]:
    """The token at a quantile of each unnormalised distribution; one of zero probability is never chosen."""
    total = p.cumsum(-1)
    drawn = torch.searchsorted(total, (quantile * total[:, -1])[:, None], right=True)[:, 0]
    return drawn.clamp_max(p.shape[1] - 1)
