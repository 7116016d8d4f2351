"""Can a model of stories be steered to happier ones, and at what price?

`python -m circuits.steering_stories --texts STORIES --model MODEL`. Stories are cut off where they say how somebody
felt. Some of them make vectors: prompts that go on with a good feeling against prompts that go on with a bad one, or
one prompt with either word behind it. Others say which builder, layer and multiplier has the most effect for a given
price, which is how far predictions on neutral texts move; and yet others what that is worth, beside random vectors,
shuffled labels and a happy sentence in front.
"""

from __future__ import annotations

import argparse
import json
import lzma
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pandas as pd
from matplotlib.axes import Axes

import mechattr as ma
from mechattr import draw, erasure, steering
from mechattr.models.base import HookedModel
from mechattr.sites import full_name
from mechattr.steering.intervals import estimate

GOOD, BAD = ("happy", "glad", "proud", "excited"), ("sad", "scared", "angry", "upset")
FELT = re.compile(rf"\b(?:was|were|felt)(?: very| so)?(?= ({'|'.join(GOOD + BAD)})\b)")
BEGINS = re.compile(r"(?:^|[.!?]\"? +)(?=\S)")
LONGEST = 160  # characters of a prompt: two sentences or so
MULTIPLIERS = (-4.0, -2.0, -1.0, -0.5, 0.5, 1.0, 2.0, 4.0)
SHARE = 0.1  # of the length of activations that a vector has at multiplier 1
PROMPTING = "Everybody was very happy and smiled. "


@dataclass(frozen=True, slots=True)
class Cases:
    """Prompts that stories continue with a feeling, as many of either kind, and texts that name none."""

    good: tuple[str, ...]
    bad: tuple[str, ...]
    neutral: tuple[str, ...]

    @property
    def triples(self) -> list[tuple[str, str, str]]:
        """Every prompt with a good and with a bad feeling, whichever the story has."""
        return [(prompt, f" {GOOD[0]}", f" {BAD[0]}") for prompt in self.good + self.bad]

    @property
    def questions(self) -> list[steering.Question]:
        """Every prompt with all good feelings as right answers and all bad ones as wrong ones."""
        kinds = (("good", self.good), ("bad", self.bad))
        return [steering.Question(prompt, GOOD, BAD, category=kind) for kind, part in kinds for prompt in part]


@dataclass(frozen=True, slots=True)
class Recipe:
    """A builder with what it reads."""

    builder: Callable[..., steering.SteeringVector]
    data: Sequence[tuple[str, ...]]
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __call__(
        self, model: HookedModel, layers: Sequence[int], *, shuffled: bool = False
    ) -> dict[int, steering.SteeringVector]:
        """A vector for each layer, all of the same share in the activations; or what shuffled labels give."""
        if shuffled:
            made = steering.shuffled(self.builder, model, self.data, layers=layers, **self.settings)
        else:
            made = self.builder(model, self.data, layers=layers, **self.settings)
        lengths = cast(dict[str, float], made.settings["lengths"])
        sites = {layer: full_name("resid_post", layer) for layer in layers}
        return {layer: made.only(site).normalised() * (SHARE * lengths[site]) for layer, site in sites.items()}


def main() -> None:
    """Makes vectors, chooses one on other stories, and measures it on yet others."""
    parser = argparse.ArgumentParser(prog="python -m circuits.steering_stories", description=__doc__)
    parser.add_argument("--texts", type=Path, required=True, help="stories: a JSON list or text, perhaps packed (.xz)")
    parser.add_argument("--model", required=True, help="a model of stories: folder or name")
    parser.add_argument(
        "--budget", type=float, default=0.3, help="most KL of neutral texts, nats a token (default: 0.3)"
    )
    parser.add_argument(
        "--most", type=int, default=40, help="most prompts of each kind to choose and to test (default: 40)"
    )
    parser.add_argument("--tokens", type=int, default=40, help="tokens that are written to a prompt (default: 40)")
    parser.add_argument("--out", type=Path, default=Path("out/circuits/steering_stories"), help="folder of the results")
    chosen = parser.parse_args()
    model = ma.load(chosen.model)
    chosen.out.mkdir(parents=True, exist_ok=True)
    stories = read(chosen.texts)
    random.Random(0).shuffle(stories)
    half, rest = len(stories) // 2, len(stories) * 3 // 4
    made = cases(stories[:half])
    tried, fresh = (cases(part, chosen.most) for part in (stories[half:rest], stories[rest:]))
    parts = (("to make vectors", made), ("to choose one", tried), ("to test it", fresh))
    print("prompts: " + ", ".join(f"{len(part.triples)} {name}" for name, part in parts))
    print(f"\nwithout steering, log p({GOOD[0]}) - log p({BAD[0]}) of prompts to test, in nats")
    before = steering.propensity(model, fresh.triples).split(len(fresh.good))
    for kind, values in zip(("good", "bad"), before, strict=True):
        print(f"  before a {kind} feeling: {estimate(values)}")
    name, layer, most = choose(model, recipes(made), tried, chosen.budget, chosen.out)
    measure(model, recipes(made)[name], layer, most, fresh, chosen)
    print(f"\nResults: {chosen.out}")


