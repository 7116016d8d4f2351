"""What every test gets: no network, one thread, fixed seeds, and the folder of shared data where there is one."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported

import pytest
import torch
from hypothesis import settings

ROOT = Path(__file__).resolve().parents[1]

# Derandomized: a failure is a failure for everyone. No deadline: the first example pays for imports.
settings.register_profile("quick", max_examples=25, deadline=None, derandomize=True)
settings.register_profile("full", max_examples=500, deadline=None, derandomize=True)
settings.load_profile("quick")

torch.set_num_threads(1)  # test tensors are tiny: a second thread is only waited for


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _figures() -> Iterator[None]:
    """Pyplot keeps figures that a plot without axes made for a notebook, until they are closed."""
    yield
    pyplot = sys.modules.get("matplotlib.pyplot")
    if pyplot is not None:
        pyplot.close("all")


@pytest.fixture(scope="session")
def root() -> Path:
    """The root of the repository."""
    return ROOT


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of shared models and texts, which is not part of the repository."""
    folder = Path(os.environ.get("MECHATTR_TEST_DATA", ROOT.parent / "shared"))
    if not folder.is_dir():
        pytest.skip("needs the shared data folder: set MECHATTR_TEST_DATA")
    return folder
