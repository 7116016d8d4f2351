"""What is steered in `benchmarks.steering_table`: behaviours, with the data of vectors and held-out items."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch

from mechattr.models.base import HookedModel
from mechattr.tasks.grammar import gendered_pronoun, subject_verb
from mechattr.tasks.pairtext import PairText, Split

Pair = tuple[str, str]
Triple = tuple[str, str, str]
OPENINGS = ("The", "She", "It was", "When", "One day", "They", "In the", "But he")

NAMES = {"train": ("Tom", "Lily", "Max", "Sue"), "test": ("Ben", "Mia", "Tim", "Anna")}
BOYS = ("Tom", "Max", "Ben", "Tim")
EVENTS = {  # (good, bad)
    "train": (
        ("got a new toy", "lost the toy"), ("found a big cake", "dropped the cake"), ("won the game", "lost the game"),
        ("made a new friend", "was all alone"), ("saw mom", "could not find mom"), ("got a hug", "got hurt"),
        ("had a big party", "had a bad dream"), ("found the ball", "lost the ball"),
    ),
    "test": (
        ("got a nice gift", "broke the cup"), ("saw a rainbow", "saw a big storm"), ("played in the park", "fell down"),
        ("helped a bird", "hurt a knee"), ("ate a yummy pie", "was very sick"), ("found a puppy", "lost a puppy"),
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Behaviour:
    """A behaviour of a model, as contrasts in which no noun, name or event of the held-out items is.

    Attributes:
        pairs: prompts that end before the answer, (one that asks for the behaviour, the same without).
        triples: (prompt, answer that matches, answer that does not); half of the prompts ask for the behaviour.
        held: the same, held out.
        right: for each held-out item whether the matching answer is the right one: 1 or -1.
        words: a pair of short texts, for activation addition.
        prompts: what prompting puts before a prompt, to strengthen the behaviour and to weaken it.
    """

    pairs: list[Pair]
    triples: list[Triple]
    held: list[Triple]
    right: list[int]
    words: Pair
    prompts: Pair


def _number(rng: random.Random, split: Split, asks: bool) -> PairText:
    return subject_verb.draw(rng, split, number="plural" if asks else "singular")


def _pronoun(rng: random.Random, split: Split, asks: bool) -> PairText:
    return gendered_pronoun.draw(rng, split, gender="she" if asks else "he")


def _sentiment(rng: random.Random, split: Split, asks: bool) -> PairText:
    name, events = rng.choice(NAMES[split]), rng.choice(EVENTS[split])
    good, bad = (f"{name} {event}. {'He' if name in BOYS else 'She'} was very" for event in events)
    if asks:
        return PairText(clean=good, corrupt=bad, answer=" happy", foil=" sad")
    return PairText(clean=bad, corrupt=good, answer=" sad", foil=" happy")


# (draw, whether the behaviour is asked for; words; prompts)
BEHAVIOURS: dict[str, tuple[Callable[[random.Random, Split, bool], PairText], Pair, Pair]] = {
    "number agreement": (_number, ("They are", "It is"), ("Many people are here. ", "One man is here. ")),
    "gendered pronoun": (_pronoun, ("She is", "He is"), ("She was a woman. ", "He was a man. ")),
    "sentiment": (_sentiment, ("She had fun", "She was sad"), ("It was a good day. ", "It was a bad day. ")),
}


def drawn(name: str, n: int, n_held: int, seed: int) -> Behaviour:
    """A behaviour: verbs in the plural, "she" rather than "he", or "happy" rather than "sad"."""
    draw, words, prompts = BEHAVIOURS[name]

    def part(split: Split, count: int) -> tuple[list[Pair], list[Triple]]:
        rng, pairs, triples = random.Random(f"{name} {split} {seed}"), [], []
        for i in range(count):
            asks = i % 2 == 0
            one = draw(rng, split, asks)
            pairs.append((one.clean, one.corrupt) if asks else (one.corrupt, one.clean))
            answers = (str(one.answer), str(one.foil))
            triples.append((one.clean, *(answers if asks else answers[::-1])))
        return pairs, triples

    (pairs, triples), (_, held) = part("train", n), part("test", n_held)
    right = [1 - 2 * (i % 2) for i in range(n_held)]
    return Behaviour(pairs=pairs, triples=triples, held=held, right=right, words=words, prompts=prompts)


def neutral(model: HookedModel, n: int, seed: int, length: int = 24) -> list[str]:
    """What the model writes by itself, at temperature 1, behind some openings."""
    torch.manual_seed(seed)
    openings = [OPENINGS[i % len(OPENINGS)] for i in range(n)]
    settings = {"do_sample": True, "top_k": 0, "min_new_tokens": length, "max_new_tokens": length}
    written = model.generate(model.tokenize(openings, padding_side="left"), **settings)
    return [opening + " " + text.strip() for opening, text in zip(openings, written.texts, strict=True)]
