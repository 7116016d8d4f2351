"""Which estimate finds the truly largest nodes soonest? Every estimate and search against exhaustive patching.

`python -m benchmarks.localisation [--quick] [SET ...]` measures the sets named (all unless named), pair by pair, merges
them into benchmarks/results/localisation.json and writes the tables to localisation.md. Exact effects are kept in
out/localisation, so a run that was stopped goes on from them. `--quick` takes two pairs of one set and writes nothing.

Relative cost is the inverse-rank-weighted geometric mean of (rank needed for the truly k largest) / k over all k up to
the number of nodes with an effect, geometric mean over pairs; 1 is the exact order. Intervals are 95 % bootstrap
intervals over pairs.
"""

from __future__ import annotations

import json
import lzma
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

import mechattr as ma
from benchmarks import orders
from mechattr.evaluation import discovery

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("MECHATTR_TEST_DATA", ROOT.parent / "shared"))
RESULTS = ROOT / "benchmarks" / "results"
DRAWS = {1: 12, 2: 16, 3: 20}  # draw, which is its seed -> tokens of a prompt
TASKS = ("ioi", "greater_than", "subject_verb", "gendered_pronoun", "induction")
PAIRS = 24
TINY_NEURON_PAIRS = 3  # 30,000 neurons a pair, against 10,000 of stories260K
PLAIN, FIXED, DEFAULT = "AtP", "AtP+QK", "max(|c| + ½|d|, AtP*)"

INTRODUCTION = """\
Written by `python -m benchmarks.localisation`. Each order is judged pair by pair against exact patching of every node
whose activation differs between the two prompts. *Relative cost*: (rank down to which one has to verify for the truly
k largest) / k, averaged geometrically over k with weights 1/k, up to the number of nodes with an effect, then over
pairs; 1 is the exact order. *With passes*: the same with the passes that the order itself took, a backward pass
counting as two. c is the estimate with the QK fix at the clean run; d is how much it changes where the token embeddings
moved a quarter of the way to the corrupt prompt's. In brackets: 95 % bootstrap intervals over pairs."""

Values = dict[str, list[float]]  # measure -> one value a pair


@dataclass(frozen=True, slots=True)
class Set:
    """Prompt pairs of one model.

    Attributes:
        model: its name.
        make: loads the model and makes the pairs.
        pairs: how many of them measure each kind of nodes.
        searched: on how many of these the searches run, which take far longer than the estimates.
    """

    model: str
    make: Callable[[], tuple[Any, Any]]
    pairs: Mapping[str, int]
    searched: Mapping[str, int]


def sets() -> dict[str, Set]:
    """By name: the draws from TinyStories for stories260K, and the tasks of the bundled model."""
    every = {"attention": PAIRS, "neurons": PAIRS}
    found = {
        f"stories260K, draw {draw}": Set("stories260K", _stories(draw), every, {"attention": PAIRS, "neurons": 3})
        for draw in DRAWS
    }
    some = {"attention": PAIRS, "neurons": TINY_NEURON_PAIRS}
    for name in TASKS:
        found[f"tiny, {name}"] = Set("tiny", _tiny(name), some, {"attention": 8, "neurons": 0})
    return found


def _stories(draw: int) -> Callable[[], tuple[Any, Any]]:
    def make() -> tuple[Any, Any]:
        model = ma.load(SHARED / "models" / "stories260K", dtype="float64")
        with lzma.open(SHARED / "corpora" / "tinystories_1000" / "tinystories_1000.json.xz", "rt") as file:
            texts = json.load(file)
        return model, ma.tasks.resampled(model, texts, n=PAIRS, seed=draw, length=DRAWS[draw])

    return make


def _tiny(name: str) -> Callable[[], tuple[Any, Any]]:
    def make() -> tuple[Any, Any]:
        model = ma.load("tiny", dtype="float64")
        return model, getattr(ma.tasks, name)(model, n=PAIRS, seed=0)

    return make


def measure(chosen: Set, kind: str, n_pairs: int) -> dict[str, Any]:
    """All methods on some pairs: the number of nodes (mean over pairs), and by method the values of each pair."""
    model, task = chosen.make()
    orders.check(model, task.rows([0]), kind)
    nodes: list[int] = []
    methods: dict[str, Values] = {}
    for i in tqdm(range(n_pairs), desc=f"{task.name} {kind}"):
        count, found = orders.measure(model, task.rows([i]), kind, seed=i, searches=i < chosen.searched[kind])
        nodes.append(count)
        for name, one in found.items():
            row = {
                **{f"recall {site}": share for site, share in one.recall.items()},
                "relative": one.relative,
                "with set-up": one.with_setup,
                "worst": one.worst,
                "forward": one.passes[0],
                "backward": one.passes[1],
            }
            values = methods.setdefault(name, {key: [] for key in row})
            for key, value in row.items():
                values[key].append(float(f"{value:.4g}"))
    return {"nodes": float(np.mean(nodes)), "pairs": n_pairs, "methods": methods}


# -- tables


def pooled(results: Mapping[str, Any], model: str, kind: str) -> dict[str, dict[str, np.ndarray]]:
    """By method and measure: the values of all pairs of a model's sets."""
    parts = [entry[kind]["methods"] for entry in results.values() if entry["model"] == model and kind in entry]
    names = parts[0] if parts else {}
    return {name: {key: np.concatenate([part[name][key] for part in parts]) for key in names[name]} for name in names}


