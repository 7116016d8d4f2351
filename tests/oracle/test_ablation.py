"""Ablation against its definition: one node, one prompt without padding and one explicit edit at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from patching_cases import (
    all_nodes,
    assert_same,
    bigness,
    full,
    hf,
    means,
    pairs_task,
    part,
    places,
    plain,
    repadded,
    shorts,
    single,
    values,
)
from torch import Tensor

import mechattr as ma
from mechattr.errors import (
    AlignmentError,
    EmptyTaskError,
    MechattrError,
    OutputExistsError,
    SettingError,
    UnknownNameError,
    UnsupportedFeatureError,
)
from mechattr.models import Edit, Zero
from mechattr.models.plain import HookedPlain
from mechattr.patching.ablation import KINDS, ablation
from mechattr.sites import Node
from mechattr.tasks.task import Task

# float64 rounding over a few hundred operations on values up to about 100
ROUNDING = {"rtol": 0, "atol": 1e-10}
MODEL = plain("gpt2_like")
TASK = pairs_task(MODEL)


def sites_of(model: Any, kind: str) -> list[str]:
    """What can be ablated, without the scales of norms, which are divided by."""
    rows = {"mean": ("pattern", "attn_scores"), "zero": ("attn_scores",), "resample": ()}[kind]
    return [s for s in shorts(model) if s not in rows and not s.endswith("_scale")]


def tokens_at(model: Any, task: Task, node: Node, positions: str) -> list[Tensor]:
    """For each prompt, the node's values at its tokens."""
    found = []
    for row in range(len(task)):
        x = model.run(single(task.clean, row), record=[full(model, node)]).activations[full(model, node)].values
        found.append(part(x, node, places(task, row, positions)[node.pos]))
    return found


def effect(model: Any, task: Task, row: int, node: Node, positions: str, value: Tensor) -> float:
    """Of putting a value at every token of a node, or one at each."""

    def put(x: Tensor, place: Any) -> Tensor:
        return value.reshape(x.shape) if value.numel() == x.numel() else value.expand(x.shape).clone()

    where = list(range(*places(task, row, positions)[node.pos]))
    heads = None if node.head is None else [node.head]
    neurons = None if node.neuron is None else [node.neuron]
    edit = Edit(full(model, node), put, positions=where, heads=heads, neurons=neurons)
    prompt = single(task.clean, row)
    before = model.run(prompt, metric=task.metric).metric
    return (model.run(prompt, edits=[edit], metric=task.metric).metric - before).item()


def slow(
    model: Any,
    task: Task,
    nodes: Sequence[Node],
    kind: str,
    *,
    positions: str = "aligned",
    reference: Task | None = None,
    rows: Sequence[int] = (),
    wrong: str = "",
) -> Tensor:
    """[pair, node], straight from the definition; `wrong` names a mistake to make on purpose."""
    found = torch.zeros(len(task), len(nodes), dtype=torch.float64)
    for j, node in enumerate(nodes):
        there = tokens_at(model, task if reference is None else reference, node, positions)
        for row in range(len(task)):
            if kind == "resample":
                value = there[row if wrong == "its own prompt" else rows[row]]
            elif kind == "zero":
                value = torch.zeros_like(there[row])
            elif wrong == "metric averaged over values":
                each = [effect(model, task, row, node, positions, v) for x in there for v in x]
                found[row, j] = sum(each) / len(each)
                continue
            elif wrong == "each prompt weighs the same":
                value = torch.stack([x.mean(0) for x in there]).mean(0)
            elif wrong == "mean over all positions":
                whole = tokens_at(model, task, replace(node, pos=None), "all")
                value = torch.cat(whole).mean(0)
            elif wrong == "padding counts":
                x = model.run(task.clean, record=[full(model, node)]).activations[full(model, node)].values
                value = x[..., node.head, :].mean((0, 1))
            elif wrong == "mean of the prompt itself":
                value = there[row].mean(0)
            else:
                value = torch.cat(there).mean(0)
            found[row, j] = effect(model, task, row, node, positions, value)
    return found


@pytest.mark.parametrize("positions", ("aligned", "named", "all"))
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("net", ("gpt2_like", "llama_like"))
def test_ablation_follows_its_definition_at_every_site(net: str, kind: str, positions: str) -> None:
    model = plain(net)
    task = pairs_task(model, (4, 4, 4))
    sites = sites_of(model, kind)
    nodes = [node for i, node in enumerate(all_nodes(model, task, sites, positions)) if i % 5 == 0]
    found = ablation(model, task, kind=kind, sites=sites, positions=positions)
    rows = found.settings["reference_rows"]
    effects = slow(model, task, nodes, kind, positions=positions, rows=rows or ())
    torch.testing.assert_close(values(found, nodes), means(effects), **ROUNDING)
    assert float(found.scores["z"].values.max()) > 0.01
    torch.testing.assert_close(found.contribution["z"].values, -found.signed["z"].values, **ROUNDING)


