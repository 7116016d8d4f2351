"""Runs of the nnsight backend, in this process and through its dry run of a server, are those of the reference."""

from __future__ import annotations

import families
import pytest
import torch
from backends import backend_model, traced
from patching_cases import hf, pairs_task
from test_models_gradients import TOLERANCE, disagreements
from torch import Tensor

import mechattr as ma
from mechattr.errors import UnsupportedModelError
from mechattr.models import Ablate, Add, Batch, Edit, Mean, Resample, Rules, Scale, Set, Start, Zero, nnsight_body
from mechattr.models.families import FAMILIES as ROWS
from mechattr.sites import parse

FAMILIES = ("gpt2", "llama", "qwen3", "gpt_neox", "gemma2")
CLOSE = 1e-5  # float32 rounding, in units of the largest number
BACKENDS = pytest.mark.parametrize(
    "kind", [f"{place}{family}" for place in ("nnsight-", "nnsight-local-") for family in FAMILIES]
)
PLACES = pytest.mark.parametrize("place", ["nnsight-", "nnsight-local-"])


def reference(kind: str):
    """The reference of a kind such as `"nnsight-local-llama"`, or of a family."""
    return families.hooked(kind.removeprefix("nnsight-").removeprefix("local-"))


def assert_close(found, expected) -> None:
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        size = max(1.0, float(x.values[x.values > -1e30].abs().max()))  # masked scores are the smallest number
        assert float((found[name].values - x.values).abs().max()) <= CLOSE * size, name


def assert_same(model, kind: str, batch: Batch, **arguments) -> None:
    """The same logits, activations, gradients and metric as the reference."""
    expected, found = reference(kind).run(batch, **arguments), model.run(batch, **arguments)
    torch.testing.assert_close(found.logits[batch.mask], expected.logits[batch.mask], rtol=0, atol=CLOSE)
    assert_close(found.activations, expected.activations)
    assert_close(found.gradients, expected.gradients)
    assert (found.metric is None) == (expected.metric is None)
    if expected.metric is not None:
        torch.testing.assert_close(found.metric, expected.metric, rtol=CLOSE, atol=CLOSE)


@BACKENDS
@pytest.mark.parametrize("side", ["left", "right"])
def test_every_site_and_every_gradient_is_that_of_the_reference(kind, side):
    model = backend_model(kind)
    assert model.sites() == reference(kind).sites()
    assert_same(
        model, kind, families.ragged(side), record=model.sites(), metric=families.probe, gradients=model.sites()
    )


# slow: one of each shape of block says what the others say
OTHERS = [
    name if name in families.SHAPES else pytest.param(name, marks=pytest.mark.slow)
    for name in families.EVERY
    if name not in FAMILIES
]
ABSENT = {"router_logits", "expert_out"}


def refusal(family: str) -> str:
    """Why the backend refuses a family; empty where it does not."""
    row = ROWS[families.configs()[family].model_type]
    reasons = {
        "what its encoder reads has no way in": row.source is not None,
        "images have no way in": row.language is not None,
        "its attention does not go through transformers' attention interface": row.adapter is not None,
        "it multiplies what blocks write after the modules that write it": row.multiplied,
        "its softmax has attention sinks": family == "gpt_oss",
    }
    return next((reason for reason, here in reasons.items() if here), "")


@pytest.mark.parametrize("family", OTHERS)
def test_every_other_family_is_that_of_the_reference_or_refused(family):
    if reason := refusal(family):
        with pytest.raises(UnsupportedModelError, match=f"nnsight backend\n  found: {reason}\n  fix: use"):
            traced(family)
        return
    model, every = traced(family), families.hooked(family).sites()
    assert model.sites() == tuple(name for name in every if parse(name)[0] not in ABSENT)
    sites = model.sites()
    assert_same(model, family, families.ragged("left"), record=sites, metric=families.probe, gradients=sites)


def edits(batch: Batch) -> dict[str, Edit]:
    """Every operator, and a function, with every kind of selection."""
    elsewhere = families.hooked("llama").run(Batch.of(families.tokens(3, 7, 5)), record=("resid_mid", "mlp_post", "k"))
    source, generator = elsewhere.activations, torch.Generator().manual_seed(1)
    return {
        "zero": Edit("z", Zero(), layers=[0], heads=[1], positions=[-1, 0]),
        "set": Edit("resid_mid", Set(source), rows=[0, 2]),
        "mean": Edit("mlp_post", Mean(source), neurons=[0, 3]),
        "resample": Edit("k", Resample(source, [2, 1, 0]), positions=[1]),
        "scale": Edit("pattern", Scale(torch.tensor(0.5)), positions=[2]),
        "add": Edit("embed", Add(torch.randn(24, generator=generator))),
        "ablate": Edit("resid_post", Ablate(torch.randn(24, generator=generator)), layers=[0]),
        "scores": Edit("attn_scores", Scale(0.5), heads=[0]),
        "norm": Edit("ln1_scale", Scale(2.0)),
        "result": Edit("result", Zero(), heads=[2], positions=[-1]),
        "function": Edit("rot_q", lambda x, place: x.flip(1) * len(place.shape), rows=[1]),
    }


@PLACES
@pytest.mark.parametrize("name", edits(families.ragged()))
def test_every_edit_does_what_it_does_in_the_reference(place, name):
    batch = families.ragged("left")
    edit, model = edits(batch)[name], backend_model(place + "llama")
    sites = ("v", edit.site)
    assert_same(model, "llama", batch, edits=[edit], record=sites, metric=families.probe, gradients=sites)
    moved = model.run(batch, edits=[edit]).logits - model.run(batch).logits
    assert moved[batch.mask].abs().max() > 0.1  # the control: without the edit the numbers differ


