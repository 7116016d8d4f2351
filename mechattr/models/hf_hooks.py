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
from mechattr.models.cross import cross_attention, handing_through, placed
from mechattr.models.experts import per_expert, reroute
from mechattr.models.hf_rules import Ruling
from mechattr.models.norms import norm_scale, normalise
from mechattr.models.rules import scaled
from mechattr.models.taps import Taps


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
        installer = Installer(anatomy, taps, stack)
        masked = padded_float64 and anatomy.family.softmax_float32 and config._attn_implementation == "eager"
        if only is not None:
            needs_attention = installer.install_again(only)
        else:
            in_encoder = anatomy.source is not None and Installer(anatomy.source, taps, stack).install()
            needs_attention = installer.install() or in_encoder
        if needs_attention or masked:
            installer.switch_attention(config, masked)
        if taps.checkpoint and only is None:
            for layer in range(0 if taps.start is None else taps.start.layer, len(anatomy.blocks)):
                installer.checkpoint(layer, partial(again, layer))
        yield


class Installer(Ruling):
    """Registers hooks on one model for one run, or on the encoder beside its decoder."""

    def install(self) -> bool:
        """Hooks all modules; says whether the attention function is needed."""
        anatomy, taps, outside = self.anatomy, self.taps, "" if self.decodes else "encoder."
        self.frozen_norms()
        self.head()
        if anatomy.family.by_column:
            self.on_output(anatomy.ends["pos_embed"], lambda m, _a, x: placed(m, x, self.positions))
        embed, pos_embed = f"{outside}hook_embed", f"{outside}hook_pos_embed"
        if taps.wants(embed) and self.start is None:
            self.embedding(embed)
        if taps.wants(pos_embed) and self.start is None:
            self.on_output(anatomy.ends["pos_embed"], lambda _m, _a, x: taps(pos_embed, x))
        if "final" in anatomy.ends:
            self.norm(anatomy.ends["final"], f"{outside}ln_final.")
        needs_attention = False
        for layer in range(len(anatomy.blocks)):
            if self.start is not None and layer < self.start.layer:
                idle = handing_through(anatomy.parts[layer]["attn"], several=anatomy.family.returns_tuple)
                self.attribute(anatomy.blocks[layer], "forward", idle)
            else:
                needs_attention |= self.block(layer) | cross_attention(self, layer)
        return needs_attention

    def embedding(self, name: str) -> None:
        """Token embeddings; in a vision-language model what the language model receives, with image features at their
        places, since an edit before they are merged in would be overwritten."""
        if self.anatomy.family.language is None:
            factor = self.anatomy.factors.embed
            self.on_output(self.anatomy.ends["embed"], lambda _m, _a, x: self.multiplied(name, x, factor))
        else:
            self.on_input(self.anatomy.base, lambda x: self.taps(name, x), name="inputs_embeds")

    def install_again(self, layer: int) -> bool:
        """Hooks one block inside; says whether the attention function is needed."""
        self.frozen_norms()
        return self.block(layer) | cross_attention(self, layer)

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
        p = f"{self.anatomy.stack}.{layer}."
        start = self.start.resid_pre if self.start is not None and self.start.layer == layer else None
        if start is not None or taps.wants(p + "hook_resid_pre"):
            self.on_input(block, lambda x: self.tap(p + "hook_resid_pre", x if start is None else start))
        self.linears(parts)
        if "ln1" in parts:
            self.norm(parts["ln1"], p + "ln1.")
        self.projections(layer)
        self.clips(layer)
        if taps.wants(p + "attn.hook_z"):
            self.on_input(parts["o"], lambda x: self.per_head(p + "attn.hook_z", x))
        if taps.wants(p + "attn.hook_result"):
            self.on_output(parts["o"], lambda m, a, _x: self.result(p + "attn.hook_result", m, a[0]))
        self.linears(parts, ["o"])
        self.write(parts["attn_out"], p + "hook_attn_out", p + "hook_resid_mid", block)
        if "ln2" in parts:
            self.norm(parts["ln2"], p + "ln2.")
        self.mlp(layer)
        if taps.wants(p + "hook_resid_post"):
            self.on_output(block, lambda _m, _a, x: self.tap(p + "hook_resid_post", x))
        return self.attends(parts["attn"], p + "attn.hook_")

    def attends(self, attn: nn.Module, prefix: str) -> bool:
        """Gives an attention module the tap of the sites within it, if they or a rule are wanted; says whether."""
        family = self.anatomy.family
        shorts = ["v", "rot_q", "rot_k", "attn_scores", "pattern"] + ["q", "k"] * family.plain_qk
        if not self.taps.wants_any([prefix + short for short in shorts]) and not self.taps.rules.in_attention:
            return False
        tap = AttentionTap(self.taps, prefix, family.plain_qk, family.softmax_float32)
        if family.adapter is None:
            self.attribute(attn, ATTRIBUTE, tap)
        else:
            method, attention = ADAPTERS[family.adapter]
            self.attribute(attn, method, partial(attention, attn, tap))
        return True

    def projections(self, layer: int) -> None:
        """q and k before rotary embedding and norms; without those they are tapped inside the attention function. OLMo
        clips its projections in place, which the copies keep away from the taps."""
        parts, family = self.anatomy.parts[layer], self.anatomy.family
        p = f"{self.anatomy.stack}.{layer}.attn.hook_"
        if self.taps.split is not None:  # autograd refuses to write to what comes out of a divided projection
            for module in (parts[short] for short in "qkv" if short in parts):
                self.on_output(module, lambda _m, _a, x: x.clone())
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
        heads = self.taps.here(p + "q", self.anatomy.n_heads)
        q, k, v = fused.split(x, layout, heads, self.taps.here(p + "k", self.anatomy.n_kv_heads))
        return fused.join(self.tap(p + "q", q), self.tap(p + "k", k), v, layout)

    def write(self, module: nn.Module, out: str, mid: str, reads: nn.Module) -> None:
        """attn_out, and resid_mid = resid_pre + attn_out: an edit of resid_mid is fed back as a change of attn_out, so
        that the skip path and what follows both see it. It is an exact no-op when the tap changes nothing.

        Args:
            module: its output is added to the residual stream.
            out: the name of that site.
            mid: the name of the stream after the addition.
            reads: a module whose input is the stream before it.
        """
        factor = self.anatomy.factors.write
        if self.taps.wants(out):
            self.on_output(module, lambda _m, _a, x: self.multiplied(out, x, factor))
        if not self.taps.wants(mid):
            return
        before: list[Tensor] = []

        def keep(x: Tensor) -> None:
            before[:] = [x]

        def feed_back(_m: nn.Module, _a: Any, x: Tensor) -> Tensor:
            total = before.pop().to(x.device) + (x if factor == 1.0 else factor * x)
            change = self.tap(mid, total) - total
            return x + (change if factor == 1.0 else change / factor)

        self.inside(reads, keep)
        self.on_output(module, feed_back)

    def mlp(self, layer: int) -> None:
        taps, parts, p = self.taps, self.anatomy.parts[layer], f"{self.anatomy.stack}.{layer}."
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
        self.activation(parts, gated=gated)
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
            each = scaled(per_expert(m, *a), self.behind_experts)
            columns = taps.frame.queries.shape[1]
            return taps(out, each.unflatten(0, (-1, columns))).sum(2).reshape(x.shape)

        if taps.wants(logits):
            self.stack.callback(parts["router"].register_forward_hook(route).remove)
        self.experts(parts)
        if taps.wants(out):
            self.on_output(parts["experts"], spread)
        else:
            self.on_output(parts["experts"], lambda _m, _a, x: scaled(x, self.behind_experts))

    def norm(self, module: nn.Module, p: str) -> None:
        """Scale and output of a norm. With E the norm at a given scale, an edited scale s enters as E(x, s) - E(x, s0):
        exactly zero when nothing changes, and right in value and gradient when something does."""
        taps, scale, out = self.taps, p + "hook_scale", p + "hook_out"
        if taps.wants(scale):

            def scaled(m: nn.Module, a: Any, y: Tensor) -> Tensor:
                x = a[0].to(y.device)
                s = norm_scale(m, x)
                edited = self.tap(scale, s) if s.ndim > 1 else self.tap(scale, s[:, None])[:, 0]
                return y + (normalise(m, x, edited) - normalise(m, x, s)).to(y.dtype)

            self.on_output(module, scaled)
        if taps.wants(out):
            self.on_output(module, lambda m, a, y: self.tap(out, y))

    # -- the attention function

    def switch_attention(self, config: Any, masked: bool) -> None:
        """Gives this model's modules a copy of their config that names the tap; the config object itself may be shared
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
        tapped: dict[int, Any] = {}
        for module in self.anatomy.configured:
            own: Any = module.config
            if id(own) not in tapped:
                tapped[id(own)] = copy.copy(own)
                tapped[id(own)]._attn_implementation = name_of("eager" if inside else native)
            self.attribute(module, "config", tapped[id(own)])
