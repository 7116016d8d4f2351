"""Groups of tokens that lie together in the embedding, tested by samples: a second way to what was never learned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mechattr.errors import SettingError


@dataclass(frozen=True, slots=True)
class Suspects:
    """What the clustering found.

    Attributes:
        tokens: ids that failed their test, ascending.
        rounds: tokens that were still under suspicion after each round.
        tested: how many tokens were tested.
    """

    tokens: tuple[int, ...]
    rounds: tuple[int, ...]
    tested: int


def communities(rows: Float[Tensor, "token d_model"], ids: Sequence[int], *, neighbours: int = 8) -> list[list[int]]:
    """Tokens that are connected in the graph of mutual nearest neighbours (cosine): groups, the largest first.

    Two tokens are joined when each is among the `neighbours` nearest of the other.

    Raises:
        SettingError: no number of neighbours.
    """
    from scipy.sparse import csr_matrix
    from scipy.sparse.csgraph import connected_components
    from sklearn.neighbors import NearestNeighbors

    if isinstance(neighbours, bool) or not isinstance(neighbours, int) or neighbours < 1:
        raise SettingError(f"neighbours={neighbours!r}", "no count", "give a whole number from 1")
    if len(ids) < 2:
        return [[int(i)] for i in ids]
    points = torch.nn.functional.normalize(rows[list(ids)].float(), dim=-1).cpu().numpy()
    k = min(neighbours, len(ids) - 1)
    near = NearestNeighbors(n_neighbors=k + 1).fit(points).kneighbors(return_distance=False)
    links = csr_matrix(
        (np.ones(near.size), near.ravel(), np.arange(0, near.size + 1, near.shape[1])), shape=(len(ids), len(ids))
    )
    _, labels = connected_components(links.minimum(links.T), directed=False)
    groups: dict[int, list[int]] = {}
    for token, label in zip(ids, labels.tolist(), strict=True):
        groups.setdefault(label, []).append(int(token))
    return sorted((sorted(group) for group in groups.values()), key=lambda group: (-len(group), group))


def suspects(
    rows: Float[Tensor, "token d_model"],
    ids: Sequence[int],
    fails: Callable[[Sequence[int]], Sequence[bool]],
    *,
    neighbours: int = 8,
    sample: int = 4,
    share: float = 0.5,
    most_rounds: int = 10,
    seed: int = 0,
) -> Suspects:
    """Clusters, tests a sample of each, keeps clusters that fail, and begins again among them until nothing changes.

    Args:
        rows: embedding rows of all tokens.
        ids: the tokens to look at.
        fails: whether each of some tokens fails its test, such as a repetition below a probability.
        neighbours: see `communities`.
        sample: tokens of a cluster that are tested.
        share: a cluster is kept when more than this share of its sample fails.
        most_rounds: rounds at most.
        seed: of the samples.

    Returns:
        The tokens of the clusters that are left, each of them tested.

    References:
        Li et al. (2024), Glitch Tokens in Large Language Models (GlitchHunter); read: an excerpt. It clusters with
        Leiden's method, this with the components of a mutual neighbour graph.
    """
    generator = torch.Generator().manual_seed(seed)
    tested: dict[int, bool] = {}

    def test(tokens: Sequence[int]) -> list[bool]:
        new = [token for token in tokens if token not in tested]
        tested.update(zip(new, map(bool, fails(new)), strict=True) if new else ())
        return [tested[token] for token in tokens]

    left, rounds = [int(i) for i in ids], []
    for _ in range(most_rounds):
        kept: list[int] = []
        for group in communities(rows, left, neighbours=neighbours):
            drawn = [group[i] for i in torch.randperm(len(group), generator=generator)[:sample].tolist()]
            if sum(test(drawn)) > share * len(drawn):
                kept += group
        rounds.append(len(kept))
        if sorted(kept) == sorted(left) or not kept:
            left = kept
            break
        left = kept
    found = [token for token, failed in zip(left, test(left), strict=True) if failed]
    return Suspects(tuple(sorted(found)), tuple(rounds), len(tested))
