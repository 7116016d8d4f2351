"""Indirect object identification: which heads move the right name to the end of "When A and B ..., B gave ... to"?

`python -m circuits.ioi [--model MODEL]`. Known from GPT-2 small (Wang et al. 2022, arXiv:2211.00593): duplicate-token
heads look from the second subject (S2) back to the first (S1), S-inhibition heads look from END to S2 and tell the name
movers what not to copy, name movers look from END to the indirect object (IO).

The bundled model has the same: L2H3 and L2H0 look from END to S2, L3H3 and L3H0 from END to IO.
"""

from __future__ import annotations

from typing import Any

import pandas as pd

import mechattr as ma
from circuits import steps


def task(model: Any, n: int) -> Any:
    """Names in both orders; the corrupt prompt has a third name in place of the second subject."""
    return ma.tasks.ioi(model, n=n, seed=0)


def roles(model: Any, pairs: Any) -> pd.DataFrame:
    """Where the strongest heads look from the end: at the name to give, or at the one to avoid."""
    return steps.looks(model, pairs, ("IO", "S1", "S2"))


if __name__ == "__main__":
    steps.main("ioi", task, roles)
