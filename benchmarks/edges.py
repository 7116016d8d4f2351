"""Edge attribution beside TransformerLens's own: the same scores, and the time that they take."""

from __future__ import annotations

from typing import Any

import torch

import mechattr as ma
from benchmarks import models
from benchmarks.attribution import setting
from benchmarks.measure import Ratio, interleaved, ratio


def lens_scores(bridge: Any, clean: torch.Tensor, corrupt: torch.Tensor, answer: int, foil: int) -> dict[Any, float]:
    """TransformerLens's EAP by (source, target) in our names, positions summed."""
    from transformer_lens.tools.analysis.attribution_patching import EdgeAttributionConfig, attribution_patch

    found = attribution_patch(
        bridge,
        clean,
        corrupt,
        lambda logits: logits[0, -1, answer] - logits[0, -1, foil],
        EdgeAttributionConfig(granularity="edge"),
    )
    total: dict[Any, float] = {}
    for (source, target), score in found.edge_scores.items():
        edge = name(source), name(target)
        total[edge] = total.get(edge, 0.0) + score
    return total


def name(node: Any) -> str:
    """A node of TransformerLens in our words."""
    if node.kind in ("embed", "logits"):
        return {"embed": "input"}.get(node.kind, node.kind)
    if node.kind.startswith("mlp"):
        return f"m{node.layer}"
    head = f"a{node.layer}.h{node.head}"
    return head if node.kind == "attn_head_out" else f"{head}<{node.kind[0]}>"


def measure(rounds: int) -> list[Ratio]:
    """EAP on the small shape, four pairs.

    Raises:
        SystemExit: the two disagree by more than 1e-5 of the largest score.
    """
    hooked, task, bare = setting("S")
    bridge = models.bridge(hooked.model)
    bridge.embed.requires_grad_(True)  # it differentiates embeddings, whose graph frozen weights would not begin

    def lens() -> dict[Any, float]:
        return lens_scores(bridge, bare.clean, bare.corrupt, 11, 12)

    def ours() -> Any:
        return ma.edge_attribution(hooked, task, method="eap", direction="denoising", progress=False)

    theirs, mine = lens(), ours().signed
    gap = max(abs(mine.sel(source=s, target=t).item() - score) for (s, t), score in theirs.items())
    if gap > 1e-5 * max(map(abs, theirs.values())):
        raise SystemExit(f"the edge scores disagree by {gap:.2e}")
    taken = interleaved({"lens": lens, "ours": ours}, rounds, warmup=1)
    return [ratio(f"S: TransformerLens / EAP, {len(theirs):,} edges", taken["lens"], taken["ours"])]
