"""An induction circuit set by hand, so that the true circuit is known.

The residual stream is split: token | position | previous token | output | spare. In the first block, head 0 attends to
the previous position by position alone and copies its token into "previous token". In the last, head 0 looks with the
current token for a position whose previous token is the same, and copies that position's token to "output", the only
part that the logits read. All other heads are random: they read the whole stream and write to "spare", which no part
of the circuit reads, and with `noise` a little of it everywhere.
"""

from __future__ import annotations

from typing import Any

import torch

import mechattr as ma
from mechattr.models.plain import HookedPlain, plain_model
from mechattr.models.plain_config import PlainConfig
from mechattr.tasks.task import Task

VOCAB, BLOCK, SPARE, HEADS = 13, 6, 5, 4
CONTEXT = 2 * BLOCK
TOKEN, POSITION, PREVIOUS, OUTPUT, REST = range(5)  # parts of the stream
PARTS = (VOCAB, CONTEXT, VOCAB, VOCAB, SPARE)

PREVIOUS_HEAD, INDUCTION_HEAD = "a0.h0", "a1.h0"
COMPOSITION = (PREVIOUS_HEAD, "a1.h0<k>")
QUERY, VALUE = ("input", "a1.h0<q>"), ("input", "a1.h0<v>")
EARLIER, READOUT = ("input", "a0.h0<v>"), (INDUCTION_HEAD, "logits")
POSITIONAL = {("input", "a0.h0<q>"), ("input", "a0.h0<k>")}  # the same on both prompts, whatever the corruption
BY_TOKENS = {EARLIER, COMPOSITION, QUERY, VALUE, READOUT}
CIRCUIT = BY_TOKENS | POSITIONAL


def induction_model(*, sharpness: float = 6.0, noise: float = 0.0, idle_blocks: int = 0, seed: int = 0) -> HookedPlain:
    """The model; `sharpness` is how much higher a match scores than anything else before the softmax, `idle_blocks` lie
    between the two blocks of the circuit."""
    last = 1 + idle_blocks
    width = VOCAB  # of a head: positions fit too
    config = PlainConfig.attention_only(
        n_layers=last + 1,
        n_heads=HEADS,
        n_kv_heads=HEADS,
        d_model=sum(PARTS),
        d_head=width,
        d_vocab=VOCAB,
        n_ctx=CONTEXT,
    )
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    identity = torch.eye(width, dtype=torch.float64)
    weights: dict[str, torch.Tensor] = {
        "embed.W_E": _into(TOKEN, identity[:VOCAB]),
        "pos_embed.W_pos": _into(POSITION, torch.eye(CONTEXT, dtype=torch.float64)),
        "unembed.W_U": 5 * _into(OUTPUT, identity).T,
        "unembed.b_U": torch.zeros(VOCAB),
    }
    for layer in range(last + 1):
        p = f"blocks.{layer}.attn."
        for kind in "QKV":
            weights[f"{p}W_{kind}"] = random(HEADS, sum(PARTS), width) / 2
            weights[f"{p}b_{kind}"] = torch.zeros(HEADS, width)
        weights[f"{p}W_O"] = noise * random(HEADS, width, sum(PARTS)) + _into(REST, random(HEADS, width, SPARE))
        weights[f"{p}b_O"] = torch.zeros(sum(PARTS))
    here = torch.eye(CONTEXT, width, dtype=torch.float64)
    before = torch.zeros_like(here)
    before[1:] = here[:-1]
    scale = width**0.5  # undoes the division of scores
    designs = (
        (60 * scale * _into(POSITION, before.T).T, _into(POSITION, here.T).T, PREVIOUS),
        (sharpness * scale * _into(TOKEN, identity).T, _into(PREVIOUS, identity).T, OUTPUT),
    )
    for layer, (query, key, written) in zip((0, last), designs, strict=True):
        chosen = {"Q": query, "K": key, "V": _into(TOKEN, identity).T, "O": _into(written, identity)}
        for kind, matrix in chosen.items():
            weights[f"blocks.{layer}.attn.W_{kind}"][0] = matrix
    return plain_model(config, weights)


def _into(part: int, x: torch.Tensor) -> torch.Tensor:
    """[..., part] -> [..., d_model], zero outside the part."""
    whole = torch.zeros(*x.shape[:-1], sum(PARTS), dtype=torch.float64)
    start = sum(PARTS[:part])
    whole[..., start : start + PARTS[part]] = x
    return whole


def induction_task(model: Any, changed: str = "all", n: int = 8, seed: int = 0) -> Task:
    """A block of different tokens and its beginning once more: the answer is how the block goes on.

    `changed` in the corrupt prompt: the `"first block"`, the `"last token"`, the `"target"` (in the block), or `"all"`,
    another repeated block. New tokens occur nowhere in the clean prompt; the foil occurs in neither.
    """
    generator = torch.Generator().manual_seed(seed)
    pairs = []
    for row in range(n):
        drawn = torch.randperm(VOCAB, generator=generator).tolist()
        block, other, foil = drawn[:BLOCK], drawn[BLOCK : 2 * BLOCK], drawn[-1]
        again = 2 + row % (BLOCK - 2)  # at least two tokens: position 0 has no other position before it
        clean = block + block[:again]
        corrupt = {
            "first block": other + block[:again],
            "last token": clean[:-1] + other[:1],
            "target": block[:again] + other[:1] + block[again + 1 :] + block[:again],
            "all": other + other[:again],
        }[changed]
        pairs.append({"clean_tokens": clean, "corrupt_tokens": corrupt, "answer": block[again], "foil": foil})
    return ma.tasks.from_pairs(model, pairs, name="induction set by hand")
