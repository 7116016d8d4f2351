"""The training script of the bundled model: resuming, exporting, and what a batch is made of."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoTokenizer, GPT2LMHeadModel

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the scripts in data/ are not part of the package

from data.train import lexicon, model, sentences, tokenizer, train
from data.train.mixture import Mixture
from data.train.optimiser import Optimiser, orthogonal
from data.train.schedule import Phase
from mechattr.tasks.grammar import subject_verb

PROSE = [
    "The old king sat by the fire and told his daughter of the war.",
    "She said that he was good, and he said that she was kind.",
]
IN_TEMPLATES = {"great"}  # stands in the text of a training template, and is a filler of the test split elsewhere
KINDS = {"spans": 0.2, "tasks": 0.2, "lexicon": 0.2, "passage": 0.2, "around_word": 0.2}
PHASES = (
    Phase(steps=8, rows=4, length=16, rate=(0.0, 5e-3), kinds={"spans": 1.0}, span=(3, 5)),
    Phase(steps=12, rows=4, length=16, rate=(5e-3, 0.0), kinds=KINDS, span=(3, 5)),
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
    train.train(mixture, config, PHASES, tmp_path / "whole")
    train.train(mixture, config, PHASES, tmp_path / "parts", stop=11)
    train.train(mixture, config, PHASES, tmp_path / "parts")
    whole = load_file(tmp_path / "whole" / "checkpoint.safetensors")
    parts = load_file(tmp_path / "parts" / "checkpoint.safetensors")
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_a_run_resumed_without_its_optimiser_state_differs(
    mixture: Mixture, config: model.Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_state(path: Path, params: model.Parameters, optimiser: Optimiser) -> int:
        return train_restore(path, params, Optimiser(params))

    whole = train.train(mixture, config, PHASES, tmp_path / "whole")
    train.train(mixture, config, PHASES, tmp_path / "parts", stop=11)
    train_restore = train.restore
    monkeypatch.setattr(train, "restore", without_state)
    parts = train.train(mixture, config, PHASES, tmp_path / "parts")
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
    tokens = mixture.batch(PHASES[1], 0)[0][:, : config.n_positions]
    with torch.no_grad():
        ours, theirs = model.logits(params, config, tokens), exported(tokens).logits
    difference = ((ours - theirs).abs().max() / ours.abs().max()).item()
    assert (difference < 1e-5) is not wrong  # float32, two layers: rounding is near 1e-6


def test_a_row_of_spans_counts_only_what_can_be_copied(mixture: Mixture) -> None:
    tokens, weights = mixture.batch(PHASES[0], 5)
    for row, wanted in zip(tokens.tolist(), weights.tolist(), strict=True):
        for place, weight in enumerate(wanted, start=1):
            earlier = [i for i in range(1, place) if row[i - 1 : i + 1] == row[place - 1 : place + 1]]
            assert not weight or earlier, "a counted token follows the same token as it did before"


def test_no_test_filler_is_trained_on_in_task_sentences(mixture: Mixture, words: Tokenizer) -> None:
    train_words, test_words = set(sentences.words("train")), set(sentences.words("test"))
    held_out = {words.token_to_id(f"Ġ{word}") for word in test_words - train_words - IN_TEMPLATES} - {None}
    phase = Phase(steps=1, rows=50, length=100, rate=(0.0, 0.0), kinds={"tasks": 1.0})
    tokens, weights = mixture.batch(phase, 0)
    task = tokens[:, 1:][weights != 1.0]  # prose rows before a sentence have weight 1
    assert task.numel() > 1000
    assert not held_out & set(task.tolist())


def test_the_lexicon_asks_for_no_answer_of_a_task() -> None:
    rng = random.Random(0)
    verbs = {form for pairs in subject_verb.VERBS.values() for pair in pairs for form in pair}
    phrases = [" ".join(lexicon.draw(rng)) for _ in range(5000)]
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
