"""Gendered pronouns: which heads bring the gender of the subject to the place of "he" or "she"?

`python -m circuits.gendered_pronoun [--model MODEL]`. The corrupt prompt exchanges the subject for one of the other
gender.
"""

from __future__ import annotations

from typing import Any

import pandas as pd

import mechattr as ma
from circuits import steps


def task(model: Any, n: int) -> Any:
    """Sentences about one person, cut before the pronoun."""
    return ma.tasks.gendered_pronoun(model, n=n, seed=0)


def roles(model: Any, pairs: Any) -> pd.DataFrame:
    """How much the strongest heads look from the end at the subject."""
    return steps.looks(model, pairs, ("SUBJECT", "END"))


if __name__ == "__main__":
    steps.main("gendered_pronoun", task, roles)
