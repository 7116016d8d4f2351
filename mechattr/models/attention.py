"""The attention tap: one function, registered with transformers, that exposes q, k, v, scores and pattern.

Without a request for scores or pattern it calls the model's own attention function, so numerics stay those of the
family and of the implementation that the model was loaded with. The mask function must be registered under the same
name: a name that only the attention interface knows gets no mask at all, and attention would silently look ahead.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mechattr.models.base import AttentionForm
from mechattr.models.rules import attend, capped, scaled
from mechattr.models.taps import Taps

ATTRIBUTE = "_mechattr_tap"  # on an attention module for the time of one run
NATIVE = ("eager", "sdpa")


@dataclass(frozen=True, eq=False, slots=True)
class AttentionTap:
    """What the attention function of one layer needs of the current run.

    Attributes:
        taps: the run's taps.
        prefix: `"blocks.3.attn.hook_"`.
        plain_qk: the family has neither rotary embeddings nor q/k norms, so `q` and `k` are tapped here as well.
        softmax_float32: the family's eager attention takes its softmax in float32 whatever the model's dtype.
    """

    taps: Taps
    prefix: str
    plain_qk: bool
    softmax_float32: bool

    def heads(self, short: str, x: Tensor) -> Tensor:
        """Taps a [batch, head, pos, d_head] tensor under the site's axes [batch, pos, head, d_head]."""
        name = self.prefix + short
        if not self.taps.wants(name):
            return x
        return self.taps(name, x.transpose(1, 2)).transpose(1, 2)

    def whole(self, short: str, x: Tensor) -> Tensor:
        """Taps a tensor that already has the site's axes."""
        name = self.prefix + short
        return self.taps(name, x) if self.taps.wants(name) else x

    def note(
        self,
        d_head: int,
        scaling: float | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        **_: Any,
    ) -> None:
        """Keeps how this call turns q.k into scores, where it is a block's self-attention."""
        stack, layer, part = self.prefix.split(".")[:3]
        if (stack, part) != ("blocks", "attn"):
            return
        scale = d_head**-0.5 if scaling is None else float(scaling)
        sinks = None if s_aux is None else s_aux.detach().flatten()
        self.taps.forms[int(layer)] = AttentionForm(scale, softcap, sinks)

    def enter(self, query: Tensor, key: Tensor, value: Tensor, **form: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Taps what comes into attention; a rule's factors act on what flows back from here."""
        if self.plain_qk:
            query, key = self.heads("q", query), self.heads("k", key)
        query, key, value = self.heads("rot_q", query), self.heads("rot_k", key), self.heads("v", value)
        self.note(query.shape[-1], **form)
        rules = self.taps.rules
        return scaled(query, rules.qk_factor), scaled(key, rules.qk_factor), scaled(value, rules.v_factor)

    def pattern(self, scores: Tensor, softmax: Callable[[Tensor], Tensor], dtype: torch.dtype) -> Tensor:
        """From scores to pattern, with both tapped."""
        scores = self.whole("attn_scores", scores)
        return self.whole("pattern", attend(scores, lambda x: softmax(x).to(dtype), self.taps.rules))

    @property
    def inside(self) -> bool:
        """Whether scores or pattern are wanted, or a rule between them, which no fused kernel shows."""
        wanted = self.taps.wants_any([self.prefix + "attn_scores", self.prefix + "pattern"])
        return wanted or self.taps.rules.in_softmax

    def explicit(self, softcap: float | None) -> bool:
        """Whether attention is worked out step by step: for what is inside, or for a rule of its softcap."""
        return self.inside or (softcap is not None and self.taps.rules.softcap != "full")


def _native(module: nn.Module, implementation: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The function that the model would have called: each family has an eager attention of its own beside its class."""
    if implementation != "eager":
        function: Callable[..., tuple[Tensor, Tensor | None]] = ALL_ATTENTION_FUNCTIONS[implementation]
        return function
    homes = [sys.modules[kind.__module__] for kind in type(module).__mro__]  # a user's subclass lives elsewhere
    return next(home.eager_attention_forward for home in homes if hasattr(home, "eager_attention_forward"))


def _tapped(implementation: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        tap: AttentionTap | None = module.__dict__.get(ATTRIBUTE)
        if tap is not None:
            query, key, value = tap.enter(query, key, value, **kwargs)
            if tap.explicit(kwargs.get("softcap")):
                return _explicit(tap, query, key, value, attention_mask, **kwargs)
        return _native(module, implementation)(module, query, key, value, attention_mask, **kwargs)

    return attention


def _explicit(
    tap: AttentionTap,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """softmax(softcap(q.k s) + bias + mask) v, the operations in the order of the families' eager attention."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = torch.matmul(query, key.transpose(2, 3)) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = capped(scores, softcap, tap.taps.rules)
    if position_bias is not None:
        scores = scores + position_bias
    if mask is not None:
        scores = scores + mask
    scores = tap.whole("attn_scores", scores)
    if s_aux is not None:  # attention sinks: one more logit a head, which takes mass and gives no value
        sink = s_aux.reshape(1, -1, 1, 1).expand(len(scores), -1, scores.shape[2], 1)
        scores = torch.cat([scores, sink], -1)
        scores = scores - scores.max(-1, keepdim=True).values  # as the family does, whose softmax may be in bfloat16
    dtype = torch.float32 if tap.softmax_float32 else None
    pattern = attend(scores, lambda x: torch.softmax(x, -1, dtype=dtype).to(query.dtype), tap.taps.rules)
    if s_aux is not None:
        pattern = pattern[..., :-1]
    pattern = tap.whole("pattern", pattern)
    return torch.matmul(pattern, value).transpose(1, 2).contiguous(), pattern


def name_of(implementation: str) -> str:
    """The registered name of the tap around a native attention implementation."""
    return f"mechattr_{implementation}"


def _eager_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """The eager mask, with another minimum in float64 for rows without any visible key, which are padding.

    A softmax in float32 turns float64's minimum into minus infinity and such rows into NaN, which reaches every token
    in the next layer. Narrower dtypes give these rows a uniform pattern, and so does float32's minimum.
    """
    mask: Tensor | None = ALL_MASK_ATTENTION_FUNCTIONS["eager"](*args, **kwargs)
    if mask is None or mask.dtype != torch.float64:
        return mask
    return mask.masked_fill((mask < 0).all(-1, keepdim=True), torch.finfo(torch.float32).min)


for _implementation, _mask in (("eager", _eager_mask), ("sdpa", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])):
    AttentionInterface.register(name_of(_implementation), _tapped(_implementation))
    AttentionMaskInterface.register(name_of(_implementation), _mask)
