"""Greater-than: which components know that a war "from the year 1732 to the year 17" ends in a later year?

`python -m circuits.greater_than [--model MODEL]`. Known from GPT-2 small (Hanna et al. 2023, arXiv:2305.00586): heads
look from END to the start year (YY), and MLPs of later layers turn what they bring into "every year above it".
"""

from __future__ import annotations

from typing import Any

import pandas as pd

import mechattr as ma
from circuits import steps


def task(model: Any, n: int) -> Any:
    """Year spans; the corrupt prompt starts in the year 01, after which every year comes."""
    return ma.tasks.greater_than(model, n=n, seed=0)


def roles(model: Any, pairs: Any) -> pd.DataFrame:
    """Where the strongest heads look from the end: at the year, or at the century."""
    return steps.looks(model, pairs, ("XX", "YY"))


if __name__ == "__main__":
    steps.main("greater_than", task, roles)
