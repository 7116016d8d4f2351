"""Evaluations: what a vector does to a behaviour and to everything else, beside controls."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

from mechattr.errors import SettingError
from mechattr.labelled import Labelled
from mechattr.models.base import Batch, HookedModel
from mechattr.provenance import provenance
from mechattr.steering.controls import mean_lengths, random_like, random_of
from mechattr.steering.evaluation import SteeringEvaluation
from mechattr.steering.gates import Gate, digest_of
from mechattr.steering.numbers import check_count
from mechattr.steering.operators import Operation
from mechattr.steering.preference import Triples
from mechattr.steering.prompted import Steering, Where, check_steering, check_where
from mechattr.steering.scored import MULTIPLIERS, check_multipliers, items, names_of, texts
from mechattr.steering.stacked import Steered
from mechattr.steering.vector import SteeringVector
from mechattr.steering.written import Judge, Writing, check_room
from mechattr.tasks.task import Task

BY = ("condition", "multiplier")


def evaluate(
    model: HookedModel,
    vector: Steering,
    triples: Triples | Task,
    *,
    multipliers: Sequence[float] = MULTIPLIERS,
    positions: Where = "all",
    operator: str | Operation = "add",
    gate: Gate | Callable[[Batch], Any] | None = None,
    neutral: Sequence[str] = (),
    random: int = 3,
    shuffled: Steering | None = None,
    prompting: str | None = None,
    generate: int = 0,
    judge: Judge | None = None,
    seed: int = 0,
    batch_size: int = 32,
    progress: bool | None = None,
) -> SteeringEvaluation:
    r"""The propensity to a behaviour under a vector and under its controls, and what else changes.

    $$s(x) = \log p(y_+ | x) - \log p(y_- | x)$$

    Steerability is the mean over items of the least-squares slope of s against the multiplier, and an item with a
    negative slope is anti-steerable. Runs begin at the first block that a vector changes; see `sweep`.

    Args:
        model: a causal language model.
        vector: directions at sites of this model, or a function of the state, such as `reft` makes.
        triples: (prompt, answer that matches the behaviour, answer that does not): the items; better not those that
            the vector was made from. Or a task, whose own metric on its clean prompts then takes the place of the
            propensity.
        multipliers: different numbers.
        positions, operator, gate, neutral, batch_size, progress: as for `sweep`.
        random: how many random vectors of equal length stand beside it, at least 1. A function of the state has those
            of the mean length of what it adds to the items.
        shuffled: a vector from shuffled labels, of `mechattr.steering.shuffled`, to stand beside it.
        prompting: a text in front of each prompt, without steering, to be compared with; it ends in a space where there
            is to be one.
        generate: how many tokens are written to each prompt, greedily, under each condition and multiplier; 0 is none.
        judge: what gives each of a list of continuations a number, such as a classifier; called once for each
            condition and multiplier, with the continuations in the order of the items.
        seed: of the random vectors.

    Raises:
        SettingError: triples, multipliers, positions or texts that do not fit, no random vector, or a judge without
            texts or without numbers.
        EmptyTaskError: a task without pairs.
        UnknownNameError: no such operator.
        MismatchError: a vector of another model.
        NonFiniteError: a steered run has NaN or infinity; sites and multipliers are named.
        UnsupportedFeatureError: a model that does not predict next tokens.

    Cost:
        2 forward passes a triple (1 a pair of a task) and 1 a neutral text, and for each condition and multiplier as
        many through the blocks from the first one that changes; of random vectors beyond the first, no neutral texts.
        2 a triple for prompting, and for the lengths of a function of the state. For each text that is written a pass
        for its perplexity, beside its generation, which `settings["passes"]` does not count and `settings["written"]`
        does, in tokens at most.

    References:
        Tan et al. (2024), Analyzing the Generalization and Reliability of Steering Vectors, arXiv 2407.12404.
    """
    numbers = check_multipliers(multipliers)
    check_where(positions, operator, gate)
    check_count("batch_size", batch_size)
    check_steering("vector", vector)
    if shuffled is not None:
        check_steering("shuffled", shuffled)
    triples = list(triples) if isinstance(triples, Iterator) else triples  # they are read more than once
    _check(triples, random, generate, judge, prompting, seed)
    how = (numbers, positions, operator, gate, batch_size, progress)
    measured = items(model, triples)
    prompted = None
    if prompting is not None and not isinstance(triples, Task):
        prompted = items(model, [(prompting + prompt, *rest) for prompt, *rest in triples])
    for one in (measured, prompted) if generate else ():
        if one is not None:
            check_room(model, one.prompts, generate)
    first, *more = _random(model, vector, measured.rows.batch, range(seed, seed + random), batch_size)
    conditions: dict[str, Steering] = {"vector": vector, "random": first}
    conditions |= {} if shuffled is None else {"shuffled": shuffled}
    scores = Steered(model, [*conditions.values(), *more], *how).scores(measured.rows, measured.measure)
    found, n = measured.values(scores.steered), len(conditions)
    forward = scores.forward + (0 if isinstance(vector, SteeringVector) else len(measured.rows.batch))
    coords: dict[str, Any] = {"condition": tuple(conditions), "multiplier": names_of(numbers)}
    draws = found[[1, *range(n, len(found))]]
    tensors = {
        "propensity": Labelled(found[:n].clone(), (*BY, "item"), coords),
        "base": Labelled(measured.values(scores.base), ("item",)),
        "random": Labelled(draws, ("draw", "multiplier", "item"), {"multiplier": coords["multiplier"]}),
    }
    if neutral:
        side = Steered(model, list(conditions.values()), *how).scores(texts(model, neutral, positions), "KL")
        tensors["kl"] = Labelled(side.steered, (*BY, "text"), coords)
        forward += side.forward
    if prompted is not None:
        alone = Steered(model, [], *how).scores(prompted.rows, "prompting")
        tensors["prompting"] = Labelled(prompted.values(alone.base), ("item",))
        forward += alone.forward
    said: dict[str, list[list[str]]] = {}
    if generate:
        writing = Writing(model, numbers, positions, operator, gate, generate, judge, batch_size, progress)
        wrote = writing(list(conditions.values()), measured.prompts)
        for name, values in wrote.measures.items():
            table = values.unflatten(0, (n, len(numbers)))
            tensors[name] = Labelled(table, (*BY, "item")[: table.ndim], coords)
        said = {name: wrote.texts[i * len(numbers) :][: len(numbers)] for i, name in enumerate(conditions)}
        if prompted is not None:
            wrote = writing([None], prompted.prompts)
            for name, values in wrote.measures.items():
                tensors[f"prompting_{name}"] = Labelled(values[0].clone(), ("item",)[: values.ndim - 1])
            said["prompting"] = wrote.texts
    n_texts = sum(len(row) for rows in said.values() for row in rows)
    settings: dict[str, Any] = {
        "method": "evaluate",
        "measure": {"name": measured.measure, "unit": measured.unit},
        "multipliers": numbers,
        "positions": positions,
        "operator": operator if isinstance(operator, str) else getattr(operator, "__qualname__", "function"),
        "gate": digest_of(gate) or None,
        "norms": {name: one.norms() for name, one in conditions.items() if isinstance(one, SteeringVector)},
        "prompting": prompting,
        "texts": said,
        "written": generate * n_texts,
        "seed": seed,
        "passes": {"forward": forward + n_texts, "backward": 0.0},
    }
    stamp = provenance({**asdict(model.info), **model.fingerprint()}, seed=seed, tokens=measured.rows.batch.content)
    return SteeringEvaluation(tensors, settings=settings, provenance=stamp)


def _random(
    model: HookedModel, vector: Steering, batch: Batch, seeds: Iterable[int], batch_size: int
) -> list[SteeringVector]:
    if isinstance(vector, SteeringVector):
        return [random_like(vector, seed) for seed in seeds]
    lengths = mean_lengths(model, vector, batch, batch_size=batch_size)
    return [random_of(model, lengths, seed) for seed in seeds]


def _check(triples: Any, random: Any, generate: Any, judge: Any, prompting: Any, seed: Any) -> None:
    for name, number, first in (("random", random, 1), ("generate", generate, 0)):
        if isinstance(number, bool) or not isinstance(number, int) or number < first:
            raise SettingError(f"{name}={number!r}", "no such number", f"give a whole number from {first}")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise SettingError(f"seed={seed!r:.60}", "no seed", "give a whole number")
    if judge is not None and not (callable(judge) and generate):
        found = "no texts to judge" if callable(judge) else f"a {type(judge).__name__}"
        raise SettingError("judge", found, "give a function of texts, and generate= tokens")
    if prompting is not None and (isinstance(triples, Task) or not isinstance(prompting, str)):
        found = "a task, whose prompts are tokens" if isinstance(triples, Task) else f"a {type(prompting).__name__}"
        raise SettingError("prompting", found, "give triples, and a text")
