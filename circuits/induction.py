"""Induction: after a repeated block of random tokens, which heads look at the token after the previous occurrence?

`python -m circuits.induction [--model MODEL]` writes the report and prints, for each head, how much it attends to the
previous token and to the token after the last occurrence, and the measured effect of that head on predicting the
repeated token. Known from larger models (Olsson et al. 2022, In-context Learning and Induction Heads): induction heads
in later layers read what previous-token heads in earlier layers wrote.

The last columns follow the strongest heads: where does each look from the end, and which earlier head brought the
target there? In the bundled model the attention scores are low and the effects large: its first layer brings each pair
of neighbouring tokens to one later position, and second-layer heads find that position by its content. A search for the
usual attention pattern would miss these heads; patching does not.
"""

from __future__ import annotations

from typing import Any

import pandas as pd

import mechattr as ma
from circuits import steps


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


def relays(model: Any, task: Any, heads: list[str]) -> pd.DataFrame:
    """For each head: where it looks from the end, and the earlier head that looks at the target from there."""
    patterns = model.run(task.clean, record="pattern").activations
    mean = [patterns["pattern", layer].values.mean(0) for layer in range(model.info.n_layers)]  # [head, query, key]
    (end, _), (target, _) = (task.spans[0][name] for name in ("END", "TARGET"))
    rows = []
    for head in heads:
        layer, index = (int(part) for part in head[1:].split("H"))
        seen = mean[layer][index, end]
        key = int(seen.argmax())
        row: dict[str, Any] = {"head": head, "looks at": key, "weight": float(seen[key])}
        below = [(float(mean[i][h, key, target]), f"L{i}H{h}") for i in range(layer) for h in range(model.info.n_heads)]
        if below:
            row["target brought there by"], row["its weight"] = max(below)[::-1]
        rows.append(row)
    return pd.DataFrame(rows)


def task(model: Any, n: int) -> Any:
    """A block of random tokens, other tokens, and the block again; the corrupt prompt has another token at TARGET."""
    return ma.tasks.induction(model, n=n, seed=0)


def roles(model: Any, pairs: Any) -> pd.DataFrame:
    """Both tables, joined by head."""
    scores = head_scores(model, pairs).head(12)
    return scores.merge(relays(model, pairs, list(scores["head"])), on="head")


if __name__ == "__main__":
    steps.main("induction", task, roles)
