"""The reference backend on a GPU: what it gives there is what it gives on the CPU, in float32 without TF32."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from contract_cases import CASES, Case, call
from patching_cases import assert_same, pairs_task

import mechattr as ma
from mechattr.errors import SettingError
from mechattr.models import Batch, HookedHF
from mechattr.models.base import Start
from mechattr.models.edits import Edit
from mechattr.models.halving import Halving
from mechattr.models.operators import Add, Set, Zero
from mechattr.models.small import small_model

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
BUILDS = ("llama", "gpt2", "gemma2", "mixtral", "bloom", "bert", "t5")
CUDA = torch.device("cuda:0")


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    """float32 as float32, and kernels that give the same bits each time."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@cache
def on_cuda(family: str, dtype: torch.dtype = torch.float32) -> HookedHF:
    return HookedHF(copy.deepcopy(small_model(family, dtype)).to(CUDA))


def near(found: torch.Tensor, expected: torch.Tensor, name: str = "") -> None:
    """Another device adds in another order: rounding of float32 through a few layers, in units of the largest value."""
    finite = expected[expected.isfinite()]
    close = 3e-5 * max(1.0, float(finite.abs().max()) if len(finite) else 1.0)
    torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=close, equal_nan=True, msg=lambda m: f"{name}: {m}")


@pytest.mark.parametrize("family", BUILDS)
def test_every_site_and_its_gradient_are_those_on_the_cpu(family: str) -> None:
    model, reference = on_cuda(family), families.hooked(family)
    batch = families.ragged_of(family)
    wanted = {"record": model.sites(), "metric": families.probe, "gradients": model.sites()}
    found, expected = model.run(batch.to(CUDA), **wanted), reference.run(batch, **wanted)
    near(found.logits[batch.mask.to(CUDA)], expected.logits[batch.mask], "logits")
    again = model.run(batch.to(CUDA), **wanted, checkpoint=True)
    for name, g in again.gradients.items():
        near(g.values, expected.gradients[name].values, f"checkpointed gradient of {name}")
    for kind in ("activations", "gradients"):
        here, there = getattr(expected, kind), getattr(found, kind)
        for name in model.sites():
            assert there[name].values.device == CUDA  # recordings stay where the model is
            near(there[name].values, here[name].values, f"{kind} of {name}")
    with pytest.raises(AssertionError):  # the tolerance sees one per cent
        near(found.logits * 1.01, expected.logits)


@pytest.mark.parametrize("family", BUILDS)
def test_without_taps_it_is_the_models_own_call_bit_for_bit(family: str) -> None:
    model, batch = on_cuda(family), families.batch_of(family, families.tokens()).to(CUDA)
    own = families.own_logits(model, batch)
    assert model.run(batch).logits.equal(own)
    assert model.run(batch, record="resid_post").logits.equal(own)


def test_edits_start_generate_and_hashes_are_those_on_the_cpu() -> None:
    batch = Batch.of(families.tokens())
    found = []
    for model in (families.hooked("llama"), on_cuda("llama")):
        here = batch.to(model.device)
        run = model.run(here, record=("resid_pre", "z", "pattern"))
        edits = [
            Edit("z", Zero(), layers=[1], heads=[1], positions=[-1], rows=[0, 2]),
            Edit("resid_post", Add(torch.ones(24)), layers=[0]),  # a value of the CPU goes where the activation is
            Edit("pattern", Set(run.activations), layers=[1]),
        ]
        start = Start(1, run.activations["resid_pre", 1].values * 1.1)
        edited, started = model.run(here, edits=edits).logits, model.run(here, start=start).logits
        written = model.generate(here, edits=edits[:1], max_new_tokens=4, do_sample=False).tokens
        found.append((edited, started, written.float(), model.weight("blocks.1.attn.W_O"), model.fingerprint()))
    for expected, there in zip(*(parts[:-1] for parts in found), strict=True):
        assert there.device == CUDA
        near(there, expected)
    assert found[0][-1] == found[1][-1]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_method_gives_what_it_gives_on_the_cpu(case: Case) -> None:
    here, there = (call(case, model, pairs_task(model)) for model in (families.hooked("llama"), on_cuda("llama")))
    for name, table in here.tensors.items():
        if not name.startswith(("dof/", "upper/")):  # ratios of differences that may be rounding alone
            near(there.tensors[name].values, table.values, name)


def test_a_batch_halves_when_memory_really_runs_out() -> None:
    total = torch.cuda.mem_get_info()[1]
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(min(1.0, (torch.cuda.memory_reserved() + 2**28) / total))
    halving, tried = Halving(8), []

    def run(rows: Any) -> list[float]:
        tried.append(len(rows))
        return torch.ones(len(rows), 2**24, device=CUDA).mean(1).tolist()  # 64 MiB a row

    try:
        assert halving(range(8), run) == [1.0] * 8
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert tried[0] == 8 and halving.size < 8


def test_a_method_halves_when_the_device_is_full() -> None:
    model = on_cuda("gpt2")
    task = pairs_task(model, (20,) * 64)
    given: dict[str, Any] = {"sites": "z", "variant": "atp", "progress": False}
    expected = ma.attribution_patching(model, task, batch_size=4, **given)
    total = torch.cuda.mem_get_info()[1]
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 24 * 2**20) / total)
    try:
        found = ma.attribution_patching(model, task, batch_size=64, **given)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert_same(expected, found, 1e-4)  # float32 sums of batches of other sizes


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_narrow_dtypes_run(dtype: torch.dtype) -> None:
    model, batch = on_cuda("llama", dtype), Batch.of(families.tokens()).to(CUDA)
    run = model.run(batch, record="z", metric=families.probe, gradients=("z", "resid_pre"))
    assert run.logits.dtype == dtype and run.logits.isfinite().all()
    assert all(g.values.isfinite().all() for g in run.gradients.values())
    scores = ma.attribution_patching(model, pairs_task(model), sites="z", variant="atp", progress=False).scores["z"]
    assert scores.dtype == torch.float32 and bool(scores.values.isfinite().all())


@pytest.mark.parametrize("rest", ("cpu", "disk"))
def test_a_model_spread_over_gpu_and_host_is_the_model(tmp_path: Path, rest: str) -> None:
    small_model("llama").save_pretrained(tmp_path)
    families.tokenizer().save_pretrained(tmp_path)
    parts = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")
    loaded: Any = ma.load(tmp_path, device_map={**dict.fromkeys(parts, 0), "model.layers.1": rest})
    model = HookedHF(loaded.model)  # without its tokenizer, which decides what task is made
    assert model.device == CUDA
    for name in ("attribution_patching", "edge_attribution"):
        here, there = (call(CASES[name], m, pairs_task(m)) for m in (families.hooked("llama"), model))
        for kind, table in here.tensors.items():
            near(there.tensors[kind].values, table.values, kind)
    assert model.fingerprint()["weight_hash"] == families.hooked("llama").fingerprint()["weight_hash"]


def test_a_batch_on_the_host_is_refused() -> None:
    with pytest.raises(SettingError, match=r"tokens on cpu, model on cuda:0\n  fix: .*batch.to\(device\)"):
        on_cuda("llama").run(Batch.of(families.tokens()))
