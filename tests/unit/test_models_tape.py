"""Tapes: one forward pass, several backward passes, from the metric or from given gradients."""

from __future__ import annotations

import gc
import weakref

import families
import pytest
import torch
from torch import Tensor

from mechattr.errors import ModelStateError, SettingError, UnknownNameError, UnsupportedFeatureError
from mechattr.models import Batch, Edit, PlainConfig, Rules, Set, plain_model
from mechattr.sites import parse

MODELS = {
    "plain": lambda: plain_model(PlainConfig.llama_like(n_layers=3, d_vocab=61)),
    "llama": lambda: families.hooked("llama"),
    "gpt_neox": lambda: families.hooked("gpt_neox"),
    "bert": lambda: families.hooked("bert"),
}
every_model = pytest.mark.parametrize("model", [MODELS[name] for name in MODELS], ids=list(MODELS))
SITES = ("q", "v", "z", "mlp_pre", "resid_pre", "resid_post")


def collect(tape, at=None, *, last=False) -> dict[str, Tensor]:
    """The gradients of one backward pass."""
    found: dict[str, Tensor] = {}
    tape.pull_back(lambda name, x, g: found.__setitem__(name, g.clone()), at, last=last)
    return found


def layer_of(name: str) -> int:
    return parse(name)[1]


# -- passes from the metric


@every_model
@pytest.mark.parametrize("rules", [None, Rules.relp(), Rules(hold={0})])
def test_a_pass_from_the_metric_is_that_of_a_run(model, rules):
    model, batch = model(), families.ragged("left")
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    arguments = {"record": "z", "metric": families.probe, "gradients": SITES, "rules": rules}
    run = model.run(batch, visit=lambda name, x, g: seen.__setitem__(name, (x, g)), **arguments)
    tape = model.tape(batch, **arguments)
    assert torch.equal(tape.logits, run.logits)
    assert torch.equal(tape.metric, run.metric)
    assert not tape.metric.requires_grad
    assert {n: x.shape for n, x in tape.activations.items()} == {n: x.shape for n, x in run.activations.items()}
    visited: dict[str, tuple[Tensor, Tensor]] = {}
    tape.pull_back(lambda name, x, g: visited.__setitem__(name, (x, g)))
    assert visited.keys() == seen.keys()
    for name, (x, g) in seen.items():
        assert torch.equal(visited[name][0], x), name
        assert torch.equal(visited[name][1], g), name
        assert not visited[name][0].requires_grad
    again = collect(tape, last=True)
    assert all(torch.equal(again[name], g) for name, (_, g) in seen.items())


def test_sites_without_influence_are_not_visited():
    model, batch = plain_model(PlainConfig()), Batch.of(torch.tensor([[1, 2]]))
    cut = Edit("resid_post", Set(torch.ones(16)), layers=[1])  # nothing of any block is left
    assert collect(model.tape(batch, edits=[cut], metric=families.probe, gradients="z")) == {}


@pytest.mark.parametrize(
    "metric",
    (
        lambda out, b: torch.ones(len(b)),
        lambda out, b: out[:, -1].argmax(-1),
        lambda out, b: out[:, -1, 0].detach(),
    ),
)
def test_a_metric_that_cannot_be_differentiated_is_refused(metric):
    """Zeros would look like a result."""
    model, batch = plain_model(PlainConfig()), Batch.of(torch.tensor([[1, 2]]))
    with pytest.raises(SettingError, match="the gradient of a metric\n  found: it does not follow from the logits by"):
        model.tape(batch, metric=metric, gradients="z")
    assert model.run(batch, metric=metric).metric.shape == (1,)


# -- passes from given gradients


def captured(model, batch: Batch, names: tuple[str, str], cotangent: Tensor) -> Tensor:
    """The vector-Jacobian product between two sites, by autograd on the tensors themselves and without a tape."""
    kept: dict[str, Tensor] = {}
    found: list[Tensor] = []

    def keep(name: str) -> Edit:
        return Edit(name, lambda x, place: kept.setdefault(name, x))

    def metric(logits: Tensor, b: Batch) -> Tensor:
        low, high = (kept[name] for name in names)
        found.extend(torch.autograd.grad(high, low, cotangent, retain_graph=True))
        return families.probe(logits, b)

    model.run(batch, edits=[keep(name) for name in names], metric=metric, gradients="embed")
    return found[0]


PAIRS = [
    ("blocks.0.hook_resid_pre", "blocks.1.hook_resid_post"),
    ("blocks.0.attn.hook_v", "blocks.2.mlp.hook_pre"),
    ("blocks.1.hook_resid_pre", "blocks.1.attn.hook_q"),
]


