"""A hooked model proves itself when it is made: sites fire, patterns are probabilities, what is overwritten counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from mechattr.errors import SelfCheckError, UnsupportedModelError
from mechattr.models.base import Batch, ModelInfo
from mechattr.models.edits import Edit, Frame
from mechattr.models.operators import Set
from mechattr.models.taps import Taps
from mechattr.sites import full_name, parse, site_spec

if TYPE_CHECKING:
    from mechattr.models.hf import HookedHF
    from mechattr.models.nnsight import HookedNNsight

ATTENTION = ("rot_q", "rot_k", "v", "attn_scores", "pattern")


def selfcheck(model: HookedHF | HookedNNsight) -> None:
    """Two forward passes over four tokens; a third where an adapter does the family's attention.

    Raises:
        UnsupportedModelError: attention does not go through the tap.
        SelfCheckError: a site does not fire, has another shape, or overwriting the pattern does not act; or attention
            with taps in it is not the model's own.
    """
    ids = torch.arange(5, device=model.device)[None] % model.info.d_vocab
    batch = Batch.of(ids[:, :4])
    if model.info.n_encoder_layers:
        batch = replace(batch, source=Batch.of(ids))
    fired = _fire(model, batch, model.sites())
    silent = [name for name in model.sites() if name not in fired]
    untapped = [name for name in silent if _kind(name) in ATTENTION]
    if untapped:
        raise UnsupportedModelError(
            f"a hooked {type(model.model).__name__}",
            f"its attention does not go through the tap: {untapped[0]} never fired ({len(untapped)} sites silent)",
            "use transformers' own attention of this family; a custom attention must call the attention interface",
        )
    if silent:
        raise SelfCheckError(
            f"the sites of {type(model.model).__name__}",
            f"{', '.join(silent[:5])} never fired",
            "report the model's config: the family table does not describe it",
        )
    sizes = axis_sizes(model.info, 4)
    for name, x in fired.items():
        wanted = tuple(sizes[axis] for axis in site_spec(name).axes)
        if tuple(x.shape) != wanted:
            raise SelfCheckError(
                f"site {name}", f"shape {tuple(x.shape)}", f"expected {wanted}: the family table is wrong"
            )
    patterns = {name: x for name, x in fired.items() if _kind(name) == "pattern"}
    if not all(bool(torch.isfinite(x).all()) for x in patterns.values()):
        return  # weights that overflow are reported by the first run, with the place where it begins
    if any(bool((x.sum(-1) > 1 + 1e-2).any()) or bool((x < 0).any()) for x in patterns.values()):
        raise SelfCheckError("the attention pattern", "rows that are no probabilities", "report the model's config")
    _check_sums(model, fired)
    if model._anatomy.family.adapter is not None:
        _check_adapter(model, batch, fired)
    _check_causes(model, batch, patterns)


def axis_sizes(info: ModelInfo, columns: int) -> dict[str, int]:
    """The length of every axis of a site in a run of one row, whose source has one column more."""
    source = {"source": columns + 1, "source_query": columns + 1}
    return {"batch": 1, "pos": columns, "query": columns, "key": columns, **source, **info.sizes}


def _kind(name: str) -> str:
    """What a site is, in whichever of a model's attentions: the short name without what tells them apart."""
    return parse(name)[0].removeprefix("cross_").removeprefix("encoder_")


def _fire(model: HookedHF | HookedNNsight, batch: Batch, sites: Sequence[str]) -> dict[str, torch.Tensor]:
    taps = Taps(frame=Frame.whole(batch), record=frozenset(sites))
    with torch.no_grad():
        model._forward(batch, taps)
    return taps.activations


def _check_sums(model: HookedHF | HookedNNsight, fired: Mapping[str, torch.Tensor]) -> None:
    """What attention and MLP are said to write must be what a block adds to the stream. (A post-norm encoder normalises
    the sum.)"""
    for layer in range(0 if model.info.post_norm else model.info.n_layers):
        names = [full_name(short, layer) for short in ("resid_pre", "attn_out", "cross_attn_out", "mlp_out")]
        after = fired[full_name("resid_post", layer)].float()
        total = sum(fired[name].float() for name in names if name in fired)
        if bool(((total - after).abs() > 2e-2 * after.abs().max() + 1e-6).any()):  # bfloat16
            raise SelfCheckError(
                f"what block {layer} writes",
                f"{' + '.join(parse(name)[0] for name in names if name in fired)} is not resid_post",
                "name the modules whose outputs are added to the stream: a post-norm, or a projection",
            )


def _check_adapter(model: HookedHF | HookedNNsight, batch: Batch, fired: Mapping[str, torch.Tensor]) -> None:
    """Attention that is done once more, with taps in it, must be what the model does without."""
    last = full_name("resid_post", model.info.n_layers - 1)
    own = _fire(model, batch, [last])[last].float()
    if bool(((fired[last].float() - own).abs() > 2e-2 * own.abs().max() + 1e-6).any()):  # bfloat16 has 8 bits
        raise SelfCheckError(
            f"the attention of {type(model.model).__name__}",
            "with taps in it, it gives another residual stream than without",
            "use transformers' own class of this family, in a release that was tested (see mechattr models)",
        )


def _check_causes(model: HookedHF | HookedNNsight, batch: Batch, patterns: Mapping[str, torch.Tensor]) -> None:
    """Overwrites every pattern: each layer's z must then be the new pattern times v."""
    turned = {name: x.flip(-1) for name, x in patterns.items()}
    record = [name for name in model.sites() if _kind(name) in ("v", "z")]
    seen = model.run(batch, record=record, edits=[Edit(name, Set(x)) for name, x in turned.items()]).activations
    for name, pattern in turned.items():
        v, z = (seen[name.replace("hook_pattern", f"hook_{short}")].values.float() for short in ("v", "z"))
        v = v.repeat_interleave(z.shape[2] // v.shape[2], 2)
        wanted = torch.einsum("bhqk,bkhd->bqhd", pattern.float(), v)
        if bool(((z - wanted).abs() > 2e-2 * wanted.abs().max() + 1e-6).any()):  # bfloat16 has 8 bits
            raise SelfCheckError(
                f"site {name}", "overwriting it does not give the z that it should", "use transformers' own attention"
            )
