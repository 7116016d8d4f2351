"""Loading, and refusing what would give wrong numbers."""

from __future__ import annotations

import copy
import json
import sys
from dataclasses import replace

import families
import pytest
import torch
import transformers as tf

from mechattr.errors import (
    SelfCheckError,
    SettingError,
    UnknownModelError,
    UnknownNameError,
    UnsupportedFeatureError,
    UnsupportedModelError,
)
from mechattr.models import (
    Batch,
    HookedHF,
    HookedModel,
    PlainConfig,
    Rules,
    Zero,
    architectures,
    load,
    plain_copy,
    plain_model,
)
from mechattr.models.architectures import FAMILIES, table
from mechattr.models.files import bundled_path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "small"
    families.model("llama").save_pretrained(path)
    families.tokenizer().save_pretrained(path)
    return path


def test_a_folder_loads_as_eager_with_its_tokenizer_and_frozen(folder):
    model = load(folder)
    assert isinstance(model, HookedModel)
    assert model.info.name == "small"
    assert model.info.dtype == "float32"
    assert model.model.config._attn_implementation == "eager"
    assert not any(p.requires_grad for p in model.model.parameters())
    batch = model.tokenize("a b")
    with torch.no_grad():
        assert torch.equal(model.run(batch).logits, families.model("llama")(batch.tokens).logits)
    assert load(str(folder), attention="sdpa").model.config._attn_implementation == "sdpa"
    assert load(model) is model
    assert repr(model) == "HookedHF('small', llama, 2 layers, 4 heads (2 kv), d_model 24, float32 on cpu)"


def test_dtypes_and_backends(folder):
    assert load(folder, dtype="bfloat16").info.dtype == "bfloat16"
    hf, plain = load(folder, dtype=torch.float64), load(folder, backend="plain")
    assert (plain.info.backend, plain.info.dtype) == ("plain", "float64")
    batch = hf.tokenize(["a b a", "b"])
    # RMS norms and softmaxes of transformers work in float32
    torch.testing.assert_close(plain.run(batch).logits[batch.mask], hf.run(batch).logits[batch.mask], rtol=0, atol=1e-4)
    assert load(hf, backend="plain", dtype="float32").info.dtype == "float32"
    assert load(hf.model, backend="plain").info.dtype == "float64"
    assert plain_copy(hf, "float32").info.dtype == "float32"
    shared = plain_copy(hf).weight("blocks.0.mlp.W_out").data_ptr() == hf.weight("blocks.0.mlp.W_out").data_ptr()
    assert not shared  # a copy stays what it is when the model is trained further


def test_the_bundled_model_runs_on_both_backends():
    try:
        bundled_path("tiny")
    except UnknownModelError as error:
        assert "reinstall mechattr" in str(error)
        return
    hf, plain = load("tiny"), load("tiny", backend="plain")
    batch = hf.tokenize(["The cat sat on the", " mat"], padding_side="left")
    scale = float(hf.run(batch).logits.abs().max())
    found, wanted = plain.run(batch).logits[batch.mask].float(), hf.run(batch).logits[batch.mask]
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * scale)  # one of them is float32
    assert batch.strings[1] == (" mat",) or "".join(batch.strings[1]).endswith(" mat")


def test_loading_shows_a_bar_only_to_someone_who_waits(folder, capfd, monkeypatch):
    hooks = []

    def mine(make, args, settings):
        hooks.append(settings["desc"])
        return make(*args, **settings)

    monkeypatch.setattr(sys.stderr, "isatty", lambda: False)
    load(folder)
    with pytest.raises(UnknownModelError):
        load("nobody/nothing")
    before = tf.utils.logging.set_tqdm_hook(mine)  # someone else's stays, used or not
    try:
        load(folder)
        assert capfd.readouterr() == ("", "")
        assert hooks == []
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
        load("tiny")
        assert capfd.readouterr() == ("", "")
        load(folder)
    finally:
        assert tf.utils.logging.set_tqdm_hook(before) is mine
    assert before is None
    assert hooks == ["Loading weights"]
    assert "Loading weights" in capfd.readouterr().err


def broken(folder, tmp_path, **files):
    path = tmp_path / "broken"
    path.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        content = files.get(name.split(".")[0], (folder / name).read_bytes())
        if content is not None:
            (path / name).write_bytes(content)
    return path


def edited(folder, **fields):
    return json.dumps({**json.loads((folder / "config.json").read_text()), **fields}).encode()


