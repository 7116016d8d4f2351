"""The word-level models of the agreement benchmark: what they are trained on, and what they learned."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

import mechattr as ma

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the scripts in data/ are not part of the package

from data.train import agreement as training
from mechattr.tasks.grammar import agreement

MODELS = ("agreement-gpt2", "agreement-llama")


@pytest.fixture(scope="module")
def held_out() -> set[tuple[str, ...]]:
    return {sample.words for sample in agreement.agreement_samples(training.HELD_OUT, training.SEED)}


def test_no_training_sentence_has_a_prompt_of_the_benchmark(held_out: set[tuple[str, ...]]) -> None:
    steps = range(12)
    drawn = [sample for step in steps for sample in training.batch(step, held_out)]
    assert not {sample.words for sample in drawn} & held_out
    careless = {sample.words for step in steps for sample in training.batch(step, set())}
    assert careless & held_out  # negative control: what is left out would be there


def test_the_verb_weighs_most_and_padding_nothing() -> None:
    words = training.tokenizer()
    samples = list(agreement.agreement_samples(20, 1))
    tokens, weights = training.rows_of(samples, words)
    for row, sample in enumerate(samples):
        targets = words.convert_ids_to_tokens(tokens[row, 1:].tolist())
        n = len(sample.words)
        assert targets[: n + 1] == [*sample.words, sample.target]
        assert weights[row].tolist() == pytest.approx([training.OTHERS] * n + [1.0] + [0.0] * (len(targets) - n - 1))
    assert (tokens[:, 0] == words.bos_token_id).all()


def test_every_word_is_one_token() -> None:
    words = training.tokenizer()
    ids = [words(word, add_special_tokens=False)["input_ids"] for word in agreement.words()]
    assert all(len(found) == 1 and found != [words.unk_token_id] for found in ids)
    assert words("The zebra", add_special_tokens=False)["input_ids"][1] == words.unk_token_id  # negative control


@pytest.mark.parametrize("style", ["gpt2", "llama"])
def test_a_resumed_run_equals_an_uninterrupted_one(style: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"ROWS": 8, "STRICT": 6, "HELD_OUT": 40, "SAVE_EVERY": 2, "STEPS": 3}.items():
        monkeypatch.setattr(training, name, value)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    training.train(style, whole, 3)
    training.train(style, parts, 3, stop=2)
    training.train(style, parts, 3)
    for name in ("model.safetensors", "README.md", "SHA256SUMS"):
        assert (whole / "model" / name).read_bytes() == (parts / "model" / name).read_bytes()
    first = load_file(whole / "model" / "model.safetensors")
    training.train(style, tmp_path / "other", 3, stop=2)
    second = load_file(tmp_path / "other" / "model" / "model.safetensors")
    with pytest.raises(AssertionError):  # negative control: one step less
        assert_close(first, second, rtol=0, atol=0)


@pytest.mark.parametrize("name", MODELS)
def test_bundled_models_are_what_their_cards_say(name: str, root: Path) -> None:
    folder = root / "data/models" / name
    sums = dict(reversed(line.split("  ")) for line in (folder / "SHA256SUMS").read_text().splitlines())
    assert sums.keys() == {path.name for path in folder.iterdir()} - {"SHA256SUMS"}
    for file, digest in sums.items():
        assert hashlib.sha256((folder / file).read_bytes()).hexdigest() == digest
    assert (folder / "model.safetensors").stat().st_size < 1_000_000
    measured = json.loads((folder / "metrics.json").read_text())["accuracy"]
    assert measured["all"] >= 0.99
    assert min(value for name, value in measured.items() if "same" in name or "opposite" in name) >= 0.99
    card = (folder / "README.md").read_text()
    assert all(f"| {value:.4f} |" in card for value in measured.values())
    model = ma.load(name)
    assert (model.info.n_layers, model.info.n_heads, model.info.d_model) == (3, 4, 64)
    assert model.info.n_kv_heads == (2 if name == "agreement-llama" else 4)
    assert model.tokenize(["The clerk"]).strings == (("<s>", "The", "clerk"),)


@pytest.mark.parametrize("name", MODELS)
def test_bundled_models_follow_the_subject_past_attractors(name: str) -> None:
    samples = agreement.agreement_samples(320, training.SEED)
    model = ma.load(name)
    found = ma.evaluation.evidence_benchmark(model, samples, {}, batch_size=320)
    assert found.accuracy >= 0.99
    # negative control: the number of the last noun would be wrong wherever it is the opposite one
    nearest = sum(sample.factors["attractor_number"] != "opposite" for sample in samples) / len(samples)
    assert nearest < 0.7
    opposite = [sample for sample in samples if sample.factors["attractor_number"] == "opposite"]
    batch = model.tokenize([sample.text for sample in opposite])
    last = model.run(batch).logits[torch.arange(len(opposite)), batch.columns(-1)]
    ids = torch.tensor([model.tokenizer.convert_tokens_to_ids([s.target, s.foil]) for s in opposite])
    right, wrong = last.gather(1, ids).T
    assert (right > wrong).double().mean() >= 0.99
