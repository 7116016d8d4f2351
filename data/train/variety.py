"""Other words for the training sentences, so that what is learned is the rule and not the short lists of fillers.

Nothing here is a filler of the test split (a test checks it).
"""

import random
import re
from collections.abc import Mapping, Sequence

from data.train.sentences import texts
from mechattr.tasks.grammar import ioi, subject_verb
from mechattr.tasks.grammar.names import FEMALE, MALE
from mechattr.tasks.pairtext import PairText

NOUNS = tuple(  # with a plural in "s"
    """king queen mother father son daughter hand eye head face heart voice word day year night room bed street town
    stone star cloud sea fire light name story place moment mind arm finger shoulder lip ear dream song paper coat
    boot plate mirror corner floor roof stair path island mountain forest rock wave storm root seed egg nest wing
    pig duck hen spider snake whale prince knight giant priest maid judge enemy companion leader creature animal
    parent ghost robber pirate warrior chief slave peasant miller trader ruler rider traveler speaker book letter
    flower ring basket coin sword hat cup rope bottle picture train engine clock bell drum flag desk lake pond wood
    orchard park street nephew neighbor tutor pupil author butcher barber pilot guard spy thinker dealer owner
    tenant horseman eagle crow owl frog turtle camel tiger monkey donkey bee ant worm plant apple pear cake nail
    hammer wheel chain shed cellar attic porch shore valley cave canal harbor temple hotel theater store factory
    prison hospital
    """.split()
)  # fmt: skip
CLAUSE_VERBS = tuple(
    """want need leave find take make keep hold feed lead greet bring join remember forget draw protect believe answer
    accept avoid expect notice paint surround support ignore respect welcome blame doubt pay""".split()
)
PREPOSITIONS = tuple("under above on in of over against among below inside outside to for without".split())
ADJECTIVES = tuple(
    """big small new white black red green strange sad happy clever foolish rich proud silent dear strong weak pretty
    ugly lazy cruel gentle honest famous wild dark heavy""".split()
)
ADVERBS = tuple("now then seldom rarely hardly soon also really certainly clearly surely simply generally only".split())
OPENINGS = (
    "He says that", "You see that", "Some people believe that", "At noon", "On Monday", "Of course", "Perhaps",
    "In summer", "Everyone knows that", "She told me that", "Before dinner", "Now and then", "As you know,",
    "We hope that", "The old man said that", "In our town", "All day long", "Here", "On the whole", "They know that",
)  # fmt: skip

MEN = tuple(
    """Dick Fred Ned Hugh Roger Albert Andrew Anthony Bernard Edgar Edmund Ernest Francis Gilbert Harold Jim Joe Leonard
    Louis Mark Matthew Nicholas Oscar Patrick Roland Rupert Samuel Theodore Timothy Victor Vincent Will Bob Bill Dan
    Jasper Giles Laurie Adam Isaac Jacob Luke Phil Alfred""".split()
)
WOMEN = tuple(
    """Ann Bertha Betty Beatrice Cecilia Charlotte Daisy Diana Dorothy Edith Eleanor Eliza Eva Florence Frances Grace
    Hannah Hester Ida Isabel Jenny Jessie Judith Lily Louisa Mabel Maggie Maria Marian Maud Minnie Molly Nellie Nora
    Phoebe Polly Rebecca Rosa Rose Sophia Sylvia Victoria Violet Jo Meg Beth Marilla Marianne""".split()
)
GENDERED = (
    ("host", "hostess"), ("widower", "widow"), ("bridegroom", "bride"), ("grandson", "granddaughter"),
    ("master", "mistress"), ("lad", "lass"), ("baron", "baroness"), ("wizard", "witch"), ("landlord", "landlady"),
    ("waiter", "waitress"), ("heir", "heiress"), ("godfather", "godmother"), ("schoolboy", "schoolgirl"),
    ("policeman", "housemaid"), ("knight", "fairy"), ("priest", "maid"), ("fellow", "dame"), ("papa", "mamma"),
    ("stepfather", "stepmother"), ("old man", "old woman"), ("little boy", "little girl"), ("young man", "young lady"),
    ("gentleman", "gentlewoman"), ("captain's son", "captain's daughter"), ("giant", "maiden"),
)  # fmt: skip
TIMES = (
    "One night", "That day", "Next morning", "In spring", "After dinner", "Soon", "Then", "A year later", "Suddenly",
    "At midnight", "On Sunday", "Yesterday", "Now", "At the end", "In the afternoon", "Every winter", "Years ago",
)  # fmt: skip
DEEDS = (
    "was glad", "was happy", "cried", "shouted", "went to bed", "lost the way", "walked away", "stood still",
    "came back", "fell asleep", "shut the door", "felt ill", "turned pale", "called for help", "took off the coat",
    "wrote a letter", "drank some water", "hid in the wood", "climbed the hill", "asked a question",
    "read the paper", "jumped up", "grew old", "was afraid of the dark", "sold the horse", "said nothing",
    "came to the river", "broke the glass", "lit the lamp", "put down the book", "stayed in the garden",
    "thought of home", "spoke slowly",
)  # fmt: skip
LINKS = (
    " because", " when", ", so", " while", " before", " after", " until", " as soon as", ", and then", ", and", ", but",
    " although", ", for", " since", " whenever",
)  # fmt: skip


