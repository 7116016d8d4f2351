"""Greater-than: something lasted from one year to a later year of the same century."""

from __future__ import annotations

import random

from mechattr.tasks.pairtext import PairText, Split, fill, pick

TEMPLATES: dict[str, tuple[str, ...]] = {
    "train": (
        "The {event} began in the year {XX}{YY} and ended in the year {century}",
        "The {event} went on from the year {XX}{YY} until the year {century}",
        "From the year {XX}{YY} the {event} dragged on to the year {century}",
        "The {event} started in the year {XX}{YY}, and it stopped in the year {century}",
        "The long {event} of the year {XX}{YY} was not over before the year {century}",
        "We read that the {event} held from the year {XX}{YY} to the year {century}",
        "There was a {event} from the year {XX}{YY} to the year {century}",
    ),
    "test": (
        "The {event} lasted from the year {XX}{YY} to the year {century}",
        "Their {event} continued from the year {XX}{YY} until the year {century}",
        "It is said that the {event} ran from the year {XX}{YY} to the year {century}",
    ),
}

EVENTS: dict[str, tuple[str, ...]] = {
    "train": (
        "war", "siege", "reign", "journey", "dispute", "trial", "voyage", "famine", "quarrel", "campaign", "drought",
        "friendship", "lease", "truce", "struggle", "search",
    ),
    "test": ("strike", "marriage", "plague", "rebellion", "contract", "feud", "peace", "conflict"),
}  # fmt: skip

CENTURIES = tuple(range(11, 18))
YEARS = tuple(range(2, 99))  # 01 is the corrupt year, and after 98 there would be at most one right answer


def words(split: Split) -> tuple[str, ...]:
    """All filler words of one split, with every two-digit number (numbers are shared by the splits)."""
    return (*EVENTS[split], *(f"{number:02d}" for number in range(100)))


def draw(rng: random.Random, split: Split, *, template: int | None = None) -> PairText:
    """Draw one pair; every later two-digit year is an answer, every other one a foil, and the corrupt year is 01.

    Args:
        rng: source of every choice.
        split: "train" or "test": templates and events are disjoint, years are shared.
        template: index into the split's templates; None draws one.
    """
    index, pattern = pick(rng, TEMPLATES[split], template)
    century, year = f"{rng.choice(CENTURIES)}", rng.choice(YEARS)
    slots = {"event": rng.choice(EVENTS[split]), "XX": century, "century": century}
    clean, spans = fill(pattern, slots | {"YY": f"{year:02d}"})
    corrupt, corrupt_spans = fill(pattern, slots | {"YY": "01"})
    return PairText(
        clean=clean,
        corrupt=corrupt,
        answer=tuple(f"{later:02d}" for later in range(year + 1, 100)),
        foil=tuple(f"{earlier:02d}" for earlier in range(year + 1)),
        spans=spans,
        corrupt_spans=corrupt_spans,
        factors={"template": index, "century": int(century), "year": year},
    )
