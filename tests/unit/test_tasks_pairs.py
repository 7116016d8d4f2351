"""Tasks from the user's own pairs: what is accepted, and the text of every error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mechattr import tasks
from mechattr.errors import (
    AlignmentError,
    AnswerError,
    EmptyTaskError,
    MechattrError,
    SettingError,
    UnknownNameError,
    UnknownTaskError,
)
from mechattr.models.plain import HookedPlain, plain_model
from mechattr.models.plain_config import PlainConfig
from mechattr.tasks.metrics import Metric

PIECES = (
    "The",
    " cat",
    " dog",
    " ele",
    "phant",
    " sat",
    " on",
    " it",
    " mat",
    " 17",
    "32",
    "33",
    "01",
    " he",
    " she",
    ":",
    ".",
)


@pytest.fixture(scope="module")
def model() -> HookedPlain:
    """A plain model whose tokenizer knows the pieces above; every other character is a token of its own."""
    pattern = "|".join(sorted((piece.replace(".", r"\.") for piece in PIECES), key=len, reverse=True)) + r"|[\s\S]"
    letters = [chr(code) for code in range(32, 127)]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(["<unk>", *PIECES, *letters]))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    return plain_model(PlainConfig.gpt2_like(n_layers=1, d_vocab=len(fast)), tokenizer=fast)


PAIR = {"clean": "The cat sat", "corrupt": "The dog sat", "answer": " on", "foil": " it"}


def ids(model: HookedPlain, *pieces: str) -> list[int]:
    return [model.tokenizer.get_vocab()[piece] for piece in pieces]


def test_texts_and_ids_make_the_same_task(model: HookedPlain) -> None:
    text = tasks.from_pairs(model, [PAIR | {"spans": {"WHO": [4, 7]}, "corrupt_spans": {"WHO": [4, 7]}}])
    by_id = tasks.from_pairs(
        model,
        [
            {
                "clean_tokens": ids(model, "The", " cat", " sat"),
                "corrupt_tokens": ids(model, "The", " dog", " sat"),
                "answer": ids(model, " on")[0],
                "foil": " it",
                "spans": {"WHO": [1, 2]},
            }
        ],
    )
    assert text.hash() == by_id.hash()
    assert text.clean.strings == by_id.clean.strings == (("The", " cat", " sat"),)
    assert text.spans == ({"WHO": (1, 2), "END": (2, 3)},)
    assert text.answers.tolist() == ids(model, " on")
    assert text.foils is not None
    assert text.foils.tolist() == ids(model, " it")


def test_a_jsonl_file_has_the_same_keys(model: HookedPlain, tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(PAIR) + "\n\n" + json.dumps(PAIR | {"answer": " mat"}) + "\n", encoding="utf-8")
    task = tasks.from_pairs(model, path)
    assert task.hash() == tasks.from_pairs(model, [PAIR, PAIR | {"answer": " mat"}]).hash()
    assert tasks.from_pairs(model, str(path)).hash() == task.hash()


def test_sequence_log_probability_reads_the_answer_behind_the_prompt(model: HookedPlain) -> None:
    rows = [
        PAIR | {"answer": " on it mat"},
        PAIR | {"clean": "The cat sat on", "corrupt": "The dog sat on", "answer": " mat"},
    ]
    task = tasks.from_pairs(model, rows, metric="sequence_log_probability")
    assert task.clean.strings == (("The", " cat", " sat", " on", " it"), ("The", " cat", " sat", " on"))
    assert [spans["END"] for spans in task.spans] == [(2, 3), (3, 4)]
    found = task.metric(model.run(task.clean).logits, task.clean)
    for row, text, answer in ((0, "The cat sat", (" on", " it", " mat")), (1, "The cat sat on", (" mat",))):
        expected = torch.zeros((), dtype=torch.float64)
        for token in answer:  # one token after the other, each from its own run
            expected = expected + model.run(model.tokenize(text)).logits[0, -1].log_softmax(-1)[ids(model, token)[0]]
            text += token
        torch.testing.assert_close(found[row], expected, rtol=0, atol=1e-12)  # float64 logits of order ten
        last_only = model.run(model.tokenize(text)).logits[0, -1].log_softmax(-1)[ids(model, " mat")[0]]
        assert abs(last_only - expected) > 1e-3  # negative control: the row read behind the whole answer


def test_sets_of_answers_make_a_probability_difference(model: HookedPlain) -> None:
    row = {"clean": "The cat 1732 on 17", "corrupt": "The cat 1701 on 17", "answer": ["33"], "foil": ["32", "01"]}
    task = tasks.from_pairs(model, [row], metric="probability_difference")
    p = model.run(task.clean).logits[0, -1].softmax(-1)
    expected = p[ids(model, "33")].sum() - p[ids(model, "32", "01")].sum()
    found = task.metric(model.run(task.clean).logits, task.clean)
    torch.testing.assert_close(found[0], expected, rtol=0, atol=1e-14)  # sums of three probabilities


def test_a_metric_of_ones_own(model: HookedPlain) -> None:
    own = Metric(name="first_logit", unit="logit", function=lambda logits, batch: logits[:, 0, 0] + 0 * batch.example)
    task = tasks.from_pairs(model, [PAIR], metric=own)
    assert task.metric is own
    assert task.settings["metric"] == "first_logit"


def error(model: HookedPlain, rows: Any, kind: type[MechattrError], **options: Any) -> str:
    with pytest.raises(kind) as caught:
        tasks.from_pairs(model, rows, **options)
    return str(caught.value)


def test_unequal_length_shows_both_tokenisations_side_by_side(model: HookedPlain) -> None:
    text = error(model, [PAIR, PAIR | {"corrupt": "The elephant sat"}], AlignmentError)
    assert text.splitlines() == [
        "pair 1: a clean and a corrupt prompt of the same number of tokens",
        "  found: 3 and 4 tokens (* where they differ)",
        "           clean    corrupt",
        "       0 | 'The'    'The'",
        "       1 * ' cat'   ' ele'",
        "       2 * ' sat'   'phant'",
        "       3 * (none)   ' sat'",
        "  fix: exchange words for words that have equally many tokens under this tokenizer",
    ]
    rows = [{"clean_tokens": [1, 2], "corrupt_tokens": [1], "answer": 3, "foil": 4}]
    assert "2 and 1 tokens" in error(model, rows, AlignmentError)


def test_several_tokens_under_a_single_token_metric_point_to_the_sequence_metric(model: HookedPlain) -> None:
    text = error(model, [PAIR | {"answer": " elephant"}], AnswerError)
    assert text.splitlines() == [
        "pair 0: answer ' elephant' as one token, under metric='logit_difference'",
        "  found: 2 tokens: ' ele', 'phant'",
        '  fix: use metric="sequence_log_probability", which takes answers of several tokens, or a one-token answer',
    ]
    assert "foil ' elephant' as one token" in error(model, [PAIR | {"foil": " elephant"}], AnswerError)
    assert len(tasks.from_pairs(model, [PAIR | {"answer": " elephant"}], metric="sequence_log_probability")) == 1


@pytest.mark.parametrize(
    ("change", "kind", "parts"),
    [
        ({"answer": "on"}, AnswerError, ("answer 'on' after 'The cat sat'", "'saton'", "write the answer as ' on'")),
        ({"clean": "The cat ele", "corrupt": "The dog ele", "answer": "phant"}, AnswerError, ("no space between",)),
        ({"foil": " on"}, AnswerError, ("an answer and a foil that differ", "both have ' on'")),
        ({"answer": [" on", " mat"]}, AnswerError, ("a set of 2", 'metric="probability_difference"')),
        ({"spans": {"WHO": [4, 6]}}, AlignmentError, ("span 'WHO', characters 4 to 6: 'ca'", "tokens [' cat']")),
        ({"spans": {"WHO": [40, 46]}}, AlignmentError, ("no token there; the prompt has 11 characters",)),
        ({"spans": [4, 7]}, SettingError, ("pair 0: spans", "give a mapping")),
        ({"spans": {"WHO": "cat"}}, SettingError, ("pair 0: span 'WHO'", "give two whole numbers")),
        (
            {"spans": {"WHO": [4, 7]}, "corrupt_spans": {"WHO": [8, 11]}},
            AlignmentError,
            ("span 'WHO' on the same positions", "positions (1, 2) in the clean and (2, 3) in the corrupt"),
        ),
        ({"answer": 10**6}, SettingError, ("token id 1000000", "a vocabulary of ids 0 to")),
        ({"answer": ""}, SettingError, ("pair 0: answer", "give text, a token id, or a list of these")),
        ({"answer": 1.5}, SettingError, ("pair 0: answer",)),
        ({"clean": ""}, SettingError, ("pair 0: clean", "give text that is not empty")),
        ({"fiol": " it"}, UnknownNameError, ("key 'fiol'", "did you mean 'foil'")),
        ({"clean_tokens": [1], "corrupt_tokens": [1]}, SettingError, ("give clean and corrupt, or clean_tokens",)),
    ],
)
def test_bad_pairs_get_an_error_that_says_what_to_do(
    model: HookedPlain, change: dict[str, Any], kind: type[MechattrError], parts: tuple[str, ...]
) -> None:
    text = error(model, [PAIR | change], kind)
    for part in parts:
        assert part in text


def test_a_prompt_that_ends_with_a_space_is_told_to_drop_it(shared: Path) -> None:
    import mechattr as ma

    small = ma.load(shared / "models" / "stories260K")
    row = {"clean": "The girl saw a ", "corrupt": "The girl had a ", "answer": "the", "foil": "they"}
    with pytest.raises(AnswerError, match="end the prompt without a space and write the answer as ' the'"):
        tasks.from_pairs(small, [row])


def test_bad_files_and_lists(model: HookedPlain, tmp_path: Path) -> None:
    assert "no pair" in error(model, [], EmptyTaskError)
    assert "pair 0\n  found: a str" in error(model, ["The cat"], SettingError)
    assert "no such file" in error(model, tmp_path / "none.jsonl", UnknownTaskError)
    bad = tmp_path / "bad.jsonl"
    bad.write_text(json.dumps(PAIR) + "\n{oops\n", encoding="utf-8")
    assert "line 2 of pairs file" in error(model, bad, SettingError)
    bad.write_bytes(b"\xff\xfe\x00")
    assert "not UTF-8 text" in error(model, bad, SettingError)
    bad.write_text("\n", encoding="utf-8")
    assert "no pair" in error(model, bad, EmptyTaskError)


def test_a_contrast_needs_a_foil_and_a_log_probability_does_not(model: HookedPlain) -> None:
    row = {key: value for key, value in PAIR.items() if key != "foil"}
    text = error(model, [row], AnswerError)
    assert "a pair without a foil" in text
    assert "metric='log_probability'" in text
    task = tasks.from_pairs(model, [row], metric="log_probability")
    assert task.foils is None
    assert len(task.rows([0])) == 1
    assert task.hash()
    assert "did you mean 'log_probability'" in error(model, [row], UnknownNameError, metric="log_prob")
