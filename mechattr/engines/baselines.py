"""Baselines: embeddings that say as little as possible, where a path begins or a token is taken away."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechattr.errors import SettingError, UnknownNameError, nearest
from mechattr.models.base import HookedModel

BASELINES = ("mean", "zero")


def baseline_vector(model: HookedModel, given: str | int, site: str = "hook_embed") -> Float[Tensor, " d_model"]:
    """A baseline by its name (`"mean"`, `"zero"`) or a token's id.

    Raises:
        UnknownNameError: no such name.
        SettingError: no id of the vocabulary, or a name that means nothing at the site.
    """
    if isinstance(given, str) and given not in BASELINES:
        raise UnknownNameError(f"baseline={given!r}", "no such baseline", nearest(given, BASELINES))
    if given == "zero":
        return torch.zeros(())
    if site != "hook_embed":
        raise SettingError(f"baseline={given!r} at {site}", "no embeddings are there", "give 'zero' or a tensor")
    table = model.weight("embed.W_E")
    if given == "mean":
        return table.mean(0, dtype=torch.float64)
    if isinstance(given, bool) or not isinstance(given, int) or not 0 <= given < len(table):
        raise SettingError(f"baseline={given!r}", f"ids from 0 to {len(table) - 1}", "give a token's id")
    return table[given].double()


def in_place(
    baseline: Float[Tensor, "*d_model"], x: Float[Tensor, "row pos d_model"], image: Bool[Tensor, "row pos"] | None
) -> Float[Tensor, "row pos d_model"]:
    """A baseline at each place of the embeddings x. An image has no embedding in the table, so that at its tokens the
    mean of its own embeddings stands for any baseline but zero."""
    like = baseline.to(x).expand(x.shape)
    if image is None or not baseline.ndim:
        return like
    return torch.where(image[..., None], _image_means(x, image), like)


def _image_means(x: Tensor, image: Tensor) -> Tensor:
    """At image tokens the mean over their run."""
    begins = image & ~torch.nn.functional.pad(image, (1, 0))[:, :-1]
    runs = begins.cumsum(1)
    member = torch.nn.functional.one_hot(runs, int(runs.max()) + 1).to(x) * image[..., None]
    sums = torch.einsum("bpr,bpd->brd", member, x) / member.sum(1).clamp(min=1)[..., None]
    return torch.einsum("bpr,brd->bpd", member, sums)
