"""Indirect object identification: which heads move the right name to the end of "When A and B ..., B gave ... to"?

`python -m circuits.ioi [MODEL]` prints the heads with the largest effect at the task's named spans, and where each
looks from the end of the sentence. Known from GPT-2 small (Wang et al. 2022, arXiv:2211.00593): name movers attend from
END to the indirect object, S-inhibition heads from END to the second subject, duplicate-token heads from the second
subject to the first.
"""

from __future__ import annotations

import sys
from typing import Any

import pandas as pd

import mechattr as ma


def head_roles(model: Any, task: Any, top: int = 12) -> pd.DataFrame:
    """One row for each of the strongest (head, span): its effect, estimated and exact, and where it looks from END."""
    estimate = ma.attribution_patching(model, task, sites="z", positions="named", progress=False)
    nodes = estimate.top(top)
    exact = ma.activation_patching(model, task, nodes=nodes, progress=False)
    patterns = model.run(task.clean, record="pattern").activations
    end = task.clean.columns(-1)
    rows = []
    for node in nodes:
        pattern = patterns["pattern", node.layer].values[:, node.head]
        row: dict[str, Any] = {
            "head": f"L{node.layer}H{node.head}",
            "at": node.pos,
            "estimate": estimate.value(node, "signed"),
            "exact": exact.value(node, "signed"),
        }
        for name in ("IO", "S1", "S2"):
            keys = [spans[name][0] for spans in task.spans]
            look = [float(pattern[i, end[i], key]) for i, key in enumerate(keys)]
            row[f"END→{name}"] = sum(look) / len(look)
        rows.append(row)
    return pd.DataFrame(rows).sort_values("exact", key=abs, ascending=False, ignore_index=True)


def main(name: str = "tiny") -> None:
    """Prints the table for a model."""
    model = ma.load(name)
    task = ma.tasks.ioi(model, n=32, seed=0)
    print(f"{task}: accuracy {ma.accuracy(model, task):.2f}")
    print(head_roles(model, task).round(3).to_string(index=False))


if __name__ == "__main__":
    main(*sys.argv[1:2])
