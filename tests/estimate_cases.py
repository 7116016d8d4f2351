"""What the tests of estimates share: small networks, and methods by name."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import transformers

import mechattr as ma
from mechattr.models import HookedHF


def measured(method: str) -> Any:
    return getattr(ma, method)


@cache
def made(kind: str, d_vocab: int = 600, heads: int = 4) -> HookedHF:
    """A network that is large enough for activations to outweigh tables, and small enough for a test."""
    torch.manual_seed(0)
    if kind == "gpt2":
        config: Any = transformers.GPT2Config(n_embd=64, n_layer=2, n_head=heads, vocab_size=d_vocab, n_positions=64)
        config.bos_token_id = config.eos_token_id = 0
    else:
        sizes = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "vocab_size": d_vocab}
        config = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    raw = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model = HookedHF(raw.eval().requires_grad_(False), name=kind)
    model.fingerprint()  # hashes are computed once
    return model
