r"""The QK fix: what moving one query or one key does to a head's output, through the softmax instead of its tangent.

A saturated softmax has no slope, so a product of gradient and change sees nothing where a query or key matters most.
Attention at the base run has patterns $p$, values $v$ and output $z_i = \sum_j p_{ij} v_j$. A query or key that moves
changes logits by $\delta$ (mask, window and position bias cancel), the pattern becomes
$p' \propto p\,e^{\delta}$, and whatever reads $z$ is taken as linear, with gradient $g_i$ at $z_i$.

- Query $i$ moves its own row: the effect is $g_i^\top \sum_j (p'_{ij} - p_{ij})\, v_j$.
- Key $t$ moves one logit in every row: the effect is
  $\sum_i \frac{u}{1 + u}\, g_i^\top (v_t - z_i)$ with $u = p_{it}\,(e^{\delta_{it}} - 1)$, so all keys together are
  one product of matrices and nothing of size query x key x width is made.

*Rows* are the queries of all heads that share a kv head: [batch, kv_head, group * pos, ...]. Everything is in float32
or wider, and a change of exactly zero has an effect of exactly zero.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechattr.models.base import AttentionForm


def rows_of(x: Float[Tensor, "batch pos head d"], kv_heads: int) -> Float[Tensor, "batch kv_head row d"]:
    """The queries of each kv head's group as rows, in float32 or wider."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return x.to(wide).transpose(1, 2).reshape(len(x), kv_heads, -1, x.shape[-1])


def keys_of(x: Float[Tensor, "batch pos kv_head d"]) -> Float[Tensor, "batch kv_head pos d"]:
    """Keys or values by kv head, in float32 or wider."""
    return rows_of(x, x.shape[2])


@dataclass(frozen=True, eq=False, slots=True)
class Attended:
    """Attention of one layer at the base run. An attention sink is one more key, whose value is zero.

    Attributes:
        scores: before the softmax, with mask and bias.
        pattern: after it; zero in rows that are padding.
        value: by kv head.
        top: the key of each row with the largest probability.
        empty: rows that are padding.
    """

    scores: Float[Tensor, "batch kv_head row key"]
    pattern: Float[Tensor, "batch kv_head row key"]
    value: Float[Tensor, "batch kv_head key d"]
    top: Int[Tensor, "batch kv_head row 1"]
    empty: Bool[Tensor, "batch 1 row 1"] | None


