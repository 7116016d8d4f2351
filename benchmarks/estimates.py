"""Estimated memory beside measured memory."""

from __future__ import annotations

from typing import Any

import torch
import transformers

import mechattr as ma
from benchmarks.measure import Ratio
from mechattr.engines.memory import peak
from mechattr.models import HookedHF

CALLS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("activation_patching", {"sites": ("q", "k", "v", "z"), "positions": "all"}),
    ("activation_patching", {"sites": ("resid_pre", "attn_out")}),
    ("ablation", {"sites": ("z", "mlp_out"), "positions": "all"}),
    ("attribution_patching", {"variant": "atp"}),
    ("attribution_patching", {"variant": "atp", "checkpoint": True}),
    ("attribution_patching", {"variant": "qk"}),
    ("attribution_patching", {}),
    ("attribution_patching", {"checkpoint": True}),
    ("edge_attribution", {"steps": 3}),
    ("edge_attribution", {"steps": 3, "checkpoint": True}),
)
SHAPES = ((64, 4, 16, None), (64, 8, 64, 4), (128, 8, 48, None))


def network(kind: str, width: int) -> HookedHF:
    """A GPT-2 or a Llama with random weights."""
    torch.manual_seed(0)
    if kind == "gpt2":
        config: Any = transformers.GPT2Config(n_embd=width, n_layer=4, n_head=4, vocab_size=1000, n_positions=64)
    else:
        sizes = {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": 4, "vocab_size": 1000}
        config = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    config.bos_token_id = config.eos_token_id = 0
    raw = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    return HookedHF(raw.eval().requires_grad_(False), name=kind)


def measure() -> list[Ratio]:
    """Estimate over measurement; the two columns of seconds are MiB."""
    rows = []
    for width, n, length, batch_size in SHAPES:
        for kind in ("gpt2", "llama"):
            model = network(kind, width)
            model.fingerprint()
            tokens = torch.randint(1000, (n, length), generator=torch.Generator().manual_seed(0))
            pairs = [
                {"clean_tokens": row, "corrupt_tokens": [(t + 1) % 1000 for t in row], "answer": 1, "foil": 2}
                for row in tokens.tolist()
            ]
            task = ma.tasks.from_pairs(model, pairs)
            for method, how in CALLS:
                settings = {**how, "batch_size": batch_size}
                told = ma.estimate(model, task, method, **settings).bytes
                function = getattr(ma, method)
                used = peak(lambda f=function, s=settings, t=task, m=model: f(m, t, progress=False, **s))  # type: ignore[misc]
                label = " ".join(f"{k}={v}" for k, v in how.items())
                name = f"memory, {kind} d_model {width}, {n} x {length} tokens, batch {batch_size}: {method} {label}"
                rows.append(
                    Ratio(
                        name=name,
                        value=told / used,
                        low=told / used,
                        high=told / used,
                        target=None,
                        at_most=True,
                        seconds=(told / 2**20, used / 2**20),
                    )
                )
    return rows
