"""Tasks: what generators align, what they refuse, and how positions, parts and hashes of a task behave."""

from __future__ import annotations

import copy
import dataclasses
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import mechattr as ma
from mechattr import tasks
from mechattr.errors import (
    AlignmentError,
    EmptyTaskError,
    SettingError,
    UnknownNameError,
    UnknownTaskError,
    UnsupportedFeatureError,
)
from mechattr.models.base import Batch
from mechattr.models.plain import HookedPlain, plain_model
from mechattr.models.plain_config import PlainConfig
from mechattr.tasks.grammar import gendered_pronoun, greater_than, ioi, subject_verb

TEXT_TASKS = ("ioi", "greater_than", "subject_verb", "gendered_pronoun")
# A leading space belongs to its word, as in byte-level tokenizers; numbers are pairs of digits; "Oliver" and "duchess"
# are cut in two.
PIECES = r" Ol(?=iver)|iver| duch(?=ess)|ess| ?[A-Za-z]+| ?\d\d|\s|[^\sA-Za-z\d]"


def word_tokenizer(bos: bool = False) -> PreTrainedTokenizerFast:
    splitter = pre_tokenizers.Split(Regex(PIECES), behavior="isolated")
    vocabulary: dict[str, int] = {"<s>": 0, "<unk>": 1}
    rng = random.Random(0)
    texts = [":"]
    for grammar in (ioi, greater_than, subject_verb, gendered_pronoun):
        for split in ("train", "test"):
            texts += [" ".join(grammar.words(split)), *(t for t in grammar.words(split) if t.isdigit())]
            for _ in range(400):
                pair = grammar.draw(rng, split)
                texts += [
                    pair.clean,
                    pair.corrupt,
                    *(pair.answer if isinstance(pair.answer, tuple) else (pair.answer,)),
                ]
    for text in texts:
        for piece, _ in splitter.pre_tokenize_str(text):
            vocabulary.setdefault(piece, len(vocabulary))
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.Fuse()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>")


def plain(tokenizer: Any, **sizes: Any) -> HookedPlain:
    vocabulary = len(tokenizer) if tokenizer is not None else 31
    return plain_model(PlainConfig.gpt2_like(n_layers=1, d_vocab=vocabulary, **sizes), tokenizer=tokenizer)


@pytest.fixture(scope="module")
def model() -> HookedPlain:
    return plain(word_tokenizer())


@pytest.fixture(scope="module")
def with_bos() -> HookedPlain:
    return plain(word_tokenizer(bos=True))


@pytest.mark.parametrize("name", TEXT_TASKS)
@pytest.mark.parametrize("split", ["train", "test"])
def test_generators_align_pairs_and_put_spans_on_the_words(
    name: str, split: str, model: HookedPlain, with_bos: HookedPlain
) -> None:
    for hooked in (model, with_bos):
        task = tasks.make(hooked, name, n=24, seed=3, split=split)
        assert len(task) == 24
        torch.testing.assert_close(task.clean.mask, task.corrupt.mask)
        for i in range(24):
            strings, other = task.clean.strings[i], task.corrupt.strings[i]
            spans = task.spans[i]
            assert (strings[0] == "<s>") == (hooked is with_bos)
            assert spans["END"] == (len(strings) - 1, len(strings))
            named = {position for span in spans.values() for position in range(*span)}
            differing = {k for k, (a, b) in enumerate(zip(strings, other, strict=True)) if a != b}
            assert differing, "the prompts differ"
            assert differing <= named, "every token that differs lies in a named span"
            word = {key: "".join(strings[slice(*span)]) for key, span in spans.items()}
            if name == "ioi":
                assert hooked.decode_token(int(task.answers[i])) == word["IO"]
                assert hooked.decode_token(int(task.foils[i])) == word["S1"] == word["S2"]
                assert spans["S1+1"][0] == spans["S1"][1]
            elif name == "greater_than":
                right = [int(hooked.decode_token(t)) for t in task.answers[i].tolist() if t >= 0]
                assert right == list(range(int(word["YY"]) + 1, 100))
                assert word["XX"] == word["END"]


