"""Induction: after a repeated block of random tokens, which heads look at the token after the previous occurrence?

`python -m circuits.induction [MODEL]` prints, for each head, how much it attends to the previous token and to the token
after the last occurrence, and the measured effect of that head on predicting the repeated token. Known from larger
models (Olsson et al. 2022, In-context Learning and Induction Heads): induction heads in later layers read what
previous-token heads in earlier layers wrote.
"""

from __future__ import annotations

import sys
from typing import Any

import pandas as pd

import mechattr as ma


def head_scores(model: Any, task: Any) -> pd.DataFrame:
    """One row a head: mean attention to the previous token and to the induction target, and the effect of patching it.

    The induction target of a query in the second copy is the token after the query's first occurrence.
    """
    run = model.run(task.clean, record="pattern")
    exact = ma.activation_patching(model, task, sites="z", positions="all", progress=False)
    (start, _), (end, _), (target, _) = (task.spans[0][name] for name in ("START", "END", "TARGET"))
    queries = range(start, end + 1)
    rows = []
    for layer in range(model.info.n_layers):
        pattern = run.activations["pattern", layer].values.mean(0)  # [head, query, key]
        for head in range(model.info.n_heads):
            look = pattern[head]
            effect = exact.signed["z"].sel(layer=layer, head=head).item()
            rows.append(
                {
                    "head": f"L{layer}H{head}",
                    "previous token": float(look.diagonal(-1).mean()),
                    "induction": sum(float(look[q, q - (end - target)]) for q in queries) / len(queries),
                    "effect": effect,
                }
            )
    return pd.DataFrame(rows).sort_values("effect", key=abs, ascending=False, ignore_index=True)


def main(name: str = "tiny") -> None:
    """Prints the table for a model."""
    model = ma.load(name)
    task = ma.tasks.induction(model, n=32, seed=0)
    print(f"{task}: accuracy {ma.accuracy(model, task):.2f} of pairs prefer the repeated token to the foil")
    print(head_scores(model, task).head(12).round(3).to_string(index=False))


if __name__ == "__main__":
    main(*sys.argv[1:2])
