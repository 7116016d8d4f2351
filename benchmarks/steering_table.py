"""`python -m benchmarks.steering_table [--quick]`: builders of steering vectors under operators, all at one price.

A vector acts at all positions. Its multiplier is where it costs BUDGET nats a token of KL to the unsteered model, on
texts that the model wrote itself; its layer is the one where `add` does most on the first half of the held-out items.
The effect is the change of log p(matching answer) - log p(other answer) on the second half: half of what lies between
steering towards the behaviour and away from it. Nouns, names and events of held-out items are in no data of vectors.

Writes benchmarks/results/steering.{json,md,png}; `--quick` measures a little and writes nothing. The behaviour of a
model that is not bundled is measured where the shared data are found (MECHATTR_TEST_DATA).
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

import mechattr as ma
from benchmarks.steering_data import Behaviour, drawn, neutral
from benchmarks.steering_page import write
from benchmarks.steering_rows import (
    BUILDERS,
    FUNCTIONS,
    OPERATORS,
    RANDOM,
    SHUFFLED,
    candidates,
    functions,
    lengths,
    refusal,
)
from mechattr.models.base import HookedModel
from mechattr.steering import SteeringVector
from mechattr.steering.intervals import estimate

SHARED = Path(os.environ.get("MECHATTR_TEST_DATA", Path(__file__).resolve().parents[2] / "shared"))
BUDGET, PAIRS, HELD, TEXTS, SEEDS = 0.1, 32, 48, 12, (0, 1)
SHARES = tuple(0.05 * 2**k for k in range(6))  # of the mean length of activations
ANGLES = tuple(0.5**k for k in range(5, -1, -1))  # of the angle between activation and vector
STRENGTHS = tuple(0.25 * 2**k for k in range(6))  # of functions of the state: 1 is as they were made
SIDES = {"towards": 1, "away": -1}
FROM_ZERO = ("add", "norm_preserving", "angular")  # with multiplier 0 nothing changes


@dataclass(frozen=True, slots=True)
class Setting:
    """A model, a behaviour drawn for one seed, and what is measured on."""

    model: HookedModel
    data: Behaviour
    texts: list[str]
    length: Mapping[str, float]
    seed: int

    @property
    def right(self) -> Tensor:
        """1 where the matching answer is the right one, else -1; [item]."""
        return torch.tensor(self.data.right, dtype=torch.double)


def setting(model: HookedModel, behaviour: str, seed: int, n: int, n_held: int, n_texts: int) -> Setting:
    """What one seed measures."""
    texts = neutral(model, n_texts, seed)
    return Setting(model, drawn(behaviour, n, n_held, seed), texts, lengths(model, texts), seed)


def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """Validation and test, along the last axis. Both kinds of prompt are in both."""
    n = x.shape[-1] // 4 * 2
    return x[..., :n], x[..., n:]


def at_budget(grid: Sequence[float], kl: Sequence[float], budget: float, *, from_zero: bool) -> float | None:
    """The largest multiplier whose KL is the budget, on lines between the logarithms of both; the largest of the grid,
    where that costs less. Below the grid KL grows with the square, for operators that begin at nothing."""
    within = [i for i, one in enumerate(kl) if one <= budget]
    if not within:
        return grid[0] * math.sqrt(budget / kl[0]) if from_zero else None
    i = within[-1]
    if i + 1 == len(grid):
        return grid[i]
    low = max(kl[i], 1e-12)
    return grid[i] * (grid[i + 1] / grid[i]) ** (math.log(budget / low) / math.log(kl[i + 1] / low))


def moved(
    at: Setting, given: Mapping[int, Any], multipliers: Sequence[float], operator: str, *, items: bool = True
) -> tuple[Tensor, Tensor]:
    """Change of propensity [vector, multiplier, item] and KL [vector, multiplier, text]."""
    held = at.data.held if items else at.data.held[:1]
    found = ma.steering.sweep(
        at.model, given, held, multipliers=multipliers, neutral=at.texts, progress=False, operator=operator
    )
    return (found.tensors["propensity"].values - found.base).double(), found.tensors["kl"].values.double()


def cell(at: Setting, given: Mapping[str, Mapping[int, Any]], operator: str, grid: Sequence[float]) -> dict[str, Any]:
    """Both directions of one builder under one operator, with candidates for each, on the test half; {} where no
    multiplier is cheap enough."""
    sides = {side: _side(at, given[side], sign, operator, grid) for side, sign in SIDES.items()}
    return {} if None in sides.values() else both(**sides)


def _side(
    at: Setting, given: Mapping[int, Any], sign: int, operator: str, grid: Sequence[float]
) -> dict[str, Any] | None:
    """The candidate with the largest effect on validation items, each at the budget."""
    kl = halves(moved(at, given, [sign * m for m in grid], operator, items=False)[1])[0].mean(-1).tolist()
    prices = {
        number: at_budget(grid, costs, BUDGET, from_zero=operator in FROM_ZERO)
        for number, costs in zip(given, kl, strict=True)
    }
    cheap = {number: (given[number], sign * m) for number, m in prices.items() if m is not None}
    return max(used(at, cheap, operator), key=lambda one: sign * float(one["validation"])) if cheap else None


def used(at: Setting, given: Mapping[int, tuple[Any, float]], operator: str) -> list[dict[str, Any]]:
    """Vectors, each at its multiplier."""
    if operator == "add" and all(isinstance(vector, SteeringVector) for vector, _ in given.values()):
        parts = [moved(at, {number: vector * m for number, (vector, m) in given.items()}, (1.0,), operator)]
    else:
        parts = [moved(at, {number: vector}, (m,), operator) for number, (vector, m) in given.items()]
    validation, test = halves(torch.cat([effect[:, 0] for effect, _ in parts]))
    kl = halves(torch.cat([costs[:, 0] for _, costs in parts]))[1].mean(-1)
    return [
        {
            "candidate": number, "layer": number % at.model.info.n_layers, "multiplier": m, "kl": float(kl[i]),
            "validation": float(validation[i].mean()), "effect": test[i].tolist(),
        }
        for i, (number, (_, m)) in enumerate(given.items())
    ]  # fmt: skip


def both(towards: dict[str, Any], away: dict[str, Any]) -> dict[str, Any]:
    """The effect of each item: half of what lies between the two directions."""
    effect = [(a - b) / 2 for a, b in zip(towards["effect"], away["effect"], strict=True)]
    return {"effect": effect, "towards": towards, "away": away}


def without(at: Setting, vectors: Mapping[int, SteeringVector], operator: str = "ablate") -> dict[str, Any]:
    """How far the right answers' margin falls when a direction is taken away, or what it is in is scaled to 0; at the
    layer where it falls most."""
    effect, kl = moved(at, vectors, (0.0,), operator)
    validation, test = halves(-effect[:, 0] * at.right)
    i = int(validation.mean(-1).argmax())
    number = list(vectors)[i]
    return {"effect": test[i].tolist(), "layer": number % at.model.info.n_layers, "kl": float(kl[i].mean())}


def row(at: Setting, name: str, labelled: dict[str, Any] | None) -> dict[str, Any]:
    """One builder under all operators; those but `add` at the layers that it chose. Shuffled labels are used where and
    as strongly as labels are."""
    if name in FUNCTIONS:
        made = functions(at.model, name, at.data, at.seed)
        return {"add": cell(at, dict.fromkeys(SIDES, made), "add", STRENGTHS)}
    vectors = candidates(at.model, name, at.data, at.seed, at.length)
    if name == SHUFFLED:
        assert labelled is not None
        same = {side: (vectors[labelled[side]["layer"]], labelled[side]["multiplier"]) for side in SIDES}
        return {"add": both(**{side: used(at, {labelled[side]["layer"]: one}, "add")[0] for side, one in same.items()})}
    found = {"add": cell(at, dict.fromkeys(SIDES, vectors), "add", SHARES)}
    chosen = {side: {found["add"][side]["candidate"]: vectors[found["add"][side]["candidate"]]} for side in SIDES}
    for operator in OPERATORS[1:]:
        found[operator] = cell(at, chosen, operator, ANGLES if operator == "angular" else SHARES)
    found["ablate"] = without(at, vectors)
    if name == "iti":
        found["scale"] = without(at, vectors, "scale")
    return {operator: one for operator, one in found.items() if one}


def prompted(at: Setting) -> dict[str, Any]:
    """The effect of a sentence in front of prompts, instead of steering."""
    base = ma.steering.propensity(at.model, at.data.held).double()
    texts = [[(front + prompt, a, b) for prompt, a, b in at.data.held] for front in at.data.prompts]
    a, b = (halves(ma.steering.propensity(at.model, part).double() - base)[1].tolist() for part in texts)
    return {"add": both({"effect": a}, {"effect": b})}


def unsteered(at: Setting) -> dict[str, Any]:
    """What the model does as it is: the margin of right answers, and how well propensity tells the prompts apart."""
    base = ma.steering.propensity(at.model, at.data.held).double()
    yes, no = base[at.right > 0], base[at.right < 0]
    return {"margin": (base * at.right).tolist(), "auc": float((yes[:, None] > no).double().mean())}


def one_seed(name: str, behaviour: str, seed: int, quick: bool = False, names: Sequence[str] = ()) -> dict[str, Any]:
    """The rows of one seed, and what the model does without steering."""
    torch.set_num_threads(1)
    at = setting(ma.load(name), behaviour, seed, *((16, 16, 8) if quick else (PAIRS, HELD, TEXTS)))
    rows: dict[str, dict[str, Any]] = {}
    for builder in tqdm(
        names or [*BUILDERS, *FUNCTIONS, SHUFFLED, RANDOM], desc=f"{behaviour}, seed {seed}", mininterval=5
    ):
        rows[builder] = row(at, builder, rows.get("mean_difference", {}).get("add"))
    rows["refusal"] = {"ablate": without(at, {0: refusal(at.model, at.data, seed)})}
    rows["prompting"] = prompted(at)
    return {"model": at.model.info.name, "rows": rows, **unsteered(at)}


def table(behaviour: str, seeds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The seeds of one behaviour together."""
    return {
        "model": seeds[0]["model"],
        "behaviour": behaviour,
        "margin": list(estimate(torch.tensor([x for one in seeds for x in one["margin"]]))),
        "auc": sum(one["auc"] for one in seeds) / len(seeds),
        "rows": {name: together([one["rows"][name] for one in seeds]) for name in seeds[0]["rows"]},
    }