@BACKENDS
def test_edits_add_up_in_every_family(kind):
    batch = families.ragged("left")
    chosen = [edit for name, edit in edits(batch).items() if name in ("zero", "scale", "add", "ablate", "norm")]
    model = backend_model(kind)
    assert_same(model, kind, batch, edits=chosen, record="resid_post", metric=families.probe, gradients="z")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_other_dtypes_and_padding_without_any_visible_key(dtype):
    """In float64 a softmax in float32 makes NaN of rows that see nothing, unless their mask is mended."""
    batch, sites = families.ragged("left"), ("pattern", "z", "ln1_scale", "resid_post")
    models = families.hooked("llama", dtype), traced("llama", dtype)
    expected, found = (model.run(batch, record=sites) for model in models)
    assert found.logits.dtype == dtype and bool(found.logits.isfinite().all())
    assert torch.equal(found.logits, expected.logits)
    assert all(torch.equal(found.activations[name].values, x.values) for name, x in expected.activations.items())


@PLACES
def test_runs_from_the_middle_and_held_writes(place):
    model, batch = backend_model(place + "llama"), families.ragged("left")
    start = Start(1, torch.randn(3, 7, 24, generator=torch.Generator().manual_seed(0)))
    sites = ("blocks.1.hook_resid_pre", "blocks.1.attn.hook_z", "ln_final")
    assert_same(model, "llama", batch, start=start, record=sites, metric=families.probe, gradients=sites)
    for family in ("gpt2", "opt", "bert"):  # with a position embedding, and as an encoder
        assert_same(backend_model(place + family), family, batch, start=start, record="blocks.1.hook_resid_post")
    assert_same(model, "llama", batch, rules=Rules(hold={0}), metric=families.probe, gradients=("embed", "z"))


@PLACES
@pytest.mark.parametrize("seen", [False, True])
def test_passes_from_given_gradients_are_those_of_the_reference(place, seen):
    batch, results = families.ragged("right"), []
    for model in (families.hooked("llama"), backend_model(place + "llama")):
        tape = model.tape(batch, metric=families.probe, gradients=("v", "z", "resid_post"), record="pattern")
        first: dict[str, Tensor] = {}
        second: dict[str, Tensor] = {}
        if seen:
            tape.pull_back(lambda n, x, g, kept=first: kept.__setitem__(n, g.clone()))
        at = {"blocks.0.hook_resid_post": torch.ones(3, 7, 24), "blocks.1.attn.hook_z": torch.ones(3, 7, 4, 6)}
        tape.pull_back(lambda n, x, g, kept=second: kept.__setitem__(n, g.clone()), at, last=True)
        results.append((first, second))
    for expected, found in zip(*results, strict=True):
        assert list(found) == list(expected)
        for name, g in expected.items():
            torch.testing.assert_close(found[name], g, rtol=CLOSE, atol=CLOSE)


@PLACES
@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_it_generates_the_tokens_of_the_reference(place, family):
    batch, settings = families.ragged("left"), {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    added = Add(4 * torch.randn(24, generator=torch.Generator().manual_seed(1)))
    found = []
    named = Edit("resid_post", added, positions="generated"), Edit("attn_out", added, positions=[1, -1, 8])
    for edit in ([], [named[0]], [named[1]]):
        expected = families.hooked(family).generate(batch, edits=edit, **settings).tokens
        assert torch.equal(backend_model(place + family).generate(batch, edits=edit, **settings).tokens, expected)
        found.append(expected)
    assert not torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_rows_end_where_the_reference_ends_them():
    batch, settings = families.ragged("left"), {"max_new_tokens": 6, "do_sample": False}
    model = families.hooked("llama")
    free = model.generate(batch, eos_token_id=None, **settings).tokens
    ends = int(free[1, -4])  # row 1 is over in the middle
    expected = model.generate(batch, eos_token_id=ends, **settings).tokens
    assert not torch.equal(expected, free)
    assert torch.equal(backend_model("nnsight-llama").generate(batch, eos_token_id=ends, **settings).tokens, expected)


@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
def test_finite_differences_agree_with_the_gradient_at_every_site(family):
    with families.widened():
        found = disagreements(traced(family, torch.float64), Batch.of(families.tokens(2, 6)))
    assert max(found.values()) < TOLERANCE, {name: e for name, e in found.items() if e >= TOLERANCE}


def test_control_the_gradient_of_a_shared_tensor_fails(monkeypatch):
    monkeypatch.setattr(nnsight_body, "node", lambda x: x if x.requires_grad else x.detach().requires_grad_(True))
    with families.widened():
        found = disagreements(traced("llama", torch.float64), Batch.of(families.tokens(2, 6)))
    assert max(found.values()) > 0.1


@PLACES
def test_scores_that_are_made_inside_the_trace_are_those_of_the_method(place):
    model = backend_model(place + "gpt2")
    task = pairs_task(model)
    source = {name: x.values for name, x in model.run(task.corrupt, record="z").activations.items()}

    def heads(activations, gradients):
        return {name: ((source[name] - x) * gradients[name]).sum((1, 3)) for name, x in activations.items()}

    found = model.run_reduced(task.clean, heads, record="z", gradients="z", metric=task.metric)
    expected = ma.attribution_patching(hf("gpt2"), task, sites="z", variant="atp", positions="all")
    mine = torch.stack([found[name].mean(0) for name in sorted(found)])
    torch.testing.assert_close(mine, expected.signed["z"].values, rtol=CLOSE, atol=CLOSE)
    assert {tuple(x.shape) for x in found.values()} == {(3, 4)}  # a number for each pair and head has travelled
