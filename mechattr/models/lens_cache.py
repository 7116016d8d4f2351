"""Recordings as TransformerLens caches and back, so that notebooks written for either keep working."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mechattr.artifact import Cache
from mechattr.errors import BackendError, SettingError, UnknownSiteError
from mechattr.models.architectures import FAMILIES
from mechattr.models.lens_hooks import refused
from mechattr.sites import parse


def to_transformer_lens_cache(cache: Mapping[str, Any], model: Any = None) -> Any:
    """A recording of any backend as a `transformer_lens.ActivationCache`.

    Names and axes are the same; the scales of norms get their last axis of size 1. The cache has what was recorded, so
    that `decompose_resid` needs the sites `embed`, `pos_embed`, `attn_out` and `mlp_out`, and `apply_ln=True` needs
    `ln_final_scale`. Values are not copied.

    Args:
        cache: activations, or gradients, by full site name.
        model: a `TransformerBridge` or a model of the TransformerLens backend, with the weights that the recording was
            made with. Without it the cache can be read, but its methods that ask the model fail.

    Raises:
        BackendError: transformer_lens cannot be imported.
        SettingError: another model.
    """
    try:
        from transformer_lens import ActivationCache
    except ImportError as error:
        raise BackendError("an ActivationCache", str(error), "install transformer-lens 4.3 or later") from error

    bridge = getattr(model, "bridge", model)
    if bridge is not None and not hasattr(bridge, "hook_dict"):
        found = f"a {type(model).__name__}"
        raise SettingError("the model of an ActivationCache", found, "give a TransformerBridge, or leave it out")
    tensors: dict[str, Tensor] = {name: x if isinstance(x, Tensor) else x.values for name, x in cache.items()}
    return ActivationCache({n: x[..., None] if n.endswith("hook_scale") else x for n, x in tensors.items()}, bridge)


def from_transformer_lens_cache(cache: Any) -> Cache:
    """An `ActivationCache` as a recording: every entry that is a site, under the site's name. Values are not copied.

    Left out are entries that are no site, such as `*_grad`, and in encoders those that hold another tensor than the
    site of their name: embed, attn_out, resid_mid, attention scores and pattern.

    Args:
        cache: an `ActivationCache`, with or without its batch axis.

    Raises:
        SettingError: no entry is a site.
        AxisError: an entry with other dimensions than its site, such as one position of it.
    """
    points = getattr(cache.model, "hook_dict", {})
    sites: dict[str, list[str]] = {}  # a hook point has a name of its own beside those of the sites
    for name in filter(_is_site, points):
        sites.setdefault(points[name].name, []).append(name)
    config = getattr(getattr(cache.model, "original_model", None), "config", None)
    family = FAMILIES.get(getattr(config, "model_type", ""))
    found: dict[str, Tensor] = {}
    for key, x in cache.items():
        for name in [key] if _is_site(key) else sites.get(key, []):
            elsewhere = family is not None and family.post_norm and name.endswith(("hook_embed", "hook_resid_mid"))
            if not elsewhere and (family is None or not refused(name, family)):
                whole = x if cache.has_batch_dim else x[None]
                found[name] = (whole[..., 0] if name.endswith("hook_scale") else whole).detach()
    if not found:
        asked = f"a recording of an ActivationCache with {len(cache)} entries"
        raise SettingError(asked, "none of them is a site", "cache hook points that are sites")
    return Cache.from_tensors(found)


def _is_site(name: str) -> bool:
    try:
        parse(name)
    except UnknownSiteError:
        return False
    return True
