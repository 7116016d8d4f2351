"""How much each part of a sum is the sum: shares by L1 proximity, the measure of information flow routes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from mechattr.artifact import Cache
from mechattr.decomposition.parts import AttentionParts, MlpParts, mlp_sites
from mechattr.errors import UnsupportedFeatureError
from mechattr.models.base import HookedModel
from mechattr.sites import full_name

_ENTRIES = {
    "cpu": 1 << 18,
    "cuda": 1 << 24,
}  # of vectors that are in memory at once: what caches hold, what fills a GPU
_FLOOR, _SHIFT = 1e-5, 1e-6  # of the published tool


@dataclass(frozen=True, eq=False, slots=True)
class Shares:
    """What each part is of the sum at some nodes; all parts of a node together are 1.

    Attributes:
        moved: of what attention moves, by head and key, or [node, part, 1] of an MLP: all of it, or its neurons.
        residual: of the stream that passes by.
        bias: of biases, which come from no token.
        clipped: nodes at which no part points the way of the sum; the stream that passes by then counts as all of it.
    """

    moved: Float[Tensor, "node part key"]
    residual: Float[Tensor, " node"]
    bias: Float[Tensor, " node"]
    clipped: int

    @property
    def flat(self) -> Float[Tensor, "node parts"]:
        """All parts: what is moved, the residual, the bias."""
        return torch.cat([self.moved.flatten(1), self.residual[:, None], self.bias[:, None]], 1)


def proximity(
    parts: Float[Tensor, "node part d_model"], whole: Float[Tensor, "node d_model"], compat: bool = False
) -> Float[Tensor, "node part"]:
    """max(0, |y| - |y - z|), L1 norms, of parts z in their sums y.

    Args:
        parts: z.
        whole: y.
        compat: as the published tool has it: max(1e-5, ...) and 1e-6 added to each difference.
    """
    y = whole[:, None]
    return _nearness(torch.cat([y, y - parts], 1), compat)


def _scaled(
    factors: Float[Tensor, "node more"],
    vectors: Float[Tensor, "more d_model"],
    whole: Float[Tensor, "node d_model"],
    compat: bool,
) -> Float[Tensor, "node part"]:
    """`proximity` of the parts factor * vector, of which the first is 0 and no part."""
    return _nearness(torch.addcmul(whole[:, None], factors[..., None], vectors, value=-1), compat)


def _nearness(left: Float[Tensor, "node more d_model"], compat: bool) -> Float[Tensor, "node part"]:
    """From y - z, where the first z is 0: its norm is then summed as the others are, so that a part that is 0, too, is
    near by exactly 0."""
    if compat:
        left[:, 1:] -= _SHIFT
    sizes = left.abs_().sum(-1)
    return (sizes[:, :1] - sizes[:, 1:]).clamp(min=_FLOOR if compat else 0.0)


def _chunks(n: int, size: int, device: torch.device) -> tuple[Tensor, ...]:
    """Numbers from 0 to n - 1 in runs for which vectors of `size` entries fit into memory together."""
    return torch.arange(n, device=device).split(max(1, _ENTRIES.get(device.type, _ENTRIES["cuda"]) // size))


def attention_shares(
    parts: AttentionParts, row: int, queries: Int[Tensor, " node"], length: int, compat: bool = False
) -> Shares:
    """Shares in the stream after attention, at some positions of one prompt.

    Args:
        parts: of a block.
        row: the prompt.
        queries: its nodes, ascending.
        length: its number of tokens.
        compat: see `proximity`; and the bias is no part.

    Cost:
        O(nodes x tokens x heads x d_model) operations; vectors of one head at a time, of some nodes at a time.
    """
    whole, d_model = parts.whole[row, queries], parts.whole.shape[-1]
    pattern = parts.pattern[row, :, queries, :length]
    found = whole.new_zeros(len(queries), len(parts.w_o), length)
    if compat:
        found += _FLOOR
    chunks = _chunks(len(queries), length * d_model, whole.device)
    reach = [length] * len(chunks) if compat else [_reach(pattern[:, nodes]) for nodes in chunks]
    group = len(parts.w_o) // parts.v.shape[2]
    factors = pad(pattern, (1, 0))
    for head, w_o in enumerate(parts.w_o):
        vectors = pad(parts.v[row, :length, head // group] @ w_o, (0, 0, 1, 0))
        for nodes, keys in zip(chunks, reach, strict=True):
            some = slice(keys + 1)
            found[nodes, head, :keys] = _scaled(factors[head, nodes, some], vectors[some], whole[nodes], compat)
    rest = torch.stack([parts.residual[row, queries], parts.bias[row, queries]], 1)
    return _normalised(found, proximity(rest, whole, compat), compat)


def _reach(pattern: Float[Tensor, "head node key"]) -> int:
    """How many keys there are up to the last one that is looked at."""
    seen = pattern.any(0).any(0)
    return int((seen * torch.arange(1, len(seen) + 1, device=seen.device)).max())


def mlp_shares(parts: MlpParts, row: int, nodes: Int[Tensor, " node"], compat: bool = False) -> Shares:
    """Shares in the stream after the MLP, with what the MLP writes as one part.

    Args:
        parts: of a block.
        row: the prompt.
        nodes: positions.
        compat: see `proximity`; and the bias is no part.
    """
    three = torch.stack([x[row, nodes] for x in (parts.written, parts.residual, parts.bias)], 1)
    found = proximity(three, parts.whole[row, nodes], compat)
    return _normalised(found[:, :1, None], found[:, 1:], compat)


@dataclass(frozen=True, eq=False, slots=True)
class NeuronParts:
    """What each neuron of a block's MLP writes: act_j W_out[j], through the norms behind it where there are any.

    Attributes:
        acts: [batch, pos, neuron], divided by the scales of those norms.
        w_out: centred and weighted by them.
        bias: b_out through the norms, and their biases.
    """

    acts: Float[Tensor, "batch pos neuron"]
    w_out: Float[Tensor, "neuron d_model"]
    bias: Float[Tensor, "batch pos d_model"]


def neuron_sites(model: HookedModel, layer: int) -> tuple[str, ...]:
    """What `neuron_parts` needs recorded.

    Raises:
        UnsupportedFeatureError: a mixture of experts, or no MLP.
    """
    site = full_name("mlp_post", layer)
    if model.info.n_experts or site not in model.sites():
        found = f"{model.info.n_experts} experts in place of one MLP" if model.info.n_experts else f"no site {site}"
        raise UnsupportedFeatureError(f"neurons of {model.info.name!r}", found, "leave neurons=True out")
    return site, *mlp_sites(model, layer)


def neuron_parts(model: HookedModel, activations: Cache, layer: int, parts: MlpParts) -> NeuronParts:
    """A block's MLP by neuron.

    Args:
        model: a hooked model.
        activations: with `neuron_sites`.
        layer: the block.
        parts: what `mlp_parts` gives for it.
    """
    p = f"blocks.{layer}."
    wide = parts.whole.dtype
    acts = activations[full_name("mlp_post", layer)].values.to(wide)
    w_out, b_out = model.weight(p + "mlp.W_out").to(wide), model.weight(p + "mlp.b_out").to(wide)
    behind = model.norm(p + "ln2_post")
    if behind is None:
        return NeuronParts(acts, w_out, b_out.expand_as(parts.whole))
    written = acts @ w_out + b_out
    before = activations[full_name("ln1", layer)].values.to(wide) + written if model.info.post_norm else written
    scale = behind.scale(before).to(wide)[..., None]
    through = behind.weight.to(wide)
    bias = behind.centre(b_out).to(wide) * through / scale
    if behind.bias is not None:
        bias = bias + behind.bias.to(wide)
    return NeuronParts(acts / scale, behind.centre(w_out).to(wide) * through, bias)


def neuron_shares(
    parts: MlpParts, neurons: NeuronParts, row: int, nodes: Int[Tensor, " node"], compat: bool = False
) -> Shares:
    """Shares in the stream after the MLP, with every neuron as a part.

    Args:
        parts: of a block.
        neurons: of the same block.
        row: the prompt.
        nodes: positions.
        compat: see `proximity`; and the bias is no part.

    Cost:
        O(nodes x neurons x d_model) operations; vectors of some nodes at a time, and of some neurons.
    """
    whole, acts = parts.whole[row, nodes], neurons.acts[row, nodes]
    found = torch.empty_like(acts)
    width = neurons.w_out.shape[1]
    for some in _chunks(acts.shape[1], width, acts.device):
        factors, vectors = pad(acts[:, some], (1, 0)), pad(neurons.w_out[some], (0, 0, 1, 0))
        for few in _chunks(len(nodes), len(some) * width, acts.device):
            found[few[:, None], some] = _scaled(factors[few], vectors, whole[few], compat)
    rest = torch.stack([parts.residual[row, nodes], neurons.bias[row, nodes]], 1)
    return _normalised(found[..., None], proximity(rest, whole, compat), compat)


def _normalised(moved: Tensor, rest: Float[Tensor, "node 2"], compat: bool) -> Shares:
    residual, bias = rest[:, 0], torch.zeros_like(rest[:, 1]) if compat else rest[:, 1]
    total = moved.sum((1, 2)) + residual + bias
    none = total == 0
    residual = residual + none.to(residual.dtype)
    total = total + none.to(total.dtype)
    return Shares(moved / total[:, None, None], residual / total, bias / total, int(none.sum()))
