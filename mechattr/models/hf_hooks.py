"""Where the taps of a run meet the modules of a transformers model: hooks on this instance, for the time of one run."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mechattr.errors import UnsupportedFeatureError
from mechattr.models import fused
from mechattr.models.adapters import ADAPTERS
from mechattr.models.anatomy import Anatomy
from mechattr.models.attention import ATTRIBUTE, NATIVE, AttentionTap, name_of
from mechattr.models.checkpoint import checkpointed
from mechattr.models.experts import per_expert, reroute
from mechattr.models.hooks import Hooks
from mechattr.models.norms import norm_scale, normalise
from mechattr.models.rules import frozen_like, scaled, secant
from mechattr.models.taps import Taps
from mechattr.models.weights import w_o


@contextmanager
def tapping(
    anatomy: Anatomy,
    taps: Taps,
    config: Any,
    again: Callable[[int], AbstractContextManager[None]],
    *,
    only: int | None = None,
    padded_float64: bool = False,
) -> Iterator[None]:
    """Installs the hooks that `taps` wants, and takes exactly those away again whatever happens.

    Args:
        anatomy: where the sites are.
        taps: what is wanted of the run.
        config: the model's config.
        again: the same for one block alone, which a checkpointed run enters once more for each block.
        only: this block alone.
        padded_float64: use the tap's mask, without which padding in float64 gives NaN (see `attention`).
    """
    with ExitStack() as stack:
        installer = _Installer(anatomy, taps, stack)
        masked = padded_float64 and anatomy.family.softmax_float32 and config._attn_implementation == "eager"
        if (installer.install() if only is None else installer.install_again(only)) or masked:
            installer.switch_attention(config, masked)
        if taps.checkpoint and only is None:
            for layer in range(0 if taps.start is None else taps.start.layer, len(anatomy.blocks)):
                installer.checkpoint(layer, partial(again, layer))
        yield


class _Installer(Hooks):
    """Registers hooks on one model for one run; the exit stack takes them off."""

    def __init__(self, anatomy: Anatomy, taps: Taps, stack: ExitStack) -> None:
        super().__init__(stack)
        self.anatomy, self.taps = anatomy, taps

    def install(self) -> bool:
        """Hooks all modules; says whether the attention function is needed."""
        anatomy, taps = self.anatomy, self.taps
        if taps.rules.norm == "frozen":
            for norm in anatomy.norms:
                self.on_output(norm, self.frozen_norm)
        if taps.wants("hook_embed") and taps.start is None:
            self.embedding()
        if taps.wants("hook_pos_embed") and taps.start is None:
            self.on_output(anatomy.ends["pos_embed"], lambda _m, _a, x: taps("hook_pos_embed", x))
        if "final" in anatomy.ends:
            self.norm(anatomy.ends["final"], "ln_final.")
        needs_attention = False
        for layer in range(len(anatomy.blocks)):
            if taps.start is not None and layer < taps.start.layer:
                self.skip(anatomy.blocks[layer], several=anatomy.family.returns_tuple)
            else:
                needs_attention |= self.block(layer)
        return needs_attention

    def embedding(self) -> None:
        """Token embeddings; in a vision-language model what the language model receives, with image features at their
        places, since an edit before they are merged in would be overwritten."""
        if self.anatomy.family.language is None:
            factor = self.anatomy.factors.embed
            self.on_output(self.anatomy.ends["embed"], lambda _m, _a, x: self.multiplied("hook_embed", x, factor))
        else:
            self.on_input(self.anatomy.base, lambda x: self.taps("hook_embed", x), name="inputs_embeds")

    def install_again(self, layer: int) -> bool:
        """Hooks one block inside; says whether the attention function is needed."""
        if self.taps.rules.norm == "frozen":
            for norm in self.anatomy.norms:
                self.on_output(norm, self.frozen_norm)
        return self.block(layer)

    def checkpoint(self, layer: int, again: Callable[[], AbstractContextManager[None]]) -> None:
        """Makes a block keep its input only. What is hooked on the block itself lies outside."""
        taps, block = self.taps, self.anatomy.blocks[layer]
        inner = block.forward

        def forward(*args: Any, **kwargs: Any) -> Any:  # once the run is over, the block has the hooks of `again`
            return (block.forward if taps.repeats else inner)(*args, **kwargs)

        self.attribute(block, "forward", checkpointed(forward, taps, again))

    # -- one block

    def block(self, layer: int) -> bool:
        """Hooks one block; says whether the attention function is needed."""
        taps, parts, block = self.taps, self.anatomy.parts[layer], self.anatomy.blocks[layer]
        p = f"blocks.{layer}."
        start = taps.start.resid_pre if taps.start is not None and taps.start.layer == layer else None
        if start is not None or taps.wants(p + "hook_resid_pre"):
            self.on_input(block, lambda x: self.tap(p + "hook_resid_pre", x if start is None else start))
        if "ln1" in parts:
            self.norm(parts["ln1"], p + "ln1.")
        self.projections(layer)
        if taps.wants(p + "attn.hook_z"):
            self.on_input(parts["o"], lambda x: self.per_head(p + "attn.hook_z", x))
        if taps.wants(p + "attn.hook_result"):
            self.on_output(parts["o"], lambda m, a, _x: self.result(p + "attn.hook_result", m, a[0]))
        self.attention_write(layer)
        if "ln2" in parts:
            self.norm(parts["ln2"], p + "ln2.")
        self.mlp(layer)
        if taps.wants(p + "hook_resid_post"):
            self.on_output(block, lambda _m, _a, x: self.tap(p + "hook_resid_post", x))
        inside = ["v", "rot_q", "rot_k", "attn_scores", "pattern"] + ["q", "k"] * self.anatomy.family.plain_qk
        if not taps.wants_any([f"{p}attn.hook_{short}" for short in inside]) and not taps.rules.in_attention:
            return False
        family = self.anatomy.family
        tap = AttentionTap(taps, p + "attn.hook_", family.plain_qk, family.softmax_float32)
        if family.adapter is None:
            self.attribute(parts["attn"], ATTRIBUTE, tap)
        else:
            method, attention = ADAPTERS[family.adapter]
            self.attribute(parts["attn"], method, partial(attention, parts["attn"], tap))
        return True

    def projections(self, layer: int) -> None:
        """q and k before rotary embedding and norms; without those they are tapped inside the attention function. OLMo
        clips its projections in place, which the copies keep away from the taps."""
        parts, p, family = self.anatomy.parts[layer], f"blocks.{layer}.attn.hook_", self.anatomy.family
        if family.plain_qk or not self.taps.wants_any([p + "q", p + "k"]):
            return
        if "qkv" in parts:
            self.on_output(parts["qkv"], lambda _m, _a, x: self.fused_qk(p, x))
            return
        for short in ("q", "k"):
            if self.taps.wants(p + short):
                self.on_output(parts[short], lambda _m, _a, x, name=p + short: self.per_head(name, x).clone())

    def fused_qk(self, p: str, x: Tensor) -> Tensor:
        layout = self.anatomy.family.fused or ""
        q, k, v = fused.split(x, layout, self.anatomy.n_heads, self.anatomy.n_kv_heads)
        return fused.join(self.tap(p + "q", q), self.tap(p + "k", k), v, layout)

    def attention_write(self, layer: int) -> None:
        """attn_out, and resid_mid = resid_pre + attn_out: an edit of resid_mid is fed back as a change of attn_out, so
        that the skip path and the MLP both see it. It is an exact no-op when the tap changes nothing."""
        taps, parts, p = self.taps, self.anatomy.parts[layer], f"blocks.{layer}."
        out, mid, factor = p + "hook_attn_out", p + "hook_resid_mid", self.anatomy.factors.write
        if taps.wants(out):
            self.on_output(parts["attn_out"], lambda _m, _a, x: self.multiplied(out, x, factor))
        if not taps.wants(mid):
            return
        before: list[Tensor] = []

        def keep(x: Tensor) -> None:
            before[:] = [x]

        def feed_back(_m: nn.Module, _a: Any, x: Tensor) -> Tensor:
            total = before.pop() + (x if factor == 1.0 else factor * x)
            change = self.tap(mid, total) - total
            return x + (change if factor == 1.0 else change / factor)

        self.inside(self.anatomy.blocks[layer], keep)
        self.on_output(parts["attn_out"], feed_back)

    def mlp(self, layer: int) -> None:
        taps, parts, p = self.taps, self.anatomy.parts[layer], f"blocks.{layer}."
        pre, linear = p + "mlp.hook_pre", p + "mlp.hook_pre_linear"
        if taps.wants(p + "hook_mlp_out"):
            factor = self.anatomy.factors.write
            self.on_output(parts["mlp_out"], lambda _m, _a, x: self.multiplied(p + "hook_mlp_out", x, factor))
            if self.anatomy.family.adds_in_place:  # what the tap keeps is not to be written to
                self.on_output(parts["mlp_out"], lambda _m, _a, x: x.clone())
        if "experts" in parts:
            self.mixture(layer)
            return
        gated = "up" in parts or self.anatomy.family.gate_up
        if taps.rules.activation == "secant":
            self.on_output(parts["act"], lambda m, a, y: secant(m.forward, a[0], y))
        if taps.rules.gate == "half" and gated:
            self.on_input(parts["down"], lambda x: scaled(x, 0.5))
        if self.anatomy.family.gate_up and taps.wants_any([pre, linear]):

            def halves(_m: nn.Module, _a: Any, x: Tensor) -> Tensor:
                gate, up = x.chunk(2, -1)
                return torch.cat([self.tap(pre, gate), self.tap(linear, up)], -1)

            self.on_output(parts["gate"], halves)
        else:
            for part, name in (("gate", pre), ("up", linear)):
                if taps.wants(name):
                    self.on_output(parts[part], lambda _m, _a, x, name=name: self.tap(name, x))
        if taps.wants(p + "mlp.hook_post"):
            self.on_input(parts["down"], lambda x: self.tap(p + "mlp.hook_post", x))

    def mixture(self, layer: int) -> None:
        """Logits of the router, from which the routing is computed again, and what each expert adds."""
        taps, parts, p = self.taps, self.anatomy.parts[layer], f"blocks.{layer}.mlp.hook_"
        logits, out = p + "router_logits", p + "expert_out"

        def route(m: nn.Module, _a: Any, routed: tuple[Any, ...]) -> tuple[Any, ...]:
            return reroute(m, routed, self.tap(logits, routed[0]))

        def spread(m: nn.Module, a: Any, x: Tensor) -> Tensor:
            each = per_expert(m, *a)
            columns = taps.frame.queries.shape[1]
            return taps(out, each.unflatten(0, (-1, columns))).sum(2).reshape(x.shape)

        if taps.wants(logits):
            self.stack.callback(parts["router"].register_forward_hook(route).remove)
        if taps.wants(out):
            self.on_output(parts["experts"], spread)

    def norm(self, module: nn.Module, p: str) -> None:
        """Scale and output of a norm. With E the norm at a given scale, an edited scale s enters as E(x, s) - E(x, s0):
        exactly zero when nothing changes, and right in value and gradient when something does."""
        taps, scale, out = self.taps, p + "hook_scale", p + "hook_out"
        if taps.wants(scale):

            def scaled(m: nn.Module, a: Any, y: Tensor) -> Tensor:
                x = a[0]
                s = norm_scale(m, x)
                edited = self.tap(scale, s) if s.ndim > 1 else self.tap(scale, s[:, None])[:, 0]
                return y + (normalise(m, x, edited) - normalise(m, x, s)).to(y.dtype)

            self.on_output(module, scaled)
        if taps.wants(out):
            self.on_output(module, lambda m, a, y: self.tap(out, y))

    def frozen_norm(self, m: nn.Module, a: Any, y: Tensor) -> Tensor:
        x = a[0]
        return frozen_like(y, normalise(m, x, norm_scale(m, x).detach()).to(y.dtype))

    # -- taps on values and shapes

    def multiplied(self, name: str, x: Tensor, factor: float) -> Tensor:
        """Taps factor * x, where the model multiplies x by the factor on its way to the residual stream. What the tap
        leaves as it is keeps every bit; what it changes is divided by the factor again."""
        if factor == 1.0:
            return self.tap(name, x)
        total = factor * x
        tapped = self.tap(name, total)
        return frozen_like(torch.where(tapped == total, x, tapped / factor), tapped / factor)

    def tap(self, name: str, x: Tensor) -> Tensor:
        if not self.taps.wants(name):
            return x
        columns = self.taps.frame.queries.shape[1]
        spread = 2 if name.endswith("hook_scale") else 3
        if x.ndim < spread or (x.ndim == 2 and x.shape[1] == 1):  # some families flatten batch and position
            shape = (-1, columns) if spread == 2 else (-1, columns, x.shape[-1])
            return self.taps(name, x.reshape(shape)).reshape(x.shape)
        return self.taps(name, x)

    def per_head(self, name: str, x: Tensor) -> Tensor:
        if not self.taps.wants(name):
            return x
        heads = self.anatomy.n_kv_heads if name.endswith("hook_k") else self.anatomy.n_heads
        return self.taps(name, x.unflatten(-1, (heads, -1))).flatten(-2)

    def result(self, name: str, o: nn.Module, z: Tensor) -> Tensor:
        heads, factor = self.anatomy.n_heads, self.anatomy.factors.write
        per_head = torch.einsum("bphd,hdm->bphm", z.unflatten(-1, (heads, -1)), w_o(o, heads))
        total = self.taps(name, per_head if factor == 1.0 else factor * per_head).sum(2)
        total = total if factor == 1.0 else total / factor
        return total if o.bias is None else total + o.bias  # type: ignore[operator]

    # -- the attention function

    def switch_attention(self, config: Any, masked: bool) -> None:
        """Gives this model's modules a copy of the config that names the tap; the config object itself may be shared
        with other models and is not touched. Where an adapter is the tap, the mask alone may call for that."""
        native = config._attn_implementation
        wanted = any(name.endswith(("attn_scores", "hook_pattern")) for name in self.taps.names)
        inside = wanted or self.taps.rules.in_softmax
        if native not in NATIVE:
            raise UnsupportedFeatureError(
                "attention sites (v, rot_q, rot_k, attn_scores, pattern) or rules of attention",
                f"the model runs {native!r} attention",
                "load it with attention='eager' or 'sdpa', or ask for sites outside attention",
            )
        if self.anatomy.family.adapter is not None and not masked:
            return
        tapped = copy.copy(config)
        tapped._attn_implementation = name_of("eager" if inside else native)
        for module in self.anatomy.configured:
            self.attribute(module, "config", tapped)
