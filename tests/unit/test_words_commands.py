"""`erase` and `vocabulary`: what they write, that they go on where they stopped, and what they refuse."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import mechattr as ma
from mechattr import cli, report
from mechattr.erasure import Closed, Descent, ErasureProbes, drawn, fit_probes
from mechattr.errors import MismatchError, OutputExistsError, SettingError

Output = Any  # of capsys
WORDS = [
    "the merry dog",
    "a wandering cat",
    "carpenters mended",
    "grandmother's garden",
    "remembering yesterday",
    "3 & 4",
]
TEXTS = [" ".join(WORDS[(i + j) % 6] for j in range(4)) + "." for i in range(12)]


def run(*arguments: object) -> int:
    """The exit code of one call."""
    with pytest.raises(SystemExit) as exited:
        cli.main([str(argument) for argument in arguments])
    return int(exited.value.code or 0)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "corpus.txt"
    path.write_text("\n".join(TEXTS))
    return path


@pytest.fixture(scope="module")
def erased(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    out = tmp_path_factory.mktemp("runs") / "erased"
    assert run("erase", "--model", "tiny", "--text", corpus, "--out", out, "--recipe", "closed", "--window", 64) == 0
    return out


def test_erase_writes_what_it_says(erased: Path, corpus: Path, capsys: Output) -> None:
    assert {path.name for path in erased.iterdir()} == {
        "agreement.csv", "footprint.csv", "footprint.png", "footprint.safetensors", "footprint.svg",
        "probes.safetensors", "report.html", "settings.json", "vocabulary.csv", "vocabulary.safetensors",
    }  # fmt: skip
    page = (erased / "report.html").read_text()
    assert not re.findall(r"(?:src|href)=[\"']?(?!data:)(?:https?:|//|/|\w+\.)", page)  # nothing from outside
    assert page.count("<h3>Document") == 3 and "9 documents fitted on, 3 measured on" in page
    assert "Intervals over 3 documents are rough." in page
    footprint = pd.read_csv(erased / "footprint.csv")
    lost, low, _ = ma.open(erased / "footprint.safetensors").drop("multi", -1, 0, 1)
    stated = f"loses {100 * lost:.1f} points of accuracy from layer 0 to 1 (95 % over documents: {100 * low:.1f} to"
    assert stated in page and set(footprint["group"]) == {"all", "multi", "single", "ngram"}
    again = run(
        "erase", "--model", "tiny", "--text", corpus, "--out", erased, "--recipe", "closed", "--window", 64, "--json"
    )
    document = json.loads(capsys.readouterr().out)
    assert again == 0 and document["report"] == str(erased / "report.html")
    assert len(document["agreement"]) == 12 and document["items"][0].keys() == {"text", "n_tokens", "count", "psi"}


def test_erase_takes_up_what_is_there(erased: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Finished parts are not made again; an interrupted descent goes on from its last epoch."""
    module = importlib.import_module("mechattr.report.erasing")
    model, recipe, fits = ma.load("tiny"), Descent(epochs=2), []

    def interrupted(*arguments: Any, **settings: Any) -> Any:
        fits.append(settings["resume"].exists())
        if len(fits) == 1:
            fit_probes(*arguments, **{**settings, "recipe": Descent(epochs=1)})
            raise KeyboardInterrupt
        return fit_probes(*arguments, **settings)

    monkeypatch.setattr(module, "fit_probes", interrupted)
    common: dict[str, Any] = {"layers": [0, 1], "offsets": [-2, -1, 0], "recipe": recipe, "window": 32}
    with pytest.raises(KeyboardInterrupt):
        report.erase(model, TEXTS, out=tmp_path / "twice", **common)
    found = report.erase(model, TEXTS, out=tmp_path / "twice", **common)
    assert fits == [False, True] and not (tmp_path / "twice/training.safetensors").exists()
    whole = report.erase(model, TEXTS, out=tmp_path / "once", **common)
    assert found.summary == whole.summary and found.vocabulary.to_pandas().equals(whole.vocabulary.to_pandas())
    monkeypatch.setattr(module, "fit_probes", None)
    assert report.erase(model, TEXTS, out=tmp_path / "once", **common).summary == whole.summary
    given = report.erase(model, TEXTS[:2], out=tmp_path / "given", probes=found.probes, window=32)
    assert given.n_fitted == 0 and given.n_measured == 2 and not given.shared


def test_one_document_is_measured_on_itself_and_the_page_says_so(tmp_path: Path) -> None:
    model = ma.load("tiny")
    found = report.erase(model, TEXTS[:1], out=tmp_path / "out", recipe=Closed(), window=32)
    assert found.shared and "the document that the probes were fitted on: nothing was held out" in found.summary
    assert "the probes were measured on what they were fitted on" in found.report_path.read_text()