@pytest.mark.parametrize("kind", ("mean", "zero"))
@pytest.mark.parametrize("positions", ("named", "all"))
def test_prompts_of_several_lengths_count_their_real_tokens(kind: str, positions: str) -> None:
    task = pairs_task(MODEL, (4, 7, 5))
    nodes = all_nodes(MODEL, task, ("v", "z", "mlp_post"), positions)
    found = ablation(MODEL, task, kind=kind, sites=("v", "z", "mlp_post"), positions=positions)
    torch.testing.assert_close(
        values(found, nodes), means(slow(MODEL, task, nodes, kind, positions=positions)), **ROUNDING
    )
    for side in ("left", "right"):
        padded = ablation(MODEL, repadded(task, side), kind=kind, sites=("v", "z", "mlp_post"), positions=positions)
        assert_same(padded, found, 1e-12)  # other batch shapes add in another order


@pytest.mark.parametrize(
    ("wrong", "positions"),
    (
        ("padding counts", "all"),
        ("each prompt weighs the same", "all"),
        ("mean of the prompt itself", "named"),
        ("metric averaged over values", "all"),
        ("mean over all positions", "named"),
        ("abs after the mean", "named"),
    ),
)
def test_the_check_of_mean_ablation_rejects(wrong: str, positions: str) -> None:
    task = pairs_task(MODEL, (4, 7, 5))
    nodes = all_nodes(MODEL, task, ("z",), positions)
    found = values(ablation(MODEL, task, sites=("z",), positions=positions), nodes)
    effects = slow(MODEL, task, nodes, "mean", positions=positions, wrong=wrong)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(found, means(effects, wrong), **ROUNDING)


def test_resampling_takes_another_prompt_and_the_seed_says_which() -> None:
    task = pairs_task(MODEL, (5,) * 6)
    chosen = []
    for seed in range(4):
        found = ablation(MODEL, task, kind="resample", sites=("z",), seed=seed)
        rows = found.settings["reference_rows"]
        assert sorted(rows) == list(range(6)) and all(row != i for i, row in enumerate(rows))
        chosen.append(tuple(rows))
    assert len(set(chosen)) > 1
    nodes = all_nodes(MODEL, task, ("z",), "aligned")
    for wrong in ("", "its own prompt"):
        effects = slow(MODEL, task, nodes, "resample", rows=rows, wrong=wrong)
        equal = torch.allclose(values(found, nodes)[1], effects.mean(0), rtol=0, atol=1e-10)  # float64 rounding
        assert equal == (not wrong)
    again = ablation(MODEL, task, kind="resample", sites=("z",), seed=3)
    assert_same(again, found, 0)


def test_spans_at_other_positions_take_the_tokens_of_their_span() -> None:
    prompt = {"answer": 1, "foil": 2, "corrupt_tokens": [9, 8, 7, 6, 5, 4]}
    task = ma.tasks.from_pairs(
        MODEL,
        [
            {**prompt, "clean_tokens": [3, 4, 5, 6, 7, 8], "spans": {"S": [1, 3]}},
            {**prompt, "clean_tokens": [8, 3, 7, 5, 9, 4], "spans": {"S": [3, 5]}},
            {**prompt, "clean_tokens": [7, 5, 3, 9, 4, 6], "spans": {"S": [2, 4]}},
        ],
    )
    found = ablation(MODEL, task, kind="resample", sites=("z", "mlp_post"), positions="named")
    nodes = all_nodes(MODEL, task, ("z", "mlp_post"), "named")
    rows = found.settings["reference_rows"]
    effects = slow(MODEL, task, nodes, "resample", positions="named", rows=rows)
    torch.testing.assert_close(values(found, nodes), means(effects), **ROUNDING)
    with pytest.raises(AlignmentError, match=r"attn\.hook_pattern has rows over other keys"):
        ablation(MODEL, task, kind="resample", sites=("pattern",), positions="named")


@pytest.mark.parametrize("kind", ("mean", "resample"))
def test_another_task_as_reference(kind: str) -> None:
    reference = pairs_task(MODEL, (5,) * 7, seed=5)
    found = ablation(MODEL, TASK, kind=kind, sites=("z", "mlp_out"), reference=reference, batch_size=3)
    nodes = all_nodes(MODEL, TASK, ("z", "mlp_out"), "aligned")
    rows = found.settings["reference_rows"] or ()
    effects = slow(MODEL, TASK, nodes, kind, reference=reference, rows=rows)
    torch.testing.assert_close(values(found, nodes), means(effects), **ROUNDING)
    assert found.settings["reference_hash"] == reference.hash()
    assert found.passes.forward > len(TASK) + (7 if kind == "mean" else len(TASK))
    with pytest.raises(AssertionError):  # wrong: the task's own prompts
        torch.testing.assert_close(values(found, nodes), means(slow(MODEL, TASK, nodes, kind, rows=(1, 2, 0))))


