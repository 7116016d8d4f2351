"""What a bridge is asked at load: which of its hook points fire and act, and whether they are what they are called."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mechattr.errors import SelfCheckError
from mechattr.models.base import Batch
from mechattr.models.edits import Frame
from mechattr.models.selfcheck import axis_sizes
from mechattr.models.taps import Taps
from mechattr.sites import full_name, parse, site_spec

if TYPE_CHECKING:
    from mechattr.models.lens import HookedLens

NEAR = 2e-2  # of the largest entry: bfloat16 has 8 bits


def _probe(model: HookedLens, sites: tuple[str, ...]) -> tuple[Batch, Taps, Tensor]:
    batch = Batch.of(torch.arange(4, device=model.model.device)[None] % model.info.d_vocab)
    names = frozenset(sites)
    taps = Taps(Frame(batch.lengths, batch.positions, batch.positions), record=names, gradients=names)
    with torch.enable_grad():
        logits = model._forward(batch, taps)
    return batch, taps, logits


def live_sites(model: HookedLens) -> tuple[str, ...]:
    """The candidates among `model.sites()` that fire, and on which some logit depends.

    Raises:
        SelfCheckError: a site of another shape.
    """
    sites = model.sites()
    try:
        _, taps, logits = _probe(model, sites)
    except NotImplementedError:  # this bridge cannot split attention by heads
        sites = tuple(name for name in sites if parse(name)[0] != "result")
        _, taps, logits = _probe(model, sites)
    generator = torch.Generator().manual_seed(0)
    total = (logits * torch.randn(logits.shape, generator=generator).to(logits)).sum()
    edges = [point.edge for point in taps.nodes.values()]
    found = torch.autograd.grad(total, edges, allow_unused=True)
    acting = {name for name, gradient in zip(taps.nodes, found, strict=True) if gradient is not None}
    sizes = axis_sizes(model.info, 4)
    for name in acting:
        shape, wanted = tuple(taps.activations[name].shape), tuple(sizes[axis] for axis in site_spec(name).axes)
        if shape != wanted:
            raise SelfCheckError(f"site {name} of a bridge", f"shape {shape}", f"expected {wanted}; use backend='hf'")
    return tuple(name for name in sites if name in acting)


def selfcheck(model: HookedLens) -> None:
    """One forward pass over four tokens: the stream is the sum of what is written to it, z is what the pattern makes of
    v, and scores are what `attention` says.

    Raises:
        SelfCheckError: they are not.
    """
    _, taps, _ = _probe(model, model.sites())
    seen = {name: x.double() for name, x in taps.activations.items()}
    for layer in range(model.info.n_layers):
        x = {parse(name)[0]: value for name, value in seen.items() if parse(name)[1] == layer}
        if "attn_out" in x:
            _same(model, layer, "resid_post", x["resid_pre"] + x["attn_out"] + x["mlp_out"], x)
        groups = model.info.n_heads // model.info.n_kv_heads
        if "pattern" in x:
            v = x["v"].repeat_interleave(groups, 2)
            _same(model, layer, "z", torch.einsum("bhqk,bkhd->bqhd", x["pattern"], v), x)
        if "attn_scores" in x and "rot_k" in x:
            form, k = model.attention(layer), x["rot_k"].repeat_interleave(groups, 2)
            scores = torch.einsum("bqhd,bkhd->bhqk", x["rot_q"], k) * form.scaling
            if form.softcap is not None:
                scores = form.softcap * (scores / form.softcap).tanh()
            hidden = x["attn_scores"] < -1e4
            _same(
                model,
                layer,
                "attn_scores",
                scores.masked_fill(hidden, 0),
                {"attn_scores": x["attn_scores"].masked_fill(hidden, 0)},
            )


def _same(model: HookedLens, layer: int, short: str, wanted: Tensor, seen: dict[str, Tensor]) -> None:
    found = seen[short]
    if bool(((found - wanted).abs() > NEAR * wanted.abs().max() + 1e-6).any()):
        raise SelfCheckError(
            f"site {full_name(short, layer)} of a bridge of {model.info.family}",
            f"it differs by {float((found - wanted).abs().max()):.2g} from what the other sites make of it",
            "use backend='hf', and report the versions of transformer-lens and transformers",
        )