def without_a_weight(folder):
    from safetensors.torch import load_file, save

    weights = load_file(folder / "model.safetensors")
    weights.pop("model.layers.1.mlp.down_proj.weight")
    return save(weights, {"format": "pt"})


def test_folders_that_cannot_be_used_say_why(folder, tmp_path):
    cases = {
        "no config": ({"config": None}, r"found: model.safetensors, tokenizer.json, tokenizer_config.json\n"),
        "no JSON": ({"config": b"{"}, "config.json is not JSON"),
        "no family": ({"config": b"{}"}, "a model folder needs config.json and model.safetensors"),
        "no weights": ({"model": None}, "the weights of"),
        "torn weights": ({"model": (folder / "model.safetensors").read_bytes()[:500]}, "the weights of"),
        "one weight less": ({"model": without_a_weight(folder)}, "1 are missing, such as model.layers.1.mlp.down_proj"),
        "no numbers": ({"config": edited(folder, num_hidden_layers="two")}, "Validation error"),
        "other sizes": ({"config": edited(folder, hidden_size=32)}, "the weights of"),
        "other activation": ({"config": edited(folder, hidden_act="zzz")}, "the weights of .*\n  found: 'zzz'"),
        "no tokenizer": ({"tokenizer": None, "tokenizer_config": None}, "give tokenizer=, a tokenizer object"),
    }
    for i, (files, text) in enumerate(cases.values()):
        (tmp_path / str(i)).mkdir()
        with pytest.raises(UnknownModelError, match=text):
            load(broken(folder, tmp_path / str(i), **files))
    for name, text in (
        ("./nowhere", "no such folder"),
        ("nobody/nothing", "bundled: tiny, agreement-gpt2, agreement-llama; else give a folder or a hub"),
    ):
        with pytest.raises(UnknownModelError, match=text):
            load(name)


def test_settings_that_cannot_be_met_are_refused(folder):
    model = families.hooked("gpt2")
    cases = [
        (lambda: load(folder, dtype="float8"), SettingError, "dtype 'float8'"),
        (lambda: load(folder, device="cuda:77"), SettingError, "device 'cuda:77'"),
        (lambda: load(model.model, dtype="float64"), SettingError, "dtype for a model that is loaded already"),
        (lambda: load(model, device="cpu"), SettingError, r"(?s)never converts or moves.*model.to\(...\)"),
        (lambda: plain_copy(model, "float8"), SettingError, "dtype 'float8'"),
        (lambda: plain_model(PlainConfig(), dtype="nn"), SettingError, "dtype 'nn'"),
        (lambda: load(folder, backend=None), UnknownNameError, "backend None"),
        (lambda: PlainConfig(n_kv_heads=0), SettingError, r"sizes \{'n_kv_heads': 0\}"),
        (lambda: PlainConfig(positions="rotary", d_head=3), SettingError, "d_head=3\n  found: it is odd"),
        (lambda: load(folder, backend="jax"), UnknownNameError, "backend 'jax'"),
        (lambda: load(folder, attention="nothing"), SettingError, "(?s)attention='nothing'.*use 'eager'"),
    ]
    for call, error, text in cases:
        with pytest.raises(error, match=text):
            call()


def test_families_that_do_not_go_through_the_tap_are_refused():
    config = tf.MambaConfig(vocab_size=61, hidden_size=24, num_hidden_layers=1, state_size=4)
    with pytest.raises(UnsupportedModelError, match="family 'mamba'"):
        HookedHF(tf.MambaForCausalLM(config).eval())
    for option, text in (
        ("reorder_and_upcast_attn", "does not go through"),
        ("add_cross_attention", "cross-attention"),
    ):
        with pytest.raises(UnsupportedModelError, match=text):
            HookedHF(tf.GPT2LMHeadModel(tf.GPT2Config(n_embd=8, n_head=2, n_layer=1, **{option: True})).eval())
    with pytest.raises(UnsupportedModelError, match="a hooked Linear\n  found: it has no config"):
        load(torch.nn.Linear(2, 2))
    with pytest.raises(UnsupportedModelError, match=r"load the \.\.\.ForCausalLM class"):
        HookedHF(tf.GPT2Model(tf.GPT2Config(n_embd=8, n_head=2, n_layer=1)).eval())


