"""A network whose states say exactly which tokens stood where, and which forgets them at letters of its choice."""

from __future__ import annotations

import random
from typing import Any

import torch

from mechattr.models.plain import HookedPlain, plain_model
from mechattr.models.plain_config import PlainConfig

V, N = 12, 9
BOS = V - 1
FORGOTTEN = "bdfhj"  # letters at which the second block forgets
T = torch.float64


class Letters:
    """A tokenizer of single letters, `a` being token 0; the first token of a text is always `bos`, if there is one."""

    pad_token_id, eos_token_id, bos_token, is_fast = 0, 0, None, True

    def __init__(self, bos: int | None = BOS) -> None:
        self.all_special_ids = () if bos is None else (bos,)

    def __call__(self, text: str, add_special_tokens: bool = True, **asked: Any) -> dict[str, Any]:
        first = list(self.all_special_ids) if add_special_tokens else []
        found: dict[str, Any] = {"input_ids": first + [ord(c) - 97 for c in text]}
        if asked.get("return_offsets_mapping"):
            found["offset_mapping"] = [(0, 0)] * len(first) + [(i, i + 1) for i in range(len(text))]
        return found

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(chr(97 + i) for i in ids)

    def convert_ids_to_tokens(self, token: int) -> str:
        return chr(97 + token)

    def get_vocab(self) -> dict[str, int]:
        return {chr(97 + i): i for i in range(V)}


def copying(*, forgetting: bool = False, first: bool = True) -> HookedPlain:
    """The first block brings the previous token, so that the state at t says x_t and x_{t-1}; where a second one
    forgets, it takes both away at the letters of `FORGOTTEN`. `first`: whether texts begin with a special token."""
    positions = N + 1
    c = PlainConfig.attention_only(
        n_layers=1 + forgetting, n_heads=1, n_kv_heads=1, d_model=2 * V + positions, d_head=2 * V, d_vocab=V,
        n_ctx=positions,
    )  # fmt: skip
    weights = {name: torch.zeros_like(tensor) for name, tensor in plain_model(c)._weights.items()}
    here, before, place = slice(0, V), slice(V, 2 * V), slice(2 * V, None)
    weights["embed.W_E"][:, here] = torch.eye(V, dtype=T)
    weights["pos_embed.W_pos"][:, place] = torch.eye(positions, dtype=T)
    eye = torch.eye(positions, dtype=T)
    weights["blocks.0.attn.W_Q"][0, place, :positions] = 300 * eye
    weights["blocks.0.attn.W_K"][0, place, :positions] = eye.roll(1, 1)
    weights["blocks.0.attn.W_V"][0, here, :V] = torch.eye(V, dtype=T)
    weights["blocks.0.attn.W_O"][0, :V, before] = torch.eye(V, dtype=T)
    if forgetting:  # at itself where the letter is forgotten, else at the first position, whose value is taken as zero
        kept = torch.tensor([0.0 if chr(97 + i) in FORGOTTEN else 1.0 for i in range(V)], dtype=T)
        weights["blocks.1.attn.W_Q"][0, place, :positions] = 300 * eye
        weights["blocks.1.attn.W_Q"][0, here, 0] = 900 * kept
        weights["blocks.1.attn.W_K"][0, place, :positions] = eye
        both = torch.eye(2 * V, dtype=T)
        both[BOS, BOS] = both[V + BOS, V + BOS] = 0.0
        weights["blocks.1.attn.W_V"][0, : 2 * V] = both
        weights["blocks.1.attn.W_O"][0, :, : 2 * V] = -both
    return plain_model(c, weights, tokenizer=Letters(BOS if first else None))


def texts(n: int = 80, seed: int = 0, length: tuple[int, int] = (4, N)) -> list[str]:
    """Random letters."""
    draw = random.Random(seed)
    return ["".join(draw.choices("abcdefghijk", k=draw.randint(*length))) for _ in range(n)]
