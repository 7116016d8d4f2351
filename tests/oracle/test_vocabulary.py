"""Tokens that no text produces or no training reached: planted, and told apart from the rest."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from huggingface_hub import try_to_load_from_cache
from letters_model import copying
from matplotlib.figure import Figure
from safetensors import safe_open

import mechattr as ma
from mechattr.errors import SettingError
from mechattr.models import HookedHF
from mechattr.models.plain import plain_model
from mechattr.models.plain_config import PlainConfig
from mechattr.vocabulary import (
    INDICATORS,
    UnderTrained,
    communities,
    consistent,
    indicator,
    never_in_text,
    repetition,
    round_trips,
    suspects,
    undertrained,
)
from mechattr.vocabulary.verify import PLACE, STEPS, WORDS, prompts


def spelling() -> HookedHF:
    """A tokenizer of eight tokens with merges, and a model with more rows than tokens."""
    return HookedHF(families.hooked("llama").model, tokenizer=families.tokenizer())


def test_round_trips_tell_what_a_text_can_produce() -> None:
    found = {trip.id: trip for trip in round_trips(spelling(), range(9))}
    assert {i: found[i].category for i in found} == {
        0: "special", 1: "special", 2: "special", 3: "ok", 4: "ok", 5: "ok", 6: "ok", 7: "ok", 8: "missing",
    }  # fmt: skip
    assert found[5].text == " a" and found[5].encoded == (5,) and found[5].reachable and not found[8].reachable
    assert len(round_trips(spelling())) == 61


def test_tokens_whose_text_gives_others_are_unreachable() -> None:
    class Awkward:
        """`ab` is one token, but texts are cut into letters; `q` is a byte that is no character."""

        all_special_ids = ()
        words = ("a", "b", "ab", "c", "C", "q", "«")

        def __len__(self) -> int:
            return len(self.words)

        def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
            return {
                "input_ids": [self.words.index("c" if letter == "C" else letter) for letter in text if letter != "�"]
            }

        def decode(self, ids: Sequence[int], **_: Any) -> str:
            return "".join("�" if self.words[i] == "q" else self.words[i] for i in ids)

        def convert_ids_to_tokens(self, token: int) -> str:
            return self.words[token]

        def get_vocab(self) -> dict[str, int]:
            return {word: i for i, word in enumerate(self.words)}

    model = plain_model(PlainConfig.gpt2_like(d_vocab=7), tokenizer=Awkward())
    found = [trip.category for trip in round_trips(model)]
    assert found == ["ok", "ok", "unreachable_multi", "ok", "unreachable_single", "undecodable", "ok"]
    assert consistent(model, [0, 1, 3]) and not consistent(model, [0, 2])


def test_bytes_that_utf_8_never_uses_are_known_to_be_unused() -> None:
    model = ma.load("tiny")
    found = never_in_text(model, round_trips(model))
    assert model.tokenizer.convert_ids_to_tokens(found) == ["À", "Á", *"õö÷øùúûüýþÿ"]
    assert not set(found) & set(
        model.tokenizer("naïve Ørsted 日本 🙂 \xf5")["input_ids"]
    )  # characters have other bytes
    result = undertrained(model, verify=False)  # tied weights, which need some
    assert result.settings["unused"] == found and result.settings["indicator"] == "cosine"
    values = result.tensors["indicator"].values
    below = [i for i in result.top(2560) if float(values[i]) <= float(values[found].max())]
    assert result.calibration["known"] == 13 and result.calibration["no_higher"] == len(below)
    assert undertrained(model, by="input_norm", unused=[], verify=False).calibration == {}


@pytest.mark.parametrize("name", INDICATORS)
def test_planted_rows_have_the_lowest_indicator(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(50, 16, generator=generator, dtype=torch.float64) + 0.3
    planted, known = [3, 17, 40], [48, 49]
    away = torch.randn(16, generator=generator, dtype=torch.float64)
    embedding = rows.clone()
    embedding[planted + known] *= 1e-3
    out = rows.clone()
    for i, token in enumerate(planted + known):
        out[token] = away * (1 + 1e-3 * i)
    values = indicator(name, embedding, out, known)
    assert set(values.argsort()[:5].tolist()) == {*planted, *known}
    assert set(indicator(name, rows, rows, known).argsort()[:5].tolist()) != {*planted, *known}  # nothing planted


def test_indicators_are_their_formulas() -> None:
    rows = torch.randn(9, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    mean = rows[[7, 8]].mean(0)
    close = {"rtol": 0, "atol": 1e-12}  # float64
    expected = 1 - rows @ mean / rows.norm(dim=1) / mean.norm()
    torch.testing.assert_close(indicator("cosine", rows, rows, [7, 8]), expected, **close)
    torch.testing.assert_close(indicator("distance", rows, rows, [7, 8]), (rows - mean).norm(dim=1), **close)
    torch.testing.assert_close(indicator("input_norm", rows, rows), rows.norm(dim=1), **close)
    centred = rows - rows.mean(0)
    torch.testing.assert_close(
        indicator("cosine_centred", rows, rows, [7, 8]), indicator("cosine", rows, centred, [7, 8]), **close
    )
    first = torch.linalg.eigh(centred.mT @ centred).eigenvectors[:, -1:]
    found = indicator("cosine_without_first", rows, rows, [7, 8])
    without = rows - rows @ first @ first.mT
    torch.testing.assert_close(found, indicator("cosine", rows, without, [7, 8]), **close)
    wrong = centred - centred @ first @ first.mT  # taken out of centred rows
    with pytest.raises(AssertionError):
        torch.testing.assert_close(found, indicator("cosine", rows, wrong, [7, 8]), **close)
    parallel = torch.stack([mean * 3, mean * 0.1, -mean])
    assert indicator("cosine", parallel, parallel, [0, 1]).tolist() == pytest.approx([0, 0, 2], abs=1e-12)


def test_prompts_keep_the_place_of_the_token() -> None:
    assert prompts(0) == f"Repeat: {PLACE}. Answer:" and prompts(25).count("Repeat:") == 26
    assert prompts(2).startswith(f"Repeat: {WORDS[0]}. Answer: {WORDS[0]}.")


def test_repetition_is_the_largest_probability_on_the_greedy_way() -> None:
    model = ma.load("tiny")
    ids = [model.tokenizer(f" {word}", add_special_tokens=False)["input_ids"][0] for word in ("river", "house")]
    found = repetition(model, ids, shots=(0, 2), batch_size=1)
    for token, value in zip(ids, found, strict=True):
        best = 0.0
        for shots in (0, 2):
            before, after = prompts(shots).split(f" {PLACE}")
            row = [*model.tokenize(before).tokens[0].tolist(), token]
            row += model.tokenizer(after, add_special_tokens=False)["input_ids"]
            for _ in range(STEPS):
                p = model.run(ma.models.Batch.of(torch.tensor(row))).logits[0, -1].softmax(-1)
                best = max(best, float(p[token]))
                row.append(int(p.argmax()))
        assert float(value) == pytest.approx(best, rel=1e-5)
    torch.testing.assert_close(repetition(model, ids, shots=(0, 2)), found, rtol=1e-5, atol=1e-9)  # float32 batches


def test_planted_tokens_come_first(tmp_path: Path) -> None:
    model = spelling()
    found = undertrained(model, by="input_norm", share=0.4, shots=[0], verify=False)
    assert found.counts == {"ok": 5, "special": 3, "missing": 53} and found.settings["unused"] == list(range(8, 61))
    assert found.candidates() == found.top(len(found.candidates()))
    norms = model.weight("embed.W_E").double().norm(dim=1)
    assert found.top(8) == sorted(range(8), key=lambda i: float(norms[i]))
    found.save(tmp_path / "found")
    again = ma.open(tmp_path / "found")
    assert isinstance(again, UnderTrained) and again.to_pandas().equals(found.to_pandas())
    assert "<table" in found._repr_html_() and len(found.to_pandas(reachable=False)) == 61
    verified = undertrained(ma.load("tiny"), by="input_norm", share=0.002, shots=[0])
    asked = verified.candidates() + verified.control()
    assert verified.to_pandas()["probability"].notna().sum() == len(asked) == len(set(asked))
    assert set(verified.control()) == set(verified.top(2560)[-20:])
    verified.plot(Figure().add_subplot())


def test_a_planted_cluster_is_found_and_nothing_else() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(80, 12, generator=generator)
    planted = [5, 11, 23, 42, 61]
    rows[planted] = torch.randn(12, generator=generator) + 0.01 * torch.randn(5, 12, generator=generator)
    groups = communities(rows, range(80), neighbours=3)
    assert planted in groups and sorted(i for group in groups for i in group) == list(range(80))
    asked: list[int] = []

    def fails(tokens: Sequence[int]) -> list[bool]:
        asked.extend(tokens)
        return [token in planted for token in tokens]

    found = suspects(rows, range(80), fails, neighbours=3)
    assert found.tokens == tuple(planted) and len(asked) == len(set(asked)) == found.tested
    assert suspects(rows, range(80), lambda tokens: [False] * len(tokens)).tokens == ()


def test_wrong_input_is_refused() -> None:
    tiny = ma.load("tiny")
    cases: list[tuple[dict[str, Any], str]] = [
        ({"by": "normm"}, r"indicator 'normm'\n  found: no such indicator\n  fix: did you mean 'input_norm'"),
        ({"share": 0}, "share=0"),
        ({"unused": [99999], "by": "cosine"}, "unused token 99999"),
        ({"by": "cosine", "unused": []}, "no ids that are known to be unused"),
        ({"by": "input_norm", "shots": [500]}, "a context of 128 tokens"),
    ]
    for settings, text in cases:
        with pytest.raises(SettingError, match=text):
            undertrained(tiny, **settings)
    with pytest.raises(SettingError, match="round trips of tokens"):
        round_trips(families.hooked("gpt2"))
    with pytest.raises(SettingError, match="neighbours=0"):
        communities(torch.zeros(4, 2), range(4), neighbours=0)
    assert copying().tokenizer is not None


@pytest.fixture(scope="session")
def gpt2_rows() -> torch.Tensor:
    """The embedding of GPT-2 small, where it lies on this machine."""
    for name in ("openai-community/gpt2", "gpt2"):
        found = try_to_load_from_cache(name, "model.safetensors")
        if isinstance(found, str):
            with safe_open(found, framework="pt") as file:
                key = next(key for key in file.keys() if key.endswith("wte.weight"))  # noqa: SIM118 (no mapping)
                return file.get_tensor(key)
    pytest.skip("needs the weights of GPT-2 small in the cache of the model hub")


def test_gpt2_has_the_published_indicators(gpt2_rows: torch.Tensor) -> None:
    """Numbers of the report that accompanies Land and Bartolo (2024): 177 to 187 are bytes that UTF-8 never uses."""
    values = indicator("cosine", gpt2_rows, gpt2_rows, range(177, 188))
    published = {40241: 0.00143921, 30905: 0.00145763, 39752: 0.00147873, 30208: 0.00763935, 37574: 0.036516}
    for token, value in published.items():
        assert float(values[token]) == pytest.approx(value, rel=2e-3)  # they took the mean in float32
    assert float(values.mean()) == pytest.approx(0.536, abs=2e-3) and float(values.std()) == pytest.approx(
        0.070, abs=2e-3
    )
    assert float(values.quantile(0.02)) == pytest.approx(0.424, abs=4e-3)  # of reachable tokens there, of all here
    wrong = indicator("cosine", gpt2_rows, gpt2_rows, range(100, 111))  # bytes that texts have
    assert float(wrong[40241]) != pytest.approx(published[40241], rel=0.1)
