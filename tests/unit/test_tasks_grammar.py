"""The grammars: what they say is what they make, and nothing of the test split can be seen in training."""

from __future__ import annotations

import random
import re
import subprocess
import sys
from collections import Counter
from types import ModuleType

import pytest

from mechattr.tasks.grammar import gendered_pronoun, greater_than, ioi, subject_verb
from mechattr.tasks.grammar.names import FEMALE, MALE
from mechattr.tasks.pairtext import PairText, fill

GRAMMARS = (ioi, greater_than, subject_verb, gendered_pronoun)
PLURAL = {"are", "were", "have", "run", "work", "sleep", "sing", "wait", "speak"}


def draws(grammar: ModuleType, split: str, n: int = 300, **options: object) -> list[PairText]:
    rng = random.Random(1)
    return [grammar.draw(rng, split, **options) for _ in range(n)]


def span(pair: PairText, name: str) -> str:
    return pair.clean[slice(*pair.spans[name])]


def words_of(pair: PairText) -> set[str]:
    return set(re.findall(r"[A-Za-z]+", pair.clean + " " + pair.corrupt))


def test_grammars_need_the_standard_library_only() -> None:
    code = (
        "import sys; from mechattr.tasks.grammar import ioi, greater_than, subject_verb, gendered_pronoun; "
        "print('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"


@pytest.mark.parametrize("grammar", GRAMMARS)
def test_same_seed_same_pairs_and_other_seed_other_pairs(grammar: ModuleType) -> None:
    first, second, third = ([grammar.draw(rng, "test") for _ in range(20)] for rng in map(random.Random, (5, 5, 6)))
    assert first == second
    assert first != third


@pytest.mark.parametrize("grammar", GRAMMARS)
@pytest.mark.parametrize("split", ["train", "test"])
def test_spans_point_at_the_same_words_in_both_prompts_and_no_slot_is_left(grammar: ModuleType, split: str) -> None:
    for pair in draws(grammar, split):
        assert "{" not in pair.clean + pair.corrupt
        assert "  " not in pair.clean + pair.corrupt
        assert pair.clean != pair.corrupt
        assert pair.spans.keys() == pair.corrupt_spans.keys()
        assert len(pair.clean.split()) == len(pair.corrupt.split()) <= 32
        changed = [name for name in pair.spans if span(pair, name) != pair.corrupt[slice(*pair.corrupt_spans[name])]]
        assert changed, "the corrupt prompt must differ inside a named span"


def test_filler_words_of_the_splits_are_disjoint_over_all_grammars() -> None:
    closed = {form for pairs in subject_verb.VERBS.values() for pair in pairs for form in pair}
    closed |= {f"{number:02d}" for number in range(100)}
    train, test = (
        {word for grammar in GRAMMARS for word in grammar.words(split)} - closed for split in ("train", "test")
    )
    assert len(train) > 150
    assert len(test) > 80
    assert not train & test
    assert (train | {"Tom"}) & test == {"Tom"}  # negative control: one shared name is found


@pytest.mark.parametrize("grammar", GRAMMARS)
def test_no_filler_of_the_test_split_is_drawn_for_training(grammar: ModuleType) -> None:
    held_out = set(grammar.words("test")) - set(grammar.words("train"))
    seen = {word for pair in draws(grammar, "train", 1000) for word in words_of(pair)}
    assert not seen & held_out
    assert {word for pair in draws(grammar, "test", 1000) for word in words_of(pair)} & held_out


@pytest.mark.parametrize("grammar", [ioi, greater_than, gendered_pronoun])
def test_templates_of_the_splits_are_disjoint_and_written_once(grammar: ModuleType) -> None:
    train, test = (grammar.TEMPLATES[split] for split in ("train", "test"))
    assert not set(train) & set(test)
    assert len(set(train)) == len(train)
    assert len(set(test)) == len(test)


def test_ioi_answer_is_the_name_that_is_not_repeated() -> None:
    for split in ("train", "test"):
        for pair in draws(ioi, split):
            names = [word for word in re.findall(r"[A-Za-z]+", pair.clean) if word in MALE[split] + FEMALE[split]]
            counts = Counter(names)
            assert sorted(counts.values()) == [1, 2]
            assert counts[pair.answer.strip()] == 1
            assert counts[pair.foil.strip()] == 2
            assert span(pair, "IO") == pair.answer.strip()
            assert span(pair, "S1") == span(pair, "S2") == pair.foil.strip()
            assert pair.spans["S1+1"][0] == pair.spans["S1"][1] + 1
            io_first = pair.spans["IO"] < pair.spans["S1"]
            assert pair.factors["order"] == ("ABBA" if io_first else "BABA")


def test_ioi_corruptions_exchange_the_second_subject_only() -> None:
    for corruption in ("abc", "s2_flip"):
        for pair in draws(ioi, "test", corruption=corruption):
            start, end = pair.corrupt_spans["S2"]
            other = pair.corrupt[start:end]
            assert pair.corrupt[:start] + span(pair, "S2") + pair.corrupt[end:] == pair.clean
            if corruption == "s2_flip":
                assert other == span(pair, "IO")
            else:
                assert other not in (span(pair, "IO"), span(pair, "S2"))


def test_greater_than_answers_are_the_later_years_of_the_century() -> None:
    for pair in draws(greater_than, "test"):
        year = int(span(pair, "YY"))
        assert 2 <= year <= 98
        assert [int(y) for y in pair.answer] == [y for y in range(100) if y > year]
        assert [int(y) for y in pair.foil] == [y for y in range(100) if y <= year]
        assert pair.clean.endswith(" " + span(pair, "XX"))
        assert f" {span(pair, 'XX')}{span(pair, 'YY')}" in pair.clean
        assert pair.corrupt == pair.clean[: pair.spans["YY"][0]] + "01" + pair.clean[pair.spans["YY"][1] :]


@pytest.mark.parametrize("construction", subject_verb.CONSTRUCTIONS)
@pytest.mark.parametrize("attractors", range(5))
def test_subject_verb_agrees_with_the_head_noun_whatever_stands_between(construction: str, attractors: int) -> None:
    pairs = draws(subject_verb, "test", 120, construction=construction, attractors=attractors)
    nearest_noun_decides = 0
    for pair in pairs:
        plural = span(pair, "SUBJECT").endswith("s")
        assert (pair.answer.strip() in PLURAL) == plural
        assert (pair.foil.strip() in PLURAL) != plural
        between = [name for name in pair.spans if name.startswith("ATTRACTOR")]
        assert len(between) == attractors
        for name in between:
            assert pair.spans[name][0] > pair.spans["SUBJECT"][1]
            same = span(pair, name).endswith("s") == plural
            assert same == (pair.factors["attractor_number"] == "same")
            nearest_noun_decides += same
        start, end = pair.corrupt_spans["SUBJECT"]
        assert pair.corrupt[start:end].endswith("s") != plural
        if attractors and construction != "pp":
            inner_plural = not span(pair, "CLAUSE_VERB").endswith("s")
            agrees_with = "SUBJECT" if construction == "rc_subject" else "ATTRACTOR1"
            assert inner_plural == span(pair, agrees_with).endswith("s")
        assert (" that " in pair.clean[pair.spans["SUBJECT"][1] :]) == (
            attractors > 0 and construction in ("rc_subject", "rc_object")
        )
    if attractors:  # negative control: the rule "agree with the nearest noun" is wrong on half of the attractors
        assert 0 < nearest_noun_decides < len(pairs) * attractors


def test_subject_verb_train_split_has_mostly_few_attractors() -> None:
    counts = Counter(pair.factors["attractors"] for pair in draws(subject_verb, "train", 1000))
    assert set(counts) == {0, 1, 2, 3, 4}
    assert counts[0] + counts[1] + counts[2] > 800


def test_gendered_pronoun_follows_the_subject_and_flips_with_it() -> None:
    he = {split: {pair[0] for pair in gendered_pronoun.NOUNS[split]} | set(MALE[split]) for split in ("train", "test")}
    for split in ("train", "test"):
        kinds = Counter()
        for pair in draws(gendered_pronoun, split):
            kinds[pair.factors["kind"]] += 1
            start, end = pair.corrupt_spans["SUBJECT"]
            assert (span(pair, "SUBJECT") in he[split]) == (pair.answer == " he")
            assert (pair.corrupt[start:end] in he[split]) == (pair.answer == " she")
            assert {pair.answer, pair.foil} == {" he", " she"}
        assert set(kinds) == {"noun", "name", "profession"}


def test_fill_returns_spans_of_capital_slots_only() -> None:
    text, spans = fill("the {ROLE} of {place}", {"ROLE": "king", "place": "Rome"})
    assert text == "the king of Rome"
    assert spans == {"ROLE": (4, 8)}


def test_a_template_index_fixes_the_template() -> None:
    assert {pair.factors["template"] for pair in draws(ioi, "train", 50, template=3)} == {3}
    assert len({pair.factors["template"] for pair in draws(ioi, "train", 50)}) > 5
