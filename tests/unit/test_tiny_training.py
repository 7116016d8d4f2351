"""The training script of the bundled model: resuming, exporting, and what a batch is made of."""

from __future__ import annotations

import random
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch.testing import assert_close
from transformers import AutoTokenizer, GPT2LMHeadModel

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the scripts in data/ are not part of the package

from data.train import lexicon, model, sentences, tokenizer, train
from data.train.mixture import Mixture
from data.train.optimiser import Optimiser, orthogonal
from data.train.schedule import FRONTED, RUNS, Phase, Rate, Run
from mechattr.tasks.grammar import subject_verb

PROSE = [
    "The old king sat by the fire and told his daughter of the war.",
    "She said that he was good, and he said that she was kind.",
]
KINDS = dict.fromkeys(("spans", "tasks", "lexicon", "rare_words", "names", "years", "passage", "around_word"), 1.0)
RUN = Run(
    phases=(
        Phase(steps=8, rows=4, length=16, kinds={"spans": 1.0}, span=(3, 5)),
        Phase(steps=12, rows=8, length=16, kinds=KINDS, span=(3, 5)),
    ),
    rates=(Rate(steps=5, first=0.0, last=5e-3), Rate(steps=15, first=5e-3, last=0.0)),
    averaged=(9, 20),
)


@pytest.fixture(scope="module")
def words() -> Tokenizer:
    return tokenizer.train(PROSE * 300, 3000)


@pytest.fixture(scope="module")
def mixture(words: Tokenizer) -> Mixture:
    books = np.concatenate([[0, *words.encode(text * 5).ids] for text in PROSE])
    return Mixture(words, books, seed=3)


@pytest.fixture(scope="module")
def config(words: Tokenizer) -> model.Config:
    return model.Config(vocab_size=words.get_vocab_size(), n_positions=16, n_embd=8, n_layer=2, n_head=2)


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums in one order, so that equal means equal to the last bit
    yield
    torch.set_num_threads(threads)


def test_a_resumed_run_equals_an_uninterrupted_one(mixture: Mixture, config: model.Config, tmp_path: Path) -> None:
    train.train(mixture, config, RUN, tmp_path / "whole")
    train.train(mixture, config, RUN, tmp_path / "parts", stop=11)
    train.train(mixture, config, RUN, tmp_path / "parts")
    for file in ("checkpoint.safetensors", "model/model.safetensors"):
        whole, parts = load_file(tmp_path / "whole" / file), load_file(tmp_path / "parts" / file)
        assert whole.keys() == parts.keys()
        assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_the_model_is_the_mean_of_the_kept_steps(mixture: Mixture, config: model.Config, tmp_path: Path) -> None:
    train.train(mixture, config, RUN, tmp_path)
    early, late, final = (
        load_file(tmp_path / name / "model.safetensors")["transformer.wte.weight"]
        for name in ("step-9", "step-20", "model")
    )
    assert not torch.equal(early, late)
    assert_close(final, (early + late) / 2, rtol=1e-6, atol=1e-8)  # one rounding in float32


