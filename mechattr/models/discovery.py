"""A family row for a model that has none: found by value, from one run of a few tokens.

Little is guessed from names. The module that calls the attention function is the one that is seen to call it; the
output projection is what multiplies next; what attention and the MLP write is what adds up to the block's output. What
cannot be found that way is named in the error, beside what was found.
"""

from __future__ import annotations

import copy
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mechattr.errors import SettingError, UnsupportedModelError
from mechattr.models.architectures import check_known, family_of
from mechattr.models.attention import ATTRIBUTE, name_of
from mechattr.models.families import FAMILIES, Family
from mechattr.models.norms import is_norm
from mechattr.models.sharding import is_split

TOKENS = 5
CLOSE = 1e-4  # of the largest entry: sums in another order, in float32; ten times more in bfloat16


@dataclass(frozen=True, eq=False, slots=True)
class _Call:
    """A module's call: what went in and what came out."""

    path: str
    module: Any
    seen: Tensor
    out: Tensor

    @property
    def matrix(self) -> bool:
        return isinstance(self.module, nn.Linear) or type(self.module).__name__ == "Conv1D"


@dataclass(eq=False)
class _Attention:
    """Stands where a run's tap would be, and keeps what its module hands to the attention function."""

    path: str
    calls: list[_Call]
    values: dict[str, Tensor] = field(default_factory=dict)
    at: int = 0
    heads_of_q: int = 0

    def enter(self, query: Tensor, key: Tensor, value: Tensor, **_: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Keeps them."""
        handed = {"rot_q": query, "rot_k": key, "v": value}
        self.values = {short: x.transpose(1, 2).flatten(2).detach() for short, x in handed.items()}
        self.at, self.heads_of_q = len(self.calls), query.shape[1]
        return query, key, value

    def explicit(self, _softcap: float | None) -> bool:
        """Nothing inside is looked at."""
        return False


def row_of(model: Any, family: Family | None = None) -> tuple[Family, str]:
    """The row that a model is hooked by, and where it came from: `"given"`, `"table"` or `"discovered"`.

    Raises:
        UnsupportedModelError: no row, and none that could be found.
        SettingError: `family` is no `Family`.
    """
    if family is None:
        check_known(model.config.model_type)
        known = model.config.model_type in FAMILIES
        return (family_of(model.config)[1], "table") if known else (discover(model), "discovered")
    if not isinstance(family, Family):
        fix = "give ma.models.Family(layers=..., attn=..., ...), or leave it out"
        raise SettingError(f"family={family!r:.80}", f"a {type(family).__name__}", fix)
    return family.of(model.config), "given"


def discover(model: Any) -> Family:
    """The family row of a decoder with pre-norm or write-norm blocks whose attention uses transformers' interface.

    Args:
        model: a transformers causal language model in eval mode.

    Returns:
        A row for it, which `HookedHF` checks as it checks every other one.

    Raises:
        UnsupportedModelError: a part that was not found, beside those that were.

    Cost:
        One forward pass of five tokens.
    """
    if is_split(model):
        raise UnsupportedModelError(
            f"a hooked model of family {model.config.model_type!r}, which has no row in the table",
            "its weights are split over processes: what they compute cannot be compared here",
            "say where its modules are: ma.load(..., family=ma.models.Family(layers=..., attn=..., ...))",
        )
    base, config = model.base_model, model.config
    n_layers = getattr(config, "num_hidden_layers", None)
    lists = [path for path, m in base.named_modules() if isinstance(m, nn.ModuleList) and len(m) == n_layers]
    found: dict[str, Any] = {"layers": lists[0] if len(lists) == 1 else None}
    if found["layers"]:
        inside, outside, attention = _watch(model, lists[0])
        found["attn"] = attention.path if attention else None
        if attention:
            found |= _ends(model, inside[-1].seen, outside)
            found |= _writes(inside, attention)
            found |= _attention_parts(inside, attention)
            found |= _mlp_parts(inside, attention, found["mlp_out"])
            found |= _norms(inside, found)
            # a block may rotate nothing where others do
            found["rotary"] = found.get("rotary") or any("Rotary" in type(m).__name__ for m in base.modules())
        if attention is None:
            raise UnsupportedModelError(
                f"a hooked model of family {config.model_type!r}, which has no row in the table",
                "in its first block no module, or more than one, calls transformers' attention function",
                "use a model with attention in every block that goes through transformers' attention interface",
            )
    missing = [name for name, value in found.items() if value is None]
    if missing:
        there = ", ".join(f"{name}={value!r}" for name, value in found.items() if value)
        raise UnsupportedModelError(
            f"a hooked model of family {config.model_type!r}, which has no row in the table",
            f"not found: {', '.join(missing)}; found: {there or 'nothing'}",
            "say where they are: ma.load(..., family=ma.models.Family(layers=..., attn=..., ...))",
        )
    row: dict[str, Any] = {name: None if value == "" else value for name, value in found.items()}
    return Family(**row)


def _watch(model: Any, layers: str) -> tuple[list[_Call], list[_Call], _Attention | None]:
    """The calls of the first block's modules and of those around the blocks, and the one attention that was called."""
    inside: list[_Call] = []
    outside: list[_Call] = []
    block = model.base_model.get_submodule(layers)[0]
    config = model.config
    tapped = copy.copy(config)
    tapped._attn_implementation = name_of("eager")
    taps = []
    with ExitStack() as stack, torch.no_grad():
        for path, module in block.named_modules():
            stack.callback(_listen(module, path, inside))
            taps.append(_Attention(path, inside))
            module.__dict__[ATTRIBUTE] = taps[-1]
            stack.callback(module.__dict__.pop, ATTRIBUTE)
        for path, module in model.base_model.named_modules():
            if path and not f"{path}.".startswith(f"{layers}."):
                stack.callback(_listen(module, path, outside))
        stack.callback(_listen(model.get_output_embeddings(), "", outside))
        for module in model.modules():
            if module.__dict__.get("config") is config:
                stack.callback(module.__dict__.__setitem__, "config", config)
                module.__dict__["config"] = tapped
        ids = torch.arange(1, TOKENS + 1, device=model.device)[None] % config.vocab_size
        try:
            model(input_ids=ids, use_cache=False)
        except (RuntimeError, TypeError, ValueError) as error:
            raise UnsupportedModelError(
                f"a hooked model of family {config.model_type!r}, which has no row in the table",
                f"its own forward pass of {TOKENS} tokens raises {type(error).__name__}: {error}"[:300],
                "see to it that model(input_ids=...) runs; in float64, experts need "
                "model.set_experts_implementation('eager')",
            ) from error
    called = [tap for tap in taps if tap.values]
    return inside, outside, called[0] if len(called) == 1 else None


def _listen(module: nn.Module, path: str, calls: list[_Call]) -> Any:
    """Notes a module's calls; returns what stops that."""

    def note(m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        seen = args[0] if args else kwargs.get("hidden_states")
        made = out[0] if isinstance(out, tuple) else out
        if isinstance(seen, Tensor) and isinstance(made, Tensor) and not isinstance(m, nn.Dropout | nn.Identity):
            calls.append(_Call(path, m, seen.detach(), made.detach()))

    return module.register_forward_hook(note, with_kwargs=True).remove


def _same(x: Tensor, y: Tensor) -> bool:
    if x.shape != y.shape:
        return False
    close = CLOSE if y.dtype in (torch.float32, torch.float64) else 100 * CLOSE
    return bool((x.float() - y.float()).abs().max() <= close * y.float().abs().max())


def _ends(model: Any, entering: Tensor, outside: list[_Call]) -> dict[str, str | None]:
    """Embeddings and the last norm."""
    embed = next((c for c in outside if c.module is model.get_input_embeddings()), None)
    head = next((c for c in outside if not c.path), None)
    found: dict[str, str | None] = {"embed": embed.path if embed else None, "pos_embed": None, "final": None}
    if embed and _same(embed.out, entering):
        found["pos_embed"] = ""
    elif embed:
        tables = [c for c in outside if c is not embed and c.out.shape[-1] == embed.out.shape[-1]]
        added = (c.path for c in tables if _same(embed.out + c.out.expand_as(embed.out), entering))
        found["pos_embed"] = next(added, None)
    if head:
        found["final"] = next((c.path for c in outside if is_norm(c.module) and _same(c.out, head.seen)), None)
    return found


def _writes(calls: list[_Call], attention: _Attention) -> dict[str, str | None]:
    """The modules whose outputs are added to the stream: block output = input + attention's write + the MLP's."""
    block = calls[-1]  # it ends last
    late = [c for c in calls[attention.at : -1] if c.out.shape == block.out.shape]
    for i, first in reversed(list(enumerate(late))):
        for second in reversed(late[i + 1 :]):
            if _same(block.seen + first.out + second.out, block.out):
                return {"attn_out": first.path, "mlp_out": second.path}
    return {"attn_out": None, "mlp_out": None}


def _attention_parts(calls: list[_Call], attention: _Attention) -> dict[str, Any]:
    """Projections of attention; which columns of a fused one are v says how it is split."""
    before = [c for c in calls[: attention.at] if c.matrix]
    q, k, v = (attention.values[short] for short in ("rot_q", "rot_k", "v"))
    found: dict[str, Any] = {"o": next((c.path for c in calls[attention.at :] if c.matrix), None)}
    whole = next((c for c in before if c.out.shape[-1] == q.shape[-1] + k.shape[-1] + v.shape[-1]), None)
    if whole is not None:
        return found | {"q": "", "k": "", "v": "", "qkv": whole.path} | _split(whole.out, q, v, attention.heads_of_q)
    own = next((c for c in before if _same(c.out, v)), None)
    others = [c for c in before if c is not own]
    named = {
        letter: next((c for c in others if c.path.rsplit(".", 1)[-1].startswith(letter)), None) for letter in ("q", "k")
    }
    found |= {"v": own.path if own else None} | {letter: c.path if c else None for letter, c in named.items()}
    found["rotary"] = named["q"] is None or not _same(_times(named["q"].out, q), q)
    return found


def _times(x: Tensor, like: Tensor) -> Tensor:
    """x by the factor that brings it nearest to another tensor: some families scale q on its way."""
    return x if x.shape != like.shape else x * ((x * like).sum() / (x * x).sum())


def _split(whole: Tensor, q: Tensor, v: Tensor, heads: int) -> dict[str, Any]:
    """How a fused projection is laid out, and whether its q is rotated."""
    if _same(whole[..., -v.shape[-1] :], v):
        return {"fused": "thirds", "rotary": not _same(whole[..., : q.shape[-1]], q)}
    if whole.shape[-1] == 3 * v.shape[-1]:
        by_head = whole.unflatten(-1, (heads, 3, -1))
        if _same(by_head[..., 2, :].flatten(-2), v):
            return {"fused": "interleaved", "rotary": not _same(by_head[..., 0, :].flatten(-2), q)}
    return {"fused": None}


def _mlp_parts(calls: list[_Call], attention: _Attention, writes: str | None) -> dict[str, str | None]:
    """The matrix before an activation function, the one whose output multiplies it, and the one that reads both; what
    that gives must be all that the MLP writes, which a shared expert's is not."""
    late = calls[attention.at :]
    matrices = [c for c in late if c.matrix]
    written = [x for c in late if c.path == writes for x in (c.out, c.seen)]  # a norm may come between
    found: dict[str, str | None] = {"gate": None, "act": None, "up": None, "down": None}
    for act in late:
        if act.matrix or is_norm(act.module) or list(act.module.children()):
            continue
        gate = next((c for c in matrices if c is not act and _same(c.out, act.seen)), None)
        down = next((c for c in matrices if c.seen.shape == act.out.shape and not _same(c.seen, act.seen)), None)
        if gate is None or down is None or not any(_same(down.out, x) for x in written):
            continue
        found |= {"gate": gate.path, "act": act.path, "down": down.path}
        if _same(down.seen, act.out):
            found["up"] = ""
        else:
            up = (c.path for c in matrices if c.out.shape == act.out.shape and _same(act.out * c.out, down.seen))
            found["up"] = next(up, None)
    return found


def _norms(calls: list[_Call], found: dict[str, Any]) -> dict[str, Any]:
    """The norms through which attention and the MLP read the stream, if any; and their kind, by what they compute."""
    stream = calls[-1].seen
    by_path = {c.path: c for c in calls}
    kinds: set[str] = set()
    parts: dict[str, Any] = {}
    written = by_path.get(found["attn_out"])
    between = None if written is None else stream + written.out
    readers = (("ln1", found["q"] or found.get("qkv"), stream), ("ln2", found["gate"], between))
    for name, reader, entering in readers:
        if not reader or entering is None:
            parts[name] = None
            continue
        read = by_path[reader].seen
        norm = next((c for c in calls if is_norm(c.module) and _same(c.out, read) and _same(c.seen, entering)), None)
        parts[name] = norm.path if norm else "" if _same(read, entering) else None
        kinds |= {_kind(norm)} if norm else set()
    written_norms = [by_path[p] for p in (found["attn_out"], found["mlp_out"]) if p and is_norm(by_path[p].module)]
    kinds |= {_kind(c) for c in written_norms}
    return {**parts, "norm": kinds.pop() if len(kinds) == 1 else None}


def _kind(call: _Call) -> str:
    """What a norm computes."""
    if isinstance(call.module, nn.LayerNorm):
        return "layer"
    unit = call.seen.float() / (call.seen.float().pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    weight = getattr(call.module, "weight", None)
    scaled = unit if weight is None else unit * weight.float()
    return "rms" if _same(scaled, call.out.float()) else "rms_plus_one"
