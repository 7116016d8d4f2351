"""A family without a row: found by value, described by hand, or refused with what is missing."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import families
import pytest
import torch
from torch import Tensor

import mechattr as ma
from mechattr.errors import SelfCheckError, SettingError, UnsupportedModelError
from mechattr.models import Batch, Family, HookedHF, discover
from mechattr.models.families import FAMILIES, small_configs
from mechattr.models.small import small_model

FOUND = ("gpt2", "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "olmo2", "gpt_neox_sequential")


def foreign(name: str) -> Any:
    """A small model whose family nobody has heard of."""
    model = small_model(name)
    model.config.model_type = "mine"
    return model


@pytest.mark.parametrize("name", FOUND)
def test_what_is_found_by_value_is_the_row_of_the_table(name: str) -> None:
    config = small_configs()[name]
    row, found = replace(FAMILIES[config.model_type].of(config), variant=None), discover(small_model(name))
    differ = [f.name for f in fields(row) if getattr(found, f.name) != getattr(row, f.name)]
    assert differ == (["softmax_float32"] if name == "gpt2" else [])  # which a run in float32 cannot show


@pytest.mark.parametrize("name", ("gpt2", "gemma2"))
def test_a_foreign_family_runs_like_the_one_of_the_table(name: str) -> None:
    batch = Batch.of(families.tokens())
    model, known = HookedHF(foreign(name)), families.hooked(name)
    assert (model.info.family, model.info.mapping, known.info.mapping) == ("mine", "discovered", "table")
    assert model.sites() == known.sites()
    one, two = (m.run(batch, record=("v", "resid_mid", "mlp_post"), metric=families.probe, gradients="z")
                for m in (model, known))  # fmt: skip
    assert torch.equal(one.logits, two.logits)
    for site, x in one.activations.items():
        assert torch.equal(x.values, two.activations[site].values)
    for site, x in one.gradients.items():
        assert torch.equal(x.values, two.gradients[site].values)


def test_looking_leaves_nothing_behind() -> None:
    model = foreign("llama")
    before = [(name, len(m._forward_hooks), sorted(m.__dict__)) for name, m in model.named_modules()]
    config = model.config
    discover(model)
    assert [(name, len(m._forward_hooks), sorted(m.__dict__)) for name, m in model.named_modules()] == before
    assert all(m.config is config for m in model.modules() if "config" in m.__dict__)


PHI = Family(
    gate="mlp.gate_up_proj",
    gate_up=True,
    up=None,
    act="mlp.activation_fn",
    q=None,
    k=None,
    v=None,
    qkv="self_attn.qkv_proj",
    fused="blocks",
)


def test_where_looking_fails_a_mapping_of_ten_lines_does() -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        HookedHF(foreign("phi3"))
    asked, found, fix = str(caught.value).split("\n")
    assert asked == "a hooked model of family 'mine', which has no row in the table"
    assert found.startswith("  found: not found: gate, act, up, down, ln2; found: layers='layers', attn='self_attn', ")
    assert "family=ma.models.Family(layers=..., attn=..., ...)" in fix
    model = ma.load(foreign("phi3"), family=PHI)
    assert model.info.mapping == "given"
    batch = Batch.of(families.tokens())
    assert torch.equal(model.run(batch, record="mlp_pre").logits, families.hooked("phi3").run(batch).logits)


def damped() -> Any:
    """A Llama whose blocks add half of what their MLP writes."""
    model = foreign("llama")

    def halve(block: Any, args: tuple[Any, ...], out: Tensor) -> Tensor:
        return out - 0.5 * block.written

    for block in model.model.layers:
        block.mlp.register_forward_hook(lambda m, a, out, block=block: setattr(block, "written", out))
        block.register_forward_hook(halve)
    return model


def test_control_a_write_that_is_scaled_afterwards_is_neither_found_nor_believed() -> None:
    with pytest.raises(UnsupportedModelError, match="not found: attn_out, mlp_out"):
        HookedHF(damped())
    with pytest.raises(SelfCheckError, match=r"what block 0 writes\n  found: resid_pre \+ attn_out \+ mlp_out is not"):
        HookedHF(damped(), family=FAMILIES["llama"])


def test_a_mapping_that_is_wrong_is_found_out() -> None:
    llama = FAMILIES["llama"]
    with pytest.raises(SelfCheckError, match="what block 0 writes"):
        ma.load(small_model("gemma2"), family=replace(FAMILIES["gemma2"], attn_out="self_attn"))
    with pytest.raises(UnsupportedModelError, match=r"no module at mlp\.w1; found self_attn, mlp"):
        ma.load(small_model("llama"), family=replace(llama, gate="mlp.w1"))
    with pytest.raises(SettingError, match=r"family='llama'\n  found: a str"):
        ma.load(small_model("llama"), family="llama")
    with pytest.raises(SettingError, match="family for a model that is loaded already"):
        ma.load(families.hooked("llama"), family=llama)
