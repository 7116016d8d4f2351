"""ALTI's contributions beside the formula as it is written, and what the methods cost over a bare forward pass."""

from __future__ import annotations

import torch
from einops import einsum
from torch import Tensor

import mechattr as ma
from benchmarks import models
from benchmarks.measure import Ratio, interleaved, ratio
from mechattr.decomposition.mixing import mixing
from mechattr.decomposition.parts import AttentionParts, attention_parts, attention_sites
from mechattr.engines.memory import peak
from mechattr.models import Batch, HookedHF

LENGTH = 256


def as_written(parts: AttentionParts) -> Tensor:
    """C from the tensor [head, query, key, d_model]."""
    return _shares(parts, (parts.pattern[0, ..., None] * parts.values()[0].transpose(0, 1)[:, None]).sum(0))


def summed_at_once(parts: AttentionParts) -> Tensor:
    """C from the tensor [query, key, d_model]."""
    return _shares(parts, einsum(parts.pattern[0], parts.values()[0], "h q k, k h d -> q k d"))


def _shares(parts: AttentionParts, moved: Tensor) -> Tensor:
    here = torch.arange(len(moved))
    moved[here, here] += parts.residual[0]
    whole = parts.whole[0]
    nearer = whole.abs().sum(-1)[:, None] - (whole[:, None] - moved).abs().sum(-1)
    shares = nearer.clamp(min=0)
    return shares / shares.sum(-1, keepdim=True)


def contributions(rounds: int) -> list[Ratio]:
    """Time and memory of one block of shape M; the two columns of seconds are MiB in rows of memory."""
    model = HookedHF(models.raw("M"), name="M")
    tokens = torch.randint(1000, 40000, (1, LENGTH), generator=torch.Generator().manual_seed(1))
    activations = model.run(Batch.of(tokens), record=attention_sites(model, 6)).activations
    parts = attention_parts(model, activations, 6)
    jobs = {
        "heads apart": lambda: as_written(parts),
        "summed over heads": lambda: summed_at_once(parts),
        "ours": lambda: mixing(parts).shares,
    }
    for job in jobs.values():
        torch.testing.assert_close(job(), jobs["ours"](), rtol=0, atol=1e-5)  # float32 rounding
    taken = interleaved(jobs, rounds, warmup=1)
    memory = {name: peak(job) / 2**20 for name, job in jobs.items()}
    rows = []
    for name, target in (("heads apart", 10), ("summed over heads", None)):
        what = f"ALTI of one block of M at {LENGTH} tokens, formula with {name} over alti"
        saved, mib = memory[name] / memory["ours"], (memory[name], memory["ours"])
        rows.append(ratio(what, taken[name], taken["ours"], target=target, at_most=False))
        kept = {"low": saved, "high": saved, "target": target, "at_most": False, "seconds": mib}
        rows.append(Ratio(name=f"memory, {what}", value=saved, **kept))
    return rows


def passes(shape: str, rounds: int) -> list[Ratio]:
    """Whole calls over a forward pass of the bare model."""
    raw = models.raw(shape)
    model, tokens = HookedHF(raw, name=shape), models.tokens(shape, 1)
    batch = Batch.of(tokens)
    model.fingerprint()

    def forward() -> None:
        with torch.no_grad():
            raw(tokens, use_cache=False)

    jobs = {
        "forward": forward,
        "alti_logit": lambda: ma.alti_logit(model, batch, target=11, foil=12),
        "alti_logit include=all": lambda: ma.alti_logit(model, batch, target=11, foil=12, include="all"),
        "alti": lambda: ma.alti(model, batch),
    }
    taken = interleaved(jobs, rounds)
    targets = {"alti_logit": 3 if shape == "M" else None}
    return [
        ratio(f"{name} {shape}, over one bare forward pass", taken[name], taken["forward"], target=targets.get(name))
        for name in list(jobs)[1:]
    ]
