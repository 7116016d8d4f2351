"""Sweeps over layers and multipliers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from mechattr.errors import SettingError
from mechattr.labelled import Labelled
from mechattr.models.base import Batch, HookedModel
from mechattr.provenance import provenance
from mechattr.sites import parse
from mechattr.steering.evaluation import SteeringSweep
from mechattr.steering.gates import Gate, digest_of
from mechattr.steering.operators import Operation
from mechattr.steering.preference import Triples
from mechattr.steering.prompted import Steering, Where, check_where
from mechattr.steering.scored import MULTIPLIERS, check_multipliers, items, names_of, texts
from mechattr.steering.stacked import Steered
from mechattr.steering.vector import SteeringVector
from mechattr.tasks.task import Task


def sweep(
    model: HookedModel,
    vectors: SteeringVector | Mapping[int, Steering],
    triples: Triples | Task,
    *,
    layers: Sequence[int] | None = None,
    multipliers: Sequence[float] = MULTIPLIERS,
    positions: Where = "all",
    operator: str | Operation = "add",
    gate: Gate | Callable[[Batch], Any] | None = None,
    neutral: Sequence[str] = (),
    batch_size: int = 32,
    progress: bool | None = None,
) -> SteeringSweep:
    r"""The propensity to a behaviour, and KL on neutral texts, for the vector of each layer at each multiplier.

    $$s(x) = \log p(y_+ | x) - \log p(y_- | x), \qquad
    \mathrm{KL} = \frac{1}{T} \sum_t D(p_t \,\|\, p_t^{\text{steered}})$$

    Unsteered rows run once. The rows of a layer begin behind it, from the residual stream of that run, with a row for
    each multiplier; the multiplier 0 takes no run where it changes nothing. Where a run cannot begin in the middle it
    begins at the embeddings, and the result is the same: inside a block of another `apply`, and at layer 0.

    Args:
        model: a causal language model.
        vectors: one vector with directions in several layers, which are taken one layer at a time; or a vector, or
            a function of the state such as `reft` makes, for each layer, by layer.
        triples: (prompt, answer that matches the behaviour, answer that does not); better not those that the vectors
            were made from. Or a task, whose own metric on its clean prompts then takes the place of the propensity.
        layers: some of them; all by default.
        multipliers: different numbers.
        positions: `"all"`, the `"prompt"`, what is `"generated"`, the `"last"` token of the prompt, or position
            numbers, as in a generation: answers count as generated, negative numbers from the end of the prompt. A
            vector with directions of single positions acts at the first ones of prompt and answer.
        operator: as for `SteeringVector.apply`.
        gate: a condition, or a function of a batch, which decides from the prompt alone whether it is steered; of
            neutral texts from the text.
        neutral: texts that have nothing to do with the behaviour; they count as prompts, and with
            `positions="generated"` as what is generated.
        batch_size: rows of a forward pass; halved when memory runs out.
        progress: `None` shows a bar on a terminal only.

    Raises:
        EmptyTaskError: a task without pairs.
        SettingError: triples, layers, multipliers, positions or texts that do not fit.
        UnknownNameError: no such operator.
        MismatchError: vectors of another model.
        NonFiniteError: a steered run has NaN or infinity; layer and multipliers are named.
        UnsupportedFeatureError: a model that does not predict next tokens.

    Cost:
        2 forward passes a triple (1 a pair of a task) and 1 a neutral text, and for each layer and multiplier as many
        through the blocks behind the layer (for the last layer: through the last block). 1 a row for a gate.
    """
    given = _by_layer(vectors, layers)
    numbers = check_multipliers(multipliers)
    check_where(positions, operator, gate)
    steered = Steered(model, list(given.values()), numbers, positions, operator, gate, batch_size, progress)
    measured = items(model, triples)
    scores = steered.scores(measured.rows, measured.measure)
    coords: dict[str, Any] = {"layer": tuple(given), "multiplier": names_of(numbers)}
    tensors = {
        "propensity": Labelled(measured.values(scores.steered), ("layer", "multiplier", "item"), coords),
        "base": Labelled(measured.values(scores.base), ("item",)),
    }
    forward = scores.forward
    if neutral:
        side = steered.scores(texts(model, neutral, positions), "KL")
        tensors["kl"] = Labelled(side.steered, ("layer", "multiplier", "text"), coords)
        forward += side.forward
    settings: dict[str, Any] = {
        "method": "sweep",
        "measure": {"name": measured.measure, "unit": measured.unit},
        "multipliers": numbers,
        "positions": positions,
        "operator": operator if isinstance(operator, str) else getattr(operator, "__qualname__", "function"),
        "gate": digest_of(gate) or None,
        "norms": {str(k): one.norms() for k, one in given.items() if isinstance(one, SteeringVector)},
        "passes": {"forward": forward, "backward": 0.0},
    }
    stamp = provenance({**asdict(model.info), **model.fingerprint()}, tokens=measured.rows.batch.content)
    return SteeringSweep(tensors, settings=settings, provenance=stamp)


def _by_layer(vectors: Any, layers: Sequence[int] | None) -> dict[int, Steering]:
    if isinstance(vectors, SteeringVector):
        sites: dict[int, list[str]] = {}
        for name in vectors.sites:
            layer = parse(name)[1]
            if layer is None:
                found = "a direction that belongs to no layer"
                raise SettingError(f"a sweep over layers at {name}", found, "use mechattr.steering.evaluate")
            sites.setdefault(layer, []).append(name)
        by_layer: dict[int, Steering] = {layer: vectors.only(sites[layer]) for layer in sorted(sites)}
    elif isinstance(vectors, Mapping) and vectors and all(isinstance(v, Steering) for v in vectors.values()):
        by_layer = dict(vectors)
    else:
        fix = "give a vector with directions in several layers, or vectors by layer"
        raise SettingError("vectors of a sweep", f"{type(vectors).__name__}", fix)
    if layers is None:
        return by_layer
    if not isinstance(layers, Iterable):
        raise SettingError(f"layers={layers!r:.60}", f"a {type(layers).__name__}", "give a list of layers")
    missing = [layer for layer in layers if layer not in by_layer]
    if missing or not layers:
        raise SettingError(f"layers={list(layers)}", f"vectors of layers {list(by_layer)}", "name some of these")
    return {layer: by_layer[layer] for layer in layers}
