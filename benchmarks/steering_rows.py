"""The rows of `benchmarks.steering_table`: each builder's vectors, one a layer, as long as activations are there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks.steering_data import Behaviour
from mechattr import steering
from mechattr.models.base import HookedModel
from mechattr.sites import full_name, parse
from mechattr.steering import SteeringVector
from mechattr.steering.preference import sequences

# (model, behaviour, layers, seed) -> a vector with directions in each layer
Build = Callable[[HookedModel, Behaviour, list[int], int], SteeringVector]
# what "clamp" does is here the same as "ablate_then_add": the projection on v becomes that of m v
OPERATORS = ("add", "norm_preserving", "ablate_then_add", "angular")
DRAWS, HEADS = 3, 2
TRAINING: dict[str, Any] = {"steps": 10, "rate": 0.1, "progress": False}


def _of_pairs(builder: Callable[..., SteeringVector], **settings: Any) -> Build:
    return lambda model, data, layers, seed: builder(model, data.pairs, layers=layers, seed=seed, **settings)


def _of_triples(builder: Callable[..., SteeringVector], **settings: Any) -> Build:
    return lambda model, data, layers, seed: builder(model, data.triples, layers=layers, seed=seed, **settings)


def _of_answers(model: HookedModel, data: Behaviour, layers: list[int], seed: int) -> SteeringVector:
    """The mean difference of what GrAInS sees, with no token taken away."""
    pairs = [(prompt + answer, prompt + other) for prompt, answer, other in data.triples]
    return steering.mean_difference(model, pairs, layers=layers, seed=seed)


def _act_add(model: HookedModel, data: Behaviour, layers: list[int], seed: int) -> SteeringVector:
    return steering.act_add(model, [data.words], layers=layers, seed=seed)


def _first(model: HookedModel, data: Behaviour) -> tuple[Tensor, Tensor]:
    """The first tokens of matching answers and of the others."""
    batch, starts = sequences(model, data.triples)
    yes, no = batch.tokens[torch.arange(len(batch)), batch.columns(0) + starts].split(len(data.triples))
    return yes, no


def _unembedding(model: HookedModel, data: Behaviour, layers: list[int], seed: int) -> SteeringVector:
    """The mean difference of the unembedding's columns of the answers' first tokens."""
    yes, no = (model.weight("unembed.W_U")[:, side].mean(1) for side in _first(model, data))
    return steering.from_direction(model, yes - no, layers=layers, seed=seed)


def _iti(model: HookedModel, data: Behaviour, layers: list[int], seed: int) -> SteeringVector:
    """The best heads of each layer."""
    found = [steering.iti(model, data.pairs, layers=[layer], seed=seed, heads=HEADS) for layer in layers]
    return SteeringVector.of({name: table.values for vector in found for name, table in vector.tensors.items()})


def _learned(model: HookedModel, data: Behaviour, layers: list[int], seed: int) -> SteeringVector:
    """Each layer's by itself."""
    found = [steering.learned(model, data.triples, layers=[layer], seed=seed, **TRAINING) for layer in layers]
    return SteeringVector.of({name: table.values for vector in found for name, table in vector.tensors.items()})


BEFORE = "prompt_last"
BUILDERS: dict[str, Build] = {
    "grains, behind the answer": _of_triples(steering.grains),
    "grains, before the answer": _of_triples(steering.grains, positions=BEFORE),
    "grains, before the answer, k=1, mode pos": _of_triples(steering.grains, positions=BEFORE, k=1, mode="pos"),
    "grains, before the answer, PCA": _of_triples(steering.grains, positions=BEFORE, reduce="pca_uncentered"),
    "mean_difference of answers": _of_answers,
    "mean_difference": _of_pairs(steering.mean_difference),
    "mass_mean": _of_pairs(steering.mass_mean),
    "pca, uncentred": _of_pairs(steering.pca),
    "pca, centred": _of_pairs(steering.pca, variant="centred"),
    "probe": _of_pairs(steering.probe),
    "iti": _iti,
    "act_add": _act_add,
    "unembedding": _unembedding,
    "learned": _learned,
}
FUNCTIONS = ("reft", "g_act")
RANDOM, SHUFFLED = "random, best of 3", "shuffled labels"


def functions(model: HookedModel, name: str, data: Behaviour, seed: int) -> dict[int, Any]:
    """What steers by a function of the state, at each layer: it has multipliers, but no direction and no operators."""
    layers = range(model.info.n_layers)
    if name == "g_act":
        return {layer: steering.g_act(model, data.pairs, layers=[layer], seed=seed) for layer in layers}
    training = {**TRAINING, "steps": 2 * TRAINING["steps"], "rate": TRAINING["rate"] / 2}
    return {layer: steering.reft(model, data.triples, layers=[layer], seed=seed, **training) for layer in layers}


def lengths(model: HookedModel, texts: list[str]) -> dict[str, float]:
    """The mean length of activations over the tokens of some texts, by site."""
    batch = model.tokenize(texts)
    names = [full_name(site, layer) for site in ("resid_post", "z") for layer in range(model.info.n_layers)]
    cache = model.run(batch, record=names).activations
    return {name: float(cache[name].values.flatten(2).norm(dim=-1)[batch.mask].mean()) for name in names}


def candidates(
    model: HookedModel, name: str, data: Behaviour, seed: int, length: Mapping[str, float]
) -> dict[int, SteeringVector]:
    """The vectors of one builder, each at one layer and as long as activations are there. Those of number layer + L i
    are the i-th random vector's. Those of shuffled labels keep their share of the length of those of labels."""
    layers = list(range(model.info.n_layers))
    if name in BUILDERS:
        return _apart(BUILDERS[name](model, data, layers, seed), length)
    if name == SHUFFLED:
        labelled = BUILDERS["mean_difference"](model, data, layers, seed)
        unlike = steering.shuffled(steering.mean_difference, model, data.pairs, layers=layers, seed=seed)
        scales = {site: length[site] * norm / labelled.norms()[site] for site, norm in unlike.norms().items()}
        return _apart(unlike, scales)
    like = BUILDERS["unembedding"](model, data, layers, seed)
    draws = [_apart(steering.random_like(like, DRAWS * seed + i), length) for i in range(DRAWS)]
    return {layer + len(layers) * i: vector for i, draw in enumerate(draws) for layer, vector in draw.items()}


def refusal(model: HookedModel, data: Behaviour, seed: int) -> SteeringVector:
    """One direction for the whole network, for ablation."""
    tokens = sorted(set(_first(model, data)[0].tolist()))
    return steering.refusal(model, data.pairs, tokens=tokens, seed=seed, max_kl=10.0, min_induced=-1e9)


def _apart(vector: SteeringVector, length: Mapping[str, float]) -> dict[int, SteeringVector]:
    found = {}
    for name, table in vector.tensors.items():
        size = table.values.norm(dim=-1).mean() if table.axes[0] == "pos" else table.values.norm()
        layer = parse(name)[1]
        assert layer is not None
        found[layer] = SteeringVector.of({name: table.values * (length[name] / float(size))})
    return found
