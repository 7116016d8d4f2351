"""How far orders of nodes and edges agree between dtypes; `python -m benchmarks.dtypes` writes it into its page."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr
from tqdm.auto import tqdm

import mechattr as ma

PAGE = Path(__file__).resolve().parents[1] / "docs" / "numerics.md"
BEGIN, END = "<!-- dtypes -->", "<!-- end of dtypes -->"
DTYPES = ("float32", "bfloat16", "float16")
TOP = 20
CALLS: dict[str, Callable[[Any, Any], Any]] = {
    "exact patching": lambda m, t: ma.activation_patching(m, t, positions="all", sites=("q", "k", "v", "z")),
    'AtP, `"atp"`': lambda m, t: ma.attribution_patching(m, t, positions="all", variant="atp"),
    'AtP, `"qk"`': lambda m, t: ma.attribution_patching(m, t, positions="all", variant="qk"),
    "AtP, default": lambda m, t: ma.attribution_patching(m, t, positions="all"),
    "EAP": lambda m, t: ma.edge_attribution(m, t, method="eap"),
    "EAP-IG": lambda m, t: ma.edge_attribution(m, t, steps=5),
}


def scores(result: Any) -> torch.Tensor:
    """The scores of everything that was scored, in one order."""
    found = [result.tensors[name].values.flatten() for name in sorted(result.tensors) if name.startswith("score")]
    every = torch.cat(found).double()
    return every[every.isfinite()]


def measure() -> list[str]:
    """Rows of the table: Spearman's correlation with float64, and how many of the top 20 are the same."""
    found: dict[tuple[str, str], torch.Tensor] = {}
    for dtype in tqdm(("float64", *DTYPES), desc="dtypes"):
        model = ma.load("tiny", dtype=dtype)
        task = ma.tasks.ioi(model, n=4, seed=0)
        for name, call in CALLS.items():
            found[name, dtype] = scores(call(model, task))
    lines = ["| method | " + " | ".join(DTYPES) + " |", "|---|" + "---|" * len(DTYPES)]
    for name in CALLS:
        reference, cells = found[name, "float64"], []
        for dtype in DTYPES:
            here = found[name, dtype]
            best, mine = (set(x.topk(TOP).indices.tolist()) for x in (reference, here))
            cells.append(f"{spearmanr(reference, here).statistic:.4f}, {len(best & mine)} of {TOP}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    """Writes the table into the page."""
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    table = "\n".join(measure())
    PAGE.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
