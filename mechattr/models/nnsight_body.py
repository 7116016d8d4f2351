"""What runs inside an nnsight trace, here or on a server: envoys and torch, and nothing else.

The functions of this file travel as source together with a plan of plain values (`mechattr.models.nnsight_plan`), so
they import nothing but torch, and define no class at the top. Steps are in the order of the forward pass, because that
is the order in which nnsight gives values away.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def body(model: Any, plan: dict[str, Any]) -> dict[str, Any]:
    """One forward pass with taps and, if gradients are asked for, one backward pass.

    Args:
        model: the root envoy.
        plan: `steps`, and what happens at which site.

    Returns:
        `logits`, `metric`, `activations`, `gradients` (of the sites that the metric depends on), `nodes` (activations
        at sites with a gradient) and `forms`, or what `reduce` made of them; `lost` or `misfit` say what went wrong.
    """
    state: dict[str, Any] = {"plan": plan, "activations": {}, "nodes": {}, "streams": {}, "forms": {}}
    actions: dict[str, Any] = {
        "skip": skip,
        "input": at_input,
        "output": at_output,
        "write": at_write,
        "norm": at_norm,
        "fused": at_fused,
        "halves": at_halves,
        "attention": at_attention,
        "result": at_result,
    }
    steps = [(action, envoy_at(model, path), arguments) for action, path, arguments in plan["steps"]]
    for action, envoy, arguments in steps:  # attention must be taken apart before its forward pass begins
        if action == "attention":
            arguments["source"] = envoy.source
    for action, envoy, arguments in steps:
        actions[action](state, envoy, **arguments)
        if "lost" in state or "misfit" in state:
            return {name: state[name] for name in ("lost", "misfit") if name in state}
    return finish(state, model.output.logits)


def envoy_at(model: Any, path: str) -> Any:
    """The envoy of a module; nnsight moves one that has the name of a value, such as `output`, to `E_output`."""
    for name in path.split("."):
        moved = getattr(model, "E_" + name, None)
        model = getattr(model, name) if moved is None else moved
    return model


def finish(state: dict[str, Any], logits: Tensor) -> dict[str, Any]:
    """The metric, the backward pass, and what is sent back."""
    plan, nodes = state["plan"], state["nodes"]
    out = {"forms": state["forms"], "activations": state["activations"], "gradients": {}, "nodes": {}}
    out["blanks"] = {name: x.detach().new_zeros(()).expand(x.shape) for name, x in nodes.items()}
    out["logits"], out["metric"], out["tracked"] = logits.detach(), None, logits.requires_grad
    root, value = [], None
    if plan["metric"] is not None:
        value = plan["metric"](logits, rows_of(plan["rows"]))
        whole = isinstance(value, Tensor)
        out["metric"] = value.detach() if whole else value
        out["differentiable"] = whole and value.requires_grad
        root = [value] if whole and value.requires_grad and value.shape == plan["rows"]["tokens"].shape[:1] else []
    given = [torch.ones_like(x) for x in root]
    if plan["at"] is not None:
        root, given = [nodes[name] for name in plan["at"]], [g.to(nodes[n]) for n, g in plan["at"].items()]
    if root and nodes:
        found = torch.autograd.grad(root, list(nodes.values()), given, allow_unused=True)
        out["gradients"] = {name: g for name, g in zip(nodes, found) if g is not None}  # noqa: B905 (found is as long)
    if plan["reduce"] is not None:
        reduced = plan["reduce"](out["activations"], out["gradients"])
        return {"reduced": reduced, "metric": out["metric"], "finite": bool(torch.isfinite(logits.sum()))}
    if plan["visited"]:
        out["nodes"] = {name: x.detach() for name, x in nodes.items()}
    return out


# -- what happens at a site


def tap(state: dict[str, Any], name: str, x: Tensor) -> Tensor:
    """Edits, an autograd node of its own, recording and holding, in this order."""
    plan = state["plan"]
    if name not in plan["names"]:
        return x
    spread, columns = (2 if name.endswith("hook_scale") else 3), plan["rows"]["tokens"].shape[1]
    if x.ndim < spread or (x.ndim == 2 and x.shape[1] == 1):  # some families flatten batch and position
        shape = (-1, columns) if spread == 2 else (-1, columns, x.shape[-1])
        return tap(state, name, x.reshape(shape)).reshape(x.shape)
    for kind, value, place in plan["edits"].get(name, ()):
        x = changed(state, x, kind, value, place)
    if name in plan["gradients"]:
        x = node(x)
        state["nodes"][name] = x
    if name in plan["record"]:
        state["activations"][name] = x.detach()
    return x.detach() if name in plan["held"] else x


def node(x: Tensor) -> Tensor:
    """The identity as a node of its own, so that a gradient belongs to this site and not to a shared tensor; a leaf
    where nothing below can be differentiated."""
    return x.view_as(x) if x.requires_grad else x.detach().requires_grad_(True)


def changed(state: dict[str, Any], x: Tensor, kind: str, value: Any, place: dict[str, Any]) -> Tensor:
    """The activation after one edit."""
    index = place["index"]
    whole = len(index) == 1 and isinstance(index[0], slice)
    at = index if whole else tuple(i.to(x.device) for i in index)
    part = x.clone() if whole else x[at]
    if kind == "call":
        new = value(part, record_of(place))
        if not isinstance(new, Tensor) or (new.shape, new.dtype, new.device) != (part.shape, part.dtype, part.device):
            what = f"{new.dtype} {tuple(new.shape)}" if isinstance(new, Tensor) else type(new).__name__
            state["misfit"] = (place["site"], f"{part.dtype} {tuple(part.shape)}", what)
            return x
    else:
        value = value.to(device=x.device, dtype=x.dtype)
        if kind == "set":
            new = value.expand(part.shape)
        elif kind == "add":
            new = part + value
        elif kind == "scale":
            new = part * value
        else:  # ablate
            new = part - (part @ value)[..., None] * value
    if whole:
        return new
    out = x.clone()
    out[at] = new
    return out


def record_of(fields: dict[str, Any]) -> Any:
    """Fields as attributes."""

    class Record:
        def __init__(self) -> None:
            self.__dict__.update(fields)

    return Record()


def rows_of(fields: dict[str, Any]) -> Any:
    """The batch as a metric sees it."""

    class Rows:
        def __init__(self, tokens: Tensor, mask: Tensor, example: Tensor, strings: Any) -> None:
            self.tokens, self.mask, self.example, self.strings = tokens, mask, example, strings
            self.lengths = mask.sum(1)
            self.positions = torch.where(mask, mask.cumsum(1) - 1, -1)
            self.device = tokens.device
            self.padded = not bool(mask.all())

        def __len__(self) -> int:
            return len(self.tokens)

        def columns(self, position: int) -> Tensor:
            wanted = self.lengths + position if position < 0 else torch.full_like(self.lengths, position)
            return self.mask.int().argmax(1) + wanted

    return Rows(**fields)


def first(value: Any) -> Tensor:
    """A module's output without what comes beside it."""
    return value[0] if isinstance(value, tuple) else value


