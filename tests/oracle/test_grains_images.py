"""GrAInS over merged embeddings: against passes of transformers' own language model, and on a network in which one
patch of the picture drives the preference."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import vision_cases as cases
from PIL import Image

from mechattr.errors import SettingError, UnknownNameError, UnsupportedFeatureError
from mechattr.models import Batch, HookedHF
from mechattr.models.families.vision import IMAGE_TOKEN
from mechattr.models.small import small_model
from mechattr.sites import full_name
from mechattr.steering import SteeringVector, evaluate, grains, propensity, shuffled, sweep, token_scores

PATCHES, PAD = 4, 2
TRIPLES = [("<image>a b", " a", " b a"), ("a<image> a", " b b", "a"), ("b a", " a a", " b")]
WITH_IMAGES = [(*t, cases.photo(i) if "<image>" in t[0] else None) for i, t in enumerate(TRIPLES)]


def llava() -> HookedHF:
    """A small LLaVA in float64 with weights so small that paths are smooth."""
    raw = small_model("llava", torch.float64)
    with torch.no_grad():
        for name, x in raw.model.language_model.named_parameters():
            x.mul_(1.0 if "norm" in name or "embed" in name else 0.3)
    return HookedHF(raw, tokenizer=cases.llava_processor())


class Own:
    """Passes of transformers' language model alone, over embeddings that are merged by hand."""

    def __init__(self, model: HookedHF) -> None:
        self.raw = model.model

    def merged(self, ids: list[int], images: Any) -> torch.Tensor:
        x = self.raw.get_input_embeddings()(torch.tensor(ids)).detach().clone()
        if images:
            with torch.no_grad():
                features = self.raw.model.get_image_features(images["pixel_values"].double()).pooler_output
            x[torch.tensor(ids) == IMAGE_TOKEN] = torch.cat(list(features))
        return x

    def blank(self, ids: list[int], x: torch.Tensor, kind: str) -> torch.Tensor:
        if kind == "zero":
            return torch.zeros_like(x)
        image = torch.tensor(ids) == IMAGE_TOKEN
        out = self.raw.get_input_embeddings().weight.detach().mean(0).expand(x.shape).clone()
        out[image] = x[image].mean(0)
        return out

    def __call__(self, x: torch.Tensor, layer: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits, and the last state of a block, before the final norm."""
        kept: list[torch.Tensor] = []
        inner = self.raw.model.language_model
        handle = inner.layers[layer].register_forward_hook(lambda _m, _a, y: kept.append(y))
        with torch.no_grad():
            logits = self.raw.lm_head(inner(inputs_embeds=x[None]).last_hidden_state)[0]
        handle.remove()
        (state,) = kept
        return logits, state[0, -1]

    def log_p(self, x: torch.Tensor, ids: list[int], start: int) -> float:
        table = self(x)[0].log_softmax(-1)
        return sum(float(table[t - 1, ids[t]]) for t in range(start, len(ids)))


def rows(scores: Any) -> list[tuple[list[int], Any]]:
    """Ids and images of each row without its padding."""
    batch = scores.batch
    return [(batch.tokens[i, batch.mask[i]].tolist(), batch.images[i]) for i in range(len(batch))]


@pytest.mark.parametrize("baseline", ["mean", "zero"])
def test_scores_of_both_modalities_sum_to_the_preference(baseline: str) -> None:
    model = llava()
    own, n = Own(model), len(TRIPLES)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of the path from zero, whose gap is compared below
        scores = token_scores(model, WITH_IMAGES, baseline=baseline, steps=40)
    placeholders: Any = []
    for i, (ids, images) in enumerate(rows(scores)):
        x, start, sign = own.merged(ids, images), int(scores.starts[i]), 1 if i < n else -1
        change = sign * (own.log_p(x, ids, start) - own.log_p(own.blank(ids, x, baseline), ids, start))
        # one row is a path of its own: its change is exact, and the sum misses it by what the quadrature leaves
        assert float(scores.change[i]) == pytest.approx(change, abs=1e-10)
        assert float(scores.values[i].sum() - scores.gap[i]) == pytest.approx(change, abs=1e-10)
        if baseline == "mean":
            assert float(scores.values[i].sum()) == pytest.approx(
                change, abs=1e-5
            )  # 40 points on a path through RMSNorm
        if images:  # control: the path over the embeddings of input ids, where an image is its placeholder
            y = own.merged(ids, None)
            placeholders.append(sign * (own.log_p(y, ids, start) - own.log_p(own.blank(ids, y, baseline), ids, start)))
            assert abs(placeholders[-1] - change) > 1e-3
    assert len(placeholders) == 4


def last_differences(
    model: HookedHF, scores: Any, k: int, sign: int, layer: int, blank: Any
) -> list[tuple[int, torch.Tensor]]:
    """The definition: h - h without the k tokens, in single passes over merged embeddings."""
    own, found = Own(model), []
    for i, (ids, images) in enumerate(rows(scores)):
        x, values = own.merged(ids, images), scores.values[i].tolist()
        special = [t for t in range(len(ids)) if ids[t] < 3]
        order = sorted(set(range(len(ids))) - set(special), key=lambda t, v=values: -sign * v[t])
        at = [t for t in order[:k] if sign * values[t] > 0]
        if at:
            y = x.clone()
            y[at] = blank(own, ids, x)[at]
            found.append((i, own(x, layer)[1] - own(y, layer)[1]))
    return found


@pytest.mark.parametrize("kind", ["mean", "zero"])
def test_image_tokens_are_taken_away_as_embeddings(kind: str) -> None:
    model, k = llava(), 3
    scores = token_scores(model, WITH_IMAGES)
    v = grains(model, WITH_IMAGES, layers=[0, 1], k=k, ablate=f"{kind}_embed", batch_size=7)
    for layer in (0, 1):

        def direction(blank: Any, layer: int = layer) -> torch.Tensor:
            parts = [last_differences(model, scores, k, sign, layer, blank) for sign in (1, -1)]
            assert all(parts)
            up, down = (torch.stack([x for _, x in part]).mean(0) for part in parts)
            return up - down

        expected = direction(lambda own, ids, x: own.blank(ids, x, kind))
        torch.testing.assert_close(v.directions[layer].double(), expected, rtol=1e-5, atol=1e-6)  # float32 results
        by_id = direction(lambda own, ids, x: own.merged([PAD] * len(ids), None))  # control: an id in its place
        assert not torch.allclose(v.directions[layer].double(), by_id, rtol=1e-2, atol=1e-2)


def test_only_tokens_of_one_modality_are_taken_away() -> None:
    model = llava()
    scores = token_scores(model, WITH_IMAGES)
    image = scores.batch.image
    for modality, mask in (("image", image), ("text", ~image)):
        v = grains(model, WITH_IMAGES, layers=[1], k=100, mode="pos", modality=modality)
        some = (scores.values > 0) & mask & ((scores.batch.tokens > 2) & scores.batch.mask)
        assert v.settings["n_ablated"] == {"pos": int(some.any(1).sum())} and v.settings["modality"] == modality
    text = grains(model, TRIPLES[2:], layers=[1], modality="text").directions[1]
    assert torch.equal(text, grains(model, TRIPLES[2:], layers=[1]).directions[1])
    pad = grains(model, WITH_IMAGES, layers=[1], modality="text", ablate="pad")
    assert bool(pad.directions[1].any())


def test_image_tokens_are_numbered_and_both_sequences_share_an_image() -> None:
    scores = token_scores(llava(), WITH_IMAGES)
    names = [name for name, _ in scores.of(1, "dispreferred")]
    assert names == ["<s>", "a", *(f"image 0, token {i}" for i in range(PATCHES)), " a", "a"]
    assert [name for name, _ in scores.of(2)] == ["<s>", "b", " a", " a", " a"]
    assert all(scores.batch.images[i] is scores.batch.images[i + 3] for i in range(3))


@pytest.mark.parametrize("family", cases.FAMILIES)
def test_triples_with_images_give_together_what_they_give_one_by_one(family: str) -> None:
    processor = cases.llava_processor() if family == "llava" else cases.QwenProcessor()
    model = HookedHF(small_model(family, torch.float64), tokenizer=processor)
    settings: dict[str, Any] = {"layers": [1], "k": 2, "steps": 2, "mode": "pos"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # two steps on a network that bends: what is left out is the same
        together = grains(model, WITH_IMAGES, **settings)
        alone = [grains(model, [t], **settings) for t in WITH_IMAGES]
    counts = [v.settings["n_ablated"]["pos"] for v in alone]
    expected = sum(n * v.directions[1] for n, v in zip(counts, alone, strict=True)) / sum(counts)
    torch.testing.assert_close(together.directions[1], expected, rtol=1e-5, atol=1e-6)  # float32 results
    assert not torch.allclose(together.directions[1], alone[0].directions[1], atol=1e-3)  # the control: one of them


def patches(white: int) -> Image.Image:
    """A black picture with one white patch."""
    picture = Image.new("RGB", (8, 8))
    row, column = divmod(white, 2)
    picture.paste((255, 255, 255), (4 * column, 4 * row, 4 * column + 4, 4 * row + 4))
    return picture


PLANTED = [(" b" * (i % 3) + "<image>" + "a" * (1 + i % 2), " a", " b", patches(i % PATCHES)) for i in range(6)]


def driven() -> tuple[HookedHF, torch.Tensor]:
    """A LLaVA whose language model looks everywhere alike for what tells a white patch from all other embeddings, and
    writes a direction where it stands; the direction raises " a" and lowers " b"."""
    raw = small_model("llava", torch.float64)
    inner, vision = raw.model.language_model, raw.model.vision_tower
    with torch.no_grad():
        for name, x in [*inner.named_parameters(), *vision.named_parameters()]:
            if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight", "out_proj.weight",
                              "down_proj.weight", "fc2.weight", "bias", "position_embedding.weight")):  # fmt: skip
                x.zero_()  # patches do not see one another, and nothing but the planted head acts
        raw.lm_head.weight.zero_()
        model = HookedHF(raw, tokenizer=cases.llava_processor())
        picture = model.tokenize(["<image>a"], images=[patches(0)])
        x = Own(model).merged(picture.tokens[0].tolist(), picture.images[0])[picture.image[0]]
        white, black = x[0], x[1]
        torch.testing.assert_close(x[1:], black.expand(PATCHES - 1, -1), rtol=0, atol=1e-9)
        inner.embed_tokens.weight.mul_(float(black.norm()) / inner.embed_tokens.weight.norm(dim=1, keepdim=True))
        words = inner.embed_tokens.weight[[0, 3, 5, 6, 7]]  # those of the prompts and answers
        q, _ = torch.linalg.qr(torch.cat([black[None], words, white[None], torch.eye(len(white)).double()]).T)
        seen, direction = q[:, 6], q[:, 7]
        head = inner.layers[0].self_attn
        head.v_proj.weight[0], head.o_proj.weight[:, 0] = 40 * seen, 40 * direction
        inner.embed_tokens.weight[8:].zero_()
        for norm in (*(layer.input_layernorm for layer in inner.layers), inner.norm):
            norm.weight.fill_(1.0)
        raw.lm_head.weight[6], raw.lm_head.weight[7] = direction, -direction
    return HookedHF(raw, tokenizer=cases.llava_processor()), direction


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a.double(), b, dim=0))


def placeholder_scores(model: HookedHF, scores: Any) -> torch.Tensor:
    """The wrong implementation: input ids are embedded, and pixels are never read."""
    batch = Batch.of(scores.batch.tokens.masked_fill(scores.batch.image, PAD + 1), scores.batch.mask)
    signs = torch.tensor([1.0] * len(PLANTED) + [-1.0] * len(PLANTED))

    def metric(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        last = batch.columns(-1)
        index = torch.arange(len(batch))
        return signs[batch.example] * logits.log_softmax(-1)[index, last - 1, batch.tokens[index, last]]

    run = model.run(batch, record="embed", metric=metric, gradients="embed")
    return (run.activations["embed"] * run.gradients["embed"]).values.sum(-1)


def places(scores: Any) -> list[int]:
    """The column of the white patch of each row."""
    first = scores.batch.image.int().argmax(1).tolist()
    return [first[i] + (i % len(PLANTED)) % PATCHES for i in range(len(first))]


@pytest.mark.parametrize("settings", [
    {}, {"mode": "pos", "k": 1}, {"modality": "image"}, {"ablate": "attn_mask", "mode": "pos"},
    {"reduce": "pca_uncentered"}, {"ablate": "zero_embed"}, {"positions": "prompt_last", "mode": "pos", "k": 1},
], ids=str)  # fmt: skip
def test_the_patch_that_drives_the_preference_and_its_direction_are_found(settings: dict[str, Any]) -> None:
    model, direction = driven()
    scores, v = token_scores(model, PLANTED), grains(model, PLANTED, layers=[0], **settings)
    assert scores.values.argmax(1).tolist() == places(scores)
    assert cosine(v.directions[0], direction) > 0.99
    before = propensity(model, PLANTED)
    with v.apply(model, 2.0):
        assert bool((propensity(model, PLANTED) > before).all())


def test_images_come_along_in_sweeps_evaluations_and_shuffled_triples() -> None:
    model, _ = driven()
    vector = grains(model, PLANTED, layers=[0])
    swept = sweep(model, vector, PLANTED, multipliers=(-1, 1)).tensors["propensity"].values[0]
    done = evaluate(model, vector, PLANTED, multipliers=(-1, 1), prompting="a")
    torch.testing.assert_close(done.tensors["propensity"].values[0], swept)
    torch.testing.assert_close(done.base, propensity(model, PLANTED).double(), rtol=1e-9, atol=1e-9)  # float64
    with vector.apply(model, -1):
        torch.testing.assert_close(swept[0], propensity(model, PLANTED).double(), rtol=1e-9, atol=1e-9)  # float64
    mixed = shuffled(grains, model, PLANTED, layers=[0])
    assert float(mixed.directions[0].norm()) < 0.5 * float(vector.directions[0].norm())
    asked = [(f"a{prompt}", *more) for prompt, *more in PLANTED]
    torch.testing.assert_close(
        done.tensors["prompting"].values, propensity(model, asked).double(), rtol=1e-9, atol=1e-9
    )  # float64
    text = [(prompt.replace("<image>", ""), a, b) for prompt, a, b, _ in PLANTED]  # control: the picture matters
    assert not torch.allclose(done.base, propensity(model, text).double(), atol=0.1)


@pytest.mark.parametrize("positions", ["all", "generated", "last"])
def test_a_transformers_model_with_pixels_is_steered_as_the_hooked_one(positions: str) -> None:
    model = llava()
    direction = torch.randn(model.info.d_model, generator=torch.Generator().manual_seed(0))
    vector = SteeringVector.of({full_name("resid_post", 0): direction})
    batch = model.tokenize(["<image>a b", "a <image>"], images=[cases.photo(1), cases.photo(2)])
    assert not batch.padded
    settings: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    with vector.apply(model, 4.0, positions):
        expected = model.generate(batch, **settings).tokens
    pixels = torch.cat([row["pixel_values"] for row in batch.images])
    given = {
        "input_ids": batch.tokens,
        "attention_mask": batch.mask.long(),
        "pixel_values": pixels,
        "pad_token_id": PAD,
    }
    with vector.apply(model.model, 4.0, positions):
        assert torch.equal(model.model.generate(**given, **settings), expected)
    assert not torch.equal(model.model.generate(**given, **settings), expected)  # the control: without the vector


def test_control_placeholders_do_not_show_the_patch() -> None:
    model, _ = driven()
    scores = token_scores(model, PLANTED)
    found = placeholder_scores(model, scores).masked_fill(~scores.batch.image, -1.0).argmax(1).tolist()
    assert sum(a == b for a, b in zip(found, places(scores), strict=True)) <= len(found) // PATCHES + 1


def test_what_does_not_fit_is_refused() -> None:
    model, picture = llava(), cases.photo()
    text = HookedHF(small_model("llama"), tokenizer=cases.image_tokenizer())
    cases_: list[tuple[Any, Any, type[Exception], dict[str, Any], str]] = [
        (text, WITH_IMAGES, UnsupportedFeatureError, {}, "triples with images\n  found: .* reads no images"),
        (model, WITH_IMAGES, SettingError, {"ablate": "pad"}, "ablate='pad'\n  found: image tokens, for which"),
        (model, WITH_IMAGES, SettingError, {"ablate": "pad", "modality": "image"}, "use ablate='mean_embed'"),
        (model, TRIPLES[2:], SettingError, {"modality": "image"}, "modality='image'\n  found: triples without images"),
        (model, WITH_IMAGES, UnknownNameError, {"modality": "images"}, "did you mean 'image'"),
        (model, [("a", "b", " a", picture)], SettingError, {}, "1 images, and <image> 0 times"),
        (model, [("<image>a", "b", " a", [picture, picture])], SettingError, {}, "2 images, and <image> 1 times"),
        (model, [("<image>a", "b", " a")], SettingError, {}, "image token"),
        (model, [("<image>a", "b", " a", "cat.png")], SettingError, {}, "a text in place of an image: ..cat.png"),
        (model, [("<image>a", "b", "b", picture)], SettingError, {}, "two equal answers"),
        (model, [("a", "b", " a", picture, picture)], SettingError, {}, "triple 0"),
    ]
    for one, triples, kind, settings, message in cases_:
        with pytest.raises(kind, match=message):
            grains(one, triples, **{"layers": [0], **settings})
