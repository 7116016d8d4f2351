"""Models whose heads and neurons are divided among processes (tensor parallelism of transformers).

Every process runs the same program. At a site that is divided each of them puts the whole activation together, does
with it what the run asks for, and goes on with its own part. So recordings, edits and gradients are those of the
undivided model, in every process alike.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mechattr.errors import UnsupportedModelError
from mechattr.models.norms import is_norm
from mechattr.sites import parse, site_spec

if TYPE_CHECKING:
    from mechattr.models.anatomy import Anatomy
    from mechattr.models.base import ModelInfo

ONE_PROCESS = "load it in one process with device_map='auto', which puts whole blocks on each device"
# Whether a module of a style takes a part of the features, and whether it gives one.
_STYLES = {
    "colwise": (False, True),
    "rowwise": (True, False),
    "rowwise_rep": (True, False),
    **dict.fromkeys(("colwise_gather_output", "colwise_rep", "rowwise_split_input"), (False, False)),
    **dict.fromkeys(("embedding_rowwise", "embedding_colwise", "moe_tp_experts", "replicate"), (False, False)),
    "replicated_with_grad_allreduce": (False, False),  # norms of single heads, which act on what they are given
}


@dataclass(frozen=True, eq=False, slots=True)
class Split:
    """Which activations of a model are divided among processes.

    Attributes:
        group: torch's process group.
        ways: the number of its processes.
        rank: which of them this is.
        axes: for each site of which a process has a part, by its full name, the axis that is divided.
    """

    group: Any
    ways: int
    rank: int
    axes: Mapping[str, int]

    def count(self, name: str, n: int) -> int:
        """How many of the n heads or neurons of a site are in this process."""
        return n // self.ways if name in self.axes else n

    def whole(self, name: str, part: Tensor) -> Tensor:
        """A site's activation from the parts of all processes. Its gradient is the part's, since what follows is the
        same computation in every process."""
        joined: Tensor = _Join.apply(part, self, self.axes[name])
        return joined

    def part(self, name: str, whole: Tensor) -> Tensor:
        """This process's part of a site's activation. Its gradient is that of all parts."""
        cut: Tensor = _Cut.apply(whole, self, self.axes[name])
        return cut


class _Join(torch.autograd.Function):
    """All parts, along one axis; backwards, the part of the gradient that belongs to this process."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, split: Split, axis: int) -> Tensor:
        ctx.split, ctx.axis = split, axis
        own = part.contiguous()
        parts = [torch.empty_like(own) for _ in range(split.ways)]
        dist.all_gather(parts, own, group=split.group)
        return torch.cat(parts, axis)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        part: Tensor = _Cut.apply(gradients[0], ctx.split, ctx.axis)
        return part, None, None


