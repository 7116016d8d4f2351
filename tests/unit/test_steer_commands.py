"""`steer fit`, `apply` and `evaluate` as a user runs them, and the contrasts that they read."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

import mechattr as ma
from mechattr import cli
from mechattr.commands import steer as commands
from mechattr.commands import steer_evaluate
from mechattr.errors import SettingError, UnknownNameError, UnknownTaskError
from mechattr.steering import SteeringVector, behaviour, from_gguf, prompts, read_pairs, read_triples
from mechattr.steering.intervals import estimate

Output = Any  # of capsys
PAIRS = [
    {"positive": f"I think that the {noun}s", "negative": f"I think that the {noun}"}
    for noun in ("rabbit", "lion", "writer")
]
TRIPLES = [
    {"prompt": f"They say that the {noun}", "preferred": " are", "dispreferred": " is"} for noun in ("rabbit", "lions")
]


@pytest.fixture(scope="module")
def model() -> Any:
    return ma.load("tiny")


@pytest.fixture(autouse=True)
def tiny(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loads the bundled model once, whatever is asked for."""
    monkeypatch.setattr(commands, "load", lambda *_: model)
    monkeypatch.setattr(steer_evaluate, "load", lambda *_: model)


def lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("data")
    return {"pairs": lines(folder / "pairs.jsonl", PAIRS), "triples": lines(folder / "triples.jsonl", TRIPLES)}


