"""Where a prediction comes from: a logit taken apart over tokens, heads, layers and components, in sums that close."""

from __future__ import annotations

from mechattr.decomposition import tuned_lens
from mechattr.decomposition.alti import alti
from mechattr.decomposition.alti_logit import alti_logit
from mechattr.decomposition.decompx import decompx_vectors
from mechattr.decomposition.direct import direct_logit_attribution
from mechattr.decomposition.flow import information_flow_routes
from mechattr.decomposition.lens_result import Lens
from mechattr.decomposition.logit_lens import logit_lens
from mechattr.decomposition.lrp import lrp
from mechattr.decomposition.parts import AttentionParts, MlpParts, attention_parts, mlp_parts
from mechattr.decomposition.prompt import Prompt, prompt_of
from mechattr.decomposition.readout import Readout, readout
from mechattr.decomposition.result import Decomposition
from mechattr.decomposition.roles import HeadRoles, head_roles
from mechattr.decomposition.routes import Routes
from mechattr.decomposition.salience import token_salience
from mechattr.decomposition.target import Target, target_of, token_id
from mechattr.decomposition.token_lens import token_lens

__all__ = [
    "AttentionParts",
    "Decomposition",
    "HeadRoles",
    "Lens",
    "MlpParts",
    "Prompt",
    "Readout",
    "Routes",
    "Target",
    "alti",
    "alti_logit",
    "attention_parts",
    "decompx_vectors",
    "direct_logit_attribution",
    "head_roles",
    "information_flow_routes",
    "logit_lens",
    "lrp",
    "mlp_parts",
    "prompt_of",
    "readout",
    "target_of",
    "token_id",
    "token_lens",
    "token_salience",
    "tuned_lens",
]
