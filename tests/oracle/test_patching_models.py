"""Estimates against exact effects on trained models: the ranking that a user relies on."""

from __future__ import annotations

import json
import lzma
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import spearmanr

import mechattr as ma
from mechattr.tasks.task import Task


def check(model: Any, task: Task, positions: Any) -> None:
    sites = ("z", "mlp_out")
    atp = ma.attribution_patching(model, task, sites=sites, positions=positions)
    exact = ma.activation_patching(model, task, sites=sites, positions=positions)
    estimate, truth = (torch.cat([r.scores[site].values.flatten() for site in sites]) for r in (atp, exact))
    moved = truth > 1e-5  # less is float32 rounding, which has no rank
    assert float(spearmanr(estimate[moved], truth[moved]).statistic) > 0.8
    top = atp.top(10)
    verified = ma.activation_patching(model, task, nodes=top)
    for node in top:  # float32: the same intervention in a batch of another shape
        assert verified.value(node, "signed") == pytest.approx(exact.value(node, "signed"), abs=1e-3)
    assert exact.top(1)[0] in top


def test_stories260k(shared: Path) -> None:
    model = ma.load(shared / "models" / "stories260K")
    packed = shared / "corpora" / "tinystories_1000" / "tinystories_1000.json.xz"
    texts = json.loads(lzma.decompress(packed.read_bytes()))
    check(model, ma.tasks.resampled(model, [text[:300] for text in texts[:40]], n=6, seed=0), "aligned")


@pytest.mark.parametrize("name", ("ioi", "subject_verb"))
def test_the_bundled_model(name: str) -> None:
    model = ma.load("tiny")
    task = getattr(ma.tasks, name)(model, n=8, seed=0)
    check(model, task, "named")