@pytest.fixture(scope="module")
def fitted(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vectors") / "plural.safetensors"
    pairs = behaviour(model, "subject_verb", n=8).pairs
    ma.steering.mean_difference(model, pairs, layers=[3]).save(path)
    return path


def run(command: str, *options: object) -> int:
    """The exit code of one call."""
    with pytest.raises(SystemExit) as exited:
        cli.main(["steer", command, "--model", "tiny", *map(str, options)])
    return int(exited.value.code or 0)


def test_fit_saves_what_the_builder_makes(model: Any, files: dict[str, Path], tmp_path: Path, capsys: Output) -> None:
    out, gguf = tmp_path / "v.safetensors", tmp_path / "v.gguf"
    assert run("fit", "--pairs", files["pairs"], "--layers", "1,2", "--out", out, "--gguf", gguf) == 0
    shown = capsys.readouterr().out
    wanted = ma.steering.mean_difference(model, [(p["positive"], p["negative"]) for p in PAIRS], layers=[1, 2])
    found = SteeringVector.load(out)
    for name, table in wanted.tensors.items():
        assert table.values.equal(found.tensors[name].values)  # the same call
        assert table.values.equal(from_gguf(gguf).tensors[name].values)
        assert f"{name} │" in shown
    assert "From 3 pairs." in shown and f"Written: {gguf}" in shown
    assert run("fit", "--pairs", files["pairs"], "--layers", 1, "--out", out, "--overwrite", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["builder"] == "mean_difference" and document["files"] == [str(out)]
    assert document["table"][0]["norm"] == pytest.approx(wanted.norms()["blocks.1.hook_resid_post"])


def test_fit_takes_every_kind_of_data_and_place(
    model: Any, files: dict[str, Path], tmp_path: Path, capsys: Output
) -> None:
    out = tmp_path / "v.safetensors"
    grains = ("--builder", "grains", "--triples", files["triples"], "--layers", 2, "--set", "k=2")
    assert run("fit", *grains, "--out", out) == 0
    assert "From 2 triples." in capsys.readouterr().out and ma.open(out).settings["k"] == 2
    task = ma.tasks.make(model, "subject_verb", n=4, seed=0)
    result = ma.attribution_patching(model, task, sites=["z"], positions="all")
    result.save(tmp_path / "attribution.safetensors")
    nodes = ("--nodes", tmp_path / "attribution.safetensors", "--top", 2)
    assert run("fit", "--task", "subject_verb", "--n", 4, *nodes, "--out", out, "--overwrite") == 0
    heads = {(n, h) for n, x in SteeringVector.load(out).tensors.items() for h in range(4) if x.values[h].any()}
    assert heads == {(f"blocks.{node.layer}.attn.hook_z", node.head) for node in result.top(2)}
    assert run("fit", "--triples", files["triples"], "--sites", "mlp_out", "--positions", "mean", "--out", out,
               "--overwrite") == 0  # fmt: skip
    assert ma.open(out).settings["positions"] == "mean" and len(ma.open(out).tensors) == 4


def test_apply_shows_base_and_steered_side_by_side(model: Any, fitted: Path, capsys: Output) -> None:
    texts = ["I think that the writer", "At night the cows"]
    options = ("--vector", fitted, "--prompt", texts[0], "--prompt", texts[1], "--max-new-tokens", 2)
    assert run("apply", *options, "--multiplier", "-2,0,2", "--json") == 0
    found = json.loads(capsys.readouterr().out)["continuations"]
    for one, prompt in zip(found, texts, strict=True):
        assert one["prompt"] == prompt
        assert one["base"] == model.generate(model.tokenize(prompt), max_new_tokens=2, do_sample=False).texts[0]
        assert [row["multiplier"] for row in one["steered"]] == [-2, 0, 2]
        for row in one["steered"]:
            with SteeringVector.load(fitted).apply(model, row["multiplier"]):
                alone = model.generate(model.tokenize(prompt), max_new_tokens=2, do_sample=False).texts[0]
            assert row["text"] == alone
        assert one["steered"][1]["text"] == one["base"] != one["steered"][2]["text"]
    assert run("apply", *options, "--multiplier", "0", "--operator", "ablate", "--positions", "-1,0") == 0
    shown = capsys.readouterr().out
    assert "ablate at blocks.3.hook_resid_post, positions -1,0" in shown and shown.count("│ base") == 2


def test_apply_takes_functions_of_the_state_and_conditions(
    model: Any, fitted: Path, tmp_path: Path, capsys: Output
) -> None:
    moving, gate, common = tmp_path / "moving", tmp_path / "gate", ("--task", "subject_verb", "--n", 6, "--layers", 1)
    assert run("fit", *common, "--builder", "g_act", "--set", "clusters=2", "--out", moving) == 0
    assert "blocks.1.hook_resid_post/centroids │ 2 × 128" in capsys.readouterr().out
    assert run("fit", *common, "--builder", "condition", "--out", gate) == 0
    condition = ma.open(gate)
    assert f"{condition.settings['threshold']:.5f}" in capsys.readouterr().out
    texts = ("At night the cows", "I think that the writer")
    options = ("--prompt", texts[0], "--prompt", texts[1], "--multiplier", 4, "--max-new-tokens", 3, "--json")
    assert run("apply", "--vector", moving, *options) == 0
    moved = json.loads(capsys.readouterr().out)["continuations"]
    with ma.open(moving).apply(model, 4.0):
        alone = [model.generate(model.tokenize(x), max_new_tokens=3, do_sample=False).texts[0] for x in texts]
    assert [one["steered"][0]["text"] for one in moved] == alone
    assert run("apply", "--vector", fitted, "--gate", gate, *options) == 0
    gated = json.loads(capsys.readouterr().out)["continuations"]
    with SteeringVector.load(fitted).apply(model, 4.0, gate=condition):
        batch = model.tokenize(texts, padding_side="left")
        both = model.generate(batch, max_new_tokens=3, do_sample=False).texts
    assert [one["steered"][0]["text"] for one in gated] == list(both)
    closed = [one["steered"][0]["text"] == one["base"] for one in gated]
    assert closed == [False, True]  # it opens for plural subjects
    for arguments, text in (
        (("--vector", gate), "kind 'steering_condition'"),
        (("--vector", fitted, "--gate", fitted), "kind 'steering_vector'"),
        (("--vector", moving, "--operator", "ablate"), "g_act, which says itself what is added"),
    ):
        assert run("apply", *options, *arguments) == 2
        assert text in capsys.readouterr().err
    refused = ("--builder", "g_act", "--gguf", tmp_path / "v.gguf", "--out", tmp_path / "other")
    assert run("fit", *common, *refused) == 2
    assert "--gguf\n  found: a g_act" in capsys.readouterr().err and not (tmp_path / "other").exists()
    layers = ("--task", "subject_verb", "--by-layer", "--out", tmp_path / "run")
    assert run("evaluate", "--vector", moving, *layers) == 2
    assert "one layer at a time\n  found: a g_act" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_apply_reads_vectors_of_other_programs(fitted: Path, tmp_path: Path, capsys: Output) -> None:
    vector, texts = SteeringVector.load(fitted), []
    ma.steering.to_gguf(vector, tmp_path / "v.gguf", model_hint="gpt2")
    ma.steering.to_json(vector, tmp_path / "v.json", model_type="gpt2")
    for file in (fitted, tmp_path / "v.gguf", tmp_path / "v.json"):
        assert run("apply", "--vector", file, "--prompt", "The cow", "--multiplier", 3, "--json") == 0
        texts.append(json.loads(capsys.readouterr().out)["continuations"])
    assert texts[0] == texts[1] == texts[2]


def test_fit_refuses_what_cannot_be(files: dict[str, Path], fitted: Path, tmp_path: Path, capsys: Output) -> None:
    out, empty, latin = tmp_path / "v.safetensors", tmp_path / "empty.jsonl", tmp_path / "latin.jsonl"
    empty.write_text("\n\n")
    latin.write_bytes(b'\n{"positive": "caf\xe9", "negative": "a"}\n')
    broken = tmp_path / "broken.jsonl"
    broken.write_text(json.dumps(PAIRS[0]) + "\n{'positive': 1}\n")
    texts = lines(tmp_path / "texts.jsonl", ["a text"])
    number = lines(tmp_path / "number.jsonl", [{"positive": 3, "negative": "a"}])
    equal = lines(tmp_path / "equal.jsonl", [*PAIRS, {"positive": "the lion", "negative": "the lion"}])
    pairs = ("--pairs", files["pairs"])
    cases: list[tuple[tuple[object, ...], str]] = [
        (("--pairs", tmp_path / "none.jsonl", "--layers", 1), "none.jsonl'\n  found: no such file"),
        (("--pairs", empty, "--layers", 1), "contrasts from empty.jsonl\n  found: an empty file"),
        (("--pairs", latin, "--layers", 1), "line 2 of latin.jsonl\n  found: not UTF-8"),
        (("--pairs", broken, "--layers", 1), "line 2 of broken.jsonl\n  found: not JSON"),
        (("--pairs", texts, "--layers", 1), "line 1 of texts.jsonl\n  found: a str"),
        (("--pairs", number, "--layers", 1), "line 1 of number.jsonl\n  found: positive: 3"),
        (("--pairs", equal, "--layers", 1), "line 4 of equal.jsonl\n  found: positive and negative are equal"),
        (("--pairs", files["triples"], "--layers", 1), "line 1 of triples.jsonl\n  found: the keys prompt, preferred"),
        (("--triples", files["pairs"], "--layers", 1), 'write one object a line: {"prompt": "...", "preferred": "..."'),
        ((*pairs, "--task", "subject_verb", "--layers", 1), "give exactly one of --pairs, --triples and --task"),
        ((*pairs, "--layers", 1, "--sites", "z"), "give one of --layers, --sites and --nodes"),
        ((*pairs,), "where to steer\n  found: neither"),
        ((*pairs, "--layers", "1,9"), "layers=[1, 9]\n  found: a model with layers 0 to 3"),
        ((*pairs, "--layers", "one"), "--layers one: give whole numbers, separated by commas"),
        ((*pairs, "--sites", "zz"), "'zz'"),
        ((*pairs, "--nodes", fitted), "kind 'steering_vector'"),
        ((*pairs, "--layers", 1, "--positions", "first"), "positions='first'\n  found: no such place"),
        ((*pairs, "--layers", 1, "--builder", "mean_diff"), "did you mean 'mean_difference'"),
        ((*pairs, "--layers", 1, "--builder", "grains"), "grains from --pairs\n  found: it needs prompts with two"),
        ((*pairs, "--layers", 1, "--builder", "refusal"), "refusal\n  found: no tokens\n  fix: give --set tokens"),
        ((*pairs, "--layers", 1, "--set", "ridge=1"), "ridge for mean_difference"),
        ((*pairs, "--layers", 1, "--set", "seed=1"), "--set seed: give --seed"),
        ((*pairs, "--set", "layers=[1]"), "--set layers: give --layers"),
        (
            ("--triples", files["triples"], "--layers", 1, "--builder", "grains", "--set", "tolerance=x"),
            "tolerance='x'\n  found: no share",
        ),
        ((*pairs, "--layers", 1, "--out", tmp_path / "v.gguf"), "v.gguf\n  found: a file of this program"),
        ((*pairs, "--layers", 1, "--gguf", out), "v.safetensors\n  found: another ending"),
        (("--task", "ioi", "--layers", 1), "the behaviour of task 'ioi'"),
        ((*pairs, "--layers", 1, "--out", tmp_path / "no" / "v"), "no such folder"),
        ((*pairs, "--layers", 1, "--out", fitted), "plural.safetensors\n  found: a file of this name"),
    ]
    for arguments, text in cases:
        assert run("fit", "--out", out, *arguments) == 2, arguments
        assert text in capsys.readouterr().err, arguments
    assert not out.exists()


def test_apply_refuses_what_cannot_be(fitted: Path, model: Any, tmp_path: Path, capsys: Output) -> None:
    vector = SteeringVector.load(fitted)
    ma.steering.to_gguf(vector, tmp_path / "v.gguf", model_hint="gpt2")
    (tmp_path / "cut.gguf").write_bytes((tmp_path / "v.gguf").read_bytes()[:-40])
    (tmp_path / "cut.safetensors").write_bytes(fitted.read_bytes()[:-40])
    SteeringVector.of({"blocks.1.hook_resid_post": torch.ones(8)}).save(tmp_path / "narrow")
    other = SteeringVector(vector.tensors, provenance={**vector.provenance, "weight_hash": "0" * 64})
    other.save(tmp_path / "other")
    cases: list[tuple[tuple[object, ...], str]] = [
        (("--vector", tmp_path / "none.safetensors"), "none.safetensors"),
        (("--vector", tmp_path / "none.gguf"), "give the path of a .gguf file"),
        (("--vector", tmp_path / "cut.gguf"), "a damaged or truncated file"),
        (("--vector", tmp_path / "cut.safetensors"), "cut.safetensors"),
        (
            ("--vector", tmp_path / "narrow"),
            "a direction of shape [8] at blocks.1.hook_resid_post\n  found: 'tiny' has [128]",
        ),
        (("--vector", tmp_path / "other"), "the result was made with weights 000000000000"),
        (("--vector", tmp_path / "other"), "or compute the result again; --any-model takes it where its sites fit"),
        (("--vector", fitted, "--multiplier", "-2,x"), "--multiplier -2,x: give numbers, separated by commas"),
        (("--vector", fitted, "--multiplier", "nan"), "no finite number"),
        (("--vector", fitted, "--positions", "lst"), "positions='lst'\n  found: no such place"),
        (("--vector", fitted, "--operator", "adds"), "operator='adds'"),
        (("--vector", fitted, "--max-new-tokens", 200), "128"),
    ]
    for arguments, text in cases:
        assert run("apply", "--prompt", "The cow", *arguments) == 2, arguments
        assert text in capsys.readouterr().err, arguments
    assert run("apply", "--prompt", "The cow", "--vector", tmp_path / "other", "--any-model") == 0


def test_fit_makes_a_control_of_shuffled_labels(model: Any, tmp_path: Path, capsys: Output) -> None:
    out = tmp_path / "control.safetensors"
    common = ("--task", "subject_verb", "--n", 8, "--layers", 3, "--seed", 2)
    assert run("fit", *common, "--shuffled", "--out", out) == 0
    assert "From 8 pairs, shuffled." in capsys.readouterr().out
    pairs = behaviour(model, "subject_verb", n=8, seed=2).pairs
    wanted = ma.steering.shuffled(ma.steering.mean_difference, model, pairs, layers=[3], seed=2)
    assert SteeringVector.load(out).directions[3].equal(wanted.directions[3])


@pytest.fixture(scope="module")
def evaluated(model: Any, fitted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "evaluated"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steer_evaluate, "load", lambda *_: model)
        assert run("evaluate", *evaluation(fitted, out)) == 0
    return out


def evaluation(fitted: Path, out: Path) -> tuple[object, ...]:
    common = ("--vector", fitted, "--out", out, "--task", "subject_verb", "--n", 4, "--neutral", "gendered_pronoun")
    return (*common, "--multipliers", "-1,0,0.125", "--prompting", "Now ", "--shuffled", fitted, "--by-layer",
            "--generate", 2)  # fmt: skip


def test_evaluate_writes_what_it_says(model: Any, fitted: Path, evaluated: Path, capsys: Output) -> None:
    assert {path.name for path in evaluated.iterdir()} == {
        "evaluation.csv", "evaluation.safetensors", "frontier.png", "frontier.svg", "layers.png", "layers.svg",
        "propensity.png", "propensity.svg", "report.html", "settings.json", "sweep.csv", "sweep.safetensors",
    }  # fmt: skip
    found = ma.open(evaluated / "evaluation.safetensors")
    triples = behaviour(model, "subject_verb", n=4, split="test").triples
    with SteeringVector.load(fitted).apply(model, -1.0):
        by_hand = ma.steering.propensity(model, triples)
    measured = found.tensors["propensity"].sel(condition="vector", multiplier="-1").values
    torch.testing.assert_close(measured, by_hand, rtol=1e-4, atol=1e-4)  # float32 in other batch shapes
    page = (evaluated / "report.html").read_text()
    assert not re.findall(r"(?:src|href)=[\"']?(?!data:)(?:https?:|//|/|\w+\.)", page)  # nothing from outside
    stated = f"changes the propensity of 8 items by {found.steerability()} nat"
    assert stated in page and "Intervals over 8 items are rough." in page and page.count("<figure>") == 3
    assert f"the most is {found.frontier().best[1]:.3g} nat (multiplier 0.125)" in page and triples[0][0] in page
    frame = pd.read_csv(evaluated / "evaluation.csv")
    assert len(frame) == 3 * 3 + 1 and frame["effect"][2] == pytest.approx(float(found.effects("vector")[2].mean()))
    written = (evaluated / "evaluation.safetensors").stat().st_mtime_ns
    assert run("evaluate", *evaluation(fitted, evaluated), "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["report"] == str(evaluated / "report.html") and stated in document["summary"]
    assert len(document["table"]) == 10 and (evaluated / "evaluation.safetensors").stat().st_mtime_ns == written


def test_evaluate_shows_its_numbers(fitted: Path, files: dict[str, Path], tmp_path: Path, capsys: Output) -> None:
    texts = tmp_path / "neutral.txt"
    texts.write_text("The old house stood by the river.\n\nWe went home.\n")
    options = (
        "--vector",
        fitted,
        "--triples",
        files["triples"],
        "--neutral",
        texts,
        "--multipliers",
        "1",
        "--random",
        1,
    )
    assert run("evaluate", *options, "--out", tmp_path / "out") == 0
    shown = capsys.readouterr().out
    found = ma.open(tmp_path / "out" / "evaluation.safetensors")
    assert found.tensors["kl"].shape[-1] == 2 and "sweep" not in {path.stem for path in (tmp_path / "out").iterdir()}
    assert f"{float(found.effects('vector').mean()):.3g} [" in shown and "Report:" in shown


@pytest.mark.parametrize(("operator", "multipliers"), [("ablate", "-1,0,1"), ("add", "2")])
def test_without_a_slope_the_change_is_said(
    operator: str, multipliers: str, fitted: Path, files: dict[str, Path], tmp_path: Path, capsys: Output
) -> None:
    """The multiplier does not change an ablation, and of one multiplier there is no slope: not "changes it by 0"."""
    options = ("--vector", fitted, "--triples", files["triples"], "--operator", operator, "--neutral", "ioi")
    more = ("--multipliers", multipliers, "--shuffled", fitted, "--random", 1, "--out", tmp_path / "out")
    assert run("evaluate", *options, *more) == 0
    shown = capsys.readouterr().out
    found = ma.open(tmp_path / "out" / "evaluation.safetensors")
    effect, chance = (estimate(found.effects(name)[0]) for name in ("vector", "random"))
    price = estimate(found.tensors["kl"].values[0, 0])
    assert not found.graded and found.random_effects == [pytest.approx(chance.value)]
    assert f"The vector changes the propensity of 2 items by {effect} nat" in shown and "One unit" not in shown
    assert f"Random vectors of equal length: {chance.value:.3g} nat." in shown
    assert f"Shuffled labels: {effect} nat." in shown  # the vector itself was given
    assert f"KL on neutral texts: {price} nats a token" in shown
    assert "KL [nats a token]" in shown
    assert f"effect {effect} nat; random vectors {chance.value:.3g}; shuffled labels {effect}" in found.summary


def test_evaluate_refuses_what_cannot_be(
    fitted: Path, evaluated: Path, files: dict[str, Path], tmp_path: Path, capsys: Output
) -> None:
    empty, long = tmp_path / "empty.txt", tmp_path / "long.txt"
    empty.write_text("\n")
    long.write_text("word " * 400)
    short = tmp_path / "short.txt"
    short.write_text("The cow\n")
    common = ("--vector", fitted, "--triples", files["triples"], "--multipliers", "0,1")
    cases: list[tuple[tuple[object, ...], str]] = [
        ((*common, "--task", "subject_verb"), "give exactly one of --triples and --task"),
        (("--vector", fitted), "give exactly one of --triples and --task"),
        ((*common, "--triples", files["pairs"]), "line 1 of pairs.jsonl\n  found: the keys positive, negative"),
        ((*common, "--neutral", tmp_path / "none.txt"), "no such file"),
        ((*common, "--neutral", empty), "an empty file"),
        ((*common, "--neutral", long), "128"),
        ((*common, "--multipliers", "1,1"), "multipliers"),
        ((*common, "--multipliers", "a"), "--multipliers a: give numbers, separated by commas"),
        ((*common, "--positions", "frist"), "positions='frist'"),
        ((*common, "--operator", "adds"), "operator"),
        ((*common, "--shuffled", tmp_path / "none.gguf"), "give the path of a .gguf file"),
        ((*common, "--positions", 99), "positions=[99]\n  found: texts of up to 6 tokens"),
        ((*common, "--positions", 5, "--neutral", short), "positions=[5]\n  found: texts of up to 2 tokens"),
        ((*common, "--generate", 125), "generate=125\n  found: a prompt of 5 tokens, and a model of 128 positions"),
        ((*common, "--generate", 121, "--prompting", "The cow. "), "found: a prompt of 8 tokens"),
        ((*common, "--out", fitted), "it is a file"),
        ((*common, "--out", fitted / "new"), "to write into"),
        ((*common, "--out", evaluated), "the result of other settings"),
        ((*common, "--out", files["pairs"].parent), "files or folders of something else"),
    ]
    for arguments, text in cases:
        assert run("evaluate", "--out", tmp_path / "new", *arguments) == 2, arguments
        assert text in capsys.readouterr().err, arguments
    assert not (tmp_path / "new").exists()


def test_a_behaviour_has_its_texts_in_front(model: Any) -> None:
    found = behaviour(model, "subject_verb", n=12, seed=3)
    assert len(found.pairs) == 12 and len(found.triples) == 24
    singular = {" is", " was", " has", " runs", " works", " sleeps", " sings", " waits", " speaks"}
    assert {triple[2] for triple in found.triples} <= singular and not {t[1] for t in found.triples} & singular
    differing = [next((a, b) for a, b in zip(x.split(), y.split(), strict=True) if a != b) for x, y in found.pairs]
    assert all(plural == one + "s" for plural, one in differing)  # nouns of the grammar are regular
    task = ma.tasks.make(model, "subject_verb", n=12, seed=3, split="train")
    as_drawn = [model.tokenizer.decode(row[mask]) for row, mask in zip(task.clean.tokens, task.clean.mask, strict=True)]
    assert 0 < sum(clean == plural for clean, (plural, _) in zip(as_drawn, found.pairs, strict=True)) < 12
    for (a, b), one, other in zip(found.pairs, found.triples[::2], found.triples[1::2], strict=True):
        assert (one[0], other[0]) == (a, b) and one[1:] == other[1:]
    she = behaviour(model, "gendered_pronoun", n=6)
    assert {triple[1:] for triple in she.triples} == {(" she", " he")}
    with pytest.raises(UnknownNameError, match="did you mean 'subject_verb'"):
        behaviour(model, "subject_verbs")


def test_prompts_are_the_different_ones_of_a_task(model: Any) -> None:
    found = prompts(model, "greater_than", n=6, seed=1)
    task = ma.tasks.make(model, "greater_than", n=6, seed=1)
    assert len(found) == len(set(found)) and model.tokenize(found[0]).tokens[0].equal(
        task.clean.tokens[0][task.clean.mask[0]]
    )
    with pytest.raises(UnknownTaskError, match="did you mean 'greater_than'"):
        prompts(model, "greater")


def test_contrasts_of_files(files: dict[str, Path]) -> None:
    assert read_pairs(files["pairs"]).pairs[1] == ("I think that the lions", "I think that the lion")
    assert not read_pairs(files["pairs"]).triples
    found = read_triples(files["triples"])
    assert found.triples[0] == ("They say that the rabbit", " are", " is")
    assert found.pairs[0] == ("They say that the rabbit are", "They say that the rabbit is")
    with pytest.raises(SettingError, match="write one object a line"):
        read_pairs(files["triples"])