def replaced(value: Any, x: Tensor) -> Any:
    """The same output with another tensor."""
    return (x, *value[1:]) if isinstance(value, tuple) else x


# -- steps


def skip(_: dict[str, Any], envoy: Any) -> None:
    """A block that hands its input through, below the start of a run."""
    envoy.skip(envoy.input)


def at_input(state: dict[str, Any], envoy: Any, site: str, heads: int = 0, stream: str = "", start: Any = None) -> None:
    """A site that is what a module receives; by head, or kept as the stream that resid_mid adds to."""
    x = envoy.input
    if start is not None:
        x = start.to(x).view_as(x)
    y = tap(state, site, x.unflatten(-1, (heads, -1))).flatten(-2) if heads else tap(state, site, x)
    if stream:
        state["streams"][stream] = y
    if start is not None or site in state["plan"]["names"]:
        envoy.input = y


def at_output(state: dict[str, Any], envoy: Any, site: str, heads: int = 0, copied: bool = False) -> None:
    """A site that is what a module returns; or by head. What the model writes to in place is copied first."""
    value = envoy.output
    x = first(value)
    x = tap(state, site, x.unflatten(-1, (heads, -1))).flatten(-2) if heads else tap(state, site, x)
    envoy.output = replaced(value, x.clone() if copied else x)


def at_write(state: dict[str, Any], envoy: Any, site: str, mid: str, stream: str) -> None:
    """What attention adds to the stream, and the stream after it: a change of that is fed back as a change of what is
    added, so that the skip path and the MLP both see it."""
    value = envoy.output
    x = tap(state, site, first(value))
    if mid in state["plan"]["names"]:
        total = state["streams"].pop(stream).view_as(x) + x
        x = x + (tap(state, mid, total) - total)
    envoy.output = replaced(value, x)


