"""TruthfulQA: its file of questions."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Mapping
from io import StringIO
from pathlib import Path

from mechattr.errors import SettingError
from mechattr.steering.choices import Question

BEST, CORRECT, INCORRECT = "Best Answer", "Correct Answers", "Incorrect Answers"
COLUMNS = ("Category", "Question", BEST, CORRECT, INCORRECT)


def truthfulqa(path: str | os.PathLike[str]) -> list[Question]:
    """The questions of `TruthfulQA.csv`, for `multiple_choice`.

    As in the published evaluation, answers are divided at semicolons and end with a full stop. An answer that a
    question lists twice counts once; one that it lists as right and as wrong stays on both sides.

    Args:
        path: the file, UTF-8, with columns `Category`, `Question`, `Best Answer`, `Correct Answers`, `Incorrect
            Answers`.

    Raises:
        SettingError: no such file, one that is not UTF-8, a column that is missing, or a line without question or
            answers, or whose best answer is not among the correct ones; with the number of the line.

    References:
        Lin, Hilton, Evans (2022), TruthfulQA: Measuring How Models Mimic Human Falsehoods, arXiv 2109.07958.
    """
    file = Path(path)
    if not file.is_file():
        raise SettingError(f"questions from {str(path)!r}", "no such file", "give the file TruthfulQA.csv")
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SettingError(f"{file.name} as UTF-8", str(error), "save the file as UTF-8") from error
    try:
        questions = [_question(fields, f"line {line} of {file.name}") for line, fields in _records(text, file.name)]
    except csv.Error as error:
        raise SettingError(f"{file.name} as CSV", str(error), "close the quotation marks of each field") from error
    if not questions:
        raise SettingError(f"questions from {file.name}", "no line behind the header", "give at least one question")
    return questions


def _records(text: str, name: str) -> Iterator[tuple[int, Mapping[str, str]]]:
    """Each record with the number of its first line."""
    reader = csv.reader(StringIO(text, newline=""))
    header = next(reader, [])
    missing = [column for column in COLUMNS if column not in header]
    if missing:
        raise SettingError(f"columns of {name}", f"no {', '.join(missing)}", f"give {', '.join(COLUMNS)}")
    line = reader.line_num + 1
    for row in reader:
        if row and len(row) != len(header):
            found = f"{len(row)} fields, {len(header)} in the header"
            raise SettingError(f"line {line} of {name}", found, "put fields with commas in quotation marks")
        if row:
            yield line, dict(zip(header, row, strict=True))
        line = reader.line_num + 1


def _question(fields: Mapping[str, str], where: str) -> Question:
    correct, incorrect = (
        tuple(dict.fromkeys(_closed(part) for part in fields[column].split(";") if part.strip()))
        for column in (CORRECT, INCORRECT)
    )
    for column, found in ((CORRECT, correct), (INCORRECT, incorrect), ("Question", fields["Question"].strip())):
        if not found:
            raise SettingError(where, f"nothing under {column}", "fill the field, or leave the line out")
    best = _closed(fields[BEST]) if fields[BEST].strip() else ""
    if best not in correct:
        fix = "let the best answer be one of the correct ones"
        raise SettingError(where, f"best answer {fields[BEST]!r:.60} is not one of {len(correct)}", fix)
    return Question(
        fields["Question"].strip(), correct, incorrect, correct.index(best), category=fields["Category"].strip()
    )


def _closed(text: str) -> str:
    text = text.strip()
    return text if text.endswith(".") else text + "."
