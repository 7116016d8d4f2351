"""The whole analysis of token erasure: from a model and texts to probes, footprint, vocabulary and a page."""

from __future__ import annotations

import csv
import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from mechattr import draw
from mechattr.base import Artifact
from mechattr.erasure.accuracy import Footprint, footprint
from mechattr.erasure.documents import check_layers
from mechattr.erasure.fit import OFFSETS, check_offsets, fit_probes
from mechattr.erasure.gold import agreement_table
from mechattr.erasure.probes import ErasureProbes
from mechattr.erasure.psi import OFFSETS as ASKED
from mechattr.erasure.recipes import Descent, Recipe
from mechattr.erasure.segment import default_layers, layers_between
from mechattr.erasure.vocabulary import WINDOW, ImplicitVocabulary, digest, read_out
from mechattr.erasure.words import words_of
from mechattr.errors import SettingError
from mechattr.models.base import HookedModel
from mechattr.models.record import check_belongs
from mechattr.models.tokenize import decode_token
from mechattr.report.erasing_page import page
from mechattr.report.folder import claim

if TYPE_CHECKING:
    import pandas as pd

PROBES, FOOTPRINT, VOCABULARY = "probes.safetensors", "footprint.safetensors", "vocabulary.safetensors"
REPORT = "report.html"
TRAINING, JOURNAL = "training.safetensors", "segments.jsonl"
TABLES = ("footprint.csv", "vocabulary.csv", "agreement.csv")
FIGURES = ("footprint.png", "footprint.svg")
OWNED = (PROBES, FOOTPRINT, VOCABULARY, REPORT, TRAINING, JOURNAL, *TABLES, *FIGURES)
Stored = TypeVar("Stored", bound=Artifact)


@dataclass(frozen=True, slots=True, kw_only=True)
class Erasure:
    """What `erase` found.

    Attributes:
        footprint, vocabulary: on the documents that were measured on.
        probes: of which both were made.
        agreement: of segments with words of several tokens, beside chance and a merge rule.
        start, end: the layers between which probabilities drop.
        n_fitted, n_measured: documents that probes were fitted on and that were measured on.
        shared: whether they are the same ones, as there was but one document.
        report_path: the page.
    """

    probes: ErasureProbes
    footprint: Footprint
    vocabulary: ImplicitVocabulary
    agreement: pd.DataFrame
    start: int
    end: int
    n_fitted: int
    n_measured: int
    shared: bool
    report_path: Path

    @property
    def summary(self) -> str:
        """What became of the token before, at words of several tokens and of one, with intervals over documents."""
        parts = []
        for group, name in (("multi", "the last tokens of words of several tokens"), ("single", "words of one token")):
            if not self.footprint.tensors["counts"].sel(group=group, offset=-1).values.sum():
                parts.append(f"there are no {name}")
                continue
            lost, low, high = self.footprint.drop(group, -1, self.start, self.end)
            parts.append(
                f"at {name} the probe of the token before loses {100 * lost:.1f} points of accuracy from layer "
                f"{self.start} to {self.end} (95 % over documents: {100 * low:.1f} to {100 * high:.1f})"
            )
        where = "the document that the probes were fitted on: nothing was held out" if self.shared else "held-out texts"
        text = "; ".join(parts)
        return f"{text[0].upper()}{text[1:]}. Measured on {where}; {len(self.vocabulary.to_pandas())} items read out."


