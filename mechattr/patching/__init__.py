"""Which components of a model cause a behaviour: exact activation patching and its gradient estimates."""

from __future__ import annotations

from mechattr.patching.activation import activation_patching
from mechattr.patching.attribution import attribution_patching
from mechattr.patching.estimate import Estimate, estimate

__all__ = ["Estimate", "activation_patching", "attribution_patching", "estimate"]