def test_what_the_tokenizer_cuts_is_skipped_counted_and_shown(model: HookedPlain) -> None:
    task = tasks.ioi(model, n=60, seed=0)
    assert task.skipped["prompts of unequal token length"] > 0
    assert task.skipped["answer of several tokens"] > 0
    assert not any("iver" in token for row in task.clean.strings for token in row[-1:])
    total = sum(task.skipped.values())
    assert f"skipped {total}" in repr(task)
    assert f"{task.skipped['answer of several tokens']} × answer of several tokens" in task._repr_html_()
    uncut = tasks.ioi(model, n=60, seed=0, split="train")
    assert "answer of several tokens" not in uncut.skipped  # negative control: no train name is cut


def test_factors_are_balanced_whatever_is_skipped(model: HookedPlain) -> None:
    orders = Counter(factors["order"] for factors in tasks.ioi(model, n=40).factors)
    assert orders == {"ABBA": 20, "BABA": 20}
    agreement = tasks.subject_verb(model, n=80)
    seen = Counter(f["number"] + str(f["attractors"]) for f in agreement.factors)
    assert set(seen.values()) == {8}
    pronouns = tasks.gendered_pronoun(model, n=36).factors
    assert set(Counter(f["gender"] + f["kind"] for f in pronouns).values()) == {6}


def test_options_reach_the_grammar(model: HookedPlain) -> None:
    one = tasks.subject_verb(
        model, n=16, attractors=1, construction="rc_object", attractor_number="opposite", verb="past"
    )
    assert {(f["attractors"], f["construction"], f["attractor_number"], f["verb"]) for f in one.factors} == {
        (1, "rc_object", "opposite", "past")
    }
    assert all("ATTRACTOR1" in spans and "CLAUSE_VERB" in spans for spans in one.spans)
    flipped = tasks.ioi(model, n=8, corruption="s2_flip", order="ABBA", template=1)
    assert {(f["corruption"], f["order"], f["template"]) for f in flipped.factors} == {("s2_flip", "ABBA", 1)}
    assert flipped.settings["corruption"] == "s2_flip"


def test_seed_and_split_decide_the_draws(model: HookedPlain) -> None:
    def digest(**options: Any) -> str:
        return tasks.ioi(model, n=8, **options).hash()

    assert digest(seed=1) == digest(seed=1)
    assert (
        len({digest(seed=1), digest(seed=2), digest(seed=1, split="train"), digest(seed=1, corruption="s2_flip")}) == 4
    )


def test_hash_sees_tokens_answers_metric_and_spans(model: HookedPlain) -> None:
    pair = {"clean": "The king smiled", "corrupt": "The queen smiled", "answer": " he", "foil": " she"}
    digests = {
        tasks.from_pairs(model, [pair | change], metric=metric).hash()
        for change, metric in (
            ({}, "logit_difference"),
            ({}, "probability_difference"),
            ({"corrupt": "The boy smiled"}, "logit_difference"),
            ({"answer": " king"}, "logit_difference"),
            ({"foil": " king"}, "logit_difference"),
            ({"spans": {"SUBJECT": [4, 8]}}, "logit_difference"),
        )
    }
    assert len(digests) == 6


def test_rows_may_be_chosen_by_one_bool_each(model: HookedPlain) -> None:
    task = tasks.ioi(model, n=4)
    chosen = task.rows(torch.tensor([False, True, False, True]))
    assert chosen.clean.example.tolist() == [1, 3]
    assert chosen.hash() == task.rows([1, 3]).hash()
    with pytest.raises(SettingError, match=r"rows \[4\]\n  found: 4 rows"):
        task.rows([4])


def test_encoders_and_numbers_that_are_none_are_refused(model: HookedPlain) -> None:
    ids = Batch.of(torch.arange(20)[None] % 8 + 2)
    encoder = copy.copy(model)
    encoder.info = dataclasses.replace(model.info, encoder=True)
    for make in (tasks.ioi, tasks.induction, lambda m, n: tasks.resampled(m, ids, n=n)):
        with pytest.raises(UnsupportedFeatureError, match="an encoder, which predicts no next tokens"):
            make(encoder, n=2)
    for name, value in (("batch_size", 0), ("changed", "2"), ("length", 9.5)):
        with pytest.raises(SettingError, match=f"{name}={value!r}\n  found: not a positive whole number"):
            tasks.resampled(model, ids, n=2, **{name: value})
    with pytest.raises(SettingError, match="block='x'"):
        tasks.induction(model, n=2, block="x")
    with pytest.raises(UnknownNameError, match="metric None"):
        tasks.induction(model, n=2, metric=None)


