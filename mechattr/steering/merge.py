"""Steering for good: a copy of a transformers model whose biases hold the vector, where that is the same model."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mechattr.errors import (
    ModelStateError,
    SelfCheckError,
    SettingError,
    UnsupportedFeatureError,
    UnsupportedModelError,
)
from mechattr.models.base import Batch
from mechattr.models.cross import arguments
from mechattr.models.hf import HookedHF
from mechattr.models.norms import is_norm
from mechattr.models.standing import ATTACHED
from mechattr.sites import full_name, parse
from mechattr.steering.apply import apply, check_fit
from mechattr.steering.placing import hooked_model
from mechattr.steering.vector import SteeringVector

# Sites that a bias writes: the projection that has it, and whether the direction goes through its weights
WRITERS = {"attn_out": ("o", False), "mlp_out": ("down", False), "z": ("o", True), "mlp_post": ("down", True)}
CLOSE = 1e-4  # of the largest logit; sums in another order


def merge_into_bias(
    vector: SteeringVector, model: Any, multiplier: float = 1.0, *, positions: Any = "all", operator: Any = "add"
) -> Any:
    """A copy of a transformers model that always does what the vector does with `positions="all"` and
    `operator="add"`: x + m v at a site that a bias writes is a bias of b + m v (of b + m W v behind `z` and `mlp_post`,
    which enter a projection W).

    Sites are `attn_out`, `mlp_out`, `z` and `mlp_post`, and the residual stream behind a block's attention or MLP, in
    the last block before the final norm. Projections without a bias get one; a class that does not know it does not
    load it back from a saved copy.

    Args:
        vector: directions at such sites.
        model: a transformers model, or a hooked one of the backend `"hf"`; it stays as it is.
        multiplier: a number.
        positions, operator: as in `apply`; anything else than these is no bias, and refused.

    Raises:
        SettingError: other positions, operators or multipliers, or directions of single positions.
        UnsupportedFeatureError: a site that no bias writes, or another backend.
        UnsupportedModelError: a norm stands between the projection and the residual stream, or no such projection.
        MismatchError: a vector of another model.
        ModelStateError: a model that is being steered.
        SelfCheckError: the copy does not give the logits of the steered model.

    Cost:
        A copy of the model, and 2 forward passes over four tokens.
    """
    _check(vector, multiplier, positions, operator)
    hooked = hooked_model(model)
    if not isinstance(hooked, HookedHF):
        found = f"backend {hooked.info.backend!r}"
        raise UnsupportedFeatureError("a merged copy", found, "give the transformers model, or one of backend='hf'")
    if hooked.model in ATTACHED or hooked._standing:
        raise ModelStateError("a merged copy", "the model is being steered", "merge outside of the block")
    check_fit(vector, hooked)
    paths = {id(module): name for name, module in hooked.model.named_modules()}
    changes = [(paths[id(m)], x) for name, x in _directions(vector).items() for m, x in [_bias(hooked, name, x)]]
    merged = copy.deepcopy(hooked.model)
    for path, change in changes:
        _add(merged.get_submodule(path), multiplier * change)
    _compare(merged, vector, hooked, multiplier)
    return merged


def _check(vector: SteeringVector, multiplier: Any, positions: Any, operator: Any) -> None:
    for name, value, only in (("positions", positions, "all"), ("operator", operator, "add")):
        if not isinstance(value, str) or value != only:
            fix = "steer with vector.apply(...) in a block"
            raise SettingError(f"{name}={value!r}", f"a bias acts as {name}={only!r} does", fix)
    number = isinstance(multiplier, int | float) and not isinstance(multiplier, bool)
    if not number or not math.isfinite(multiplier):
        raise SettingError(f"multiplier={multiplier!r}", "no finite number", "give one number for all rows")
    own = next((name for name, table in vector.tensors.items() if table.axes[0] == "pos"), None)
    if own is not None:
        found = "a bias acts at all positions"
        raise SettingError(f"directions of single positions at {own}", found, "steer with vector.apply(...) in a block")


def _directions(vector: SteeringVector) -> Mapping[str, Tensor]:
    """Directions by site, the stream before a block as the stream behind the last one."""
    found: dict[str, Tensor] = {}
    for name, table in vector.tensors.items():
        short, layer = parse(name)
        if short == "resid_pre" and layer:
            short, layer = "resid_post", layer - 1
        at, values = full_name(short, layer), table.values.double()
        found[at] = found[at] + values if at in found else values
    return found


def _bias(hooked: HookedHF, name: str, v: Float[Tensor, "*axes"]) -> tuple[nn.Module, Float[Tensor, " d_model"]]:
    """The projection whose bias writes a site, and what is added to it."""
    short, layer = parse(name)
    write = {"resid_mid": "attn_out", "resid_post": "mlp_out"}.get(short, short)
    if layer is None or write not in WRITERS:
        fix = f"merge directions at {', '.join(WRITERS)}, resid_mid and resid_post, or steer with vector.apply(...)"
        raise UnsupportedFeatureError(f"a bias for {name}", "no bias writes there", fix)
    part, through = WRITERS[write]
    parts, family = hooked._anatomy.parts[layer], hooked._anatomy.family
    project, fix = parts.get(part), "steer with vector.apply(...) in a block"
    asked = f"a bias for {name} of a {type(hooked.model).__name__}"
    if hooked._split is not None:
        raise UnsupportedModelError(asked, "its weights are split over processes", fix)
    if family.post_norm and write != short:
        raise UnsupportedModelError(asked, "a norm acts on the residual stream itself", fix)
    if not through and is_norm(parts[write]):
        raise UnsupportedModelError(asked, "a norm stands between the projection and the residual stream", fix)
    if project is None or (not isinstance(project, nn.Linear) and type(project).__name__ != "Conv1D"):
        raise UnsupportedModelError(asked, f"no linear layer that writes it, but a {type(parts[write]).__name__}", fix)
    if not through:
        return project, v / hooked._anatomy.factors.write
    weight: Tensor = project.weight.detach().double()  # type: ignore[operator]
    return project, (weight if isinstance(project, nn.Linear) else weight.T) @ v.flatten().to(weight.device)


def _add(project: Any, change: Float[Tensor, " d_model"]) -> None:
    before, weight = project.bias, project.weight
    total = change.to(weight.device) + (0 if before is None else before.detach().double())
    project.bias = nn.Parameter(total.to(weight.dtype), requires_grad=weight.requires_grad)


def _compare(merged: Any, vector: SteeringVector, hooked: HookedHF, multiplier: float) -> None:
    """What stands between a projection and the stream is known of each family; this sees what is not."""
    ids = torch.arange(5, device=hooked.device)[None] % hooked.info.d_vocab
    batch = Batch.of(ids[:, :4])
    batch = replace(batch, source=Batch.of(ids)) if hooked.info.n_encoder_layers else batch
    with apply(vector, hooked, multiplier):
        steered = hooked.run(batch).logits
    with torch.no_grad():
        found = merged(**({"input_ids": batch.tokens} if batch.source is None else arguments(batch))).logits
    close = CLOSE if steered.dtype in (torch.float32, torch.float64) else 200 * CLOSE
    gap = float((found.to(steered.device) - steered).abs().max() / steered.abs().max())
    if not gap <= close:
        asked = f"a {type(merged).__name__} with the vector in its biases"
        fix = "steer with vector.apply(...) in a block"
        raise SelfCheckError(asked, f"logits that differ from the steered ones by {gap:.1e} of the largest", fix)
