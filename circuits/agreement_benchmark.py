"""Which methods point at the noun that decides the verb? Every decomposition and two gradients, on three models.

`python -m circuits.agreement_benchmark [--n 320] [--model NAME ...] [--out FOLDER] [--quick]` scores the methods on
sentences in which the number of the verb follows from one noun (`ma.tasks.agreement_samples`), prints the tables and
writes them to FOLDER/agreement.md, with the figure agreement.png. The word-level models were trained on such sentences
until they had to use the noun; the bundled model knows them from prose and templates. Where the shared data are found
(MECHATTR_TEST_DATA), models of other words are also asked about a BLiMP paradigm. `--quick` takes few samples and
writes nothing.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import mechattr as ma
from circuits.agreement_methods import METHODS
from mechattr import draw
from mechattr.evaluation.evidence_result import BASELINES, EvidenceScores
from mechattr.evaluation.words import place

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("MECHATTR_TEST_DATA", ROOT.parent / "shared"))
WORD_LEVEL = ("agreement-gpt2", "agreement-llama")
MODELS = (*WORD_LEVEL, "tiny")
PARADIGM = Path("eval/blimp_with_targets/distractor_agreement_relational_noun.csv")
SEED, QUICK = 0, 24
STRATA = {
    "length": "words of the prompt",
    "n_attractors": "attractors",
    "attractor_number": "number of the attractors",
    "number": "number of the subject",
}

INTRODUCTION = """\
Written by `python -m circuits.agreement_benchmark`; what the columns mean stands in
[the agreement benchmark](../../docs/agreement_benchmark.md). Means over the samples that the model gets right, in
brackets 95 % bootstrap intervals over these samples. The last three rows of each table are no methods: *chance* is the
average of random orders, *first words* and *last words* rank the words of the prompt in order and in reverse."""


def main() -> None:
    """Scores, prints and writes."""
    parser = argparse.ArgumentParser(prog="python -m circuits.agreement_benchmark", description=__doc__)
    parser.add_argument("--n", type=int, default=320, help="samples; 320 has every combination once (default)")
    parser.add_argument("--model", nargs="+", default=list(MODELS), help="bundled models, folders or names")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--quick", action="store_true", help="a few samples, nothing is written")
    chosen = parser.parse_args()
    n = QUICK if chosen.quick else chosen.n
    torch.set_num_threads(1)  # these models are small: a second thread is only waited for
    began = time.perf_counter()
    samples = ma.tasks.agreement_samples(n, SEED)
    found = {name: scores(name, samples) for name in chosen.model}
    text = [INTRODUCTION, *(section(name, result, samples) for name, result in found.items())]
    if (SHARED / PARADIGM).is_file():
        text += [paradigm(name, 4 * n if chosen.quick else None) for name in chosen.model if name not in WORD_LEVEL]
    print("\n\n".join(text))
    print(f"\n{time.perf_counter() - began:.0f} s")
    if not chosen.quick:
        chosen.out.mkdir(parents=True, exist_ok=True)
        (chosen.out / "agreement.md").write_text("\n\n".join(["# Agreement benchmark", *text]) + "\n", encoding="utf-8")
        draw.save(figure(found), chosen.out / "agreement.png")


def scores(name: str, samples: Any) -> EvidenceScores:
    """Every method on one model."""
    return ma.evaluation.evidence_benchmark(ma.load(name), samples, METHODS)


def section(name: str, result: EvidenceScores, samples: Any) -> str:
    """The tables of one model."""
    parts = [
        f"## {name}",
        counts(result),
        writers(name, samples),
        table(result),
        f"Which word is first:\n\n{first_places(result)}",
    ]
    parts += [f"PG_1 by {label}:\n\n{strata(result, by)}" for by, label in STRATA.items()]
    return "\n\n".join(parts)


def paradigm(name: str, n: int | None) -> str:
    """The tables of one model on the first n BLiMP sentences, or on all."""
    given = ma.tasks.blimp_samples(SHARED / PARADIGM)
    result = scores(name, given.samples[:n])
    left_out = "; ".join(f"{count} × {reason}" for reason, count in given.skipped.items())
    head = f"## {name}, BLiMP {given.name}\n\nLeft out of the file's 1000 rows: {left_out}."
    parts = [head, counts(result), table(result), f"Which word is first:\n\n{first_places(result)}"]
    return "\n\n".join([*parts, f"PG_1 by {STRATA['length']}:\n\n{strata(result, 'length')}"])


def writers(name: str, samples: Any) -> str:
    """What heads and MLPs write directly to the logit difference, as shares of its mean over all samples."""
    model = ma.load(name)
    placed = place(model, samples)
    found = ma.direct_logit_attribution(model, placed.batch, target=placed.answers, foil=placed.foils)
    components = found.components.to_pandas().groupby("component")["value"].mean()
    kinds = {"heads": r"L\d+H\d+", "MLPs": r"MLP \d+"}
    shares = {kind: components[components.index.str.fullmatch(pattern)].sum() for kind, pattern in kinds.items()}
    listed = ", ".join(f"{kind} {share / components.sum():.0%}" for kind, share in shares.items())
    return f"Written directly to the mean logit difference: {listed}; the rest by embeddings and biases."


def counts(result: EvidenceScores) -> str:
    """How many samples there were, and how many are scored."""
    s: Any = result.settings
    reasons = "".join(f"; {count} × {reason}" for reason, count in s["skipped"].items())
    undefined = result.to_pandas(metrics=("RMA",)).set_index("method")["undefined"]
    without = ", ".join(f"{name} {count}" for name, count in undefined.items() if count)
    nowhere = f" No positive relevance, so no RMA: {without}." if without else ""
    return (
        f"{s['n_given']} samples, {s['n_fit']} fit the tokenizer{reasons}; the model is right on {s['n_right']} of "
        f"them ({result.accuracy:.1%}), which are scored.{nowhere}"
    )


def table(result: EvidenceScores) -> str:
    """Every method and metric."""
    frame = result.to_pandas()
    columns = list(dict.fromkeys(frame["metric"]))
    cells = {(row.method, row.metric): cell(row) for row in frame.itertuples()}
    return markdown(result.methods, columns, cells)


def first_places(result: EvidenceScores) -> str:
    """Shares of the kinds of words that are ranked first."""
    frame = result.first_places()
    cells = {(row, column): f"{frame.loc[row, column]:.2f}" for row in frame.index for column in frame}
    return markdown(frame.index, list(frame), cells)


def strata(result: EvidenceScores, by: str) -> str:
    """PG_1 of every method by stratum."""
    frame = result.to_pandas(by, metrics=("PG_1",))
    sizes = frame.drop_duplicates("stratum").set_index("stratum")["n"]
    heads = {stratum: f"{stratum} (n = {n})" for stratum, n in sizes.items()}
    cells = {(row.method, heads[row.stratum]): cell(row) for row in frame.itertuples()}
    return markdown(result.methods, list(heads.values()), cells)


def cell(row: Any) -> str:
    """A mean with its interval; chance is a number, and has none."""
    if row.n == 0:
        return "–"
    return f"{row.mean:.2f}" + (f" [{row.low:.2f}, {row.high:.2f}]" if row.method != BASELINES[0] else "")


def markdown(rows: Any, columns: list[str], cells: dict[tuple[str, str], str]) -> str:
    """A table with one row a method."""
    lines = [["method", *columns], ["---"] * (len(columns) + 1)]
    lines += [[row, *(cells[row, column] for column in columns)] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def figure(found: dict[str, EvidenceScores]) -> Any:
    """PG_1 of every method, one panel a model; the methods' names stand on the left only."""
    rows = len(METHODS)
    width, height = draw.dots_size(rows)
    made = draw.new_figure(width + 2.3 * (len(found) - 1), height + 0.2)
    with draw.style():
        panels = np.atleast_1d(made.subplots(1, len(found), sharey=True))
    for ax, (name, result) in zip(panels, found.items(), strict=True):
        result.plot("PG_1", ax=ax, title=f"{name}, n = {result.settings['n_right']}", legend=ax is panels[-1])
    return made


if __name__ == "__main__":
    main()
