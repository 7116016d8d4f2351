"""Agreement with known evidence: sentences in which the number of the verb follows from one noun and nothing else.

    (lead) Det (adjective) NOUN (modifier) (adverbs) | verb

The modifier holds 0 to 4 attractors, nouns of one number that is that of NOUN or the opposite: in a prepositional
phrase, in a subject relative clause ("that calls the guests"), or in an object relative clause with or without "that"
("the guests call"); every further attractor hangs on the one before it ("near the guests"). NOUN and attractors are
drawn from the same list, so that only syntax tells them apart. 0 to 3 adverbs before the verb vary the distance. No
lead, adjective, preposition or adverb has a number.
"""

from __future__ import annotations

import random
from itertools import product
from typing import Literal

from mechattr.errors import SettingError
from mechattr.tasks.evidence import EvidenceSample
from mechattr.tasks.grammar import subject_verb
from mechattr.tasks.grammar.subject_verb import CONSTRUCTIONS, Construction

Number = Literal["singular", "plural"]

ATTRACTORS = range(5)
ADVERBS = range(4)

# Animate, plural in "s"; words of both splits, for here nothing is held out but sentences.
NOUNS = subject_verb.PEOPLE["train"] + subject_verb.PEOPLE["test"]
ADJECTIVES = subject_verb.ADJECTIVES["train"] + subject_verb.ADJECTIVES["test"]
CLAUSE_VERBS = subject_verb.CLAUSE_VERBS["train"] + subject_verb.CLAUSE_VERBS["test"]
VERBS = tuple(pair for pairs in subject_verb.VERBS.values() for pair in pairs)
PREPOSITIONS = ("near", "behind", "with", "by", "from", "beyond", "beside", "opposite", "around")
LEADS = ("", "", "Today", "Now", "Here", "Perhaps")
ADVERB_PARTS = (  # the last n of these make n adverbs: "still very often"
    ("also", "still", "now"),
    ("very", "quite", "rather", "so"),
    ("often", "rarely", "seldom", "frequently"),
)
DETERMINERS: dict[Number, tuple[str, ...]] = {"singular": ("the", "this", "every"), "plural": ("the", "these", "some")}

Cell = tuple[Number, int, bool, Construction, int]
# number, attractors, whether they have the same number, construction, adverbs
CELLS: tuple[Cell, ...] = tuple(product(("singular", "plural"), ATTRACTORS, (True, False), CONSTRUCTIONS, ADVERBS))
TRIES = 200  # draws of one cell that were all seen before, after which it counts as used up


def words() -> tuple[str, ...]:
    """Every word that a sample or its continuations may have, each once, in a fixed order."""
    first = [*LEADS, *(word.capitalize() for each in DETERMINERS.values() for word in each)]
    inner = [word for each in DETERMINERS.values() for word in each]
    nouns = [form for noun in NOUNS for form in (noun, noun + "s")]
    verbs = [form for pair in (*CLAUSE_VERBS, *VERBS) for form in pair]
    adverbs = [word for part in ADVERB_PARTS for word in part]
    every = (*first, *inner, *ADJECTIVES, *nouns, *verbs, *PREPOSITIONS, "that", *adverbs)
    return tuple(dict.fromkeys(word for word in every if word))


def agreement_samples(n: int, seed: int = 0, *, strict: bool = True) -> tuple[EvidenceSample, ...]:
    """`n` different sentences, balanced over number, attractors, their number, construction and adverbs.

    The 320 combinations come in turn, in an order that the seed decides, so their counts differ by one at most.
    Without attractors, the factors `construction` and `attractor_number` are "none". `distance` counts the words
    between noun and verb.

    Args:
        n: how many; 100,000 and more are possible.
        seed: of all choices; a seed with a larger `n` begins with the same samples.
        strict: only "the" stands before nouns, so that number sits on nouns (and on verbs in relative clauses) alone;
            otherwise determiners that show the number, which are then part of `evidence_plus`.

    Raises:
        SettingError: `n` is not a positive whole number, or so large that a combination has no new sentence.

    Cost: no forward pass; 10,000 take a fraction of a second.

    References:
        Linzen et al. 2016, Assessing the Ability of LSTMs to Learn Syntax-Sensitive Dependencies, arXiv:1611.01368.
    """
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise SettingError(f"n={n!r}", "not a positive whole number", "ask for at least one sample")
    rng = random.Random(f"agreement/{seed}/{strict}")
    cells = rng.sample(CELLS, len(CELLS))
    seen: set[tuple[str, ...]] = set()
    drawn = []
    for i in range(n):
        cell = cells[i % len(cells)]
        for _ in range(TRIES):
            sample = draw(rng, cell, strict=strict)
            if (sentence := (*sample.words, sample.target)) not in seen:
                break
        else:
            found = f"no new sentence after {i}, with {cell}"
            raise SettingError(f"{n} different sentences", found, f"ask for at most {i}")
        seen.add(sentence)
        drawn.append(sample)
    return tuple(drawn)


def draw(rng: random.Random, cell: Cell, *, strict: bool = True) -> EvidenceSample:
    """One sentence of a combination of factors; the verbs are drawn, too."""
    number, count, same, construction, n_adverbs = cell
    plural = number == "plural"
    others = plural == same
    noun, *nouns = rng.sample(NOUNS, count + 1)
    sentence: list[str] = [lead] if (lead := rng.choice(LEADS)) else []

    def phrase(singular: str, many: bool, adjective: bool = False) -> int:
        """Adds determiner and noun, and an adjective between them; where the noun stands."""
        sentence.append("the" if strict else rng.choice(DETERMINERS["plural" if many else "singular"]))
        sentence.extend(rng.sample(ADJECTIVES, adjective))
        sentence.append(singular + "s" * many)
        return len(sentence) - 1

    start = len(sentence)
    evidence, attractors = phrase(noun, plural, adjective=rng.random() < 0.25), []
    secondary: tuple[int, ...] = ()
    inner = rng.choice(CLAUSE_VERBS)
    if count and construction != "pp":
        sentence += ["that"] * (construction != "rc_object_no_that")
        if construction == "rc_subject":
            sentence.append(inner[plural])
            secondary = (len(sentence) - 1,)
    before = rng.sample(PREPOSITIONS, count)
    for i, attractor in enumerate(nouns):
        sentence += [before[i]] * (i > 0 or construction == "pp")
        attractors.append(phrase(attractor, others))
    if count and construction in ("rc_object", "rc_object_no_that"):
        sentence.append(inner[others])
    sentence += [rng.choice(part) for part in ADVERB_PARTS[len(ADVERB_PARTS) - n_adverbs :]]
    marked = () if sentence[start] == "the" else (start,)
    sentence[0] = sentence[0].capitalize()
    singular_form, plural_form = rng.choice(VERBS)
    return EvidenceSample(
        words=tuple(sentence),
        target=plural_form if plural else singular_form,
        foil=singular_form if plural else plural_form,
        evidence=(evidence,),
        evidence_plus=(*marked, evidence),
        secondary=secondary,
        attractors=tuple(attractors),
        factors={
            "number": number,
            "n_attractors": count,
            "attractor_number": ("same" if same else "opposite") if count else "none",
            "construction": construction if count else "none",
            "adverbs": n_adverbs,
            "distance": len(sentence) - 1 - evidence,
            "strict": strict,
        },
    )
