"""The page about a steering vector: one HTML file that opens offline and carries its figures inside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from mechattr.report.parts import document, fact_table, figure, frame_table

if TYPE_CHECKING:
    from mechattr.report.steering import Steering
    from mechattr.steering.evaluation import SteeringEvaluation

PROMPTS = 4  # whose continuations are shown; the artifact has all
UNITS = (
    "Propensity and effect (the change of it) in nats, kl in nats a token; of written texts, perplexity under the "
    "model as it is, and the shares of pairs of tokens that differ (distinct_2) and of fours that were said before "
    "(repetition). Columns that end in _low and _high are 95 % intervals."
)
HEADINGS = {
    "propensity": "Does it work?",
    "frontier": "At what price?",
    "layers": "In which layer?",
}
CAPTIONS = {
    "propensity": (
        "Propensity is log p(matching answer) − log p(other answer), mean over items with 95 % bootstrap intervals. A "
        "vector that works changes it by more than every random vector of its length does, in either direction."
    ),
    "frontier": (
        "The change of propensity against what else changes: KL from the model as it is on neutral texts. A vector "
        "beats another where it lies above it at the same KL. The knee is the point farthest above the line from the "
        "model as it is to the last point of the frontier; texts with a prompt in front have no KL."
    ),
    "layers": "Each layer of the vector alone, at each multiplier.",
}


def page(
    result: Steering,
    model: str,
    about: str,
    prompts: Sequence[str],
    pictures: Mapping[str, Path],
    key: Mapping[str, Any],
) -> str:
    """The whole page.

    Args:
        result: of `steer`.
        model: its name.
        about: what the vector is.
        prompts: of the items.
        pictures: PNG files by figure name; they are copied into the page.
        key: the settings of the run.
    """
    n = len(result.evaluation.base)
    few = f'<p class="note">Intervals over {n} items are rough.</p>' if n < 20 else ""
    sections = {"The answer": f'<p class="answer">{escape(result.summary)}</p>{few}'}
    sections |= {HEADINGS[name]: figure(path, name, CAPTIONS[name]) for name, path in pictures.items()}
    if result.evaluation.settings["texts"]:
        sections["What it writes"] = _texts(result.evaluation, prompts)
    sections["All numbers"] = f'<p class="note">{UNITS}</p>{frame_table(result.evaluation.to_pandas())}'
    facts = {name: escape(str(value)) for name, value in key.items() if value not in (None, "")}
    sections["Where this comes from"] = fact_table(facts)
    return document(f"Does this vector steer {model}?", f"{about} · {n} items", sections)


def _texts(result: SteeringEvaluation, prompts: Sequence[str]) -> str:
    said = cast(dict[str, list[list[str]]], result.settings["texts"])["vector"]
    parts = []
    for i, prompt in enumerate(list(dict.fromkeys(prompts))[:PROMPTS]):
        item = list(prompts).index(prompt)
        rows = {f"{m:g}": escape(texts[item]) for m, texts in zip(result.multipliers, said, strict=True)}
        parts.append(f"<h3>{i + 1}. {escape(prompt)} …</h3>{fact_table(rows)}")
    return '<p class="note">Continuations under each multiplier, as the likeliest token each time.</p>' + "".join(parts)
