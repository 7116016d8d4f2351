"""Which components and edges of a model cause a behaviour: exact patching, its estimates, and what both may miss."""

from __future__ import annotations

from mechattr.patching.ablation import ablation
from mechattr.patching.activation import activation_patching
from mechattr.patching.attribution import attribution_patching
from mechattr.patching.bound import missed_effect_bound
from mechattr.patching.bound_result import Bound
from mechattr.patching.circuit import Circuit, circuit_of
from mechattr.patching.cost import Estimate
from mechattr.patching.edge_artifact import EdgeAttribution
from mechattr.patching.edge_patching import edge_patching
from mechattr.patching.edge_run import EdgeRun
from mechattr.patching.edges import edge_attribution
from mechattr.patching.graph import Graph, count_edges
from mechattr.patching.path import path_patching
from mechattr.patching.tracing import causal_tracing

__all__ = [
    "Bound",
    "Circuit",
    "EdgeAttribution",
    "EdgeRun",
    "Estimate",
    "Graph",
    "ablation",
    "activation_patching",
    "attribution_patching",
    "causal_tracing",
    "circuit_of",
    "count_edges",
    "edge_attribution",
    "edge_patching",
    "missed_effect_bound",
    "path_patching",
]
