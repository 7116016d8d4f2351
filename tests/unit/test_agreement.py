"""The agreement grammar: balanced, different, the same for a seed, and labelled as an independent reading finds it."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

import pytest

import mechattr as ma
from mechattr.errors import EmptyTaskError, SettingError
from mechattr.tasks import EvidenceSample, agreement_samples, blimp_samples
from mechattr.tasks.grammar import agreement, subject_verb

FACTORS = ("number", "n_attractors", "attractor_number", "construction", "adverbs")
SINGULAR = {"is", "was", "has", "runs", "works", "sleeps", "sings", "waits", "speaks"}
CLAUSE = {form: plural for pair in agreement.CLAUSE_VERBS for plural, form in enumerate(pair)}
ADVERBS = {word for part in agreement.ADVERB_PARTS for word in part}


@pytest.fixture(scope="module")
def samples() -> tuple[EvidenceSample, ...]:
    return agreement_samples(1600, 3)


def number_of(noun: str) -> str:
    """From the noun list alone."""
    return "singular" if noun in agreement.NOUNS else "plural"


def read(sample: EvidenceSample) -> EvidenceSample:
    """Labels from the words alone: the first noun is the subject, the other nouns attractors."""
    bare = [word.lower() for word in sample.words]
    nouns = [i for i, word in enumerate(bare) if word.removesuffix("s") in agreement.NOUNS]
    subject, attractors = nouns[0], tuple(nouns[1:])
    number = number_of(bare[subject])
    verb = next((i for i, word in enumerate(bare) if word in CLAUSE), None)
    that = "that" in bare
    construction = "none" if not attractors else "pp"
    if verb is not None and attractors:
        before = verb < attractors[0]
        construction = "rc_subject" if before else "rc_object" if that else "rc_object_no_that"
    others = {number_of(bare[i]) for i in attractors}
    kind = "none" if not attractors else "same" if others == {number} else "opposite"
    start = subject - 1 - (bare[subject - 1] in agreement.ADJECTIVES)
    marked = () if bare[start] == "the" else (start,)
    right, wrong = sorted((sample.target, sample.foil), key=lambda form: (form in SINGULAR) != (number == "singular"))
    adverbs = sum(word in ADVERBS for word in bare[subject:])
    return EvidenceSample(
        words=sample.words, target=right, foil=wrong, evidence=(subject,), evidence_plus=(*marked, subject),
        secondary=(verb,) if construction == "rc_subject" else (), attractors=attractors,
        factors={
            "number": number, "n_attractors": len(attractors), "attractor_number": kind, "construction": construction,
            "adverbs": adverbs, "distance": len(bare) - 1 - subject, "strict": sample.factors["strict"],
        },
    )  # fmt: skip


@pytest.mark.parametrize("strict", [True, False])
def test_labels_are_what_an_independent_reading_finds(strict: bool) -> None:
    drawn = agreement_samples(960, 7, strict=strict)
    assert [read(sample) for sample in drawn] == list(drawn)
    # negative control: the nearest noun taken for the subject
    wrong = [dataclasses.replace(s, evidence=(s.attractors or s.evidence)[-1:]) for s in drawn]
    assert sum(read(sample) == sample for sample in wrong) == sum(not s.attractors for s in drawn) == 192


def test_an_opposite_attractor_asks_for_the_other_verb(samples: tuple[EvidenceSample, ...]) -> None:
    for sample in samples:
        subject = number_of(sample.words[sample.evidence[0]].lower())
        found = {number_of(sample.words[i]) for i in sample.attractors}
        assert found == ({subject} if sample.factors["attractor_number"] == "same" else found - {subject})
        assert (sample.target in SINGULAR) == (subject == "singular")
        assert (sample.foil in SINGULAR) == (subject == "plural")


def test_strict_sentences_have_no_other_word_with_the_number_of_the_subject(
    samples: tuple[EvidenceSample, ...],
) -> None:
    """Put the subject in the other number: nothing but the noun and its secondary evidence changes."""
    neutral = {"the", "that", "", *(lead.lower() for lead in agreement.LEADS), *agreement.PREPOSITIONS}
    neutral |= {*agreement.ADJECTIVES, *ADVERBS}
    for sample in samples:
        first_attractor = sample.attractors[0] if sample.attractors else None
        for i, word in enumerate(sample.words):
            told = i in (*sample.evidence, *sample.secondary, *sample.attractors)
            of_attractor = word in CLAUSE and sample.factors["construction"] != "rc_subject" and first_attractor
            assert told or of_attractor or word.lower() in neutral
    loose = agreement_samples(320, 3, strict=False)
    assert any(word.lower() not in neutral for s in loose for word in s.words[:1])  # negative control: "These", "Every"


def test_factors_are_balanced(samples: tuple[EvidenceSample, ...]) -> None:
    counts = Counter(tuple(s.factors[name] for name in FACTORS) for s in samples)
    assert {cell: n for cell, n in counts.items() if cell[1] > 0} == dict.fromkeys(
        [cell for cell in counts if cell[1] > 0], 1600 // 320
    )
    assert len(counts) == 4 * 2 * 2 * 4 * 4 + 2 * 4  # with attractors, and without
    assert Counter(s.factors["n_attractors"] for s in samples) == dict.fromkeys(range(5), 320)
    few = Counter(s.factors["number"] for s in agreement_samples(100, 3))  # a part of a round is nearly balanced, too
    assert abs(few["singular"] - few["plural"]) <= 30


def test_28000_different_sentences_by_seed() -> None:
    drawn = agreement_samples(28_000, 0)
    assert len({(s.words, s.target) for s in drawn}) == 28_000
    assert {word for s in drawn for word in (*s.words, s.target, s.foil)} <= set(agreement.words())
    assert len(set(agreement.words())) == len(agreement.words())
    # negative control: the same draws without looking whether a sentence was there before
    rng = agreement.random.Random("agreement/0/True")
    cells = rng.sample(agreement.CELLS, len(agreement.CELLS))
    careless = [agreement.draw(rng, cells[i % len(cells)]) for i in range(9_600)]
    assert len({(s.words, s.target) for s in careless}) < 9_600


def test_a_seed_decides_and_more_samples_begin_with_the_same() -> None:
    assert agreement_samples(50, 1) == agreement_samples(80, 1)[:50]
    assert agreement_samples(50, 1) != agreement_samples(50, 2)
    assert agreement_samples(50, 1) != agreement_samples(50, 1, strict=False)


@pytest.mark.parametrize("n", [0, -1, True, 1.5])
def test_a_bad_number_of_samples_is_refused(n: object) -> None:
    with pytest.raises(SettingError, match="not a positive whole number\n  fix: ask for at least one sample"):
        agreement_samples(n)  # type: ignore[arg-type]


def test_a_grammar_that_is_used_up_says_how_many_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "NOUNS", agreement.NOUNS[:5])
    monkeypatch.setattr(agreement, "ADJECTIVES", ())
    monkeypatch.setattr(agreement, "LEADS", ("",))
    monkeypatch.setattr(agreement.random.Random, "random", lambda self: 1.0)  # never an adjective
    monkeypatch.setattr(agreement, "CELLS", (("singular", 0, True, "pp", 0),))
    assert len(agreement_samples(5 * len(agreement.VERBS))) == 45
    with pytest.raises(
        SettingError, match=r"46 different sentences\n  found: no new sentence after 45, .*\n  fix: ask for at most 45"
    ):
        agreement_samples(46)


def test_words_are_those_of_the_other_grammar_of_agreement() -> None:
    """The bundled model knows their numbers."""
    assert set(agreement.NOUNS) == {noun for split in ("train", "test") for noun in subject_verb.PEOPLE[split]}
    assert len(agreement.NOUNS) >= 40
    assert len(agreement.VERBS) + len(agreement.CLAUSE_VERBS) >= 20


HEADER = "one_prefix_prefix,one_prefix_word_good,one_prefix_word_bad,target"


def test_blimp_rows_become_samples_and_the_others_are_counted(tmp_path: Path) -> None:
    rows = [
        HEADER, "A niece of most senators,hasn't,haven't,niece", "The cups,alarm,alarms,NA", "Some child,is,are,who",
        "The dog of the dog,is,are,dog", "The cup,looks like,look like,cup", "These geese,are,is,geese",
    ]  # fmt: skip
    (tmp_path / "paradigm.csv").write_text("\n".join(rows))
    found = blimp_samples(tmp_path / "paradigm.csv")
    assert found.name == "paradigm"
    assert [(s.text, s.target, s.foil, s.evidence) for s in found.samples] == [
        ("A niece of most senators", "hasn't", "haven't", (1,)),
        ("These geese", "are", "is", (1,)),
    ]
    assert [dict(s.factors) for s in found.samples] == [{"row": 0, "last": False}, {"row": 5, "last": True}]
    assert dict(found.skipped) == {
        "no evidence word is given": 1,
        "the evidence word is not in the prefix": 1,
        "the evidence word is in the prefix more than once": 1,
        "a continuation of several words": 1,
    }


def test_blimp_files_that_cannot_be_used_say_why(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="no such file\n  fix: give the path of a CSV file"):
        blimp_samples(tmp_path / "absent.csv")
    (tmp_path / "bare.csv").write_text("sentence_good,sentence_bad\na,b\n")
    with pytest.raises(SettingError, match="no column 'one_prefix_prefix'\n  fix: give a file with evidence words"):
        blimp_samples(tmp_path / "bare.csv")
    (tmp_path / "empty.csv").write_text(f"{HEADER}\nThe cups,alarm,alarms,NA\n")
    with pytest.raises(EmptyTaskError, match="1 × no evidence word is given"):
        blimp_samples(tmp_path / "empty.csv")


def test_blimp_paradigms_of_the_shared_data(shared: Path) -> None:
    """What is known of these files: 30 rows without evidence, and evidence that is never the last word."""
    found = ma.tasks.blimp_samples(shared / "eval/blimp_with_targets/distractor_agreement_relational_noun.csv")
    assert found.skipped["no evidence word is given"] == 30
    assert len(found.samples) + sum(found.skipped.values()) == 1000
    assert not any(sample.factors["last"] for sample in found.samples)
    regular = blimp_samples(shared / "eval/blimp_with_targets/regular_plural_subject_verb_agreement_1.csv")
    assert sum(bool(sample.factors["last"]) for sample in regular.samples) == 949