def test_erase_refuses_what_cannot_be(erased: Path, corpus: Path, tmp_path: Path, capsys: Output) -> None:
    latin, empty = tmp_path / "latin.txt", tmp_path / "empty.txt"
    latin.write_bytes("one\ntwo\ncaf\xe9\n".encode("latin-1"))
    empty.write_text("\n\n")
    start = ["erase", "--model", "tiny", "--out", tmp_path / "new"]
    cases: list[tuple[list[object], str]] = [
        ([*start, "--text", latin], "line 3 of latin.txt as UTF-8"),
        ([*start, "--text", empty], "an empty file"),
        ([*start, "--text", tmp_path / "none.txt"], "no such file"),
        ([*start, "--text", corpus, "--layers", "0,9"], "layers=(0, 9)\n  found: layers -1 to 4"),
        ([*start, "--text", corpus, "--layers", "0,x"], "give whole numbers, separated by commas"),
        ([*start, "--text", corpus, "--layers", "2,3"], "segments without probes of layer 0\n  found: layers (2, 3)"),
        ([*start, "--text", corpus, "--start", 3, "--end", 2], "the end does not lie above the start"),
        ([*start, "--text", corpus, "--held-out", 1], "held_out=1.0"),
        ([*start, "--text", corpus, "--recipe", "closed", "--epochs", 2], "--recipe closed needs one pass"),
        ([*start, "--text", corpus, "--probes", erased / "probes.safetensors", "--epochs", 2], "not of --probes"),
        ([*start, "--text", corpus, "--probes", erased / "footprint.safetensors"], "kind 'footprint'"),
        (["erase", "--model", "tiny", "--out", erased, "--text", corpus], 'recipe is "Closed" there and "Descent"'),
        (["erase", "--model", "tiny", "--out", tmp_path, "--text", corpus], "files or folders of something else"),
        (["erase", "--model", "tiny", "--out", latin, "--text", corpus], "it is a file"),
    ]
    for arguments, text in cases:
        assert run(*arguments) == 2, arguments
        assert text in capsys.readouterr().err, arguments
    assert not (tmp_path / "new").exists()
    other = ErasureProbes.load(erased / "probes.safetensors")
    wrong = ErasureProbes(other.tensors, settings=other.settings, provenance={**other.provenance, "weight_hash": "0"})
    with pytest.raises(MismatchError, match="was made with weights 0"):
        report.erase(ma.load("tiny"), TEXTS, out=tmp_path / "new", probes=wrong)


def test_documents_are_drawn_from_files(corpus: Path) -> None:
    everything = drawn([corpus], characters=1000)
    assert sorted(everything) == sorted(TEXTS) and everything != TEXTS
    assert drawn([corpus], most=3) == everything[:3] and drawn([corpus, corpus], most=30, seed=1) != everything


def test_vocabulary_on_a_terminal_and_in_a_folder(tmp_path: Path, capsys: Output) -> None:
    assert run("vocabulary", "--model", "tiny", "--no-verify", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["categories"] == {"ok": 2431, "special": 1, "undecodable": 128} and document["report"] is None
    assert document["calibration"]["known"] == 13 and len(document["tokens"]) == 20
    out = tmp_path / "out"
    arguments = [
        "vocabulary",
        "--model",
        "tiny",
        "--by",
        "input_norm",
        "--unused",
        "95-97,99",
        "--no-verify",
        "--out",
        out,
    ]
    assert run(*arguments) == 0
    shown = capsys.readouterr().out
    assert "Lowest input_norm of the reachable tokens" in shown and "Report:" in shown
    assert ma.open(out / "undertrained.safetensors").settings["unused"] == [95, 96, 97, 99]
    page = (out / "report.html").read_text()
    assert not re.findall(r"(?:src|href)=[\"']?(?!data:)(?:https?:|//|/|\w+\.)", page) and "2,560 ids" in page
    assert len(pd.read_csv(out / "tokens.csv")) == 2560
    assert run(*arguments) == 0  # what is there is shown again
    with pytest.raises(OutputExistsError, match=r"share is 0\.02 there and 0\.5 here"):
        report.vocabulary(ma.load("tiny"), by="input_norm", unused=[95, 96, 97, 99], verify=False, out=out, share=0.5)
    replaced = report.vocabulary(ma.load("tiny"), by="input_norm", verify=False, out=out, overwrite=True)
    assert replaced.found.settings["unused"] != [95, 96, 97, 99]


def test_vocabulary_refuses_what_cannot_be(capsys: Output) -> None:
    cases = [
        (["--by", "normm"], "did you mean 'input_norm'"),
        (["--unused", "3-x"], "give ids and ranges such as 177-187"),
        (["--unused", "99999", "--by", "cosine"], "unused token 99999"),
        (["--share", "2"], "share=2.0"),
    ]
    for arguments, text in cases:
        assert run("vocabulary", "--model", "tiny", *arguments) == 2
        assert text in capsys.readouterr().err
    with pytest.raises(SettingError, match="no tokenizer"):
        report.vocabulary(ma.models.plain_model(ma.models.PlainConfig.gpt2_like()))