def test_rows_keep_their_pair_so_the_metric_stays_right(model: HookedPlain) -> None:
    task = tasks.subject_verb(model, n=6)
    whole = task.metric(model.run(task.clean).logits, task.clean)
    part = task.rows([4, 1])
    assert part.spans == (task.spans[4], task.spans[1])
    assert part.answers.tolist() == task.answers[[4, 1]].tolist()
    found = part.metric(model.run(part.clean).logits, part.clean)
    torch.testing.assert_close(found, whole[[4, 1]], rtol=0, atol=1e-12)  # other padding, same float64 numbers
    with pytest.raises(AssertionError):  # negative control: rows taken for pairs 0 and 1
        torch.testing.assert_close(found, whole[:2], rtol=0, atol=1e-12)
    with pytest.raises(EmptyTaskError, match="no pair index"):
        task.rows([])


def test_positions_are_comparable_only_where_they_mean_the_same(model: HookedPlain) -> None:
    mixed = tasks.ioi(model, n=12)
    assert not mixed.aligned
    with pytest.raises(AlignmentError, match=r"use positions='named'.*or positions='all'"):
        mixed.positions("aligned")
    assert list(mixed.positions("named")) == ["IO", "S1", "S1+1", "S2", "END"]
    assert mixed.positions("all")["all"][0] == (0, int(mixed.clean.lengths[0]))
    both = tasks.ioi(model, n=6, template=2)  # one length, but IO and S1 change places
    assert len(set(both.clean.lengths.tolist())) == 1 and not both.aligned
    with pytest.raises(AlignmentError, match="of 2 template\\(s\\) with their spans"):
        both.positions("aligned")
    one = tasks.ioi(model, n=6, template=2, order="ABBA")
    assert one.aligned
    assert one.positions("aligned")["3"] == ((3, 4),) * 6
    with pytest.raises(UnknownNameError, match="did you mean 'named'"):
        one.positions("name")


def test_two_templates_of_equal_length_do_not_align(model: HookedPlain) -> None:
    task = tasks.gendered_pronoun(model, n=24, kind="name")
    lengths = task.clean.lengths.tolist()
    index = [i for i in range(24) if lengths[i] == lengths[0]]
    part = task.rows(index)
    assert len({factors["template"] for factors in part.factors}) > 1
    assert len(set(part.clean.lengths.tolist())) == 1
    assert not part.aligned


def test_sample_marks_what_differs(model: HookedPlain) -> None:
    task = tasks.from_pairs(
        model, [{"clean": "The king smiled", "corrupt": "The queen smiled", "answer": " he", "foil": " she"}]
    )
    assert task.sample(0) == (
        [("The", False), (" king", True), (" smiled", False)],
        [("The", False), (" queen", True), (" smiled", False)],
    )


def test_accuracy_is_the_share_of_positive_pairs(model: HookedPlain) -> None:
    task = tasks.subject_verb(model, n=10)
    values = [task.rows([i]) for i in range(10)]
    right = sum(float(one.metric(model.run(one.clean).logits, one.clean)) > 0 for one in values)
    assert 0 < right < 10
    assert tasks.accuracy(model, task) == ma.accuracy(model, task, batch_size=3) == right / 10
    with pytest.raises(SettingError, match="metric 'log_probability', whose sign"):
        tasks.accuracy(model, tasks.subject_verb(model, n=2, metric="log_probability"))
    with pytest.raises(SettingError, match="batch_size=0"):
        tasks.accuracy(model, task, batch_size=0)


