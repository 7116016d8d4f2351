"""The epsilon and gamma rules beside zennit's (E10)."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor

from mechattr.models import Rules
from mechattr.models.linear_rules import linear_rule

pytestmark = pytest.mark.skipif(
    find_spec("zennit") is None, reason="needs zennit 0.5, in an environment of its own: see docs/models_layer.md"
)


@pytest.fixture
def peer(monkeypatch: pytest.MonkeyPatch) -> Any:
    """zennit's rules, without the vision models that it imports beside them."""
    for name in ("torchvision", "torchvision.models", "torchvision.models.resnet", "torchvision.models.vgg"):
        monkeypatch.setitem(sys.modules, name, MagicMock())
    return import_module("zennit.rules")


def relevance(x: Tensor, layer: torch.nn.Linear, r: Tensor, rules: Rules) -> Tensor:
    """x times gradient, from relevance r = y times gradient."""
    leaf = x.clone().requires_grad_(True)
    y = layer(leaf)
    (g,) = torch.autograd.grad(linear_rule(leaf, layer.weight.T, layer.bias, y, rules), leaf, r / y.detach())
    return x * g


def of_zennit(x: Tensor, layer: torch.nn.Linear, r: Tensor, rule: Any) -> Tensor:
    """zennit hands relevance on in place of gradients."""
    handles = rule.register(layer)
    leaf = x.clone().requires_grad_(True)
    (found,) = torch.autograd.grad(layer(leaf), leaf, r)
    handles.remove()
    return found


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("strength", [1e-6, 0.25])
def test_the_same_numbers(peer: Any, bias: bool, strength: float) -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(9, 8, bias=bias, dtype=torch.float64)
    x, r = torch.randn(20, 9, dtype=torch.float64), torch.randn(20, 8, dtype=torch.float64)
    exact = {"rtol": 1e-12, "atol": 1e-12}  # float64, sums in another order
    epsilon = of_zennit(x, layer, r, peer.Epsilon(epsilon=strength))
    torch.testing.assert_close(relevance(x, layer, r, Rules(linear_epsilon=strength)), epsilon, **exact)
    gamma = of_zennit(x, layer, r, peer.Gamma(gamma=strength, stabilizer=1e-6))
    rules = Rules(linear_gamma=strength, linear_epsilon=1e-6)
    torch.testing.assert_close(relevance(x, layer, r, rules), gamma, **exact)
    for wrong in (epsilon, gamma):  # control: other strengths
        assert (relevance(x, layer, r, Rules(linear_epsilon=1e-3, linear_gamma=0.1)) - wrong).abs().max() > 1e-4
