"""Models of the standard shapes, with random weights, and the same weights behind a TransformerBridge."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from mechattr.models.files import bundled_path

SHAPES: dict[str, dict[str, int]] = {
    "S": {"n_layer": 4, "n_head": 4, "n_embd": 128},
    "M": {"n_layer": 12, "n_head": 12, "n_embd": 768},
}
TOKENS = {"S": (4, 32), "M": (1, 128)}


def raw(shape: str) -> Any:
    """A GPT-2 with random weights under eager attention, frozen, in eval mode."""
    torch.manual_seed(0)
    config = GPT2Config(**SHAPES[shape])
    config._attn_implementation = "eager"
    return GPT2LMHeadModel(config).eval().requires_grad_(False)


def tokens(shape: str, seed: int) -> torch.Tensor:
    """Random ids of the shape's batch and length."""
    return torch.randint(1000, 40000, TOKENS[shape], generator=torch.Generator().manual_seed(seed))


def bridge(model: Any) -> Any:
    """A TransformerBridge around a copy: booting one rewrites the model that it is given."""
    from transformer_lens.model_bridge import TransformerBridge

    with tempfile.TemporaryDirectory() as folder:
        AutoTokenizer.from_pretrained(bundled_path("tiny")).save_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(Path(folder))
        tokenizer.name_or_path = str(bundled_path("tiny"))  # the bridge loads it again, by path
        return TransformerBridge.boot_transformers(
            "local-gpt2", hf_model=copy.deepcopy(model), tokenizer=tokenizer, device="cpu"
        )