@pytest.mark.parametrize("family", ("gpt2", "llama"))
@pytest.mark.parametrize("kind", KINDS)
def test_ablation_follows_its_definition_on_transformers_models(kind: str, family: str) -> None:
    model = hf(family)
    task = pairs_task(model, (5, 5, 5))
    nodes = all_nodes(model, task, ("q", "k", "z", "mlp_post", "attn_out"), "aligned")
    nodes = nodes[:: len(nodes) // 12]
    found = ablation(model, task, kind=kind, nodes=nodes)
    effects = slow(model, task, nodes, kind, rows=found.settings["reference_rows"] or ())
    tolerance = 1e-5 * bigness(model, task)  # float32 rounding grows with the logits
    torch.testing.assert_close(values(found, nodes), means(effects), rtol=0, atol=tolerance)


def test_zero_of_the_write_is_not_zero_of_z() -> None:
    """The output bias is part of what attention writes, and of no head."""
    found = ablation(MODEL, TASK, kind="zero", sites=("attn_out", "z", "result"), positions="all")
    torch.testing.assert_close(found.signed["z"].values, found.signed["result"].values, **ROUNDING)
    before = MODEL.run(TASK.clean, metric=TASK.metric).metric
    for layer in (0, 1):
        effects = {
            site: (
                MODEL.run(TASK.clean, metric=TASK.metric, edits=[Edit(site, Zero(), layers=[layer])]).metric - before
            )
            for site in ("attn_out", "z")
        }
        mine = found.signed["attn_out"].sel(layer=layer).values
        torch.testing.assert_close(mine, effects["attn_out"].mean(), **ROUNDING)
        with pytest.raises(AssertionError):
            torch.testing.assert_close(mine, effects["z"].mean(), **ROUNDING)


def test_nodes_that_are_what_replaces_them_are_exactly_zero_and_not_run() -> None:
    tokens = [[7, 5, 9, 3], [7, 8, 4, 3], [7, 6, 2, 3]]  # the first token is one, and so is what depends on it alone
    pairs = [{"clean_tokens": t, "corrupt_tokens": [7, 7, 7, 3], "answer": 1, "foil": 2} for t in tokens]
    task = ma.tasks.from_pairs(MODEL, pairs)
    for kind in ("mean", "resample"):
        found = ablation(MODEL, task, kind=kind, sites=("z", "mlp_post"))
        at = [table.sel(pos=0).values for table in found.scores.values()]
        assert all(bool((x == 0).all()) for x in at)
        assert found.settings["n_trivial_zero"] == sum(x.numel() for x in at)
        assert bool((found.scores["z"].sel(pos=[1, 2], layer=0).values > 0).all())
    alone = ablation(MODEL, task.rows([1]), kind="mean")  # its own mean
    assert alone.settings["n_trivial_zero"] == len(alone.nodes()) and alone.passes.forward == 2
    silent = {name: tensor.clone() for name, tensor in MODEL._weights.items()}
    silent["blocks.0.attn.W_V"][0], silent["blocks.0.attn.b_V"][0] = 0, 0
    found = ablation(HookedPlain(MODEL.config, silent), task, kind="zero", sites=("z",))
    assert found.settings["n_trivial_zero"] == 4
    assert bool((found.scores["z"].sel(layer=0, head=0).values == 0).all())


@pytest.mark.parametrize("kind", KINDS)
def test_batches_and_a_journal_change_nothing_and_the_top_can_be_ablated_alone(kind: str, tmp_path: Path) -> None:
    whole = ablation(MODEL, TASK, kind=kind)
    # float64 rounding: other batch shapes add in another order
    assert_same(ablation(MODEL, TASK, kind=kind, batch_size=1), whole, 1e-12)
    journal = tmp_path / "journal"
    whole = ablation(MODEL, TASK, kind=kind, batch_size=8)
    assert_same(ablation(MODEL, TASK, kind=kind, batch_size=8, resume=journal), whole, 0)
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:3]) + lines[3][:5])
    assert_same(ablation(MODEL, TASK, kind=kind, batch_size=8, resume=journal), whole, 0)
    assert journal.read_bytes() == b"".join(lines)
    with pytest.raises(OutputExistsError, match="different: kind"):
        ablation(MODEL, TASK, kind="zero" if kind == "mean" else "mean", batch_size=8, resume=journal)
    top = whole.top(5)
    some = ablation(MODEL, TASK, kind=kind, nodes=top)
    for node in top:
        assert some.value(node, "signed") == pytest.approx(whole.value(node, "signed"), abs=1e-12)
    whole.save(tmp_path / "result")
    assert_same(ma.open(tmp_path / "result"), whole, 0)  # type: ignore[arg-type]
    assert whole.settings["direction"] == "noising" and whole.settings["corrupt_metric"] is None


