"""Erasure probes on models whose states say exactly which tokens stood there, and against plain autograd."""

from __future__ import annotations

import lzma
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from letters_model import Letters, V, copying, texts
from patching_cases import plain

import mechattr as ma
from mechattr.engines.linear_probes import cross_entropy_gradient, ranks
from mechattr.erasure import Closed, Descent, ErasureProbes, fit_probes, pieces, read_texts
from mechattr.erasure.documents import aligned, check_layers, documents, encoded, site_of
from mechattr.erasure.training import Training
from mechattr.erasure.work import Work
from mechattr.errors import MismatchError, SettingError
from mechattr.models.plain import plain_model
from mechattr.models.plain_config import PlainConfig


def accuracy(probes: ErasureProbes, model: Any, rows: list[str], layer: int, offset: int) -> float:
    right = total = 0
    for document in documents(model, encoded(model, rows), [layer]):
        states, labels = aligned(document, offset, first=False)
        weights = probes.weights(layer, offset)[None]
        right += int((ranks(weights, states.to(weights.dtype), labels[None]) == 0).sum())
        total += len(labels)
    return right / total


@pytest.mark.parametrize("recipe", [Closed(), Descent(rate=0.1, epochs=3)], ids=["closed", "descent"])
def test_probes_read_what_the_states_hold_and_nothing_else(recipe: Any) -> None:
    model = copying()
    probes = fit_probes(model, texts(), recipe=recipe, offsets=(-2, -1, 0), seed=1)
    assert probes.layers == (-1, 0) and probes.offsets == (-2, -1, 0)
    fresh = texts(seed=9)
    for layer, offset, known in ((-1, 0, True), (-1, -1, False), (0, 0, True), (0, -1, True), (0, -2, False)):
        found = accuracy(probes, model, fresh, layer, offset)
        assert found == 1.0 if known else found < 0.4, (layer, offset)  # chance is 1 in 11


def test_all_probes_together_are_each_alone() -> None:
    model, some = plain("gpt2_like"), texts(12)
    model = plain_model(replace(model.config, d_vocab=V), tokenizer=Letters())
    for recipe in (Closed(), Descent(epochs=2, documents=4)):
        together = fit_probes(model, some, recipe=recipe)
        alone = fit_probes(model, some, recipe=recipe, layers=[1], offsets=[-2])
        # float32 descent: sums in another order
        torch.testing.assert_close(together.weights(1, -2), alone.weights(1, -2), rtol=1e-4, atol=1e-5)
        singly = fit_probes(model, some, recipe=recipe, batch_size=1)
        torch.testing.assert_close(together.weights(0, 1), singly.weights(0, 1), rtol=1e-4, atol=1e-5)


def test_probes_in_closed_form_are_their_normal_equations_made_sharp() -> None:
    model, some = copying(), texts(30)
    probes = fit_probes(model, some, recipe=Closed(alpha=0.1), layers=[0], offsets=[-1], held_out=0.0)
    parts = [aligned(document, -1) for document in documents(model, encoded(model, some), [0])]
    h, y = torch.cat([states[0] for states, _ in parts]), torch.cat([labels for _, labels in parts])
    gram = h.mT @ h
    penalty = 0.1 * gram.diagonal().mean() * torch.eye(len(gram), dtype=h.dtype)
    weights = torch.linalg.solve(gram + penalty, h.mT @ torch.nn.functional.one_hot(y, V).to(h)).mT
    found = probes.weights(0, -1).double()
    factor = float((found * weights).sum() / weights.square().sum())
    torch.testing.assert_close(found, weights * round(factor), rtol=1e-5, atol=1e-5)  # probes are stored in float32
    assert round(factor) in [4**power for power in range(1, 7)]

    def loss(scale: float) -> float:
        return float(torch.nn.functional.cross_entropy(h @ (found * scale).mT, y))

    assert loss(1.0) <= min(loss(0.25), loss(4.0)) + 0.05 and loss(1.0) < 0.5 * loss(1 / factor)


