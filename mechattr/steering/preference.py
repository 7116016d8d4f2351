"""Preferences: which tokens of a prompt and its answer make a model prefer that answer to another one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechattr.engines.paths import path_gradients
from mechattr.errors import SettingError, UnknownNameError, UnsupportedFeatureError, nearest
from mechattr.models.base import Batch, HookedModel
from mechattr.steering.answers import check_causal, picked_log_probabilities

Triples = Sequence[tuple[Any, ...]]  # (prompt, preferred answer, dispreferred answer), and an image or a list of them
TARGETS = ("sequence", "last_token", "repo")


@dataclass(frozen=True, eq=False, slots=True)
class TokenScores:
    """How much each token adds to the preference log p(preferred | prompt) - log p(dispreferred | prompt).

    Attributes:
        batch: prompts with the preferred answers, then prompts with the dispreferred ones.
        starts: the position of each row's first token of the answer.
        values: of each token, in nats; 0 at padding.
        change: what each row's values sum to, but for the gap: its part of the preference, less that of the baseline.
        gap: the sum minus the change.
        passes: rows of forward and of backward passes.
    """

    batch: Batch
    starts: Int[Tensor, " row"]
    values: Float[Tensor, "row pos"]
    change: Float[Tensor, " row"]
    gap: Float[Tensor, " row"]
    passes: tuple[int, int]

    def __len__(self) -> int:
        return len(self.batch) // 2

    def of(self, triple: int, side: str = "preferred") -> list[tuple[str, float]]:
        """Tokens and scores of one sequence; image tokens are numbered, from the top left of each image.

        Raises:
            UnknownNameError: no such side.
            SettingError: no such triple.
        """
        if side not in ("preferred", "dispreferred"):
            fix = nearest(str(side), ("preferred", "dispreferred"))
            raise UnknownNameError(f"side={side!r}", "no such side", fix)
        if triple not in range(len(self)):
            raise SettingError(f"triple {triple}", f"{len(self)} triples", "count from 0")
        row = triple + len(self) * (side == "dispreferred")
        names = list(self.batch.strings[row])
        for n, (first, last) in enumerate(self.batch.image_spans[row]):
            names[first:last] = [f"image {n}, token {i}" for i in range(last - first)]
        return list(zip(names, self.values[row, self.batch.mask[row]].tolist(), strict=True))

    def top(self, k: int, sign: int, allowed: Bool[Tensor, "row pos"]) -> Bool[Tensor, "row pos"]:
        """The k largest scores of each row that have a sign (fewer, where there are fewer), among allowed tokens."""
        scores = (sign * self.values).masked_fill(~allowed, 0.0)
        best = scores.topk(min(k, scores.shape[1]), 1)
        return torch.zeros_like(allowed).scatter(1, best.indices, best.values > 0)


def token_scores(
    model: HookedModel,
    triples: Triples,
    *,
    target: str = "sequence",
    baseline: str | int | Tensor = "mean",
    steps: int = 20,
    rule: str = "gauss_legendre",
    tolerance: float | None = None,
    batch_size: int = 32,
) -> TokenScores:
    """Integrated gradients of a preference, summed over each token's embedding.

    The two sequences of a triple are independent, so the scores of both together sum to the whole preference.

    Args:
        model: a causal language model.
        triples: (prompt, preferred answer, dispreferred answer); an answer stands right behind its prompt, so that it
            begins with a space where there is to be one. In a vision-language model a fourth entry can be the prompt's
            image, or a list of images, for which the text has the processor's image token; see `HookedHF.tokenize`.
        target: `"sequence"`, the log-probability of the whole answer; `"last_token"`, of its last token; or `"repo"`,
            that of the last token behind itself, as published code has it, to be compared with.
        baseline, steps, rule, tolerance, batch_size: of `mechattr.engines.paths.path_gradients`.

    Raises:
        SettingError: triples that do not fit, or settings of the path that cannot be used.
        UnknownNameError: no such target, rule or baseline.
        UnsupportedFeatureError: a model that does not predict next tokens, or images for one that reads none.

    Cost:
        2 `steps` forward and backward passes and 4 forward passes a triple.

    References:
        Nguyen, Prasad, Stengel-Eskin, Bansal (2025), GrAInS, arXiv 2507.18043.
    """
    if target not in TARGETS:
        raise UnknownNameError(f"target={target!r}", "no such target", nearest(str(target), TARGETS))
    batch, starts = sequences(model, triples)
    found = path_gradients(
        model, batch, _Preference(starts, target), baseline=baseline, steps=steps, rule=rule, tolerance=tolerance,
        batch_size=batch_size,
    )  # fmt: skip
    return TokenScores(batch, starts, found.attributions.sum(-1), found.change, found.gap, found.passes)


def sequences(model: HookedModel, triples: Any) -> tuple[Batch, Int[Tensor, " row"]]:
    """Prompts with preferred answers and then with dispreferred ones, and where the answers begin: behind the tokens
    that a sequence shares with its prompt.

    Raises:
        SettingError: no triples, something else than three texts (and images), empty or equal answers, answers without
            tokens, or what `HookedHF.tokenize` refuses of images.
        UnsupportedFeatureError: a model that does not predict next tokens, or images for one that reads none.
    """
    check_causal(model, "log-probabilities of answers")
    given = checked(triples)
    images = [shown for *_, shown in given]
    texts = [*(prompt + liked for prompt, liked, *_ in given), *(prompt + other for prompt, _, other, _ in given)]
    batch = _tokenized(model, texts, images * 2)
    if batch.images:  # both sequences of a triple share theirs
        batch = replace(batch, images=batch.images[: len(given)] * 2)
    prompts = _tokenized(model, [prompt for prompt, *_ in given], images)
    width = min(batch.tokens.shape[1], prompts.tokens.shape[1])
    both = prompts.mask[:, :width].repeat(2, 1) & batch.mask[:, :width]
    same = (prompts.tokens[:, :width].repeat(2, 1) == batch.tokens[:, :width]) & both
    starts = same.long().cumprod(1).sum(1)
    rows = [batch.tokens[i, batch.mask[i]].tolist() for i in range(len(batch))]
    for i in range(len(given)):
        for row in (i, i + len(given)):
            if not 0 < int(starts[row]) < len(rows[row]):
                found = f"{len(rows[row])} tokens, of which {int(starts[row])} are the prompt's"
                raise SettingError(f"triple {i}", found, "prompt and answer need a token each")
        if rows[i] == rows[i + len(given)]:
            raise SettingError(f"triple {i}", "two answers of the same tokens", "answers must differ")
    return batch, starts


@dataclass(frozen=True, eq=False, slots=True)
class _Preference:
    """A row's part of the preference: its answer's log-probability, negative for dispreferred answers."""

    starts: Int[Tensor, " row"]
    target: str

    def __call__(self, logits: Float[Tensor, "row pos d_vocab"], batch: Batch) -> Float[Tensor, " row"]:
        if self.target == "sequence":
            found = answer_log_probabilities(logits, batch, self.starts[batch.example])
        elif self.target == "last_token":
            found = answer_log_probabilities(logits, batch, batch.lengths - 1)
        else:
            rows, last = torch.arange(len(batch), device=batch.device), batch.columns(-1)
            here = logits[rows, last].to(torch.promote_types(logits.dtype, torch.float32))
            found = here[rows, batch.tokens[rows, last]] - here.logsumexp(-1)
        return torch.where(batch.example < len(self.starts) // 2, found, -found)


def answer_log_probabilities(
    logits: Float[Tensor, "row pos d_vocab"], batch: Batch, starts: Int[Tensor, " row"]
) -> Float[Tensor, " row"]:
    """The log-probability of each row's tokens from its position `starts` on, in nats, in float32 or wider."""
    return torch.stack([tokens.sum() for tokens in picked_log_probabilities(logits, batch, starts)])


