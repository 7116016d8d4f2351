"""How little a token was trained, as its rows of the embedding matrices tell: pure functions, lower is less trained."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from mechattr.errors import SettingError, nearest

INDICATORS = ("input_norm", "cosine", "cosine_centred", "cosine_without_first", "distance")


def indicator(
    name: str,
    embedding: Float[Tensor, "vocab d_model"],
    unembedding: Float[Tensor, "vocab d_model"],
    unused: Sequence[int] = (),
) -> Float[Tensor, " vocab"]:
    """One number a token; the lower, the less trained.

    - `input_norm`: the length of its input embedding, which weight decay shrinks where nothing trains it. Not for tied
      weights, where the output trains every row.
    - `cosine`: 1 - cosine between its output row and the mean row of tokens that are known to be unused, which the
      softmax pushes in one direction.
    - `cosine_centred`: the same after the mean row of all tokens is taken away.
    - `cosine_without_first`: the same without the first principal component of the (centred) rows, which is taken out
      of rows that are not centred, as in the published source.
    - `distance`: the length of the difference from the mean row of the unused tokens.

    Args:
        name: which of them.
        embedding: input rows.
        unembedding: output rows.
        unused: ids that are known to be unused; all but `input_norm` need some.

    Raises:
        SettingError: no such indicator, or no unused ids where they are needed.

    References:
        Land, Bartolo (2024), Fishing for Magikarp, arXiv 2405.05417.
    """
    if name not in INDICATORS:
        raise SettingError(f"indicator {name!r}", "no such indicator", nearest(name, INDICATORS))
    if name == "input_norm":
        return embedding.double().norm(dim=-1)
    if not len(unused):
        fix = "name ids that the model cannot have seen: unused=[...] (--unused), or take by='input_norm' (--by)"
        raise SettingError(f"indicator {name!r}", "no ids that are known to be unused", fix)
    rows = unembedding.double()
    if name == "cosine_centred":
        rows = rows - rows.mean(0)
    if name == "cosine_without_first":
        first = torch.linalg.svd(rows - rows.mean(0), full_matrices=False).Vh[0]
        rows = rows - (rows @ first)[:, None] * first
    mean = rows[list(unused)].mean(0)
    if name == "distance":
        return (rows - mean).norm(dim=-1)
    return 1 - torch.nn.functional.cosine_similarity(rows, mean[None], dim=-1, eps=torch.finfo(rows.dtype).tiny)