def attended(
    form: AttentionForm,
    scores: Float[Tensor, "batch head pos pos"],
    value: Float[Tensor, "batch kv_head pos d"],
    real: Bool[Tensor, "batch pos"] | None,
) -> Attended:
    """Attention from its recorded scores; columns that are not `real` are padding."""
    heads, kv_heads, columns = scores.shape[1], *value.shape[1:3]
    x = scores.to(value.dtype).reshape(len(scores), kv_heads, -1, columns)
    if form.sinks is not None:
        sinks = form.sinks.to(x.dtype).repeat_interleave(columns).reshape(1, kv_heads, -1, 1)
        x = torch.cat([x, sinks.expand(len(x), -1, -1, -1)], -1)
        value = torch.nn.functional.pad(value, (0, 0, 0, 1))
    pattern, empty = x.softmax(-1), None
    if real is not None:  # what stands in padding may be anything
        empty = ~real.repeat(1, heads // kv_heads)[:, None, :, None]
        pattern = pattern.masked_fill_(empty, 0.0)
    return Attended(x, pattern, value, pattern.argmax(-1, keepdim=True), empty)


def logit_change(
    form: AttentionForm, change: Float[Tensor, "batch kv_head row pos"], q: Tensor, k: Tensor
) -> Float[Tensor, "batch kv_head row key"]:
    """delta, from the change of the products q.k: that of queries that move, or of keys that move."""
    change = change * form.scaling
    if form.softcap is not None:
        before = q @ k.mT * form.scaling
        change = form.softcap * (torch.tanh((before + change) / form.softcap) - torch.tanh(before / form.softcap))
    return change if form.sinks is None else torch.nn.functional.pad(change, (0, 1))


def output_change(at: Attended, delta: Float[Tensor, "batch kv_head row key"]) -> Float[Tensor, "batch kv_head row d"]:
    """sum_j (p'_j - p_j) v_j with p' the softmax of the scores moved by delta.

    The change of the largest probability is taken as minus that of all others, because p' - p of two numbers near 1
    has no digits left.
    """
    moved = (at.scores + delta).softmax(-1).sub_(at.pattern).scatter_(-1, at.top, 0.0)
    change = moved.scatter_(-1, at.top, -moved.sum(-1, keepdim=True)) @ at.value
    return change if at.empty is None else change.masked_fill_(at.empty, 0.0)


@dataclass(frozen=True, eq=False, slots=True)
class KeyMoves:
    """Each key moved alone, seen from all rows.

    With f = u / (1 + u), a key's effect is the sum of f g (v - z) over rows. For the largest probability of a row both
    v - z and 1 + u are differences of nearly equal numbers once the row is saturated. So it is kept apart in terms of
    the other keys, with R the sum of their probabilities and m their mean value: v - z = R (v - m) and
    1 + u = R + p e^delta.

    Attributes:
        factor: f, zero at each row's largest probability.
        top: which key that is.
        top_change: f (v - z) there.
    """

    factor: Float[Tensor, "batch kv_head row key"]
    top: Int[Tensor, "batch kv_head row 1"]
    top_change: Float[Tensor, "batch kv_head row d"]


def key_moves(at: Attended, delta: Float[Tensor, "batch kv_head row key"]) -> KeyMoves:
    """The factors of all keys of all rows."""
    tiny, limit = torch.finfo(delta.dtype).tiny, math.log(torch.finfo(delta.dtype).max) - 1
    others = at.pattern.scatter(-1, at.top, 0.0)
    rest = others.sum(-1, keepdim=True)
    mean = others @ at.value / rest.clamp(min=tiny)
    if float(delta.max()) < 0.7 * limit:
        u = torch.expm1(delta).mul_(others)
    else:  # a probability that is too small for its dtype may still become the largest
        grown = (at.scores.log_softmax(-1) + delta).clamp_(max=limit).exp_() - others
        u = torch.where(delta > 1, grown, others * torch.expm1(delta.clamp(max=1))).scatter_(-1, at.top, 0.0)
    factor = u.div_(1 + u)
    p, shift = at.pattern.gather(-1, at.top), delta.gather(-1, at.top)
    shrink = torch.exp(-shift.abs())  # both branches of R p (e^delta - 1) / (R + p e^delta) without overflow
    below = torch.where(shift > 0, rest * shrink + p, rest + p * shrink).clamp(min=tiny)
    weight = -torch.sign(shift) * torch.expm1(-shift.abs()) * p * rest / below
    value = at.value.gather(-2, at.top.expand(*at.top.shape[:-1], at.value.shape[-1]))
    return KeyMoves(factor, at.top, weight * (value - mean))


def key_effects(
    moves: KeyMoves,
    gradient: Float[Tensor, "batch kv_head row d"],
    output: Float[Tensor, "batch kv_head row d"],
    value: Float[Tensor, "batch kv_head key d"],
) -> Float[Tensor, "batch kv_head key"]:
    """The effect of each key, from the gradient at z and z itself."""
    through = (gradient * output).sum(-1, keepdim=True)
    back = moves.factor.mT @ torch.cat([gradient, through], -1)
    effect = (value * back[..., :-1]).sum(-1) - back[..., -1]
    return effect.scatter_add_(-1, moves.top[..., 0], (gradient * moves.top_change).sum(-1))


@dataclass(frozen=True, eq=False, slots=True)
class Fix:
    """Queries and keys of one layer, ready for the gradient at z of any backward pass.

    Attributes:
        value: by kv head.
        output: z as rows.
        query: what each query's move does to z.
        key: what each key's move does, and which keys do not move.
        places: what moving all keys of a place together does to z: within a row their effects do not add up.
    """

    value: Float[Tensor, "batch kv_head key d"]
    output: Float[Tensor, "batch kv_head row d"]
    query: Float[Tensor, "batch kv_head row d"] | None
    key: tuple[KeyMoves, Bool[Tensor, "batch kv_head key"]] | None
    places: Float[Tensor, "place batch kv_head row d"] | None

    def of_queries(self, gradient: Float[Tensor, "batch pos head d"]) -> Float[Tensor, "batch pos head"]:
        """The effect of each query."""
        assert self.query is not None
        g = rows_of(gradient, self.output.shape[1])
        return (g * self.query).sum(-1).reshape(len(g), gradient.shape[2], -1).transpose(1, 2)

    def of_keys(self, gradient: Float[Tensor, "batch pos head d"]) -> Float[Tensor, "batch pos kv_head"]:
        """The effect of each key, or of each place."""
        g = rows_of(gradient, self.output.shape[1])
        if self.places is not None:
            return torch.einsum("bhrd,pbhrd->bph", g, self.places)
        assert self.key is not None
        moves, still = self.key
        effect = key_effects(moves, g, self.output, self.value)[..., : still.shape[-1]]
        return effect.masked_fill(still, 0.0).transpose(1, 2)


def fix_of(
    form: AttentionForm,
    base: Mapping[str, Tensor],
    moved: Mapping[str, Tensor],
    *,
    real: Bool[Tensor, "batch pos"] | None,
    places: Bool[Tensor, "batch place pos"] | None,
) -> Fix:
    """The fix of one layer.

    Args:
        form: how the layer turns products into logits.
        base: `rot_q`, `rot_k`, `v`, `z` and `attn_scores` of the base run, with the axes of the sites.
        moved: `rot_q` or `rot_k` of the source run, or both: the nodes that are asked for.
        real: which columns are tokens; `None` if all are.
        places: the columns of each place, where keys are merged over several columns.
    """
    value, k = keys_of(base["v"]), keys_of(base["rot_k"])
    q, output = rows_of(base["rot_q"], value.shape[1]), rows_of(base["z"], value.shape[1])
    at = attended(form, base["attn_scores"], value, real)
    if at.empty is not None:  # no gradient comes from padding, but zero times anything may be NaN
        output = output.masked_fill(at.empty, 0.0)
    query, key, together = None, None, None
    if "rot_q" in moved:
        change = rows_of(moved["rot_q"], value.shape[1]) - q
        query = output_change(at, logit_change(form, change @ k.mT, q, k))
        query.masked_fill_((change == 0).all(-1, keepdim=True), 0.0)
    if "rot_k" in moved:
        change = keys_of(moved["rot_k"]) - k
        delta, still = logit_change(form, q @ change.mT, q, k), (change == 0).all(-1)
        if places is None:
            key = key_moves(at, delta), still
        else:
            together = torch.stack([_together(at, delta, place, still) for place in places.unbind(1)])
    return Fix(at.value, output, query, key, together)


def _together(
    at: Attended,
    delta: Float[Tensor, "batch kv_head row key"],
    place: Bool[Tensor, "batch pos"],
    still: Bool[Tensor, "batch kv_head pos"],
) -> Float[Tensor, "batch kv_head row d"]:
    """What moving all keys of one place does to z."""
    here = torch.nn.functional.pad(place, (0, delta.shape[-1] - place.shape[-1]))
    change = output_change(at, delta * here[:, None, None])
    moves = (place[:, None] & ~still).any(-1)
    return change.masked_fill_(~moves[..., None, None], 0.0)
