"""Subject-verb agreement: which heads bring the number of the subject to the verb, past a noun that misleads?

`python -m circuits.subject_verb [--model MODEL]`. In "The keys near the cabinet", the verb follows "keys", not
"cabinet" (Linzen et al. 2016, arXiv:1611.01368). The corrupt prompt changes the number of the subject alone.
"""

from __future__ import annotations

from typing import Any

import pandas as pd

import mechattr as ma
from circuits import steps


def task(model: Any, n: int) -> Any:
    """Sentences with one noun between subject and verb."""
    return ma.tasks.subject_verb(model, n=n, seed=0, attractors=1)


def roles(model: Any, pairs: Any) -> pd.DataFrame:
    """How much the strongest heads look from the end at the subject."""
    return steps.looks(model, pairs, ("SUBJECT", "END"))


if __name__ == "__main__":
    steps.main("subject_verb", task, roles)
