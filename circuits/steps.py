"""What the analyses of this folder share: their command line, the steps from task to report, and where heads look."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

import mechattr as ma


def main(name: str, make: Callable[..., Any], roles: Callable[[Any, Any], pd.DataFrame], *, edges: int = 60) -> None:
    """One analysis as a command: task, AtP*, exact check, bound, edges, circuit, faithfulness, report; then the roles
    of the heads.

    Args:
        name: of the task, and of the report's folder.
        make: the prompt pairs, `make(model, n=...)`.
        roles: what the heads do, as a table of `(model, task)`.
        edges: how many edges the circuit has.
    """
    parser = argparse.ArgumentParser(prog=f"python -m circuits.{name}", description=make.__doc__)
    parser.add_argument("--model", default="tiny", help="bundled model, folder or name (default: tiny)")
    parser.add_argument("--n", type=int, default=24, help="prompt pairs (default: 24)")
    parser.add_argument("--bound", type=int, default=3000, help="forward passes spent on the bound; 0: none")
    parser.add_argument("--edges", type=int, default=edges, help=f"edges of the circuit (default: {edges})")
    parser.add_argument("--out", type=Path, default=None, help=f"folder of the report (default: out/circuits/{name})")
    chosen = parser.parse_args()
    model = ma.load(chosen.model)
    task = make(model, n=chosen.n)
    print(f"{task}: accuracy {ma.accuracy(model, task):.2f}\n")
    out = chosen.out or Path("out/circuits") / name
    found = ma.report.localise(
        model, task, out=out, bound=chosen.bound, circuit=chosen.edges, positions=None, overwrite=True
    )
    print(f"{found.summary}\n{found.results.faithfulness.summary}\n")
    print(roles(model, task).round(3).to_string(index=False, na_rep=""))
    print(f"\nReport: {found.report_path}")


def looks(model: Any, task: Any, spans: Sequence[str], *, top: int = 10) -> pd.DataFrame:
    """The heads with the largest exact effect at END, all templates together, and how much each attends from there to
    the named spans."""
    estimate = ma.attribution_patching(model, task, sites="z", positions="named", progress=False)
    nodes = [node for node in estimate.top(4 * top) if node.pos == "END"][:top]
    exact = ma.activation_patching(model, task, nodes=nodes, progress=False)
    patterns = model.run(task.clean, record="pattern").activations
    end = task.clean.columns(-1)
    offset = end - task.clean.lengths + 1  # columns before the first real token
    rows = []
    for node in exact.top(top):
        pattern = patterns["pattern", node.layer].values[:, node.head]
        row: dict[str, Any] = {"head": f"L{node.layer}H{node.head}", "contribution": exact.value(node, "contribution")}
        for span in spans:
            where = [
                pattern[i, end[i], int(offset[i]) + start : int(offset[i]) + stop].sum()
                for i, (start, stop) in enumerate(named[span] for named in task.spans)
            ]
            row[f"END→{span}"] = float(sum(where) / len(where))
        rows.append(row)
    return pd.DataFrame(rows)
