"""Subject-verb agreement: the number of the head noun decides the verb, whatever nouns stand between."""

from __future__ import annotations

import random
from typing import Literal

from mechattr.tasks.pairtext import PairText, Split, fill

Construction = Literal["pp", "rc_subject", "rc_object", "rc_object_no_that"]
AttractorNumber = Literal["same", "opposite"]
Verb = Literal["present", "past", "have", "regular"]

CONSTRUCTIONS: tuple[Construction, ...] = ("pp", "rc_subject", "rc_object", "rc_object_no_that")

# Nouns are regular: the plural is the singular with "s".
PEOPLE: dict[str, tuple[str, ...]] = {
    "train": (
        "boy", "girl", "farmer", "soldier", "sailor", "teacher", "doctor", "friend", "brother", "sister", "servant",
        "master", "stranger", "painter", "hunter", "cousin", "guest", "prisoner", "lawyer", "horse", "dog", "bird",
        "bear", "cat",
    ),
    "test": (
        "captain", "officer", "merchant", "student", "writer", "driver", "visitor", "beggar", "clerk", "gardener",
        "shepherd", "cow", "lion", "rabbit", "goat", "monk",
    ),
}  # fmt: skip

THINGS: dict[str, tuple[str, ...]] = {
    "train": (
        "garden", "river", "tree", "house", "door", "window", "bridge", "table", "chair", "wall", "gate", "road",
        "hill", "field", "boat", "lamp", "school", "castle", "shop", "market", "village",
    ),
    "test": ("tower", "stable", "farm", "palace", "mill", "cottage", "cart", "fence", "tent", "barn", "meadow", "ship"),
}  # fmt: skip

PREPOSITIONS: dict[str, tuple[str, ...]] = {
    "train": ("near", "behind", "with", "by", "from", "beyond"),
    "test": ("beside", "opposite", "around", "in front of"),
}

ADJECTIVES: dict[str, tuple[str, ...]] = {
    "train": ("old", "young", "poor", "good", "little", "tall"),
    "test": ("great", "kind", "brave", "quiet"),
}

ADVERBS: dict[str, tuple[str, ...]] = {
    "train": ("often", "always", "still", "never"),
    "test": ("usually", "sometimes", "already"),
}

LEADS: dict[str, tuple[str, ...]] = {
    "train": ("", "Today", "In the morning", "We know that", "It is true that", "In winter"),
    "test": ("At night", "They say that", "I think that", "Every day"),
}

# (singular, plural). Verbs inside a relative clause are split; the verb that is asked for is a closed class and is not.
CLAUSE_VERBS: dict[str, tuple[tuple[str, str], ...]] = {
    "train": (
        ("likes", "like"), ("knows", "know"), ("sees", "see"), ("follows", "follow"), ("helps", "help"),
        ("fears", "fear"), ("trusts", "trust"), ("visits", "visit"), ("serves", "serve"), ("thanks", "thank"),
    ),
    "test": (
        ("loves", "love"), ("hates", "hate"), ("meets", "meet"), ("calls", "call"), ("hears", "hear"),
        ("admires", "admire"),
    ),
}  # fmt: skip

VERBS: dict[Verb, tuple[tuple[str, str], ...]] = {
    "present": (("is", "are"),),
    "past": (("was", "were"),),
    "have": (("has", "have"),),
    "regular": (
        ("runs", "run"), ("works", "work"), ("sleeps", "sleep"), ("sings", "sing"), ("waits", "wait"),
        ("speaks", "speak"),
    ),
}  # fmt: skip


def words(split: Split) -> tuple[str, ...]:
    """All filler words of one split, nouns and verbs in both numbers."""
    nouns = (form for noun in PEOPLE[split] + THINGS[split] for form in (noun, noun + "s"))
    verbs = (form for pair in CLAUSE_VERBS[split] for form in pair)
    answers = (form for pairs in VERBS.values() for pair in pairs for form in pair)
    return (*nouns, *verbs, *answers, *ADJECTIVES[split], *ADVERBS[split], *PREPOSITIONS[split])