def test_descent_follows_autograd() -> None:
    """Three steps of AdamW on one document each, written out with autograd."""
    model = plain_model(PlainConfig.gpt2_like(d_vocab=V), tokenizer=Letters())
    recipe = Descent(rate=0.05, decay=0.01, documents=1, epochs=1, warmup=2, clip=0.5, scaled=False)
    found = fit_probes(model, texts(3), recipe=recipe, layers=[0], offsets=[-1], held_out=0.0)

    def by_hand(clip: float) -> torch.Tensor:
        w = torch.zeros(V, model.info.d_model, requires_grad=True)
        optimiser = torch.optim.AdamW([w], lr=0.05, weight_decay=0.01)
        order = [0, 1, 2]
        random.Random("0 0").shuffle(order)
        for step, i in enumerate(order, 1):
            (document,) = documents(model, encoded(model, texts(3))[i : i + 1], [0])
            states, labels = aligned(document, -1)
            loss = torch.nn.functional.cross_entropy(states[0].float() @ w.T, labels)
            (w.grad,) = torch.autograd.grad(loss, w)
            w.grad *= min(1.0, clip / float(w.grad.norm()))
            optimiser.param_groups[0]["lr"] = 0.05 * min(1.0, step / 2)
            optimiser.step()
        return w.detach()

    close = {"rtol": 1e-4, "atol": 1e-5}  # float32 sums in another order, through the sign-like steps of Adam
    torch.testing.assert_close(found.weights(0, -1), by_hand(0.5), **close)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(found.weights(0, -1), by_hand(1e-4), **close)


def test_interrupted_training_goes_on_to_the_same_probes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, file = copying(), tmp_path / "state.safetensors"
    recipe = Descent(epochs=3, patience=1)
    whole = fit_probes(model, texts(12), recipe=recipe)
    fit_probes(model, texts(12), recipe=replace(recipe, epochs=2), resume=file)
    resumed = fit_probes(model, texts(12), recipe=recipe, resume=file)
    for name, table in whole.tensors.items():
        torch.testing.assert_close(resumed.tensors[name].values, table.values, rtol=0, atol=0)  # the same bits
    assert resumed.settings["losses"] == whole.settings["losses"]
    waiting = Descent(epochs=3, documents=7, flush=False)  # documents that wait for a step are kept as well
    begun = tmp_path / "begun.safetensors"
    fit_probes(model, texts(12), recipe=replace(waiting, epochs=1), resume=begun)
    again, once = (fit_probes(model, texts(12), recipe=waiting, resume=place) for place in (begun, None))
    torch.testing.assert_close(again.weights(0, 0), once.weights(0, 0), rtol=0, atol=0)  # the same bits
    with pytest.raises(MismatchError, match="other texts, layers, offsets, settings or another model"):
        fit_probes(model, texts(13), recipe=recipe, resume=file)


def test_documents_that_are_too_few_for_a_step_wait_or_make_one() -> None:
    """10 documents at 7 a step over 3 epochs: 4 whole steps, or 2 steps an epoch."""
    model, recipe = copying(), Descent(epochs=3, documents=7, flush=False)
    rows = [row for row in encoded(model, texts(10)) if row]
    steps = []
    for flush in (False, True):
        work = Work(model, rows, (0,), (0,), held_out=0.0, seed=0, batch_size=4, progress=False)
        state = Training.begin(work, replace(recipe, flush=flush), None)
        for _ in range(3):
            for number, document in enumerate(work.documents(work.train, ""), 1):
                states, labels, kept = work.stacked(document)
                cross_entropy_gradient(state.weights, states.float(), labels, kept.float(), into=state.gradient)
                state.waiting += 1
                if state.waiting == 7 or (flush and number == 10):
                    state.step()
        steps.append(state.steps)
    assert steps == [4, 6] and Descent.reference().flush is False


def test_probes_are_stored_with_what_made_them(tmp_path: Path) -> None:
    model = copying()
    probes = fit_probes(model, texts(10), recipe=Closed(), layers=[0])
    probes.save(tmp_path / "probes")
    again = ma.open(tmp_path / "probes")
    assert isinstance(again, ErasureProbes) and again.settings == probes.settings
    assert again.provenance["weight_hash"] == model.fingerprint()["weight_hash"]
    assert tuple(probes.to_pandas().columns) == ("layer", "offset", "epoch", "train", "held_out")


