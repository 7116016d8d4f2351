"""The plan of an nnsight trace: plain values that say what happens where, so that they can be sent to a server.

Everything that needs this package (families, edits, operators, positions) is worked out here, before anything runs:
shapes are known, so edits become index tuples and tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mechattr.models.anatomy import Anatomy
from mechattr.models.base import Batch, ModelInfo
from mechattr.models.edits import Edit, places
from mechattr.models.fused import join, split
from mechattr.models.norms import norm_of, norm_weight
from mechattr.models.operators import Ablate, Add, Mean, Place, Resample, Scale, Set, Zero
from mechattr.models.taps import Taps
from mechattr.sites import parse

Step = tuple[str, str, dict[str, Any]]


def plan_of(
    model: Any,
    anatomy: Anatomy,
    info: ModelInfo,
    batch: Batch,
    taps: Taps,
    *,
    metric: Callable[..., Any] | None = None,
    reduce: Callable[..., Any] | None = None,
    at: Mapping[str, Tensor] | None = None,
    visited: bool = False,
) -> dict[str, Any]:
    """The plan of one run.

    Args:
        model: the transformers model, for the paths of its modules.
        anatomy: where its sites are.
        info: its shape.
        batch: token rows.
        taps: what is wanted of the run.
        metric: what is differentiated.
        reduce: what becomes of activations and gradients.
        at: gradients at sites from which the backward pass starts, in place of the metric.
        visited: whether activations at sites with a gradient are wanted back.
    """
    return {
        "steps": _Steps(model, anatomy, batch, taps).all(),
        "names": set(taps.names),
        "record": set(taps.record),
        "gradients": set(taps.gradients),
        "held": set(taps.held),
        "edits": {name: compiled(edits, name, info, batch, taps) for name, edits in taps.edits.items()},
        "metric": getattr(metric, "function", metric),  # a task's metric is a function with a name
        "reduce": reduce,
        "at": None if at is None else dict(at),
        "visited": visited,
        "rows": {"tokens": batch.tokens, "mask": batch.mask, "example": batch.example, "strings": batch.strings},
    }


class _Steps:
    """The steps of a forward pass that touch what is wanted, in order."""

    def __init__(self, model: nn.Module, anatomy: Anatomy, batch: Batch, taps: Taps) -> None:
        self.model, self.anatomy, self.taps = model, anatomy, taps
        self.paths = {id(module): name for name, module in model.named_modules()}
        dtype = next(model.parameters()).dtype
        self.mended = batch.padded and dtype == torch.float64 and anatomy.family.softmax_float32
        self.steps: list[Step] = []

    def all(self) -> list[Step]:
        """The steps."""
        anatomy, taps = self.anatomy, self.taps
        for name, site in (("embed", "hook_embed"), ("pos_embed", "hook_pos_embed")):
            if name in anatomy.ends and taps.wants(site) and taps.start is None:
                self.add("output", anatomy.ends[name], site=site)
        first = 0 if taps.start is None else taps.start.layer
        for layer, block in enumerate(anatomy.blocks):
            if layer < first:
                self.add("skip", block)
            else:
                self.block(layer)
        if "final" in anatomy.ends:
            self.norm(anatomy.ends["final"], "ln_final.")
        return self.steps

    def add(self, action: str, module: nn.Module, **arguments: Any) -> None:
        self.steps.append((action, self.paths[id(module)], arguments))

    def wants(self, *names: str) -> bool:
        return self.taps.wants_any(names)

    def block(self, layer: int) -> None:
        parts, family, p = self.anatomy.parts[layer], self.anatomy.family, f"blocks.{layer}."
        a, heads, kv_heads = p + "attn.hook_", self.anatomy.n_heads, self.anatomy.n_kv_heads
        start = self.taps.start
        given = start.resid_pre if start is not None and start.layer == layer else None
        pre, mid = p + "hook_resid_pre", p + "hook_resid_mid"
        if given is not None or self.wants(pre, mid):
            stream = mid if self.wants(mid) else ""
            self.add("input", self.anatomy.blocks[layer], site=pre, stream=stream, start=given)
        if "ln1" in parts and not family.post_norm:
            self.norm(parts["ln1"], p + "ln1.")
        if not family.plain_qk and self.wants(a + "q", a + "k"):
            if "qkv" in parts:
                layout = {"split": split, "join": join, "layout": family.fused, "heads": heads, "kv_heads": kv_heads}
                self.add("fused", parts["qkv"], q=a + "q", k=a + "k", **layout)
            else:
                for short, n in (("q", heads), ("k", kv_heads)):
                    if self.wants(a + short):
                        self.add("output", parts[short], site=a + short, heads=n, copied=True)
        inside = self.wants(a + "attn_scores", a + "pattern")
        if inside or self.mended or self.wants(*(a + short for short in ("q", "k", "rot_q", "rot_k", "v"))):
            settings = {"plain": family.plain_qk, "inside": inside, "mended": self.mended}
            self.add("attention", parts["attn"], layer=layer, prefix=a, **settings)
        if self.wants(a + "z"):
            self.add("input", parts["o"], site=a + "z", heads=heads)
        if self.wants(a + "result"):
            layout = {"transposed": type(parts["o"]).__name__ != "Conv1D", "biased": _biased(parts["o"])}
            self.add("result", parts["o"], site=a + "result", heads=heads, **layout)
        if self.wants(p + "hook_attn_out", mid):
            self.add("write", parts["attn_out"], site=p + "hook_attn_out", mid=mid, stream=mid)
        between, after = ("ln1", "ln2") if family.post_norm else ("ln2", "")
        if between in parts:
            self.norm(parts[between], f"{p}{between}.")
        self.mlp(parts, p)
        if after in parts:
            self.norm(parts[after], f"{p}{after}.")
        if self.wants(p + "hook_resid_post"):
            self.add("output", self.anatomy.blocks[layer], site=p + "hook_resid_post")

    def mlp(self, parts: dict[str, nn.Module], p: str) -> None:
        pre, linear = p + "mlp.hook_pre", p + "mlp.hook_pre_linear"
        if self.anatomy.family.gate_up:
            if self.wants(pre, linear):
                self.add("halves", parts["gate"], gate=pre, up=linear)
        else:
            for part, site in (("gate", pre), ("up", linear)):
                if self.wants(site):
                    self.add("output", parts[part], site=site)
        if self.wants(p + "mlp.hook_post"):
            self.add("input", parts["down"], site=p + "mlp.hook_post")
        if self.wants(p + "hook_mlp_out"):
            self.add("output", parts["mlp_out"], site=p + "hook_mlp_out", copied=self.anatomy.family.adds_in_place)

    def norm(self, module: nn.Module, p: str) -> None:
        if self.wants(p + "hook_scale", p + "hook_out"):
            like = next(self.model.parameters())
            norm, stored = norm_of(module, like), getattr(module, "weight", None)
            offset = 0.0 if stored is not None and norm_weight(module, like) is stored else 1.0
            form = {"centred": norm.centred, "offset": offset, "eps": norm.eps}
            has = {"weighted": stored is not None, "biased": norm.bias is not None}
            self.add("norm", module, scale=p + "hook_scale", out=p + "hook_out", **form, **has)


def _biased(module: nn.Module) -> bool:
    return getattr(module, "bias", None) is not None


def shape_of(info: ModelInfo, axes: tuple[str, ...], rows: int, columns: int) -> tuple[int, ...]:
    """The shape of an activation."""
    sizes = {"batch": rows, "pos": columns, "query": columns, "key": columns, **info.sizes}
    return tuple(sizes[axis] for axis in axes)


def compiled(
    edits: list[Edit], site: str, info: ModelInfo, batch: Batch, taps: Taps
) -> list[tuple[str, Any, dict[str, Any]]]:
    """Edits of one site in order, as (what to do, value or function, where)."""
    axes = taps.axes[site]
    shape = shape_of(info, axes, *batch.tokens.shape)
    dtype = getattr(torch, info.dtype)
    if parse(site)[0].endswith("_scale"):
        dtype = torch.promote_types(dtype, torch.float32)
    found = []
    for edit in edits:
        for place in places(edit, shape, site, axes, taps.frame, batch.device):
            blank = torch.zeros((), dtype=dtype, device=batch.device).expand(_selected(place))
            where = {name: getattr(place, name) for name in ("site", "index", "shape", "part", "selected", "whole")}
            found.append((*_operation(edit.op, blank, place), where))
    return found


def _selected(place: Place) -> torch.Size:
    if place.whole:
        return torch.Size(place.shape)
    chosen = torch.broadcast_shapes(*(index.shape for index in place.index))
    return torch.Size((*chosen, *place.shape[len(place.index) :]))


def _operation(op: Any, blank: Tensor, place: Place) -> tuple[str, Any]:
    """An operator as a word and a tensor: what it makes of zeros or ones says what it does. A function stays one."""
    if isinstance(op, Set | Zero | Mean | Resample):
        return "set", op(blank, place)
    if isinstance(op, Add):
        return "add", op(blank, place)
    if isinstance(op, Scale):
        return "scale", op(blank + 1, place)
    if isinstance(op, Ablate):
        op(blank, place)  # refuses a direction that does not fit
        return "ablate", op.direction / op.direction.norm()
    return "call", op
