"""The command line: what each command passes on, what it prints where, and with which code it exits."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from packaging.requirements import Requirement

import mechattr
from mechattr import cli, doctor
from mechattr.doctor import Finding
from mechattr.engines.ray_executor import RayExecutor
from mechattr.errors import UnknownModelError

Output = Any  # of capsys


def run(*arguments: object) -> int:
    """The exit code of one call."""
    with pytest.raises(SystemExit) as exited:
        cli.main([str(argument) for argument in arguments])
    return int(exited.value.code or 0)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """Replaces what `localise` calls by functions that write down what they got."""
    seen: dict[str, Any] = {}
    rows = [
        {"component": "L0H1 z [x]", "site": "blocks.0.attn.hook_z", "estimate": 1 / 3, "exact": 0.25},
        {"component": "L1H0 q", "site": "blocks.1.attn.hook_q", "estimate": -2.0, "exact": math.nan},
    ]
    result = SimpleNamespace(
        summary="2 of 9 components carry 90 % of the logit difference.",
        report_path=tmp_path / "report.html",
        table=lambda k: rows[:k],
    )

    def load(source: str, **settings: object) -> str:
        seen["load"] = (source, settings)
        return "model"

    def make(kind: str) -> Any:
        def task(*arguments: object, **settings: object) -> str:
            seen["task"] = (kind, arguments, settings)
            return "task"

        return task

    def localise(*arguments: object, **settings: object) -> SimpleNamespace:
        seen["localise"] = (arguments, settings)
        return result

    def rebuild(path: Path) -> SimpleNamespace:
        seen["rebuild"] = path
        return result

    monkeypatch.setattr(mechattr, "load", load)
    for kind in ("make", "resampled", "from_pairs"):
        monkeypatch.setattr(mechattr.tasks, kind, make(kind))
    monkeypatch.setattr(mechattr.report, "localise", localise)
    monkeypatch.setattr(mechattr.report, "rebuild", rebuild)
    return seen


def test_version(capsys: Output) -> None:
    assert run("--version") == 0
    assert capsys.readouterr().out == f"mechattr {mechattr.__version__}\n"


def test_the_module_runs_as_a_program() -> None:
    shown = subprocess.run([sys.executable, "-m", "mechattr", "--version"], capture_output=True, text=True, check=True)
    assert shown.stdout == f"mechattr {mechattr.__version__}\n"


def test_localise_passes_every_option_on(calls: dict[str, Any], tmp_path: Path) -> None:
    options = "--n 8 --split train --seed 3 --sites z,mlp_out --positions named --direction denoising --top 7"
    options += " --variant qk --bound 90 --circuit 40"
    machine = "--device cpu --dtype float64 --batch-size 5 --overwrite"
    assert run("localise", "--model", "m", "--task", "ioi", "--out", tmp_path, *f"{options} {machine}".split()) == 0
    assert calls["load"] == ("m", {"device": "cpu", "dtype": "float64"})
    assert calls["task"] == ("make", ("model", "ioi"), {"n": 8, "seed": 3, "split": "train"})
    assert calls["localise"] == (
        ("model", "task"),
        {
            "out": tmp_path,
            "top": 7,
            "variant": "qk",
            "bound": 90,
            "circuit": 40,
            "direction": "denoising",
            "sites": ("z", "mlp_out"),
            "positions": "named",
            "seed": 3,
            "batch_size": 5,
            "overwrite": True,
        },
    )


def test_localise_runs_on_an_executor(calls: dict[str, Any], tmp_path: Path, capsys: Output) -> None:
    options = ("localise", "--model", "m", "--task", "ioi", "--out", tmp_path)
    assert run(*options, "--executor", "inprocess") == 0
    assert calls["localise"][1]["executor"] == "inprocess"
    assert run(*options, "--executor", "ray", "--workers", 3, "--cluster", "auto") == 0
    assert calls["localise"][1]["executor"] == RayExecutor(workers=3, address="auto")
    for wrong in (("--workers", 2), ("--executor", "inprocess", "--cluster", "auto")):
        assert run(*options, *wrong) == 2
        assert "--workers and --cluster go with --executor ray" in capsys.readouterr().err


def test_localise_shows_a_table_and_where_the_report_is(calls: dict[str, Any], tmp_path: Path, capsys: Output) -> None:
    assert run("localise", "--model", "m", "--task", "ioi", "--out", tmp_path) == 0
    shown = capsys.readouterr().out
    assert "L0H1 z [x]" in shown  # brackets are text, not markup
    assert "0.333" in shown  # the largest value has four digits, and its column as many decimals
    assert "nan" not in shown
    assert shown.endswith(f"2 of 9 components carry 90 % of the logit difference.\nReport: {tmp_path}/report.html\n")


def test_json_is_all_that_stands_on_standard_output(calls: dict[str, Any], tmp_path: Path, capsys: Output) -> None:
    assert run("localise", "--model", "m", "--task", "ioi", "--out", tmp_path, "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["report"] == str(tmp_path / "report.html")
    assert document["components"][1] == {
        "component": "L1H0 q",
        "site": "blocks.1.attn.hook_q",
        "estimate": -2.0,
        "exact": None,
    }


def test_pairs_and_texts_choose_the_task(calls: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("one\n\ntwo\n")
    run("localise", "--model", "m", "--task", "resampled", "--texts", tmp_path / "texts.txt", "--out", tmp_path)
    assert calls["task"] == ("resampled", ("model", ["one", "two"]), {"n": 32, "seed": 0})
    run("localise", "--model", "m", "--pairs", tmp_path / "pairs.jsonl", "--out", tmp_path)
    assert calls["task"] == ("from_pairs", ("model", tmp_path / "pairs.jsonl"), {})
    run("localise", "--model", "m", "--pairs", "p", "--metric", "log_probability", "--out", tmp_path)
    assert calls["task"] == ("from_pairs", ("model", Path("p")), {"metric": "log_probability"})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give exactly one of --task and --pairs"),
        (["--task", "ioi", "--pairs", "p"], "give exactly one of --task and --pairs"),
        (["--task", "resampled"], "--texts FILE and --task resampled go together"),
        (["--task", "resampled", "--texts", "no-such-file"], "'--texts'"),
        (["--task", "ioi", "--direction", "sideways"], "'--direction'"),
        (["--task", "ioi", "--n", "0"], "'--n'"),
    ],
)
def test_wrong_use_exits_with_2(
    options: list[str], message: str, calls: dict[str, Any], tmp_path: Path, capsys: Output
) -> None:
    assert run("localise", "--model", "m", "--out", tmp_path, *options) == 2
    assert message in capsys.readouterr().err
    assert calls == {}


def test_texts_that_are_no_text_are_refused(calls: dict[str, Any], tmp_path: Path, capsys: Output) -> None:
    (tmp_path / "texts").write_bytes(b"\xff\xfe")
    assert run("localise", "--model", "m", "--task", "resampled", "--texts", tmp_path / "texts", "--out", tmp_path) == 2
    assert "is not UTF-8 text" in capsys.readouterr().err


def test_the_help_lists_every_task(capsys: Output) -> None:
    assert run("localise", "--help") == 0
    listed = set(re.findall(r"\w+", capsys.readouterr().out))
    assert {*mechattr.tasks.TASKS, "resampled"} <= listed


def test_an_unknown_task_gives_the_nearest(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Output) -> None:
    monkeypatch.setattr(mechattr, "load", lambda *_, **__: "model")
    assert run("localise", "--model", "m", "--task", "iou", "--out", tmp_path) == 2
    assert "did you mean 'ioi'?" in capsys.readouterr().err


def test_own_errors_are_text_without_traceback(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Output) -> None:
    def load(source: str, **_: object) -> None:
        raise UnknownModelError(f"model {source!r}", "no such [folder]", "check the name")

    monkeypatch.setattr(mechattr, "load", load)
    assert run("localise", "--model", "m", "--task", "ioi", "--out", tmp_path) == 2
    captured = capsys.readouterr()
    assert captured.err == "model 'm'\n  found: no such [folder]\n  fix: check the name\n"
    assert captured.out == ""


def test_unforeseen_errors_keep_their_traceback(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def load(source: str, **_: object) -> None:
        raise RuntimeError(source)

    monkeypatch.setattr(mechattr, "load", load)
    with pytest.raises(RuntimeError, match="m"):  # which Python ends with exit code 1
        cli.main(["localise", "--model", "m", "--task", "ioi", "--out", str(tmp_path)])


def test_report_rebuilds(calls: dict[str, Any], tmp_path: Path, capsys: Output) -> None:
    assert run("report", tmp_path) == 0
    assert calls["rebuild"] == tmp_path
    assert capsys.readouterr().out == f"Report: {tmp_path}/report.html\n"
    assert run("report", tmp_path, "--json") == 0
    assert json.loads(capsys.readouterr().out)["report"] == str(tmp_path / "report.html")


def test_models_lists_the_families(capsys: Output) -> None:
    assert run("models", "--json") == 0
    families = {row["family"] for row in json.loads(capsys.readouterr().out)}
    assert {"gpt2", "llama", "gemma2", "bert"} <= families
    assert run("models") == 0
    assert "gpt_neox" in capsys.readouterr().out


def test_a_page_that_cannot_be_written_is_told_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Output
) -> None:
    monkeypatch.setattr(cli, "_verify", lambda *_: pytest.fail("measured"))
    for path in (tmp_path / "none" / "models.md", tmp_path):
        assert run("models", "--verify", "--write", path) == 2
        assert "give a file in a folder that exists" in capsys.readouterr().err


def test_doctor_exits_with_1_when_something_is_wrong(monkeypatch: pytest.MonkeyPatch, capsys: Output) -> None:
    findings = [Finding("device", "cpu")]
    monkeypatch.setattr(doctor, "diagnose", lambda: findings)
    assert run("doctor") == 0
    assert capsys.readouterr().out == "ok    device: cpu\nAll is well.\n"
    findings.append(Finding("torch", "not installed", "pip install 'torch>=2.6'"))
    assert run("doctor") == 1
    assert capsys.readouterr().out == (
        "ok    device: cpu\nwrong torch: not installed\n      fix: pip install 'torch>=2.6'\n1 of 2 are wrong.\n"
    )
    assert run("doctor", "--json") == 1
    document = json.loads(capsys.readouterr().out)
    assert document["healthy"] is False
    assert document["findings"][1]["fix"] == "pip install 'torch>=2.6'"


def test_a_version_outside_the_range_is_wrong() -> None:
    assert doctor.check_version(Requirement("typer>=0.20")).fix is None
    assert doctor.check_version(Requirement("typer<0.1")).fix == "pip install 'typer<0.1'"
    missing = doctor.check_version(Requirement("no-such-library>=1"))
    assert missing == Finding("no-such-library", "not installed", "pip install 'no-such-library>=1'")


def test_versions_cover_the_requirements_without_the_extras() -> None:
    topics = [finding.topic for finding in doctor.versions()]
    assert topics[0] == "mechattr"
    assert {"torch", "transformers", "nnsight"} <= set(topics)
    assert "pytest" not in topics


def test_of_the_extras_the_one_that_a_method_asks_for_may_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["typer>=0.1", 'ray>=2.40; extra == "ray"', 'pytest>=8; extra == "dev"']
    monkeypatch.setattr(doctor.metadata, "requires", lambda _: lines)
    monkeypatch.setattr(doctor.metadata, "version", lambda _: "2.50")
    assert [finding.topic for finding in doctor.versions()] == ["mechattr", "typer", "ray"]
    monkeypatch.undo()
    assert doctor.check_extra(Requirement("no-such-library>=1")) == Finding(
        "no-such-library",
        "not installed, and needed by executor='no-such-library' only: pip install 'mechattr[no-such-library]'",
    )
    assert doctor.check_extra(Requirement("typer<0.1")).fix == "pip install 'typer<0.1'"


def test_a_backend_that_does_not_import_says_why() -> None:
    good, bad = doctor.import_backends({"a": "json", "b": "no_such_library"})
    assert good == Finding("backend a", "json imports")
    assert bad.found == "no_such_library does not import: ModuleNotFoundError: No module named 'no_such_library'"
    assert bad.fix is not None
    (slow,) = doctor.import_backends({"c": "time; time.sleep(60)"}, timeout=0.2)
    assert slow.found.endswith("does not import: importing took more than 0 s")


def test_the_bundled_model_is_checked_file_by_file(tmp_path: Path) -> None:
    assert doctor.check_sums(tmp_path).found == f"{tmp_path} has no SHA256SUMS"
    (tmp_path / "config.json").write_bytes(b"abc")
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # published test vector of "abc"
    (tmp_path / "SHA256SUMS").write_text(f"{digest}  config.json\n")
    assert doctor.check_sums(tmp_path).fix is None
    (tmp_path / "config.json").write_bytes(b"abd")
    changed = doctor.check_sums(tmp_path)
    assert changed.found == f"missing or changed in {tmp_path}: config.json"
    assert changed.fix == doctor.REINSTALL


def test_free_memory_is_what_can_be_had(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    assert doctor.free_memory(meminfo) == "unknown on this system"
    meminfo.write_text("MemTotal: 9437184 kB\nMemFree: 1048576 kB\nMemAvailable: 3145728 kB\n")
    assert doctor.free_memory(meminfo) == "3.0 GiB"


def test_the_bundled_model_passes() -> None:
    assert doctor.bundled_model().fix is None


def test_main_job_from_the_command_line(tmp_path: Path, capsys: Output) -> None:
    out = tmp_path / "out"
    command = ["localise", "--model", "tiny", "--task", "ioi", "--out", out, "--n", 4, "--top", 3, "--sites", "z"]
    assert run(*command, "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert Path(document["report"]).is_file()
    assert len(document["components"]) == 3
    assert run(*command, "--json") == 0  # the same settings: reused
    assert json.loads(capsys.readouterr().out) == document
    assert run(*command, "--seed", 1) == 2  # other settings: refused
    assert "overwrite" in capsys.readouterr().err
    assert run("report", out) == 0
