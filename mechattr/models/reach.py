"""Which modules of a transformers model the backward rules reach; where they miss one, they are refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from mechattr.errors import UnsupportedFeatureError
from mechattr.models.anatomy import Anatomy
from mechattr.models.hf_rules import LINEAR
from mechattr.models.rules import Rules

# Modules that pass a gradient as they are: linear, lookups, or without effect outside training
LINEAR_KINDS = (nn.Linear, nn.Embedding, nn.Dropout, nn.Identity, nn.modules.loss._Loss)


def unreached(rules: Rules, model: Any, anatomy: Anatomy) -> UnsupportedFeatureError | None:
    """The error of rules of norms, activations or gates in a model with a module that they miss.

    Every module without children must be linear, a norm whose function was compared with its formula at load, the
    activation function of an MLP or of the prediction head, or a rotary table. What the modules of a vision tower do
    lies below the embedding.
    """
    if not (rules.in_modules or rules.in_linear):
        return None
    fix = "use rules that act in attention alone (pattern, temperature, qk_factor, v_factor), or another model"
    missed = sorted({*_unmatched(model, anatomy), *_without_formula(rules, anatomy)})
    if not missed:
        return None
    more = f" and {len(missed) - 4} more" if len(missed) > 4 else ""
    found = f"they do not reach {', '.join(missed[:4])}{more}"
    family = model.config.model_type
    return UnsupportedFeatureError(f"rules {rules.to_json()} in a model of family {family!r}", found, fix)


def _unmatched(model: Any, anatomy: Anatomy) -> Iterator[str]:
    """Modules that are neither linear nor known."""
    known = {*anatomy.norms, anatomy.head.get("act")}
    for stack in anatomy.stacks:
        for parts in stack.parts:
            known |= {m for name, m in parts.items() if name.endswith("act") or name in ("router", "experts")}
            experts = parts.get("experts")
            known |= set() if experts is None else set(experts.children())
    inside = set(anatomy.base.modules())
    outside = set(model.modules()).difference(model.base_model.modules())
    for name, module in model.named_modules():
        leaf = next(module.children(), None) is None and (module in inside or module in outside)
        linear = isinstance(module, LINEAR_KINDS) or type(module).__name__ == "Conv1D"
        if leaf and not linear and module not in known and "Rotary" not in type(module).__name__:
            yield f"{name} ({type(module).__name__})"


def _without_formula(rules: Rules, anatomy: Anatomy) -> Iterator[str]:
    """What modules do between their parts, where that is known to need a rule of its own."""
    config, family = anatomy.base.config, anatomy.family
    if getattr(config, "clip_qkv", None) is not None and not family.clipped:
        yield "clipped queries, keys and values (clip_qkv)"
    if family.head_gelu is not None and not anatomy.head:
        yield f"the activation of the prediction head between {' and '.join(family.head_gelu)}"
    for parts in anatomy.parts:
        inner = (rules.activation, rules.gate) != ("full", "full")
        if inner and "experts" in parts and not hasattr(parts["experts"], "act_fn"):
            yield f"the gate inside each expert ({type(parts['experts']).__name__})"
        for name in LINEAR if rules.in_linear else ():
            module = parts.get(name)
            if module is not None and not isinstance(module, nn.Linear) and type(module).__name__ != "Conv1D":
                yield f"the linear layer {name} ({type(module).__name__})"
