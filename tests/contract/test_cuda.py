"""The model layer and the methods on a CUDA device: the numbers of the CPU."""

from __future__ import annotations

from typing import Any

import families
import pytest
import torch
from patching_cases import assert_same, pairs_task

import mechattr as ma
from mechattr.models import Edit, HookedHF, Zero
from mechattr.models.small import small_model

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
FAMILIES = ("gpt2", "llama", "qwen3", "gpt_neox", "gemma2")


def both(family: str, dtype: torch.dtype = torch.float32) -> tuple[HookedHF, HookedHF]:
    """The same weights on the CPU and on the device."""
    return families.hooked(family, dtype), HookedHF(small_model(family, dtype).to("cuda"))


@pytest.mark.parametrize("checkpoint", (False, True))
@pytest.mark.parametrize("family", FAMILIES)
def test_runs_edits_and_gradients(family: str, checkpoint: bool) -> None:
    """1e-4 of the largest value: float32 sums in another order, twice."""
    here, there = both(family)
    batch, sites = families.ragged("left"), ("z", "resid_post", "mlp_out")
    how: dict[str, Any] = {
        "record": sites,
        "gradients": sites,
        "metric": families.probe,
        "edits": [Edit("z", Zero(), layers=[0], heads=[1], positions=[-1])],
        "checkpoint": checkpoint,
    }
    one, other = here.run(batch, **how), there.run(batch.to("cuda"), **how)
    for left, right in ((one.activations, other.activations), (one.gradients, other.gradients)):
        for name in left:
            expected = left[name].values
            found = right[name].values.cpu()
            real = batch.mask
            bound = 1e-4 * float(expected[real].abs().max())
            torch.testing.assert_close(found[real], expected[real], rtol=0, atol=max(bound, 1e-6))


@pytest.mark.parametrize("method", (ma.activation_patching, ma.attribution_patching))
def test_methods(method: Any) -> None:
    here, there = both("llama")
    results = [method(model, pairs_task(model), sites=("z", "mlp_out"), progress=False) for model in (here, there)]
    size = max(float(table.values.abs().max()) for table in results[0].tensors.values())
    assert_same(results[0], results[1], 1e-3 * size)  # float32 sums in another order, through a whole network


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_narrow_dtypes_score_in_float32(dtype: torch.dtype) -> None:
    model = HookedHF(small_model("gpt2", dtype).to("cuda"))
    found = ma.attribution_patching(model, pairs_task(model), sites="z", variant="atp", progress=False)
    assert found.scores["z"].dtype == torch.float32
    assert bool(found.scores["z"].values.isfinite().all())


def test_batches_halve_when_the_device_is_full() -> None:
    _, model = both("gpt2")
    task = pairs_task(model, (20,) * 64)
    expected = ma.attribution_patching(model, task, sites="z", variant="atp", batch_size=4, progress=False)
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    room = torch.cuda.memory_reserved() + 24 * 2**20
    torch.cuda.set_per_process_memory_fraction(room / total)
    try:
        found = ma.attribution_patching(model, task, sites="z", variant="atp", batch_size=64, progress=False)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert_same(expected, found, 1e-4)  # float32 sums of batches of other sizes
