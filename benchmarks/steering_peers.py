"""Steering beside repeng and steering-vectors, in one process and on one model."""

from __future__ import annotations

import copy
from contextlib import redirect_stderr
from importlib import import_module
from importlib.util import find_spec
from io import StringIO
from typing import Any

import numpy as np
import torch

import mechattr as ma
from benchmarks import models
from benchmarks.measure import Ratio, interleaved, ratio
from benchmarks.steering import LAYER, NEW, PAIRS, PROMPT, ROWS, SETTINGS, contrasts, of_shape


def measure(shape: str, rounds: int) -> list[Ratio]:
    """repeng and steering-vectors: vectors of 50 pairs at one layer, and generation with them; nothing where they are
    not installed (docs/steering.md says how).

    Raises:
        SystemExit: their vectors are not ours.
    """
    if find_spec("repeng") is None or find_spec("steering_vectors") is None:
        return []
    vars(np)["float_"] = np.float64  # a name of numpy 1 that repeng 0.4 asks for
    repeng: Any = import_module("repeng")
    vectors: Any = import_module("steering_vectors")
    hooked, pairs = of_shape(shape), [(text + a, text + b) for text, a, b in contrasts(PAIRS)]
    raw, tokenizer = hooked.model, copy.deepcopy(hooked.tokenizer)
    tokenizer.pad_token_id = 0  # they want one
    entries = [repeng.DatasetEntry(positive=a, negative=b) for a, b in pairs]

    def of_repeng() -> Any:
        with redirect_stderr(StringIO()):  # its progress bars
            return repeng.ControlVector.train(raw, tokenizer, entries, hidden_layers=[LAYER], batch_size=ROWS)

    def of_vectors() -> Any:
        return vectors.train_steering_vector(raw, tokenizer, pairs, layers=[LAYER], batch_size=ROWS // 2)

    def centred() -> Any:
        return ma.steering.pca(hooked, pairs, layers=[LAYER], variant="centred", batch_size=ROWS // 2)

    def mean() -> Any:
        return ma.steering.mean_difference(hooked, pairs, layers=[LAYER], batch_size=ROWS // 2)

    theirs, vector, other = of_repeng(), mean(), of_vectors()
    found = torch.from_numpy(theirs.directions[LAYER]), other.layer_activations[LAYER]
    for ours, one in zip((centred(), vector), found, strict=True):
        if abs(torch.cosine_similarity(ours.directions[LAYER], one.float(), dim=0)) < 0.999:
            raise SystemExit(f"the vectors disagree: {ours.settings['method']}")
    tokens = models.tokens(shape, 1)[:1, :PROMPT]
    mask = torch.ones_like(tokens)

    def plain() -> None:
        raw.generate(tokens, attention_mask=mask, **SETTINGS)

    def by_ours() -> None:
        with vector.apply(raw, multiplier=2.0):
            plain()

    def by_vectors() -> None:
        with other.apply(raw, multiplier=2.0):
            plain()

    def by_repeng() -> None:
        model = repeng.ControlModel(raw, [LAYER])
        try:
            model.set_control(theirs, 2.0)
            plain()
        finally:
            model.unwrap()

    fits = interleaved({"repeng": of_repeng, "pca": centred, "vectors": of_vectors, "mean": mean}, rounds, warmup=1)
    taken = interleaved({"plain": plain, "repeng": by_repeng, "vectors": by_vectors, "ours": by_ours}, rounds, warmup=1)
    steered = f"{shape}: {NEW} tokens of the same model, steered by"
    return [
        ratio(f"{shape}: repeng / centred PCA of {PAIRS} pairs", fits["repeng"], fits["pca"]),
        ratio(f"{shape}: steering-vectors / mean difference of {PAIRS} pairs", fits["vectors"], fits["mean"]),
        ratio(f"{steered} repeng / plain generation", taken["repeng"], taken["plain"]),
        ratio(f"{steered} steering-vectors / plain generation", taken["vectors"], taken["plain"]),
        ratio(f"{steered} mechattr / plain generation", taken["ours"], taken["plain"]),
    ]
