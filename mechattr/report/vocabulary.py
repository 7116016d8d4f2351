"""The vocabulary that a model really has, as a folder: what texts can produce, what training reached, and a page."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, cast

from mechattr import draw
from mechattr.models.base import HookedModel
from mechattr.report.folder import claim
from mechattr.report.parts import document, fact_table, figure, frame_table
from mechattr.vocabulary.reach import CATEGORIES
from mechattr.vocabulary.undertrained import REPORTED, UnderTrained, undertrained

RESULT, TABLE, REPORT = "undertrained.safetensors", "tokens.csv", "report.html"
FIGURES = ("indicator.png", "indicator.svg")
SHOWN = 200  # rows in the page; the CSV has all


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """What `vocabulary` found.

    Attributes:
        found: every token with its category, indicator and probability.
        report_path: the page, where a folder was given.
    """

    found: UnderTrained
    report_path: Path | None

    @property
    def summary(self) -> str:
        """Categories, and how many candidates are not repeated."""
        counts = self.found.counts
        parts = [f"{sum(counts.values())} ids: " + ", ".join(f"{n} {name}" for name, n in counts.items())]
        frame = self.found.to_pandas()
        asked = frame[frame["id"].isin(self.found.candidates())]["probability"].dropna()
        if len(asked):
            low = int((asked < REPORTED).sum())
            parts.append(f"{low} of {len(asked)} candidates stay below {REPORTED:g} when the model is to repeat them")
            control = self.found.control()
            failed = int((self.found.tensors["probability"].values[control] < REPORTED).sum())
            parts.append(f"of {len(control)} tokens of highest indicator {failed} do")
            if failed > len(control) / 2:
                parts.append("this model does not repeat tokens that it knows, so that repetition says little here")
        place = self.found.calibration
        if place:
            parts.append(
                f"{int(place['no_higher'])} reachable tokens lie no higher than the {int(place['known'])} ids known to "
                "be unused"
            )
        return "; ".join(parts) + "."


def vocabulary(
    model: HookedModel,
    *,
    out: Path | str | None = None,
    by: str | None = None,
    unused: Sequence[int] | None = None,
    share: float = 0.02,
    verify: bool = True,
    shots: Sequence[int] = (0, 5, 20),
    batch_size: int = 64,
    overwrite: bool = False,
    progress: bool | None = None,
) -> Vocabulary:
    """Finds what texts cannot produce and what training did not reach, and writes a page about it.

    Args:
        model: a hooked model with a tokenizer.
        out: folder of the page, the table, the figure and the artifact; nothing is written without it.
        by, unused, share, verify, shots, batch_size, progress: see `mechattr.vocabulary.undertrained`.
        overwrite: replace the result of other settings.

    Raises:
        OutputExistsError: `out` holds the result of other settings.
        SettingError: as `undertrained`.

    Cost:
        As `undertrained`.
    """
    asked: dict[str, Any] = {"by": by, "unused": None if unused is None else list(unused), "share": share}
    asked |= {"verify": verify, "shots": list(shots)}
    folder = None if out is None else Path(out)
    if folder is not None:
        owned = (RESULT, TABLE, REPORT, *FIGURES)
        claim(folder, {**model.fingerprint(), **asked}, owned, overwrite=overwrite)
    if folder is not None and (folder / RESULT).exists():
        found = UnderTrained.load(folder / RESULT)
    else:
        found = undertrained(model, **asked, batch_size=batch_size, progress=progress)
    if folder is None:
        return Vocabulary(found=found, report_path=None)
    if not (folder / RESULT).exists():
        found.save(folder / RESULT)
    found.to_pandas(reachable=False).to_csv(folder / TABLE, index=False, quoting=csv.QUOTE_NONNUMERIC)
    for name in FIGURES:
        draw.save(cast(Any, found.plot().figure), folder / name)
    result = Vocabulary(found=found, report_path=folder / REPORT)
    (folder / REPORT).write_text(_page(result, model.info.name, folder / FIGURES[0]), encoding="utf-8")
    return result


def _page(result: Vocabulary, model: str, picture: Path) -> str:
    found = result.found
    counts = {name: f"{n:,}: {escape(CATEGORIES[name])}" for name, n in found.counts.items()}
    frame = found.to_pandas()
    frame["text"] = [repr(text) for text in frame["text"]]
    unreached = found.to_pandas(reachable=False)
    unreached = unreached[~unreached["category"].isin(("ok", "special", "missing"))].sort_values("id")
    unreached["text"] = [repr(text) for text in unreached["text"]]
    caption = (
        "Each candidate by its indicator and the largest probability that it gets when the model is asked to repeat "
        "it, over the histogram of the indicator of all tokens."
    )
    more = f"The {min(SHOWN, len(frame))} lowest of {len(frame)} reachable tokens; {TABLE} has all."
    sections = {
        "The answer": f'<p class="answer">{escape(result.summary)}</p>',
        "Can a text produce it?": fact_table(counts),
        "Did training reach it?": figure(picture, "probability of a repetition against the indicator", caption),
        "The least trained tokens": f'<p class="note">{more}</p>{frame_table(frame.head(SHOWN))}',
        "Tokens that no text produces by themselves": frame_table(unreached[["id", "text", "category"]].head(SHOWN)),
        "Where this comes from": fact_table(
            {
                "indicator": escape(str(found.settings["indicator"])),
                "weights of input and output": "tied" if found.settings["tied"] else "not tied",
                "ids known to be unused": escape(str(found.settings["unused"])),
                "share asked about": escape(str(found.settings["share"])),
                "model": f"weights {escape(str(found.provenance['weight_hash'])[:12])}",
            }
        ),
    }
    return document(f"Which tokens does {model} really have?", f"{sum(found.counts.values()):,} ids", sections)
