"""Steering: vectors that change what a model does, built from contrasts and applied where they should act."""

from __future__ import annotations

from mechattr.steering.builders import mass_mean, mean_difference, pca
from mechattr.steering.grains import grains
from mechattr.steering.operators import OPERATORS
from mechattr.steering.preference import TokenScores, token_scores
from mechattr.steering.vector import SteeringVector

__all__ = [
    "OPERATORS",
    "SteeringVector",
    "TokenScores",
    "grains",
    "mass_mean",
    "mean_difference",
    "pca",
    "token_scores",
]
