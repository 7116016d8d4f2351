"""Backward rules: the same forward pass, another backward pass.

A rule never changes a value, only what flows back through it. Rules are one frozen value that is given to a run and
forgotten with it; nothing is patched on classes.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mechattr.errors import SettingError, UnsupportedFeatureError, nearest

if TYPE_CHECKING:
    from mechattr.models.base import ModelInfo

WORDS = {
    "norm": ("full", "frozen"),
    "activation": ("full", "secant"),
    "gate": ("full", "half", "detached"),
    "pattern": ("full", "detached"),
    "softcap": ("full", "secant"),
    "router": ("full", "detached"),
}
NUMBERS = ("temperature", "qk_factor", "v_factor")
STRENGTHS = ("linear_epsilon", "linear_gamma")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """How a backward pass treats the non-linear parts of a network.

    Every rule but `hold` acts between two sites, so that the gradient at a site is what flows on from there: at `rot_q`
    it has the factor, at `pattern` and `mlp_post` it has not met a rule yet.

    Attributes:
        norm: `"full"` differentiates layer norms as they are; `"frozen"` holds each norm's scale at its value, so that
            a norm is linear (centring, weight and bias stay).
        activation: `"secant"` passes an MLP's activation function a(z) as z times a(z)/z, held at its value, in place
            of its slope, and likewise where queries, keys and values are clipped (OLMo). Where z is too small to divide
            by, a(z)/z is its limit from above.
        gate: `"half"` halves what flows back into the product a(z) u of a gated MLP: each factor gets half of its
            gradient. `"detached"` holds a(z) at its value, so that all flows to u and nothing to z. Without effect on
            MLPs that are not gated.
        pattern: `"detached"` holds attention probabilities at their values; nothing flows back to queries and keys.
        softcap: `"secant"` passes a cap c tanh(s/c) of attention scores s as `activation` passes a(z).
        router: `"detached"` holds the weights with which a mixture adds its experts up; nothing flows back to routers.
        temperature: T of the softmax in the backward pass. With p_T = softmax(scores / T), the gradient g at the
            pattern becomes p_T (g - sum(p_T g)) at the scores: that of a softmax at T, without its factor 1/T.
        qk_factor: factor of the gradients that reach `rot_q` and `rot_k` from the scores.
        v_factor: factor of the gradient that reaches `v`.
        linear_epsilon: the epsilon rule at every linear layer of the blocks (see `mechattr.models.linear_rules`). The
            unembedding and an encoder's prediction head are none of them.
        linear_gamma: the gamma rule there; 0.0 is none.
        hold: blocks whose writes to the residual stream (attention and MLP together) are held fixed while the skip path
            stays, as GradDrop does.
    """

    norm: str = "full"
    activation: str = "full"
    gate: str = "full"
    pattern: str = "full"
    softcap: str = "full"
    router: str = "full"
    temperature: float = 1.0
    qk_factor: float = 1.0
    v_factor: float = 1.0
    linear_epsilon: float = 0.0
    linear_gamma: float = 0.0
    hold: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        for name, words in WORDS.items():
            if getattr(self, name) not in words:
                asked = f"Rules({name}={getattr(self, name)!r})"
                raise SettingError(asked, "no such rule", nearest(str(getattr(self, name)), words))
        for name in NUMBERS:
            value: Any = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise SettingError(f"Rules({name}={value!r})", "no positive number", "1.0 leaves the gradient as it is")
        for name in STRENGTHS:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise SettingError(f"Rules({name}={value!r})", "no number from 0", "0.0 leaves linear layers linear")
        if self.pattern == "detached" and (self.temperature, self.qk_factor) != (1.0, 1.0):
            asked = "Rules(pattern='detached') with temperature or qk_factor"
            raise SettingError(asked, "nothing flows back through a detached pattern", "choose one of the two")
        try:
            hold = frozenset(operator.index(layer) for layer in self.hold)
        except TypeError:
            raise SettingError(f"Rules(hold={self.hold!r})", "no set of layers", "give one, such as hold={3}") from None
        object.__setattr__(self, "hold", hold)

    @classmethod
    def relp(cls) -> Rules:
        """Relevance patching: the network becomes linear at its activations, and loses no relevance outside biases.

        Norms frozen, activations by their secant, the factors of a gate by halves, attention patterns detached. Without
        biases, activation times gradient summed over the residual stream of any block is the metric, for a metric
        that is linear in the logits. Costs one forward and one backward pass, as the plain gradient.

        Read: the table of rules and the source that accompany the paper. That source adds 1e-6 to z before it divides,
        where this takes a limit; its example of use leaves the attention rule out (`replace(Rules.relp(),
        pattern="full")`).

        References:
            Rezaei Jafari, Eberle, Khakzar, Nanda (2025), RelP, arXiv 2508.21258.
        """
        return cls(norm="frozen", activation="secant", gate="half", pattern="detached")

    @classmethod
    def gim(cls) -> Rules:
        """Gradient interaction modifications: against softmaxes that share the effect of a score among its neighbours.

        Norms frozen, softmax at temperature 2 on the way back, gradients of queries and keys times 1/4, of values times
        1/2, the factors of a gate by halves. Costs one forward and one backward pass.

        Read: the abstract, and the authors' library. From the library are all numbers, the missing factor 1/T, and the
        halved gate, which its first versions did not have (`replace(Rules.gim(), gate="full")`). The library scales
        q and k on their way out of the hook it is given; here the sites `q`, `k`, `rot_q`, `rot_k`, `v` all show the
        scaled gradient, as do edges into them.

        References:
            Edin et al. (2025), GIM, arXiv 2505.17630.
        """
        return cls(norm="frozen", gate="half", temperature=2.0, qk_factor=0.25, v_factor=0.5)

    @classmethod
    def cp_lrp(cls) -> Rules:
        """CP-LRP: layer-wise relevance propagation through the network that is linear at its values.

        With relevance R = x times gradient: norms divide by a held scale (centring, weight and bias stay), activations
        pass their secant a(z)/z, a gate a(z) u gives all to u, patterns are held, so that values get all and queries
        and keys nothing; the weights of experts are held. What is linear passes its gradient (the epsilon rule in its
        limit). For a metric that is linear in logits without a cap, relevance summed over the residual stream of any
        block, and what the biases above it take, are the metric. Costs one forward and one backward pass.

        Of the published rules are those of norms and attention; a secant is their identity rule. Deviations: a(z)/z is
        a limit where z is 0; linear layers have no stabiliser unless `linear_epsilon` gives one.

        References:
            Ali et al. (2022), XAI for Transformers: Better Explanations through Conservative Propagation.
        """
        return cls(norm="frozen", activation="secant", gate="detached", pattern="detached", router="detached")

    @classmethod
    def attn_lrp(cls) -> Rules:
        """AttnLRP: as `cp_lrp`, with relevance that flows through the attention pattern and through gates.

        A product of two factors gives each half of its relevance: gates a(z) u, pattern times value, q.k. The softmax
        is differentiated truly. As factors of the plain gradient these are 1/4 at q and k and 1/2 at v. A cap of the
        scores, c tanh(s/c), passes its secant: it is an activation. The weights of experts are held.

        A softmax does not conserve relevance. What it leaks is z dz - v dv - q dq - k dk, summed over an attention
        block at the sites `z`, `v`, `rot_q` and `rot_k`; together with it and with what biases take, relevance is the
        metric. Costs one forward and one backward pass.

        The halves depend on how a product is bracketed: one of three factors would give a quarter to two of them.
        Deviations: those of `cp_lrp`; the published code lets relevance into routers and halves what experts add.

        References:
            Achtibat et al. (2024), AttnLRP: Attention-Aware Layer-Wise Relevance Propagation, arXiv 2402.05602.
        """
        return cls(
            norm="frozen",
            activation="secant",
            gate="half",
            softcap="secant",
            router="detached",
            qk_factor=0.25,
            v_factor=0.5,
        )

    @property
    def in_softmax(self) -> bool:
        """Whether a rule acts between scores and pattern, which no fused kernel shows."""
        return self.pattern != "full" or self.temperature != 1.0

    @property
    def in_attention(self) -> bool:
        """Whether a rule acts between queries, keys and values on one side and z on the other."""
        return self.in_softmax or (self.softcap, self.qk_factor, self.v_factor) != ("full", 1.0, 1.0)

    @property
    def in_linear(self) -> bool:
        """Whether a rule acts at linear layers."""
        return (self.linear_epsilon, self.linear_gamma) != (0.0, 0.0)

    @property
    def in_modules(self) -> bool:
        """Whether a rule acts at norms, activations or gates, of which none must be missed."""
        return (self.norm, self.activation, self.gate) != ("full", "full", "full")

    def to_json(self) -> dict[str, Any]:
        """What is not the default, such as `{"norm": "frozen", "hold": [3]}`; `Rules(**that)` is this value again."""
        given = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        return {name: sorted(value) if name == "hold" else value for name, value in given.items()}


def check_rules(rules: Any) -> None:
    """Whether `rules` can be given to a run.

    Raises:
        SettingError: they are no `Rules`.
    """
    if rules is not None and not isinstance(rules, Rules):
        fix = "give Rules, such as Rules.relp() or Rules(norm='frozen')"
        raise SettingError(f"rules={rules!r}", f"a {type(rules).__name__}", fix)


def refused(rules: Rules, info: ModelInfo) -> UnsupportedFeatureError | None:
    """The error of rules that no model of this kind can obey, if they are such."""
    if info.dtype == "float16" and "secant" in (rules.activation, rules.softcap):
        return UnsupportedFeatureError(
            f"Rules(activation={rules.activation!r}, softcap={rules.softcap!r}) in float16",
            "relevance leaves the range of float16: it overflows above 65504 and a(z)/z of small z is lost",
            "load the model in float32, or in bfloat16 for a ranking",
        )
    if info.n_experts and rules.in_linear:
        return UnsupportedFeatureError(
            f"Rules(linear_epsilon={rules.linear_epsilon}, linear_gamma={rules.linear_gamma})",
            "the MLPs are mixtures of experts, whose matrices are no layers of their own",
            "leave these rules out: dataclasses.replace(rules, linear_epsilon=0.0, linear_gamma=0.0)",
        )
    return None


def frozen_like(exact: Tensor, linear: Tensor) -> Tensor:
    """The value of `exact`, bit for bit, with the gradient of `linear`.

    `linear - linear.detach()` is exactly zero for finite values, and adding zero changes no bit but the sign of zero.
    """
    return exact.detach() + (linear - linear.detach())


def scaled(x: Tensor, factor: float) -> Tensor:
    """x, with its gradient times `factor`."""
    return x if factor == 1.0 else frozen_like(x, factor * x)


def secant(act: Callable[[Tensor], Tensor], z: Tensor, y: Tensor) -> Tensor:
    """y = act(z), with the gradient of z times act(z)/z held fixed; below four times the smallest normal number the
    quotient is that of this number."""
    least = torch.full((), 4 * torch.finfo(z.dtype).tiny, dtype=z.dtype, device=z.device)
    near = z.abs() < least
    with torch.no_grad():
        slope = torch.where(near, act(least) / least, y / torch.where(near, 1.0, z))
    return frozen_like(y, z * slope)


def capped(scores: Tensor, softcap: float, rules: Rules) -> Tensor:
    """softcap * tanh(scores / softcap)."""
    cap = _cap(softcap)
    return secant(cap, scores, cap(scores)) if rules.softcap == "secant" else cap(scores)


def _cap(softcap: float) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.tanh(x / softcap) * softcap


def attend(scores: Tensor, softmax: Callable[[Tensor], Tensor], rules: Rules) -> Tensor:
    """softmax(scores), and what flows back from it."""
    pattern = softmax(scores)
    if rules.pattern == "detached":
        return pattern.detach()
    if rules.temperature != 1.0:
        return frozen_like(pattern, rules.temperature * softmax(scores / rules.temperature))
    return pattern
