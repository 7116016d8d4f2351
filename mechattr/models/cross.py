"""What is particular about encoder-decoder models: their source, cross-attention, and positions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mechattr.errors import SettingError
from mechattr.models import tokenize as text
from mechattr.models.base import ModelInfo
from mechattr.models.batch import Batch
from mechattr.models.checks import check_batch
from mechattr.models.placement import stored

if TYPE_CHECKING:
    from mechattr.models.hf_hooks import Installer


def check_source(batch: Batch, info: ModelInfo, device: torch.device) -> None:
    """Whether a batch has a source that the model can run, exactly if it reads one.

    Raises:
        SettingError: it has not.
    """
    if info.n_encoder_layers and batch.source is None:
        raise SettingError(
            "a run of an encoder-decoder model",
            "a batch without a source, which its encoder reads",
            "use model.tokenize(texts), or Batch(..., source=Batch.of(ids))",
        )
    if not info.n_encoder_layers and batch.source is not None:
        raise SettingError(
            "a run of a model without an encoder beside its decoder", "a batch with a source", "leave the source out"
        )
    if batch.source is not None:
        check_batch(batch.source, info, device)


def arguments(batch: Batch) -> dict[str, Any]:
    """A batch with a source as the arguments of transformers' forward pass."""
    assert batch.source is not None  # checked with the batch
    return {
        "input_ids": batch.source.tokens,
        "attention_mask": batch.source.mask.long() if batch.source.padded else None,
        "decoder_input_ids": batch.tokens,
        "decoder_attention_mask": batch.mask.long() if batch.padded else None,
    }


def generating(batch: Batch) -> dict[str, Any]:
    """A batch with a source as settings of transformers' `generate`, beside the source's tokens."""
    assert batch.source is not None
    return {
        "attention_mask": batch.source.mask.long(),
        "decoder_input_ids": batch.tokens,
        "decoder_attention_mask": batch.mask.long(),
        "decoder_start_token_id": batch.tokens[:, 0].tolist(),  # where rows begin with another, it would be put before
    }


def first_token(hooked: Any) -> int:
    """The token that the decoder of a hooked transformers model begins with.

    Raises:
        SettingError: the model does not say.
    """
    model = hooked.model
    configs = (getattr(model, "generation_config", None), model.config)
    found = next((i for c in configs if (i := getattr(c, "decoder_start_token_id", None)) is not None), None)
    if found is None:
        fix = "set model.config.decoder_start_token_id, or build a Batch of token ids"
        raise SettingError("the first token of the decoder", "the model's config does not name one", fix)
    return int(found)


def with_decoder(
    source: Batch, tokenizer: Any, start: int, targets: Sequence[Sequence[int]], padding_side: str = "right"
) -> Batch:
    """A batch whose decoder rows are the first token and what follows it, for each row of the source."""
    rows = text.pad([[start, *row] for row in targets], tokenizer, padding_side=padding_side, device=source.device)
    return replace(rows, source=source)


def with_targets(source: Batch, hooked: Any, targets: str | Sequence[str] | None, padding_side: str) -> Batch:
    """The same from texts: what the decoder has written already for each source, without special tokens.

    Raises:
        SettingError: another number of targets.
    """
    texts = [""] * len(source) if targets is None else [targets] if isinstance(targets, str) else list(targets)
    if len(texts) != len(source):
        found = f"{len(texts)} targets for {len(source)} texts"
        raise SettingError("targets", found, "give one target for each text")
    tokenizer = hooked.tokenizer
    ids = [tokenizer(each, add_special_tokens=False, verbose=False)["input_ids"] if each else [] for each in texts]
    return with_decoder(source, tokenizer, first_token(hooked), ids, padding_side)


# -- hooks


def cross_attention(at: Installer, layer: int) -> bool:
    """Hooks the cross-attention of one block; says whether the attention function is needed."""
    if not at.anatomy.cross:
        return False
    parts, p, here = at.anatomy.cross[layer], f"blocks.{layer}.", f"blocks.{layer}.cross_attn.hook_"
    at.linears(parts)
    if at.taps.wants(here + "z"):
        at.on_input(parts["o"], lambda x: at.per_head(here + "z", x))
    if at.taps.wants(here + "result"):
        at.on_output(parts["o"], lambda m, a, _x: at.result(here + "result", m, a[0]))
    at.linears(parts, ["o"])
    at.write(parts["attn"], p + "hook_cross_attn_out", p + "hook_resid_mid_cross", parts["ln"])
    return at.attends(parts["attn"], here)


def placed(module: Any, own: Tensor, positions: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_model"]:
    """The embedding of each column's position in place of its number, which `own` is; padding keeps its number."""
    numbers = torch.arange(positions.shape[1], device=positions.device)
    ids = torch.where(positions < 0, numbers, positions) + getattr(module, "offset", 0)
    table = stored(module, "weight")
    assert table is not None
    return torch.nn.functional.embedding(ids.to(own.device), table).to(own.dtype)


def handing_through(attn: nn.Module, *, several: bool) -> Callable[..., Any]:
    """The forward pass of a block that does nothing, for runs that start above it. T5's first block makes the position
    bias for all; if it does nothing else, it still does that.

    Args:
        attn: the block's attention.
        several: the block returns a tuple.
    """
    bias: Any = getattr(attn, "compute_bias", None)
    if bias is None:
        return lambda hidden_states, *_, **__: (hidden_states, None) if several else hidden_states

    def forward(hidden_states: Tensor, _mask: Any, position_bias: Any, *_args: Any, **_kwargs: Any) -> Any:
        columns = hidden_states.shape[1]
        return (
            hidden_states,
            bias(columns, columns, device=hidden_states.device) if position_bias is None else position_bias,
            None,
        )

    return forward
