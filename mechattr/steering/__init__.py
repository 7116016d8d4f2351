"""Steering: vectors that change what a model does, built from contrasts and applied where they should act."""

from __future__ import annotations

from mechattr.steering.builders import mass_mean, mean_difference, pca
from mechattr.steering.operators import OPERATORS
from mechattr.steering.vector import SteeringVector

__all__ = ["OPERATORS", "SteeringVector", "mass_mean", "mean_difference", "pca"]
