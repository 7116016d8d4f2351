"""Batches and texts with images: what goes in, what is refused, and what identifies a result."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import families
import pytest
import torch
import transformers as tf
import vision_cases as cases

import mechattr as ma
from mechattr.errors import (
    MismatchError,
    SettingError,
    UnknownModelError,
    UnsupportedFeatureError,
    UnsupportedModelError,
)
from mechattr.models import Batch, HookedHF, record
from mechattr.patching.settings import provenance_of
from mechattr.report.reproduce import command

TEXTS = ["a b<image> a", " b<image> a a", "a"]


@pytest.fixture(scope="module")
def llava():
    return HookedHF(families.model("llava"), cases.llava_processor())


@pytest.fixture(scope="module")
def qwen():
    return HookedHF(families.model("qwen2_vl"), cases.QwenProcessor())


@pytest.mark.parametrize("name", ["llava", "qwen"])
def test_a_text_says_where_its_image_stands(name, request):
    model = request.getfixturevalue(name)
    batch = model.tokenize(TEXTS, images=[cases.photo(), [cases.photo(1)], None], padding_side="left")
    assert batch.tokens.tolist() == [[0, 3, 7, 4, 4, 4, 4, 6], [0, 7, 4, 4, 4, 4, 6, 6], [2, 2, 2, 2, 2, 2, 0, 3]]
    assert batch.strings[0] == ("<s>", "a", " b", *["<image>"] * 4, " a")
    assert batch.image_spans == ([(3, 7)], [(2, 6)], [])
    assert [bool(row) for row in batch.images] == [True, True, False]
    alone = model.tokenize(TEXTS[1], images=cases.photo(1))
    assert torch.equal(alone.images[0]["pixel_values"], batch.images[1]["pixel_values"])
    found, wanted = model.run(batch).logits[1], model.run(alone).logits[0]
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)  # float32 sums of another batch size
    assert model.tokenize(["a", "b"], images=[None, None]).image is None
    twice = model.tokenize("<s>a<image> b<image>", images=[cases.photo(), cases.photo(1)])
    assert twice.tokens[0].tolist() == [0, 3, 4, 4, 4, 4, 7, 4, 4, 4, 4]  # one BOS
    assert twice.image_spans == ([(2, 6), (7, 11)],)
    assert model.run(twice).logits.shape == (1, 11, 61)


def test_a_chat_puts_the_images_before_the_text():
    processor = cases.llava_processor()
    processor.chat_template = (
        "{% for part in messages[0]['content'] %}{% if part['type'] == 'image' %}<image>"
        "{% else %}{{ part['text'] }}{% endif %}{% endfor %} a"
    )
    model = HookedHF(families.model("llava"), processor)
    assert model.tokenize(" b", images=cases.photo(), chat=True).tokens[0].tolist() == [0, 4, 4, 4, 4, 7, 6]


def test_rows_and_devices_keep_the_images():
    batch = cases.shown("qwen2_vl")
    part = batch.rows([1, 1, 2])
    assert part.images == (batch.images[1], batch.images[1], {})
    assert part.image_spans == ([(1, 5)], [(1, 5)], [])
    there = part.to("cpu")
    assert there.images[0] is there.images[1]  # one image stays one
    assert torch.equal(there.image, part.image)
    assert Batch.of(families.tokens()).image_spans == ([], [], [])


def refused(error: type[Exception], text: str, call, *args, **kwargs) -> None:
    with pytest.raises(error) as caught:
        call(*args, **kwargs)
    assert text in str(caught.value)


def test_images_that_do_not_fit_their_rows_are_refused():
    tokens, one = torch.tensor([[7, 4, 4, 4, 4, 8]]), cases.picture("llava")
    image = tokens == 4

    def made(**given):
        return Batch.of(tokens, **given)

    refused(SettingError, "found: 1 rows and the images of 2", made, images=[one, one], image=image)
    refused(SettingError, "1 rows and the images of 0", made, image=image)
    refused(SettingError, "no image=\n  fix: say which columns are image tokens", made, images=[one])
    refused(SettingError, "image= of shape (1, 2), torch.bool", made, images=[one], image=image[:, :2])
    refused(SettingError, "row 0 has image tokens and no image", made, images=[{}], image=image)
    refused(SettingError, "row 0 has an image and no image token", made, images=[one], image=image & False)
    refused(SettingError, "a list among them", made, images=[{"pixel_values": [1.0]}], image=image)
    both = {"tokens": tokens.repeat(2, 1), "image": image.repeat(2, 1)}
    mixed = [one, cases.picture("qwen2_vl")]
    refused(SettingError, "rows with tensors of different names", Batch.of, images=mixed, **both)
    mask = torch.tensor([[True] * 4 + [False] * 2])
    refused(SettingError, "image tokens in the padding", Batch.of, tokens, mask, images=[one], image=image)


@pytest.mark.parametrize("family", cases.FAMILIES)
def test_every_row_must_have_as_many_image_tokens_as_features(family):
    """Three tokens beside five are eight in all, which transformers takes for right."""
    model = families.hooked(family)
    tokens = torch.tensor([[7, 4, 4, 4, 8, 9], [4, 4, 4, 4, 4, 9]])
    images = [cases.picture(family), cases.picture(family, 1)]
    batch = Batch.of(tokens, images=images, image=tokens == 4)
    refused(SettingError, "row 0 has 3 image tokens, and its images give 4 features\n  fix: make it", model.run, batch)
    refused(SettingError, "row 0 has 3 image tokens", model.generate, batch, max_new_tokens=1)


def test_control_the_sum_over_rows_does_not_show_it():
    tokens = torch.tensor([[7, 4, 4, 4, 8, 9], [4, 4, 4, 4, 4, 9]])
    pixels = torch.cat([cases.picture("llava", seed)["pixel_values"] for seed in (0, 1)])
    with torch.no_grad():
        assert families.model("llava")(tokens, pixel_values=pixels).logits.isfinite().all()


def test_images_that_cannot_be_joined_are_refused(llava):
    tokens = torch.tensor([[4, 4, 4, 4, 5], [4, 4, 4, 4, 6]])
    images = [cases.picture("llava"), {"pixel_values": torch.zeros(1, 3, 8, 16)}]
    batch = Batch.of(tokens, images=images, image=tokens == 4)
    refused(SettingError, "pixel_values of shapes (3, 8, 8) and (3, 8, 16)\n  fix: prepare all rows", llava.run, batch)


def test_what_a_model_cannot_see_is_refused(llava):
    text, batch = families.hooked("llama"), cases.shown("llava")
    assert text.info.image_token is None
    assert llava.info.image_token == 4
    found = "'llama' has no vision tower, or its backend (hf) does not read images"
    refused(UnsupportedFeatureError, found, text.run, batch)
    refused(UnsupportedFeatureError, "'llama' has no vision tower", text.tokenize, "a", images=[cases.photo()])
    missing = "token 4 stands in 2 rows, and the batch has no images\n  fix: use model.tokenize(texts, images=...)"
    refused(SettingError, missing, llava.run, Batch.of(batch.tokens, batch.mask))
    other = Batch.of(batch.tokens, batch.mask, images=batch.images, image=batch.image & (batch.positions != 2))
    refused(SettingError, "image= marks other columns than those of token 4", llava.run, other)


def test_texts_and_images_that_do_not_fit_are_refused(llava):
    bare, photo = HookedHF(families.model("llava"), cases.image_tokenizer()), cases.photo()
    refused(SettingError, "no processor\n  fix: load it with tokenizer=processor", bare.tokenize, "a", images=photo)
    refused(SettingError, "2 texts and images for 1", llava.tokenize, ["a", "b"], images=[photo])
    refused(SettingError, "1 images, and <image> 0 times in 'a'", llava.tokenize, ["a"], images=[photo])
    fix = "write <image> once where each image stands"
    refused(SettingError, fix, llava.tokenize, ["a<image><image>"], images=[photo])
    refused(SettingError, "0 images, and <image> 1 times", llava.tokenize, ["a<image>"], images=[None])
    refused(SettingError, "fix: give PIL images", llava.tokenize, ["a<image>"], images=[3])
    refused(SettingError, "an empty text", llava.tokenize, ["", "a"], images=[None, None])


def test_a_folder_is_loaded_with_its_processor(llava, tmp_path):
    llava.model.save_pretrained(tmp_path)
    refused(UnknownModelError, "the processor of", ma.load, tmp_path)
    cases.image_tokenizer().save_pretrained(tmp_path)
    refused(UnknownModelError, "fix: give tokenizer=, a processor, or a tokenizer for texts", ma.load, tmp_path)
    assert ma.load(tmp_path, tokenizer=str(tmp_path)).processor is None
    llava.processor.save_pretrained(tmp_path)
    model = ma.load(tmp_path)
    batch = model.tokenize(TEXTS[:1], images=[cases.photo()])
    assert torch.equal(model.run(batch).logits, llava.run(batch).logits)
    assert model.info.family == "llava"
    assert "torchvision" not in sys.modules


def test_the_language_model_inside_must_be_a_known_decoder():
    config = families.configs()["llava"]
    config.text_config = tf.MambaConfig(vocab_size=61, hidden_size=24, num_hidden_layers=1)
    built = tf.LlavaForConditionalGeneration(config).eval()
    refused(UnsupportedModelError, "'mamba'", HookedHF, built)
    config.text_config = families.configs()["bert"]
    built = tf.LlavaForConditionalGeneration(config).eval()
    refused(UnsupportedModelError, "its language model is of family 'bert', which is no decoder", HookedHF, built)


def test_other_language_models_inside_have_their_own_row():
    config = families.configs()["llava"]
    config.text_config = families.configs()["gemma2"]
    model = HookedHF(tf.LlavaForConditionalGeneration(config).eval())
    assert model.info.write_norm
    assert model.run(cases.shown("llava")).logits.shape == (3, 9, 61)


def pair(**more):
    return {"clean": "a<image> b", "corrupt": "a<image> b", "answer": " a", "foil": " b", **more}


def test_pairs_may_differ_in_their_images_alone(llava):
    def task(*seeds: int) -> ma.tasks.Task:
        images = [{"clean_image": cases.photo(0), "corrupt_image": cases.photo(seed)} for seed in seeds]
        return ma.tasks.from_pairs(llava, [pair(**two) for two in images])

    one, other, same = task(1, 2), task(1, 3), task(1, 2)
    assert one.spans[0] == {"image": (2, 6), "END": (6, 7)}
    assert one.hash() == same.hash() != other.hash()
    assert provenance_of(llava, one)["tokens_sha256"] != provenance_of(llava, other)["tokens_sha256"]
    assert [differs for _, differs in one.sample()[0]] == [False, False, True, True, True, True, False]
    assert one.rows([1]).clean.images[0].keys() == {"pixel_values"}
    assert torch.equal(one.clean.tokens, one.corrupt.tokens)
    assert "a file of pairs has no images" in command(llava.info, one, {}, Path("out"))
    assert ma.attribution_patching(llava, task(0, 1), sites="z").settings["n_identical_pairs"] == 1
    clean = record(llava, one.clean, sites=llava.sites())
    refused(MismatchError, "on other prompts", ma.attribution_patching, llava, one, sites="z", source=clean)


def test_pairs_with_images_that_cannot_be_read_are_refused(llava):
    from_pairs, photo = ma.tasks.from_pairs, cases.photo()
    refused(SettingError, "an image for one of its two prompts", from_pairs, llava, [pair(clean_image=photo)])
    both = {"clean_image": photo, "corrupt_image": photo}
    tokens = {"clean_tokens": [3, 4, 4, 4, 4], "corrupt_tokens": [3, 4, 4, 4, 4], "answer": 6, "foil": 7}
    refused(SettingError, "an image that no processor has prepared", from_pairs, llava, [{**tokens, **both}])
    text = HookedHF(families.model("llama"), families.tokenizer())
    refused(
        UnsupportedFeatureError,
        "pair 0 with images\n  found: 'llama' reads no images",
        from_pairs,
        text,
        [pair(**both)],
    )


def test_a_text_model_is_hashed_as_before_images(llava):
    text = ma.tasks.from_pairs(llava, [{"clean": "a b", "corrupt": "b b", "answer": " a", "foil": " b"}])
    assert text.clean.content is text.clean.tokens
    assert "images" not in json.dumps(text.settings)
