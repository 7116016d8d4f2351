"""A model is never changed: whatever is raised, whoever else has hooks, however often it runs."""

from __future__ import annotations

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import families
import pytest
import torch
import transformers as tf
from backends import backend_model

from mechattr.errors import ModelStateError, NonFiniteError, SettingError, UnknownSiteError
from mechattr.models import Add, Batch, Edit, HookedHF, PlainConfig, Rules, Scale, Start, plain_model
from mechattr.sites import parse
from mechattr.steering import SteeringVector

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def state(model: torch.nn.Module) -> list[Any]:
    """All that a run could leave behind in a model: attributes, hooks, configs, attention, training, requires_grad."""
    found: list[Any] = [model.config._attn_implementation]
    for name, module in model.named_modules():
        attributes = {k: id(v) for k, v in module.__dict__.items() if k not in HOOKS}
        found.append((name, attributes, [dict(module.__dict__[k]) for k in HOOKS], module.training))
    found += [(p.data_ptr(), p._version, p.requires_grad) for p in model.parameters()]
    return found


class Stop(Exception):
    pass


def stop(*_: Any) -> torch.Tensor:
    raise Stop


@pytest.mark.parametrize(
    ("family", "attention"),
    [
        ("gpt2", "sdpa"),
        ("gpt_neox", "eager"),
        ("phi3", "sdpa"),
        ("gemma2", "eager"),
        ("bert", "eager"),
        ("falcon", "sdpa"),
        ("bloom", "eager"),
        ("gptj", "eager"),
    ],
)
def test_an_exception_at_any_site_leaves_nothing_behind(family, attention):
    model, batch = families.hooked(family, attention=attention), families.ragged("right")
    calls: list[str] = []
    handles = [
        module.register_forward_hook(lambda m, a, out: calls.append("foreign"))
        for module in (model.model.base_model, model._anatomy.blocks[1])
    ]
    before, plain = state(model.model), model.run(batch).logits
    assert len(calls) == 2
    for short in dict.fromkeys(parse(name)[0] for name in model.sites()):
        with pytest.raises(Stop):
            model.run(batch, edits=[Edit(short, stop)], record=model.sites(), rules=Rules(norm="frozen"))
        with pytest.raises(Stop):
            model.run(batch, metric=families.probe, gradients=short, visit=stop)
        assert state(model.model) == before, short
    if not model.info.encoder:
        with pytest.raises(Stop):
            model.generate(families.ragged("left"), edits=[Edit("z", stop, positions="generated")], max_new_tokens=3)
        calls.clear()
    with pytest.raises(Stop):
        model.run(batch, metric=stop)
    with pytest.raises(Stop):
        model.run(batch, edits=[Edit("z", stop, layers=[1])], start=Start(1, torch.zeros(3, 7, 24)))
    calls.clear()
    assert torch.equal(model.run(batch).logits, plain)
    assert len(calls) == 2
    assert state(model.model) == before
    for handle in handles:
        handle.remove()


def test_a_full_run_leaves_nothing_behind():
    model, batch = families.hooked("llama"), families.ragged("left")
    before = state(model.model)
    model.run(batch, record=model.sites(), metric=families.probe, gradients=model.sites(), rules=Rules(norm="frozen"))
    model.generate(batch, edits=[Edit("pattern", Scale(1.0))], max_new_tokens=2)
    assert state(model.model) == before
    assert all(p.grad is None for p in model.model.parameters())


def test_two_models_with_one_config_run_in_two_threads():
    config = families.configs()["llama"]
    models = [HookedHF(tf.LlamaForCausalLM(config).eval()) for _ in range(2)]
    batch = families.ragged("left")
    assert models[0].config is models[1].config

    def work(i: int) -> list[torch.Tensor]:
        sites = ("pattern", "z") if i else ("q", "resid_mid")  # one of them switches its attention
        run = models[i].run(batch, record=sites, metric=families.probe, gradients="mlp_post")
        return [run.logits, *(x.values for x in run.activations.values()), *(x.values for x in run.gradients.values())]

    alone = [work(0), work(1)]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(10):
            both = list(pool.map(work, (0, 1)))
            for found, wanted in zip(both, alone, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_runs_of_one_model_in_two_threads_wait_for_each_other():
    model, batch = families.hooked("llama"), Batch.of(families.tokens())
    edits = ([], [Edit("z", Scale(0.0))])
    alone = [model.run(batch, edits=edit).logits for edit in edits]

    def work(i: int) -> bool:
        return all(torch.equal(model.run(batch, edits=edits[i]).logits, alone[i]) for _ in range(30))

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(work, (0, 1))) == [True, True]


