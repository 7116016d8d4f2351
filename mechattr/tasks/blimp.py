"""BLiMP paradigms with evidence words, read from CSV files."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mechattr.errors import EmptyTaskError, SettingError
from mechattr.tasks.evidence import EvidenceSample

PREFIX, GOOD, BAD, EVIDENCE = "one_prefix_prefix", "one_prefix_word_good", "one_prefix_word_bad", "target"
NOTHING = ("", "NA")
UNLABELLED = "no evidence word is given"
NOT_FOUND = "the evidence word is not in the prefix"
AMBIGUOUS = "the evidence word is in the prefix more than once"
LONG = "a continuation of several words"


@dataclass(frozen=True, slots=True, kw_only=True)
class EvidenceSet:
    """Samples from a file.

    Attributes:
        name: of the paradigm.
        samples: the usable rows, in the order of the file.
        skipped: rows that were left out, counted by reason.
    """

    name: str
    samples: tuple[EvidenceSample, ...]
    skipped: Mapping[str, int]


def blimp_samples(path: str | Path) -> EvidenceSet:
    """The samples of one paradigm.

    The columns are those of the files `blimp_with_targets` of mt-upc/logit-explanations (Ferrando et al. 2023): the
    prefix that both sentences share (`one_prefix_prefix`), the words that come next in the good and in the bad one
    (`one_prefix_word_good`, `one_prefix_word_bad`), and the evidence word, which decides between them (`target`, "NA"
    where none was found). Factors of a sample: `row`, and `last`, whether the evidence is the last word of the prefix,
    where every method that favours the end points at it.

    Args:
        path: of the CSV file.

    Raises:
        SettingError: no such file, or a file without these columns.
        EmptyTaskError: not one row is usable.

    Cost: no forward pass.

    References:
        Warstadt et al. 2020, BLiMP: The Benchmark of Linguistic Minimal Pairs, arXiv:1912.00582.
        Ferrando et al. 2023, Explaining How Transformers Use Context to Build Predictions, arXiv:2305.12535.
    """
    path = Path(path)
    if not path.is_file():
        raise SettingError(f"the paradigm {path}", "no such file", "give the path of a CSV file")
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        missing = [name for name in (PREFIX, GOOD, BAD, EVIDENCE) if name not in (reader.fieldnames or ())]
        if missing:
            raise SettingError(
                f"the paradigm {path.name}", f"no column {missing[0]!r}", "give a file with evidence words"
            )
        rows = list(reader)
    skipped: Counter[str] = Counter()
    samples = []
    for number, row in enumerate(rows):
        words = tuple(row[PREFIX].split())
        places = [i for i, word in enumerate(words) if word == row[EVIDENCE]]
        if row[EVIDENCE] in NOTHING:
            skipped[UNLABELLED] += 1
        elif len(places) != 1:
            skipped[AMBIGUOUS if places else NOT_FOUND] += 1
        elif len(row[GOOD].split()) != 1 or len(row[BAD].split()) != 1:
            skipped[LONG] += 1
        else:
            evidence = (places[0],)
            factors = {"row": number, "last": places[0] == len(words) - 1}
            samples.append(
                EvidenceSample(
                    words=words, target=row[GOOD], foil=row[BAD], evidence=evidence, evidence_plus=evidence,
                    factors=factors,
                )
            )  # fmt: skip
    if not samples:
        reasons = "; ".join(f"{count} × {reason}" for reason, count in skipped.items()) or "no rows"
        raise EmptyTaskError(f"samples of {path.name}", reasons, "give a file with evidence words")
    return EvidenceSet(name=path.stem, samples=tuple(samples), skipped=dict(skipped))
