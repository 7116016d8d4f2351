"""The exact sweep over all z and resid_pre nodes of one pair, beside TransformerLens's patching functions."""

from __future__ import annotations

import torch

import mechattr as ma
from benchmarks import models
from benchmarks.measure import Ratio, interleaved, ratio


def measure(rounds: int) -> list[Ratio]:
    """Denoising on the bundled model, as TransformerLens's functions do.

    Raises:
        SystemExit: the two disagree by more than 1e-5.
    """
    from transformer_lens import patching

    hooked = ma.load("tiny")
    task = ma.tasks.ioi(hooked, n=1, seed=0)
    bridge = models.bridge(hooked.model)
    clean, corrupt = task.clean.tokens, task.corrupt.tokens
    answer, foil = int(task.answers[0]), int(task.foils[0])

    def lens() -> tuple[torch.Tensor, torch.Tensor]:
        def metric(logits: torch.Tensor) -> torch.Tensor:
            return logits[0, -1, answer] - logits[0, -1, foil]

        with torch.no_grad():
            _, cache = bridge.run_with_cache(clean)
            base = metric(bridge(corrupt))
            z = patching.get_act_patch_attn_head_out_by_pos(bridge, corrupt, cache, metric)
            stream = patching.get_act_patch_resid_pre(bridge, corrupt, cache, metric)
        return z - base, stream - base

    def ours() -> tuple[torch.Tensor, torch.Tensor]:
        found = ma.activation_patching(
            hooked, task, sites=("z", "resid_pre"), direction="denoising", positions="aligned", progress=False
        )
        return found.signed["z"].values, found.signed["resid_pre"].values

    for theirs, mine in zip(lens(), ours(), strict=True):
        gap = float((theirs - mine).abs().max())
        if gap > 1e-5 * max(1.0, float(theirs.abs().max())):
            raise SystemExit(f"the sweeps disagree by {gap:.2e}")
    taken = interleaved({"lens": lens, "ours": ours}, rounds, warmup=1)
    nodes = clean.shape[1] * hooked.info.n_layers * (hooked.info.n_heads + 1)
    return [
        ratio(
            f"tiny: TransformerLens / exact sweep, {nodes} nodes of one pair",
            taken["lens"],
            taken["ours"],
            target=4.0,
            at_most=False,
        )
    ]