def test_layers_are_embedding_blocks_and_final_norm() -> None:
    normed, bare = plain("gpt2_like"), copying()
    assert check_layers(normed, None) == (-1, 0, 1, 2) and check_layers(bare, None) == (-1, 0)
    assert [site_of(normed, n) for n in (-1, 1, 2)] == [
        "hook_embed",
        "blocks.1.hook_resid_post",
        "ln_final.hook_out",
    ]
    with pytest.raises(SettingError, match=r"layers=\(5,\)\n  found: layers -1 to 2\n  fix: .*2 \(final norm\)"):
        check_layers(normed, [5])


def test_documents_shorter_than_an_offset_do_not_count() -> None:
    model = copying()
    (short,) = documents(model, [[3]], [0])
    for offset in (-1, 1):
        assert aligned(short, offset)[1].numel() == 0
    assert aligned(short, 0)[1].tolist() == [3] and aligned(short, 0, first=False)[1].numel() == 0
    with pytest.raises(SettingError, match="a probe of offset -3\n  found: the longest document to train on has 3"):
        fit_probes(model, ["ab", "a"], held_out=0.0)
    with pytest.warns(UserWarning, match="one document: nothing is held out"):
        one = fit_probes(model, ["abcdef"], recipe=Closed())
    fit_probes(model, ["abcdef"], recipe=Closed(), held_out=0.0)  # nothing was asked to be held out: no warning
    assert one.settings["n_documents"] == {"train": 1, "held_out": 0}
    assert {row["held_out"] for row in one.settings["losses"]} == {None}


def test_a_first_token_that_is_always_the_same_is_not_learned_at_offset_zero() -> None:
    model = copying()
    rows = encoded(model, texts(5))
    work = Work(model, rows, (0,), (0, -1), held_out=0.0, seed=0, batch_size=4, progress=False)
    (document, *_) = documents(model, rows, [0])
    _, labels, kept = work.stacked(document)
    assert kept[0, 0] == 0 and kept[0, 1:].all() and labels[0, 1:].tolist() == rows[0][1:]
    assert kept[1].tolist() == kept[0].tolist() and labels[1, 1:].tolist() == rows[0][:-1]


def test_wrong_input_is_refused(tmp_path: Path) -> None:
    model = copying()
    cases: list[tuple[Any, dict[str, Any], str]] = [
        ("abc", {}, "texts\n  found: a str"),
        ([], {}, "none with a token"),
        (["abcd"], {"offsets": ()}, r"offsets=\(\)"),
        (["abcd"], {"held_out": 1.0}, "held_out=1.0"),
        (["abcd"], {"recipe": "adam"}, "recipe='adam'"),
        (["abcd"], {"window": 0}, "window=0"),
    ]
    for given, settings, text in cases:
        with pytest.raises(SettingError, match=text):
            fit_probes(model, given, **settings)
    with pytest.raises(SettingError, match="rate=-1"):
        Descent(rate=-1)
    probes = fit_probes(model, texts(5), recipe=Closed(), layers=[0], offsets=[0])
    with pytest.raises(SettingError, match=r"the probe of layer 3\n  found: probes of layers \(0,\)"):
        probes.weights(3, 0)
    with pytest.raises(SettingError, match="the probe of offset -2"):
        probes.weights(0, -2)
    file = tmp_path / "latin.txt"
    file.write_bytes(b"one\ntwo\nca\xe9\n")
    with pytest.raises(SettingError, match=r"line 3 of latin\.txt as UTF-8"):
        read_texts(file)
    file.write_text("a b\n\nc\n")
    assert read_texts(file) == ["a b", "c"]
    file.write_text("a\nb\n<|endoftext|>\nc\n")
    assert read_texts(file) == ["a\nb", "c"]
    packed = tmp_path / "packed.txt.xz"
    packed.write_bytes(lzma.compress(file.read_bytes()))
    assert read_texts(packed) == ["a\nb", "c"]
    assert pieces(["aa\n\nbb\n\ncc", "d"], characters=4) == ["aa\n\nbb", "cc", "d"]
    with pytest.raises(SettingError, match="characters=0"):
        pieces(["a"], characters=0)