def _with_interval(values: np.ndarray, statistic: Callable[[np.ndarray], float]) -> str:
    low, high = discovery.interval(values, statistic)
    return f"{statistic(values):.2f} ({low:.2f} to {high:.2f})"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def table(results: Mapping[str, Any], model: str) -> list[str]:
    """All methods on all sets of a model together."""
    attention, neurons = pooled(results, model, "attention"), pooled(results, model, "neurons")
    lines = [
        "| order | recall@10 q | k | v | z | attention: relative cost | worst pair | with passes "
        "| neurons: relative cost | worst pair | passes |",
        "|" + "---|" * 11,
    ]
    for name, values in attention.items():
        recall = [f"{values[f'recall {site}'].mean():.2f}" for site in "qkvz"]
        row = [_cell(name), *recall, _with_interval(values["relative"], discovery.geometric_mean)]
        row += [f"{values['relative'].max():.1f}", f"{discovery.geometric_mean(values['with set-up']):.2f}"]
        if name in neurons:
            other = neurons[name]["relative"]
            row += [_with_interval(other, discovery.geometric_mean), f"{other.max():.1f}"]
        else:
            row += ["", ""]
        row.append(f"{values['forward'].mean():.3g} F" + (f" {b:.3g} B" if (b := values["backward"].mean()) else ""))
        lines.append("| " + " | ".join(row) + " |")
    return lines


def by_set(results: Mapping[str, Any], model: str) -> list[str]:
    """Relative cost on attention / neurons of each set."""
    mine = {name: entry for name, entry in results.items() if entry["model"] == model and "attention" in entry}
    lines = ["| order | " + " | ".join(name.split(", ")[1] for name in mine) + " |", "|---" * (len(mine) + 1) + "|"]
    for method in next(iter(mine.values()))["attention"]["methods"] if mine else []:
        cells = []
        for entry in mine.values():
            kinds = [entry[kind]["methods"] for kind in orders.KINDS if kind in entry]
            costs = [discovery.geometric_mean(np.array(k[method]["relative"])) for k in kinds if method in k]
            cells.append(" / ".join(f"{cost:.2f}" for cost in costs))
        lines.append(f"| {_cell(method)} | " + " | ".join(cells) + " |")
    return lines


def targets(results: Mapping[str, Any]) -> list[str]:
    """What was aimed at on stories260K, and what came of it."""
    attention, neurons = (pooled(results, "stories260K", kind) for kind in orders.KINDS)
    lines = []

    def line(what: str, value: float, bound: float, *, at_most: bool) -> None:
        met = value <= bound if at_most else value >= bound
        aim = f"at {'most' if at_most else 'least'} {bound:.2f}"
        lines.append(f"| {_cell(what)} | {value:.2f} | {aim} | {'met' if met else 'missed'} |")

    for site in "qk":
        fixed, plain = (attention[name][f"recall {site}"].mean() for name in (FIXED, PLAIN))
        line(f"recall@10 of {site}, {FIXED}", fixed, 0.85, at_most=False)
        line(f"the same less that of {PLAIN}", fixed - plain, 0.15, at_most=False)
    for kind, values, bound in (("attention", attention, 1.6), ("neurons", neurons, 2.0)):
        if not values:
            continue
        ours, plain = (discovery.geometric_mean(values[name]["relative"]) for name in (DEFAULT, PLAIN))
        line(f"relative cost of {DEFAULT}, {kind}", ours, bound, at_most=True)
        line(f"the same over that of {PLAIN}", ours / plain, 0.65 if kind == "attention" else 1.0, at_most=True)
    return ["| what | found | aim | |", "|---|---|---|---|", *lines]


def report(results: Mapping[str, Any]) -> str:
    """The tables as Markdown."""
    blocks = [INTRODUCTION, ""]
    for model in dict.fromkeys(entry["model"] for entry in results.values()):
        entries = [entry for entry in results.values() if entry["model"] == model]
        sizes = []
        for kind in orders.KINDS:
            mine = [entry[kind] for entry in entries if kind in entry]
            if mine:
                nodes = np.mean([x["nodes"] for x in mine])
                searched = sum(len(x["methods"].get("random", {}).get("relative", ())) for x in mine)
                pairs = f"{sum(x['pairs'] for x in mine)} pairs (searches: {searched})"
                sizes.append(f"{kind}: {pairs}, {nodes:,.0f} nodes a pair")
        blocks += [f"## {model}", "", "; ".join(sizes) + ".", "", *table(results, model), ""]
        blocks += ["Relative cost by set, attention / neurons:", "", *by_set(results, model), ""]
    if any(entry["model"] == "stories260K" for entry in results.values()):
        blocks += ["## Aims on stories260K", "", *targets(results), ""]
    return "\n".join(blocks)


def _merge(results: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Puts sets in place of those of the same name in the stored results, and writes the tables of all."""
    path = RESULTS / "localisation.json"
    stored = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    merged = {name: {**stored, **results}[name] for name in names if name in stored or name in results}
    path.write_text(json.dumps(merged, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8")
    (RESULTS / "localisation.md").write_text(report(merged), encoding="utf-8")
    return merged


def main() -> None:
    """Measures, writes and prints."""
    arguments = sys.argv[1:]
    quick, names = "--quick" in arguments, [name for name in arguments if name != "--quick"]
    torch.set_num_threads(1)
    every = sets()
    unknown = [name for name in names if name not in every]
    if unknown:
        raise SystemExit(f"no set {unknown[0]!r}; there are: {'; '.join(every)}")
    results: dict[str, Any] = {}
    for name in names or ([f"tiny, {TASKS[0]}"] if quick else list(every)):
        chosen = every[name]
        entry: dict[str, Any] = {"model": chosen.model}
        for kind, n_pairs in chosen.pairs.items():
            if quick and kind == "neurons":
                continue
            entry[kind] = measure(chosen, kind, 2 if quick else n_pairs)
        results[name] = entry
        if not quick:
            _merge(results, every)
    print(report(results))


if __name__ == "__main__":
    main()
