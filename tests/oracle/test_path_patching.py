"""Path patching, against a network spelled out head by head in which writers and readers are replaced one by one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from network_cases import measured, network, prompt
from patching_cases import bigness, exact_effects, hf, pairs_task, plain, repadded, values
from torch import Tensor

from mechattr.errors import EmptyTaskError, SettingError, UnknownNameError
from mechattr.models.edits import Edit
from mechattr.models.operators import Set
from mechattr.patching.edge_patching import edge_patching
from mechattr.patching.path import path_patching
from mechattr.sites import Node
from mechattr.tasks.task import Task

ROUNDING = 1e-11  # float64, logits of order 10, a few dozen additions
LENGTHS = (6, 4, 5)
SENDERS = [Node("z", layer, None, head) for layer in range(2) for head in range(2)]
SENDERS += [Node("mlp_out", layer) for layer in range(2)]
RECEIVERS = [Node("q", 1, None, 0), Node("v", 1, None, 1), Node("mlp_post", 1, neuron=3), Node("mlp_post", 1, neuron=0)]


def name_of(sender: Node) -> str:
    return f"a{sender.layer}.h{sender.head}" if sender.site == "z" else f"m{sender.layer}"


def reader_of(receiver: Node) -> str:
    return (
        f"m{receiver.layer}" if receiver.site == "mlp_post" else f"a{receiver.layer}.h{receiver.head}<{receiver.site}>"
    )


def effects(
    model: Any, task: Task, receivers: Sequence[Node], *, frozen: bool, direction: str = "noising", wrong: str = ""
) -> Tensor:
    """[pair, sender], at all positions; `wrong` names a mistake to make on purpose."""
    found = torch.zeros(len(task), len(SENDERS), dtype=torch.float64)
    mine = {
        reader_of(receiver): [r.neuron for r in receivers if reader_of(r) == reader_of(receiver)]
        for receiver in receivers
    }
    for row in range(len(task)):
        batches = (task.clean, task.corrupt) if direction == "noising" else (task.corrupt, task.clean)
        base_prompt, other_prompt = (prompt(batch, row) for batch in batches)
        scales: dict[str, Tensor] = {}

        def note(reader: str, x: Tensor, scales: Any = scales) -> Tensor:
            return scales.setdefault(reader, x)

        before, base = network(model, base_prompt, scale=note)
        _, other = network(model, other_prompt)
        for j, sender in enumerate(SENDERS):
            held: dict[str, Tensor] = {}

            def write(name: str, out: Tensor, s: str = name_of(sender), b: Any = base, o: Any = other) -> Tensor:
                if name == s:
                    return o[name]
                if name.startswith("a"):
                    return out if wrong == "heads not frozen" else b[name]
                still = frozen != (wrong == "MLPs the other way")
                return b[name] if name.startswith("m") and still else out

            def hold(reader: str, x: Tensor, held: Any = held) -> Tensor:
                held[reader] = x
                return x

            extra = {"scale": note} if wrong == "norm of the base run" else {}
            if wrong == "receivers of the source run":
                network(model, other_prompt, project=hold)
            else:
                network(model, base_prompt, write=write, project=hold, **extra)

            def receive(reader: str, x: Tensor, held: Any = held) -> Tensor:
                if reader not in mine:
                    return x
                out = x.clone()
                for neuron in mine[reader]:
                    out[:, slice(None) if neuron is None else neuron] = held[reader][
                        :, slice(None) if neuron is None else neuron
                    ]
                return out

            logits, _ = network(model, base_prompt, project=receive)
            found[row, j] = measured(task, batches[0], row, logits) - measured(task, batches[0], row, before)
    return found


@pytest.mark.parametrize("kind", ["gpt2_like", "llama_like"])
@pytest.mark.parametrize("mlps", ["recomputed", "frozen"])
@pytest.mark.parametrize("direction", ["noising", "denoising"])
def test_heads_and_neurons_as_receivers(kind: str, mlps: Any, direction: str) -> None:
    model = plain(kind)
    task = pairs_task(model, LENGTHS)
    expected = effects(model, task, RECEIVERS, frozen=mlps == "frozen", direction=direction)
    result = path_patching(model, task, RECEIVERS, senders=SENDERS, mlps=mlps, direction=direction, progress=False)
    score, signed = values(result, SENDERS)
    torch.testing.assert_close(score, expected.abs().mean(0), rtol=0, atol=ROUNDING)
    torch.testing.assert_close(signed, expected.mean(0), rtol=0, atol=ROUNDING)
    assert expected[:, :2].abs().min() > 1e3 * ROUNDING  # the heads of block 0 do something


@pytest.mark.parametrize(
    "wrong", ["heads not frozen", "MLPs the other way", "receivers of the source run", "norm of the base run"]
)
def test_mistakes_are_told_apart(wrong: str) -> None:
    model = plain("gpt2_like")
    task = pairs_task(model, LENGTHS)
    receivers = [Node("mlp_post", 1, neuron=neuron) for neuron in range(5)]
    _, right = values(path_patching(model, task, receivers, senders=SENDERS, progress=False), SENDERS)
    torch.testing.assert_close(right, effects(model, task, receivers, frozen=False).mean(0), rtol=0, atol=ROUNDING)
    mistaken = effects(model, task, receivers, frozen=False, wrong=wrong).mean(0)
    assert (right - mistaken).abs().max() > 1e4 * ROUNDING


def test_logits_with_frozen_mlps_are_the_direct_edges() -> None:
    model = plain("llama_like")
    task = pairs_task(model, LENGTHS)
    result = path_patching(model, task, [Node("resid_post", 1)], mlps="frozen", progress=False)
    edges = edge_patching(model, task, [(name_of(s), "logits") for s in SENDERS], progress=False)
    direct = torch.tensor([edges.value(name_of(s), "logits", "signed") for s in SENDERS], dtype=torch.float64)
    torch.testing.assert_close(values(result, SENDERS)[1], direct, rtol=0, atol=ROUNDING)
    other = path_patching(model, task, [Node("resid_post", 1)], progress=False)
    assert (values(other, SENDERS)[1] - direct).abs().max() > 1e4 * ROUNDING  # wrong: MLPs recomputed


def test_all_direct_readers_are_the_node_in_a_linear_network() -> None:
    model = plain("linear")
    task = pairs_task(model, LENGTHS)
    whole = exact_effects(model, task, SENDERS, positions="all").mean(0)
    parts = torch.zeros(len(SENDERS), dtype=torch.float64)
    mlps = [[Node("mlp_post", layer, neuron=neuron) for neuron in range(5)] for layer in range(2)]
    values_1 = [Node("v", 1, None, head) for head in range(2)]
    for receivers in (mlps[0], values_1, mlps[1], [Node("resid_post", 1)]):
        parts += values(path_patching(model, task, receivers, mlps="frozen", progress=False), SENDERS)[1]
    torch.testing.assert_close(parts, whole, rtol=0, atol=ROUNDING)


def test_a_z_receiver_is_what_its_changed_inputs_give() -> None:
    model = plain("gpt2_like")
    task = pairs_task(model, (5,))
    sender = Node("mlp_out", 0)
    inputs = [Node(site, 1, None, 0) for site in ("q", "k", "v")]
    through = [
        path_patching(model, task, to, senders=[sender], progress=False) for to in ([Node("z", 1, None, 0)], inputs)
    ]
    found = [result.value(sender, "signed") for result in through]
    assert found[0] == pytest.approx(found[1], abs=ROUNDING)
    assert abs(found[0]) > 1e3 * ROUNDING


@pytest.mark.parametrize("positions", ["aligned", "named"])
def test_positions_of_senders_and_receivers(positions: Any) -> None:
    """Against two runs with `Set` at the named columns."""
    model = plain("gpt2_like")
    task = pairs_task(model, (5,))
    sender = Node("z", 0, 2 if positions == "aligned" else "A", 1)
    columns = [2] if positions == "aligned" else list(range(1, 4))
    receiver = Node("k", 1, 2, 0)
    result = path_patching(model, task, [receiver], senders=[sender], progress=False)
    names = ["blocks.0.attn.hook_z", "blocks.1.attn.hook_z"]
    base = model.run(task.clean, record=names, metric=task.metric)
    other = model.run(task.corrupt, record=names)
    edits = [Edit(name, Set(base.activations)) for name in names]
    edits.append(Edit(names[0], Set(other.activations), positions=columns, heads=[1]))
    site = "blocks.1.attn.hook_rot_k"
    seen = model.run(task.clean, record=[site], edits=edits).activations
    last = model.run(task.clean, edits=[Edit(site, Set(seen), positions=[2], heads=[0])], metric=task.metric)
    assert result.value(sender, "signed") == pytest.approx((last.metric - base.metric).item(), abs=ROUNDING)
    everywhere = model.run(task.clean, edits=[Edit(site, Set(seen), heads=[0])], metric=task.metric)  # wrong
    assert positions == "aligned" or (everywhere.metric - last.metric).abs() > 1e4 * ROUNDING


def test_senders_above_the_receivers_do_nothing() -> None:
    model = hf("gpt_neox")  # attention and MLP of a block side by side
    task = pairs_task(model, LENGTHS)
    below = [Node("z", 0, None, head) for head in range(4)]
    rest = [*(Node("z", 1, None, head) for head in range(4)), Node("mlp_out", 0), Node("mlp_out", 1)]
    receivers = [Node("mlp_post", 0, neuron=neuron) for neuron in range(40)]
    result = path_patching(model, task, receivers, progress=False)
    assert values(result, [*below, *rest])[0].tolist() == [0.0] * 10
    assert result.passes.forward == 6
    sequential = path_patching(hf("gpt2"), task, [Node("mlp_post", 0, neuron=1)], progress=False)
    score = values(sequential, below)[0]
    assert float(score.min()) > 0 and values(sequential, rest)[0].tolist() == [0.0] * 6


@pytest.mark.parametrize("family", ["gpt2", "qwen3", "gemma2"])
def test_families(family: str) -> None:
    """A head of the last block to the stream after it, with MLPs recomputed: its whole effect."""
    model = hf(family)
    task = pairs_task(model, LENGTHS)
    sender = Node("z", 1, None, 2)
    result = path_patching(model, task, [Node("resid_post", 1)], senders=[sender], progress=False)
    whole = exact_effects(model, task, [sender], positions="all").mean().item()
    assert result.value(sender, "signed") == pytest.approx(whole, abs=1e-5 * bigness(model, task))
    assert abs(whole) > 1e-4 * bigness(model, task)


def test_cost_batches_padding_and_a_journal(tmp_path: Any) -> None:
    model = plain("llama_like")
    task = pairs_task(model, LENGTHS)
    whole = path_patching(model, task, RECEIVERS, progress=False)
    runs = {0: 4 + 1, 1: 4}  # heads and MLP of block 0, heads of block 1 below its MLP
    assert whole.passes == (3 * (2 + runs[0] * (1 + 0.5) + runs[1] * (0.5 + 0.5)), 0)
    how: dict[str, Any] = {"progress": False, "batch_size": 3}
    for side in ("left", "right"):
        padded = path_patching(model, repadded(task, side), RECEIVERS, **how)
        for name, table in whole.tensors.items():
            torch.testing.assert_close(padded.tensors[name].values, table.values, rtol=0, atol=ROUNDING)
    journal = tmp_path / "journal"
    first = path_patching(model, task, RECEIVERS, resume=journal, **how)
    journal.write_bytes(b"".join(journal.read_bytes().splitlines(keepends=True)[:2]))
    again = path_patching(model, task, RECEIVERS, resume=journal, **how)
    assert all(torch.equal(again.tensors[n].values, first.tensors[n].values) for n in first.tensors)


def test_equal_prompts_give_exact_zeros() -> None:
    model = plain("gpt2_like")
    result = path_patching(model, pairs_task(model, changed=()), RECEIVERS, progress=False)
    assert all(bool((table.values == 0).all()) for table in result.tensors.values())
    assert result.passes == (6, 0)


def test_bad_input() -> None:
    model = plain("gpt2_like")
    task = pairs_task(model)
    with pytest.raises(SettingError, match="send from heads"):
        path_patching(model, task, RECEIVERS, senders=[Node("q", 0, None, 0)])
    with pytest.raises(UnknownNameError, match="did you mean 'frozen'"):
        path_patching(model, task, RECEIVERS, mlps="froze")  # type: ignore[arg-type]
    with pytest.raises(EmptyTaskError, match="path patching\n  found: an empty list of receivers"):
        path_patching(model, task, [])
    with pytest.raises(SettingError, match="found: a NoneType"):
        path_patching(model, task, None)  # type: ignore[arg-type]


def test_one_receiver_is_a_list_of_one() -> None:
    model = plain("gpt2_like")
    task = pairs_task(model)
    one = path_patching(model, task, RECEIVERS[0], senders=SENDERS[0])  # type: ignore[arg-type]
    assert one.settings["receivers"] == [str(RECEIVERS[0])]
    listed = path_patching(model, task, RECEIVERS[:1], senders=SENDERS[:1])
    assert one.value(SENDERS[0]) == listed.value(SENDERS[0]) != 0


@pytest.mark.parametrize("family", ["gpt_neox", "phi", "gpt2"])
def test_a_head_reaches_the_attention_output_of_its_own_block(family: str) -> None:
    """Also in a parallel block, where it does not reach the MLP."""
    model = hf(family)
    task, head = pairs_task(model), Node("z", 1, head=0)
    through = path_patching(model, task, [Node("attn_out", 1)], senders=[head]).value(head, "signed")
    whole = exact_effects(model, task, [head], positions="all").mean().item()
    assert abs(whole) > 1e-3  # or a path that is left out would pass
    assert through == pytest.approx(whole, abs=1e-5)  # float32, one sum of another order
    beside = path_patching(model, task, [Node("mlp_pre", 1, neuron=0)], senders=[head]).value(head)
    assert (beside == 0) == model.info.parallel
