"""`python -m benchmarks [--smoke]`: prints the table and writes it to benchmarks/results/."""

from __future__ import annotations

import json
import os
import platform
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm

from benchmarks import attribution, edges, localising, recording, sweep
from benchmarks.measure import Ratio

RESULTS = Path(__file__).resolve().parent / "results"


def main() -> None:
    """Runs every measurement; `--smoke` runs few rounds of the small shape and writes nothing."""
    smoke = "--smoke" in sys.argv[1:]
    torch.set_num_threads(2)
    jobs = [
        lambda: recording.measure("S", 3 if smoke else 41),
        lambda: attribution.measure("S", 3 if smoke else 41),
        lambda: attribution.measure_edges("S", 3 if smoke else 21),
        lambda: edges.measure(3 if smoke else 9),
        lambda: sweep.measure(3 if smoke else 9),
    ]
    if not smoke:
        jobs += [lambda: recording.measure("M", 31), lambda: attribution.measure("M", 21)]
        jobs += [lambda: attribution.measure_edges("M", 11), lambda: localising.measure(3), localising.memory]
    rows = [row for job in tqdm(jobs, desc="benchmarks") for row in job()]
    Console(width=120).print(_table(rows))
    if not smoke:
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
    RESULTS.mkdir(exist_ok=True)
    machine = {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
    }
    document = {"machine": machine, "threads": torch.get_num_threads(), "rows": [asdict(row) for row in rows]}
    (RESULTS / "ratios.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    lines = ["| what | ratio | 95 % interval | target |", "|---|---|---|---|"]
    lines += [f"| {r.name} | {r.value:.2f} | {r.low:.2f} to {r.high:.2f} | {_verdict(r)} |" for r in rows]
    (RESULTS / "ratios.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
