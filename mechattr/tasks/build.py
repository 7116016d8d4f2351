"""From aligned pairs to a `Task`: pad the rows, make the metric, add the span END."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mechattr.errors import AnswerError, EmptyTaskError, UnknownNameError, UnsupportedFeatureError, nearest
from mechattr.models.base import Batch, HookedModel
from mechattr.models.cross import first_token, with_decoder
from mechattr.models.images import RowImages, marked
from mechattr.models.tokenize import pad
from mechattr.tasks import metrics
from mechattr.tasks.align import SEQUENCE, Aligned
from mechattr.tasks.metrics import METRICS, Metric
from mechattr.tasks.task import Task, padded_ids


def metric_name(metric: str | Metric) -> str:
    """The name of a metric that is asked for.

    Raises:
        UnknownNameError: no metric has this name.
    """
    if isinstance(metric, Metric):
        return metric.name
    if metric not in METRICS:
        raise UnknownNameError(f"metric {metric!r}", "no such metric", nearest(metric, METRICS))
    return metric


def build(
    name: str,
    model: HookedModel,
    pairs: Sequence[Aligned],
    *,
    metric: str | Metric,
    settings: Mapping[str, Any],
    skipped: Mapping[str, int] | None = None,
    citation: str = "",
) -> Task:
    """Make the task of some aligned pairs.

    On an encoder-decoder model the prompts are the source, and the decoder has written its first token.

    Under "sequence_log_probability" both prompts are followed by the clean pair's answer without its last token, since
    that is what the metric reads; END stays the last token of the prompt.

    Cost: none, except for "kl_divergence": one forward pass a pair, for the reference distribution.

    Raises:
        EmptyTaskError: no pair.
        AnswerError: the metric compares with a foil and a pair has none.
        UnsupportedFeatureError: a sequence metric on an encoder, which does not predict next tokens; named spans on an
            encoder-decoder model.
    """
    if not pairs:
        raise EmptyTaskError(f"task {name!r}", "no pair", "give at least one pair")
    wanted = metric_name(metric)
    sequence = wanted == SEQUENCE
    if sequence and model.info.encoder:
        raise UnsupportedFeatureError(
            f"metric={SEQUENCE!r} on {model.info.name!r}",
            "an encoder, which predicts no next tokens",
            "use another metric",
        )
    reads = bool(model.info.n_encoder_layers)
    if reads and any(pair.spans for pair in pairs):
        raise UnsupportedFeatureError(
            f"named spans in task {name!r}",
            f"{model.info.name!r} is an encoder-decoder model: spans are its decoder's, and the prompts its source",
            "leave spans out",
        )
    tails = [pair.answer[:-1] if sequence else () for pair in pairs]
    clean, corrupt = (
        with_decoder(batch_of_ids(model, rows), model.tokenizer, first_token(model), tails)
        if reads
        else batch_of_ids(
            model,
            [(*row, *tail) for row, tail in zip(rows, tails, strict=True)],
            [pair.images[side] for pair in pairs],
        )
        for side, rows in enumerate(([pair.clean for pair in pairs], [pair.corrupt for pair in pairs]))
    )
    ends = [1 if reads else len(pair.clean) for pair in pairs]
    answers = padded_ids([pair.answer for pair in pairs])
    foils = padded_ids([pair.foil for pair in pairs]) if all(pair.foil for pair in pairs) else None
    return Task(
        name=name,
        clean=clean,
        corrupt=corrupt,
        answers=answers,
        foils=foils,
        metric=metric if isinstance(metric, Metric) else _metric(wanted, model, clean, answers, foils, name),
        spans=tuple({**pair.spans, "END": (end - 1, end)} for pair, end in zip(pairs, ends, strict=True)),
        settings={**settings, "metric": wanted},
        skipped=dict(skipped or {}),
        citation=citation,
        factors=tuple(pair.factors for pair in pairs) if any(pair.factors for pair in pairs) else (),
    )


def batch_of_ids(model: HookedModel, rows: Sequence[Sequence[int]], images: Sequence[RowImages] = ()) -> Batch:
    """Token rows and their images -> padded batch where the model's weights are."""
    batch = pad(rows, model.tokenizer)
    if any(images):
        image = marked(batch.tokens, model.info.image_token)
        batch = Batch.of(batch.tokens, batch.mask, batch.strings, images=images, image=image)
    return batch.to(device_of(model))


def device_of(model: HookedModel) -> torch.device:
    """Where the model takes its tokens: where it says so, else where its weights are."""
    return getattr(model, "device", None) or model.weight("unembed.W_U").device


def _metric(name: str, model: HookedModel, clean: Batch, answers: Tensor, foils: Tensor | None, task: str) -> Metric:
    if name == "kl_divergence":
        return metrics.kl_divergence(_log_probabilities(model, clean))
    if name == "log_probability":
        return metrics.log_probability(answers)
    if name == SEQUENCE:
        return metrics.sequence_log_probability(answers.reshape(len(answers), -1))
    if foils is None:
        raise AnswerError(
            f"metric={name!r} for task {task!r}",
            "a pair without a foil",
            "give every pair a foil, or use metric='log_probability'",
        )
    if name == "logit_difference":
        return metrics.logit_difference(answers, foils)
    return metrics.probability_difference(answers, foils)


def _log_probabilities(model: HookedModel, batch: Batch, batch_size: int = 64) -> Float[Tensor, "batch d_vocab"]:
    """The model's log-probabilities after the last token of each row."""
    parts = []
    for start in range(0, len(batch), batch_size):
        part = batch.rows(range(start, min(start + batch_size, len(batch))))
        parts.append(metrics.final_logits(model.run(part).logits, part).log_softmax(-1))
    return torch.cat(parts).detach()
