r"""Does a method point at the evidence? Metrics of relevance against words that are known to decide.

With relevance $R$ over the words that count, $G$ the evidence among them, and ties broken against the evidence,

$$\mathrm{rank}(g) = 1 + |\{j \notin G : R_j \ge R_g\}| + |\{g' \in G \text{ before } g\}|, \qquad
r = \min_{g \in G} \mathrm{rank}(g)$$

$$\mathrm{PG}_k = [r \le k], \quad \mathrm{MRR} = \frac1r, \quad
\mathrm{RMA} = \frac{\sum_{g \in G} R_g^+}{\sum_j R_j^+}, \quad
\mathrm{RRA} = \frac{|\{g : \mathrm{rank}(g) \le |G|\}|}{|G|}$$

Relevance is signed: a word that speaks against the answer ranks below one that says nothing. A sample with relevance
that is not finite has no value (NaN), and none has RMA where no word has positive relevance. Rows are samples, padded
with words that do not count.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.special import comb

from mechattr.errors import EmptyTaskError, SettingError

Relevance = Float[np.ndarray, "sample word"]
Words = Bool[np.ndarray, "sample word"]
Values = Float[np.ndarray, " sample"]


def ranks(relevance: Relevance, evidence: Words, counted: Words) -> Float[np.ndarray, "sample word"]:
    """The rank of each word, from 1; evidence comes last among equals. Words that do not count have infinite rank, and
    a sample with relevance that is not finite is NaN throughout.

    Raises:
        SettingError: arrays of different shapes.
        EmptyTaskError: a sample without evidence among the words that count.
    """
    if not relevance.shape == evidence.shape == counted.shape:
        found = f"shapes {relevance.shape}, {evidence.shape} and {counted.shape}"
        raise SettingError("the rank of evidence", found, "give one value a sample and word")
    without = np.flatnonzero(~(evidence & counted).any(1))
    if without.size:
        found = f"sample {without[0]} has none among the words that count ({without.size} such samples)"
        raise EmptyTaskError("the rank of evidence", found, "leave these samples out")
    order = np.lexsort((evidence, -relevance, ~counted), axis=-1)
    rank = np.empty(relevance.shape)
    np.put_along_axis(rank, order, np.arange(1.0, relevance.shape[1] + 1)[None], axis=1)
    rank[~counted] = np.inf
    rank[(~np.isfinite(relevance) & counted).any(1)] = np.nan
    return rank


def pointing_game(relevance: Relevance, evidence: Words, counted: Words, k: int = 1) -> Values:
    """PG_k: 1 where evidence is among the k words of largest relevance, else 0."""
    best = _best(relevance, evidence, counted)
    return np.where(np.isnan(best), np.nan, best <= k)


def reciprocal_rank(relevance: Relevance, evidence: Words, counted: Words) -> Values:
    """1 / rank of the best evidence; its mean over samples is MRR."""
    return 1.0 / _best(relevance, evidence, counted)


def relevance_mass(relevance: Relevance, evidence: Words, counted: Words) -> Values:
    """RMA: the share of the positive relevance that lies on evidence; NaN where there is none."""
    undefined = np.isnan(_best(relevance, evidence, counted))
    positive = np.where(counted, np.maximum(np.nan_to_num(relevance), 0.0), 0.0)
    total = positive.sum(1)
    share = np.divide((positive * evidence).sum(1), total, out=np.full(len(total), np.nan), where=total > 0)
    return np.where(undefined, np.nan, share)


def rank_accuracy(relevance: Relevance, evidence: Words, counted: Words) -> Values:
    """RRA: the share of the |G| words of largest relevance that are evidence."""
    found = ranks(relevance, evidence, counted)
    marked = evidence & counted
    size = marked.sum(1)
    share = (marked & (found <= size[:, None])).sum(1) / size
    return np.where(np.isnan(found).any(1), np.nan, share)


def _best(relevance: Relevance, evidence: Words, counted: Words) -> Values:
    """The rank of the best evidence."""
    return np.where(evidence & counted, ranks(relevance, evidence, counted), np.inf).min(1)


METRICS: Mapping[str, Callable[[Relevance, Words, Words], Values]] = MappingProxyType(
    {
        "PG_1": pointing_game,
        "PG_2": lambda relevance, evidence, counted: pointing_game(relevance, evidence, counted, 2),
        "MRR": reciprocal_rank,
        "RMA": relevance_mass,
        "RRA": rank_accuracy,
    }
)


def chance(n_words: Int[np.ndarray, " sample"], n_evidence: Int[np.ndarray, " sample"]) -> dict[str, Values]:
    r"""What each metric is on average when words are ranked at random, without ties:

    $$\mathrm{PG}_k = 1 - \binom{n - g}{k} \Big/ \binom{n}{k}, \qquad
    \mathrm{MRR} = \sum_{r=1}^{n} \frac1r \binom{n - r}{g - 1} \Big/ \binom{n}{g}, \qquad
    \mathrm{RMA} = \mathrm{RRA} = \frac{g}{n}$$

    RMA holds for any positive relevance that is dealt out at random.

    Args:
        n_words: n, the words that count.
        n_evidence: g of them, at least 1.
    """
    n, g = np.asarray(n_words), np.asarray(n_evidence)
    rank = np.arange(1, n.max(initial=1) + 1)[None]
    first = comb(n[:, None] - rank, g[:, None] - 1) / comb(n, g)[:, None]  # chance that the best evidence has this rank
    pointing = {f"PG_{k}": 1 - comb(n - g, k) / comb(n, np.minimum(k, n)) for k in (1, 2)}
    return {**pointing, "MRR": (first / rank).sum(1), "RMA": g / n, "RRA": g / n}
