"""Sweeps: journals, being killed, and batches that shrink when memory runs out."""

from __future__ import annotations

import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from patching_cases import pairs_task, plain

import mechattr as ma
import mechattr.engines.sweep as engine
from mechattr.engines.sweep import Journal, sweep
from mechattr.errors import OutputExistsError, SettingError
from mechattr.models.halving import Halving
from mechattr.sites import Node

GROUPS = [[1.0, 2.0], [0.1, 1 / 3]]


def double(chunk: float) -> list[float]:
    return [2 * chunk, chunk / 7]


def never(chunk: float) -> list[float]:
    raise AssertionError("ran again")


def run(compute, path: Path | None, **key: object) -> list[list[float]]:  # type: ignore[no-untyped-def]
    return sweep(GROUPS, compute, n_groups=2, key=key or {"task": "a"}, resume=path)


def test_a_complete_journal_repeats_nothing_and_returns_the_same_bits(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "journal"
    assert run(double, path) == run(never, path) == run(double, None)


def test_an_exception_leaves_the_finished_chunks(tmp_path: Path) -> None:
    path, seen = tmp_path / "journal", []

    def fails(chunk: float) -> list[float]:
        if chunk == 0.1:
            raise ValueError("boom")
        return double(chunk)

    def note(chunk: float) -> list[float]:
        seen.append(chunk)
        return double(chunk)

    with pytest.raises(ValueError, match="boom"):
        run(fails, path)
    assert run(note, path) == run(double, None)
    assert seen == [0.1, 1 / 3]


def test_a_journal_cut_off_at_any_byte_is_resumed(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    run(double, whole)
    text = whole.read_bytes()
    for n in range(len(text) + 1):
        cut = tmp_path / "cut"
        cut.write_bytes(text[:n])
        assert run(double, cut) == run(double, None)
        assert cut.read_bytes() == text


@pytest.mark.parametrize("damage", (b'{"values": [1.0]}', b'{"chunk": 0, "values": "abc"}', b"{}", b"[]"))
def test_a_line_that_is_no_chunk_is_computed_again(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "journal"
    run(double, path)
    header, _, *rest = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([header, damage, *rest]))
    assert run(double, path) == run(never, path) == run(double, None)


@pytest.mark.parametrize(
    ("content", "found"),
    (
        (b'{"journal": 1, "task": "b"}\n', "it belongs to another sweep (different: task)"),
        (b"my thesis\n", "it is no journal"),
        (b"", "it is no file"),
    ),
)
def test_another_file_is_refused_and_kept(tmp_path: Path, content: bytes, found: str) -> None:
    path = tmp_path / "journal"
    if content:
        path.write_bytes(content)
    else:
        path.mkdir()
    with pytest.raises(OutputExistsError) as error:
        run(double, path)
    asked, what, fix = (error.value.asked, error.value.found, error.value.fix)
    assert (asked, what) == ("to resume from journal", found)
    assert fix.startswith("choose another path")
    assert not content or path.read_bytes() == content


@pytest.mark.parametrize("resume", (3, True, ["journal"]))
def test_what_is_no_path_is_refused(resume: object) -> None:
    with pytest.raises(SettingError) as error:
        run(double, resume)  # type: ignore[arg-type]
    found = f"a {type(resume).__name__}, no path"
    assert (error.value.asked, error.value.found) == (f"resume={resume!r}", found)
    assert error.value.fix == "give the path of a file, or None"


def test_a_chunk_with_another_number_of_numbers_is_computed_again(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    assert Journal(path, {}).numbers(0, lambda: [1.0], 1) == [1.0]
    assert Journal(path, {}).numbers(0, lambda: [2.0, 3.0], 2) == [2.0, 3.0]
    assert Journal(path, {}).numbers(0, lambda: never(0.0), 2) == [2.0, 3.0]
    assert Journal(path, {}).numbers(0, lambda: never(0.0)) == [2.0, 3.0]


def test_progress_guesses_the_groups_to_come(capsys: pytest.CaptureFixture[str]) -> None:
    sweep(GROUPS, double, n_groups=2, key={}, progress=True, label="sweeping")
    assert "sweeping: 100%" in capsys.readouterr().err
    sweep(GROUPS, double, n_groups=2, key={}, progress=False)
    assert not capsys.readouterr().err


CHILD = """
import os, signal, sys
import mechattr as ma, mechattr.engines.sweep as engine
from patching_cases import pairs_task, plain
whole, lines = engine._line, []
def dies(entry):
    lines.append(entry)
    if len(lines) == 6:  # the header and five chunks: dies in the middle of the fifth
        with open(sys.argv[1], "ab") as file:
            file.write(whole(entry)[:11])
            file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    return whole(entry)
engine._line = dies
model = plain("llama_like")
ma.activation_patching(model, pairs_task(model), batch_size=20, resume=sys.argv[1])
"""


def test_a_sweep_killed_in_the_middle_and_resumed_gives_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = tmp_path / "journal"
    environment = {"PYTHONPATH": f"{Path(__file__).parents[1]}:{Path(ma.__file__).parents[1]}", "PATH": ""}
    child = subprocess.run([sys.executable, "-c", CHILD, str(journal)], env=environment, capture_output=True, text=True)
    assert child.returncode == -signal.SIGKILL, child.stderr
    assert not journal.read_bytes().endswith(b"\n")
    finished = journal.read_bytes().count(b"\n") - 1
    model = plain("llama_like")
    task = pairs_task(model)
    ma.activation_patching(model, task, batch_size=20).save(tmp_path / "whole")
    added: list[object] = []
    append = engine._append
    monkeypatch.setattr(engine, "_append", lambda path, entry: (added.append(entry), append(path, entry)))
    ma.activation_patching(model, task, batch_size=20, resume=journal).save(tmp_path / "resumed")
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "resumed").read_bytes()
    assert finished > 0 and journal.read_bytes().count(b"\n") - 1 == finished + len(added) > finished


def test_a_journal_of_other_settings_is_refused(tmp_path: Path) -> None:
    model = plain("gpt2_like")
    task = pairs_task(model)
    settings = {"sites": ("z",), "resume": tmp_path / "journal"}
    ma.activation_patching(model, task, **settings)
    with pytest.raises(OutputExistsError, match=r"different: direction"):
        ma.activation_patching(model, task, direction="denoising", **settings)
    with pytest.raises(OutputExistsError, match=r"different: nodes"):
        ma.activation_patching(model, task, **{**settings, "sites": ("v",)})
    with pytest.raises(OutputExistsError, match=r"different: task"):
        ma.activation_patching(model, pairs_task(model, seed=1), **settings)


class Memory:
    """Room for a few rows, then an error of a given kind."""

    def __init__(self, room: int, error: Exception) -> None:
        self.room, self.error, self.sizes = room, error, list[int]()

    def __call__(self, rows):  # type: ignore[no-untyped-def]
        self.sizes.append(len(rows))
        if len(rows) > self.room:
            raise self.error
        return [10 * row for row in rows]


@pytest.mark.parametrize(
    "error",
    (
        torch.OutOfMemoryError("CUDA out of memory."),
        MemoryError(),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to allocate"
        ),
        RuntimeError("MPS backend out of memory"),
    ),
    ids=("cuda", "python", "cpu", "mps"),
)
def test_batches_halve_when_memory_runs_out_and_stay_small(error: Exception) -> None:
    memory = Memory(3, error)
    halving = Halving(10)
    assert halving(range(10), memory) == [10 * i for i in range(10)]
    assert memory.sizes == [10, 5, 2, 2, 2, 2, 2]
    assert halving(range(3), memory) == [0, 10, 20]
    assert memory.sizes[-2:] == [2, 1]


@pytest.mark.parametrize(("room", "error"), ((0, MemoryError("one row")), (3, RuntimeError("shape mismatch"))))
def test_other_errors_and_a_row_that_does_not_fit_are_raised(room: int, error: Exception) -> None:
    with pytest.raises(type(error), match=str(error)):
        Halving(10)(range(10), Memory(room, error))


@pytest.mark.parametrize("method", (ma.attribution_patching, ma.activation_patching))
def test_methods_survive_memory_running_out_with_the_same_result(method, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    model = plain("gpt2_like")
    task = pairs_task(model, (5,) * 4)
    expected = method(model, task, sites=("z",))
    most = 0

    def narrow(forward, batch, **settings):  # type: ignore[no-untyped-def]
        nonlocal most
        found = forward(batch, **settings)  # memory may run out after the sums of this batch were touched
        if len(batch) > 2 and (settings.get("gradients") or settings.get("edits")):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        most = max(most, len(batch)) if settings.get("gradients") or settings.get("edits") else most
        return found

    for name in ("run", "tape"):
        monkeypatch.setattr(model, name, partial(narrow, getattr(model, name)))
    found = method(model, task, sites=("z",))
    assert most == 2
    for name, table in expected.tensors.items():
        # float64 rounding: other batch shapes add in another order
        torch.testing.assert_close(found.tensors[name].values, table.values, rtol=0, atol=1e-12)


HALVED = (
    (ma.activation_patching, {"sites": "z"}),
    (ma.attribution_patching, {"sites": "z"}),
    (ma.ablation, {"sites": "z"}),
    (ma.ablation, {"sites": "z", "kind": "resample"}),
    (ma.causal_tracing, {"sites": "z", "span": "A", "samples": 1}),
    (ma.path_patching, {"receivers": [Node("q", 1, head=0)]}),
    (ma.edge_attribution, {"steps": 2}),
    (ma.edge_patching, {}),
    (ma.missed_effect_bound, {"verified": [], "sites": "z", "p": 0.3, "budget": 12 + 200}),
    (ma.faithfulness, {"sizes": (0.1, 0.3), "random": 1}),
    (ma.faithfulness, {"sizes": (0.1,), "random": 0, "ablation": "mean"}),
    (ma.minimality, {"random": 1}),
)


@pytest.mark.parametrize(
    ("method", "how"), HALVED, ids=[f"{m.__name__}-{h.get('kind', h.get('ablation', ''))}" for m, h in HALVED]
)
def test_recordings_halve_too(method, how, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    """Memory for no more than two rows, in whatever run; in float64, so that only the order of sums can show."""
    model = plain("gpt2_like")
    task = pairs_task(model, (5,) * 4)
    if method in (ma.faithfulness, ma.minimality):
        edges = ma.edge_attribution(model, task, method="eap")
        how = {**how, **({"edges": edges} if method is ma.faithfulness else {"circuit": edges.circuit(top=12)})}
    expected = method(model, task, **how)
    sizes: list[int] = []

    def narrow(forward, batch, **settings):  # type: ignore[no-untyped-def]
        if len(batch) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        sizes.append(len(batch))
        return forward(batch, **settings)

    for name in ("run", "tape"):
        monkeypatch.setattr(model, name, partial(narrow, getattr(model, name)))
    found = method(model, task, **how)
    assert max(sizes) == 2
    for name, table in expected.tensors.items():
        # float64 rounding: other batch shapes add in another order
        torch.testing.assert_close(
            found.tensors[name].values, table.values, rtol=0, atol=1e-12, equal_nan=True, msg=lambda m, n=name: n + m
        )
