"""KL to base, cross-entropy and perplexity, against their definitions term by term in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence

import families
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import mechattr as ma
from mechattr.errors import SettingError, UnsupportedFeatureError
from mechattr.models import Batch, HookedModel
from mechattr.models.plain import plain_model
from mechattr.models.plain_config import PlainConfig
from mechattr.steering import SteeringVector, answers, side_effects

TEXTS = [[3, 1, 4, 1, 5, 9, 2], [6, 5], [3, 5, 8, 9, 7], [9, 3, 2, 3, 8, 4, 6]]
EXACT = {"rtol": 1e-10, "atol": 1e-12}  # float64, sums of up to 31 terms in another order
STATES = {"rtol": 1e-9, "atol": 1e-10}  # float64 forward passes of another batch shape


@pytest.fixture(scope="module")
def model() -> HookedModel:
    return plain_model(PlainConfig.llama_like())


@pytest.fixture(scope="module")
def vector(model: HookedModel) -> SteeringVector:
    direction = torch.randn(model.info.d_model, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return ma.steering.from_direction(model, direction, layers=[0])


def logits_of(model: HookedModel, row: Sequence[int]) -> Tensor:
    return model.run(Batch.of(torch.tensor([list(row)]))).logits[0]


def kl_by_hand(base: Tensor, steered: Tensor) -> float:
    total = 0.0
    for p_row, q_row in zip(base.softmax(-1).tolist(), steered.softmax(-1).tolist(), strict=True):
        total += sum(p * (math.log(p) - math.log(q)) for p, q in zip(p_row, q_row, strict=True))
    return total / len(base)


def loss_by_hand(model: HookedModel, row: Sequence[int], start: int, *, late: int = 0) -> float:
    p = logits_of(model, row).softmax(-1)
    terms = [-math.log(float(p[t - 1 + late, row[t]])) for t in range(max(start, 1), len(row))]
    return sum(terms) / len(terms)


def test_kl_of_logits_is_its_definition() -> None:
    base, steered = torch.randn(2, 3, 5, 31, dtype=torch.float64)
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2, [False, True, True, True, True]])
    found = ma.steering.kl_of_logits(base, steered, mask)
    wanted = [kl_by_hand(base[i, mask[i]], steered[i, mask[i]]) for i in range(3)]
    assert_close(found, torch.tensor(wanted, dtype=torch.float64), **EXACT)
    turned = [kl_by_hand(steered[i, mask[i]], base[i, mask[i]]) for i in range(3)]
    assert not torch.allclose(found, torch.tensor(turned, dtype=torch.float64), rtol=1e-2)  # KL(steered || base)
    padded = [kl_by_hand(base[i], steered[i]) for i in range(3)]
    assert not torch.allclose(found[1:], torch.tensor(padded[1:], dtype=torch.float64), rtol=1e-2)  # padding counted


def test_rows_of_one_text_share_its_base(monkeypatch: pytest.MonkeyPatch) -> None:
    base, steered = torch.randn(2, 5, 31, dtype=torch.float64), torch.randn(6, 5, 31, dtype=torch.float64)
    mask, text = torch.ones(6, 5, dtype=torch.bool), torch.tensor([0, 1, 0, 1, 0, 1])
    found = ma.steering.kl_of_logits(base, steered, mask, text)
    assert_close(found, ma.steering.kl_of_logits(base[text], steered, mask), **EXACT)
    assert not torch.allclose(found, ma.steering.kl_of_logits(base[text.flip(0)], steered, mask), rtol=1e-2)
    monkeypatch.setattr(side_effects, "NUMBERS", 2 * 31)  # two tokens at a time
    assert_close(ma.steering.kl_of_logits(base, steered, mask, text), found, **EXACT)


def test_equal_logits_give_exactly_nothing_and_impossible_tokens_no_share() -> None:
    base = torch.randn(2, 4, 31)
    mask = torch.ones(2, 4, dtype=torch.bool)
    assert torch.equal(ma.steering.kl_of_logits(base, base.clone(), mask), torch.zeros(2))
    steered = base + torch.randn(2, 4, 31)
    without = ma.steering.kl_of_logits(base, steered, mask)
    never = torch.full((2, 4, 1), -torch.inf)
    found = ma.steering.kl_of_logits(torch.cat([base, never], -1), torch.cat([steered, never], -1), mask)
    assert_close(found, without)  # and not the NaN of 0 * (-inf + inf)


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_kl_to_base_runs_both_models(model: HookedModel, vector: SteeringVector, batch_size: int) -> None:
    found = ma.steering.kl_to_base(model, TEXTS, lambda: vector.apply(model, 2.0), batch_size=batch_size)
    wanted = []
    for row in TEXTS:
        base = logits_of(model, row)
        with vector.apply(model, 2.0):
            wanted.append(kl_by_hand(base, logits_of(model, row)))
    assert_close(found, torch.tensor(wanted, dtype=torch.float64), **STATES)
    assert float(found.min()) > 0.01
    nothing = ma.steering.kl_to_base(model, TEXTS, lambda: vector.apply(model, 0.0), batch_size=batch_size)
    assert torch.equal(nothing, torch.zeros_like(nothing))


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_cross_entropy_is_its_definition(model: HookedModel, batch_size: int) -> None:
    found = ma.steering.cross_entropy(model, TEXTS, batch_size=batch_size)
    wanted = torch.tensor([loss_by_hand(model, row, 1) for row in TEXTS], dtype=torch.float64)
    assert_close(found, wanted, **STATES)
    assert_close(ma.steering.perplexity(model, TEXTS, batch_size=batch_size), wanted.exp(), **STATES)
    late = torch.tensor([loss_by_hand(model, row, 1, late=1) for row in TEXTS], dtype=torch.float64)
    assert not torch.allclose(found, late, rtol=1e-2)  # reading behind the token


def test_prompts_are_read_but_do_not_count(model: HookedModel) -> None:
    prompts, texts = [row[:1] for row in TEXTS], [row[1:] for row in TEXTS]
    assert_close(ma.steering.cross_entropy(model, texts, prompts=prompts), ma.steering.cross_entropy(model, TEXTS))
    prompts, texts = [row[:4] for row in TEXTS], [row[4:] for row in TEXTS]
    found = ma.steering.cross_entropy(model, texts, prompts=prompts)
    wanted = [loss_by_hand(model, TEXTS[i], 4) for i in (0, 2, 3)]
    assert_close(found[[0, 2, 3]], torch.tensor(wanted, dtype=torch.float64), **STATES)
    assert math.isnan(found[1])  # nothing stands behind its prompt
    whole = ma.steering.cross_entropy(model, TEXTS)
    assert not torch.allclose(found[[0, 2, 3]], whole[[0, 2, 3]], rtol=1e-2)  # the prompt counted
    alone = ma.steering.cross_entropy(model, [texts[0]])
    assert not torch.allclose(found[:1], alone, rtol=1e-2)  # the prompt not read


def test_few_logits_are_held_twice(model: HookedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = ma.steering.cross_entropy(model, TEXTS)
    monkeypatch.setattr(answers, "NUMBERS", 2 * model.info.d_vocab)
    assert_close(ma.steering.cross_entropy(model, TEXTS), wanted, **EXACT)


def test_texts_begin_as_their_tokenizer_begins_them(shared: object) -> None:
    tiny = ma.load("tiny")  # begins no text
    text, ids = "They say that the cow sees the lion.", tiny.tokenize("They say that the cow sees the lion.").tokens[0]
    found = ma.steering.cross_entropy(tiny, [text])
    assert_close(found, torch.tensor([loss_by_hand(tiny, ids.tolist(), 1)]), rtol=1e-5, atol=1e-5)  # float32
    split = ma.steering.cross_entropy(tiny, [" sees the lion."], prompts=["They say that the cow"])
    assert_close(split, torch.tensor([loss_by_hand(tiny, ids.tolist(), 5)]), rtol=1e-5, atol=1e-5)  # float32
    stories = ma.load(f"{shared}/models/stories260K")  # begins every text with <s>
    ids = stories.tokenize("Once upon a time").tokens[0].tolist()
    found = ma.steering.cross_entropy(stories, ["Once upon a time"])
    assert_close(found, torch.tensor([loss_by_hand(stories, ids, 1)]), rtol=1e-5, atol=1e-5)  # float32
    again = ma.steering.cross_entropy(stories, [ids])
    assert torch.equal(found, again)


def test_what_does_not_fit_is_refused(model: HookedModel, vector: SteeringVector) -> None:
    steering = ma.steering
    with pytest.raises(SettingError, match=r"texts\n  found: one text\n  fix: give a list of texts"):
        steering.cross_entropy(model, "one")
    with pytest.raises(SettingError, match=r"prompts\n  found: 1 for 4 texts\n  fix: give one prompt for each text"):
        steering.perplexity(model, TEXTS, prompts=[[1]])
    with pytest.raises(SettingError, match="ids behind a text, or a text behind ids"):
        steering.perplexity(model, ["a"], prompts=[[1]])
    with pytest.raises(SettingError, match=r"text 0\n  found: \[31\]\n  fix: give a text, or ids from 0 to 30"):
        steering.perplexity(model, [[31]])
    with pytest.raises(SettingError, match="this model has no tokenizer"):
        steering.perplexity(model, ["a"])
    with pytest.raises(SettingError, match=r"batch_size=0\n  found: not a count"):
        steering.perplexity(model, TEXTS, batch_size=0)
    with pytest.raises(SettingError, match=r"text 1\n  found: no tokens\n  fix: leave it out"):
        steering.kl_to_base(model, [[1], []], lambda: vector.apply(model))
    with pytest.raises(SettingError, match=r"found: a function that gives a NoneType"):
        steering.kl_to_base(model, [[1, 2]], lambda: None)  # type: ignore[arg-type,return-value]
    for texts, kind in ((None, "NoneType"), (3, "int")):
        with pytest.raises(SettingError, match=f"texts\n  found: a {kind}\n  fix: give a list of texts"):
            steering.perplexity(model, texts)  # type: ignore[arg-type]
    with pytest.raises(SettingError, match=r"fix: give a function that opens a block: lambda: vector.apply"):
        steering.kl_to_base(model, TEXTS, vector)  # type: ignore[arg-type]
    with pytest.raises(SettingError, match=r"logits to compare\n  found: base \[1, 2, 3\], steered \[2, 2, 3\]"):
        steering.kl_of_logits(torch.zeros(1, 2, 3), torch.zeros(2, 2, 3), torch.ones(2, 2, dtype=torch.bool))
    with pytest.raises(UnsupportedFeatureError, match="has an encoder"):
        steering.perplexity(families.hooked("bert"), [[1, 2]])
