"""How the contract tests call each method that takes prompts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import families
from patching_cases import plain

from mechattr.base import Artifact
from mechattr.decomposition.lens_result import Lens
from mechattr.decomposition.result import Decomposition
from mechattr.decomposition.routes import Routes
from mechattr.methods import METHODS
from mechattr.models import Batch

PLAIN = ("gpt2_like", "llama_like")


@dataclass(frozen=True, kw_only=True)
class PromptCase:
    """How a method is called.

    Attributes:
        method: its name.
        settings: small ones.
        targeted: whether it takes `target` and `foil`.
        result: the kind of its result.
        refuses: families that it must refuse, with the words of the refusal.
        total: the table whose sum is the explained logit, for methods that promise `complete`; entries of it that are
            the total itself are left out by `total_without`.
        backends: other backends on which it must run; on the others it must raise a typed refusal.
    """

    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    targeted: bool = True
    result: type[Artifact] = Decomposition
    refuses: Mapping[str, str] = field(default_factory=dict)
    total: str = "components"
    total_without: tuple[str, ...] = ()
    backends: tuple[str, ...] = ("lens-gpt2", "nnsight-gpt2")


_EVERY_BACKEND = ("lens-gpt2", "nnsight-gpt2", "nnsight-local-gpt2")
_ENCODERS = {"bert": "norms act on the residual stream itself", "modernbert": "before the unembedding"}
CASES: dict[str, PromptCase] = {
    "alti": PromptCase(method="alti", settings={"rollouts": True}, targeted=False, backends=_EVERY_BACKEND),
    "alti_logit": PromptCase(method="alti_logit", refuses=_ENCODERS, backends=_EVERY_BACKEND),
    "alti_logit all": PromptCase(
        method="alti_logit",
        settings={"include": "all"},
        refuses=_ENCODERS,
        total="ledger",
        total_without=("logit", "remainder"),
        backends=_EVERY_BACKEND,
    ),
    "direct_logit_attribution": PromptCase(
        method="direct_logit_attribution", refuses=_ENCODERS, backends=_EVERY_BACKEND
    ),
    "logit_lens": PromptCase(
        method="logit_lens",
        targeted=False,
        result=Lens,
        settings={"target": 5, "foil": 7},
        backends=_EVERY_BACKEND,
    ),
    "lrp": PromptCase(method="lrp", settings={"sites": ("z", "resid_pre")}, backends=()),
    "attn_lrp": PromptCase(method="lrp", settings={"variant": "attn", "sites": ("rot_k", "mlp_out")}, backends=()),
    "information_flow_routes": PromptCase(
        method="information_flow_routes",
        settings={"threshold": 0.02},
        targeted=False,
        result=Routes,
        backends=("lens-gpt2", "nnsight-gpt2", "nnsight-local-gpt2"),
    ),
    "decompx": PromptCase(method="token_salience", settings={"method": "decompx"}, backends=()),
    "globenc": PromptCase(
        method="token_salience",
        targeted=False,
        settings={"method": "globenc", "normalise": True, "layers": True},
        backends=("lens-gpt2", "nnsight-gpt2", "nnsight-local-gpt2"),
    ),
    "norms": PromptCase(
        method="token_salience",
        targeted=False,
        settings={"method": "norms", "parts": "heads"},
        backends=("lens-gpt2", "nnsight-gpt2", "nnsight-local-gpt2"),
    ),
    "rollout": PromptCase(
        method="token_salience",
        targeted=False,
        settings={"method": "rollout"},
        backends=("lens-gpt2", "nnsight-gpt2", "nnsight-local-gpt2"),
    ),
    "token_lens": PromptCase(method="token_lens", result=Lens, refuses=_ENCODERS, backends=_EVERY_BACKEND),
}


def function_of(case: PromptCase) -> Any:
    """The function of a method."""
    module, name = METHODS[case.method].function.split(":")
    return getattr(import_module(module), name)


def call(case: PromptCase, model: Any, prompt: Any, **settings: Any) -> Any:
    """A method's result; of targets 5 and foils 7 where it takes them."""
    targets = {"target": 5, "foil": 7} if case.targeted else {}
    return function_of(case)(model, prompt, **{**targets, **case.settings, **settings})


def rows_of(model: Any, side: str = "right") -> Batch:
    """Three rows of 7, 4 and 5 tokens."""
    batch = families.ragged(side)
    return Batch.of(batch.tokens % model.info.d_vocab, batch.mask)


def model_of(kind: str) -> Any:
    """A model in float64 where it is plain, else in float32."""
    return plain(kind) if kind in PLAIN else families.hooked(kind)
