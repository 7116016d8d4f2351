r"""Who reads the residual stream, and the gradient at each reader's own input.

Two facts keep it cheap.

- The gradient with respect to *one reader's own input* needs no network with split inputs. A reader sees
  $y = w \circ c / s + b$ with $c$ the (centred) input and $s$ its scale; if $g$ is the gradient at a projection
  $v = W^\top y + b_v$, then with $a = w \circ W g$

  $$\frac{\partial L}{\partial x} = C\Big[\frac{a}{s} - \frac{c\,(c \cdot a)}{d_\text{model}\, s^3}\Big]
  = C\big[w \circ W\gamma\big] - c\,\beta, \qquad
  \gamma = \frac{g}{s}, \quad \beta = \frac{(v - v_0) \cdot g}{d_\text{model}\, s^2}$$

  where $C$ centres (for a LayerNorm) and $v_0 = W^\top b + b_v$.
- $\gamma$ and $\beta$ are as small as queries and keys, so that averages over many runs are taken there, and vectors of
  the model's width are formed once, after the last run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechattr.models.base import HookedModel
from mechattr.models.norms import Norm
from mechattr.models.tape import Tape
from mechattr.patching.graph import KINDS, Graph
from mechattr.sites import full_name

_Part = tuple[str, slice, str | None]  # site, heads and weight of a projection


@dataclass(frozen=True, eq=False, slots=True)
class Projection:
    """A linear map of a reader's normed input, whose gradient a backward pass brings.

    Attributes:
        site: the full name of its output.
        heads: which readers of its tile it belongs to.
        weight: the name of its weight, [head, d_model, d_head] or [d_model, neuron]; `None` for the identity.
        at_zero: its output where the norm gives nothing but its bias.
    """

    site: str
    heads: slice
    weight: str | None
    at_zero: Tensor


@dataclass(frozen=True, eq=False, slots=True)
class Tile:
    """Readers with one and the same input: those of a block's attention, an MLP, or the logits.

    Attributes:
        columns: their columns in the graph.
        seen: how many writers are connected with them.
        reads: the full name of the residual site that is their input.
        norm: the norm that they read through, if any.
        projections: where their gradients arrive.
    """

    columns: slice
    seen: int
    reads: str
    norm: Norm | None
    projections: tuple[Projection, ...]

    @property
    def width(self) -> int:
        """Number of readers."""
        return self.columns.stop - self.columns.start


def tiles_of(model: HookedModel, graph: Graph) -> tuple[Tile, ...]:
    """All readers, in the order of the forward pass."""
    sites = frozenset(model.sites())

    def tile(first: int, width: int, seen: int, reads: str, norm: str, parts: Sequence[_Part]) -> Tile:
        found = model.norm(norm) if norm else None
        # attention with a fixed pattern has no queries and keys
        entries = [Projection(*part, _at_zero(model, found, part[2])) for part in parts if part[0] in sites]
        return Tile(slice(first, first + width), seen, reads, found, tuple(entries))

    tiles = []
    for layer in range(graph.n_layers):
        p, first, end = f"blocks.{layer}.", layer * graph.readers_a_layer, 0
        parts: list[_Part] = []
        for kind in KINDS:
            heads = slice(end, end + (graph.n_heads if kind == "q" else graph.n_kv_heads))
            parts.append((full_name(kind, layer), heads, f"{p}attn.W_{kind.upper()}"))
            end = heads.stop
        tiles.append(tile(first, end, graph.seen_by(layer), full_name("resid_pre", layer), p + "ln1", parts))
        if graph.has_mlp:
            reads = full_name("resid_pre" if graph.parallel else "resid_mid", layer)
            parts = _mlp_parts(sites, layer)
            tiles.append(tile(first + end, 1, graph.seen_by(layer, mlp=True), reads, p + "ln2", parts))
    last, column = full_name("resid_post", graph.n_layers - 1), len(graph.readers) - 1
    tiles.append(tile(column, 1, graph.seen_by(graph.n_layers), last, "", [(last, slice(0, 1), None)]))
    return tuple(tiles)


def _mlp_parts(sites: frozenset[str], layer: int) -> list[_Part]:
    """Where the gradient of an MLP arrives: behind a norm of its own, gate and linear input are joined already."""
    one, p = slice(0, 1), f"blocks.{layer}.mlp."
    if full_name("ln2", layer) in sites:
        return [(full_name("ln2", layer), one, None)]
    pre, linear = full_name("mlp_pre", layer), full_name("mlp_pre_linear", layer)
    if linear in sites:
        return [(pre, one, p + "W_gate"), (linear, one, p + "W_in")]
    return [(pre, one, p + "W_in")]


def _at_zero(model: HookedModel, norm: Norm | None, weight: str | None) -> Tensor:
    """The output of a projection where its norm gives nothing but its bias."""
    if norm is None:
        return torch.zeros(())  # without a norm nobody asks
    bias = torch.zeros_like(wide(norm.weight)) if norm.bias is None else wide(norm.bias)
    if weight is None:
        return bias
    return bias @ wide(model.weight(weight)) + wide(model.weight(weight.replace(".W_", ".b_")))


class Readers:
    """What flows back into the readers for one batch of pairs: the weighted sum over the runs of a path.

    Args:
        model: whose weights are used.
        tiles: its readers.
        mask: real tokens.
        frozen: whether norms pass gradients on at a fixed scale.
    """

    def __init__(
        self, model: HookedModel, tiles: Sequence[Tile], mask: Bool[Tensor, "pair pos"], *, frozen: bool
    ) -> None:
        self.model, self.tiles, self.mask, self.frozen = model, tiles, mask, frozen
        self.at = {part.site: (i, part) for i, tile in enumerate(tiles) for part in tile.projections}
        self.gamma: dict[str, Tensor] = {}
        self.bends: dict[int, list[tuple[Tensor, Tensor]]] = {}  # by tile: residual stream and beta of each run

    def add(self, tape: Tape, share: float) -> None:
        """Takes the gradients of one run, weighted; the run must have recorded what tiles read. Lets its graph go."""
        inverse: dict[int, Tensor] = {}
        for i, tile in enumerate(self.tiles):
            if tile.norm is not None:
                x = real(tape.activations[tile.reads], self.mask)
                inverse[i] = real(1 / tile.norm.scale(x), self.mask)
                if not self.frozen:
                    beta = inverse[i].new_zeros(*inverse[i].shape, tile.width)
                    self.bends.setdefault(i, []).append((x, beta))

        def visit(site: str, activation: Tensor, gradient: Tensor) -> None:
            i, part = self.at[site]
            g = _by_head(real(wide(gradient), self.mask))
            weight = (inverse[i] * share)[..., None] if i in inverse else g.new_full((1, 1, 1), share)
            if i in self.bends:
                change = _by_head(real(wide(activation) - part.at_zero, self.mask))
                slope = weight * inverse[i][..., None] / self.model.info.d_model
                self.bends[i][-1][1][..., part.heads] += torch.linalg.vecdot(change, g) * slope
            if site in self.gamma:
                self.gamma[site].addcmul_(g, weight[..., None])
            else:
                self.gamma[site] = g * weight[..., None]

        tape.pull_back(visit, last=True)

    def gradient(self, i: int, pairs: slice, columns: slice, *, out: Float[Tensor, "reader row d_model"]) -> bool:
        """By reader of tile `i`: the gradient with respect to its own input, at pairs and columns in one axis.

        Written into `out`; `False`, and nothing written, if the metric depends on none of them.
        """
        tile = self.tiles[i]
        live = [part for part in tile.projections if part.site in self.gamma]
        if not live:
            return False
        fresh = {part.heads.start: part.heads for part in live}  # the gate and linear input of an MLP add up
        if sum(heads.stop - heads.start for heads in fresh.values()) < tile.width:
            out.zero_()
        for part in live:
            g = self.gamma[part.site][pairs, columns].flatten(0, 1).transpose(0, 1)  # [head, row, width]
            target, first = out[part.heads], fresh.pop(part.heads.start, None) is not None
            if part.weight is not None:
                weight = wide(self.model.weight(part.weight))
                weight = _into(tile.norm, weight.reshape(-1, *weight.shape[-2:]).mT)
                torch.baddbmm(target, g, weight, beta=0 if first else 1, out=target)  # 0 ignores what was there
            elif first:
                target.copy_(_into(tile.norm, g))
            else:
                target += _into(tile.norm, g)
        bends = self.bends.get(i, [])
        if bends:
            assert tile.norm is not None  # nothing bends without a norm
            beta = torch.stack([beta[pairs, columns].flatten(0, 1) for _, beta in bends], -1)
            c = torch.stack([tile.norm.centre(x[pairs, columns].flatten(0, 1)) for x, _ in bends], 1)
            if len(bends) == 1:
                out.addcmul_(beta.transpose(0, 1), c[None, :, 0], value=-1)
            else:
                out.transpose(0, 1).baddbmm_(beta, c, alpha=-1)  # [row, reader, run] @ [row, run, d_model]
        return True


def _into(norm: Norm | None, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
    """From what a norm gives to what it takes, at a scale of 1."""
    if norm is None:
        return x
    x = x * wide(norm.weight)
    return x - x.mean(-1, keepdim=True) if norm.centred else x


def wide(x: Tensor) -> Tensor:
    """In float32 or wider."""
    return x.detach().to(torch.promote_types(x.dtype, torch.float32))


def real(x: Float[Tensor, "pair pos ..."], mask: Bool[Tensor, "pair pos"]) -> Float[Tensor, "pair pos ..."]:
    """Zeros at padding, which may hold anything, NaN too."""
    padding = ~mask.reshape(*mask.shape, *[1] * (x.ndim - 2))
    return x.masked_fill(padding, 0) if bool(padding.any()) else x


def _by_head(x: Float[Tensor, "pair pos ..."]) -> Float[Tensor, "pair pos head width"]:
    return x if x.ndim == 4 else x[:, :, None]
