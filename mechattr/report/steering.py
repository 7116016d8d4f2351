"""The evaluation of a steering vector as a folder: numbers, figures, and one page that says what it does."""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from mechattr import draw, storage
from mechattr.errors import MechattrError, SettingError
from mechattr.models.base import HookedModel
from mechattr.report.folder import claim
from mechattr.report.steering_page import page
from mechattr.steering.evaluate import evaluate
from mechattr.steering.evaluation import Curves, SteeringEvaluation, SteeringSweep
from mechattr.steering.frontier import BUDGET
from mechattr.steering.gates import Gate, digest_of
from mechattr.steering.intervals import estimate
from mechattr.steering.prompted import Steering as Vector
from mechattr.steering.prompted import Where
from mechattr.steering.scored import MULTIPLIERS
from mechattr.steering.sweep import sweep
from mechattr.steering.vector import SteeringVector

EVALUATION, SWEEP, REPORT = "evaluation.safetensors", "sweep.safetensors", "report.html"
TABLES = ("evaluation.csv", "sweep.csv")
FIGURES = ("propensity", "frontier", "layers")
OWNED = (EVALUATION, SWEEP, REPORT, *TABLES, *(f"{name}.{kind}" for name in FIGURES for kind in ("png", "svg")))


@dataclass(frozen=True, slots=True, kw_only=True)
class Steering:
    """What `steer` found.

    Attributes:
        evaluation: the vector beside its controls.
        by_layer: one layer of the vector at a time, where that was asked for.
        report_path: the page.
    """

    evaluation: SteeringEvaluation
    by_layer: SteeringSweep | None
    report_path: Path

    @property
    def summary(self) -> str:
        """Effect, controls and price in a few sentences."""
        return " ".join(_sentences(self.evaluation))


def steer(
    model: HookedModel,
    vector: Vector,
    triples: Sequence[tuple[str, str, str]],
    *,
    out: Path | str,
    multipliers: Sequence[float] = MULTIPLIERS,
    positions: Where = "all",
    operator: str = "add",
    gate: Gate | None = None,
    neutral: Sequence[str] = (),
    random: int = 3,
    shuffled: Vector | None = None,
    prompting: str | None = None,
    generate: int = 0,
    by_layer: bool = False,
    seed: int = 0,
    batch_size: int = 32,
    overwrite: bool = False,
    progress: bool | None = None,
) -> Steering:
    """Evaluates a steering vector, and writes a page about it.

    Writes into `out`: `report.html`, the results as `.safetensors` and CSV, and the figures. The same call again shows
    what is there.

    Args:
        model: a causal language model.
        vector: directions at sites of this model, or a function of the state, such as `mechattr.steering.reft` makes.
        triples: (prompt, answer that matches the behaviour, answer that does not), better not those that the vector
            was made from.
        out: folder of the results.
        multipliers, positions, operator, gate, neutral, random, shuffled, prompting, generate, seed, batch_size,
            progress: see `mechattr.steering.evaluate`. Of an ablation, which no multiplier changes, there is one.
        by_layer: also measure each layer of the vector alone; see `mechattr.steering.sweep`.
        overwrite: replace the result of other settings.

    Raises:
        OutputExistsError: `out` holds the result of other settings.
        SettingError, MismatchError, NonFiniteError: as `mechattr.steering.evaluate`.

    Cost:
        As `mechattr.steering.evaluate`, and as `mechattr.steering.sweep` by layer.
    """
    folder = Path(out)
    if by_layer and not isinstance(vector, SteeringVector):
        raise SettingError("one layer at a time", f"a {vector.kind}", "leave by_layer (--by-layer) out")
    factors = [1.0] if operator == "ablate" else list(multipliers)  # which do not change an ablation
    how: dict[str, Any] = {"multipliers": factors, "positions": positions, "operator": operator}
    more: dict[str, Any] = {"random": random, "prompting": prompting, "generate": generate, "seed": seed}
    key = {
        **model.fingerprint(),
        "vector": _digest(vector),
        "shuffled": None if shuffled is None else _digest(shuffled),
        "triples": _hash([list(one) for one in triples]),
        "neutral": _hash(list(neutral)),
        "gate": digest_of(gate),
        "by_layer": by_layer,
        **how,
        **more,
    }
    common: dict[str, Any] = {**how, "gate": gate, "neutral": neutral, "batch_size": batch_size, "progress": progress}
    fresh = not folder.exists()
    claim(folder, key, OWNED, overwrite=overwrite)
    try:
        if not (folder / EVALUATION).exists():
            evaluate(model, vector, triples, shuffled=shuffled, **common, **more).save(folder / EVALUATION)
        if by_layer and not (folder / SWEEP).exists():
            sweep(model, cast(SteeringVector, vector), triples, **common).save(folder / SWEEP)
    except MechattrError:
        if fresh:  # settings that cannot be used take no folder
            shutil.rmtree(folder)
        raise
    result = Steering(
        evaluation=SteeringEvaluation.load(folder / EVALUATION),
        by_layer=SteeringSweep.load(folder / SWEEP) if by_layer else None,
        report_path=folder / REPORT,
    )
    found: list[tuple[Curves, str]] = [(result.evaluation, TABLES[0])]
    found += [] if result.by_layer is None else [(result.by_layer, TABLES[1])]
    for one, name in found:
        one.to_pandas().to_csv(folder / name, index=False, quoting=csv.QUOTE_NONNUMERIC)
    pictures = _pictures(result, folder)
    about = f"{', '.join(vector.sites)}, made by {vector.settings.get('method', 'another program')}"
    text = page(result, model.info.name, about, [prompt for prompt, *_ in triples], pictures, key)
    result.report_path.write_text(text, encoding="utf-8")
    return result


