"""Write the card (`README.md`) of the bundled model from its schedule and its measured numbers.

python -m data.train.card --model FOLDER --minutes MINUTES
"""

import argparse
import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open

from data.train import mixture
from data.train.corpus import HELD_OUT_EVERY
from data.train.schedule import RUNS, SEED, Phase, Run, Shares

TEMPLATE = Path(__file__).with_name("card.md")
FILES = ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "metrics.json")
WINDOWS = ("passage", "around_word")
AIMS = {
    "IOI accuracy (logit of the indirect object above the subject's)": ("ioi_accuracy", "≥ 0.95"),
    "Agreement accuracy, no attractor": ("agreement_accuracy_by_attractors/0", ""),
    "Agreement accuracy, 1 attractor": ("agreement_accuracy_by_attractors/1", "≥ 0.95"),
    "Agreement accuracy, 2 attractors": ("agreement_accuracy_by_attractors/2", ""),
    "Agreement accuracy, 3 attractors": ("agreement_accuracy_by_attractors/3", ""),
    "Agreement accuracy, 4 attractors": ("agreement_accuracy_by_attractors/4", ""),
    "Gendered pronoun accuracy": ("gendered_pronoun_accuracy", "≥ 0.90"),
    "Greater-than, probability of later minus other years": ("greater_than_probability_difference", "≥ 0.50"),
    "Induction accuracy, random blocks of 10 tokens": ("induction_accuracy_by_block_length/10", "≥ 0.80"),
    "Induction accuracy, random blocks of 20 tokens": ("induction_accuracy_by_block_length/20", "≥ 0.80"),
    "Induction accuracy, random blocks of 40 tokens": ("induction_accuracy_by_block_length/40", "≥ 0.80"),
    "Held-out prose, nats a token": ("prose_loss/nats_per_token", ""),
    "Held-out prose, bits a character": ("prose_loss/bits_per_character", ""),
}


def millions(phases: Sequence[Phase], kinds: Sequence[str] | None = None) -> str:
    """Million tokens predicted by a run, in rows of the given kinds (None: of all)."""
    total = 0.0
    for phase in phases:
        shares = [share for kind, share in phase.kinds.items() if kinds is None or kind in kinds]
        total += phase.steps * phase.rows * phase.length * sum(shares) / sum(phase.kinds.values())
    return f"{total / 1e6:.1f}"


def numbers(metrics: dict[str, Any]) -> str:
    """The table of measurements, the model beside its control."""

    def value(model: str, path: str) -> str:
        found = metrics[model]
        for key in path.split("/"):
            found = found[key]
        return f"{found:.3f}"

    lines = ["| measured on held-out data | aim | tiny | prose only |", "|---|---|---|---|"]
    for label, (path, aim) in AIMS.items():
        lines.append(f"| {label} | {aim} | {value('model', path)} | {value('control', path)} |")
    return "\n".join(lines)


def listed(shares: Shares) -> str:
    """Shares as percentages."""
    total = sum(shares.values())
    return ", ".join(f"{name} {share / total:.0%}" for name, share in shares.items())


def schedule(run: Run) -> str:
    """The table of phases of one run, and its learning rates."""
    lines = ["| steps | rows × tokens | rows | task sentences | span lengths |", "|---|---|---|---|---|"]
    for phase in run.phases:
        tasks = listed(phase.tasks) if "tasks" in phase.kinds else ""
        spans = f"{phase.span[0]} to {phase.span[1]}" if "spans" in phase.kinds else ""
        lines.append(f"| {phase.steps} | {phase.rows} × {phase.length} | {listed(phase.kinds)} | {tasks} | {spans} |")
    rates = "; ".join(
        f"{rate.steps} steps{f' of the {rate.over}' if rate.over else ''} from {rate.first:g} to {rate.last:g}"
        for rate in run.rates
    )
    mean = " and ".join(map(str, run.averaged))
    kept = f" The model is the mean of the parameters after steps {mean}." if len(run.averaged) > 1 else ""
    return "\n".join([*lines, "", f"Learning rate, linear in each stretch: {rates}.{kept}"])


def card(folder: Path, minutes: int) -> str:
    """The text of the card of the model in `folder`, whose training took `minutes`."""
    metrics = json.loads((folder / "metrics.json").read_text())
    config = json.loads((folder / "config.json").read_text())
    with safe_open(folder / "model.safetensors", "pt") as file:
        parameters = sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    main, control = RUNS["main"], RUNS["prose"]
    return TEMPLATE.read_text(encoding="utf-8").format(
        parameters=f"{parameters / 1e6:.2f}",
        layers=config["n_layer"],
        heads=config["n_head"],
        width=config["n_embd"],
        vocabulary=config["vocab_size"],
        positions=config["n_positions"],
        numbers=numbers(metrics),
        pairs=metrics["pairs"],
        evaluation_seed=metrics["seed"],
        every=HELD_OUT_EVERY,
        control_prose=millions(control.phases),
        prose=millions(main.phases, WINDOWS),
        tokens=millions(main.phases),
        sample="\n".join(f"> {line}".rstrip() for line in metrics["model"]["sample"].split("\n")),
        answer_weight=f"{mixture.ANSWER_WEIGHT:g}",
        prompt_weight=f"{mixture.PROMPT_WEIGHT:g}",
        swapped=f"{mixture.SWAPPED:.0%}",
        noise=f"{mixture.NOISE:.0%}",
        varied=f"{mixture.VARIED:.0%}",
        seed=SEED,
        schedule=schedule(main),
        control_schedule=schedule(control),
        minutes=minutes,
        sums="\n".join(
            f"| `{name}` | `{hashlib.sha256((folder / name).read_bytes()).hexdigest()}` |" for name in FILES
        ),
    )


def main() -> None:
    """Write the card beside the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--minutes", type=int, required=True, help="how long the training took")
    arguments = parser.parse_args()
    text = card(arguments.model, arguments.minutes)
    (arguments.model / "README.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
