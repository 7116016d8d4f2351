"""Token relevance beside LXT, the library of AttnLRP's authors (E12)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import families
import pytest
import torch

import mechattr as ma
from mechattr.models import Batch

pytest.importorskip("lxt", reason="needs lxt 2.1, in an environment of its own: see docs/lrp.md")

IDS = (3, 14, 15, 9, 26, 5)
ATOL = 2e-5  # float32 in another order of operations


def of_lxt(root: Path, family: str, variant: str) -> torch.Tensor:
    script = Path(__file__).with_name("lxt_relevance.py")
    arguments = [str(x) for x in (family, variant, 5, 7, *IDS)]
    done = subprocess.run(
        [sys.executable, str(script), *arguments],
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=True,
    )
    return torch.tensor(json.loads(done.stdout))


@pytest.mark.parametrize("variant", ["cp", "attn"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_token_relevance_is_that_of_lxt(family: str, variant: str, root: Path) -> None:
    expected = of_lxt(root, family, variant)
    batch, model = Batch.of(torch.tensor(IDS)), families.hooked(family)
    both = {v: ma.lrp(model, batch, target=5, foil=7, variant=v).scores["embed"].values[0] for v in ("cp", "attn")}
    torch.testing.assert_close(both.pop(variant), expected, rtol=0, atol=ATOL)
    with pytest.raises(AssertionError):  # control: the other variant
        torch.testing.assert_close(*both.values(), expected, rtol=0, atol=ATOL)