def _pictures(result: Steering, folder: Path) -> dict[str, Path]:
    """The figures that there are numbers for, as PNG, by name."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    drawn = {"propensity": result.evaluation.plot()}
    if "kl" in result.evaluation.tensors:
        drawn["frontier"] = result.evaluation.plot_frontier()
    if result.by_layer is not None:
        drawn["layers"] = result.by_layer.plot()
    for name, ax in drawn.items():
        for kind in ("png", "svg"):
            draw.save(cast(Any, ax.figure), folder / f"{name}.{kind}")
        plt.close(cast(Any, ax.figure))  # pyplot keeps what it made
    return {name: folder / f"{name}.png" for name in drawn}


def _sentences(result: SteeringEvaluation) -> list[str]:
    """What is said in front of all numbers."""
    n, unit, measure = len(result.base), result.unit, cast(Any, result.settings["measure"])["name"]
    said = []
    if not result.graded:
        random = ", ".join(f"{effect:.3g}" for effect in result.random_effects)
        how = "ablation" if result.settings["operator"] == "ablate" else f"multiplier {result.multipliers[0]:g}"
        said.append(
            f"The vector changes the {measure} of {n} items by {estimate(result.effects('vector')[0])} {unit} (95 % "
            f"over items; {how})."
        )
        said.append(f"Random vectors of equal length: {random} {unit}.")
        if "shuffled" in result.conditions:
            said.append(f"Shuffled labels: {estimate(result.effects('shuffled')[0])} {unit}.")
    else:
        random = ", ".join(f"{slope:.3g}" for slope in result.random_steerability)
        said.append(
            f"One unit of the multiplier changes the {measure} of {n} items by {result.steerability()} {unit} (95 % "
            f"over items), and {100 * result.anti_steerable().value:.0f} % of them go the other way."
        )
        said.append(f"Random vectors of equal length: {random} {unit}.")
        if "shuffled" in result.conditions:
            said.append(f"Shuffled labels: {result.steerability('shuffled')} {unit}.")
    if result.prompting is not None:
        said.append(f"Plain prompting changes it by {result.prompting} {unit}.")
    if "kl" in result.tensors and not result.graded:
        price, chance = (estimate(result.tensors["kl"].values[i, 0]) for i in range(2))
        said.append(f"KL on neutral texts: {price} nats a token, and {chance.value:.3g} with a random vector.")
    elif "kl" in result.tensors:
        most = {name: result.frontier(name).best for name in ("vector", "random")}
        (at, effect), (_, luck) = most["vector"], most["random"]
        said.append(
            f"No multiplier raises it within a KL of {BUDGET:g} nats a token on neutral texts."
            if at is None
            else f"Within a KL of {BUDGET:g} nats a token on neutral texts the most is {effect:.3g} {unit} (multiplier "
            f"{at[1]:g}), and {luck:.3g} {unit} with a random vector."
        )
    return said


def _digest(vector: Vector) -> dict[str, str]:
    return {name: storage.checksum(table.values) for name, table in vector.tensors.items()}


def _hash(texts: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()
