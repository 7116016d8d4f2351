"""Where the taps of a run meet the hook points of a TransformerBridge, for the time of one run.

Site names are TransformerLens's, so most sites are the hook point of that name. Not so:

- `resid_mid` is there an alias of the MLP norm's input, which the skip path does not see; here it is the sum
  resid_pre + attn_out, and an edit is fed back as a change of attn_out;
- the scales of norms: tapping their hook point would recompute the norm, so an edit is fed back into its output;
- without rotary embedding, `rot_q` and `rot_k` are `q` and `k`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast

from torch import Tensor, nn

from mechattr.models.anatomy import Anatomy
from mechattr.models.families import Family
from mechattr.models.norms import norm_scale, normalise
from mechattr.models.taps import Taps
from mechattr.sites import parse

FLAGS = ("use_attn_result", "use_split_qkv_input", "use_attn_in")  # the last two take ln1 out of the network


def bare(module: nn.Module) -> nn.Module:
    """The module of transformers inside TransformerLens's wrapper around it."""
    while "_original_component" in module._modules:
        module = cast(nn.Module, module._modules["_original_component"])
    return module


@contextmanager
def tapping(bridge: Any, anatomy: Anatomy, taps: Taps) -> Iterator[None]:
    """Adds the hooks that `taps` wants, and takes exactly those away again; flags are put back as they were."""
    with ExitStack() as stack:
        result = any(name.endswith("hook_result") for name in taps.names)
        for flag, value in zip(FLAGS, (result, False, False), strict=True):
            before = bool(getattr(bridge.cfg, flag, False))
            if before != value:
                stack.callback(getattr(bridge, f"set_{flag}"), before)
                getattr(bridge, f"set_{flag}")(value)
        _Installer(bridge, anatomy, taps, stack).install()
        yield


class _Installer:
    """Adds hooks to one bridge for one run; the exit stack takes them off."""

    def __init__(self, bridge: Any, anatomy: Anatomy, taps: Taps, stack: ExitStack) -> None:
        self.anatomy, self.taps, self.stack = anatomy, taps, stack
        self.points, self.blocks = bridge.hook_dict, bridge.blocks

    def install(self) -> None:
        """Hooks of one point run in the order in which they are added: an inner site before an outer one."""
        start = self.taps.start
        first = 0 if start is None else start.layer
        if start is None:
            self.plain("hook_embed", at="embed.hook_out")  # encoders: hook_embed is the sum of all embeddings there
            self.plain("hook_pos_embed", at="pos_embed.hook_out")
        for layer in range(len(self.anatomy.blocks)):
            if layer < first:
                self.skip(self.blocks[layer])
                continue
            self.block(layer, start.resid_pre if start is not None and layer == first else None)
        self.norm("ln_final.", self.anatomy.ends.get("final"))

    def block(self, layer: int, start: Tensor | None) -> None:
        p, parts = f"blocks.{layer}.", self.anatomy.parts[layer]
        if start is not None:
            self.on(p + "hook_resid_pre", lambda _x: start)
        self.plain(p + "hook_resid_pre")
        self.norm(p + "ln1.", parts.get("ln1"))
        for short in ("q", "k"):
            self.plain(f"{p}attn.hook_{short}")
            if self.anatomy.family.plain_qk:
                self.plain(f"{p}attn.hook_rot_{short}", at=f"{p}attn.hook_{short}")
            else:
                self.plain(f"{p}attn.hook_rot_{short}")
        for short in ("v", "attn_scores", "pattern", "z", "result"):
            self.plain(f"{p}attn.hook_{short}")
        self.plain(p + "hook_attn_out")
        self.resid_mid(p)
        self.norm(p + "ln2.", parts.get("ln2"))
        for name in ("mlp.hook_pre", "mlp.hook_pre_linear", "mlp.hook_post", "hook_mlp_out", "hook_resid_post"):
            self.plain(p + name)

    def plain(self, name: str, *, at: str | None = None) -> None:
        """A site that is a hook point, under its own name or another."""
        if self.taps.wants(name) and (at or name) in self.points:
            self.on(at or name, lambda x: self.taps(name, x))

    def resid_mid(self, p: str) -> None:
        """The exact no-op x + (mid - mid) when the tap changes nothing."""
        name = p + "hook_resid_mid"
        if not self.taps.wants(name):
            return
        before: list[Tensor] = []

        def feed_back(x: Tensor) -> Tensor:
            total = before.pop() + x
            return x + (self.taps(name, total) - total)

        self.on(p + "hook_resid_pre", before.append)
        self.on(p + "hook_attn_out", feed_back)

    def norm(self, p: str, module: nn.Module | None) -> None:
        """With E the norm at a given scale, an edited scale s enters as E(x, s) - E(x, s0)."""
        name, inputs = p + "hook_scale", list[Tensor]()
        if self.taps.wants(name) and module is not None:

            def scaled(y: Tensor) -> Tensor:
                x = inputs.pop()
                s = norm_scale(module, x)
                return y + (normalise(module, x, self.taps(name, s)) - normalise(module, x, s)).to(y.dtype)

            self.on(p + "hook_in", inputs.append)
            self.on(p + "hook_out", scaled)
        self.plain(p + "hook_out")

    # -- installing and undoing

    def on(self, name: str, change: Callable[[Tensor], Tensor | None]) -> None:
        point = self.points[name]

        def hook(x: Tensor, hook: Any) -> Tensor | None:  # noqa: ARG001 (TransformerLens names its argument)
            return change(x)

        handle = point.add_hook(hook)

        def undo() -> None:
            handle.hook.remove()
            point.fwd_hooks[:] = [other for other in point.fwd_hooks if other is not handle]

        self.stack.callback(undo)

    def skip(self, block: nn.Module) -> None:
        """Makes a block hand its input through, for runs that start above it."""
        block.__dict__["forward"] = lambda hidden_states, *_args, **_kwargs: hidden_states
        self.stack.callback(block.__dict__.pop, "forward")


def refused(name: str, family: Family) -> bool:
    """Whether the hook point of a site is another tensor than its name says: in encoders with norms after each
    addition, scores and pattern come from a second computation, and attn_out is the stream after its norm."""
    return family.post_norm and parse(name)[0] in ("attn_scores", "pattern", "attn_out", "result")