def test_a_run_inside_an_edit_of_the_same_model_is_refused():
    model, batch = families.hooked("gpt2"), Batch.of(families.tokens())
    before = model.run(batch).logits
    with pytest.raises(ModelStateError, match="an edit runs the model that it edits"):
        model.run(batch, edits=[Edit("z", lambda x, place: model.run(batch) and x)])
    assert torch.equal(model.run(batch).logits, before)
    model.run(batch, metric=lambda logits, rows: model.run(rows, metric=families.probe).metric)  # the run is over


def live() -> int:
    return sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects())


@pytest.mark.parametrize("kind", ["hf", "plain", "nnsight"])
def test_a_hundred_runs_leave_no_tensor_alive(kind):
    if kind == "nnsight":
        model: Any = backend_model("nnsight-gpt2")
    else:
        model = families.hooked("gpt2") if kind == "hf" else plain_model(PlainConfig(d_vocab=61))
    batch, edit = Batch.of(families.tokens(1, 4)), Edit("z", Add(0.1))

    def run() -> None:
        sites = ("z", "mlp_post", "resid_mid", "pattern")
        model.run(batch, record=sites, edits=[edit], metric=families.probe, gradients=sites)
        model.run(batch, metric=families.probe, gradients="z", visit=lambda name, x, g: None)

    run()
    gc.collect()
    before = live()
    gc.disable()  # what is left then is held by a cycle or by the model
    try:
        for _ in range(100):
            run()
        assert live() == before
    finally:
        gc.enable()


@pytest.mark.parametrize("kind", ["hooked", "own", "generate", "rules"])
def test_blocks_of_edits_and_runs_under_rules_leave_nothing_alive_and_nothing_behind(kind):
    """`own`: edits attached to the transformers model itself, and to what it generates."""
    model, batch = HookedHF(families.model("mixtral")), Batch.of(families.tokens(1, 4))
    vector = SteeringVector.of({"blocks.1.hook_resid_post": torch.ones(model.info.d_model)})
    bare, before = model.model, state(model.model)

    def once() -> None:
        if kind == "rules":
            rules = Rules(norm="frozen", activation="secant", gate="half", router="detached", pattern="detached")
            model.run(batch, metric=families.probe, gradients=("z", "expert_out"), rules=rules)
            return
        with pytest.raises(Stop), vector.apply(model if kind == "hooked" else bare), vector.apply(bare):
            if kind == "generate":
                bare.generate(batch.tokens, attention_mask=batch.mask.long(), max_new_tokens=2, pad_token_id=2)
            elif kind == "own":
                bare(batch.tokens)
            raise Stop

    once()
    gc.collect()
    alive = live()
    gc.disable()  # what is left then is held by a cycle or by the model
    try:
        for _ in range(10):
            once()
        assert live() == alive
    finally:
        gc.enable()
    assert state(bare) == before


def test_activations_die_with_their_run():
    model, seen = families.hooked("llama"), []
    gc.disable()
    try:
        edit = Edit("resid_mid", lambda x, place: seen.append(weakref.ref(x)) or x)
        run = model.run(Batch.of(families.tokens()), edits=[edit], metric=families.probe, gradients="z", record="z")
        del run
        assert len(seen) == 2
        assert all(ref() is None for ref in seen)
    finally:
        gc.enable()


def test_wrapping_copies_no_weight():
    bare = families.model("llama")
    pointers, before = [p.data_ptr() for p in bare.parameters()], live()
    model = HookedHF(bare)
    gc.collect()
    assert live() <= before + 1
    assert [p.data_ptr() for p in model.model.parameters()] == pointers
    assert model.weight("blocks.0.mlp.W_out").data_ptr() == bare.model.layers[0].mlp.down_proj.weight.data_ptr()


