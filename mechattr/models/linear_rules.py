"""Linear layers under the epsilon and gamma rules of layer-wise relevance propagation."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from mechattr.models.rules import Rules, frozen_like


def linear_rule(
    x: Float[Tensor, "... d_in"],
    weight: Float[Tensor, "d_in d_out"],
    bias: Float[Tensor, " d_out"] | None,
    y: Float[Tensor, "... d_out"],
    rules: Rules,
) -> Float[Tensor, "... d_out"]:
    """y = x W + b, with the gradient of x that makes x times gradient the relevance of the rule.

    With R_k = y_k times its gradient, e = linear_epsilon, g = linear_gamma and sgn(0) = 1:

        R_j = sum_k c_jk R_k / (d_k + e sgn(d_k)),    d_k = sum_j c_jk + b_k

    where c_jk = x_j w_jk, and c_jk and b_k count 1 + g times where they have the sign of y_k. What b and e take of the
    denominator is lost. Epsilon alone costs one product of the size of y; gamma four matrix products
    in place of one, and two copies of the weight for as long as the graph is kept.

    References:
        Bach et al. (2015) for epsilon; Montavon et al. (2019) and Andéol et al. (2021) for gamma with both signs.
    """
    if not rules.linear_gamma:
        return frozen_like(y, y * _share(y, y, rules.linear_epsilon))
    w = weight.detach()
    up, down = w + rules.linear_gamma * w.clamp(min=0), w + rules.linear_gamma * w.clamp(max=0)
    positive, negative = x * (x >= 0), x * (x < 0)
    total = torch.zeros_like(y)
    for same, other, sign in ((up, down, 1), (down, up, -1)):
        parts = positive @ same + negative @ other
        taken = parts.detach()
        if bias is not None:
            b = bias.detach()
            taken = taken + b + rules.linear_gamma * (b.clamp(min=0) if sign > 0 else b.clamp(max=0))
        total = total + parts * _share(y * (sign * y > 0), taken, rules.linear_epsilon)
    return frozen_like(y, total)


def _share(z: Tensor, denominator: Tensor, epsilon: float) -> Tensor:
    """z / (denominator + epsilon sgn(denominator)), held; 0 where z is."""
    d = denominator.detach()
    d = d + epsilon * (2 * (d >= 0).to(d.dtype) - 1)
    return (z.detach() / d.where(z != 0, 1.0)).to(z.dtype)