def together(seeds: list[dict[str, Any]]) -> dict[str, Any]:
    """One row from its seeds: effects with intervals over the items of all."""
    found: dict[str, Any] = {}
    for operator in {key: None for one in seeds for key in one}:
        cells = [one[operator] for one in seeds if operator in one]
        if len(cells) < len(seeds):
            continue
        effect = torch.tensor([x for one in cells for x in one["effect"]])
        found[operator] = {"effect": list(estimate(effect)), "against": float((effect < 0).double().mean())}
        for side in ("towards", "away"):
            if side in cells[0]:
                values = torch.tensor([x for one in cells for x in one[side]["effect"]])
                facts = {
                    k: [one[side][k] for one in cells] for k in ("layer", "multiplier", "kl") if k in cells[0][side]
                }
                found[operator][side] = {"effect": list(estimate(values)), **facts}
        if operator in ("ablate", "scale"):
            found[operator] |= {k: [one[k] for one in cells] for k in ("layer", "kl")}
    return found


def main() -> None:
    """Measures and writes benchmarks/results/steering.{json,md,png}; `--quick` measures a little and writes nothing."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.steering_table", description=main.__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--processes", type=int, default=2, help="behaviours and seeds that are measured at a time")
    chosen = parser.parse_args()
    other = SHARED / "models" / "stories260K"
    asked = [("tiny", "number agreement"), ("tiny", "gendered pronoun")]
    asked += [(str(other), "sentiment")] if other.is_dir() else []
    seeds = (0,) if chosen.quick else SEEDS
    jobs = [(name, behaviour, seed, chosen.quick) for name, behaviour in asked for seed in seeds]
    with ProcessPoolExecutor(chosen.processes, mp_context=get_context("spawn")) as pool:
        found = list(pool.map(one_seed, *zip(*jobs, strict=True)))
    n = len(seeds)
    tables = [table(behaviour, found[n * i : n * (i + 1)]) for i, (_, behaviour) in enumerate(asked)]
    document = {
        "budget": BUDGET, "pairs": PAIRS, "held": len(seeds) * HELD // 2, "texts": TEXTS, "seeds": list(seeds),
        "sentiment_of_tiny": unsteered(setting(ma.load("tiny"), "sentiment", 0, 2, 2 * HELD, 2))["auc"],
        "tables": tables,
    }  # fmt: skip
    if chosen.quick:
        print(json.dumps(document, indent=1))
    else:
        write(document)


if __name__ == "__main__":
    main()
