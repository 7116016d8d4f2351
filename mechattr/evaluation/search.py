"""Orders in which nodes can be verified without a gradient: what estimates are judged against.

Each search sees a model only through `patch`, which measures sets of nodes that are patched together:
`patch(sets [set, node])` gives the effect of each set on each pair, `[set, pair]`. A set's size is the mean over pairs
of |effect|. One set costs one verification, that is one forward pass of each pair.

1. Exact order: by the true effects; what no method can beat.
2. Random order: what every method has to beat.
3. Subsampling: random sets; a node's score is the mean of the sets with it minus the mean of those without.
4. Blocks: consecutive nodes patched together; blocks are visited by size.
5. Hierarchical: a tree of blocks; the largest block found so far is split next.

The last three go wrong where effects do not add up, and where opposite effects in a set cancel.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int

from mechattr.engines.subsampling import Split, contrast
from mechattr.errors import SettingError
from mechattr.evaluation.discovery import order_of, ranks_in
from mechattr.patching.places import chunks
from mechattr.patching.sets import Sets

Patch = Callable[[np.ndarray], np.ndarray]  # Bool[set node] -> Float[set pair]


@dataclass(frozen=True, eq=False, slots=True)
class Search:
    """An order of all nodes, and what it took.

    Attributes:
        order: the nodes, first verified first.
        costs: for each node (not each rank), the verifications after which its effect is known, with all that the
            search did before.
    """

    order: Int[np.ndarray, " node"]
    costs: Int[np.ndarray, " node"]

    @property
    def ranks(self) -> Int[np.ndarray, " node"]:
        """The rank of each node, from 1."""
        return ranks_in(self.order)

    @property
    def setup(self) -> int:
        """The verifications before the first node is known."""
        return int(self.costs.min()) - 1


def by_order(order: Int[np.ndarray, " node"], setup: int = 0) -> Search:
    """A fixed order, that cost `setup` verifications to find."""
    return Search(order, setup + ranks_in(order))


def exact_order(effects: Float[np.ndarray, " node"]) -> Search:
    """By the true effects."""
    return by_order(order_of(np.abs(effects)))


def random_order(n_nodes: int, *, seed: int = 0) -> Search:
    """In a random order."""
    return by_order(np.random.default_rng(seed).permutation(n_nodes))


def subsampling(patch: Patch, n_nodes: int, *, n_sets: int, p: float = 0.03, seed: int = 0) -> Search:
    r"""Random sets, each node in each with probability p.

    $$\hat c(n) = \mathbb E_{\text{pairs}} \big|\, \bar s^+_n - \bar s^-_n \,\big|$$

    with $\bar s^\pm_n$ the mean effect of the sets with and without node n. It is unbiased before the absolute value
    where effects add up (`mechattr.engines.subsampling`). A node that fewer than two sets have, or lack, scores zero.

    Args:
        patch: measures sets.
        n_nodes: number of nodes.
        n_sets: number of random sets, the set-up cost.
        p: probability of each node.
        seed: seed of the sets.

    References:
        Kramár et al. 2024, arXiv:2403.00745, the baseline "subsampling".
    """
    if not 0 < p < 1:
        raise SettingError(f"p={p!r}", "not a probability between 0 and 1", "give a number such as 0.03")
    _check("n_sets", n_sets)
    sets = np.random.default_rng(seed).random((n_sets, n_nodes)) < p
    effects = patch(sets)
    chosen, values = torch.from_numpy(sets), torch.from_numpy(np.asarray(effects, dtype=np.float64))
    sizes = contrast([Split.of(chosen, of_pair) for of_pair in values.T]).size
    return by_order(order_of(sizes.nan_to_num(0.0).numpy()), setup=n_sets)


def blocks(patch: Patch, n_nodes: int, *, size: int = 20) -> Search:
    """Blocks of consecutive nodes, visited by the size of their effect, the nodes of a block in their order.

    Args:
        patch: measures sets.
        n_nodes: number of nodes.
        size: nodes of a block.
    """
    _check("size", size)
    parts = [range(start, min(start + size, n_nodes)) for start in range(0, n_nodes, size)]
    measured = _sizes(patch, parts, n_nodes)
    order = np.concatenate([np.array(parts[i]) for i in order_of(measured)])
    return Search(order, ranks_in(order) + len(parts) if size > 1 else np.arange(1, n_nodes + 1))


def hierarchical(patch: Patch, n_nodes: int, *, levels: int = 5) -> Search:
    """A tree of blocks with `levels` levels: the largest block so far is split, and its parts are measured.

    The search is followed to its end, so every block of the tree is measured, all at once; the queue says when each
    one would have been.

    Args:
        patch: measures sets.
        n_nodes: number of nodes.
        levels: splits from the whole down to single nodes; each is into about the `levels`-th root of `n_nodes` parts.
    """
    _check("levels", levels)
    branch = max(2, math.ceil(n_nodes ** (1 / levels) - 1e-9))
    parts_of: dict[range, list[range]] = {}
    level = [range(n_nodes)]
    while level:
        for block in level:
            parts_of[block] = _split(block, branch)
        level = [part for block in level for part in parts_of[block] if len(part) > 1]
    # Single nodes count when they are verified, but the queue does not need their effects.
    every = [part for parts in parts_of.values() for part in parts if len(part) > 1]
    measured = dict(zip(every, _sizes(patch, every, n_nodes).tolist(), strict=True))
    costs, order, count = np.zeros(n_nodes, dtype=np.int64), [], 0
    queue: list[tuple[float, int, range]] = [(0.0, 0, range(n_nodes))]
    while queue:
        *_, block = heapq.heappop(queue)
        for part in parts_of[block]:
            count += 1
            if len(part) == 1:
                order.append(part[0])
                costs[part[0]] = count
            else:
                heapq.heappush(queue, (-measured[part], part.start, part))
    return Search(np.array(order), costs)


def patch_of(sets: Sets, nodes: Int[np.ndarray, " node"] | None = None) -> Patch:
    """A model as `patch` sees it: all pairs of a task.

    Args:
        sets: the nodes of a model on a task.
        nodes: those that the search is about, by their place in the table of `sets`; all unless given.
    """
    n_pairs = len(sets.base_metric)
    n_nodes = sets.moved.shape[1]
    columns = torch.from_numpy(np.arange(n_nodes) if nodes is None else np.asarray(nodes))

    def patch(chosen: np.ndarray) -> np.ndarray:
        rows = torch.zeros(len(chosen), n_nodes, dtype=torch.bool)
        rows[:, columns] = torch.from_numpy(chosen)
        effects = [sets.effects(torch.full((len(rows),), pair), rows) for pair in range(n_pairs)]
        return torch.stack(effects, 1).double().cpu().numpy()

    return patch


def _split(block: range, branch: int) -> list[range]:
    """A block in at most `branch` parts of nearly equal length."""
    n = min(branch, len(block))
    edges = [block.start + len(block) * i // n for i in range(n + 1)]
    return [range(*pair) for pair in itertools.pairwise(edges)]


def _sizes(patch: Patch, parts: list[range], n_nodes: int, at_once: int = 1024) -> Float[np.ndarray, " part"]:
    """The mean over pairs of |effect| of each part."""
    sizes = []
    for chunk in chunks(len(parts), at_once):
        sets = np.zeros((len(chunk), n_nodes), dtype=bool)
        for row, i in zip(sets, chunk, strict=True):
            row[parts[i].start : parts[i].stop] = True
        sizes.append(np.abs(patch(sets)).mean(1))
    return np.concatenate(sizes) if sizes else np.zeros(0)


def _check(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise SettingError(f"{name}={value!r}", "not a count", "give a whole number from 1")
