"""Measure a trained model on what it has not seen: test-split sentences, random tokens, held-out books.

    python -m data.train.evaluate --corpus CORPUS --model FOLDER [--control FOLDER]

Writes `metrics.json` into the model's folder; the numbers of the control model stand beside those of the model.
"""

import argparse
import json
import math
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor
from transformers import GPT2LMHeadModel

from data.train import corpus
from data.train.sentences import GRAMMARS, texts
from mechattr.tasks.pairtext import PairText

SEED = 1234
PAIRS = 1000  # prompts of each task (of each number of attractors for agreement)
BLOCKS, BLOCK = 200, (10, 20, 40)  # random blocks, and their lengths; each is shown twice
WINDOWS = 400  # windows of held-out prose
SAMPLE = "She looked out of the window, and"


def last_logits(model: GPT2LMHeadModel, rows: list[list[int]]) -> Tensor:
    """Logits [row, vocab] after the last token of each row; rows are padded on the right, which changes nothing."""
    lengths = torch.tensor([len(row) for row in rows])
    padded = torch.tensor([row + [0] * (int(lengths.max()) - len(row)) for row in rows])
    parts = [
        model(tokens).logits[torch.arange(len(tokens)), sizes - 1]
        for tokens, sizes in zip(padded.split(100), lengths.split(100), strict=True)
    ]
    return torch.cat(parts)


def pairs_of(task: str, n: int, **factors: int) -> list[PairText]:
    """`n` pairs of the test split."""
    rng = random.Random(f"{SEED} {task} {factors}")
    return [GRAMMARS[task].draw(rng, "test", **factors) for _ in range(n)]


def accuracy(model: GPT2LMHeadModel, tokenizer: Tokenizer, pairs: list[PairText]) -> float:
    """Share of pairs whose answer has a larger logit than the foil."""
    logits = last_logits(model, [tokenizer.encode(pair.clean).ids for pair in pairs])
    answers = torch.tensor([tokenizer.encode(texts(pair.answer)[0]).ids for pair in pairs])
    foils = torch.tensor([tokenizer.encode(texts(pair.foil)[0]).ids for pair in pairs])
    return (logits.gather(1, answers) > logits.gather(1, foils)).double().mean().item()


def probability_difference(model: GPT2LMHeadModel, tokenizer: Tokenizer, pairs: list[PairText]) -> float:
    """Mean of the probability of all answers minus that of all foils."""
    probs = last_logits(model, [tokenizer.encode(pair.clean).ids for pair in pairs]).double().softmax(-1)
    differences = [
        row[[tokenizer.token_to_id(text) for text in texts(pair.answer)]].sum()
        - row[[tokenizer.token_to_id(text) for text in texts(pair.foil)]].sum()
        for row, pair in zip(probs, pairs, strict=True)
    ]
    return torch.stack(differences).mean().item()


def induction(model: GPT2LMHeadModel, length: int) -> float:
    """Accuracy over the whole vocabulary at the second copy of a random block, its first token left out."""
    generator = torch.Generator().manual_seed(SEED)
    block = torch.randint(1, model.config.vocab_size, (BLOCKS, length), generator=generator)
    tokens = torch.cat([block, block], dim=1)
    guesses = model(tokens).logits[:, length:-1].argmax(-1)
    return (guesses == block[:, 1:]).double().mean().item()


def prose_loss(model: GPT2LMHeadModel, tokenizer: Tokenizer, books: list[str]) -> dict[str, float]:
    """Mean cross-entropy on windows of held-out books, in nats a token, and in bits a character."""
    rng = random.Random(SEED)
    encoded = [tokenizer.encode(book).ids for book in books]
    length = model.config.n_positions
    total, characters = 0.0, 0
    for _ in range(WINDOWS):
        (book,) = rng.choices(encoded, [len(tokens) for tokens in encoded])
        start = rng.randrange(max(1, len(book) - length + 1))
        window = [0, *book[start : start + length - 1]]
        tokens = torch.tensor(window)
        total += F.cross_entropy(model(tokens[None]).logits[0, :-1], tokens[1:], reduction="sum").item()
        characters += len(tokenizer.decode(window[1:]))
    return {
        "nats_per_token": total / (WINDOWS * (length - 1)),
        "bits_per_character": total / math.log(2) / characters,
    }


def sample(model: GPT2LMHeadModel, tokenizer: Tokenizer) -> str:
    """A sampled continuation of SAMPLE, at temperature 0.8 among the 40 likeliest tokens."""
    torch.manual_seed(SEED)
    prompt = torch.tensor([tokenizer.encode(SAMPLE).ids])
    out = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=100, do_sample=True, temperature=0.8, top_k=40,
        pad_token_id=0,
    )  # fmt: skip
    return tokenizer.decode(out[0].tolist())


@torch.no_grad()
def measure(folder: Path, books: list[str], pairs: int = PAIRS) -> dict[str, object]:
    """All numbers of the model in `folder`."""
    model = GPT2LMHeadModel.from_pretrained(folder).eval()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    agreement = {str(k): accuracy(model, tokenizer, pairs_of("subject_verb", pairs, attractors=k)) for k in range(5)}
    return {
        "ioi_accuracy": accuracy(model, tokenizer, pairs_of("ioi", pairs)),
        "agreement_accuracy_by_attractors": agreement,
        "gendered_pronoun_accuracy": accuracy(model, tokenizer, pairs_of("gendered_pronoun", pairs)),
        "greater_than_probability_difference": probability_difference(
            model, tokenizer, pairs_of("greater_than", pairs)
        ),
        "induction_accuracy_by_block_length": {str(length): induction(model, length) for length in BLOCK},
        "prose_loss": prose_loss(model, tokenizer, books),
        "sample": sample(model, tokenizer),
    }


def main() -> None:
    """Measure the model, and its control where there is one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--control", type=Path)
    parser.add_argument("--pairs", type=int, default=PAIRS)
    arguments = parser.parse_args()
    _, books = corpus.books(arguments.corpus)
    numbers = {"model": measure(arguments.model, books, arguments.pairs)}
    if arguments.control is not None:
        numbers["control"] = measure(arguments.control, books, arguments.pairs)
    text = json.dumps({"seed": SEED, "pairs": arguments.pairs, **numbers}, indent=2) + "\n"
    (arguments.model / "metrics.json").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
