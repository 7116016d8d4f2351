"""What an order of nodes is worth: how many nodes one has to verify, in that order, to have seen the truly largest.

The *cost* of a node is the number of verifications after which its effect is known: its rank in the order, or more
where the order is found while nodes are verified. One verification patches one node, or one set, in every pair.
Arrays have one entry a node; ranks count from 1.

Ties. A method's equal scores rank in the order of the nodes. Among nodes of equal true effect none is "the truly j-th":
each method is judged by the order of these nodes that suits it best, so a true tie costs nobody anything. Nodes without
an effect are never among the truly largest: `k` ends at the number of nodes that have one.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Int

from mechattr.errors import EmptyTaskError, NonFiniteError, SettingError


def order_of(scores: Float[np.ndarray, " node"]) -> Int[np.ndarray, " node"]:
    """The nodes by descending score, equal ones in their order.

    Raises:
        NonFiniteError: a score is NaN or infinite.
    """
    bad = np.flatnonzero(~np.isfinite(scores))
    if bad.size:
        raise NonFiniteError("an order of nodes", f"{bad.size} scores that are not finite", "rank measured nodes only")
    return np.argsort(-scores, kind="stable")


def ranks_of(scores: Float[np.ndarray, " node"]) -> Int[np.ndarray, " node"]:
    """The rank of each node by descending score, from 1; equal ones in their order."""
    return ranks_in(order_of(scores))


def ranks_in(order: Int[np.ndarray, " node"]) -> Int[np.ndarray, " node"]:
    """The rank of each node, from 1, in an order of all nodes.

    Raises:
        SettingError: a node is missing or comes twice.
    """
    if not np.array_equal(np.sort(order), np.arange(len(order))):
        raise SettingError("an order of nodes", "nodes that are missing or come twice", "name each node once")
    ranks = np.empty(len(order), dtype=np.int64)
    ranks[order] = np.arange(1, len(order) + 1)
    return ranks


def ranks_among(ranks: Int[np.ndarray, " node"], chosen: np.ndarray | slice) -> Int[np.ndarray, " chosen"]:
    """The ranks, from 1, of some nodes among themselves, in the order that all of them have."""
    return ranks_in(np.argsort(ranks[chosen], kind="stable"))


def truly_largest(costs: Float[np.ndarray, " node"], effects: Float[np.ndarray, " node"]) -> Int[np.ndarray, " k"]:
    """The nodes that have an effect, largest magnitude first; equal ones by the method's own costs.

    Raises:
        SettingError: not one cost for each effect.
        EmptyTaskError: no node has an effect.
        NonFiniteError: an effect is NaN or infinite.
    """
    if np.shape(costs) != np.shape(effects) or np.ndim(effects) != 1:
        raise SettingError(
            "costs and effects", f"shapes {np.shape(costs)} and {np.shape(effects)}", "one of each a node"
        )
    if not np.isfinite(effects).all():
        raise NonFiniteError("true effects", "NaN or infinity", "compare measured nodes only")
    magnitude = np.abs(effects)
    found = np.lexsort((costs, -magnitude))[: np.count_nonzero(magnitude)]
    if not found.size:
        raise EmptyTaskError("to judge an order", "no node has an effect", "use pairs whose metrics differ")
    return found


def recall_at(ranks: Int[np.ndarray, " node"], effects: Float[np.ndarray, " node"], k: int) -> float:
    """The share of the truly k largest nodes among the first k of an order.

    With fewer than k nodes that have an effect, the share of these.
    """
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise SettingError(f"recall at {k!r}", "not a number of nodes", "give a whole number from 1")
    return float((ranks[truly_largest(ranks, effects)[:k]] <= k).mean())


def cost_curve(
    costs: Float[np.ndarray, " node"], effects: Float[np.ndarray, " node"], setup: float = 0.0
) -> Float[np.ndarray, " k"]:
    r"""The verifications after which the truly k largest are all known, for k = 1, 2, ...

    $$\text{cost}(k) = \text{setup} + \max_{j \le k} \text{cost of the truly } j\text{-th}$$

    Args:
        costs: of each node; the ranks of an order.
        effects: true effects; magnitudes count.
        setup: what the order itself cost, in verifications, where `costs` do not have it in them.
    """
    return setup + np.maximum.accumulate(costs[truly_largest(costs, effects)].astype(np.float64))


def relative_cost(cost: Float[np.ndarray, " k"]) -> Float[np.ndarray, " k"]:
    r"""$\rho(k) = \text{cost}(k) / k$: 1 for the exact order."""
    return cost / np.arange(1, len(cost) + 1)


def inverse_rank_weighted(relative: Float[np.ndarray, " k"], upto: int | None = None) -> float:
    r"""One number for a curve of relative cost, in which each octave of k counts about the same.

    $$\exp \frac{\sum_{k \le K} \frac1k \ln \rho(k)}{\sum_{k \le K} \frac1k}$$

    Args:
        relative: $\rho(k)$.
        upto: K; all nodes that have an effect unless given.
    """
    chosen = relative[:upto]
    return float(np.exp(np.average(np.log(chosen), weights=1 / np.arange(1, len(chosen) + 1))))


def found_curve(
    costs: Float[np.ndarray, " node"],
    effects: Float[np.ndarray, " node"],
    k: int,
    visited: Float[np.ndarray, " point"],
    setup: float = 0.0,
) -> Float[np.ndarray, " point"]:
    """The share of the truly k largest nodes that is known after so many verifications.

    Args:
        costs: of each node; the ranks of an order.
        effects: true effects.
        k: how many nodes are looked for.
        visited: numbers of verifications.
        setup: as in `cost_curve`.
    """
    known = setup + costs[truly_largest(costs, effects)[:k]]
    return (known[:, None] <= visited).mean(0)


def geometric(values: Float[np.ndarray, " pair"]) -> tuple[float, float]:
    """The geometric mean and the geometric standard deviation (a factor; 1 for a single value)."""
    logs = np.log(values)
    return float(np.exp(logs.mean())), float(np.exp(logs.std(ddof=1))) if len(logs) > 1 else 1.0


def geometric_mean(values: Float[np.ndarray, " pair"]) -> float:
    """The geometric mean."""
    return geometric(values)[0]


def interval(
    values: Float[np.ndarray, " pair"],
    statistic: Callable[[np.ndarray], float],
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval of a statistic of pairs: pairs are drawn again, with replacement."""
    rng = np.random.default_rng(seed)
    drawn = [statistic(values[rng.integers(0, len(values), len(values))]) for _ in range(resamples)]
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def mean_interval(
    values: Float[np.ndarray, " pair"], *, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """`interval` of the mean, all resamples in one array operation."""
    drawn = values[np.random.default_rng(seed).integers(0, len(values), (resamples, len(values)))].mean(1)
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
