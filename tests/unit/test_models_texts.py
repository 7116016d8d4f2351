"""Texts to tokens, and recordings that know which model and tokens made them."""

from __future__ import annotations

import json
import logging

import families
import pytest
import torch

from mechattr.artifact import Cache
from mechattr.errors import MismatchError, SettingError
from mechattr.models import Edit, HookedHF, check_belongs, load, record


def test_tokens_are_those_of_the_tokenizer_without_a_second_bos():
    model = HookedHF(families.model("gpt2"), families.tokenizer())
    batch = model.tokenize(["a b b", " a", "<s>a"])
    assert batch.tokens.tolist() == [[0, 3, 6, 6], [0, 5, 2, 2], [0, 3, 2, 2]]
    assert batch.strings == (("<s>", "a", " b", " b"), ("<s>", " a"), ("<s>", "a"))
    left = model.tokenize(["a b b", " a"], padding_side="left")
    assert left.tokens.tolist() == [[0, 3, 6, 6], [2, 2, 0, 5]]
    assert left.lengths.tolist() == [4, 2]
    assert model.tokenizer.padding_side == "right"
    assert model.decode_token(5) == " a"
    assert families.hooked("gpt2").decode_token(5) == "<5>"
    for texts in ("", [], ["a", ""]):
        with pytest.raises(SettingError, match="an empty list or an empty text"):
            model.tokenize(texts)
    with pytest.raises(SettingError, match="found: a int\n  fix: give texts"):
        model.tokenize([1, 2])
    with pytest.raises(SettingError, match="the tokenizer has no chat template"):
        model.tokenize("a", chat=True)
    with pytest.raises(SettingError, match="padding_side='top'"):
        model.tokenize("a", padding_side="top")
    with pytest.raises(SettingError, match="this model has no tokenizer"):
        families.hooked("gpt2").tokenize("a")


def test_a_text_beyond_the_context_is_tokenized_without_a_word(caplog):
    """It may be cut before it is run; a run of the whole text is refused."""
    tokenizer = families.tokenizer()
    tokenizer.model_max_length = 64
    model, text = HookedHF(families.model("gpt2"), tokenizer), "a b" * 40
    logger = logging.getLogger("transformers")  # which does not propagate to the handler of pytest
    logger.addHandler(caplog.handler)
    level = logger.level
    logger.setLevel(logging.WARNING)  # booting a TransformerBridge makes it quieter for the whole process
    try:
        batch = model.tokenize(text)
        assert not caplog.records
        tokenizer(text)
        assert "longer than the specified maximum" in caplog.text  # control: the tokenizer itself does complain
    finally:
        logger.setLevel(level)
        logger.removeHandler(caplog.handler)
    with pytest.raises(SettingError, match="the model has 64 positions"):
        model.run(batch)


def test_a_chat_prompt_has_one_bos():
    chatty = families.tokenizer()
    chatty.chat_template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    model = HookedHF(families.model("gpt2"), chatty)
    assert model.tokenize("a b", chat=True).tokens.tolist() == [[0, 3, 6]]


def test_a_trained_model_tokenizes_and_pads_alike(shared):
    model = load(shared / "models" / "stories260K")
    texts = ["Once upon a time, there was a dog.", "Lily was sad."]
    right, left = (model.tokenize(texts, padding_side=side) for side in ("right", "left"))
    for batch in (right, left):
        assert "".join(batch.strings[1][1:]).strip() == texts[1]
        assert (batch.tokens == model.tokenizer.bos_token_id).logical_and(batch.mask).sum(1).tolist() == [1, 1]
    one, two = model.run(right).logits[right.mask], model.run(left).logits[left.mask]
    torch.testing.assert_close(two, one, rtol=0, atol=1e-5 * float(one.abs().max()))  # float32
    assert model.decode_token(int(right.tokens[0, 2])).startswith(" ")


def test_a_recording_knows_its_model(tmp_path):
    model, batch = families.hooked("gpt2"), families.ragged("right")
    cache = record(model, batch, ("z", "resid_post"))
    run = model.run(batch, record=("z", "resid_post"))
    assert all(torch.equal(cache[name].values, run.activations[name].values) for name in run.activations)
    cache.save(tmp_path / "cache.safetensors")
    read = Cache.load(tmp_path / "cache.safetensors")
    check_belongs(read, model)
    assert read.provenance["family"] == "gpt2"
    assert read.provenance["tokens_sha256"] != record(model, families.ragged("left"), "z").provenance["tokens_sha256"]
    found = model.run(batch, edits=[Edit("z", lambda x, place: read[place.site].values)])  # a stored cache is a source
    assert torch.equal(found.logits, run.logits)


def test_a_result_of_another_model_is_refused():
    bare = families.model("gpt2")
    model = HookedHF(bare, families.tokenizer(), name="mine")
    cache = record(model, families.ragged("right"), "z")
    check_belongs(cache, model)
    text = (
        r"cache of model 'mine' with model 'mine'\n  found: the result was made with tokenizer \w{12}, this model has"
    )
    with pytest.raises(MismatchError, match=text):
        check_belongs(cache, HookedHF(bare, name="mine"))
    with torch.no_grad():
        bare.transformer.h[0].mlp.c_fc.bias[0] += 1  # an update in place is seen
    with pytest.raises(MismatchError, match=r"(?s)made with weights \w{12}.*compute the result again"):
        check_belongs(cache, model)
    with pytest.raises(MismatchError, match="the result does not say"):
        check_belongs(Cache({}), model)


def test_fingerprints_tell_dtypes_and_models_apart():
    models = [families.hooked("gpt2"), families.hooked("gpt2", torch.float64), families.hooked("llama")]
    assert len({model.fingerprint()["weight_hash"] for model in models}) == 3
    assert json.dumps(dict(families.hooked("gpt2").fingerprint()))
