"""Steering vectors that are not fitted: a direction of the user's own, such as a decoder's row, and the difference of
two prompts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from mechattr.errors import SettingError
from mechattr.models.base import Batch, HookedModel
from mechattr.models.tokenize import encode
from mechattr.steering.data import Sites, check_pairs, chosen_sites, shape_at
from mechattr.steering.made import Pairs, made
from mechattr.steering.vector import SteeringVector


def from_direction(
    model: HookedModel,
    direction: Float[Tensor, "*axes"],
    *,
    layers: Sequence[int] | None = None,
    sites: Sites = None,
    seed: int = 0,
) -> SteeringVector:
    """A direction that is known already, such as the decoder row of a dictionary's latent or a row of the unembedding,
    as it is.

    Args:
        model: a hooked model.
        direction: [d_model], or [head, d_head] at sites of heads; the same at every site.
        layers: blocks whose output (`resid_post`) is steered; or
        sites: sites by name, or nodes.
        seed: nothing is drawn here; kept for one signature of all builders.

    Raises:
        SettingError: layers that do not exist, a direction of another shape or of NaN, infinity or zeros.
        UnknownSiteError: a site that the model does not have.
    """
    names = chosen_sites(model, layers, sites)
    for name in names:
        if not isinstance(direction, Tensor) or tuple(direction.shape) != shape_at(model, name):
            found = f"shape {list(direction.shape)}" if isinstance(direction, Tensor) else type(direction).__name__
            raise SettingError(f"a direction at {name}", found, f"give a tensor of shape {list(shape_at(model, name))}")
    if not bool(direction.any()):
        raise SettingError("a direction", "only zeros", "give one that points somewhere")
    return made(model, "from_direction", dict.fromkeys(names, direction.detach().cpu()), sites, seed)


def act_add(
    model: HookedModel,
    pairs: Pairs,
    *,
    layers: Sequence[int] | None = None,
    sites: Sites = None,
    seed: int = 0,
) -> SteeringVector:
    """Activation addition: v_p = h_p(positive) - h_p(negative) for every position p of one pair, which `apply` adds at
    the first positions of a prompt.

    Where one text has fewer tokens, spaces fill it up.

    Args:
        model: a hooked model.
        pairs: exactly one (positive text, negative text).
        layers: blocks whose output (`resid_post`) is steered; or
        sites: sites by name.
        seed: nothing is drawn here; kept for one signature of all builders.

    Raises:
        SettingError: more pairs than one, layers that do not exist, nodes in place of sites, or texts of different
            lengths for a tokenizer in which a space is not one token.
        UnknownSiteError: a site that the model does not have.

    Cost:
        2 forward passes.

    References:
        Turner, Thiergart, Leech, Udell, Vazquez, Mini, MacDiarmid (2023), Steering Language Models With Activation
        Engineering, arXiv 2308.10248.
    """
    given, names = check_pairs(pairs), chosen_sites(model, layers, sites)
    if len(given) > 1:
        raise SettingError("pairs", f"{len(given)}", "give one pair, or use mean_difference")
    if not isinstance(sites, str) and any(not isinstance(site, str) for site in sites or ()):
        raise SettingError("sites of act_add", "nodes", "name whole sites, such as 'resid_pre'")
    cache = model.run(_filled(model, *given[0]), record=names).activations
    x = {name: cache[name].values.to(torch.promote_types(cache[name].values.dtype, torch.float32)) for name in names}
    width = len(x[names[0]][0])
    return made(model, "act_add", {n: y[0] - y[1] for n, y in x.items()}, None, seed, n_pairs=1, n_positions=width)


def _filled(model: HookedModel, positive: str, negative: str) -> Batch:
    """Both texts with as many tokens."""
    batch = model.tokenize([positive, negative])
    if not batch.padded:
        return batch
    space = encode(model.tokenizer, " ")
    special = set(model.tokenizer.all_special_ids)
    plain = [token for token in space if token not in special]
    if len(plain) != 1:
        found = f"{batch.lengths.tolist()} tokens, and a space is {len(plain)} tokens"
        raise SettingError("a pair of different lengths", found, "give texts with as many tokens")
    return Batch.of(batch.tokens.masked_fill(~batch.mask, plain[0]))
