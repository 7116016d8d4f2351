"""What steering is built from and judged on: pairs and triples from files, and those of the task generators."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mechattr.errors import SettingError, UnknownNameError, nearest
from mechattr.models.base import HookedModel
from mechattr.tasks.table import make

PAIR, TRIPLE = ("positive", "negative"), ("prompt", "preferred", "dispreferred")
# by task: the factor that tells the two prompts of a pair apart, and its value in texts that show the behaviour
BEHAVIOURS = {"subject_verb": ("number", "plural"), "gendered_pronoun": ("gender", "she")}


@dataclass(frozen=True, slots=True, kw_only=True)
class Contrasts:
    """Texts that show a behaviour beside texts that do not.

    Attributes:
        pairs: (text that shows it, text that does not).
        triples: (prompt, answer that matches the behaviour, answer that does not); none where texts are all there is.
    """

    pairs: tuple[tuple[str, str], ...]
    triples: tuple[tuple[str, str, str], ...] = ()


def behaviour(model: HookedModel, name: str, *, n: int = 24, seed: int = 0, split: str = "train") -> Contrasts:
    """A behaviour of a task generator: plural verbs (`"subject_verb"`) or "she" (`"gendered_pronoun"`).

    Pairs are the two prompts of each pair of the task, the one in front that calls for the behaviour. Triples are both
    prompts with the answer that shows it and the other one, whichever is right: of half of them the model says no.

    Args:
        model: whose tokenizer the texts must fit.
        name: of the task.
        n: number of pairs; there are twice as many triples.
        seed: of the draws.
        split: `"train"` or `"test"`, whose fillers and templates are disjoint.

    Raises:
        UnknownNameError: another name.
        EmptyTaskError: no text fits the tokenizer.
    """
    if name not in BEHAVIOURS:
        raise UnknownNameError(f"the behaviour of task {name!r}", "no such behaviour", nearest(name, BEHAVIOURS))
    task = make(model, name, n=n, seed=seed, split=split)  # type: ignore[arg-type]
    factor, shown = BEHAVIOURS[name]
    pairs, triples = [], []
    for row, factors in enumerate(task.factors):
        prompts = [_text(model, side.tokens[row, side.mask[row]].tolist()) for side in (task.clean, task.corrupt)]
        words = [
            _text(model, [*task.clean.tokens[row, task.clean.mask[row]].tolist(), int(ids[row])]).removeprefix(
                prompts[0]
            )
            for ids in (task.answers, task.foils)
            if ids is not None
        ]
        if factors[factor] != shown:
            prompts, words = prompts[::-1], words[::-1]
        pairs.append((prompts[0], prompts[1]))
        triples += [(prompt, words[0], words[1]) for prompt in prompts]
    return Contrasts(pairs=tuple(pairs), triples=tuple(triples))


def prompts(model: HookedModel, name: str, *, n: int = 32, seed: int = 0, split: str = "test") -> list[str]:
    """The different prompts of a task, as texts in which another behaviour has no part.

    Raises:
        UnknownTaskError: no task has this name.
        EmptyTaskError: no text fits the tokenizer.
    """
    task = make(model, name, n=n, seed=seed, split=split)  # type: ignore[arg-type]
    rows = (task.clean.tokens[row, task.clean.mask[row]].tolist() for row in range(len(task)))
    return list(dict.fromkeys(_text(model, row) for row in rows))


def read_pairs(path: str | os.PathLike[str]) -> Contrasts:
    """Pairs of a JSONL file: one object a line, with the texts `positive` and `negative`.

    Raises:
        SettingError: no such file, no pair in it, or a line that is no such object.
    """
    return Contrasts(pairs=tuple((a, b) for a, b in _rows(Path(path), PAIR)))


def read_triples(path: str | os.PathLike[str]) -> Contrasts:
    """Triples of a JSONL file: one object a line, with the texts `prompt`, `preferred` and `dispreferred`. Answers
    stand right behind their prompts, so that they begin with a space where there is to be one. As pairs, they are the
    prompt with either answer.

    Raises:
        SettingError: no such file, no triple in it, or a line that is no such object.
    """
    triples = tuple((x, a, b) for x, a, b in _rows(Path(path), TRIPLE))
    return Contrasts(pairs=tuple((x + a, x + b) for x, a, b in triples), triples=triples)


def _rows(path: Path, keys: Sequence[str]) -> list[list[str]]:
    """The texts of each line; lines without text are left out."""
    example = "write one object a line: {" + ", ".join(f'"{key}": "..."' for key in keys) + "}"
    if not path.is_file():
        raise SettingError(f"contrasts from {str(path)!r}", "no such file", f"give a JSONL file: {example}")
    rows = []
    for number, raw in enumerate(path.read_bytes().split(b"\n"), start=1):
        try:
            line = raw.decode("utf-8")
            row: Any = json.loads(line) if line.strip() else None
        except ValueError as error:
            kind = "UTF-8" if isinstance(error, UnicodeDecodeError) else "JSON"
            raise SettingError(f"line {number} of {path.name}", f"not {kind} ({error})", example) from error
        if not line.strip():
            continue
        if not isinstance(row, dict) or set(row) != set(keys):
            found = f"the keys {', '.join(row) or '(none)'}" if isinstance(row, dict) else f"a {type(row).__name__}"
            raise SettingError(f"line {number} of {path.name}", found, example)
        wrong = [key for key in keys if not isinstance(row[key], str) or not row[key]]
        if wrong:
            found = f"{wrong[0]}: {row[wrong[0]]!r:.60}"
            raise SettingError(f"line {number} of {path.name}", found, "give texts that are not empty")
        if row[keys[-1]] == row[keys[-2]]:
            found = f"{keys[-2]} and {keys[-1]} are equal: {row[keys[-1]]!r:.60}"
            raise SettingError(f"line {number} of {path.name}", found, "the two texts must differ in the behaviour")
        rows.append([row[key] for key in keys])
    if not rows:
        raise SettingError(f"contrasts from {path.name}", "an empty file", example)
    return rows


def _text(model: HookedModel, tokens: Sequence[int]) -> str:
    return str(model.tokenizer.decode(tokens, skip_special_tokens=True))
