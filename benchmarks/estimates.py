"""Estimated memory beside measured memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers

import mechattr as ma
from benchmarks.measure import Ratio
from mechattr.engines.memory import peak
from mechattr.models import HookedHF
from mechattr.sites import Node

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
# From the scores of all edges, which the methods of circuits need.
CIRCUITS: tuple[tuple[str, str, Callable[[Any], dict[str, Any]]], ...] = (
    ("path_patching", "", lambda _: {"receivers": [Node("q", 3, head=0), Node("resid_post", 3)]}),
    ("path_patching", "mlps=frozen", lambda _: {"receivers": [Node("resid_post", 3)], "mlps": "frozen"}),
    ("edge_patching", "100 edges", lambda edges: {"edges": edges.top(100)}),
    ("missed_effect_bound", "budget=200", lambda _: {"verified": [], "budget": 200}),
    (
        "missed_effect_bound",
        "z and mlp_out, no control",
        lambda _: {"verified": [], "sites": ("z", "mlp_out"), "p": 0.1, "control": False, "budget": 200},
    ),
    ("faithfulness", "2 sizes", lambda edges: {"edges": edges, "sizes": (0.05, 0.2), "random": 1}),
    (
        "faithfulness",
        "zero",
        lambda edges: {"edges": edges.circuit(top=50, method="greedy"), "ablation": "zero", "random": 1},
    ),
    ("minimality", "", lambda edges: {"circuit": edges.circuit(top=50, method="greedy"), "random": 1}),
    (
        "minimality",
        "mean",
        lambda edges: {"circuit": edges.circuit(top=50, method="greedy"), "ablation": "mean", "random": 0},
    ),
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
            edges = ma.edge_attribution(model, task, method="eap", progress=False)
            calls = [(method, " ".join(f"{k}={v}" for k, v in how.items()), how) for method, how in CALLS]
            calls += [(method, label, make(edges)) for method, label, make in CIRCUITS]
            for method, label, how in calls:
                settings = {**how, "batch_size": batch_size}
                told = ma.estimate(model, task, method, **settings).bytes
                function = getattr(ma, method)
                used = peak(lambda f=function, s=settings, t=task, m=model: f(m, t, progress=False, **s))  # type: ignore[misc]
                name = f"memory, {kind} d_model {width}, {n} x {length} tokens, batch {batch_size}: {method} {label}"
                rows.append(
                    Ratio(
                        name=name.rstrip(),
                        value=told / used,
                        low=told / used,
                        high=told / used,
                        target=None,
                        at_most=True,
                        seconds=(told / 2**20, used / 2**20),
                    )
                )
    return rows
