"""Weights of a transformers model under the standard names and orientations.

`W_Q W_K W_V` are [head, d_model, d_head], `W_O` [head, d_head, d_model], `W_in W_gate` [d_model, d_mlp], `W_out`
[d_mlp, d_model], `W_E` [d_vocab, d_model], `W_pos` [n_ctx, d_model], `W_U` [d_model, d_vocab]; biases likewise. What a
model multiplies by between its modules is in them, so that `z W_O + b_O` is what is added to the residual stream. An
encoder-decoder model has `blocks.{l}.cross_attn.W_Q` beside `blocks.{l}.attn.W_Q`, and those of its encoder under
`encoder.`, such as `encoder.{l}.attn.W_Q` and `encoder.embed.W_E`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mechattr.errors import UnknownNameError, nearest
from mechattr.models import fused
from mechattr.models.norms import norm_weight
from mechattr.models.placement import stored

if TYPE_CHECKING:
    from mechattr.models.anatomy import Anatomy

BLOCK_NAMES = (
    *(f"attn.{kind}_{m}" for m in "QKVO" for kind in "Wb"),
    *(f"mlp.{n}" for n in ("W_in", "b_in", "W_gate", "b_gate", "W_out", "b_out")),
    *(f"{n}.{p}" for n in ("ln1", "ln2") for p in "wb"),
)
END_NAMES = ("embed.W_E", "pos_embed.W_pos", "ln_final.w", "ln_final.b", "unembed.W_U", "unembed.b_U")


def matrix(module: Any) -> Tensor:
    """The weight of a Linear or a Conv1D as [in, out]."""
    weight = _table(module)
    return weight if type(module).__name__ == "Conv1D" else weight.T


def w_o(module: nn.Module, n_heads: int) -> Tensor:
    """The output projection as [head, d_head, d_model]."""
    return matrix(module).unflatten(0, (n_heads, -1))


def weight(name: str, anatomy: Anatomy, head: nn.Module | None) -> Tensor:
    """A weight by its standard name; a zero tensor for a bias that the model does not have.

    Raises:
        UnknownNameError: no such name, or the model has no such part.
    """
    if name.startswith("encoder.") and anatomy.source is not None:
        rest = name.removeprefix("encoder.")
        return weight(f"blocks.{rest}" if rest[0].isdigit() else rest, anatomy.source, None)
    found = _end(name, anatomy, head) if not name.startswith("blocks.") else _block(name, anatomy)
    if found is None:
        names = [*END_NAMES, *(f"blocks.0.{n}" for n in BLOCK_NAMES)]
        raise UnknownNameError(f"weight {name!r}", "this model has no such weight", nearest(name, names))
    return found


class Hasher:
    """sha256 of named tensors; remembers the last one, for as long as no tensor is replaced or written to."""

    def __init__(self) -> None:
        self._state: list[tuple[str, int, int]] = []
        self._digest = ""

    def __call__(self, tensors: Mapping[str, Tensor], read: Callable[[str], Tensor | None] | None = None) -> str:
        """`read` gives the value of a tensor that is elsewhere: offloaded, where a change goes unseen, or in parts in
        other processes."""
        own = {name: getattr(tensors[name], "_local_tensor", tensors[name]) for name in sorted(tensors)}
        state = [(name, x.data_ptr(), x._version + tensors[name]._version) for name, x in own.items()]
        if state != self._state:
            digest = hashlib.sha256()
            for name, *_ in state:
                elsewhere = tensors[name].is_meta or own[name] is not tensors[name]
                value = read(name) if read is not None and elsewhere else tensors[name]
                assert value is not None
                tensor = value.detach().cpu().contiguous()
                digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
                digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
            self._state, self._digest = state, digest.hexdigest()
        return self._digest


def _end(name: str, anatomy: Anatomy, head: Any) -> Tensor | None:
    ends = anatomy.ends
    if name == "embed.W_E":
        embed: Any = ends["embed"]
        table = _table(embed)
        own = torch.as_tensor(getattr(embed, "embed_scale", 1.0), dtype=table.dtype, device=table.device)
        return _times(table, anatomy.factors.embed * own)
    if name == "pos_embed.W_pos" and "pos_embed" in ends:
        positions: Any = ends["pos_embed"]
        return _table(positions)[getattr(positions, "offset", anatomy.family.position_offset) :]
    if name in ("ln_final.w", "ln_final.b") and "final" in ends:
        return _norm(ends["final"], name[-1], anatomy)
    if name == "unembed.W_U" and head is not None:
        return _times(matrix(head), anatomy.factors.logits)
    if name == "unembed.b_U" and head is not None:
        own = _times(_bias(head), anatomy.factors.logits)
        return own if anatomy.logit_bias is None else own + anatomy.logit_bias[0].to(own.device)
    return None


def _block(name: str, anatomy: Anatomy) -> Tensor | None:
    match = re.fullmatch(r"blocks\.(\d+)\.(\w+)\.(\w+)", name)
    if match is None or int(match[1]) >= len(anatomy.blocks):
        return None
    parts, group, short = anatomy.parts[int(match[1])], match[2], match[3]
    if group == "cross_attn" and anatomy.cross:
        parts, group = anatomy.cross[int(match[1])], "attn"
    if group in ("ln1", "ln2"):
        return _norm(parts[group], short, anatomy) if group in parts and short in "wb" else None
    if group == "attn" and short in ("W_O", "b_O"):
        return _times(w_o(parts["o"], anatomy.n_heads) if short == "W_O" else _bias(parts["o"]), anatomy.factors.write)
    if group == "attn" and re.fullmatch("[Wb]_[QKV]", short):
        kind, which = short[0], short[2].lower()
        heads = anatomy.n_heads if which == "q" else anatomy.n_kv_heads
        flat = _projection(parts, which, kind, anatomy)
        return flat.unflatten(-1, (heads, -1)).movedim(-2, 0) if kind == "W" else flat.unflatten(-1, (heads, -1))
    if group == "mlp" and "down" in parts:
        if short in ("W_out", "b_out"):
            return _times(matrix(parts["down"]) if short == "W_out" else _bias(parts["down"]), anatomy.factors.write)
        return _mlp(parts, short, anatomy.family.gate_up)
    return None


def _projection(parts: dict[str, nn.Module], which: str, kind: str, anatomy: Anatomy) -> Tensor:
    """[d_model, heads * d_head] or [heads * d_head]; a fused projection is split as its family lays it out."""
    module = parts.get(which) or parts["qkv"]
    whole = matrix(module) if kind == "W" else _bias(module)
    scaling = getattr(parts["attn"], "scaling", None) if type(parts["attn"]).__name__ == "OPTAttention" else None
    if which in parts:  # OPT scales its queries before attention, so its W_Q does
        return whole * scaling if scaling is not None and which == "q" else whole
    parted = fused.split(whole, anatomy.family.fused or "", anatomy.n_heads, anatomy.n_kv_heads)
    return parted["qkv".index(which)].flatten(-2)


def _mlp(parts: dict[str, nn.Module], short: str, joined: bool) -> Tensor | None:
    """In a gated MLP `W_gate` enters the activation and `W_in` is the linear input; otherwise `W_in` enters it."""
    if joined and short[2:] in ("gate", "in"):
        whole = matrix(parts["gate"]) if short[0] == "W" else _bias(parts["gate"])
        return whole.chunk(2, -1)[("gate", "in").index(short[2:])]
    if short in ("W_gate", "b_gate") and "up" in parts:
        return matrix(parts["gate"]) if short == "W_gate" else _bias(parts["gate"])
    entering = parts.get("up") or parts["gate"]
    if short == "W_in":
        return matrix(entering)
    return _bias(entering) if short == "b_in" else None


def _times(x: Tensor, factor: float | Tensor) -> Tensor:
    """The tensor itself where there is nothing to multiply."""
    return x if factor == 1.0 else x * factor


def _norm(module: nn.Module, short: str, anatomy: Anatomy) -> Tensor:
    weight = norm_weight(module, _table(anatomy.ends["embed"]))
    bias = stored(module, "bias")
    return weight if short == "w" else (torch.zeros_like(weight) if bias is None else bias)


def _table(module: nn.Module) -> Tensor:
    weight = stored(module, "weight")
    assert weight is not None  # modules of these parts have one
    return weight


def _bias(module: Any) -> Tensor:
    bias = stored(module, "bias")
    return matrix(module).new_zeros(matrix(module).shape[-1]) if bias is None else bias
