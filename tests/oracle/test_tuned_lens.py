"""Tuned lenses: untrained they change nothing, gradients are those of autograd, and training brings them nearer."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from prompt_cases import model_of, rows_of

import mechattr as ma
from mechattr.decomposition import tuned_lens
from mechattr.decomposition.tuned_lens import TunedLens, _gradients, _Seen, identity
from mechattr.decomposition.vocabulary import last_stream
from mechattr.errors import MismatchError, SettingError
from mechattr.labelled import Labelled


def texts(name: str, split: str, n: int) -> list[str]:
    task = ma.tasks.make(ma.load("tiny"), name, n=n, seed=0, split=split)
    return ["".join(row) for row in task.clean.strings]


@pytest.mark.parametrize("kind", ("gpt2_like", "llama_like", "gemma2", "bert"))
def test_untrained_it_is_the_logit_lens(kind: str) -> None:
    model = model_of(kind)
    rows = rows_of(model)
    plain, tuned = ma.logit_lens(model, rows), ma.logit_lens(model, rows, tuned=identity(model))
    for name, table in plain.tensors.items():
        torch.testing.assert_close(tuned.tensors[name].values, table.values, rtol=0, atol=0, equal_nan=True)


def test_the_gradients_are_those_of_autograd() -> None:
    """Through the norm and the unembedding of a plain model, written out."""
    model = model_of("gpt2_like")
    rows = rows_of(model)
    run = model.run(rows, record="blocks.0.hook_resid_pre")
    x, log_p = run.activations["blocks.0.hook_resid_pre"].values, run.logits.log_softmax(-1)
    draw = torch.Generator().manual_seed(0)
    width = model.info.d_model
    weight = (0.1 * torch.randn(width, width, generator=draw, dtype=torch.float64)).requires_grad_()
    bias = (0.1 * torch.randn(width, generator=draw, dtype=torch.float64)).requires_grad_()
    seen = _Seen(x, rows.mask, log_p)
    found = _gradients(model, seen, weight.detach(), bias.detach())
    y = model.norm("ln_final")(x + x @ weight.T + bias) @ model.weight("unembed.W_U") + model.weight("unembed.b_U")
    each = (log_p.exp() * (log_p - y.log_softmax(-1))).sum(-1)
    loss = each[rows.mask].mean()
    expected = (loss, *torch.autograd.grad(loss, (weight, bias), retain_graph=True))
    # float64 rounding
    torch.testing.assert_close(found, tuple(part.detach() for part in expected), rtol=0, atol=1e-12)
    padded = torch.autograd.grad(each.mean(), weight)[0]  # wrong: padding counts
    assert not torch.allclose(found[1], padded, atol=1e-6)


def test_training_brings_held_out_predictions_nearer() -> None:
    model = ma.load("tiny")
    before = model.fingerprint()["weight_hash"]
    lens = tuned_lens.fit(
        model, texts("ioi", "train", 96), steps=6, batch_size=16, learning_rate=5e-3, held_out=texts("ioi", "test", 16)
    )
    assert model.fingerprint()["weight_hash"] == before  # the model is frozen
    assert lens.settings["steps"] == 6 and lens.tensors["kl/training"].shape == (6, 4)
    ratio = lens.tensors["kl/after"].values / lens.tensors["kl/before"].values
    assert bool((ratio < 0.9).all())
    prompt = "Then Anna and Paul had a long talk, and Paul handed a ring to"
    plain, tuned = ma.logit_lens(model, prompt), ma.logit_lens(model, prompt, tuned=lens)
    assert tuned.scores["kl"].values[:-1].mean() < plain.scores["kl"].values[:-1].mean()
    assert torch.equal(tuned.scores["kl"].values[-1], plain.scores["kl"].values[-1])  # the last stream has no map
    assert tuned.settings["tuned"]["steps"] == 6 and plain.settings["tuned"] is None  # type: ignore[index, call-overload]


def test_it_is_stored_and_bound_to_its_model(tmp_path: Path) -> None:
    model, other = model_of("gpt2_like"), model_of("llama_like")
    lens = identity(model)
    weight = lens.tensors["weight"]
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    lens = TunedLens(
        {**lens.tensors, "weight": Labelled(noise, weight.axes, weight.explicit_coords)},
        settings=lens.settings,
        provenance=lens.provenance,
    )
    lens.save(tmp_path / "lens")
    again = ma.open(tmp_path / "lens")
    assert type(again) is TunedLens and again.sites == lens.sites
    rows = rows_of(model)
    first, second = (ma.logit_lens(model, rows, tuned=tuned) for tuned in (lens, again))
    assert torch.equal(first.scores["kl"].values.nan_to_num(), second.scores["kl"].values.nan_to_num())
    with pytest.raises(MismatchError, match="whose weights are others\n  fix: train one on this model"):
        ma.logit_lens(other, rows_of(other), tuned=again)
    with pytest.raises(MismatchError, match=r"a tuned lens at blocks.0.hook_resid_mid\n  found: no translator"):
        ma.logit_lens(model, rows, tuned=again, sites="resid_mid")


def test_texts_are_read_as_they_come() -> None:
    model = ma.load("tiny")
    some = texts("ioi", "train", 4)
    cycled = tuned_lens.fit(model, itertools.cycle(some), steps=3, batch_size=2, sites="blocks.1.hook_resid_post")
    assert cycled.sites == ["blocks.1.hook_resid_post"] and cycled.settings["steps"] == 3
    assert tuned_lens.fit(model, iter(some), steps=3, batch_size=3, max_tokens=4).settings["steps"] == 2
    assert bool(cycled.tensors["kl/after"].values.isnan().all())  # there were no held-out texts


def test_wrong_input_is_refused() -> None:
    model = ma.load("tiny")
    with pytest.raises(SettingError, match="texts of a tuned lens\n  found: none"):
        tuned_lens.fit(model, [])
    with pytest.raises(SettingError, match="texts of a tuned lens\n  found: one text"):
        tuned_lens.fit(model, "one text")
    with pytest.raises(SettingError, match="steps=0\n  found: not a count"):
        tuned_lens.fit(model, ["a text"], steps=0)
    with pytest.raises(SettingError, match="learning_rate=0\n  found: not positive"):
        tuned_lens.fit(model, ["a text"], learning_rate=0)
    with pytest.raises(SettingError, match="only the last stream"):
        identity(model, last_stream(model))
