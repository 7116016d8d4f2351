"""Documents for probes: texts as rows of tokens, and what a model's layers hold at each of them."""

from __future__ import annotations

import lzma
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechattr.errors import SettingError
from mechattr.models.base import Batch, HookedModel
from mechattr.models.tokenize import encode, pad
from mechattr.sites import full_name

EMBEDDING = -1  # the number of the layer that stands for the embeddings; the final norm has that after the last block
WINDOW = 512


@dataclass(frozen=True, eq=False, slots=True)
class Document:
    """The states of one document.

    Attributes:
        tokens: its ids.
        states: what each layer holds at each position, in float32 or wider.
    """

    tokens: Int[Tensor, " pos"]
    states: Float[Tensor, "layer pos d_model"]


def read_texts(path: str | os.PathLike[str]) -> list[str]:
    """The documents of a file, which may be packed (.xz): parts between `<|endoftext|>` where it has any, else lines.

    Raises:
        SettingError: no such file, no text in it, or a line that is not UTF-8.
    """
    file = Path(path)
    if not file.is_file():
        raise SettingError(f"texts from {str(path)!r}", "no such file", "give a text file")
    content = lzma.decompress(file.read_bytes()) if file.suffix == ".xz" else file.read_bytes()
    lines = []
    for number, line in enumerate(content.split(b"\n"), start=1):
        try:
            lines.append(line.decode("utf-8").rstrip("\r"))
        except UnicodeDecodeError as error:
            asked = f"line {number} of {file.name} as UTF-8"
            raise SettingError(asked, str(error), "save the file as UTF-8") from error
    text = "\n".join(lines)
    parts = text.split("<|endoftext|>") if "<|endoftext|>" in text else lines
    texts = [part.strip() for part in parts if part.strip()]
    if not texts:
        raise SettingError(f"texts from {file.name}", "an empty file", "give at least one line of text")
    return texts


def pieces(texts: Sequence[str], *, characters: int = 1500) -> list[str]:
    """Long texts, such as books, as documents: whole paragraphs, until a document has so many characters.

    Raises:
        SettingError: no number of characters.
    """
    if isinstance(characters, bool) or not isinstance(characters, int) or characters < 1:
        raise SettingError(f"characters={characters!r}", "no length", "give a whole number from 1")
    found: list[str] = []
    for text in texts:
        waiting: list[str] = []
        for paragraph in text.split("\n\n"):
            waiting.append(paragraph.strip())
            if sum(map(len, waiting)) >= characters:
                found.append("\n\n".join(waiting))
                waiting = []
        if any(waiting):
            found.append("\n\n".join(waiting))
    return found


def drawn(
    paths: Sequence[str | os.PathLike[str]], *, characters: int = 1500, most: int | None = None, seed: int = 0
) -> list[str]:
    """Documents of some files in a random order: `read_texts`, cut up by `pieces`, and at most `most` of them.

    Raises:
        SettingError: as `read_texts` and `pieces`.
    """
    found = pieces([text for path in paths for text in read_texts(path)], characters=characters)
    random.Random(seed).shuffle(found)
    return found[:most]


def check_layers(model: HookedModel, layers: Sequence[int] | None) -> tuple[int, ...]:
    """The layers of probes: -1 is the embedding, 0 to L - 1 are the blocks, L is what follows the final norm.

    Raises:
        SettingError: no layers, one twice, or one that does not exist.
    """
    last = model.info.n_layers if full_name("ln_final") in model.sites() else model.info.n_layers - 1
    every = tuple(range(EMBEDDING, last + 1))
    if layers is None:
        return every
    wrong = [layer for layer in layers if isinstance(layer, bool) or layer not in every]
    if wrong or not layers or len(set(layers)) < len(layers):
        found = f"layers {EMBEDDING} to {last}" if wrong else "none, or one twice"
        fix = f"name some of {EMBEDDING} (embedding), 0 to {model.info.n_layers - 1} (blocks)"
        raise SettingError(f"layers={tuple(layers)}", found, fix + (f", {last} (final norm)" * (last > every[-2])))
    return tuple(layers)


def site_of(model: HookedModel, layer: int) -> str:
    """The full name of the site that a layer's probes read."""
    if layer == EMBEDDING:
        return full_name("embed")
    return full_name("ln_final") if layer == model.info.n_layers else full_name("resid_post", layer)


def room(model: HookedModel, window: int) -> int:
    """Most tokens of a document: `window`, or the model's context where that is shorter.

    Raises:
        SettingError: a window that is no count.
    """
    if isinstance(window, bool) or not isinstance(window, int) or window < 1:
        raise SettingError(f"window={window!r}", "no number of tokens", "give a whole number from 1")
    return window if model.info.bounded is False else min(window, model.info.n_ctx)


def encoded(model: HookedModel, texts: Sequence[str], window: int = WINDOW) -> list[list[int]]:
    """The ids of each text, as the model's tokenizer begins it, cut off at `window`; an empty text has none, or only
    the special token that every text begins with.

    Raises:
        SettingError: something else than texts, a window that is no count, or no tokenizer.
    """
    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
        raise SettingError("texts", f"a {type(texts).__name__}", "give a list of texts, one a document")
    if model.tokenizer is None:
        raise SettingError("texts", "this model has no tokenizer", "load it with tokenizer=...")
    most = room(model, window)
    return [encode(model.tokenizer, text)[:most] for text in texts]


def documents(
    model: HookedModel, rows: Sequence[Sequence[int]], layers: Sequence[int], *, batch_size: int = 8
) -> Iterator[Document]:
    """The states of each document, in order; documents run together `batch_size` at a time, and those without a token
    do not run.

    Cost:
        1 forward pass a document.
    """
    sites = [site_of(model, layer) for layer in layers]
    device = model.weight("embed.W_E").device
    for begin in range(0, len(rows), batch_size):
        part = rows[begin : begin + batch_size]
        full = [row for row in part if row]
        if full:
            batch: Batch = pad(full, model.tokenizer, device=device)
            cache = model.run(batch, record=sites).activations
        numbers = iter(range(len(full)))
        for row in part:
            if not row:
                nothing = torch.zeros(len(sites), 0, model.info.d_model, device=device)
                yield Document(torch.zeros(0, dtype=torch.long, device=device), nothing)
                continue
            number, length = next(numbers), len(row)
            states = torch.stack([cache[site].values[number, :length] for site in sites])
            yield Document(batch.tokens[number, :length], states.to(torch.promote_types(states.dtype, torch.float32)))


def aligned(
    document: Document, offset: int, *, first: bool = True
) -> tuple[Float[Tensor, "layer n d_model"], Int[Tensor, " n"]]:
    """States and the tokens at t + offset that they are asked about; none where the document is too short.

    Args:
        document: its states.
        offset: where the token is, from the state.
        first: whether the first position may be asked about itself; probes at offset 0 are not trained on it, because
            it is the same token in every document.
    """
    n = len(document.tokens)
    begin, end = max(0, -offset), min(n, n - offset)
    begin = max(begin, 1) if offset == 0 and not first else begin
    if begin >= end:
        return document.states[:, :0], document.tokens[:0]
    return document.states[:, begin:end], document.tokens[begin + offset : end + offset]
