"""What a transformers model says of itself, for every backend that runs one."""

from __future__ import annotations

from typing import Any

from mechattr.models import weights
from mechattr.models.anatomy import Anatomy
from mechattr.models.base import ModelInfo
from mechattr.models.families import text_config
from mechattr.models.norms import is_norm


def describe(
    model: Any,
    anatomy: Anatomy,
    *,
    backend: str,
    name: str | None = None,
    revision: str | None = None,
    mapping: str = "table",
) -> ModelInfo:
    """The info of a transformers model, from its config and its modules.

    Args:
        model: a transformers model, or anything with its `config` and `dtype`.
        anatomy: where its parts are.
        backend: what runs it.
        name: what results call it; by default the folder or hub name of the config, else its family.
        revision: the revision it was loaded at, if known.
        mapping: where its family row came from.
    """
    whole, family, parts = model.config, anatomy.family, anatomy.parts[0]
    c = text_config(whole, family)
    experts: Any = parts.get("experts")
    return ModelInfo(
        name=name or getattr(whole, "_name_or_path", "") or whole.model_type,
        family=whole.model_type,
        backend=backend,
        n_layers=len(anatomy.blocks),
        n_heads=anatomy.n_heads,
        n_kv_heads=anatomy.n_kv_heads,
        d_model=c.hidden_size,
        d_head=weights.w_o(parts["o"], anatomy.n_heads).shape[1],
        d_mlp=weights.matrix(parts["down"]).shape[0] if experts is None else _width(experts),
        d_vocab=c.vocab_size,
        n_ctx=_positions(c) - family.position_offset,
        norm="rms" if family.norm.startswith("rms") else "layer",
        parallel=family.parallel,
        post_norm=family.post_norm,
        write_norm=not family.post_norm and is_norm(parts["attn_out"]),
        encoder=family.encoder,
        rotary=family.rotary,
        gated="up" in parts or family.gate_up,
        image_token=whole.image_token_id if family.language and backend == "hf" else None,  # others read no images
        bounded=family.bounded,
        dtype=str(model.dtype).removeprefix("torch."),
        revision=revision,
        mapping=mapping,
        n_experts=0 if experts is None else experts.num_experts,
        n_encoder_layers=0 if anatomy.source is None else len(anatomy.source.blocks),
    )


def _positions(config: Any) -> int:
    """How many positions a model has or, with ALiBi, was trained with."""
    found = (getattr(config, name, None) for name in ("max_position_embeddings", "seq_length"))
    return int(next((n for n in found if n), 2048))


def _width(experts: Any) -> int:
    """Of one expert."""
    return int(experts.intermediate_dim if hasattr(experts, "intermediate_dim") else experts.intermediate_size)
