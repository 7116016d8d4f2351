"""Access to models: load, run, edit and differentiate at named sites."""

from __future__ import annotations

from mechattr.models.base import Batch, Generation, HookedModel, ModelInfo, Run, Start
from mechattr.models.dictionary import Dictionary
from mechattr.models.discovery import discover
from mechattr.models.edits import Edit
from mechattr.models.families import Family
from mechattr.models.hf import HookedHF
from mechattr.models.lens_cache import from_transformer_lens_cache, to_transformer_lens_cache
from mechattr.models.load import load
from mechattr.models.operators import Ablate, Add, Mean, Place, Resample, Scale, Set, Zero
from mechattr.models.plain import HookedPlain, plain_copy, plain_model
from mechattr.models.plain_config import PlainConfig
from mechattr.models.record import check_belongs, record, record_to
from mechattr.models.rules import Rules

__all__ = [
    "Ablate",
    "Add",
    "Batch",
    "Dictionary",
    "Edit",
    "Family",
    "Generation",
    "HookedHF",
    "HookedModel",
    "HookedPlain",
    "Mean",
    "ModelInfo",
    "Place",
    "PlainConfig",
    "Resample",
    "Rules",
    "Run",
    "Scale",
    "Set",
    "Start",
    "Zero",
    "check_belongs",
    "discover",
    "from_transformer_lens_cache",
    "load",
    "plain_copy",
    "plain_model",
    "record",
    "record_to",
    "to_transformer_lens_cache",
]
