"""Sequences without some of their tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechattr.engines.baselines import baseline_vector, in_place
from mechattr.errors import SettingError
from mechattr.models.base import Batch, HookedModel
from mechattr.models.edits import Edit
from mechattr.models.operators import Place

ABLATIONS = ("mean_embed", "zero_embed", "pad", "attn_mask")


@dataclass(frozen=True, eq=False, slots=True)
class Removal:
    """How sequences lose tokens.

    Attributes:
        ablate: one of `ABLATIONS`.
        token: what stands for a token that is gone, with `"pad"`.
        baseline: its embedding, with `"mean_embed"` and `"zero_embed"`.
    """

    ablate: str
    token: int = 0
    baseline: Float[Tensor, "*d_model"] | None = None

    @classmethod
    def of(cls, model: HookedModel, ablate: str) -> Removal:
        """For one model.

        Raises:
            SettingError: no padding token to put in place.
        """
        if ablate == "pad":
            return cls(ablate, token=_padding(model))
        if ablate == "attn_mask":
            return cls(ablate)
        return cls(ablate, baseline=baseline_vector(model, ablate.removesuffix("_embed")))

    def __call__(self, batch: Batch, gone: Bool[Tensor, "row pos"]) -> tuple[Batch, list[Edit]]:
        """A batch that has lost some tokens, and the edits that this takes."""
        baseline, image = self.baseline, batch.image  # tensors, which can be sent to where a model runs

        def replaced(x: Float[Tensor, "row pos d_model"], _place: Place) -> Tensor:
            assert baseline is not None
            return torch.where(gone[..., None], in_place(baseline, x, image), x)

        def hidden(x: Float[Tensor, "row head query key"], _place: Place) -> Tensor:
            seen = torch.eye(x.shape[-1], dtype=torch.bool, device=x.device)  # a token still sees itself
            return x.masked_fill(gone[:, None, None] & ~seen, torch.finfo(x.dtype).min)

        if self.ablate == "pad":
            return replace(batch, tokens=batch.tokens.masked_fill(gone, self.token), strings=()), []
        return batch, [Edit("attn_scores", hidden) if self.ablate == "attn_mask" else Edit("embed", replaced)]


def _padding(model: HookedModel) -> int:
    found = [getattr(model.tokenizer, name, None) for name in ("pad_token_id", "unk_token_id")]
    given: int | None = next((x for x in found if x is not None), None)
    if given is None:
        raise SettingError("ablate='pad'", "a tokenizer without a padding token", "use ablate='mean_embed'")
    return given
