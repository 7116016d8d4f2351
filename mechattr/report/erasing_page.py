"""The page of an analysis of token erasure: one HTML file that opens offline and carries its figure inside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mechattr.draw.footprints import segments_html
from mechattr.report.parts import document, fact_table, figure, frame_table

if TYPE_CHECKING:
    from mechattr.report.erasing import Erasure

DOCUMENTS, ITEMS = 8, 40  # shown; the files have all


def page(result: Erasure, model: str, strings: Sequence[Sequence[str]], picture: Path, key: Mapping[str, Any]) -> str:
    """The whole page.

    Args:
        result: of `erase`.
        model: its name.
        strings: the tokens of each document that was measured on.
        picture: the footprint as PNG, which is copied into the page.
        key: the settings of the run.
    """
    sections = {
        "The answer": f'<p class="answer">{escape(result.summary)}</p>{_caution(result)}',
        "What each layer still says of the tokens before": _footprint(picture),
        "Documents in segments": _documents(result, strings),
        "The vocabulary that was read out": _vocabulary(result),
        "Agreement with words of several tokens": _agreement(result),
        "Where this comes from": fact_table({name: escape(str(value)) for name, value in key.items()}),
    }
    about = f"{result.n_fitted} documents fitted on, {result.n_measured} measured on"
    return document(f"What does {model} forget?", about, sections)


def _caution(result: Erasure) -> str:
    notes = []
    if result.shared:
        notes.append(
            "There was one document: the probes were measured on what they were fitted on, and the numbers say nothing "
            "about other texts."
        )
    elif result.n_measured < 10:
        notes.append(f"Intervals over {result.n_measured} documents are rough.")
    return "".join(f'<p class="note">{note}</p>' for note in notes)


def _footprint(picture: Path) -> str:
    caption = (
        "Share of positions at which the probe of a layer names the token at an offset, with 95 % intervals over "
        "documents. Erasure is a fall of offsets below 0 (and of 0) from an early to a later layer in the left panel "
        "that the right panel does not have. footprint.csv has the numbers."
    )
    return figure(picture, "accuracy of each offset by layer", caption)


def _vocabulary(result: Erasure) -> str:
    frame = result.vocabulary.to_pandas().drop(columns="ids")
    often = frame[frame["count"] > 1]
    shown = (often if len(often) else frame).head(ITEMS).copy()
    shown["text"] = [repr(text) for text in shown["text"]]
    about = (
        f"{len(frame)} items of several tokens; those that came more than once, by mean ψ"
        if len(often)
        else f"{len(frame)} items of several tokens, none of them more than once, by ψ"
    )
    return f'<p class="note">{about}; vocabulary.csv has all.</p>{frame_table(shown)}'


def _documents(result: Erasure, strings: Sequence[Sequence[str]]) -> str:
    segments = result.vocabulary.segments()[:DOCUMENTS]
    about = (
        f"The first {len(segments)} measured documents. A box is a segment of several tokens, its ground is ψ: blue "
        "where positive, red where negative, of full colour at the 99th percentile of |ψ| of each document; thin lines "
        "part its tokens, and pointing at it shows ψ."
    )
    shown = "".join(
        f"<h3>Document {i}</h3>{segments_html(tokens, found)}"
        for i, (tokens, found) in enumerate(zip(strings, segments, strict=False), start=1)
    )
    return f'<p class="note">{about}</p>{shown}'


def _agreement(result: Erasure) -> str:
    about = (
        "Segments against the words of these texts that the tokenizer cuts into several tokens: precision and recall "
        "of exact spans and F1 of their boundaries, beside random spans of the same lengths, and beside the rule that "
        "a token without a space belongs to the one before it."
    )
    return f'<p class="note">{about}</p>{frame_table(result.agreement)}'