CLAUSES = tuple("When While After Before As Once Because Whenever If Although".split())
DOINGS = (
    "{X} and {Y} walked through the {place}", "{X} and {Y} looked at the {place}",
    "{X} and {Y} came out of the {place}", "{X} and {Y} stood before the {place}",
    "{X} and {Y} drove to the {place}", "{X} and {Y} talked about the {place}", "{X} and {Y} ran from the {place}",
    "{X} and {Y} worked in the {place}", "{X} and {Y} slept in the {place}", "{X} and {Y} waited near the {place}",
    "{X} and {Y} found the {place}", "{X} and {Y} visited the {place}", "{X} saw {Y} near the {place}",
    "{X} lived with {Y} in the {place}", "{X} spoke with {Y} in the {place}", "{X} followed {Y} into the {place}",
    "{X} and {Y} lost the way to the {place}", "in the {place} {X} and {Y} sat down",
    "{X} and {Y} were glad of the {place}", "{X} and {Y} had no {place}",
    "behind the {place} {X} and {Y} had a quarrel",
)  # fmt: skip
TURNS = (". Then", ", and", ", but", ". Later", ". After that", ". In the end", ", so", ", and soon", ". Next day", ".")
MANNERS = ("", "", "", " quickly", " kindly", " gladly", " again", " quietly", " then", " himself")
GIVING = tuple(
    """gave handed offered showed sold passed sent brought lent threw promised carried paid returned left read
    presented explained""".split()
)
ARTICLES = ("a", "a", "the", "that", "another", "one more", "a new")

FRONTS = ("In", "On", "Under", "Near", "Behind", "From", "By", "Before", "Over", "Beyond", "Inside", "Outside", "Upon")
STAYING = (
    "talked", "smiled", "rested", "parted", "waited", "laughed", "fell asleep", "shook hands", "sat down", "sang",
    "met", "danced", "quarrelled", "agreed", "wept", "worked hard", "had dinner", "looked up", "stood still",
    "were happy", "were afraid", "lost heart", "read letters", "grew tired", "made plans",
)  # fmt: skip
TURNED = (*TURNS, ", but soon", ", but now", ", while", ", until", ", when", ". First", ". At once", ", and at last")


def substitute(text: str, words: Mapping[str, str]) -> str:
    """Exchange whole words of a text."""
    return re.sub(r"[A-Za-z]+", lambda match: words.get(match[0], match[0]), text)


