"""Information flow routes: from a prediction down to the tokens, along the parts that make up each node."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechattr.artifact import Cache
from mechattr.decomposition.parts import attention_parts, attention_sites, mlp_parts, mlp_sites
from mechattr.decomposition.prompt import Prompt, prompt_of
from mechattr.decomposition.routes import KINDS, Routes
from mechattr.decomposition.shares import (
    Shares,
    attention_shares,
    mlp_shares,
    neuron_parts,
    neuron_shares,
    neuron_sites,
)
from mechattr.decomposition.target import columns_of
from mechattr.errors import SettingError
from mechattr.labelled import Labelled
from mechattr.models.base import Batch, HookedModel
from mechattr.models.tokenize import decode_token
from mechattr.sites import full_name

Columns = dict[str, Tensor]
_ATTENTION, _MLP, _RESIDUAL, _BIAS = (KINDS.index(kind) for kind in ("attention", "mlp", "residual", "bias"))


def information_flow_routes(
    model: HookedModel,
    prompt: str | Sequence[str] | Batch,
    *,
    position: int = -1,
    threshold: float = 0.04,
    top_k: int | None = None,
    renormalise: bool = False,
    neurons: bool = False,
    compat: bool = False,
) -> Routes:
    """The part of the network through which information reached a prediction, from one forward pass.

    Each place of the residual stream is a sum y of parts z: what each head moves from each token, or what the MLP
    writes; the stream that passes by; the output bias. With prox(z, y) = max(0, |y| - |y - z|), L1 norms, the part's
    share is prox(z, y) / sum of prox over all parts of y. From the last layer at `position` the graph is followed
    downward along parts whose share reaches the threshold, and only places that are reached are looked at. What
    follows the last layer does not enter: routes have a position and no target.

    Args:
        model: a hooked model.
        prompt: a text, texts or a batch; each prompt has its own graph.
        position: where the prediction is made, counted from 0 or, if negative, from the row's end.
        threshold: least share of an edge, from 0 (all edges) to 1. A node without such a part keeps its largest one.
        top_k: at most so many edges into each node, of those at the threshold.
        renormalise: give the kept parts of each node the sum 1. Which parts are kept does not depend on it.
        neurons: take the neurons of each MLP as parts of their own, and its bias as a bias.
        compat: the choices of the published tool: proximities of at least 1e-5, 1e-6 added to each difference, the
            bias in no part, and heads summed, with the residual edge, before the threshold decides about an edge (after
            it has decided about heads, too, if `renormalise`).

    Returns:
        The graphs. A node of which no part points the way of the sum counts as all residual; `settings["clipped"]`
        has their number.

    Raises:
        SettingError: a threshold, `top_k` or position that cannot be.
        UnsupportedFeatureError: an encoder-decoder model; neurons of a mixture of experts.

    Cost:
        1 forward pass a prompt, with the attention patterns of all layers in memory, and O(nodes x tokens x heads x
        d_model) operations for the nodes that are reached.

    Source:
        Ferrando and Voita 2024, Information Flow Routes, arXiv:2403.00824.
    """
    rule = _rule(threshold, top_k, renormalise, compat)
    given = prompt_of(model, prompt)
    top = columns_of(given, position)
    run = model.run(given.batch, record=_sites(model, neurons))
    walk = _Walk(model, given, run.activations, rule, neurons)
    columns = walk.edges(top)
    order = columns["batch"].argsort(stable=True)
    absent = {"batch": given.single, "head": compat, "neuron": not neurons}
    tensors = {
        name: Labelled(values[order].cpu(), ("edge",)) for name, values in columns.items() if not absent.get(name)
    }
    chances, guesses = _last(run.logits, top).max(-1)
    settings = given.settings(
        method="information_flow_routes",
        passes=(len(given), 0),
        threshold=float(threshold),
        top_k=top_k,
        renormalise=renormalise,
        compat=compat,
        position=top.tolist(),
        prediction=[decode_token(model.tokenizer, token) for token in guesses.tolist()],
        probability=chances.tolist(),
        clipped=list(walk.clipped),
        n_layers=model.info.n_layers,
        n_heads=model.info.n_heads,
        parallel=model.info.parallel,
    )
    return Routes(tensors, settings=settings, provenance=given.provenance(model))


@dataclass(frozen=True, slots=True)
class _Rule:
    """Which parts are kept, and with what weight."""

    threshold: float
    top_k: int | None
    renormalise: bool
    compat: bool

    def keep(self, weights: Float[Tensor, "node part"], real: Bool[Tensor, "node part"]) -> Bool[Tensor, "node part"]:
        """The parts of each node that are kept: all at the threshold, or the first largest one."""
        weights = weights.masked_fill(~real, -1.0)
        largest = weights == weights.amax(1, keepdim=True)
        chosen = (weights >= self.threshold) | (largest & (largest.cumsum(1) == 1))
        if self.top_k is not None:
            places = weights.argsort(dim=1, descending=True, stable=True)[:, : self.top_k]
            chosen &= torch.zeros_like(chosen).scatter(1, places, True)
        return chosen & real


def _rule(threshold: float, top_k: int | None, renormalise: bool, compat: bool) -> _Rule:
    number = isinstance(threshold, int | float) and not isinstance(threshold, bool)
    if not number or not 0 <= threshold <= 1:
        raise SettingError(f"threshold={threshold!r}", "no share of a whole", "give a number from 0 to 1")
    if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1):
        raise SettingError(f"top_k={top_k!r}", "no number of edges", "give a whole number from 1, or None")
    return _Rule(float(threshold), top_k, renormalise, compat)


def _sites(model: HookedModel, neurons: bool) -> list[str]:
    found: dict[str, None] = {}
    for layer in range(model.info.n_layers):
        found |= dict.fromkeys(attention_sites(model, layer))
        if neurons:
            found |= dict.fromkeys(neuron_sites(model, layer))
        elif _has_mlp(model, layer):
            found |= dict.fromkeys(mlp_sites(model, layer))
    return list(found)


def _has_mlp(model: HookedModel, layer: int) -> bool:
    return full_name("mlp_out", layer) in model.sites()


def _last(logits: Float[Tensor, "batch pos d_vocab"], at: Tensor) -> Float[Tensor, "batch d_vocab"]:
    here = logits[torch.arange(len(logits), device=logits.device), at.to(logits.device)]
    return here.to(torch.promote_types(here.dtype, torch.float32)).softmax(-1)


class _Walk:
    """The way down: which places are reached, layer by layer, and the edges into them."""

    def __init__(self, model: HookedModel, prompt: Prompt, activations: Cache, rule: _Rule, neurons: bool) -> None:
        self.model, self.prompt, self.activations, self.rule, self.neurons = model, prompt, activations, rule, neurons
        self.lengths = prompt.batch.lengths.tolist()
        self.clipped = [0] * len(prompt)

    def edges(self, top: Tensor) -> Columns:
        """All edges from the top down; those of one prompt follow each other within each half of a block."""
        post = torch.zeros_like(self.prompt.batch.mask)
        post[torch.arange(len(top), device=top.device), top] = True
        found: list[Columns] = []
        for layer in reversed(range(self.model.info.n_layers)):
            edges, mid, below = self._mlp(layer, post)
            found += edges
            edges, post = self._attention(layer, mid)
            found += edges
            post |= below
        return {name: torch.cat([part[name] for part in found]) for name in found[0]}

    def _mlp(self, layer: int, post: Tensor) -> tuple[list[Columns], Tensor, Tensor]:
        """Edges into `resid_post`, and which `resid_mid` they reach; an MLP that reads what the attention beside it
        reads reaches the `resid_post` of the block below."""
        has_mlp, parallel = _has_mlp(self.model, layer), self.model.info.parallel
        parts = mlp_parts(self.model, self.activations, layer) if has_mlp else None
        by_neuron = neuron_parts(self.model, self.activations, layer, parts) if parts and self.neurons else None
        biased = parts is not None and bool((by_neuron or parts).bias.any())
        found, mid, below = [], torch.zeros_like(post), torch.zeros_like(post)
        for row, nodes in _by_prompt(post):
            if parts is None:  # what attention left is what the block leaves
                one = torch.ones(len(nodes), device=nodes.device)
                shares = Shares(one[:, None, None] * 0, one, one * 0, 0)
            elif by_neuron is None:
                shares = mlp_shares(parts, row, nodes, self.rule.compat)
            else:
                shares = neuron_shares(parts, by_neuron, row, nodes, self.rule.compat)
            here = torch.full((len(nodes), 1), has_mlp, device=post.device)
            edges = self._edges(shares, (row, layer, 1), nodes, here, biased)
            mid[row, edges["key"][edges["kind"] == _RESIDUAL]] = True
            (below if parallel else mid)[row, edges["key"][edges["kind"] == _MLP]] = True
            found.append(edges)
        return found, mid, below

    def _attention(self, layer: int, mid: Tensor) -> tuple[list[Columns], Tensor]:
        """Edges into `resid_mid`, and which `resid_post` of the block below they reach."""
        parts = attention_parts(self.model, self.activations, layer)
        biased = bool(parts.bias.any())
        found, below = [], torch.zeros_like(mid)
        for row, nodes in _by_prompt(mid):
            length = self.lengths[row]
            shares = attention_shares(parts, row, nodes, length, self.rule.compat)
            keys = torch.arange(length, device=nodes.device)
            seen = (keys <= nodes[:, None]) | parts.pattern[row, :, nodes, :length].any(0)
            edges = self._edges(shares, (row, layer, 0), nodes, seen, biased)
            below[row, edges["key"][edges["kind"] != _BIAS]] = True
            found.append(edges)
        return found, below

    def _edges(
        self, shares: Shares, place: tuple[int, int, int], nodes: Tensor, seen: Bool[Tensor, "node key"], biased: bool
    ) -> Columns:
        """The edges that are kept into some nodes of one prompt; `place` is its row, the layer and the half."""
        row, layer, half = place
        self.clipped[row] += shares.clipped
        (n, n_parts, n_keys), weights = shares.moved.shape, shares.flat
        real = torch.cat([seen.repeat(1, n_parts), seen.new_ones(n, 2)], 1)
        real[:, -1] = biased and not self.rule.compat
        kept = self.rule.keep(weights, real)
        if self.rule.renormalise:
            weights, real = weights * kept, kept
            weights = weights / weights.sum(1, keepdim=True)
        if self.rule.compat and half == 0:
            n_parts, weights, real = 1, *_merged(weights, real, nodes, n_keys)
            kept = self.rule.keep(weights, real)
        node, part = kept.nonzero(as_tuple=True)
        moved = part < n_parts * n_keys
        query = nodes[node]
        columns = {
            "batch": torch.full_like(query, row),
            "layer": torch.full_like(query, layer),
            "into": torch.full_like(query, half),
            "query": query,
            "key": torch.where(moved, part % n_keys, query) if half == 0 else query,
            "kind": torch.where(moved, _MLP if half else _ATTENTION, part - n_parts * n_keys + _RESIDUAL),
        }
        which = torch.where(moved, part // n_keys, -1)
        none = torch.full_like(which, -1)
        columns |= {"head": none, "neuron": which} if half else {"head": which, "neuron": none}
        return {**columns, "weight": weights[node, part]}


def _by_prompt(reached: Bool[Tensor, "batch pos"]) -> Iterator[tuple[int, Tensor]]:
    """The rows with places that are reached, and these places."""
    for row, places in enumerate(reached):
        nodes = places.nonzero()[:, 0]
        if len(nodes):
            yield row, nodes


def _merged(
    weights: Float[Tensor, "node part"], real: Bool[Tensor, "node part"], nodes: Tensor, n_keys: int
) -> tuple[Tensor, Tensor]:
    """Parts by key: heads summed, and the stream that passes by added to each node's own key."""
    at = torch.arange(len(nodes), device=nodes.device)
    found = weights[:, :-2].unflatten(1, (-1, n_keys)).sum(1)
    known = real[:, :-2].unflatten(1, (-1, n_keys)).any(1)
    found[at, nodes] += weights[:, -2]
    known[at, nodes] |= real[:, -2]
    return torch.cat([found, found.new_zeros(len(at), 2)], 1), torch.cat([known, known.new_zeros(len(at), 2)], 1)
