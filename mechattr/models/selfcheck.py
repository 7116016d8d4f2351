"""A hooked model proves itself when it is made: sites fire, patterns are probabilities, what is overwritten counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from mechattr.errors import SelfCheckError, UnsupportedModelError
from mechattr.models.base import Batch, ModelInfo
from mechattr.models.edits import Edit, Frame
from mechattr.models.norms import norm_scale, normalise
from mechattr.models.operators import Set
from mechattr.models.taps import Taps
from mechattr.sites import full_name, parse, site_spec

if TYPE_CHECKING:
    from mechattr.models.hf import HookedHF
    from mechattr.models.nnsight import HookedNNsight

ATTENTION = ("rot_q", "rot_k", "v", "attn_scores", "pattern")


def selfcheck(model: HookedHF | HookedNNsight) -> None:
    """Two forward passes over four tokens; a third where an adapter does the family's attention, and two over eight
    where the family has no row in the table.

    Raises:
        UnsupportedModelError: attention does not go through the tap.
        SelfCheckError: a site does not fire, has another shape, or is not what its name says: heads and neurons that
            are not all that attention and MLP write, a pattern that does not act; a norm that computes something else;
            attention with taps in it that is not the model's own; or positions that count padding.
    """
    ids = torch.arange(5, device=model.device)[None] % model.info.d_vocab
    batch = Batch.of(ids[:, :4])
    if model.info.n_encoder_layers:
        batch = replace(batch, source=Batch.of(ids))
    fired, logits = _check_norms(model, batch)
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
    _check_heads(model, fired)
    if model.info.backend == "hf" and "ln_final.hook_out" in fired and not model.info.encoder:
        _check_logits(model, fired["ln_final.hook_out"], logits)
    if model._anatomy.family.adapter is not None:
        _check_adapter(model, batch, fired)
    _check_causes(model, batch, fired)
    if model.info.mapping != "table" and not model.info.n_encoder_layers:
        _check_padding(model)


def axis_sizes(info: ModelInfo, columns: int) -> dict[str, int]:
    """The length of every axis of a site in a run of one row, whose source has one column more."""
    source = {"source": columns + 1, "source_query": columns + 1}
    return {"batch": 1, "pos": columns, "query": columns, "key": columns, **source, **info.sizes}


def _kind(name: str) -> str:
    """What a site is, in whichever of a model's attentions: the short name without what tells them apart."""
    return parse(name)[0].removeprefix("cross_").removeprefix("encoder_")


