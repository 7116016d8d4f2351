"""The page and the figure of `benchmarks.steering_table`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.steering_rows import OPERATORS, RANDOM, SHUFFLED

RESULTS = Path(__file__).resolve().parent / "results"
DETAILS = (
    "`add`", "towards", "layers", "multipliers", "away", "layers", "multipliers", "KL on other texts",
    "items moved the wrong way",
)  # fmt: skip
CONTROLS = ("random", "shuffled", "prompting")


def write(document: dict[str, Any]) -> None:
    """Writes benchmarks/results/steering.{json,md,png}."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "steering.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    (RESULTS / "steering.md").write_text("\n".join(lines(document)) + "\n", encoding="utf-8")
    figure(document).savefig(RESULTS / "steering.png", dpi=150)


def lines(document: dict[str, Any]) -> list[str]:
    """The page."""
    n = len(document["seeds"])
    found = [
        f"Effects in nats with 95 % bootstrap intervals over {document['held']} held-out items of {n} seeds, at the "
        f"multiplier that costs {document['budget']} nats a token of KL; see `benchmarks/steering_table.py`. An effect "
        "is half of the change of propensity between steering towards the behaviour and away from it. `clamp` is not "
        "there: where the multiplier is free it does what `ablate_then_add` does. `ablate` has no multiplier: how far "
        "the margin of right answers falls, and at what KL. Rows are in the order of `add`; - where no multiplier is "
        "cheap enough, or where there is no such thing. Shuffled labels are used where and as strongly as "
        "`mean_difference` is; prompting is a sentence in front of each prompt.",
    ]
    for table in document["tables"]:
        found += ["", f"## {table['behaviour']}, {table['model']}", "", summary(table), ""]
        found += [f"| builder | {' | '.join(OPERATORS)} | ablate (KL) |", "|" + "---|" * (len(OPERATORS) + 2)]
        found += [f"| {name} | {' | '.join(_cells(table['rows'][name]))} |" for name in ranked(table)]
        found += ["", f"| {' | '.join(DETAILS)} |", "|" + "---|" * len(DETAILS)]
        found += [_sides(name, table["rows"][name]["add"]) for name in ranked(table) if "kl" in _towards(table, name)]
    found += [
        "",
        'The bundled model has hardly any sentiment to steer: its propensity to "happy" rather than "sad" tells '
        "prompts of good and bad events apart with an AUC of "
        f"{document['sentiment_of_tiny']:.2f}, where chance is 0.5.",
    ]
    return found


def ranked(table: dict[str, Any]) -> list[str]:
    """The rows by effect of `add`, those without it last."""
    return sorted(table["rows"], key=lambda name: -_effect(table["rows"][name]))


def summary(table: dict[str, Any]) -> str:
    """The behaviour as it is, and GrAInS's place."""
    builders = [name for name in ranked(table) if not name.startswith((*CONTROLS, "refusal"))]
    control = max(table["rows"][n]["add"]["effect"][2] for n in table["rows"] if n.startswith(("random", SHUFFLED)))
    places = ", ".join(
        f"{builders.index(name) + 1} ({name.removeprefix('grains, ')})"
        for name in builders
        if name.startswith("grains")
    )
    above = sum(table["rows"][name]["add"]["effect"][1] > control for name in builders)
    heads = table["rows"]["iti"]["scale"]
    return (
        f"Without steering right answers lead by {_shown(table['margin'])} nats (AUC of the two kinds of prompt "
        f"{table['auc']:.2f}). With `add` {above} of {len(builders)} builders lie with their whole interval above "
        f"those of the random vectors and of shuffled labels. GrAInS has the places {places} of {len(builders)}. "
        f"Where `scale` makes the heads of `iti` 0, right answers lead by {_shown(heads['effect'])} nats less (KL "
        f"{_mean(heads['kl']):.2f})."
    )


def figure(document: dict[str, Any]) -> Any:
    """Effects of `add`, a panel a behaviour."""
    import matplotlib.pyplot as plt

    names = list(reversed(ranked(document["tables"][0])))
    names = [name for name in names if "add" in document["tables"][0]["rows"][name]]
    size = (3.2 + 2.6 * len(document["tables"]), 0.6 + 0.24 * len(names))
    made, axes = plt.subplots(
        1, len(document["tables"]), figsize=size, sharey=True, squeeze=False, layout="constrained"
    )
    for ax, table in zip(axes[0], document["tables"], strict=True):
        low, high = (table["rows"][RANDOM]["add"]["effect"][k] for k in (1, 2))
        ax.axvspan(low, high, color="0.9")
        ax.axvline(0, color="0.6", linewidth=0.8)
        for y, name in enumerate(names):
            value, low, high = table["rows"][name]["add"]["effect"]
            colour = "tab:red" if name.startswith("grains") else "0.55" if name.startswith(CONTROLS) else "tab:blue"
            ax.plot([low, high], [y, y], color=colour, linewidth=1.5)
            ax.plot([value], [y], "o", color=colour, markersize=4)
        ax.set_title(f"{table['behaviour']} ({table['model']})", fontsize=10)
        ax.set_xlabel("effect (nats)", fontsize=10)
        ax.tick_params(labelsize=9)
    axes[0, 0].set_yticks(range(len(names)), names)
    return made


def _towards(table: dict[str, Any], name: str) -> dict[str, Any]:
    found: dict[str, Any] = table["rows"][name].get("add", {}).get("towards", {})
    return found


def _effect(row: dict[str, Any]) -> float:
    return float(row["add"]["effect"][0]) if "add" in row else float("-inf")


def _cells(row: dict[str, Any]) -> list[str]:
    found = [_shown(row[operator]["effect"]) if operator in row else "-" for operator in OPERATORS]
    if "ablate" not in row:
        return [*found, "-"]
    return [*found, f"{_shown(row['ablate']['effect'])} ({_mean(row['ablate']['kl']):.2f})"]


def _sides(name: str, add: dict[str, Any]) -> str:
    cells, costs = [], []
    for side in (add["towards"], add["away"]):
        layers, multipliers = (", ".join(f"{x:.2g}" for x in side[key]) for key in ("layer", "multiplier"))
        cells += [_shown(side["effect"]), layers, multipliers]
        costs += side["kl"]
    return f"| {name} | {' | '.join(cells)} | {_mean(costs):.2f} | {add['against']:.0%} |"


def _shown(estimate: list[float]) -> str:
    value, low, high = estimate
    return f"{value:.2f} [{low:.2f}, {high:.2f}]"


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
