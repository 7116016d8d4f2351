"""The table of families: one row each, beside the small models that it is verified on."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from mechattr.models.families import dense, encoders, moe, parallel, seq2seq, vision
from mechattr.models.families.family import Family, full_sites, short_sites, text_config

_TABLES: tuple[ModuleType, ...] = (dense, moe, parallel, encoders, seq2seq, vision)

FAMILIES: dict[str, Family] = {name: row for table in _TABLES for name, row in table.ROWS.items()}


def small_configs() -> dict[str, Any]:
    """Fresh configs of all small models, by name; `config.model_type` is the family."""
    return {name: config for table in _TABLES for name, config in table.small().items()}


__all__ = ["FAMILIES", "Family", "full_sites", "short_sites", "small_configs", "text_config"]
