"""Batches as a pure function of (seed, step), so that a resumed run needs no generator state."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from data.train import lexicon as phrases
from data.train import sentences, variety
from data.train.corpus import END
from data.train.schedule import Phase
from mechattr.tasks.grammar.names import FEMALE, MALE
from mechattr.tasks.pairtext import PairText

ANSWER_WEIGHT = 5.0  # the answer is one token of some fifteen, and the one that matters
PROMPT_WEIGHT = 0.25  # most prompt words are drawn at random: nothing to learn there
SWAPPED = 0.35  # share of the name-transfer sentences whose two names become any two words of the vocabulary
NOISE = 0.1  # share of their other words that become random words
VARIED = 0.7  # share of the other sentences that get other words, see `variety`
LEADS = ("\n", END, ". ")  # what stands between two pieces of a row
LINKS = (",", " and", " to", " to the year", " until the year", " or", ", then", " before")  # between two years

Draw = Callable[[random.Random, phrases.Words], tuple[str, str]]
Row = tuple[list[int], list[float]]  # tokens, and the weight of each as a prediction target


@dataclass(frozen=True)
class Mixture:
    """Draws rows of every kind.

    Attributes:
        tokenizer: the trained tokenizer; END is token 0.
        prose: the training books as one array of tokens, an END token between two books.
        seed: of every choice.
    """

    tokenizer: Tokenizer
    prose: np.ndarray
    seed: int

    def batch(self, phase: Phase, step: int) -> tuple[Tensor, Tensor]:
        """Tokens [rows, length + 1] and target weights [rows, length] of one step of the whole run."""
        rng = random.Random(f"{self.seed}/{step}")
        kinds = rng.choices(tuple(phase.kinds), tuple(phase.kinds.values()), k=phase.rows)
        rows = [getattr(self, kind)(rng, phase) for kind in kinds]
        size = phase.length + 1
        tokens = torch.tensor([tokens[:size] for tokens, _ in rows])
        return tokens, torch.tensor([weights[1:size] for _, weights in rows])

    def spans(self, rng: random.Random, phase: Phase) -> Row:
        """Random spans of the whole vocabulary, each followed by one or two copies; only the copies count."""
        vocabulary = range(1, self.tokenizer.get_vocab_size())
        tokens = [0] * rng.randrange(2)
        weights = [0.0] * len(tokens)
        while len(tokens) <= phase.length:
            span = rng.choices(vocabulary, k=rng.randint(*phase.span))
            tokens += span
            weights += [0.0] * len(span)
            for _ in range(rng.randint(1, 2)):
                gap = rng.choices(vocabulary, k=rng.choice((0, 0, rng.randint(1, 8))))
                tokens += gap + span
                weights += [0.0] * (len(gap) + 1) + [1.0] * (len(span) - 1)
        return tokens, weights

    def passage(self, rng: random.Random, phase: Phase) -> Row:
        """A window of the books at any place; half of the rows start with END."""
        return self._window(rng, phase, rng.randrange(len(self.prose) - phase.length))

    def around_word(self, rng: random.Random, phase: Phase) -> Row:
        """A window of the books around a word that the tasks use, every such word as often as any other."""
        places = rng.choice(self._occurrences)
        start = int(rng.choice(places)) - rng.randrange(phase.length)
        return self._window(rng, phase, min(max(start, 0), len(self.prose) - phase.length - 1))

    def tasks(self, rng: random.Random, phase: Phase) -> Row:
        """Task sentences one after the other; a third of the rows start with prose, a third with END."""
        tokens, weights = [], []
        start = rng.randrange(3)
        if start == 0:
            size = rng.randint(1, phase.length // 2)
            place = rng.randrange(len(self.prose) - size)
            tokens, weights = self.prose[place : place + size].tolist(), [1.0] * size
        elif start == 1:
            tokens, weights = [0], [0.0]
        while len(tokens) <= phase.length:
            lead = "" if len(tokens) == 1 or not tokens else rng.choice(LEADS)
            task = rng.choices(tuple(phase.tasks), tuple(phase.tasks.values()))[0]
            prompt, answer = self._sentence(rng, task, lead)
            tokens += prompt + answer
            weights += [PROMPT_WEIGHT] * len(prompt) + [ANSWER_WEIGHT] * len(answer)
        return tokens, weights

    def lexicon(self, rng: random.Random, phase: Phase) -> Row:
        """Phrases that show the number and the gender of words."""
        return self._phrases(rng, phase, phrases.draw, phrases.ALL_WORDS)

    def rare_words(self, rng: random.Random, phase: Phase) -> Row:
        """The same phrases with the words of the task generators alone."""
        return self._phrases(rng, phase, phrases.draw, phrases.OWN_WORDS)

    def names(self, rng: random.Random, phase: Phase) -> Row:
        """Phrases that show which words are names."""
        return self._phrases(rng, phase, phrases.named, phrases.OWN_WORDS)

    def years(self, rng: random.Random, phase: Phase) -> Row:
        """Rising years of one century, one list after the other: the order of the two-digit numbers."""
        tokens = [0] * rng.randrange(2)
        weights = [0.0] * len(tokens)
        while len(tokens) <= phase.length:
            century, year, link = rng.randint(10, 20), rng.randint(0, 98), rng.choice(LINKS)
            lead = rng.choice(LEADS) if len(tokens) > 1 else ""
            tokens += self.tokenizer.encode(f"{lead}The year {century}{year:02d}").ids
            weights += [PROMPT_WEIGHT] * (len(tokens) - len(weights))
            while year < 99:
                year = rng.randint(year + 1, 99)
                tokens += self.tokenizer.encode(f"{link} {century}{year:02d}").ids
                weights += [0.0] * (len(tokens) - len(weights) - 1) + [1.0]
        return tokens, weights

    def _phrases(self, rng: random.Random, phase: Phase, draw: Draw, words: phrases.Words) -> Row:
        tokens = [0] * rng.randrange(2)
        weights = [0.0] * len(tokens)
        while len(tokens) <= phase.length:
            lead = rng.choice(LEADS) if len(tokens) > 1 else ""
            start, decided = draw(rng, words)
            before, after = self.tokenizer.encode(lead + start).ids, self.tokenizer.encode(decided).ids
            tokens += before + after
            weights += [PROMPT_WEIGHT] * len(before) + [1.0] * len(after)
        return tokens, weights

    def _sentence(self, rng: random.Random, task: str, lead: str) -> tuple[list[int], list[int]]:
        if task in ("transfer", "scattered", "fronted"):
            return self._transfer(rng, lead, task)
        pair = sentences.GRAMMARS[task].draw(rng, "train")
        if task == "ioi" and rng.random() < SWAPPED:
            return self._swapped(rng, pair, lead)
        if rng.random() < VARIED:
            prompt, answer = variety.vary(rng, task, pair)
        else:
            prompt, answer = pair.clean, rng.choice(sentences.texts(pair.answer))
        return self.tokenizer.encode(lead + prompt).ids, self.tokenizer.encode(answer).ids

    def _swapped(self, rng: random.Random, pair: PairText, lead: str) -> tuple[list[int], list[int]]:
        """A name transfer between two random words; of the other words but the last, some are random too."""
        prompt = self.tokenizer.encode(lead + pair.clean).ids
        names = [self.tokenizer.token_to_id(f"Ġ{str(name).strip()}") for name in (pair.answer, pair.foil)]
        swap = dict(zip(names, rng.sample(self._swaps, 2), strict=True))
        noisy = [rng.choice(self._swaps) if token not in swap and rng.random() < NOISE else token for token in prompt]
        return [swap.get(token, token) for token in (*noisy[:-1], prompt[-1])], [swap[names[0]]]

    def _transfer(self, rng: random.Random, lead: str, task: str) -> tuple[list[int], list[int]]:
        """A composed name transfer, half of the time between two random words; scattered: with noise in between."""
        words = self._words if rng.random() < 0.5 else variety.MEN + variety.WOMEN + MALE["train"] + FEMALE["train"]
        first, second = rng.sample(words, 2)
        compose = variety.fronted if task == "fronted" else variety.composed
        prompt, answer = compose(rng, first, second)
        if task == "scattered" or (task == "fronted" and rng.random() < 0.5):
            prompt = variety.scatter(rng, prompt, keep=(first, second), noise=self._words)
        return self.tokenizer.encode(lead + prompt).ids, self.tokenizer.encode(answer).ids

    def _window(self, rng: random.Random, phase: Phase, start: int) -> Row:
        first = [0] * rng.randrange(2)
        tokens = first + self.prose[start : start + phase.length + 1].tolist()
        return tokens, [1.0] * len(tokens)

    @cached_property
    def _occurrences(self) -> list[np.ndarray]:
        order = np.argsort(self.prose, kind="stable")
        words = [f"Ġ{word}" for word in sentences.words("train", "test") if word.isalpha()]
        ids = sorted({i for i in map(self.tokenizer.token_to_id, words) if i is not None})
        bounds = np.searchsorted(self.prose[order], [ids, [i + 1 for i in ids]])
        return [order[low:high] for low, high in bounds.T if high > low]

    @cached_property
    def _words(self) -> list[str]:
        """Whole words of the vocabulary, without the fillers of the test split, in the order of their tokens."""
        held_out = set(sentences.words("test"))
        tokens = sorted(self.tokenizer.get_vocab().items(), key=lambda item: item[1])
        words = (token[1:] for token, _ in tokens if token[0] == "Ġ" and token[1:].isalpha())
        return [word for word in words if word not in held_out]

    @cached_property
    def _swaps(self) -> list[int]:
        vocabulary = self.tokenizer.get_vocab()
        return [vocabulary["Ġ" + word] for word in self._words]