def erase(
    model: HookedModel,
    texts: Sequence[str],
    *,
    out: Path | str,
    probes: ErasureProbes | None = None,
    layers: Sequence[int] | None = None,
    offsets: Sequence[int] = OFFSETS,
    recipe: Recipe | None = None,
    held_out: float = 0.25,
    start: int | None = None,
    end: int | None = None,
    longest: int | None = None,
    window: int = WINDOW,
    seed: int = 0,
    batch_size: int = 8,
    overwrite: bool = False,
    progress: bool | None = None,
) -> Erasure:
    """Fits erasure probes on a part of some texts, and measures and segments the rest.

    Writes into `out`: `report.html`, the probes, the footprint and the vocabulary as `.safetensors`, tables as CSV, and
    the figure. The same call goes on where an earlier one stopped.

    Args:
        model: what is looked into.
        texts: one a document.
        out: folder of the results.
        probes: take these, and measure on all texts.
        layers, offsets, recipe: of the probes; see `fit_probes`.
        held_out: share of the documents that is measured on.
        start, end, longest: of the segments; see `segment`.
        window: most tokens of a document.
        seed: of which documents are held out, and of training.
        batch_size: documents of one forward pass.
        overwrite: replace the result of other settings.
        progress: `None` shows bars on a terminal only.

    Raises:
        OutputExistsError: `out` holds the result of other settings.
        MismatchError: probes of another model or tokenizer.
        SettingError: as `fit_probes` and `segment`; layers without those of the segments.

    Cost:
        1 forward pass a fitted document and epoch, 2 a measured one, and what `fit_probes` states.
    """
    folder, texts = Path(out), list(texts)
    recipe = Descent() if recipe is None else recipe
    fitted, fresh = _split(texts, held_out, seed) if probes is None else ([], list(range(len(texts))))
    if probes is None:
        chosen = check_layers(model, layers)
        between = default_layers(model, start, end)
        check_offsets(offsets)
        _has("layers", chosen, between)
        _has("offsets", tuple(offsets), ASKED)
    else:
        check_belongs(probes, model)
        chosen, between = probes.layers, layers_between(model, probes, start, end)
    key: dict[str, Any] = {
        **model.fingerprint(),
        "texts": hashlib.sha256("\0".join(texts).encode()).hexdigest(),
        "probes": None if probes is None else digest(probes, probes.layers),
        "layers": list(chosen),
        "offsets": list(offsets) if probes is None else list(probes.offsets),
        "recipe": type(recipe).__name__,
        **asdict(recipe),
        "held_out": held_out,
        "start": between[0],
        "end": between[1],
        "longest": longest,
        "window": window,
        "seed": seed,
    }
    claim(folder, key, OWNED, overwrite=overwrite)
    common: dict[str, Any] = {"window": window, "batch_size": batch_size, "progress": progress}
    some = [texts[i] for i in fresh]

    def fit() -> ErasureProbes:
        return fit_probes(
            model, [texts[i] for i in fitted], layers=chosen, offsets=offsets, recipe=recipe, held_out=0.0, seed=seed,
            resume=folder / TRAINING, **common,
        )  # fmt: skip

    def read() -> ImplicitVocabulary:
        a, b = between
        return read_out(
            model, some, probes=found, start=a, end=b, longest=longest, resume=folder / JOURNAL, **common
        )  # fmt: skip

    found = _step(folder / PROBES, ErasureProbes, fit if probes is None else lambda: probes)
    right = _step(folder / FOOTPRINT, Footprint, lambda: footprint(model, some, probes=found, **common))
    read_words = _step(folder / VOCABULARY, ImplicitVocabulary, read)
    for name in (TRAINING, JOURNAL):
        (folder / name).unlink(missing_ok=True)
    parts = [words_of(model, text, window=window) for text in some]
    strings = [[decode_token(model.tokenizer, token) for token in part.tokens] for part in parts]
    segments = read_words.segments()
    gold = agreement_table([[(p, q) for p, q, _ in one] for one in segments], [part.multi for part in parts], strings)
    result = Erasure(
        probes=found,
        footprint=right,
        vocabulary=read_words,
        agreement=gold,
        start=between[0],
        end=between[1],
        n_fitted=len(fitted),
        n_measured=len(fresh),
        shared=fitted == fresh,
        report_path=folder / REPORT,
    )
    for name, table in zip(TABLES, (right.to_pandas(), read_words.to_pandas().drop(columns="ids"), gold), strict=True):
        table.to_csv(folder / name, index=False, quoting=csv.QUOTE_NONNUMERIC)
    for name in FIGURES:
        draw.save(cast(Any, right.plot().figure), folder / name)
    result.report_path.write_text(page(result, model.info.name, strings, folder / FIGURES[0], key), encoding="utf-8")
    return result


def _split(texts: Sequence[str], held_out: float, seed: int) -> tuple[list[int], list[int]]:
    """Documents to fit on and to measure on, at least one each; one document has to be both."""
    if not 0 < held_out < 1:
        raise SettingError(f"held_out={held_out!r}", "no share", "give a share of the documents between 0 and 1")
    order = list(range(len(texts)))
    if len(order) < 2:
        return order, order
    random.Random(seed).shuffle(order)
    n = min(max(1, round(held_out * len(order))), len(order) - 1)
    return sorted(order[n:]), sorted(order[:n])


def _has(name: str, given: Sequence[int], wanted: Sequence[int]) -> None:
    missing = sorted(set(wanted) - set(given))
    if missing:
        asked, found = f"segments without probes of {name[:-1]} {missing[0]}", f"{name} {tuple(given)}"
        raise SettingError(asked, found, f"add {', '.join(map(str, missing))} to the {name}")


def _step(path: Path, kind: type[Stored], make: Callable[[], Stored]) -> Stored:
    """A result from the folder, or made now and saved there."""
    if not path.exists():
        make().save(path)
    return kind.load(path)
