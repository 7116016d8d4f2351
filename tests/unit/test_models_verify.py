"""`verify`: what holds is measured as holding, and what does not is found."""

from __future__ import annotations

from pathlib import Path

import families
import pytest
import torch
from typer.testing import CliRunner

from mechattr.cli import app
from mechattr.errors import UnknownNameError
from mechattr.models import PlainConfig, plain_model, taps
from mechattr.models.families import FAMILIES, small_configs
from mechattr.models.taps import Taps
from mechattr.models.verify import verify, verify_family
from mechattr.report import families as page


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "bert"])
def test_what_holds_is_measured_as_holding(name: str) -> None:
    checks = verify_family(name)
    wanted = ["logits", "recording", "gradients", "padding", "restart", "generation"]
    assert [check.name for check in checks] == wanted[: 5 if name == "bert" else 6]
    assert all(check.passed for check in checks), checks


def test_another_backend_is_held_to_the_same() -> None:
    assert all(check.passed for check in verify(plain_model(PlainConfig.llama_like())))


def test_control_a_gradient_of_a_shared_tensor_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(taps, "_node", lambda x, *_: x)
    found = {check.name: check for check in verify(families.hooked("llama", torch.float64))}
    assert not found["gradients"].passed and found["gradients"].error > 0.1
    assert found["gradients"].where.startswith("blocks.") and found["recording"].passed


def test_control_a_tap_that_rounds_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Taps.__call__
    monkeypatch.setattr(Taps, "__call__", lambda self, name, x: whole(self, name, x) * (1 + 1e-12))
    found = {check.name: check for check in verify(families.hooked("gpt2", torch.float64))}
    assert not found["recording"].passed


def test_the_command_shows_what_was_measured_and_fails_where_a_limit_is_exceeded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    result = CliRunner().invoke(app, ["models", "--verify", "--family", "gpt2"])
    assert result.exit_code == 0 and "gpt2" in result.output and "restart" in result.output
    monkeypatch.setattr(taps, "_node", lambda x, *_: x)
    result = CliRunner().invoke(app, ["models", "--verify", "--family", "llama"])
    assert result.exit_code == 1 and "over their limits: llama" in result.output
    for options in (["--family", "gpt2"], ["--verify", "--write", "x.md", "--family", "gpt2"]):
        assert CliRunner().invoke(app, ["models", *options]).exit_code == 2
    with pytest.raises(UnknownNameError, match=r"family 'lama'.*\n.*\n.*'llama'"):
        page.chosen(["lama"])


def test_the_page_was_written_of_every_family(root: Path) -> None:
    text = (root / "docs" / "models.md").read_text(encoding="utf-8")
    families_there = {line.split(" | ")[0].removeprefix("| ") for line in text.splitlines() if line.startswith("| ")}
    missing = {*FAMILIES, *small_configs()} - families_there
    assert not missing, f"mechattr models --verify --write docs/models.md (missing: {sorted(missing)})"
    assert "over" not in "".join(line for line in text.splitlines() if line.startswith("| gpt2"))
