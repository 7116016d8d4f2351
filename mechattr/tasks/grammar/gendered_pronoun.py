"""Gendered pronoun: a subject of explicit gender did something, because he or she ..."""

from __future__ import annotations

import random
from typing import Literal

from mechattr.tasks.grammar.names import FEMALE, MALE
from mechattr.tasks.pairtext import PairText, Split, fill, pick

Kind = Literal["noun", "name", "profession"]
Gender = Literal["he", "she"]

KINDS: tuple[Kind, ...] = ("noun", "name", "profession")
GENDERS: tuple[Gender, ...] = ("he", "she")

NOUNS: dict[str, tuple[tuple[str, str], ...]] = {  # (he, she)
    "train": (
        ("king", "queen"), ("boy", "girl"), ("man", "woman"), ("father", "mother"), ("son", "daughter"),
        ("brother", "sister"), ("husband", "wife"), ("prince", "princess"), ("nephew", "niece"),
        ("gentleman", "lady"),
    ),
    "test": (
        ("uncle", "aunt"), ("grandfather", "grandmother"), ("duke", "duchess"), ("emperor", "empress"),
        ("monk", "nun"), ("hero", "heroine"), ("actor", "actress"),
    ),
}  # fmt: skip

PROFESSIONS: dict[str, tuple[str, ...]] = {
    "train": ("teacher", "doctor", "servant", "painter", "farmer", "baker", "singer", "cook"),
    "test": ("writer", "gardener", "clerk", "tailor", "dancer", "nurse"),
}

LEADS: dict[str, tuple[str, ...]] = {
    "train": ("One day", "That evening", "At first", "In the morning", "Once"),
    "test": ("Last week", "Long ago", "This time"),
}

TEMPLATES: dict[str, tuple[str, ...]] = {
    "train": (
        "{lead} {subject} went home early because",
        "{lead} {subject} smiled when",
        "{lead} {subject} sat by the fire, and then",
        "{lead} {subject} was very tired, so",
        "{lead} {subject} opened the letter as soon as",
        "{lead} {subject} could not sleep because",
        "{lead} {subject} was proud of the garden because",
        "{lead} {subject} told a long story while",
        "{lead} {subject} left the house before",
        "{lead} {subject} began to weep when",
    ),
    "test": (
        "{lead} {subject} laughed aloud because",
        "{lead} {subject} was angry with everybody because",
        "{lead} {subject} closed the window after",
        "{lead} {subject} waited at the gate until",
        "{lead} {subject} ran down the road as soon as",
        "{lead} {subject} looked at the sky, and then",
    ),
}

# The gendered nouns that a profession is hung on, and the words between.
HOLDERS: dict[str, tuple[str, str]] = {"train": ("man", "woman"), "test": ("uncle", "aunt")}
WORK: dict[str, str] = {"train": "who worked as a", "test": "who had become a"}


def words(split: Split) -> tuple[str, ...]:
    """All filler words of one split."""
    nouns = (word for pair in NOUNS[split] for word in pair)
    return (*nouns, *PROFESSIONS[split], *MALE[split], *FEMALE[split])


def draw(
    rng: random.Random,
    split: Split,
    *,
    kind: Kind | None = None,
    gender: Gender | None = None,
    template: int | None = None,
) -> PairText:
    """Draw one pair; the answer is the pronoun of the subject, and the corrupt subject has the other gender.

    Args:
        rng: source of every choice.
        split: "train" or "test": templates, leads, nouns, names and professions are disjoint.
        kind: "noun" ("the king"), "name" ("John") or "profession" ("the man who worked as a doctor"); None draws.
        gender: pronoun of the clean subject; None draws one.
        template: index into the split's templates; None draws one.
    """
    sort = kind if kind else rng.choice(KINDS)
    pronoun = gender if gender else rng.choice(GENDERS)
    index, pattern = pick(rng, TEMPLATES[split], template)
    subject, pair = "{SUBJECT}" if sort == "name" else "the {SUBJECT}", HOLDERS[split]
    if sort == "noun":
        pair = rng.choice(NOUNS[split])
    elif sort == "name":
        pair = (rng.choice(MALE[split]), rng.choice(FEMALE[split]))
    else:
        subject += f" {WORK[split]} {rng.choice(PROFESSIONS[split])}"
    pattern = pattern.format(lead=rng.choice(LEADS[split]), subject=subject)
    here, other = pair if pronoun == "he" else pair[::-1]
    clean, spans = fill(pattern, {"SUBJECT": here})
    corrupt, corrupt_spans = fill(pattern, {"SUBJECT": other})
    return PairText(
        clean=clean,
        corrupt=corrupt,
        answer=" " + pronoun,
        foil=" she" if pronoun == "he" else " he",
        spans=spans,
        corrupt_spans=corrupt_spans,
        factors={"template": f"{index}/{sort}", "kind": sort, "gender": pronoun},
    )