class Untapped(tf.models.llama.modeling_llama.LlamaAttention):
    """Attention that never calls the attention interface."""

    def forward(self, hidden_states, **kwargs):
        return self.o_proj(self.q_proj(hidden_states)), None


class Moved(tf.models.llama.modeling_llama.LlamaAttention):
    """The same attention, defined outside transformers."""


def test_attention_beside_the_tap_is_refused():
    model = families.model("llama")
    model.model.layers[1].self_attn.__class__ = Untapped
    text = r"does not go through the tap: blocks.1.attn.hook_v never fired \(5 sites silent\)"
    with pytest.raises(UnsupportedModelError, match=text):
        HookedHF(model)
    tapped = families.model("llama")
    tapped.model.layers[1].self_attn.__class__ = Moved
    batch = Batch.of(families.tokens())
    assert torch.equal(HookedHF(tapped).run(batch, record="v").logits, families.hooked("llama").run(batch).logits)


class Decorative(tf.models.llama.modeling_llama.LlamaAttention):
    """Calls the interface, and throws its result away."""

    def forward(self, hidden_states, **kwargs):
        out, pattern = super().forward(hidden_states, **kwargs)
        return self.o_proj(self.q_proj(hidden_states)) + 0 * out, pattern


def test_attention_whose_pattern_does_not_count_is_refused():
    model = families.model("llama")
    model.model.layers[0].self_attn.__class__ = Decorative
    with pytest.raises(SelfCheckError, match="overwriting it does not give the z that it should"):
        HookedHF(model)


def test_a_wrong_family_row_is_found(monkeypatch):
    row = FAMILIES["llama"]
    monkeypatch.setitem(architectures.FAMILIES, "llama", replace(row, gate="mlp.down_proj"))
    with pytest.raises(SelfCheckError, match=r"site blocks.0.mlp.hook_pre\n  found: shape \(1, 4, 24\)"):
        HookedHF(families.model("llama"))
    monkeypatch.setitem(architectures.FAMILIES, "llama", replace(row, ln2="no_such_norm"))
    with pytest.raises(UnsupportedModelError, match="no module at no_such_norm; found self_attn, mlp"):
        HookedHF(families.model("llama"))


def test_a_model_whose_attention_writes_nothing_is_fine():
    model = families.model("gpt2")
    with torch.no_grad():
        for block in model.transformer.h:
            block.attn.c_proj.weight.zero_()
    HookedHF(model)


def test_an_attention_without_a_tap_keeps_its_other_sites():
    model = families.hooked("llama")
    own = copy.copy(model.model.config)
    own._attn_implementation = "flash_attention_2"
    tapped = copy.copy(model)
    tapped.config = own
    batch = Batch.of(families.tokens())
    assert torch.equal(tapped.run(batch, record="z").logits, model.run(batch).logits)
    with pytest.raises(UnsupportedFeatureError, match=r"(?s)runs 'flash_attention_2' attention.*eager"):
        tapped.run(batch, record="v")


def test_what_is_supported_can_be_asked():
    model = families.hooked("gpt_neox")
    assert model.supports("z")
    assert model.supports("blocks.1.attn.hook_z")
    assert not model.supports("resid_mid")
    assert not model.supports("blocks.2.attn.hook_z")
    assert not model.supports("nonsense")
    assert model.supports(Zero())
    assert model.supports(Rules())
    assert not model.supports(3)


def test_the_table_of_families_names_what_is_absent():
    rows = {row["family"]: row for row in table()}
    assert rows["llama"]["absent"] == "pos_embed"
    assert "resid_mid" in rows["gpt_neox"]["absent"]
    assert rows["bert"]["kind"] == "encoder"


class Traced:
    """Has what a model of nnsight has."""

    _module = None


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"source": None}, "a NoneType as a model\n  found: None\n  fix: give a name, a folder or a loaded model"),
        ({"source": Traced()}, "a Traced as a model\n  found: a model of nnsight\n  fix: use backend='nnsight'"),
        ({"source": "tiny", "tokenizer": 5}, "tokenizer=5\n  found: a int\n  fix: give a tokenizer object, a folder"),
    ],
)
def test_what_is_no_model_and_no_tokenizer_is_refused(arguments, text):
    with pytest.raises(SettingError) as caught:
        load(**arguments)
    assert str(caught.value).startswith(text)


def test_a_tokenizer_may_be_a_path(folder):
    assert load(families.model("llama"), tokenizer=folder).tokenize("a b").tokens.shape[0] == 1