def draw(
    rng: random.Random,
    split: Split,
    *,
    attractors: int | None = None,
    construction: Construction | None = None,
    attractor_number: AttractorNumber | None = None,
    number: Literal["singular", "plural"] | None = None,
    verb: Verb | None = None,
    adverb: bool | None = None,
    adjective: bool | None = None,
    lead: int | None = None,
) -> PairText:
    """Draw one pair; the corrupt prompt has the subject in the other number, so that the right answer flips.

    The sentence is `lead, the (adjective) SUBJECT modifier* (adverb)`, and the verb comes next. The first modifier
    is of the given construction and every further one is a prepositional phrase on the noun before it. In a subject
    relative clause the inner verb agrees with the subject, so it changes with it and is secondary evidence.

    Args:
        rng: source of every choice.
        split: "train" or "test": nouns, inner verbs, prepositions, adjectives, adverbs and leads are disjoint.
        attractors: nouns between the subject and the verb, 0 to 4; None draws 0 to 4, mostly 0 to 2 for "train".
        construction: of the first modifier; None draws one.
        attractor_number: of every attractor, relative to the clean subject; None draws one.
        number: of the clean subject; None draws one.
        verb: "present" (is/are), "past" (was/were), "have" (has/have) or "regular" (runs/run); None draws one.
        adverb: whether an adverb stands before the verb; None draws, one time in four.
        adjective: whether the subject has an adjective; None draws, one time in four.
        lead: index into the split's leads; None draws one.
    """
    if attractors is None:
        weights = (6, 8, 4, 1, 1) if split == "train" else (1, 1, 1, 1, 1)
        attractors = rng.choices(range(5), weights)[0]
    shape = construction if construction else rng.choice(CONSTRUCTIONS)
    same = (attractor_number or rng.choice(("same", "opposite"))) == "same"
    plural = (number or rng.choice(("singular", "plural"))) == "plural"
    kind = verb if verb else rng.choice(tuple(VERBS))
    adverb = rng.random() < 0.25 if adverb is None else adverb
    adjective = rng.random() < 0.25 if adjective is None else adjective
    lead = rng.randrange(len(LEADS[split])) if lead is None else lead

    noun, person = rng.sample(PEOPLE[split], 2)
    middle, slots = _modifiers(rng, split, attractors, shape, plural == same, person)
    pattern = f"{LEADS[split][lead]} the {rng.choice(ADJECTIVES[split]) + ' ' if adjective else ''}{{SUBJECT}}{middle}"
    pattern = pattern.strip() + (f" {rng.choice(ADVERBS[split])}" if adverb else "")
    pattern = pattern[0].upper() + pattern[1:]
    inner, (singular_form, plural_form) = rng.choice(CLAUSE_VERBS[split]), rng.choice(VERBS[kind])

    def sentence(subject_plural: bool) -> tuple[str, dict[str, tuple[int, int]]]:
        agrees = subject_plural if shape == "rc_subject" else plural == same
        return fill(pattern, slots | {"SUBJECT": noun + "s" * subject_plural, "CLAUSE_VERB": inner[agrees]})

    clean, spans = sentence(plural)
    corrupt, corrupt_spans = sentence(not plural)
    right, wrong = (plural_form, singular_form) if plural else (singular_form, plural_form)
    return PairText(
        clean=clean,
        corrupt=corrupt,
        answer=" " + right,
        foil=" " + wrong,
        spans=spans,
        corrupt_spans=corrupt_spans,
        factors={
            "template": f"{lead}/{shape if attractors else 'none'}/{attractors}/{adverb:d}/{adjective:d}",
            "attractors": attractors,
            "construction": shape if attractors else "none",
            "attractor_number": ("same" if same else "opposite") if attractors else "none",
            "number": "plural" if plural else "singular",
            "verb": kind,
            "adverb": adverb,
            "distance": clean[spans["SUBJECT"][1] :].count(" "),
        },
    )


def _modifiers(
    rng: random.Random, split: Split, attractors: int, construction: Construction, plural: bool, person: str
) -> tuple[str, dict[str, str]]:
    """What stands between subject and verb, as a template, and the words of its slots ATTRACTOR1, ATTRACTOR2, ..."""
    if attractors == 0:
        return "", {}
    things = rng.sample(THINGS[split], attractors)
    nouns = things if construction == "pp" else [person, *things[1:]]
    slots = {f"ATTRACTOR{i}": noun + "s" * plural for i, noun in enumerate(nouns, start=1)}
    first, *further = rng.sample(PREPOSITIONS[split], attractors)
    chain = "the {ATTRACTOR1}"
    for i, preposition in enumerate(further, start=2):
        chain += f" {preposition} the {{ATTRACTOR{i}}}"
    if construction == "pp":
        return f" {first} {chain}", slots
    if construction == "rc_subject":
        return f" that {{CLAUSE_VERB}} {chain}", slots
    return f"{' that' if construction == 'rc_object' else ''} {chain} {{CLAUSE_VERB}}", slots