def choose(
    model: HookedModel, known: Mapping[str, Recipe], tried: Cases, budget: float, out: Path
) -> tuple[str, int, float]:
    """The builder, layer and multiplier that have the most effect within a budget."""
    found = {}
    for name, recipe in known.items():
        vectors = recipe(model, range(model.info.n_layers))
        swept = steering.sweep(model, vectors, tried.triples, neutral=tried.neutral, multipliers=MULTIPLIERS)
        save(swept, out / name.replace(" ", "_"), swept.plot(budget=budget))
        found[name] = swept.frontier(budget=budget)
    rows = [(name, *(one.best[0] or (None, None)), one.best[1], one.area) for name, one in found.items()]
    table = pd.DataFrame(rows, columns=["builder", "layer", "multiplier", "effect", "area"])
    print(f"\nthe most effect within {budget:g} nats a token, and the mean of the most over smaller budgets (area)")
    print(table.round(2).to_string(index=False))
    name = max(found, key=lambda one: found[one].best[1])
    label = found[name].best[0]
    if label is None:
        raise SystemExit("no builder has an effect within the budget")
    return name, int(label[0]), label[1]


def measure(
    model: HookedModel, recipe: Recipe, layer: int, most: float, fresh: Cases, chosen: argparse.Namespace
) -> None:
    """What one vector does to prompts that it was neither made nor chosen on, beside its controls."""
    vector = recipe(model, [layer])[layer]
    vector.save(chosen.out / "vector.safetensors")
    result = steering.evaluate(
        model, vector, fresh.triples, multipliers=[-most, -most / 2, 0, most / 2, most], neutral=fresh.neutral,
        random=8, shuffled=recipe(model, [layer], shuffled=True)[layer], prompting=PROMPTING,
        generate=chosen.tokens, judge=feelings,
    )  # fmt: skip
    save(result, chosen.out / "evaluation", result.plot())
    draw.save(result.plot_frontier(budget=chosen.budget).figure, chosen.out / "frontier")
    frame = result.to_pandas()
    shown = frame[[column for column in frame if not str(column).endswith(("_low", "_high"))]]
    print(f"\n{recipe.builder.__name__} at the output of block {layer}\n{result.summary}")
    print("\nwhat is written, and how far neutral texts move (judge: good feelings less bad ones)")
    print(shown.round(3).to_string(index=False, na_rep=""))

    print(f"\n{len(fresh.questions)} questions: all good feelings against all bad ones; what a token of stories costs")
    base, costs = answered(model, fresh), steering.cross_entropy(model, fresh.neutral)
    print(f"  unsteered: {base}; {estimate(costs)} nats")
    for multiplier in (-most, most):
        with vector.apply(model, multiplier):
            moved, paid = answered(model, fresh), steering.cross_entropy(model, fresh.neutral) - costs
        gains = ", ".join(f"{metric.upper()} {moved.gain(base, metric)}" for metric in ("mc1", "mc2"))
        print(f"  multiplier {multiplier:+g}: gain of {gains}; {estimate(paid)} nats more")

    texts = cast(dict[str, list[list[str]]], result.settings["texts"])["vector"]
    for number in range(0, len(fresh.triples), max(1, len(fresh.triples) // 3)):
        print(f"\n{fresh.triples[number][0]}")
        for multiplier, said in zip(result.multipliers, texts, strict=True):
            print(f"  {multiplier:+g}: {' '.join(said[number].split())}")


def read(path: Path) -> list[str]:
    """Stories of a JSON list, or of a text file."""
    if ".json" not in path.suffixes:
        return erasure.read_texts(path)
    content = lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
    return [str(story) for story in json.loads(content)]


def cases(stories: Sequence[str], most: int | None = None) -> Cases:
    """The prompt before the first feeling of each story, and the beginnings of stories without one; at most so many
    of each kind."""
    found: dict[bool, list[str]] = {True: [], False: []}
    neutral = []
    for story in (" ".join(story.split()) for story in stories):
        hit = FELT.search(story)
        if hit is None:
            neutral.append(story[: 2 * LONGEST])
            continue
        begins = (match.end() for match in BEGINS.finditer(story, 0, hit.start()))
        near = next((begin for begin in begins if hit.end() - begin <= LONGEST), None)
        if near is not None:
            found[hit[1] in GOOD].append(story[near : hit.end()])
    n = min(len(found[True]), len(found[False]), most or len(stories))
    return Cases(tuple(found[True][:n]), tuple(found[False][:n]), tuple(neutral[:most]))


def recipes(made: Cases) -> dict[str, Recipe]:
    """Builders by name: some see prompts before good and bad feelings, some the words themselves."""
    prompts = list(zip(made.good, made.bad, strict=True))
    words = [(prompt + good, prompt + bad) for prompt, good, bad in made.triples]
    few = made.triples[:: max(1, len(made.triples) // 16)]
    return {
        "mean difference of prompts": Recipe(steering.mean_difference, prompts),
        "mass mean of prompts": Recipe(steering.mass_mean, prompts),
        "mean difference of words": Recipe(steering.mean_difference, words),
        "GrAInS": Recipe(steering.grains, few, {"k": 5, "positions": "prompt_last", "tolerance": 0.05}),
    }


def feelings(texts: Sequence[str]) -> list[float]:
    """Good feelings less bad ones that each text names."""

    def count(text: str, words: Sequence[str]) -> int:
        return len(re.findall(rf"\b(?:{'|'.join(words)})\b", text))

    return [float(count(text, GOOD) - count(text, BAD)) for text in texts]


def answered(model: HookedModel, tested: Cases) -> steering.MultipleChoice:
    """Good feelings as right answers."""
    return steering.multiple_choice(model, tested.questions, template="{question}")


def save(result: steering.SteeringSweep | steering.SteeringEvaluation, path: Path, axes: Axes) -> None:
    """The numbers, as they are and as a table, and the picture."""
    result.save(path.with_suffix(".safetensors"))
    result.to_pandas().to_csv(path.with_suffix(".csv"), index=False)
    draw.save(axes.figure, path)


if __name__ == "__main__":
    main()