def agreement(rng: random.Random, text: str) -> str:
    """Other nouns (in the same number), clause verbs, prepositions, adjectives and adverbs; often another opening."""
    words: dict[str, str] = {}
    for noun in subject_verb.PEOPLE["train"] + subject_verb.THINGS["train"]:
        other = rng.choice(NOUNS)
        words |= {noun: other, noun + "s": other + "s"}
    for singular, plural in subject_verb.CLAUSE_VERBS["train"]:
        other = rng.choice(CLAUSE_VERBS)
        words |= {singular: other + "s", plural: other}
    for old, new in (
        (subject_verb.PREPOSITIONS, PREPOSITIONS),
        (subject_verb.ADJECTIVES, ADJECTIVES),
        (subject_verb.ADVERBS, ADVERBS),
    ):
        words |= {word: rng.choice(new) for word in old["train"]}
    if text.startswith("The ") and rng.random() < 0.7:
        text = f"{rng.choice(OPENINGS)} t{text[1:]}"
    return substitute(text, words)


def pronoun(rng: random.Random, gender: str) -> str:
    """A sentence of the same kind with other people, times, deeds and links."""
    person = rng.choice((MEN, WOMEN)[gender == "she"])
    if rng.random() < 0.5:
        person = "the " + rng.choice(GENDERED)[gender == "she"]
    elif rng.random() < 0.3:
        person = f"the {('man', 'woman')[gender == 'she']} who {rng.choice(DEEDS)}"
    return f"{rng.choice(TIMES)} {person} {rng.choice(DEEDS)}{rng.choice(LINKS)}"


def transfer(rng: random.Random, pair: PairText) -> tuple[str, str]:
    """Prompt and answer with other names, places and objects."""
    names = rng.sample(MEN + WOMEN, len(MALE["train"] + FEMALE["train"]))
    words = dict(zip(MALE["train"] + FEMALE["train"], names, strict=True))
    words |= {word: rng.choice(NOUNS) for word in ioi.PLACES["train"] + ioi.OBJECTS["train"]}
    (answer,) = texts(pair.answer)
    return substitute(pair.clean, words), substitute(answer, words)


def composed(rng: random.Random, first: str, second: str) -> tuple[str, str]:
    """A name transfer between two people, built from parts, and its answer: the one who does not act."""
    subject, other = rng.sample((first, second), 2)
    doing = rng.choice(DOINGS).format(X=first, Y=second, place=rng.choice(NOUNS))
    if rng.random() < 0.5:
        start = f"{rng.choice(CLAUSES)} {doing},"
    else:
        start = f"{rng.choice(TIMES)} {doing}{rng.choice(TURNS)}"
    return f"{start} {subject}{_gift(rng)}", " " + other


def fronted(rng: random.Random, first: str, second: str) -> tuple[str, str]:
    """The same with a place in front: the two names follow a noun."""
    subject, other = rng.sample((first, second), 2)
    place = " of the ".join(rng.sample(NOUNS, rng.randint(1, 2)))
    start = f"{rng.choice(FRONTS)} the {place} {first} and {second} {rng.choice(STAYING)}{rng.choice(TURNED)}"
    return f"{start} {subject}{_gift(rng)}", " " + other


def _gift(rng: random.Random) -> str:
    gift = f"{rng.choice(GIVING)} {rng.choice(ARTICLES)} {rng.choice(NOUNS)}"
    return f"{rng.choice(MANNERS)} {gift} {rng.choice(('to', 'to', 'to', 'for'))}"


def scatter(rng: random.Random, text: str, *, keep: Sequence[str], noise: Sequence[str]) -> str:
    """Exchange one word in four, but the last and those to keep, for a random word, and add one before one in ten."""
    *words, last = text.split(" ")
    scattered: list[str] = []
    for word in words:
        if rng.random() < 0.1:
            scattered.append(rng.choice(noise))
        exchanged = rng.random() < 0.25 and word.strip(".,") not in keep
        scattered.append(rng.choice(noise) if exchanged else word)
    return " ".join([*scattered, last])


def vary(rng: random.Random, task: str, pair: PairText) -> tuple[str, str]:
    """Prompt and answer of a sentence like `pair`, with other words; greater-than, whose years are shared, stays."""
    answer = rng.choice(texts(pair.answer))
    if task == "ioi":
        return transfer(rng, pair)
    if task == "subject_verb":
        return agreement(rng, pair.clean), answer
    if task == "gendered_pronoun":
        return pronoun(rng, answer.strip()), answer
    return pair.clean, answer
