"""Muon for the block matrices, AdamW for embeddings, norms and biases, with one learning rate for both.

Muon: momentum, then the nearest semi-orthogonal matrix by Newton-Schulz iterations (Jordan et al. 2024). The update is
scaled by 0.2 sqrt(longer side), which gives it the root mean square of a usual AdamW update (Liu et al. 2025).
"""

import math

import torch
from torch import Tensor

MOMENTUM = 0.95
BETAS = (0.9, 0.98)
DECAY = 0.05


def orthogonal(matrices: Tensor) -> Tensor:
    """Newton-Schulz on a stack of matrices [n, rows, columns] with rows <= columns."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices / (matrices.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def pieces(name: str, value: Tensor) -> list[Tensor]:
    """Views of a block matrix as maps of their own: query, key and value apart, and never more rows than columns."""
    parts = value.chunk(3, dim=1) if name.endswith("c_attn.weight") else (value,)
    return [part.T if part.shape[0] > part.shape[1] else part for part in parts]


class Optimiser:
    """Updates `params` in place; `state` holds every tensor that a resumed run needs."""

    def __init__(self, params: dict[str, Tensor]) -> None:
        self.params = params
        self.matrices = [n for n in params if ".h." in n and params[n].ndim == 2]
        self.others = [n for n in params if n not in self.matrices]
        self.state = {f"momentum/{n}": torch.zeros_like(params[n], requires_grad=False) for n in params}
        self.state |= {f"square/{n}": torch.zeros_like(params[n], requires_grad=False) for n in self.others}

    @torch.no_grad()
    def step(self, grads: dict[str, Tensor], rate: float, count: int) -> None:
        """One update; `count` is the number of updates before this one."""
        self._adam(grads, rate, count + 1)
        updates: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}
        for name in self.matrices:
            momentum = self.state[f"momentum/{name}"]
            momentum.lerp_(grads[name], 1 - MOMENTUM)
            ahead = torch.lerp(grads[name], momentum, MOMENTUM)  # Nesterov
            self.params[name].mul_(1 - rate * DECAY)
            for view, part in zip(pieces(name, self.params[name]), pieces(name, ahead), strict=True):
                updates.setdefault(part.shape, []).append((view, part))
        for shape, group in updates.items():
            directions = orthogonal(torch.stack([part for _, part in group]))
            for (view, _), direction in zip(group, directions, strict=True):
                view.sub_(direction, alpha=rate * 0.2 * math.sqrt(max(shape)))

    def _adam(self, grads: dict[str, Tensor], rate: float, count: int) -> None:
        for name in self.others:
            mean, square = self.state[f"momentum/{name}"], self.state[f"square/{name}"]
            mean.lerp_(grads[name], 1 - BETAS[0])
            square.mul_(BETAS[1]).addcmul_(grads[name], grads[name], value=1 - BETAS[1])
            scale = square.div(1 - BETAS[1] ** count).sqrt_().add_(1e-8)
            self.params[name].addcdiv_(mean, scale, value=-rate / (1 - BETAS[0] ** count))