def _fire(
    model: HookedHF | HookedNNsight, batch: Batch, sites: Sequence[str]
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    taps = Taps(frame=Frame.whole(batch), record=frozenset(sites))
    with torch.no_grad():
        logits = model._forward(batch, taps)
    return taps.activations, logits


def _far(found: torch.Tensor, wanted: torch.Tensor, close: float = 2e-2) -> bool:
    """Whether they differ by more than rounding, of which bfloat16, with 8 bits, has much. Their devices may, too."""
    wanted = wanted.float()
    return bool(((found.to(wanted) - wanted).abs() > close * wanted.abs().max() + 1e-6).any())


def _tight(x: torch.Tensor) -> float:
    """What is rounding where sums are taken in the same order, or nearly so."""
    return 1e-4 if x.dtype in (torch.float32, torch.float64) else 2e-2


def _check_norms(model: HookedHF | HookedNNsight, batch: Batch) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Norms must compute what `norms` says of their class, which scales, weights and frozen norms rest on. Returns what
    every site is in the same run, and the logits."""
    wrong: list[str] = []

    def compare(module: Any, args: Any, out: torch.Tensor) -> None:
        wanted = normalise(module, args[0], norm_scale(module, args[0]))
        if _far(out, wanted, _tight(out)):
            wrong.append(type(module).__name__)

    with ExitStack() as stack:
        for norm in model._anatomy.norms:
            stack.callback(norm.register_forward_hook(compare).remove)
        fired, logits = _fire(model, batch, model.sites())
    if wrong:
        raise SelfCheckError(
            f"the norms of {type(model.model).__name__}",
            f"{wrong[0]} gives something else than x / scale * weight + bias",
            "use a model whose norms are LayerNorm, RMSNorm, or those of a supported family (see mechattr models)",
        )
    return fired, logits


def _check_logits(model: HookedHF | HookedNNsight, final: torch.Tensor, logits: torch.Tensor) -> None:
    """The unembedding, with the factor that its weight includes, must give the logits; a softcap may follow."""
    anatomy, config = model._anatomy, model.config
    with torch.no_grad():
        own = model.model.get_output_embeddings()(final) * anatomy.factors.logits
    own = own if anatomy.logit_bias is None else own + anatomy.logit_bias.to(own)
    cap = getattr(config, "final_logit_softcapping", None)
    if _far(logits, own if cap is None else cap * torch.tanh(own / cap)):
        raise SelfCheckError(
            f"the logits of {type(model.model).__name__}",
            "they are not what the unembedding gives of the last norm's output",
            "use a family of the table (see mechattr models): what this one multiplies by, no mapping can say",
        )


def _check_sums(model: HookedHF | HookedNNsight, fired: Mapping[str, torch.Tensor]) -> None:
    """What attention and MLP are said to write must be what a block adds to the stream. (A post-norm encoder normalises
    the sum.)"""
    for layer in range(0 if model.info.post_norm else model.info.n_layers):
        names = [full_name(short, layer) for short in ("resid_pre", "attn_out", "cross_attn_out", "mlp_out")]
        after = fired[full_name("resid_post", layer)]
        total = torch.stack([fired[name].float() for name in names if name in fired]).sum(0)
        if _far(total, after):
            raise SelfCheckError(
                f"what block {layer} writes",
                f"{' + '.join(parse(name)[0] for name in names if name in fired)} is not resid_post",
                "name the modules whose outputs are added to the stream: a post-norm, or a projection",
            )


def _check_padding(model: HookedHF | HookedNNsight) -> None:
    """Positions must be those that a run gives, not columns. (Families of the table were tested.)"""
    columns = torch.arange(8, device=model.device)[None]
    ids = columns % model.info.d_vocab
    padded, alone = (model.run(b).logits for b in (Batch.of(ids, columns >= 3), Batch.of(ids[:, 3:])))
    if _far(padded[:, 3:], alone, _tight(alone)):
        raise SelfCheckError(
            f"rows of {type(model.model).__name__} that are padded on the left",
            "other logits than those of the row alone: something counts columns instead of positions",
            "use a model that takes position_ids; if its position embedding counts, say by_column=True in its Family",
        )


def _check_heads(model: HookedHF | HookedNNsight, fired: Mapping[str, torch.Tensor]) -> None:
    """What the heads write must be all that attention writes, but for a bias. (A norm may follow on it.)"""
    for name in [name for name in fired if _kind(name) == "result" and not model.info.write_norm]:
        short, layer = parse(name)
        out = fired[full_name(short.replace("result", "attn_out"), layer)].float()
        bias = out - fired[name].float().sum(2)
        if _far(out - bias[:, :1], out - bias):
            raise SelfCheckError(
                f"site {name}",
                "the heads' writes are not all that attention writes",
                "name the projection whose output attention writes, o=...; one with more after it cannot be hooked",
            )


def _check_adapter(model: HookedHF | HookedNNsight, batch: Batch, fired: Mapping[str, torch.Tensor]) -> None:
    """Attention that is done once more, with taps in it, must be what the model does without."""
    last = full_name("resid_post", model.info.n_layers - 1)
    if _far(fired[last], _fire(model, batch, [last])[0][last]):
        raise SelfCheckError(
            f"the attention of {type(model.model).__name__}",
            "with taps in it, it gives another residual stream than without",
            "use transformers' own class of this family, in a release that was tested (see mechattr models)",
        )


def _check_causes(model: HookedHF | HookedNNsight, batch: Batch, fired: Mapping[str, torch.Tensor]) -> None:
    """Overwrites every pattern: each layer's z must then be the new pattern times v. And what enters each MLP's
    activation is made the same at all positions: so must be what the MLP writes."""
    turned = {name: x.flip(-1) for name, x in fired.items() if _kind(name) == "pattern"}
    even = {name: x[:, :1].expand_as(x) for name, x in fired.items() if _kind(name) in ("mlp_pre", "mlp_pre_linear")}
    edits = [Edit(name, Set(x)) for name, x in (turned | even).items()]
    record = [name for name in model.sites() if _kind(name) in ("v", "z", "mlp_post", "mlp_out")]
    seen = model.run(batch, record=record, edits=edits).activations
    for name, pattern in turned.items():
        v, z = (seen[name.replace("hook_pattern", f"hook_{short}")].values.float() for short in ("v", "z"))
        v = v.repeat_interleave(z.shape[2] // v.shape[2], 2)
        wanted = torch.einsum("bhqk,bkhd->bqhd", pattern.float(), v)
        if _far(z, wanted):
            raise SelfCheckError(
                f"site {name}", "overwriting it does not give the z that it should", "use transformers' own attention"
            )
    for name in even:
        short, layer = parse(name)
        for part in ("mlp_post", "mlp_out"):
            after = full_name(short.removesuffix("_linear").replace("mlp_pre", part), layer)
            x = seen[after].values
            if _far(x, x[:, :1].expand_as(x)):
                raise SelfCheckError(
                    f"site {name}",
                    f"{part} depends on more than what enters the activation",
                    "name gate, up, act and down of the whole MLP; of a mixture of experts, router and experts",
                )
