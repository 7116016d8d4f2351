"""How attention mixes tokens: the share of each source position in what a block's attention leaves at a position."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from mechattr.decomposition.parts import AttentionParts

# Numbers worked on at a time: a CPU core keeps them in its cache, a GPU wants fewer and larger pieces.
_PIECE_ON_CPU, _PIECE = 1 << 18, 1 << 25
_KEYS = 32  # source positions, at least, whose u is formed at once


class Mixing(NamedTuple):
    """C, and for how many of its rows all contributions were clipped."""

    shares: Float[Tensor, "query key"]
    n_clipped: int


def of_row(parts: AttentionParts, row: int, length: int) -> AttentionParts:
    """The parts of one prompt, without its padding."""
    one, real = slice(row, row + 1), slice(length)
    return replace(
        parts,
        pattern=parts.pattern[one, :, real, real],
        v=parts.v[one, real],
        residual=parts.residual[one, real],
        bias=parts.bias[one, real],
        whole=parts.whole[one, real],
    )


def mixing(parts: AttentionParts, queries: slice = slice(None), *, piece: int | None = None) -> Mixing:
    """ALTI's C of one prompt: how much nearer the part T_i(x_j) of source j is to the whole y_i than nothing is.

    c_ij = max(0, ||y_i|| - ||y_i - T_i(x_j)||) and C_ij = c_ij / sum_k c_ik, where norms are sums of |entries|. A row
    whose c are all 0 becomes one-hot at the query itself. The residual counts as one more head, which looks at its own
    position. Parts are formed for a few sources and queries at a time, by a product [query, head] x [head, d_model] for
    each source, and only where a head looks: half of the pairs of a causal model.

    Args:
        parts: of one prompt without padding.
        queries: the positions i.
        piece: numbers worked on at a time; chosen by the device without it.
    """
    n_keys, d_model = parts.whole.shape[1:]
    device, whole = parts.whole.device, parts.whole[0, queries]
    itself = torch.eye(n_keys, dtype=whole.dtype, device=device)[:, queries]
    looks = torch.cat([parts.pattern[0, :, queries].permute(2, 1, 0), itself[..., None]], -1)  # [key, query, head]
    first, last = _span(looks.any(-1))
    piece = piece or (_PIECE_ON_CPU if device.type == "cpu" else _PIECE)
    n_rows = max(1, min(len(whole), piece // d_model))
    n_sources = max(1, piece // (n_rows * d_model))
    norm = whole.abs().sum(-1)
    nearer = torch.zeros_like(itself)
    for formed in _slices(0, n_keys, max(n_sources, _KEYS)):
        u = torch.cat([parts.values(formed)[0], parts.residual[0, formed, None]], 1)
        for sources in _slices(formed.start, formed.stop, n_sources):
            moved = u[sources.start - formed.start : sources.stop - formed.start]
            for rows in _slices(min(first[sources]), max(last[sources]) + 1, n_rows):
                wanted = whole[rows].expand(len(moved), -1, -1)
                rest = torch.baddbmm(wanted, looks[sources, rows], moved, alpha=-1)
                nearer[sources, rows] = norm[rows] - rest.abs_().sum(-1)
    shares = nearer.T.clamp(min=0)
    total = shares.sum(-1, keepdim=True)
    clipped = total == 0
    return Mixing(torch.where(clipped, itself.T, shares / total), int(clipped.sum()))


def _slices(start: int, stop: int, step: int) -> Iterator[slice]:
    for i in range(start, stop, step):
        yield slice(i, min(i + step, stop))


def _span(seen: Tensor) -> tuple[list[int], list[int]]:
    """The first and the last query that looks at each source; an empty range where none does."""
    n = seen.shape[1]
    place = torch.arange(n, device=seen.device)
    first = torch.where(seen, place, n).amin(1)
    return first.tolist(), torch.where(seen, place, -1).amax(1).tolist()
