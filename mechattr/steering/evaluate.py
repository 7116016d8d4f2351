"""Evaluations: what a vector does to a behaviour and to everything else, beside controls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from mechattr.errors import SettingError
from mechattr.labelled import Labelled
from mechattr.models.base import HookedModel
from mechattr.provenance import provenance
from mechattr.steering.controls import random_like
from mechattr.steering.evaluation import SteeringEvaluation
from mechattr.steering.operators import Operation
from mechattr.steering.preference import Triples
from mechattr.steering.prompted import Where, check_where
from mechattr.steering.propensity import propensity
from mechattr.steering.scored import MULTIPLIERS, answers, check_multipliers, names_of, propensities, texts
from mechattr.steering.stacked import Steered
from mechattr.steering.vector import SteeringVector


def evaluate(
    model: HookedModel,
    vector: SteeringVector,
    triples: Triples,
    *,
    multipliers: Sequence[float] = MULTIPLIERS,
    positions: Where = "all",
    operator: str | Operation = "add",
    neutral: Sequence[str] = (),
    random: int = 3,
    shuffled: SteeringVector | None = None,
    prompting: str | None = None,
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
        vector: directions at sites of this model.
        triples: (prompt, answer that matches the behaviour, answer that does not): the items; better not those that
            the vector was made from.
        multipliers: different numbers.
        positions, operator, neutral, batch_size, progress: as for `sweep`.
        random: how many random vectors of equal length stand beside it, at least 1.
        shuffled: a vector from shuffled labels, of `mechattr.steering.shuffled`, to stand beside it.
        prompting: a text in front of each prompt, without steering, to be compared with; it ends in a space where there
            is to be one.
        seed: of the random vectors.

    Raises:
        SettingError: triples, multipliers, positions or texts that do not fit, or no random vector.
        UnknownNameError: no such operator.
        MismatchError: a vector of another model.
        NonFiniteError: a steered run has NaN or infinity; sites and multipliers are named.
        UnsupportedFeatureError: a model that does not predict next tokens.

    Cost:
        2 forward passes a triple and one a neutral text, and for each condition and multiplier as many through the
        blocks from the first one that changes; of random vectors beyond the first, no neutral texts. 2 a triple for
        prompting.

    References:
        Tan et al. (2024), Analyzing the Generalization and Reliability of Steering Vectors, arXiv 2407.12404.
    """
    numbers = check_multipliers(multipliers)
    check_where(positions, operator)
    if isinstance(random, bool) or not isinstance(random, int) or random < 1:
        raise SettingError(f"random={random!r}", "no number of vectors", "give a whole number from 1")
    conditions = {"vector": vector, "random": random_like(vector, seed)}
    conditions |= {} if shuffled is None else {"shuffled": shuffled}
    more = [random_like(vector, seed + draw) for draw in range(1, random)]
    how = (numbers, positions, operator, batch_size, progress)
    rows = answers(model, triples)
    scores = Steered(model, [*conditions.values(), *more], *how).scores(rows, "propensity")
    found, n, forward = propensities(scores.steered), len(conditions), scores.forward
    coords: dict[str, Any] = {"condition": tuple(conditions), "multiplier": names_of(numbers)}
    by_condition = ("condition", "multiplier")
    draws = found[[1, *range(n, len(found))]]
    tensors = {
        "propensity": Labelled(found[:n].clone(), (*by_condition, "item"), coords),
        "base": Labelled(propensities(scores.base), ("item",)),
        "random": Labelled(draws, ("draw", "multiplier", "item"), {"multiplier": coords["multiplier"]}),
    }
    if neutral:
        side = Steered(model, list(conditions.values()), *how).scores(texts(model, neutral, positions), "KL")
        tensors["kl"] = Labelled(side.steered, (*by_condition, "text"), coords)
        forward += side.forward
    if prompting is not None:
        prompted = [(prompting + prompt, answer, other) for prompt, answer, other in triples]
        tensors["prompting"] = Labelled(propensity(model, prompted, batch_size=batch_size).cpu(), ("item",))
        forward += 2 * len(prompted)
    settings: dict[str, Any] = {
        "method": "evaluate",
        "multipliers": numbers,
        "positions": positions,
        "operator": operator if isinstance(operator, str) else getattr(operator, "__qualname__", "function"),
        "norms": {name: one.norms() for name, one in conditions.items()},
        "prompting": prompting,
        "seed": seed,
        "passes": {"forward": forward, "backward": 0.0},
    }
    stamp = provenance({**asdict(model.info), **model.fingerprint()}, seed=seed, tokens=rows.batch.content)
    return SteeringEvaluation(tensors, settings=settings, provenance=stamp)
