"""`from_pairs`: tasks from the user's own prompt pairs, as Python dicts or as a JSONL file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mechattr.errors import (
    EmptyTaskError,
    SettingError,
    UnknownNameError,
    UnknownTaskError,
    UnsupportedFeatureError,
    nearest,
)
from mechattr.models.base import HookedModel
from mechattr.models.images import RowImages, spans_of
from mechattr.tasks.align import Aligned, align, align_ids
from mechattr.tasks.build import build, metric_name
from mechattr.tasks.metrics import Metric
from mechattr.tasks.misfits import Misfit
from mechattr.tasks.pairtext import Answer, PairText, Span, members
from mechattr.tasks.task import Task

KEYS = ("clean", "corrupt", "clean_tokens", "corrupt_tokens", "answer", "foil", "spans", "corrupt_spans")
IMAGES = ("clean_image", "corrupt_image")


def from_pairs(
    model: HookedModel,
    pairs: Sequence[Mapping[str, Any]] | str | Path,
    *,
    metric: str | Metric = "logit_difference",
    name: str = "pairs",
) -> Task:
    """A task from your own prompt pairs.

    Each pair is a mapping with these keys (a JSONL file has one such object a line):

    - `clean`, `corrupt`: the two prompts as text, or `clean_tokens`, `corrupt_tokens`: as lists of token ids, which are
      used as they are. Both must have the same number of tokens.
    - `answer`, `foil`: text that continues the clean prompt (a new word needs its leading space), or a token id; under
      "probability_difference" also a list of these; under "sequence_log_probability" text of several tokens or a list
      of ids. The foil may be left out where the metric needs none.
    - `spans` (optional): name -> [start, end), in characters of the clean prompt, or positions beside `clean_tokens`;
      `corrupt_spans` (optional): the same names in the corrupt text, to check that they fall on the same positions.
    - `clean_image`, `corrupt_image` (both or neither): the image of each prompt, or a list of images, for the processor
      of a vision-language model; the text says where they stand, as in `HookedHF.tokenize`. Spans are then positions,
      and a prompt's single run of image tokens is the span "image". Beside `clean_tokens`: the processor's tensors.

    Args:
        model: whose tokenizer is used.
        pairs: the pairs, or the path of a JSONL file.
        metric: "logit_difference", "log_probability", "sequence_log_probability", "probability_difference",
            "kl_divergence", or a `Metric` of your own.
        name: what the task is called in results.

    Raises:
        EmptyTaskError: no pair.
        AlignmentError: prompts of unequal token length, or a span that cuts a token.
        AnswerError: an answer that is not one token, merges with the prompt, or equals its foil.
        SettingError: a pair with missing or unusable values.
        UnknownNameError: an unknown key or metric.
        UnknownTaskError: the file does not exist.
        UnsupportedFeatureError: images for a model that reads none.
    """
    wanted = metric_name(metric)
    rows = _read(Path(pairs)) if isinstance(pairs, str | Path) else list(pairs)
    if not rows:
        raise EmptyTaskError("a task from pairs", "no pair", "give at least one pair")
    labels = [f"pair {i}" for i in range(len(rows))]
    for row, label in zip(rows, labels, strict=True):
        _check_keys(row, label)
    plain = [i for i, row in enumerate(rows) if "clean" in row and IMAGES[0] not in row]
    texts = {i: _text_pair(rows[i], labels[i]) for i in plain}
    fitted = align(model, list(texts.values()), metric=wanted, labels=[labels[i] for i in texts]) if texts else []
    of_text = dict(zip(texts, fitted, strict=True))
    aligned = []
    for i, (row, label) in enumerate(zip(rows, labels, strict=True)):
        pair = of_text[i] if i in of_text else _token_pair(model, row, label, wanted)
        if isinstance(pair, Misfit):
            raise pair.error
        aligned.append(pair)
    return build(name, model, aligned, metric=metric, settings={"task": name, "n": len(rows)})


def _read(path: Path) -> list[Any]:
    if not path.is_file():
        raise UnknownTaskError(f"pairs file {str(path)!r}", "no such file", "give a JSONL file with one pair a line")
    rows = []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # splitlines would also cut at U+2028 within a text
    except UnicodeDecodeError as error:
        raise SettingError(f"pairs file {str(path)!r}", f"not UTF-8 text ({error})", "save it as UTF-8") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise SettingError(
                f"line {number} of pairs file {str(path)!r}",
                f"not JSON ({error})",
                'write one object a line: {"clean": ..., "corrupt": ..., "answer": ..., "foil": ...}',
            ) from error
    return rows


def _check_keys(row: Any, label: str) -> None:
    if not isinstance(row, Mapping):
        raise SettingError(label, f"a {type(row).__name__}", f"give a mapping with keys of {', '.join(KEYS)}")
    for key in row:
        if key not in (*KEYS, *IMAGES):
            raise UnknownNameError(f"{label}: key {key!r}", "no such key", nearest(str(key), (*KEYS, *IMAGES)))
    if (IMAGES[0] in row) != (IMAGES[1] in row):
        raise SettingError(label, "an image for one of its two prompts", f"give {IMAGES[0]} and {IMAGES[1]}")
    text, tokens = ({key, other} <= row.keys() for key, other in (KEYS[:2], KEYS[2:4]))
    if text == tokens or "answer" not in row:
        raise SettingError(
            label,
            f"the keys {', '.join(row) or '(none)'}",
            "give clean and corrupt, or clean_tokens and corrupt_tokens, and an answer",
        )
    for keys, kind, wanted in ((KEYS[:2], str, "text"), (KEYS[2:4], list | tuple, "a list of token ids")):
        for key in keys:
            if key in row and not (isinstance(row[key], kind) and len(row[key])):
                raise SettingError(f"{label}: {key}", repr(row[key]), f"give {wanted} that is not empty")


def _text_pair(row: Mapping[str, Any], label: str) -> PairText:
    return PairText(
        clean=row["clean"],
        corrupt=row["corrupt"],
        answer=_answer(row, "answer", label),
        foil=_answer(row, "foil", label),
        spans=_spans(row, "spans", label),
        corrupt_spans=_spans(row, "corrupt_spans", label),
    )


def _token_pair(model: HookedModel, row: Mapping[str, Any], label: str, metric: str) -> Aligned | Misfit:
    row, images = _read_images(model, row, label)
    try:
        pair = align_ids(
            model,
            row["clean_tokens"],
            row["corrupt_tokens"],
            answer=_answer(row, "answer", label),
            foil=_answer(row, "foil", label),
            spans=_spans(row, "spans", label),
            metric=metric,
            label=label,
        )
    except Misfit as misfit:
        return misfit
    return replace(pair, images=images)


def _read_images(
    model: HookedModel, row: Mapping[str, Any], label: str
) -> tuple[Mapping[str, Any], tuple[RowImages, RowImages]]:
    """A pair with images as one of token ids, and the tensors of its images."""
    if IMAGES[0] not in row:
        return row, ({}, {})
    token = model.info.image_token
    if token is None:
        fix = "load a vision-language model, or leave the images out"
        raise UnsupportedFeatureError(f"{label} with images", f"{model.info.name!r} reads no images", fix)
    if "clean" in row:
        tokenize: Any = model.tokenize  # with `images`, where the model has an image token
        batches = [tokenize([row[side]], images=[row[f"{side}_image"]]) for side in ("clean", "corrupt")]
        ids = [batch.tokens[0].tolist() for batch in batches]
        images = tuple(batch.images[0] if batch.images else {} for batch in batches)
    else:
        ids, images = [list(row[key]) for key in KEYS[2:4]], tuple(row[key] for key in IMAGES)
        if not all(isinstance(x, Mapping) for x in images):
            fix = "beside clean_tokens give the tensors that a processor made of each prompt's images"
            raise SettingError(f"{label}: {IMAGES[0]}", "an image that no processor has prepared", fix)
    shown = [torch.tensor([[i == token for i in side]]) for side in ids]
    runs = [spans_of(x, torch.ones_like(x))[0] for x in shown]
    spans = _spans(row, "spans", label)
    if runs[0] == runs[1] and len(runs[0]) == 1:
        spans.setdefault("image", runs[0][0])
    return {**row, "clean_tokens": ids[0], "corrupt_tokens": ids[1], "spans": spans}, (images[0], images[1])


def _answer(row: Mapping[str, Any], kind: str, label: str) -> Answer:
    value = row.get(kind, ())
    if isinstance(value, list):
        value = tuple(value)
    items = members(value)
    if not all(isinstance(item, str | int) and item != "" for item in items) or (kind == "answer" and not items):
        raise SettingError(f"{label}: {kind}", repr(row[kind]), "give text, a token id, or a list of these")
    return value


def _spans(row: Mapping[str, Any], key: str, label: str) -> dict[str, Span]:
    given = row.get(key, {})
    if not isinstance(given, Mapping):
        raise SettingError(f"{label}: {key}", repr(given), "give a mapping from names to [start, end)")
    spans = {}
    for name, span in given.items():
        if not (isinstance(span, list | tuple) and len(span) == 2 and all(isinstance(edge, int) for edge in span)):
            raise SettingError(f"{label}: span {name!r}", repr(span), "give two whole numbers, [start, end)")
        spans[name] = (span[0], span[1])
    return spans
