"""Steering vectors that are not fitted: a direction of the user's own, such as a decoder's row."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from mechattr.errors import SettingError
from mechattr.models.base import HookedModel
from mechattr.steering.data import Sites, chosen_sites, shape_at
from mechattr.steering.made import made
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
