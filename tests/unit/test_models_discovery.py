"""A family without a row: found by value, described by hand, or refused with what is missing."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import fields, replace
from typing import Any

import families
import pytest
import torch
import transformers
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import mechattr as ma
from mechattr.errors import SelfCheckError, SettingError, UnsupportedModelError
from mechattr.models import Batch, Family, HookedHF, discover
from mechattr.models.families import FAMILIES, small_configs
from mechattr.models.families.shapes import GATED, SMALL, ids
from mechattr.models.small import small_model
from mechattr.models.verify import verify

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


# --- families of transformers without a row


def unlisted(config: Any) -> Any:
    """A small random model from its config."""
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for label, parameter in sorted(model.named_parameters()):
            noise = 0.3 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise + float("norm" in label and label.endswith("weight")))
    return model.eval()


EXPERTS: dict[str, Any] = {**GATED, "num_experts_per_tok": 2, "moe_intermediate_size": 12, **ids()}


def test_a_family_without_a_row_is_found_and_keeps_what_is_promised() -> None:
    model = ma.load(unlisted(transformers.InternLM3Config(**GATED, head_dim=8, **ids())).double())
    assert (model.info.family, model.info.mapping) == ("internlm3", "discovered")
    assert all(check.passed for check in verify(model))


NO_INTERFACE = "in its first block no module, or more than one, calls transformers' attention function"
REFUSED: dict[str, tuple[Any, str]] = {
    # the shared expert looks like the MLP, and is a part of it
    "aria_text": (
        transformers.AriaTextConfig(**GATED, moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1, **ids()),
        "not found: gate, act, up, down, ln2; found: layers='layers'",
    ),
    "dots1": (
        transformers.Dots1Config(**EXPERTS, head_dim=8, n_routed_experts=4, n_shared_experts=1, n_group=2,
                                 topk_group=1, routed_scaling_factor=1.0, first_k_dense_replace=1),
        "no module at mlp.act_fn, mlp.down_proj, mlp.gate_proj, mlp.up_proj in block 1, unlike in block 0",
    ),
    "openai-gpt": (transformers.OpenAIGPTConfig(vocab_size=61, n_embd=24, n_layer=2, n_head=4), NO_INTERFACE),
    "jetmoe": (
        transformers.JetMoeConfig(vocab_size=61, hidden_size=24, num_hidden_layers=2, num_key_value_heads=2,
                                  kv_channels=8, intermediate_size=40, num_local_experts=4, num_experts_per_tok=2),
        "not found: v, q",
    ),
    "ctrl": (transformers.CTRLConfig(vocab_size=61, n_embd=24, n_layer=2, n_head=4, dff=40), "not found: pos_embed, q"),
    "olmo_hybrid": (
        transformers.OlmoHybridConfig(**SMALL, **ids(), layer_types=["linear_attention", "full_attention"]),
        "are recurrent",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_family_that_no_row_can_describe_is_refused_with_what_is_missing(name: str) -> None:
    config, found = REFUSED[name]
    with pytest.raises(UnsupportedModelError, match=f"a hooked model of family '{name}'") as caught:
        ma.load(unlisted(config))
    assert found in str(caught.value)


def test_a_model_that_does_not_run_says_so() -> None:
    with pytest.raises(
        UnsupportedModelError, match="its own forward pass of 5 tokens raises RuntimeError: Expected mat_a"
    ):
        ma.load(unlisted(REFUSED["aria_text"][0]).double())


# --- mappings and modules that are not what they look like


def test_control_a_shared_expert_is_not_believed_to_be_the_mlp() -> None:
    parts = {part: f"mlp.shared_experts.{part}_proj" for part in ("gate", "up", "down")}
    with pytest.raises(SelfCheckError, match=r"mlp\.hook_pre\n  found: mlp_out depends on more than what enters"):
        ma.load(unlisted(REFUSED["aria_text"][0]), family=Family(**parts, act="mlp.shared_experts.act_fn"))


def test_control_attention_that_writes_more_than_its_heads_is_not_believed() -> None:
    model = foreign("llama")
    for block in model.model.layers:
        block.self_attn.register_forward_hook(
            lambda m, a, given, out: (out[0] + given["hidden_states"], *out[1:]), with_kwargs=True
        )
    with pytest.raises(SelfCheckError, match="the heads' writes are not all that attention writes"):
        HookedHF(model)


def test_control_a_norm_that_adds_one_to_its_weight_under_another_name_is_not_believed() -> None:
    class PlusOneRMSNorm(LlamaRMSNorm):
        def forward(self, hidden_states: Tensor) -> Tensor:
            return super().forward(hidden_states) / self.weight * (1 + self.weight)

    model = foreign("llama")
    for module in model.modules():
        if isinstance(module, LlamaRMSNorm):
            module.__class__ = PlusOneRMSNorm
    assert discover(model).norm == "rms_plus_one"
    with pytest.raises(SelfCheckError, match=r"the norms of LlamaForCausalLM\n  found: PlusOneRMSNorm gives something"):
        HookedHF(model)


def test_control_attention_that_counts_columns_is_not_believed() -> None:
    """Llama 4 makes queries of blocks without rotary embedding longer with their column."""
    tuned: dict[str, Any] = {**GATED, "intermediate_size_mlp": 40, "moe_layers": [], "no_rope_layers": [1, 0], **ids()}
    for attention, refused in (({"attn_temperature_tuning": False}, False), ({"floor_scale": 2}, True)):
        model = unlisted(transformers.Llama4TextConfig(**tuned, head_dim=8, **attention))
        with pytest.raises(SelfCheckError, match="something counts columns") if refused else nullcontext():
            assert ma.load(model).info.mapping == "discovered"


def test_positions_are_known_by_what_a_model_has_not_by_its_first_block() -> None:
    """Block 0 of this SmolLM3 rotates nothing; Whisper's decoder scales its queries on their way, and rotates none."""
    config = transformers.SmolLM3Config(**GATED, no_rope_layers=[0, 1], **ids())
    assert discover(unlisted(config)).rotary
    sizes = {"vocab_size": 61, "d_model": 24, "decoder_layers": 2, "encoder_layers": 2, "decoder_ffn_dim": 40}
    whisper = transformers.WhisperConfig(
        **sizes, max_target_positions=64, decoder_attention_heads=4, decoder_start_token_id=0, **ids()
    )
    assert not discover(unlisted(whisper)).rotary


def test_control_logits_that_are_multiplied_are_not_believed() -> None:
    scaled = {"head_dim": 8, "attention_multiplier": 0.3, **ids()}
    assert ma.load(unlisted(transformers.HyperCLOVAXConfig(**GATED, **scaled))).info.mapping == "discovered"
    with pytest.raises(
        SelfCheckError, match="the logits of HyperCLOVAXForCausalLM\n  found: they are not what the unem"
    ):
        ma.load(unlisted(transformers.HyperCLOVAXConfig(**GATED, **scaled, logits_scaling=3.0)))