class _Cut(torch.autograd.Function):
    """One part along an axis; backwards, the gradients of all parts: each process knows that of its own."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, split: Split, axis: int) -> Tensor:
        ctx.split, ctx.axis = split, axis
        size = whole.shape[axis] // split.ways
        return whole.narrow_copy(axis, split.rank * size, size)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        whole: Tensor = _Join.apply(gradients[0], ctx.split, ctx.axis)
        return whole, None, None


def is_split(model: Any) -> bool:
    """Whether this process has only a part of some weights."""
    return (getattr(model, "_tp_size", None) or 1) > 1 or any(hasattr(p, "device_mesh") for p in model.parameters())


def check_one_process(model: Any, backend: str) -> None:
    """Whether a backend that knows nothing of other processes can run a model.

    Raises:
        UnsupportedModelError: its weights are divided among processes.
    """
    if is_split(model):
        found = "its weights are split over processes: each process holds some of its heads"
        fix = f"use backend='hf', which puts them together, or {ONE_PROCESS}"
        raise UnsupportedModelError(f"a {type(model).__name__} on the {backend} backend", found, fix)


def split_of(model: Any, anatomy: Anatomy, info: ModelInfo, sites: Sequence[str]) -> Split | None:
    """How a model is divided among processes; `None` where it is not.

    Args:
        model: a transformers model.
        anatomy: where its parts are.
        info: its sizes.
        sites: the full names of its sites.

    Raises:
        UnsupportedModelError: a division that does not give each process whole heads and neurons, or as many as every
            other one.
    """
    if not is_split(model):
        return None
    styles = _styles(model)
    mesh = model._device_mesh["tp"]
    axes: dict[str, int] = {}
    if anatomy.source is not None:
        raise _refused(model, "it has an encoder beside its decoder")
    for layer, parts in enumerate(anatomy.parts):
        for part, entering, last in (("attn", ("q", "k", "v", "qkv"), "o"), ("mlp", ("gate", "up"), "down")):
            if last not in parts or not _divided(model, styles, parts, entering, last):
                continue
            reason = _of_mlp(anatomy) if part == "mlp" else _of_attention(anatomy, info, parts["attn"])
            sizes = {"neurons": info.d_mlp} if part == "mlp" else {"heads": info.n_heads, "kv heads": info.n_kv_heads}
            uneven = [f"{n} {what}" for what, n in sizes.items() if n % mesh.size()]
            if reason or uneven:
                raise _refused(model, reason or f"{uneven[0]} are divided among {mesh.size()} processes, not evenly")
            axes |= {name: _axis(name) for name in sites if name.startswith(f"blocks.{layer}.{part}.")}
    if _moves(styles, model.get_output_embeddings())[1]:
        raise _refused(model, "each process has the logits of a part of the vocabulary")
    return Split(mesh.get_group(), mesh.size(), mesh.get_local_rank(), {n: a for n, a in axes.items() if a >= 0})


def _of_attention(anatomy: Anatomy, info: ModelInfo, attention: nn.Module) -> str | None:
    """Why a process cannot have whole heads."""
    if anatomy.family.adapter or anatomy.family.fused not in (None, "interleaved"):
        return "its attention is divided, and not by heads"
    weights = [m.weight for m in attention.modules() if is_norm(m)]
    if any(isinstance(weight, Tensor) and weight.numel() != info.d_head for weight in weights):
        return "its norms of queries and keys are not those of single heads"
    return None


def _of_mlp(anatomy: Anatomy) -> str | None:
    """Why a process cannot have whole neurons."""
    return "the one projection to gate and linear input is divided" if anatomy.family.gate_up else None


def _axis(name: str) -> int:
    """The axis that is divided with the heads and neurons, or -1. What heads write is computed from all of them."""
    axes = site_spec(name).axes
    kinds = [] if parse(name)[0] == "result" else [kind for kind in ("head", "kv_head", "neuron") if kind in axes]
    return axes.index(kinds[0]) if kinds else -1


def _styles(model: Any) -> dict[nn.Module, str]:
    """The style of every module of the plan that a model was divided by."""
    how = getattr(model.config, "distributed_config", None)
    if how is None or how.tp_size == 1:
        raise _refused(model, "its weights are split over processes, and not by transformers' tensor parallelism")
    others = [f"{name}={n}" for name in ("fsdp_size", "pp_size", "ep_size") if (n := getattr(how, name, 1)) > 1]
    if others:
        raise _refused(model, f"beside its tensors {', '.join(others)} divide it")
    styles: dict[nn.Module, str] = {}
    for path, module in model.named_modules():
        style = model.tp_plan.get(re.sub(r"\.\d+(?=\.|$)", ".*", path))
        if style is not None:
            styles[module] = style
        mine = any(hasattr(p, "device_mesh") for p in module.parameters(recurse=False))
        if style not in _STYLES and (mine or style is not None):
            raise _refused(model, f"{path} is divided {f'by the style {style!r}' if style else 'without a style'}")
    return styles


def _moves(styles: Mapping[nn.Module, str], module: Any) -> tuple[bool, bool]:
    """Whether a module takes a part of its input's features, and whether it gives a part of its output's."""
    return _STYLES[styles.get(module, "replicate")]


def _divided(
    model: Any, styles: Mapping[nn.Module, str], parts: Mapping[str, nn.Module], entering: Sequence[str], last: str
) -> bool:
    """Whether what lies between projections that enter and the one that leaves is in parts."""
    given = {name: _moves(styles, parts[name])[1] for name in entering if name in parts}
    taken = _moves(styles, parts[last])[0]
    if any(divided != taken for divided in given.values()):
        names = ", ".join(f"{name} {styles.get(parts[name], 'whole')}" for name in (*given, last))
        raise _refused(model, f"its projections are divided in ways that do not fit: {names}")
    return taken


def _refused(model: Any, found: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"a hooked {type(model).__name__} in parallel processes", found, ONE_PROCESS)
