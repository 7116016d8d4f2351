"""The documents that probes are fitted on, as every probe sees them."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from mechattr.engines.linear_probes import log_probabilities
from mechattr.erasure.documents import Document, aligned, documents
from mechattr.errors import SettingError
from mechattr.models.base import HookedModel


@dataclass(eq=False)
class Work:
    """The documents of one fit, and how probes see them.

    Attributes:
        train, test: which documents are trained on and which are held out.
    """

    model: HookedModel
    rows: Sequence[Sequence[int]]
    layers: tuple[int, ...]
    offsets: tuple[int, ...]
    held_out: float
    seed: int
    batch_size: int
    progress: bool | None

    def __post_init__(self) -> None:
        order = list(range(len(self.rows)))
        random.Random(self.seed).shuffle(order)
        n = min(round(self.held_out * len(order)), len(order) - 1)
        if self.held_out and len(order) > 1:
            n = max(n, 1)
        self.test, self.train = sorted(order[:n]), sorted(order[n:])
        most = max(len(self.rows[i]) for i in self.train)
        barren = [o for o in self.offsets if most <= (abs(o) if o else 1)]
        if barren:
            found = f"the longest document to train on has {most} tokens"
            raise SettingError(f"a probe of offset {barren[0]}", found, "give longer texts, or leave this offset out")

    @property
    def n_probes(self) -> int:
        """Layers times offsets."""
        return len(self.layers) * len(self.offsets)

    @property
    def tokens(self) -> Int[Tensor, " total"]:
        """All tokens, with the lengths of the documents before them."""
        flat = [len(row) for row in self.rows] + [token for row in self.rows for token in row]
        return torch.tensor(flat)

    @property
    def key(self) -> str:
        """What tells this fit from another."""
        digest = hashlib.sha256(str((self.layers, self.offsets, self.held_out, self.seed)).encode())
        digest.update(self.tokens.numpy().tobytes())
        return digest.hexdigest() + self.model.fingerprint()["weight_hash"]

    def documents(self, which: Sequence[int], label: str) -> Iterator[Document]:
        """Some documents, with a progress bar."""
        rows = [self.rows[i] for i in which]
        found = documents(self.model, rows, self.layers, batch_size=self.batch_size)
        return iter(
            tqdm(found, total=len(rows), desc=label, disable=None if self.progress is None else not self.progress)
        )

    def stacked(
        self, document: Document
    ) -> tuple[Float[Tensor, "probe n d_model"], Int[Tensor, "probe n"], Float[Tensor, "probe n"]]:
        """States, labels and the weights of a mean for every probe, layers first: NaN-free, with weight 0 where an
        offset has no label."""
        n = len(document.tokens)
        labels = document.tokens.new_zeros(len(self.offsets), n)
        kept = document.states.new_zeros(len(self.offsets), n)
        for i, offset in enumerate(self.offsets):
            _, tokens = aligned(document, offset, first=False)
            begin = max(0, -offset) if offset else 1
            labels[i, begin : begin + len(tokens)] = tokens
            kept[i, begin : begin + len(tokens)] = 1.0
        states = document.states.repeat_interleave(len(self.offsets), 0)
        repeat = len(self.layers), 1
        return states, labels.repeat(repeat), kept.repeat(repeat)


def losses(
    work: Work, weights: Float[Tensor, "probe vocab d_model"], *, epoch: int, train: Tensor | None
) -> list[dict[str, Any]]:
    """The mean cross-entropy of each probe on the documents that are held out, beside that of training."""
    total, seen = (torch.zeros(work.n_probes, dtype=torch.float64) for _ in range(2))
    for document in work.documents(work.test, "held-out documents"):
        states, labels, kept = work.stacked(document)
        found = log_probabilities(weights, states.to(weights.dtype), labels)
        some = kept.sum(-1)
        total -= ((kept * found).sum(-1) / some.clamp(min=1)).cpu().double()
        seen += some.cpu() > 0
    mean = (total / seen).tolist()
    places = [(layer, offset) for layer in work.layers for offset in work.offsets]
    return [
        {
            "layer": layer,
            "offset": offset,
            "epoch": epoch,
            "train": None if train is None else float(train[i]),
            "held_out": mean[i] if seen[i] else None,
        }
        for i, (layer, offset) in enumerate(places)
    ]
