"""Mixtures of experts taken apart: routing that follows given logits, and what each expert adds."""

from __future__ import annotations

import copy
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F


def reroute(router: nn.Module, routed: tuple[Any, ...], logits: Float[Tensor, "token expert"]) -> tuple[Any, ...]:
    """A router's output `routed` for other logits: with the scores and the chosen experts that follow from them.

    The router's own code runs, with the first rows of the identity in place of its matrix and the logits, zeros behind
    them, in place of the hidden state: x_1 1 + x_2 0 + ... gives the logits back to the last bit, and everything after
    them is the family's.
    """
    twin: Any = copy.copy(router)
    n_experts, d_model = twin.weight.shape
    bias = {} if getattr(router, "bias", None) is None else {"bias": logits.new_zeros(n_experts)}
    identity = torch.eye(n_experts, d_model, dtype=logits.dtype, device=logits.device)
    twin.__dict__["_parameters"] = {"weight": identity, **bias}
    _, scores, chosen = type(router).forward(twin, F.pad(logits, (0, d_model - n_experts)))
    return logits, scores.to(routed[1].dtype), chosen


def per_expert(
    experts: Any, x: Float[Tensor, "token d_model"], chosen: Int[Tensor, "token slot"], weights: Tensor
) -> Float[Tensor, "token expert d_model"]:
    """The weighted contribution of every expert, zero where a token is not routed to it.

    Each pair of a token and one of its experts is a token of its own to the experts' module, so that this costs what
    the mixture costs, and memory for tokens times experts times d_model numbers.
    """
    slots = chosen.shape[1]
    each: Tensor = experts.forward(x.repeat_interleave(slots, 0), chosen.reshape(-1, 1), weights.reshape(-1, 1))
    each = each.unflatten(0, (-1, slots))
    where = chosen[..., None].expand_as(each)
    return each.new_zeros(len(x), experts.num_experts, x.shape[-1]).scatter(1, where, each)