def test_accuracy_survives_memory_running_out(model: HookedPlain, monkeypatch: pytest.MonkeyPatch) -> None:
    task = tasks.subject_verb(model, n=10)
    expected, run, sizes = tasks.accuracy(model, task), model.run, list[int]()

    def narrow(batch: Any, **settings: Any) -> Any:
        sizes.append(len(batch))
        if len(batch) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return run(batch, **settings)

    monkeypatch.setattr(model, "run", narrow)
    assert tasks.accuracy(model, task) == expected
    assert sizes == [10, 5, 2, 2, 2, 2, 2]


def test_kl_is_zero_on_the_clean_prompts_and_positive_on_the_corrupt_ones(model: HookedPlain) -> None:
    task = tasks.ioi(model, n=6, metric="kl_divergence")
    clean, corrupt = (task.metric(model.run(side).logits, side) for side in (task.clean, task.corrupt))
    torch.testing.assert_close(clean, torch.zeros_like(clean), rtol=0, atol=1e-12)  # rounding of one softmax
    assert (corrupt > 1e-6).all()


def test_induction_repeats_a_block_and_the_corrupt_prompt_has_the_foil_in_its_first_copy(with_bos: HookedPlain) -> None:
    task = tasks.induction(with_bos, n=16, block=9)
    assert task.aligned
    for i in range(16):
        row, other = task.clean.tokens[i].tolist(), task.corrupt.tokens[i].tolist()
        assert row[0] == other[0] == 0
        first, second = row[1:10], row[10:]
        assert second == first[:4]
        assert len(set(first)) == 9
        assert not {0, 1} & set(first), "no special token"
        assert int(task.answers[i]) == first[4]
        assert int(task.foils[i]) not in first
        assert [k for k in range(14) if row[k] != other[k]] == [5] == [task.spans[i]["TARGET"][0]]
        assert other[5] == int(task.foils[i])
        assert row[slice(*task.spans[i]["PREVIOUS"])] == row[slice(*task.spans[i]["END"])]
        assert task.spans[i]["START"] == (10, 11)


def test_induction_needs_no_tokenizer_but_room() -> None:
    bare = plain(None, n_ctx=20)
    assert tasks.induction(bare, n=2, block=12).clean.tokens.shape == (2, 18)
    with pytest.raises(SettingError, match="use 2 to 13"):
        tasks.induction(bare, n=2, block=14)
    with pytest.raises(SettingError, match="which has no tokenizer"):
        tasks.ioi(bare, n=2)


def test_resampled_pairs_differ_where_they_say_and_never_early() -> None:
    bare = plain(None)
    generator = torch.Generator().manual_seed(0)
    texts = Batch.of(torch.randint(2, 31, (5, 20), generator=generator))
    task = tasks.resampled(bare, texts, n=12, changed=3, length=14)
    assert task.aligned
    prompts = {tuple(row[:14]) for row in texts.tokens.tolist()}
    logits = [bare.run(side).logits[:, -1] for side in (task.clean, task.corrupt)]
    for i in range(12):
        row, other = task.clean.tokens[i].tolist(), task.corrupt.tokens[i].tolist()
        assert tuple(row) in prompts
        differing = [k for k in range(14) if row[k] != other[k]]
        assert differing == [task.spans[i][f"CHANGED{k}"][0] for k in (1, 2, 3)]
        assert min(differing) >= 4
        assert max(differing) < 13
        best = logits[0][i].topk(2).indices.tolist()
        corrupt_best = int(logits[1][i].argmax())
        assert int(task.answers[i]) == best[0]
        assert int(task.foils[i]) == (corrupt_best if corrupt_best != best[0] else best[1])
    assert len({tuple(row) for row in task.clean.tokens[:5].tolist()}) == 5, "each text once before any is used again"
    assert tasks.accuracy(bare, task) == 1.0
    assert tasks.resampled(bare, texts, n=12, changed=3, length=14, batch_size=5).hash() == task.hash()


