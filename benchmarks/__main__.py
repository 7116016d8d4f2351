"""`python -m benchmarks [--smoke] [--only NAME]`: prints the table and writes it to benchmarks/results/."""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm

from benchmarks import (
    attribution,
    edges,
    estimates,
    localising,
    lrp,
    mixing,
    probes,
    recording,
    routes,
    steering,
    steering_peers,
    sweep,
)
from benchmarks.measure import Ratio

RESULTS = Path(__file__).resolve().parent / "results"


def main() -> None:
    """Runs every measurement; `--smoke` runs few rounds of the small shape and writes nothing."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=main.__doc__)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--only", default="", help="measure again what has this in its name; other rows stay")
    chosen = parser.parse_args()
    torch.set_num_threads(2)
    few = 3 if chosen.smoke else None
    jobs: dict[str, Callable[[], list[Ratio]]] = {
        "recording S": lambda: recording.measure("S", few or 41),
        "attribution S": lambda: attribution.measure("S", few or 41),
        "edges S": lambda: attribution.measure_edges("S", few or 21),
        "edges lens": lambda: edges.measure(few or 9),
        "sweep": lambda: sweep.measure(few or 9),
        "probes": lambda: probes.measure(few or 5, 4 if few else probes.DOCUMENTS),
        "recording M": lambda: recording.measure("M", 31),
        "attribution M": lambda: attribution.measure("M", 21),
        "edges M": lambda: attribution.measure_edges("M", 11),
        "mixing S": lambda: mixing.passes("S", few or 21),
        "mixing M": lambda: mixing.passes("M", 9),
        "lrp S": lambda: lrp.measure("S", few or 21),
        "lrp targets S": lambda: lrp.several("S", few or 7),
        "lrp M": lambda: lrp.measure("M", 21),
        "lrp targets M": lambda: lrp.several("M", 3),
        "mixing contributions": lambda: mixing.contributions(5),
        "routes S": lambda: routes.measure("S", few or 21),
        "routes M": lambda: routes.measure("M", 7),
        "steering S": lambda: steering.generating("S", few or 21),
        "steering M": lambda: steering.generating("M", 11),
        "grains S": lambda: steering.fitting("S", 4 if few else steering.PAIRS, few or 5),
        "steering peers": lambda: steering_peers.measure("S", few or 11),
        "steering peers M": lambda: steering_peers.measure("M", 5),
        "localising": lambda: localising.measure(5),
        "memory": localising.memory,
        "estimates": estimates.measure,
    }
    large = ("M", "contributions", "localising", "memory", "estimates")
    wanted = [job for name, job in jobs.items() if chosen.only in name and not (few and name.endswith(large))]
    rows = [row for job in tqdm(wanted, desc="benchmarks") for row in job()]
    Console(width=120).print(_table(rows))
    if not chosen.smoke:
        _write(rows)


def _verdict(row: Ratio) -> str:
    if row.target is None:
        return ""
    return ("met" if row.met else "missed") + f" ({'at most' if row.at_most else 'at least'} {row.target:g})"


def _table(rows: list[Ratio]) -> Table:
    table = Table("what", "ratio", "95 % interval", "seconds", "target")
    for row in rows:
        one, other = row.seconds
        table.add_row(
            row.name, f"{row.value:.2f}", f"{row.low:.2f} to {row.high:.2f}", f"{one:.4f} / {other:.4f}", _verdict(row)
        )
    return table


def _write(rows: list[Ratio]) -> None:
    """Writes the rows; what was measured before and not now stays as it was."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / "ratios.json"
    old = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    new = {row.name: row for row in rows}
    whole = {row["name"]: new.pop(row["name"], None) or Ratio(**row) for row in old} | new
    machine = {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
    }
    rows = list(whole.values())
    document = {"machine": machine, "threads": torch.get_num_threads(), "rows": [asdict(row) for row in rows]}
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    lines = ["| what | ratio | 95 % interval | target |", "|---|---|---|---|"]
    lines += [f"| {r.name} | {r.value:.2f} | {r.low:.2f} to {r.high:.2f} | {_verdict(r)} |" for r in rows]
    (RESULTS / "ratios.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
