r"""Quadrature on [0, 1]: points and weights such that $\int_0^1 f \approx \sum_k w_k f(x_k)$."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mechattr.errors import SettingError, UnknownNameError, nearest

RULES = ("midpoint", "gauss_legendre", "left", "right", "trapezoid")


def nodes(rule: str, steps: int) -> tuple[Float[Tensor, " step"], Float[Tensor, " step"]]:
    r"""Points, ascending, and weights of a rule with `steps` evaluations; the weights sum to 1.

    | rule | points | exact up to degree | error for smooth functions |
    |---|---|---|---|
    | `midpoint` | $(k + \tfrac12)/m$ | 1 | $O(m^{-2})$ |
    | `gauss_legendre` | roots of the Legendre polynomial | $2m - 1$ | faster than any power |
    | `left` | $k/m$ | 0 | $O(m^{-1})$ |
    | `right` | $(k + 1)/m$ | 0 | $O(m^{-1})$ |
    | `trapezoid` | $k/(m - 1)$ | 1 | $O(m^{-2})$ |

    with $m$ steps and $k = 0, \dots, m - 1$.

    Args:
        rule: one of the names above.
        steps: number of evaluations, from 1 (`trapezoid`: from 2).

    Returns:
        Points and weights in float64.

    Raises:
        UnknownNameError: no such rule.
        SettingError: no such number of steps.

    References:
        Davis and Rabinowitz 1984, Methods of Numerical Integration.
    """
    if rule not in RULES:
        raise UnknownNameError(f"rule {rule!r}", "no such quadrature rule", nearest(rule, RULES))
    least = 2 if rule == "trapezoid" else 1
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < least:
        raise SettingError(
            f"steps={steps!r} of the rule {rule!r}", "no number of evaluations", f"give a whole number from {least}"
        )
    if rule == "gauss_legendre":
        roots, shares = np.polynomial.legendre.leggauss(steps)  # on [-1, 1], where weights sum to 2
        return torch.from_numpy((roots + 1) / 2), torch.from_numpy(shares / 2)
    k = torch.arange(steps, dtype=torch.float64)
    if rule == "trapezoid":
        weights = torch.full((steps,), 1 / (steps - 1), dtype=torch.float64)
        weights[[0, -1]] /= 2
        return k / (steps - 1), weights
    shift = {"left": 0.0, "midpoint": 0.5, "right": 1.0}[rule]
    return (k + shift) / steps, torch.full((steps,), 1 / steps, dtype=torch.float64)