def checked(triples: Any) -> list[tuple[str, str, str, list[Any]]]:
    """Triples, each with its images.

    Raises:
        SettingError: no triples, or something else than three texts that differ, and images.
    """
    given = list(triples) if isinstance(triples, Iterable) and not isinstance(triples, str) else []
    if not given:
        raise SettingError("triples", "none", "give (prompt, preferred answer, dispreferred answer) triples")
    found = []
    for i, triple in enumerate(given):
        some = isinstance(triple, Sequence) and not isinstance(triple, str) and len(triple) in (3, 4)
        if not some or not all(isinstance(text, str) and text for text in triple[:3]):
            fix = "give three texts that are not empty: (prompt, preferred answer, dispreferred answer)"
            raise SettingError(f"triple {i}", f"{triple!r:.80}", fix)
        if triple[1] == triple[2]:
            raise SettingError(f"triple {i}", f"two equal answers: {triple[1]!r:.60}", "answers must differ")
        shown = triple[3] if len(triple) == 4 else None
        images = [] if shown is None else list(shown) if isinstance(shown, list | tuple) else [shown]
        if any(isinstance(image, str) for image in images):  # a processor would read it as an address
            raise SettingError(
                f"triple {i}", f"a text in place of an image: {images!r:.60}", "give PIL images, or arrays"
            )
        found.append((*triple[:3], images))
    return found


def _tokenized(model: HookedModel, texts: Sequence[str], images: Sequence[list[Any]]) -> Batch:
    if not any(images):
        return model.tokenize(texts)
    if model.info.image_token is None:
        fix = "load a vision-language model, or leave the images out"
        raise UnsupportedFeatureError("triples with images", f"{model.info.name!r} reads no images", fix)
    tokenize: Any = model.tokenize  # with `images`, where the model has an image token
    batch: Batch = tokenize(texts, images=images)
    return batch