def test_resampled_tokens_follow_the_models_own_distribution() -> None:
    """The first redrawn token, against probabilities of the model with the clean token taken out."""
    bare = plain(None)
    texts = Batch.of(torch.arange(6)[None] + 2)
    task = tasks.resampled(bare, texts, n=20, changed=1, length=6)  # only position 4 can change
    p = bare.run(texts).logits[0, 3].softmax(-1)
    p[6] = 0
    drawn = {int(row[4]) for row in task.corrupt.tokens}
    expected = set(p.topk(8).indices.tolist())
    assert expected <= drawn, "the probable tokens are all found among distinct pairs"
    assert 6 not in drawn, "never the clean token"


class _Certain:
    """A model that always expects token + 1, so no other token can be drawn."""

    def __init__(self, model: HookedPlain) -> None:
        self.info, self.tokenizer, self.weight = model.info, model.tokenizer, model.weight

    def run(self, batch: Batch) -> Any:
        logits = torch.nn.functional.one_hot((batch.tokens + 1) % self.info.d_vocab, self.info.d_vocab) * 1e4

        class Run:
            pass

        run = Run()
        run.logits = logits.double()
        return run


def test_resampled_makes_no_pair_that_cannot_differ() -> None:
    certain = _Certain(plain(None))
    follows = Batch.of(torch.arange(8)[None] + 2)
    with pytest.raises(EmptyTaskError, match="leaves no probability for another token"):
        tasks.resampled(certain, follows, n=1, length=8)
    with pytest.raises(EmptyTaskError, match="1 texts, none of 16 tokens"):
        tasks.resampled(certain, follows, n=1)
    with pytest.raises(SettingError, match="0 positions from 4 to the one before the last"):
        tasks.resampled(certain, follows, n=1, length=5)
    with pytest.raises(SettingError, match="no list of texts"):
        tasks.resampled(plain(word_tokenizer()), "one text", n=1)


def test_small_real_model_has_resampled_pairs_and_says_why_it_has_no_ioi(shared: Path) -> None:
    small = ma.load(shared / "models" / "stories260K")
    texts = [
        "Once upon a time, there was a little girl named Lily. She loved to play outside in the park.",
        "One day, a big dog went to the park and saw a cat. The cat was very happy to see him.",
        "too short",
    ]
    task = tasks.resampled(small, texts, n=8)
    assert task.clean.tokens.shape == (8, 16)
    assert task.skipped["a text of fewer than 16 tokens"] == 1
    assert tasks.accuracy(small, task) == 1.0
    with pytest.raises(EmptyTaskError) as caught:
        tasks.ioi(small, n=4)
    assert "prompts of unequal token length" in str(caught.value)
    assert "tasks.resampled" in str(caught.value)


def test_fewer_pairs_than_asked_for_is_an_error_that_says_how_many(model: HookedPlain) -> None:
    with pytest.raises(
        AlignmentError, match=r"60 pairs of task 'gendered_pronoun'\n  found: only \d+ could be made with this model: "
    ):
        tasks.gendered_pronoun(model, n=60, kind="noun", template=0)


def test_unknown_names_and_values_are_refused(model: HookedPlain) -> None:
    with pytest.raises(UnknownTaskError, match="did you mean 'ioi'"):
        tasks.make(model, "io", n=2)
    for call, message in (
        (lambda: tasks.ioi(model, n=2, split="dev"), "split='dev'"),
        (lambda: tasks.ioi(model, n=2, corruption="s2flip"), "did you mean 's2_flip'"),
        (lambda: tasks.subject_verb(model, n=2, construction="rc"), "construction='rc'"),
        (lambda: tasks.ioi(model, n=2, metric="logit_diff"), "did you mean 'logit_difference'"),
    ):
        with pytest.raises(UnknownNameError, match=message):
            call()
    with pytest.raises(SettingError, match=r"attractors=7\n  found: there are 5\n  fix: use 0 to 4, or None"):
        tasks.subject_verb(model, n=2, attractors=7)
    with pytest.raises(SettingError, match="n=0"):
        tasks.ioi(model, n=0)
    with pytest.raises(AttributeError, match="did you mean 'greater_than'"):
        tasks.greater_then  # noqa: B018


def test_the_table_of_tasks_is_what_the_package_exports() -> None:
    assert all(getattr(tasks, name) is function for name, function in tasks.TASKS.items())
    assert set(tasks.__all__) == {name for name in dir(tasks) if not name.startswith("_")}
