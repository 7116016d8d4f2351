"""Access to models: load, run, edit and differentiate at named sites."""

from __future__ import annotations

from mechattr.models.base import Batch, Generation, HookedModel, ModelInfo, Run, Start
from mechattr.models.edits import Ablate, Add, Edit, Mean, Resample, Scale, Set, Zero
from mechattr.models.hf import HookedHF
from mechattr.models.load import load
from mechattr.models.rules import Rules

__all__ = [
    "Ablate",
    "Add",
    "Batch",
    "Edit",
    "Generation",
    "HookedHF",
    "HookedModel",
    "Mean",
    "ModelInfo",
    "Resample",
    "Rules",
    "Run",
    "Scale",
    "Set",
    "Start",
    "Zero",
    "load",
]
