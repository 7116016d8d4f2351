"""Recordings that go to disk while the forward pass goes by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import families
import pytest
import torch
import vision_cases

import mechattr as ma
from mechattr.engines.memory import peak
from mechattr.errors import ArtifactError, NonFiniteError, OutputExistsError, SettingError, UnknownSiteError
from mechattr.models import Batch, PlainConfig, plain_model, record, record_to
from mechattr.storage import Stored


def deep() -> Any:
    config = PlainConfig.gpt2_like(n_layers=16, d_model=64, n_heads=4, n_kv_heads=4, d_head=16, d_mlp=128)
    return plain_model(config, dtype="float32")


@pytest.mark.parametrize("kind", ("plain", "llama", "bert", "t5", "qwen2_vl"))
def test_it_is_the_recording_in_memory(kind: str, tmp_path: Path) -> None:
    model: Any = deep() if kind == "plain" else families.hooked(kind)
    if kind == "qwen2_vl":
        batch = vision_cases.shown(kind)
    else:
        batch = Batch.of(torch.arange(24).view(3, 8)) if kind == "plain" else families.ragged_of(kind)
    kept = record(model, batch, model.sites())
    found = record_to(tmp_path / "folder", model, batch, model.sites(), shard_bytes=1 << 14)
    assert len(list((tmp_path / "folder").glob("*.safetensors"))) > 1
    assert found.settings == kept.settings
    assert found.provenance == kept.provenance  # the hash of the tokens has source and images in it
    assert set(found) == set(kept)
    for name in kept:
        assert torch.equal(found[name].values, kept[name].values), name
        assert found[name].axes == kept[name].axes
    opened = ma.open(tmp_path / "folder")
    assert torch.equal(opened["resid_pre", 1].values, kept["resid_pre", 1].values)  # type: ignore[index]


def test_it_is_never_in_memory_together(tmp_path: Path) -> None:
    model, batch = deep(), Batch.of(torch.randint(0, 29, (4, 16), generator=torch.Generator().manual_seed(0)))
    sites = [name for name in model.sites() if name.endswith(("hook_resid_pre", "hook_attn_out", "hook_mlp_out"))]
    model.fingerprint()
    size = sum(x.values.nbytes for x in record(model, batch, sites).values())
    nothing = peak(lambda: model.run(batch))

    def to_disk(name: str, shard_bytes: int) -> int:
        return peak(lambda: record_to(tmp_path / name, model, batch, sites, shard_bytes=shard_bytes))

    assert peak(lambda: record(model, batch, sites)) > 0.9 * size + 0.5 * nothing
    assert to_disk("small files", 1 << 14) < nothing + 0.25 * size
    assert to_disk("one file", 1 << 28) > 0.9 * size  # control: what waits is in memory
    assert isinstance(ma.open(tmp_path / "one file", lazy=True).tensors, Stored)


def test_a_run_that_fails_leaves_nothing(tmp_path: Path) -> None:
    model, batch = deep(), Batch.of(torch.arange(24).view(3, 8))
    broken = plain_model(model.config, {"ln_final.w": torch.full((64,), float("nan"))}, dtype="float32")
    with pytest.raises(NonFiniteError):
        record_to(tmp_path / "folder", broken, batch, "resid_post", shard_bytes=1 << 14)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ArtifactError):
        ma.open(tmp_path / "folder")
    record_to(tmp_path / "folder", model, batch, "z")
    with pytest.raises(OutputExistsError, match="something of this name"):
        record_to(tmp_path / "folder", model, batch, "z")
    with pytest.raises(SettingError, match="a recording\n  found: no sites\n  fix: name sites"):
        record_to(tmp_path / "other", model, batch, ())
    with pytest.raises(UnknownSiteError):
        record_to(tmp_path / "other", model, batch, "zz")
