"""Where the backward rules of a run meet the modules of a transformers model: norms, activations, gates, experts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from mechattr.models.hf_taps import Tapping
from mechattr.models.linear_rules import linear_rule
from mechattr.models.norms import norm_scale, normalise
from mechattr.models.placement import stored
from mechattr.models.rules import frozen_like, scaled, secant
from mechattr.models.weights import matrix

LINEAR = ("q", "k", "v", "qkv", "gate", "up", "down", "o")


class Ruling(Tapping):
    """Hooks that change what flows back through a module, never what it returns. They are registered before taps on the
    same output, so that the gradient at a site has met no rule of the module above it yet."""

    def frozen_norms(self) -> None:
        """Holds the scale of every norm."""
        if self.taps.rules.norm == "frozen":
            for norm in self.anatomy.norms:
                self.on_output(norm, _frozen_norm)

    def head(self) -> None:
        """The activation function of a prediction head; its norm is one of the others."""
        head = self.anatomy.head
        if self.taps.rules.activation != "secant" or not head:
            return
        if "act" in head:
            self.on_output(head["act"], _secant)
            return
        before: list[Tensor] = []

        def keep(_m: nn.Module, _a: Any, z: Tensor) -> Tensor:
            before[:] = [z]
            return z

        self.on_output(head["before"], keep)
        self.on_input(head["behind"], lambda y: secant(F.gelu, before.pop(), y))

    def linears(self, parts: dict[str, nn.Module], names: Sequence[str] = LINEAR[:-1]) -> None:
        """The linear layers of a block; its output projection (`"o"`) when `result` is tapped, which replaces what it
        returns."""
        if self.taps.rules.in_linear:
            for module in dict.fromkeys(parts[name] for name in names if name in parts):
                self.on_output(module, self.linear)

    def linear(self, m: nn.Module, a: Any, y: Tensor) -> Tensor:
        x = a[0].to(y.device)
        return linear_rule(x, matrix(m), stored(m, "bias"), y, self.taps.rules)

    def activation(self, parts: dict[str, nn.Module], *, gated: bool, shared: str = "") -> None:
        """The activation function of an MLP and its product with a second input."""
        rules, act, down = self.taps.rules, parts[f"{shared}act"], parts[f"{shared}down"]
        if rules.activation == "secant":
            self.on_output(act, _secant)
        if rules.gate == "detached" and gated:
            self.on_output(act, _held)
        if rules.gate == "half" and gated:
            self.on_input(down, lambda x: scaled(x, 0.5))

    def clips(self, layer: int) -> None:
        """Queries, keys and values that the model clips are clipped before it does so, and pass their secant."""
        parts = self.anatomy.parts[layer]
        bound = getattr(parts["attn"].config, "clip_qkv", None) if self.anatomy.family.clipped else None
        if bound is None or self.taps.rules.activation != "secant":
            return

        def clip(z: Tensor) -> Tensor:
            return z.clamp(-bound, bound)

        for short in ("q", "k", "v"):
            last = getattr(parts["attn"], f"{short}_norm", parts[short])
            self.on_output(last, lambda _m, _a, z: secant(clip, z, clip(z)))

    def experts(self, parts: dict[str, nn.Module]) -> None:
        """The inside of a mixture. A product within an expert is halved behind the expert (see `behind_experts`), which
        is linear from there on; its weight gets twice that."""
        rules = self.taps.rules
        if "shared_act" in parts:
            self.activation(parts, gated=True, shared="shared_")
        if rules.router == "detached":
            self.stack.callback(parts["router"].register_forward_hook(_held_weights).remove)
            if "shared_weight" in parts:
                self.on_output(parts["shared_weight"], _held)
        act: Any = getattr(parts["experts"], "act_fn", None)
        if rules.activation == "secant":
            self.on_output(act, _secant)
        if rules.gate == "detached":
            self.on_output(act, _held)
        if rules.gate == "half":
            self.stack.callback(parts["experts"].register_forward_pre_hook(_doubled_weights).remove)

    @property
    def behind_experts(self) -> float:
        """The factor of what flows back into the outputs of experts."""
        return 0.5 if self.taps.rules.gate == "half" else 1.0


def _frozen_norm(m: nn.Module, a: Any, y: Tensor) -> Tensor:
    x = a[0].to(y.device)
    return frozen_like(y, normalise(m, x, norm_scale(m, x).detach()).to(y.dtype))


def _secant(m: nn.Module, a: Any, y: Tensor) -> Tensor:
    return secant(m.forward, a[0], y)


def _held(_m: nn.Module, _a: Any, y: Tensor) -> Tensor:
    return y.detach()


def _doubled_weights(_m: nn.Module, a: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    x, chosen, weights = a
    return x, chosen, scaled(weights, 2.0)


def _held_weights(_m: nn.Module, _a: Any, routed: tuple[Any, ...]) -> tuple[Any, ...]:
    logits, weights, chosen = routed
    return logits, weights.detach(), chosen