def test_a_run_resumed_without_its_optimiser_state_differs(
    mixture: Mixture, config: model.Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_state(path: Path, params: model.Parameters, optimiser: Optimiser) -> int:
        return train_restore(path, params, Optimiser(params))

    train.train(mixture, config, RUN, tmp_path / "whole")
    train.train(mixture, config, RUN, tmp_path / "parts", stop=11)
    train_restore = train.restore
    monkeypatch.setattr(train, "restore", without_state)
    train.train(mixture, config, RUN, tmp_path / "parts")
    whole, parts = (load_file(tmp_path / name / "model/model.safetensors") for name in ("whole", "parts"))
    assert not all(torch.equal(whole[name], parts[name]) for name in whole)


@pytest.mark.parametrize("wrong", [False, True], ids=["export", "query and key exchanged"])
def test_the_exported_model_gives_the_same_logits(
    mixture: Mixture, config: model.Config, tmp_path: Path, wrong: bool
) -> None:
    params = {name: 8 * value.detach() for name, value in model.initial(config, seed=1).items()}  # far from uniform
    model.export(params, config, tmp_path)
    exported = GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    if wrong:
        weight = exported.transformer.h[0].attn.c_attn.weight.data
        query, key, value = weight.chunk(3, dim=1)
        weight.copy_(torch.cat([key, query, value], dim=1))
    tokens = mixture.batch(RUN.phases[1], 0)[0][:, : config.n_positions]
    with torch.no_grad():
        ours, theirs = model.logits(params, config, tokens), exported(tokens).logits
    difference = ((ours - theirs).abs().max() / ours.abs().max()).item()
    assert (difference < 1e-5) is not wrong  # float32, two layers: rounding is near 1e-6


@pytest.mark.parametrize("name", sorted(RUNS))
def test_a_schedule_gives_every_step_a_phase_and_a_rate(name: str) -> None:
    run = RUNS[name]
    assert run.steps == sum(rate.steps for rate in run.rates)
    assert run.phase(run.steps - 1) is run.phases[-1]
    assert run.rate(0) == 0.0 < run.rate(run.steps - 1) < 1e-5, "warmed up from nothing, and cooled down"
    with pytest.raises(IndexError, match="ends 0 steps before this one"):
        run.rate(run.steps)


def test_a_row_of_spans_counts_only_what_can_be_copied(mixture: Mixture) -> None:
    tokens, weights = mixture.batch(RUN.phases[0], 5)
    for row, wanted in zip(tokens.tolist(), weights.tolist(), strict=True):
        for place, weight in enumerate(wanted, start=1):
            earlier = [i for i in range(1, place) if row[i - 1 : i + 1] == row[place - 1 : place + 1]]
            assert not weight or earlier, "a counted token follows the same token as it did before"


@pytest.mark.parametrize("kind", sorted(FRONTED))
def test_no_test_filler_of_a_task_is_trained_on_in_its_sentences(mixture: Mixture, words: Tokenizer, kind: str) -> None:
    grammar = sentences.GRAMMARS[kind if kind in sentences.GRAMMARS else "ioi"]
    rng = random.Random(0)
    drawn = [mixture._sentence(rng, kind, "") for _ in range(500)]
    seen = set(re.findall(r"\w+", " ".join(words.decode(prompt + answer) for prompt, answer in drawn)))
    assert seen & set(grammar.words("train"))
    assert not seen & (set(grammar.words("test")) - set(grammar.words("train")))


def test_the_lexicon_asks_for_no_answer_of_a_task() -> None:
    rng = random.Random(0)
    verbs = {form for pairs in subject_verb.VERBS.values() for pair in pairs for form in pair}
    draws = (lexicon.draw, lexicon.named)
    phrases = ["".join(draw(rng, lexicon.ALL_WORDS)) for draw in draws for _ in range(5000)]
    seen = {word for phrase in phrases for word in phrase.split()}
    assert {"himself", "herself", "them", "it"} <= seen
    assert not seen & (verbs | {"he", "she"})
    assert "Ruth" in seen, "the check sees words of the test split"


def test_orthogonal_brings_all_singular_values_near_one() -> None:
    stack = torch.randn(3, 8, 24, generator=torch.Generator().manual_seed(0))
    assert torch.linalg.svdvals(stack).std() > 0.5
    values = torch.linalg.svdvals(orthogonal(stack))
    assert values.min() > 0.6 and values.max() < 1.3  # the iteration does not converge to one but into this band


def test_the_tokenizer_splits_years_and_keeps_task_words_whole(words: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(words, tmp_path, 16)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.convert_ids_to_tokens(loaded(" the year 1732")["input_ids"])[-2:] == ["Ġ17", "32"]
    assert [len(loaded(f" {name}")["input_ids"]) for name in ("Elizabeth", "Catherine", "shepherds")] == [1, 1, 1]
    text = "  Tabs\tand\n\nlines, naïve café -- 12345 'tis <|endoftext|> end. "
    assert loaded.decode(loaded(text)["input_ids"]) == text
