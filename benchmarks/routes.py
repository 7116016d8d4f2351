"""What routes cost over the forward pass that they cannot do without."""

from __future__ import annotations

import torch

import mechattr as ma
from benchmarks import models
from benchmarks.measure import Ratio, interleaved, ratio
from mechattr.models import Batch, HookedHF

# Random weights attend everywhere alike and write little, so that routes would be the stream alone. Queries and keys,
# and values, that are so much larger make routes of a few dozen places.
SHARPER, LOUDER = 12.0, 6.0


def measure(shape: str, rounds: int) -> list[Ratio]:
    """Routes of the last token of one prompt, with the stream alone and with many places."""
    rows = []
    for spread in (False, True):
        raw = models.raw(shape)
        if spread:
            width = raw.config.n_embd
            for block in raw.transformer.h:
                block.attn.c_attn.weight[:, : 2 * width] *= SHARPER
                block.attn.c_attn.weight[:, 2 * width :] *= LOUDER
        hooked, tokens = HookedHF(raw, name=shape), models.tokens(shape, 1)[:1]
        batch = Batch.of(tokens)

        def bare(raw: torch.nn.Module = raw, tokens: torch.Tensor = tokens) -> None:
            with torch.no_grad():
                raw(tokens, use_cache=False)

        def routes(hooked: HookedHF = hooked, batch: Batch = batch) -> ma.decomposition.Routes:
            return ma.information_flow_routes(hooked, batch)

        taken = interleaved({"bare": bare, "routes": routes}, rounds)
        found = routes().to_pandas()
        places = len(found[["layer", "into", "query"]].drop_duplicates())
        name = f"{shape}: routes over {places} places and {len(found)} edges / 1 forward"
        rows.append(ratio(name, taken["routes"], taken["bare"], target=2.0 if shape == "M" else None))
    return rows