@pytest.mark.parametrize("names", PAIRS, ids=[f"{low} {high}" for low, high in PAIRS])
def test_pulls_are_vector_jacobian_products(names):
    model, batch = MODELS["plain"](), families.ragged("left")
    tape = model.tape(batch, metric=families.probe, gradients=names)
    cotangents = [torch.randn_like(collect(tape)[names[1]]) for _ in range(2)]
    for cotangent in cotangents:
        found = collect(tape, {names[1]: cotangent})
        assert set(found) == set(names)
        assert torch.equal(found[names[1]], cotangent)  # the root is handed over as well
        wanted = captured(model, batch, names, cotangent)
        torch.testing.assert_close(found[names[0]], wanted, rtol=0, atol=1e-10)  # float64
    wrong = captured(model, batch, names, cotangents[0])  # control: the other cotangent
    assert (wrong - found[names[0]]).abs().max() > 1e-3
    both = collect(tape, {names[1]: sum(cotangents)})[names[0]]
    torch.testing.assert_close(both, wrong + found[names[0]], rtol=0, atol=1e-10)  # linear


def test_pulls_of_two_roots_add_up():
    model, batch = MODELS["plain"](), Batch.of(families.tokens())
    low, high, other = "blocks.0.hook_resid_pre", "blocks.1.hook_resid_pre", "blocks.2.attn.hook_q"
    tape = model.tape(batch, metric=families.probe, gradients=(low, high, other))
    first, second = ({name: torch.randn_like(x)} for name, x in collect(tape).items() if name != low)
    together, one, two = (collect(tape, at) for at in (first | second, first, second))
    for name in (low, high):
        wanted = one.get(name, 0) + two.get(name, 0)
        torch.testing.assert_close(together[name], wanted, rtol=0, atol=1e-10)  # float64


@pytest.mark.parametrize("name", ["plain", "llama", "gpt_neox"])  # BERT's blocks have no skip path past their norms
def test_a_pull_past_a_block_holds_its_writes(name):
    """The gradient behind a block, started before it, is the gradient with that block held fixed."""
    model, batch = MODELS[name](), families.ragged("right")
    tape = model.tape(batch, metric=families.probe, gradients=SITES)
    full = collect(tape)
    layer = model.info.n_layers - 1
    found = collect(tape, {f"blocks.{layer}.hook_resid_pre": full[f"blocks.{layer}.hook_resid_post"]})
    held = model.run(batch, metric=families.probe, gradients=SITES, rules=Rules(hold={layer})).gradients
    assert {name for name in found if layer_of(name) < layer} == {name for name in full if layer_of(name) < layer}
    tolerance = 1e-10 if model.info.dtype == "float64" else 1e-4  # sums in another order
    for name in found:
        wanted = held[name].values
        torch.testing.assert_close(found[name], wanted, rtol=0, atol=tolerance * max(1.0, float(wanted.abs().max())))
    name = "blocks.0.hook_resid_pre"
    assert (found[name] - full[name]).abs().max() > 1e-2 * full[name].abs().max()  # control: nothing held


# -- the tape itself


def test_a_tape_that_was_let_go_and_wrong_roots_are_refused():
    model, batch = families.hooked("gpt2"), Batch.of(families.tokens())
    tape = model.tape(batch, metric=families.probe, gradients="z")
    with pytest.raises(
        UnknownNameError,
        match=r"a backward pass from blocks.0.attn.hook_q\n  found: it is no gradient site of this run\n  fix: did you",
    ):
        collect(tape, {"blocks.0.attn.hook_q": torch.zeros(3, 7, 4, 6)})
    assert collect(tape, last=True)
    with pytest.raises(
        ModelStateError,
        match="another backward pass\n  found: the last one let the graph go\n  fix: leave out last=True",
    ):
        collect(tape)


@pytest.mark.parametrize("kind", ["plain", "llama"])
def test_a_visit_that_raises_leaves_a_usable_tape_and_no_hooks(kind):
    model, batch = MODELS[kind](), families.ragged("left")
    hooks = families.hooks_of(model) if kind == "llama" else []
    tape = model.tape(batch, metric=families.probe, gradients=SITES)
    before = collect(tape)

    def stop(name: str, x: Tensor, g: Tensor) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        tape.pull_back(stop)
    assert tape._watch.visit is None
    after = collect(tape)
    assert all(torch.equal(after[name], g) for name, g in before.items())
    if kind == "llama":
        assert families.hooks_of(model) == hooks


