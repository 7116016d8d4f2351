"""Directional ablation: one direction for the whole network, chosen among layers and positions by what it does."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mechattr.engines.moments import Moments
from mechattr.errors import SettingError
from mechattr.models.base import Batch, HookedModel
from mechattr.sites import full_name, parse
from mechattr.steering.data import check_pairs, chosen_sites, picked
from mechattr.steering.made import Pairs, made
from mechattr.steering.numbers import check_count, check_share
from mechattr.steering.vector import SteeringVector

WRITES = ("resid_pre", "attn_out", "mlp_out")  # where the direction is taken away


def refusal(
    model: HookedModel,
    pairs: Pairs,
    *,
    tokens: Sequence[int],
    layers: Sequence[int] | None = None,
    positions: Sequence[int] = (-1,),
    seed: int = 0,
    batch_size: int = 16,
    held_out: float = 0.2,
    deepest: float = 0.8,
    max_kl: float = 0.1,
    min_induced: float = 0.0,
) -> SteeringVector:
    r"""The difference of means h(positive) - h(negative) at the input of one block and one position, put at every place
    that the stream is read from or written to, for `apply(model, operator="ablate")`.

    Candidates are all pairs of a layer and a position. With $s = \log p - \log(1 - p)$, p the probability of the
    `tokens` behind the text, the one is chosen that, on held-out pairs, makes s of positive texts smallest when it is
    ablated everywhere. It must move the predictions for negative texts by a KL divergence of at most `max_kl` then, and
    bring their s to at least `min_induced` when it is added at its block.

    Args:
        model: a hooked model.
        pairs: (text that shows the behaviour, text that does not); for refusal harmful and harmless instructions.
        tokens: ids with which the behaviour begins, such as that of " I" for refusals.
        layers: blocks whose input is a candidate; by default those below the share `deepest` of all.
        positions: candidates, counted from the end of the text (or from its start, where they are not negative).
        seed: of the choice of held-out pairs.
        batch_size: rows of a forward pass.
        held_out: the share of pairs on which candidates are judged.
        deepest, max_kl, min_induced: limits of candidates.

    Raises:
        SettingError: fewer than 2 pairs, numbers, layers, positions or tokens that do not fit, or no candidate that
            keeps the limits.

    Cost:
        2 forward passes a pair, and for each candidate 3 a held-out pair.

    References:
        Arditi, Obeso, Syed, Paleka, Panickssery, Gurnee, Nanda (2024), Refusal in Language Models Is Mediated by a
        Single Direction, arXiv 2406.11717.
    """
    given, wanted = check_pairs(pairs), _tokens(model, tokens)
    for name, value in {"deepest": deepest, "max_kl": max_kl, "min_induced": min_induced}.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise SettingError(f"{name}={value!r}", f"a {type(value).__name__}", "give a number")
    check_count("batch_size", batch_size)
    check_share("held_out", held_out)
    if len(given) < 2:
        raise SettingError("held-out pairs", "one pair", "give more")
    if isinstance(positions, str | int) or not positions:
        raise SettingError(f"positions={positions!r}", "no list of positions", "give candidates, such as [-1, -2]")
    n = model.info.n_layers
    possible = [parse(name)[1] for name in chosen_sites(model, range(n) if layers is None else layers, None)]
    names = [full_name("resid_pre", x) for x in possible if x is not None and x < deepest * n]
    if not names:
        raise SettingError(f"layers={layers}", f"none below {deepest} of {n}", "name lower layers, or raise deepest")
    order = torch.randperm(len(given), generator=torch.Generator().manual_seed(seed)).tolist()
    kept = min(len(given) - 1, max(1, round(held_out * len(given))))
    test, train = ([given[i] for i in part] for part in (order[:kept], order[kept:]))
    differences = _differences(model, train, names, list(positions), batch_size)
    judge = _Judge(model, test, wanted, batch_size)
    candidates = [judge(name, p, d) for (name, p), d in differences.items() if bool(d.any())]
    fitting = [c for c in candidates if c.kl <= max_kl and c.induced >= min_induced]
    if not candidates:
        found = f"no difference at the positions {list(positions)}"
        raise SettingError("a direction of refusal", found, "give pairs that differ there, or other positions")
    if not fitting:
        least = min(c.kl for c in candidates)
        found = f"{len(candidates)} candidates, KL from {least:.3g}, none within the limits"
        fix = "relax a limit, or give more candidates"
        raise SettingError(f"max_kl={max_kl}, min_induced={min_induced}", found, fix)
    best = min(fitting, key=lambda c: c.ablated)
    record = [{**c.settings(), "fits": c in fitting} for c in candidates]
    directions = dict.fromkeys(_everywhere(model), best.direction)
    return made(
        model, "refusal", directions, None, seed, n_pairs=len(given), held_out=held_out, deepest=deepest, max_kl=max_kl,
        min_induced=min_induced, tokens=list(tokens), chosen=best.settings(), candidates=record,
    )  # fmt: skip


@dataclass(frozen=True, eq=False, slots=True)
class _Candidate:
    site: str
    position: int
    direction: Float[Tensor, " d_model"]
    ablated: float
    kl: float
    induced: float

    def settings(self) -> dict[str, Any]:
        """What is kept of it."""
        numbers = {"ablated": self.ablated, "kl": self.kl, "induced": self.induced}
        return {"layer": parse(self.site)[1], "position": self.position, **numbers}


class _Judge:
    """What candidates do to held-out texts."""

    def __init__(self, model: HookedModel, pairs: Pairs, tokens: list[int], batch_size: int) -> None:
        self.model, self.tokens = model, tokens
        parts = [pairs[i : i + batch_size] for i in range(0, len(pairs), batch_size)]
        self.positive, self.negative = ([model.tokenize([pair[s] for pair in part]) for part in parts] for s in (0, 1))
        self.base = self._log_p(self.negative)

    def __call__(self, site: str, position: int, direction: Tensor) -> _Candidate:
        whole = SteeringVector.of(dict.fromkeys(_everywhere(self.model), direction))
        with whole.apply(self.model, operator="ablate"):
            ablated, after = self._score(self._log_p(self.positive)), self._log_p(self.negative)
        kl = float((self.base.exp() * (self.base - after)).sum(-1).mean())
        with SteeringVector.of({site: direction}).apply(self.model):
            induced = self._score(self._log_p(self.negative))
        return _Candidate(site, position, direction, ablated, kl, induced)

    def _log_p(self, batches: list[Batch]) -> Float[Tensor, "row d_vocab"]:
        """Log-probabilities behind the texts, in float64."""
        logits = [picked(self.model.run(batch).logits, batch, "last").double() for batch in batches]
        return torch.cat(logits).log_softmax(-1)

    def _score(self, log_p: Float[Tensor, "row d_vocab"]) -> float:
        others = [token for token in range(log_p.shape[1]) if token not in set(self.tokens)]
        return float((log_p[:, self.tokens].logsumexp(-1) - log_p[:, others].logsumexp(-1)).mean())


def _differences(
    model: HookedModel, pairs: Pairs, names: Sequence[str], positions: Sequence[int], batch_size: int
) -> dict[tuple[str, int], Float[Tensor, " d_model"]]:
    """The difference of means of every candidate, in float64."""
    keys = [(name, p) for name in names for p in positions]
    sides = [{key: Moments(model.info.d_model, scatter=False) for key in keys} for _ in range(2)]
    for begin in range(0, len(pairs), batch_size):
        for side, moments in enumerate(sides):
            batch = model.tokenize([pair[side] for pair in pairs[begin : begin + batch_size]])
            cache = model.run(batch, record=list(names)).activations
            for (name, p), m in moments.items():
                m.add(picked(cache[name].values, batch, p))
    return {key: sides[0][key].mean - sides[1][key].mean for key in keys}


def _everywhere(model: HookedModel) -> list[str]:
    return [name for name in model.sites() if parse(name)[0] in WRITES]


def _tokens(model: HookedModel, tokens: Sequence[int]) -> list[int]:
    given = list(dict.fromkeys(tokens)) if isinstance(tokens, Iterable) and not isinstance(tokens, str) else []
    ids = range(model.info.d_vocab)
    if not given or any(isinstance(t, bool) or not isinstance(t, int) or t not in ids for t in given):
        found = f"ids from 0 to {model.info.d_vocab - 1}"
        fix = "give the ids of tokens with which the behaviour begins"
        raise SettingError(f"tokens={tokens!r:.80}", found, fix)
    if len(given) == len(ids):
        raise SettingError("tokens", "all that there are", "give those with which the behaviour begins")
    return given
