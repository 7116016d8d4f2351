"""Narrow dtypes: what is added up in float32, and weights that are no numbers."""

from __future__ import annotations

import torch
from patching_cases import pairs_task

import mechattr as ma
from mechattr.models import HookedHF
from mechattr.models.small import small_model


def test_products_are_added_up_in_float32() -> None:
    """The estimate of a bfloat16 model from its own activations and gradients, in float64; 1e-5 is float32's rounding.
    Control: the same products added up in bfloat16 are off by a thousand times as much."""
    model = HookedHF(small_model("gpt2", torch.bfloat16))
    task = pairs_task(model, (30,) * 3, changed=range(30))
    found = ma.attribution_patching(model, task, sites="mlp_out", variant="atp", positions="all", progress=False)
    base = model.run(task.clean, record="mlp_out", gradients="mlp_out", metric=task.metric)
    there = model.run(task.corrupt, record="mlp_out").activations
    wide, narrow = [], []
    for name in base.gradients:
        g, x, y = (c[name].values for c in (base.gradients, base.activations, there))
        wide.append(((y.double() - x.double()) * g.double()).sum((1, 2)).mean())
        rows = ((y - x) * g).flatten(1)
        narrow.append(torch.stack([_added(row) for row in rows]).mean().double())
    exact, wrong = torch.stack(wide), torch.stack(narrow)
    size = float(exact.abs().max())
    assert found.signed["mlp_out"].dtype == torch.float32
    torch.testing.assert_close(found.signed["mlp_out"].values.double().flatten(), exact, rtol=0, atol=1e-5 * size)
    assert float((wrong - exact).abs().max()) > 1e-2 * size


def _added(row: torch.Tensor) -> torch.Tensor:
    """A sum in the dtype of its terms, one after the other."""
    total = torch.zeros((), dtype=row.dtype)
    for x in row:
        total = total + x
    return total
