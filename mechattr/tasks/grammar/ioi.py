"""Indirect object identification: two people are named, one of them (the subject) again; who receives the object?"""

from __future__ import annotations

import random
from typing import Literal

from mechattr.tasks.grammar.names import FEMALE, MALE
from mechattr.tasks.pairtext import PairText, Span, Split, fill, pick

Order = Literal["ABBA", "BABA"]
Corruption = Literal["abc", "s2_flip"]

ORDERS: tuple[Order, ...] = ("ABBA", "BABA")
CORRUPTIONS: tuple[Corruption, ...] = ("abc", "s2_flip")

# X and Y are the first two names in order of mention; S2 is the second mention of the subject.
TEMPLATES: dict[str, tuple[str, ...]] = {
    "train": (
        "When {X} and {Y} came to the {place}, {S2} gave a {object} to",
        "After {X} and {Y} had walked to the {place}, {S2} handed a {object} to",
        "One morning {X} and {Y} met at the {place}, and {S2} showed a {object} to",
        "While {X} and {Y} sat in the {place}, {S2} passed a {object} to",
        "Yesterday {X} and {Y} went to the {place} together. {S2} brought a {object} for",
        "As soon as {X} and {Y} reached the {place}, {S2} offered a {object} to",
        "It was cold, and {X} and {Y} were alone in the {place} when {S2} threw a {object} to",
        "Before {X} and {Y} left the {place}, {S2} promised a {object} to",
        "In the evening {X} and {Y} rested near the {place}. At last {S2} sold a {object} to",
        "There was a great noise as {X} and {Y} entered the {place}, so {S2} lent a {object} to",
        "The old friends {X} and {Y} were at the {place}. Soon {S2} sent a {object} to",
        "Because {X} and {Y} lived by the {place}, {S2} often carried a {object} to",
    ),
    "test": (
        "Late one night {X} and {Y} stopped at the {place}. There {S2} gave a {object} to",
        "Since {X} and {Y} were tired of the {place}, {S2} handed a {object} to",
        "Not long after {X} and {Y} arrived at the {place}, {S2} offered a {object} to",
        "In those days {X} and {Y} often played in the {place}, where {S2} showed a {object} to",
        "On Sunday {X} and {Y} hurried across the {place}, and then {S2} sold a {object} to",
        "At the door of the {place} {X} and {Y} said goodbye, but first {S2} passed a {object} to",
    ),
}

PLACES: dict[str, tuple[str, ...]] = {
    "train": (
        "garden", "village", "river", "market", "church", "school", "kitchen", "castle", "station", "shop", "forest",
        "bridge",
    ),
    "test": ("library", "farm", "palace", "tower", "stable", "meadow"),
}  # fmt: skip

OBJECTS: dict[str, tuple[str, ...]] = {
    "train": (
        "book", "letter", "ring", "basket", "coin", "knife", "flower", "lamp", "hat", "cup", "rope", "ticket", "bottle",
        "picture", "sword",
    ),
    "test": ("candle", "key", "watch", "blanket", "box", "map", "stick", "purse"),
}  # fmt: skip


def words(split: Split) -> tuple[str, ...]:
    """All filler words of one split."""
    return (*MALE[split], *FEMALE[split], *PLACES[split], *OBJECTS[split])


def draw(
    rng: random.Random,
    split: Split,
    *,
    order: Order | None = None,
    corruption: Corruption = "abc",
    template: int | None = None,
) -> PairText:
    """Draw one pair; the answer is the name that is not the subject, the foil is the subject.

    Args:
        rng: source of every choice.
        split: "train" or "test": templates, names, places and objects are disjoint.
        order: "ABBA" names the indirect object first, "BABA" the subject first; None draws one.
        corruption: "abc" puts a third name in place of the second mention of the subject; "s2_flip" puts the
            indirect object there, so that the right answer flips.
        template: index into the split's templates; None draws one.
    """
    mention = order if order else rng.choice(ORDERS)
    index, pattern = pick(rng, TEMPLATES[split], template)
    indirect, subject, third = rng.sample(MALE[split] + FEMALE[split], 3)
    slots = {"place": rng.choice(PLACES[split]), "object": rng.choice(OBJECTS[split])}
    slots |= {"X": indirect, "Y": subject} if mention == "ABBA" else {"X": subject, "Y": indirect}
    clean, spans = fill(pattern, slots | {"S2": subject})
    corrupt, corrupt_spans = fill(pattern, slots | {"S2": third if corruption == "abc" else indirect})
    return PairText(
        clean=clean,
        corrupt=corrupt,
        answer=" " + indirect,
        foil=" " + subject,
        spans=_roles(clean, spans, mention),
        corrupt_spans=_roles(corrupt, corrupt_spans, mention),
        factors={"order": mention, "template": index, "corruption": corruption},
    )


def _roles(text: str, spans: dict[str, Span], order: Order) -> dict[str, Span]:
    """Rename the slots by role, and add S1+1, the word after the first mention of the subject."""
    first, second = spans["X"], spans["Y"]
    indirect, subject = (first, second) if order == "ABBA" else (second, first)
    after = subject[1] + 1  # one space follows every name in the templates
    return {"IO": indirect, "S1": subject, "S1+1": (after, text.index(" ", after)), "S2": spans["S2"]}