@pytest.mark.parametrize("kind", ["plain", "llama"])
def test_memory_is_let_go(kind):
    model, batch, seen = MODELS[kind](), families.ragged("left"), []
    gc.disable()  # what is left then is held by a cycle or by the model
    try:
        edit = Edit("mlp_pre", lambda x, place: seen.append(weakref.ref(x)) or x)
        tape = model.tape(batch, edits=[edit], metric=families.probe, gradients="z")
        collect(tape)
        assert any(ref() is not None for ref in seen)  # control: an open tape keeps its graph
        collect(tape, last=True)
        assert all(ref() is None for ref in seen)
        del tape
        tape = model.tape(batch, edits=[edit], metric=families.probe, gradients="z")
        del tape
        assert all(ref() is None for ref in seen)
    finally:
        gc.enable()


# -- several passes in one


def one_by_one(tape, at: dict[str, Tensor], wanted: list[str]) -> dict[str, Tensor]:
    """The slow definition: a pass for each gradient."""
    n = len(next(iter(at.values())))
    passes = [collect(tape, {name: g[i] for name, g in at.items()}) for i in range(n)]
    return {
        name: torch.stack([p.get(name, torch.zeros_like(tape._nodes[name].blank)) for p in passes]) for name in wanted
    }


@every_model
@pytest.mark.parametrize("rules", [None, Rules.cp_lrp(), Rules.attn_lrp()])
def test_passes_in_one_are_the_passes_one_by_one(model, rules):
    model, batch = model(), families.ragged("left")
    tape = model.tape(batch, gradients=SITES, rules=rules)
    high, low = f"blocks.{model.info.n_layers - 1}.hook_resid_post", "blocks.0.hook_resid_post"
    noise = torch.Generator().manual_seed(2)
    at = {name: torch.randn(4, *tape._nodes[name].blank.shape, generator=noise).to(tape.logits) for name in (high, low)}
    found, wanted = tape.pull_backs(at), one_by_one(tape, at, list(tape._nodes))
    assert list(found) == list(tape._nodes)
    relative = 1e-12 if model.info.dtype == "float64" else 1e-5  # products of another size, in another order
    for name, g in wanted.items():
        torch.testing.assert_close(found[name], g, rtol=0, atol=relative * max(1.0, float(g.abs().max())))
    few = tape.pull_backs({high: at[high]}, ["blocks.0.attn.hook_z"], last=True)
    assert list(few) == ["blocks.0.attn.hook_z"]
    lower = one_by_one(model.tape(batch, gradients=SITES, rules=rules), {high: at[high]}, list(few))
    with pytest.raises(AssertionError):  # control: the first gradient for all passes
        torch.testing.assert_close(few["blocks.0.attn.hook_z"], lower["blocks.0.attn.hook_z"][:1].expand(4, *[-1] * 4))


def test_a_site_without_influence_has_zeros_in_passes_in_one():
    tape = MODELS["plain"]().tape(Batch.of(families.tokens()), gradients="resid_pre")
    at = {"blocks.0.hook_resid_pre": torch.ones(2, 3, 7, 16, dtype=torch.float64)}
    found = tape.pull_backs(at)
    assert torch.equal(found["blocks.0.hook_resid_pre"], at["blocks.0.hook_resid_pre"])
    assert not found["blocks.1.hook_resid_pre"].any() and len(found["blocks.1.hook_resid_pre"]) == 2


def test_passes_in_one_are_refused_with_what_is_wrong():
    model, batch = MODELS["plain"](), Batch.of(families.tokens())
    tape, name = model.tape(batch, gradients="resid_pre"), "blocks.1.hook_resid_pre"
    with pytest.raises(
        SettingError, match=r"from the metric\n  found: the tape has none\n  fix: give gradients at sites"
    ):
        collect(tape)
    good = torch.ones(2, 3, 7, 16, dtype=torch.float64)
    for at in ({name: good[0]}, {name: good[:0]}, {}, {name: good, "blocks.0.hook_resid_pre": good[:1]}):
        with pytest.raises(
            SettingError, match=r"several backward passes in one\n  found: (shapes|no site).*\n  fix: give"
        ):
            tape.pull_backs(at)
    with pytest.raises(UnknownNameError, match=r"from blocks.1.attn.hook_z\n  found: it is no gradient site"):
        tape.pull_backs({name: good}, ["blocks.1.attn.hook_z"])
    text = "in one\n  found: the run is checkpointed.*\n  fix: leave checkpoint out"
    with pytest.raises(UnsupportedFeatureError, match=text):
        model.tape(batch, gradients="resid_pre", checkpoint=True).pull_backs({name: good})
    with pytest.raises(SettingError, match="gradients\n  found: no metric to differentiate"):
        model.run(batch, gradients="z")
    tape.pull_backs({name: good}, last=True)
    with pytest.raises(ModelStateError, match="let the graph go"):
        tape.pull_backs({name: good})
