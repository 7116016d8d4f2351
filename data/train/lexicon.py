"""Plain phrases that show the number and the gender of words: what the rare ones do not tell in the books.

The words of both splits occur here, but in none of the constructions that the tasks ask about: no phrase has a verb
that agrees with a noun, none goes on with "he" or "she", and no one hands anything to anyone.
"""

import random
from dataclasses import dataclass

from data.train.variety import GENDERED, MEN, NOUNS, WOMEN
from mechattr.tasks.grammar import gendered_pronoun, subject_verb
from mechattr.tasks.grammar.names import FEMALE, MALE

SPLITS = ("train", "test")


@dataclass(frozen=True)
class Words:
    """Words by what is shown of them: number (things, people) or gender (pairs, names)."""

    things: tuple[str, ...]
    people: tuple[str, ...]
    pairs: tuple[tuple[str, str], ...]
    names: tuple[tuple[str, ...], tuple[str, ...]]


# The words of the generators alone, many of them rare in the books; and these with the words of `variety`.
OWN_WORDS = Words(
    things=tuple(noun for split in SPLITS for noun in subject_verb.THINGS[split]),
    people=tuple(noun for split in SPLITS for noun in subject_verb.PEOPLE[split]),
    pairs=tuple(pair for split in SPLITS for pair in gendered_pronoun.NOUNS[split]),
    names=(
        tuple(name for split in SPLITS for name in MALE[split]),
        tuple(name for split in SPLITS for name in FEMALE[split]),
    ),
)
ALL_WORDS = Words(
    things=OWN_WORDS.things + NOUNS,
    people=OWN_WORDS.people,
    pairs=OWN_WORDS.pairs + GENDERED,
    names=(OWN_WORDS.names[0] + MEN, OWN_WORDS.names[1] + WOMEN),
)
KNOWN = {word for pair in ALL_WORDS.pairs for word in pair}

ONE = ("one", "this", "that", "a single", "each", "another", "every", "the same")
MANY = ("two", "these", "those", "many", "several", "three", "a few", "all the", "both", "some of the", "ten")
WE = ("I", "We", "You", "They", "People", "My friends", "The children")
SAW = (
    "saw", "found", "heard", "remembered", "noticed", "knew", "watched", "forgot", "liked", "drew", "met", "followed",
    "passed", "described", "feared",
)  # fmt: skip
AND = (" and", ", and then", ", but", " until", " because", ", so")
LIKED = (
    "liked",
    "left",
    "thanked",
    "looked for",
    "thought of",
    "believed in",
    "forgot",
    "told of",
    "dreamt of",
    "praised",
)
TURNED = ("spoke", "listened", "went", "wrote", "ran", "talked", "came", "turned", "waved", "sang", "belonged", "lied")
CALLED = ("the child", "the stranger", "the baby", "the dog", "the horse", "the parrot", "the old servant", "the cat")
OWN = (
    "dog",
    "house",
    "hand",
    "voice",
    "friends",
    "old hat",
    "country",
    "letters",
    "life",
    "own room",
    "eyes",
    "children",
)


def counted(rng: random.Random, words: Words) -> tuple[str, str]:
    """A word that goes with one number, and a noun in that number."""
    noun, many = rng.choice(rng.choice((words.things, words.people))), rng.random() < 0.5
    lead = f"{rng.choice(WE)} {rng.choice(SAW)} " if rng.random() < 0.5 else ""
    return lead + rng.choice(MANY if many else ONE), f" {noun}{'s' * many}"


def referred(rng: random.Random, words: Words) -> tuple[str, str]:
    """A noun of no known gender, and later "it" or "them", "him" or "her"."""
    people, many = rng.random() < 0.3, rng.random() < 0.5
    noun = (
        rng.choice(tuple(word for word in (words.people if people else words.things) if word not in KNOWN)) + "s" * many
    )
    one = rng.choice((" him", " her")) if people else " it"
    text = f"{rng.choice(WE)} {rng.choice(SAW)} the {noun}{rng.choice(AND)} we {rng.choice(LIKED)}"
    return text, " them" if many else one


def gendered(rng: random.Random, words: Words) -> tuple[str, str]:
    """A person, and later "him" or "her", "his" or "her", "himself" or "herself"."""
    female = rng.random() < 0.5
    person = rng.choice(words.names[female]) if rng.random() < 0.5 else "the " + rng.choice(words.pairs)[female]
    kind = rng.randrange(3)
    if kind == 0:
        text = f"{rng.choice(WE)} {rng.choice(SAW)} {person}{rng.choice(AND)} we {rng.choice(LIKED)}"
        return text, " her" if female else " him"
    if kind == 1:
        return f"{rng.choice(WE)} {rng.choice(SAW)} {person} and", f" {'her' if female else 'his'} {rng.choice(OWN)}"
    return f"{rng.choice(WE)} {rng.choice(SAW)} {person}", " herself" if female else " himself"


def draw(rng: random.Random, words: Words) -> tuple[str, str]:
    """A phrase in two parts; the second is the one that number or gender decides."""
    return rng.choice((counted, referred, gendered, gendered))(rng, words)


def named(rng: random.Random, words: Words) -> tuple[str, str]:
    """A name where only a name can stand; half of the time it has been told just before."""
    name = rng.choice(rng.choice(words.names))
    if rng.random() < 0.5:
        return f"{rng.choice(WE)} {rng.choice(TURNED)} to", f" {name}"
    told = f"They named {rng.choice(CALLED)} {name}{rng.choice(AND)} we"
    return f"{told} {rng.choice(('said', 'cried', 'liked the name of', 'always thought of', 'shouted'))}", f" {name}"