def test_train_mode_is_refused():
    model, batch = HookedHF(families.model("gpt2")), Batch.of(families.tokens())
    model.model.train()
    for call in (lambda: model.run(batch), lambda: model.generate(batch), lambda: HookedHF(model.model)):
        with pytest.raises(ModelStateError, match=r"(?s)training mode.*fix: call model.eval\(\)"):
            call()


def test_an_overflow_is_located():
    model = families.hooked("gpt2", torch.float16)
    edit = Edit("mlp_post", Scale(1e4), layers=[1])
    batch = Batch.of(families.tokens())
    with pytest.raises(NonFiniteError, match=r"first at blocks.1.(mlp.hook_post|hook_mlp_out) \(dtype torch.float16\)"):
        model.run(batch, edits=[edit, Edit("mlp_out", Scale(1e4), layers=[1])])
    assert model.run(batch).logits.isfinite().all()


def test_nothing_is_reported_at_padding():
    model, batch = families.hooked("llama", torch.float64), families.ragged("left")
    run = model.run(batch, record=("pattern", "resid_post"))
    assert run.logits.isfinite().all()
    assert all(x.values.isfinite().all() for x in run.activations.values())


BATCH = Batch.of(families.tokens())
WRONG = [
    ({"record": "zz"}, UnknownSiteError, "site 'zz'"),
    ({"record": "blocks.9.attn.hook_z"}, UnknownSiteError, "this model has no such site; .* in layers 0 to 1"),
    ({"gradients": "z"}, SettingError, "no metric to differentiate"),
    ({"metric": lambda logits, b: logits.sum()}, SettingError, r"it returned shape \(\)\n  fix: .* shape \(3,\)"),
    ({"start": Start(5, torch.zeros(3, 7, 24))}, SettingError, "a run from block 5\n  found: blocks 0 to 1"),
    ({"start": Start(1, torch.zeros(1, 7, 24))}, SettingError, r"a residual stream of shape \(1, 7, 24\)"),
    ({"start": Start(1, torch.zeros(3, 7, 24).double())}, SettingError, "found: a residual stream in float64 on cpu"),
    ({"metric": lambda logits, b: [0, 1, 2]}, SettingError, "it returned a list"),
    ({"metric": "logit_difference"}, SettingError, "metric='logit_difference'\n  found: that is not callable"),
    ({"metric": families.probe, "visit": stop}, SettingError, "no site whose gradient is asked for"),
    ({"rules": Rules(hold=frozenset({2}))}, SettingError, r"Rules\(hold=\[2\]\)\n  found: blocks 0 to 1"),
]


@pytest.mark.parametrize(("arguments", "error", "text"), WRONG, ids=[text[:30] for _, _, text in WRONG])
def test_wrong_arguments_are_refused(arguments, error, text):
    with pytest.raises(error, match=f"(?s){text}"):
        families.hooked("gpt2").run(BATCH, **arguments)


def test_wrong_tokens_are_refused():
    model = families.hooked("gpt2")
    with pytest.raises(SettingError, match="token id 61\n  found: the vocabulary has 61 ids"):
        model.run(Batch.of(torch.tensor([[5, 61]])))
    with pytest.raises(SettingError, match="a prompt of 65 tokens\n  found: the model has 64 positions"):
        model.run(Batch.of(torch.full((1, 65), 7)))
    elsewhere = plain_model(PlainConfig())
    elsewhere.device = torch.device("meta")
    with pytest.raises(SettingError, match=r"(?s)tokens on cpu, model on meta.*batch.to\(device\)"):
        elsewhere.run(BATCH)
    with pytest.raises(SettingError, match=r"Rules\(norm='melted'\)"):
        Rules(norm="melted")
    with pytest.raises(SettingError, match=r"Rules\(hold=3\)\n  found: no set of layers"):
        Rules(hold=3)
    assert Rules(hold={1, 0}) == Rules(hold=frozenset({0, 1}))
