"""The commands that take a prompt, as a user runs them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import mechattr as ma
from mechattr import cli
from mechattr.commands import prompts
from mechattr.decomposition.tuned_lens import identity
from mechattr.methods import METHODS

Output = Any  # of capsys
TEXT = "When Mary and John went to the store, John gave a drink to"
RUN = [row.name for row in METHODS.values() if row.command == "decompose"]
UNTARGETED = ("alti", "information_flow_routes", "token_salience")


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Loads the bundled model once a test, whatever is asked for."""
    model = ma.load("tiny")
    monkeypatch.setattr(prompts, "load", lambda *_: model)
    return model


def run(command: str, *options: object) -> int:
    """The exit code of one call."""
    with pytest.raises(SystemExit) as exited:
        cli.main([command, "--model", "tiny", *map(str, options)])
    return int(exited.value.code or 0)


@pytest.mark.parametrize("name", RUN)
def test_every_method_runs_and_writes_what_it_found(name: str, tmp_path: Path, capsys: Output) -> None:
    targets = () if name in UNTARGETED else ("--target", " Mary", "--foil", " John")
    assert run("decompose", "--prompt", TEXT, "--method", name, "--out", tmp_path, *targets, "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["method"] == name
    kinds = ["safetensors", "csv", "png", *(["html"] if name == "information_flow_routes" else [])]
    assert [Path(file).name for file in document["files"]] == [f"{name}.{kind}" for kind in kinds]
    result = ma.open(tmp_path / f"{name}.safetensors")
    assert result.settings["strings"][0] == document["settings"]["strings"][0]  # type: ignore[index, call-overload]
    assert len(pd.read_csv(tmp_path / f"{name}.csv")) == len(document["table"]) > 0
    assert (tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    if "html" in kinds:
        assert (tmp_path / f"{name}.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


def test_components_are_shown_with_their_sum(capsys: Output) -> None:
    assert run("decompose", "--prompt", TEXT, "--target", " Mary", "--foil", " John", "--method", "dla") == 0
    shown = capsys.readouterr().out
    result = ma.direct_logit_attribution(ma.load("tiny"), TEXT, target=" Mary", foil=" John")
    assert f"L3H3      │  {result.components.sel(component='L3H3').item():.3f}" in shown
    assert f"logit of ' Mary' minus ' John': {result.settings['logit'][0]:.4f}" in shown  # type: ignore[index, call-overload]
    assert "Written" not in shown


def test_long_tables_are_cut_to_the_largest(capsys: Output) -> None:
    assert run("decompose", "--prompt", TEXT, "--method", "alti") == 0
    shown = capsys.readouterr().out
    assert "the 20 largest of 256" in shown and "0 When" in shown


def test_settings_go_to_the_method(capsys: Output) -> None:
    options = ("--prompt", TEXT, "--target", " Mary", "--json")
    assert run("decompose", *options, "--method", "lrp", "--set", "variant=attn", "--set", 'sites=["z"]') == 0
    document = json.loads(capsys.readouterr().out)
    assert document["settings"]["variant"] == "attn"
    assert run("decompose", *options, "--position", 3) == 0
    assert json.loads(capsys.readouterr().out)["settings"]["position"] == [3]


def test_results_of_other_settings_are_kept(tmp_path: Path, capsys: Output) -> None:
    options = ("--prompt", TEXT, "--out", tmp_path)
    assert run("decompose", *options, "--target", " Mary") == 0
    first = (tmp_path / "direct_logit_attribution.safetensors").read_bytes()
    assert run("decompose", *options, "--target", " Mary") == 0  # the same settings
    assert run("decompose", *options, "--target", " John") == 2
    assert "of other settings\n  fix: choose another folder or --overwrite" in capsys.readouterr().err
    assert (tmp_path / "direct_logit_attribution.safetensors").read_bytes() == first
    assert run("decompose", *options, "--target", " John", "--overwrite") == 0
    assert (tmp_path / "direct_logit_attribution.safetensors").read_bytes() != first


def test_the_lens_shows_the_likeliest_tokens_of_each_layer(tmp_path: Path, capsys: Output) -> None:
    assert run("lens", "--prompt", TEXT, "--target", " Mary", "--k", 2, "--out", tmp_path) == 0
    shown = capsys.readouterr().out
    assert "Predictions at position 15, after ' to'" in shown
    assert "L3 resid_post │ ␣Mary(1.00)" in shown
    assert (tmp_path / "logit_lens.png").stat().st_size > 10_000
    assert run("lens", "--prompt", TEXT, "--position", 1, "--sites", "resid_mid, resid_post", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["settings"]["position"] == [1] and len(document["settings"]["sites"]) == 8
    assert {row["top_token"] for row in document["table"]} > {" and"}


def test_a_tuned_lens_is_read_from_its_file(tiny: Any, tmp_path: Path, capsys: Output) -> None:
    identity(tiny).save(tmp_path / "lens")
    assert run("lens", "--prompt", TEXT, "--tuned", tmp_path / "lens") == 0
    tuned = capsys.readouterr().out
    assert run("lens", "--prompt", TEXT) == 0
    assert capsys.readouterr().out == tuned  # it was not trained


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--target", "Mary Jane"), "target 'Mary Jane' as one token\n  found: 3 tokens"),
        (("--target", " Mary", "--position", 99), "position 99\n  found: rows of 16 to 16 real tokens"),
        (("--target", " Mary", "--method", "alty"), "method 'alty'\n  found: decompose has alti,"),
        (("--target", " Mary", "--method", "logit_lens"), "method 'logit_lens'\n  found: decompose has"),
        ((), "direct_logit_attribution\n  found: no target\n  fix: give --target"),
        (("--target", " Mary", "--method", "alti"), "target for alti\n  found: it takes rollouts\n  fix: leave it out"),
        (("--target", " Mary", "--set", "neurons"), "--set neurons: give NAME=VALUE"),
        (("--target", " Mary", "--set", "neurons=1"), "neurons for direct_logit_attribution\n  found: it takes target"),
    ],
)
def test_wrong_use_is_told(options: tuple[object, ...], message: str, capsys: Output) -> None:
    assert run("decompose", "--prompt", TEXT, *options) == 2
    captured = capsys.readouterr()
    assert message in captured.err and not captured.out


def test_a_lens_of_nothing_is_refused(tmp_path: Path, capsys: Output) -> None:
    assert run("lens", "--prompt", "") == 2
    assert "an empty list or an empty text" in capsys.readouterr().err
    assert run("decompose", "--target", " Mary") == 2
    assert "Missing option '--prompt'" in capsys.readouterr().err
    assert run("lens", "--prompt", TEXT, "--tuned", tmp_path / "none") == 2
    assert "'--tuned'" in capsys.readouterr().err
    assert run("lens", "--prompt", TEXT, "--out", tmp_path) == 0
    capsys.readouterr()
    assert run("lens", "--prompt", TEXT, "--tuned", tmp_path / "logit_lens.safetensors") == 2
    assert "as kind 'tuned_lens'\n  found: kind 'lens'" in capsys.readouterr().err
