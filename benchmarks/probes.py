"""Erasure probes: all together beside one at a time, and the time to score and segment a document."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import mechattr as ma
from benchmarks.measure import Ratio, interleaved, ratio
from mechattr import erasure
from mechattr.erasure.documents import Document, aligned, check_layers, documents, encoded
from mechattr.erasure.fit import OFFSETS
from mechattr.erasure.segment import drops
from mechattr.models import HookedHF
from mechattr.models.base import HookedModel

TEXT = (
    "Once upon a time there was a little girl who lived in a small house near the forest. Every morning she walked to "
    "the river with her brother, and they looked for stones that were round and white. "
)
DOCUMENTS = 32  # so many that training, not what is done once, is measured
TOGETHER = 8  # of a forward pass
LONG = 512
SHARED = Path(os.environ.get("MECHATTR_TEST_DATA", Path(__file__).resolve().parents[2] / "shared"))


def measure(rounds: int, n_documents: int = DOCUMENTS) -> list[Ratio]:
    """Training on the bundled model, and on stories260K where it is found; segments at the bundled model's sizes for
    512 tokens: on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows = training("tiny", ma.load("tiny"), rounds, n_documents)
        stories = SHARED / "models" / "stories260K"
        rows += training("stories260K", ma.load(stories), (rounds + 1) // 2, n_documents) if stories.exists() else []
        return [*rows, segmenting(rounds * 3)]
    finally:
        torch.set_num_threads(threads)


def training(name: str, model: HookedModel, rounds: int, n_documents: int) -> list[Ratio]:
    """All probes of a model together beside one at a time."""
    texts = [f"{n} {TEXT}" * 4 for n in range(n_documents)]
    steps = erasure.Descent(epochs=1, scaled=False)
    fit = partial(erasure.fit_probes, model, texts, held_out=0.0, batch_size=TOGETHER, progress=False)
    functions = {
        "one": lambda: one_at_a_time(model, texts, steps, batch_size=1),
        "batched": lambda: one_at_a_time(model, texts, steps, batch_size=TOGETHER),
        "descent": lambda: fit(recipe=steps),
        "closed": lambda: fit(recipe=erasure.Closed()),
    }
    taken = interleaved(functions, rounds, warmup=1)
    n = len(check_layers(model, None)) * len(OFFSETS)
    one, many = f"{name}, one thread: one probe and document at a time", f"{n} erasure probes together"
    batched = f"{name}, one thread: one probe at a time, {TOGETHER} documents in a forward pass"
    return [
        ratio(f"{one} / {many}, by descent", taken["one"], taken["descent"], target=5.0, at_most=False),
        ratio(f"{batched} / {many}, by descent", taken["batched"], taken["descent"]),
        ratio(f"{one} / {many}, in closed form", taken["one"], taken["closed"], target=5.0, at_most=False),
    ]


def one_at_a_time(model: HookedModel, texts: list[str], recipe: erasure.Descent, *, batch_size: int) -> None:
    """The same steps probe by probe, as published: for each its own forward passes, all logits, and autograd."""
    rows = encoded(model, texts)
    for layer in check_layers(model, None):
        for offset in OFFSETS:
            weights = torch.zeros(model.info.d_vocab, model.info.d_model, requires_grad=True)
            optimiser = torch.optim.AdamW([weights], lr=recipe.rate, weight_decay=recipe.decay)
            total: torch.Tensor | float = 0.0
            for number, document in enumerate(documents(model, rows, [layer], batch_size=batch_size), 1):
                states, labels = aligned(document, offset, first=False)
                total = total + torch.nn.functional.cross_entropy(states[0] @ weights.T, labels) / recipe.documents
                if number % recipe.documents == 0:
                    (weights.grad,) = torch.autograd.grad(torch.as_tensor(total), weights)
                    optimiser.step()
                    total = 0.0


def segmenting(rounds: int) -> Ratio:
    """Drops, scores and segments of 512 tokens whose states are known, in units of 0.1 s."""
    tiny = ma.load("tiny").info
    sizes: dict[str, int] = {
        "vocab_size": tiny.d_vocab,
        "n_embd": tiny.d_model,
        "n_layer": tiny.n_layers,
        "n_head": tiny.n_heads,
    }
    model = HookedHF(
        GPT2LMHeadModel(GPT2Config(**sizes, n_positions=LONG, bos_token_id=0, eos_token_id=0)).eval(),
        tokenizer=ma.load("tiny").tokenizer,
    )
    texts = [TEXT * 20, TEXT * 3]  # the first is cut off at 512 tokens
    probes = erasure.fit_probes(model, texts, recipe=erasure.Closed(), offsets=(-2, -1, 0), progress=False)
    (document,) = documents(model, encoded(model, texts[:1]), (0, 1))

    def segments(found: Document) -> None:
        scores = erasure.psi(drops(found, probes, (0, 1), first=False))
        erasure.segment_spans(scores)

    assert len(document.tokens) == LONG
    taken = interleaved({"ours": lambda: segments(document)}, rounds)["ours"]
    name = f"tiny's sizes, one thread: scores and segments of {LONG} tokens / 0.1 s"
    return ratio(name, taken, np.full(len(taken), 0.1), target=1.0)