@pytest.mark.parametrize(("kind", "extra"), (("zero", 0), ("mean", 3), ("resample", 3)))
def test_passes_are_those_that_ran(kind: str, extra: int) -> None:
    model = hf("gpt2")
    task = pairs_task(model)
    ran = 0.0

    def count(module: Any, arguments: Any, output: Tensor) -> None:
        nonlocal ran
        ran += len(output) / 2

    hooks = [block.mlp.register_forward_hook(count) for block in model.model.transformer.h]
    try:
        result = ablation(model, task, kind=kind, sites=("embed", "z", "mlp_out"), batch_size=4)
    finally:
        for hook in hooks:
            hook.remove()
    assert result.passes.forward == pytest.approx(ran, abs=1e-9) and result.passes.backward == 0
    nodes = 5 * (1 + 5 * 1.5)  # an embedding, and a layer's four heads and MLP: the first whole, the second half
    assert result.passes.forward == pytest.approx(3 * (1 + nodes) + extra, abs=1e-9)


@pytest.mark.parametrize(
    ("settings", "kind", "text"),
    (
        ({"kind": "median"}, UnknownNameError, "ablation of kind 'median' | no such kind | "),
        ({"kind": None}, UnknownNameError, "ablation of kind None | no such kind"),
        ({"kind": "resample", "seed": -1}, SettingError, "seed=-1 | no whole number from 0 | give one, such as seed=0"),
        ({"kind": "zero", "reference": TASK}, SettingError, "zeros are taken from no prompt | leave reference out"),
        ({"reference": [1]}, SettingError, "reference | a list | give a task, whose clean prompts are used"),
        (
            {"reference": pairs_task(MODEL, (6, 6))},
            AlignmentError,
            "prompts of 6 tokens, not 5 | give a reference of the same layout",
        ),
        (
            {"sites": "pattern"},
            UnsupportedFeatureError,
            "mean ablation of pattern | keys of different prompts are different tokens | ablate another site",
        ),
        (
            {"sites": "attn_scores", "kind": "zero"},
            UnsupportedFeatureError,
            "zero ablation of attn_scores | queries would attend to the future",
        ),
        (
            {"sites": "ln_final_scale", "kind": "zero"},
            UnsupportedFeatureError,
            "zero ablation of ln_final_scale | the norm would divide by zero | ablate another site",
        ),
        ({"positions": "each"}, UnknownNameError, "positions | 'each' | "),
        ({"batch_size": 0}, SettingError, "batch_size=0 | no number of rows"),
    ),
)
def test_settings_that_cannot_be_used(settings: dict[str, Any], kind: type[MechattrError], text: str) -> None:
    with pytest.raises(kind) as error:
        ablation(MODEL, TASK, **settings)
    assert text in f"{error.value.asked} | {error.value.found} | {error.value.fix}"


def test_tasks_that_cannot_be_used() -> None:
    with pytest.raises(SettingError, match="a task of one pair, which has no other prompt"):
        ablation(MODEL, TASK.rows([0]), kind="resample")
    longer = pairs_task(MODEL, (4, 6))
    with pytest.raises(AlignmentError, match=r"the prompt has 4 tokens in pair 0 and 6 in the one"):
        ablation(MODEL, longer, kind="resample", positions="all")
    with pytest.raises(AlignmentError, match="span 'A' has 2 tokens in pair 0 and 4 in the one"):
        ablation(MODEL, longer, kind="resample", positions="named")
    with pytest.raises(AlignmentError, match="prompts of 4 to 6 tokens"):
        ablation(MODEL, longer, positions="aligned")
    unnamed = replace(TASK, spans=tuple({"END": spans["END"]} for spans in TASK.spans))
    with pytest.raises(AlignmentError, match="no place 'A'"):
        ablation(MODEL, TASK, positions="named", reference=unnamed)
    nothing = torch.zeros(0, dtype=torch.long)
    empty = replace(TASK, clean=TASK.clean.rows(nothing), corrupt=TASK.corrupt.rows(nothing), spans=())
    for settings in ({"task": empty}, {"task": TASK, "reference": empty}):
        with pytest.raises(EmptyTaskError, match="a task without pairs"):
            ablation(MODEL, **settings)
