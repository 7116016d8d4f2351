"""Mechanistic interpretability of transformer models: `import mechattr as ma`.

Names load when they are first used, so that importing the package costs nothing and a backend that is broken disables
only itself. Everything that is not listed here is found in its package: `ma.<package>.<name>`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mechattr import (
        artifact,
        decomposition,
        draw,
        erasure,
        errors,
        evaluation,
        models,
        patching,
        report,
        sites,
        steering,
        tasks,
        vocabulary,
    )
    from mechattr.artifact import Artifact, Attribution, Cache, open
    from mechattr.decomposition.alti import alti
    from mechattr.decomposition.alti_logit import alti_logit
    from mechattr.decomposition.direct import direct_logit_attribution
    from mechattr.decomposition.flow import information_flow_routes
    from mechattr.decomposition.logit_lens import logit_lens
    from mechattr.decomposition.lrp import lrp
    from mechattr.decomposition.salience import token_salience
    from mechattr.decomposition.token_lens import token_lens
    from mechattr.evaluation.estimate import estimate
    from mechattr.evaluation.faithfulness import faithfulness
    from mechattr.evaluation.minimality import minimality
    from mechattr.labelled import Labelled
    from mechattr.methods import METHODS
    from mechattr.models.load import load
    from mechattr.patching.ablation import ablation
    from mechattr.patching.activation import activation_patching
    from mechattr.patching.attribution import attribution_patching
    from mechattr.patching.bound import missed_effect_bound
    from mechattr.patching.edge_patching import edge_patching
    from mechattr.patching.edges import edge_attribution
    from mechattr.patching.path import path_patching
    from mechattr.patching.tracing import causal_tracing
    from mechattr.sites import Node
    from mechattr.tasks.task import accuracy

__version__ = "0.1.0"

# Name -> "module:attribute", or "module" for the module itself.
_WHERE = {
    "METHODS": "mechattr.methods:METHODS",
    "Artifact": "mechattr.artifact:Artifact",
    "Attribution": "mechattr.artifact:Attribution",
    "Cache": "mechattr.artifact:Cache",
    "Labelled": "mechattr.labelled:Labelled",
    "Node": "mechattr.sites:Node",
    "ablation": "mechattr.patching.ablation:ablation",
    "accuracy": "mechattr.tasks.task:accuracy",
    "activation_patching": "mechattr.patching.activation:activation_patching",
    "alti": "mechattr.decomposition.alti:alti",
    "alti_logit": "mechattr.decomposition.alti_logit:alti_logit",
    "artifact": "mechattr.artifact",
    "attribution_patching": "mechattr.patching.attribution:attribution_patching",
    "causal_tracing": "mechattr.patching.tracing:causal_tracing",
    "direct_logit_attribution": "mechattr.decomposition.direct:direct_logit_attribution",
    "decomposition": "mechattr.decomposition",
    "draw": "mechattr.draw",
    "edge_attribution": "mechattr.patching.edges:edge_attribution",
    "edge_patching": "mechattr.patching.edge_patching:edge_patching",
    "erasure": "mechattr.erasure",
    "errors": "mechattr.errors",
    "estimate": "mechattr.evaluation.estimate:estimate",
    "evaluation": "mechattr.evaluation",
    "faithfulness": "mechattr.evaluation.faithfulness:faithfulness",
    "information_flow_routes": "mechattr.decomposition.flow:information_flow_routes",
    "load": "mechattr.models.load:load",
    "logit_lens": "mechattr.decomposition.logit_lens:logit_lens",
    "lrp": "mechattr.decomposition.lrp:lrp",
    "minimality": "mechattr.evaluation.minimality:minimality",
    "missed_effect_bound": "mechattr.patching.bound:missed_effect_bound",
    "models": "mechattr.models",
    "open": "mechattr.artifact:open",
    "patching": "mechattr.patching",
    "path_patching": "mechattr.patching.path:path_patching",
    "report": "mechattr.report",
    "sites": "mechattr.sites",
    "steering": "mechattr.steering",
    "tasks": "mechattr.tasks",
    "token_lens": "mechattr.decomposition.token_lens:token_lens",
    "token_salience": "mechattr.decomposition.salience:token_salience",
    "vocabulary": "mechattr.vocabulary",
}

__all__ = [
    "METHODS",
    "Artifact",
    "Attribution",
    "Cache",
    "Labelled",
    "Node",
    "__version__",
    "ablation",
    "accuracy",
    "activation_patching",
    "alti",
    "alti_logit",
    "artifact",
    "attribution_patching",
    "causal_tracing",
    "decomposition",
    "direct_logit_attribution",
    "draw",
    "edge_attribution",
    "edge_patching",
    "erasure",
    "errors",
    "estimate",
    "evaluation",
    "faithfulness",
    "information_flow_routes",
    "load",
    "logit_lens",
    "lrp",
    "minimality",
    "missed_effect_bound",
    "models",
    "open",
    "patching",
    "path_patching",
    "report",
    "sites",
    "steering",
    "tasks",
    "token_lens",
    "token_salience",
    "vocabulary",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        if name.startswith("__"):  # asked by the import system, which expects a plain answer
            raise AttributeError(f"module 'mechattr' has no attribute {name!r}")
        from mechattr.errors import nearest

        raise AttributeError(f"module 'mechattr' has no attribute {name!r}: {nearest(name, _WHERE)}")
    module, _, attribute = _WHERE[name].partition(":")
    value = getattr(import_module(module), attribute) if attribute else import_module(module)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