def at_norm(
    state: dict[str, Any],
    envoy: Any,
    scale: str,
    out: str,
    centred: bool,
    offset: float,
    eps: float,
    weighted: bool,
    biased: bool,
) -> None:
    """Scale and output of a norm. With E the norm at a given scale, an edited scale s enters as E(x, s) - E(x, s0)."""
    x = envoy.input
    y = envoy.output
    if scale in state["plan"]["names"]:
        c = x if x.dtype == torch.float64 else x.float()
        c = c - c.mean(-1, keepdim=True) if centred else c
        s = (c.pow(2).mean(-1) + eps).sqrt()
        edited = tap(state, scale, s) if s.ndim > 1 else tap(state, scale, s[:, None])[:, 0]
        weight = offset + envoy.weight if weighted else 1.0
        bias = envoy.bias if biased else 0.0
        y = y + ((c / edited[..., None] * weight + bias) - (c / s[..., None] * weight + bias)).to(y.dtype)
    envoy.output = tap(state, out, y)


def at_fused(
    state: dict[str, Any], envoy: Any, q: str, k: str, split: Any, join: Any, layout: str, heads: int, kv_heads: int
) -> None:
    """Queries and keys in the output of a projection that makes values, too; `split` and `join` say how."""
    queries, keys, values = split(envoy.output, layout, heads, kv_heads)
    envoy.output = join(tap(state, q, queries), tap(state, k, keys), values, layout)


def at_halves(state: dict[str, Any], envoy: Any, gate: str, up: str) -> None:
    """Gate and linear input of an MLP in the output of one projection."""
    x, y = envoy.output.chunk(2, -1)
    envoy.output = torch.cat([tap(state, gate, x), tap(state, up, y)], -1)


def at_attention(
    state: dict[str, Any], _: Any, source: Any, layer: int, prefix: str, plain: bool, inside: bool, mended: bool
) -> None:
    """Queries, keys and values as attention gets them, scores and pattern where they exist.

    The operations are found by name in the source of the attention module: the last call of the attention interface,
    and the softmax in what it calls.
    """
    names = list(source.names)
    calls = [name for name in names if name.startswith("attention_interface")]
    if not calls:
        state["lost"] = (f"the call of the attention interface in block {layer}", names)
        return
    call = getattr(source, calls[-1])
    args, kwargs = call.inputs
    heads = {}
    for i, short in ((1, "q"), (2, "k"), (3, "v")):
        x = args[i].transpose(1, 2)
        if plain and short != "v":
            x = tap(state, prefix + short, x)
        heads[i] = tap(state, prefix + ("v" if short == "v" else "rot_" + short), x).transpose(1, 2)
    mask = args[4] if len(args) > 4 else None
    if mended and mask is not None:  # rows without any visible key: float64's minimum is minus infinity in float32
        mask = mask.masked_fill((mask < 0).all(-1, keepdim=True), torch.finfo(torch.float32).min)
    call.inputs = ((args[0], heads[1], heads[2], heads[3], mask, *args[5:]), kwargs)
    form = {name: kwargs.get(name) for name in ("scaling", "softcap", "s_aux")}
    state["forms"][layer] = {**form, "d_head": args[1].shape[-1]}
    if not inside:
        return
    names = list(call.source.names)
    softmaxes = [name for name in names if "softmax" in name]
    if not softmaxes:
        state["lost"] = (f"the softmax in the attention of block {layer}", names)
        return
    softmax = getattr(call.source, softmaxes[0])
    scores, pattern = prefix + "attn_scores", prefix + "pattern"
    if scores in state["plan"]["names"]:
        given, settings = softmax.inputs
        softmax.inputs = ((tap(state, scores, given[0]), *given[1:]), settings)
    if pattern in state["plan"]["names"]:
        p = softmax.output  # of a wider type than the pattern, where a family takes its softmax in float32
        softmax.output = tap(state, pattern, p.to(heads[1].dtype)).to(p.dtype)


def at_result(state: dict[str, Any], envoy: Any, site: str, heads: int, transposed: bool, biased: bool) -> None:
    """What each head writes, computed from z and the output projection, whose output it replaces."""
    z = envoy.input.unflatten(-1, (heads, -1))
    weight = envoy.weight.T if transposed else envoy.weight
    per_head = torch.einsum("bphd,hdm->bphm", z, weight.unflatten(0, (heads, -1)))
    value = envoy.output
    total = tap(state, site, per_head).sum(2)
    envoy.output = replaced(value, total + envoy.bias if biased else total)
