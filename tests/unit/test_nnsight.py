"""What the nnsight backend takes, what it refuses and why, and that it is not there before it is asked for."""

from __future__ import annotations

import ast
import inspect
import sys
from typing import Any

import families
import httpx
import nnsight
import pytest
import torch
from backends import backend_model, traced
from nnsight.intervention.backends.remote import RemoteError
from nnsight.intervention.serialization import dumps
from nnsight.modeling.transformers import TransformersModel
from nnsight.schema.config import CONFIG
from patching_cases import hf, pairs_task

import mechattr as ma
from mechattr.errors import (
    BackendError,
    ModelStateError,
    NonFiniteError,
    SelfCheckError,
    SettingError,
    UnknownModelError,
    UnsupportedFeatureError,
    UnsupportedModelError,
)
from mechattr.models import Add, Batch, Edit, HookedModel, Rules, Scale, Set, Start, nnsight_body, nnsight_remote
from mechattr.models.nnsight import HookedNNsight
from mechattr.models.nnsight_dry import DryRun

BATCH = Batch.of(families.tokens())


def test_no_module_imports_nnsight_when_it_is_imported(root):
    """nnsight changes `torch.Tensor.backward` of the whole process. The file of the dry run needs it, and is imported
    inside a function only."""
    late = {"nnsight", "transformer_lens", "ray", "mechattr.models.nnsight_dry"}
    for path in sorted((root / "mechattr").rglob("*.py")):
        nodes = ast.parse(path.read_text()).body
        names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        names |= {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)}
        found = {late_name for name in names for late_name in late if f"{name}.".startswith(f"{late_name}.")}
        assert not found or path.name == "nnsight_dry.py", path


def test_it_is_a_hooked_model():
    model = backend_model("nnsight-llama")
    assert isinstance(model, HookedModel)
    assert model.info.backend == "nnsight"
    assert repr(backend_model("nnsight-local-gpt2")) == (
        "HookedNNsight('gpt2', gpt2, 2 layers, 4 heads, float32, remote='local')"
    )
    reference = families.hooked("llama")
    assert model.fingerprint() == reference.fingerprint()
    for name in ("blocks.0.attn.W_O", "unembed.W_U", "ln_final.w"):
        assert torch.equal(model.weight(name), reference.weight(name))
    x = torch.randn(2, 24)
    assert torch.equal(model.norm("blocks.1.ln2")(x), reference.norm("blocks.1.ln2")(x))
    for family in ("llama", "gemma2"):
        found, expected = (m.attention(1) for m in (traced(family), families.hooked(family)))
        assert (found.scaling, found.softcap, found.sinks) == (expected.scaling, expected.softcap, expected.sinks)
    assert model.supports("pattern") and model.supports(Rules(hold={1})) and model.supports(Add(1.0))
    assert not model.supports("pos_embed") and not model.supports(Rules.relp())


# -- what is loaded


def test_loading_takes_folders_models_and_models_of_nnsight(tmp_path):
    bare = families.model("llama")
    bare.save_pretrained(tmp_path)
    families.tokenizer().save_pretrained(tmp_path)
    plain = families.hooked("llama").run(BATCH).logits
    with pytest.warns(FutureWarning, match="LanguageModel is deprecated"):
        user = nnsight.LanguageModel(bare, tokenizer=families.tokenizer())
    lazy = TransformersModel(
        str(tmp_path), task="text-generation", tokenizer=families.tokenizer(), attn_implementation="eager"
    )
    for source in (bare, str(tmp_path), tmp_path, user, lazy, hf("llama"), nnsight.NNsight(bare)):
        model = ma.load(source, backend="nnsight")
        assert type(model) is HookedNNsight
        torch.testing.assert_close(model.run(BATCH).logits, plain, rtol=0, atol=1e-5)  # float32 rounding
    assert ma.load(user, backend="nnsight").tokenizer is user.tokenizer
    assert ma.load(str(tmp_path), backend="nnsight", dtype="float64").info.dtype == "float64"
    assert ma.load(user, backend="nnsight", remote="local").run(BATCH).logits.shape == plain.shape


def test_what_cannot_be_loaded_is_refused(tmp_path, monkeypatch):
    bare = families.model("gpt2")
    with pytest.raises(SettingError, match="remote='local' with backend='hf'\n  found: only nnsight runs elsewhere"):
        ma.load(bare, remote="local")
    with pytest.raises(SettingError, match="remote='here'\n  found: no such place\n  fix: use False, 'local' or True"):
        ma.load(bare, backend="nnsight", remote="here")
    with pytest.raises(SettingError, match="device for a model that is loaded already"):
        ma.load(bare, backend="nnsight", device="cpu")
    with pytest.raises(UnsupportedModelError, match="remote='local'\n  found: a NNsight\n  fix: give the transformers"):
        HookedNNsight(nnsight.NNsight(bare), remote="local")
    with pytest.raises(UnsupportedModelError, match="a hooked Linear\n  found: it has no config"):
        HookedNNsight(torch.nn.Linear(2, 2))
    with pytest.raises(ModelStateError, match=r"(?s)training mode.*call model.eval\(\)"):
        HookedNNsight(families.model("gpt2").train())
    monkeypatch.setitem(sys.modules, "nnsight.intervention.envoy", None)
    with pytest.raises(BackendError, match=r"backend 'nnsight'\n  found: it cannot be imported.*\n  fix: install it"):
        HookedNNsight(bare)


def test_attention_whose_source_has_other_names_is_refused(monkeypatch):
    source = inspect.getsource(nnsight_body.at_attention)
    assert source.count('"attention_interface"') == 1 and source.count('"softmax"') == 1
    for name, text in (("attention_interface", "call of the attention interface"), ("softmax", "softmax in the")):
        scope = dict(vars(nnsight_body))
        exec(source.replace(f'"{name}"', '"renamed"'), scope)
        monkeypatch.setattr(nnsight_body, "at_attention", scope["at_attention"])
        with pytest.raises(
            SelfCheckError, match=f"{text}.* block 0\n  found: the source of it has .*_0, .*\n  fix: use"
        ):
            HookedNNsight(families.model("llama"))


# -- what a run refuses


WRONG = [
    ({"rules": Rules.relp()}, UnsupportedFeatureError, "on the nnsight backend\n  found: of rules it has only hold"),
    ({"checkpoint": True}, UnsupportedFeatureError, "checkpoint=True\n  found: backend 'nnsight' cannot compute"),
    ({"record": "zz"}, ma.errors.UnknownSiteError, "site 'zz'"),
    ({"gradients": "z"}, SettingError, "no metric to differentiate"),
    ({"metric": lambda logits, b: logits.sum()}, SettingError, r"it returned shape \(\)\n  fix: .* shape \(3,\)"),
    ({"metric": lambda logits, b: [0, 1, 2]}, SettingError, "it returned a list"),
    ({"metric": families.probe, "visit": print}, SettingError, "no site whose gradient is asked for"),
    ({"edits": Edit("z", Scale(2.0))}, SettingError, "give a list of Edit"),
    ({"edits": [Edit("z", lambda x, p: x.double())]}, SettingError, r"got torch.float32 .* and returned torch.float64"),
    ({"edits": [Edit("z", Set(torch.ones(5)))]}, SettingError, r"a value of shape \(5,\) at blocks.0.attn.hook_z"),
    (
        {"start": Start(1, torch.zeros(3, 7, 24)), "record": "blocks.0.attn.hook_z"},
        UnsupportedFeatureError,
        "the run starts at block 1",
    ),
    (
        {"metric": lambda logits, b: logits[:, -1].argmax(-1), "gradients": "z"},
        SettingError,
        "the gradient of a metric\n  found: it does not follow from the logits",
    ),
    ({"edits": [Edit("mlp_post", Scale(1e38))]}, NonFiniteError, r"first at blocks.0.(mlp.hook_post|hook_mlp_out)"),
]


@pytest.mark.parametrize("place", ["nnsight-", "nnsight-local-"])
@pytest.mark.parametrize(("arguments", "error", "text"), WRONG, ids=[text[:30] for _, _, text in WRONG])
def test_wrong_arguments_are_refused(place, arguments, error, text):
    with pytest.raises(error, match=f"(?s){text}"):
        backend_model(place + "llama").run(BATCH, **arguments)


def test_a_fused_attention_has_no_pattern():
    model = traced("llama", attention="sdpa")
    assert not {"attn_scores", "pattern"} & {name.rpartition("hook_")[2] for name in model.sites()}
    for arguments in ({"record": "pattern"}, {"edits": [Edit("attn_scores", Scale(1.0))]}):
        with pytest.raises(UnsupportedFeatureError, match=r"'sdpa' attention.*\n  fix: load it with attention='eager'"):
            model.run(BATCH, **arguments)
    reference, sites = families.hooked("llama", attention="sdpa"), ("rot_q", "v", "z")
    found, expected = (m.run(BATCH, metric=families.probe, gradients=sites) for m in (model, reference))
    for name, g in expected.gradients.items():
        torch.testing.assert_close(found.gradients[name].values, g.values, rtol=1e-5, atol=1e-4)  # float32 rounding


def test_tokens_on_another_device_are_refused(monkeypatch):
    model = HookedNNsight(families.model("gpt2"))
    monkeypatch.setattr(HookedNNsight, "device", torch.device("cuda"))
    with pytest.raises(SettingError, match=r"(?s)tokens on cpu, model on cuda.*batch.to\(device\)"):
        model.run(BATCH)


def test_what_generation_cannot_do_is_refused():
    model = backend_model("nnsight-gpt2")
    with pytest.raises(
        SettingError, match=r"the nnsight backend\n  found: settings \['num_beams'\]\n  fix: it is greedy"
    ):
        model.generate(BATCH, num_beams=2)
    with pytest.raises(SettingError, match="rows end in padding"):
        model.generate(families.ragged("right"))


def test_a_run_inside_a_run_is_refused():
    here, there = backend_model("nnsight-gpt2"), backend_model("nnsight-local-gpt2")
    before = here.run(BATCH).logits
    with pytest.raises(ModelStateError, match="an edit runs the model that it edits"):
        here.run(BATCH, edits=[Edit("z", lambda x, p: here.run(BATCH) and x)])
    with pytest.raises(UnsupportedFeatureError, match="a function that refers to the hooked model\n  found: a trace"):
        there.run(BATCH, edits=[Edit("z", lambda x, p: there.run(x) and x)])
    assert torch.equal(here.run(BATCH).logits, before) and torch.equal(there.run(BATCH).logits, before)


def test_an_exception_of_a_function_comes_through_and_leaves_nothing_behind():
    model = traced("llama")
    module = model.model
    before = [
        (n, sorted(m.__dict__), len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in module.named_modules()
    ]
    weights, path, plain = model.fingerprint(), list(sys.path), model.run(BATCH).logits
    for remote in (False, "local"):
        with pytest.raises(ZeroDivisionError):
            traced("llama", remote=remote).run(BATCH, edits=[Edit("z", lambda x, p: x * (1 / 0))])
    model.run(BATCH, record=model.sites(), metric=families.probe, gradients=model.sites())
    after = [
        (n, sorted(m.__dict__), len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in module.named_modules()
    ]
    assert after == before
    assert all(p.grad is None for p in module.parameters())
    assert model.fingerprint() == weights and sys.path == path
    assert torch.equal(model.run(BATCH).logits, plain)


# -- what is sent


def test_the_body_reads_torch_only():
    """A server runs code that imports nothing but what its whitelist has."""
    tree = ast.parse(inspect.getsource(nnsight_body))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported == {"__future__", "typing", "torch"}
    assert not [node for node in tree.body if isinstance(node, ast.ClassDef)]


@pytest.mark.parametrize("name", ["logit_difference", "probability_difference", "kl_divergence"])
def test_nothing_of_this_package_is_left_behind_when_a_trace_is_sent(name, monkeypatch):
    """Operators are sent as tensors, and the metrics of tasks as functions of torch."""
    model = backend_model("nnsight-local-llama")
    task, sent = pairs_task(model), []

    def trace(traced: Any, body: Any, plan: Any, inputs: Any, remote: Any) -> Any:
        sent.append(dumps((body, plan)))
        return original(traced, body, plan, inputs, remote)

    original = nnsight_remote.trace
    monkeypatch.setattr(nnsight_remote, "trace", trace)
    ids = torch.tensor([1, 2, 3])
    given = (torch.randn(3, 61).log_softmax(-1),) if name == "kl_divergence" else (ids, ids + 1)
    metric = ma.tasks.metrics.METRICS[name](*given)
    run = model.run(task.clean, metric=metric, edits=[Edit("z", Set(0.0), positions=[-1])], gradients="z")
    reference = hf("llama").run(task.clean, metric=metric, edits=[Edit("z", Set(0.0), positions=[-1])])
    torch.testing.assert_close(run.metric, reference.metric, rtol=1e-5, atol=1e-5)  # float32 rounding
    (blob,) = sent
    assert b"nnsight_body.py" in blob  # where its functions came from, for tracebacks
    for module in (b"mechattr.errors", b"mechattr.models.operators", b"mechattr.models.base", b"jaxtyping"):
        assert module not in blob


def test_functions_that_cannot_be_sent_are_refused(tmp_path):
    model = backend_model("nnsight-local-gpt2")
    with (
        (tmp_path / "open").open("w") as file,
        pytest.raises(UnsupportedFeatureError, match="functions of torch and plain"),
    ):
        model.run(BATCH, edits=[Edit("z", lambda x, p: x * file.tell())])
    calls = 0

    def counted(x: torch.Tensor, _place: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return x

    with pytest.raises(UnsupportedFeatureError, match="no binding for nonlocal 'calls'"):
        model.run(BATCH, edits=[Edit("z", counted)])
    task = pairs_task(model)
    for method, more in ((ma.path_patching, [[ma.Node("resid_post", 1)]]), (ma.edge_patching, [])):
        with pytest.raises(UnsupportedFeatureError, match=r"(?s)sending a .*fix: .*remote="):
            method(model, task, *more, progress=False)


def test_passes_count_the_forward_passes_of_graddrop():
    model, task = backend_model("nnsight-gpt2"), pairs_task(hf("gpt2"))
    for variant, more in (("qk", 0), ("star", 3 * 2)):  # a drop for each pair and block
        here, there = (ma.attribution_patching(m, task, variant=variant, progress=False) for m in (model, hf("gpt2")))
        assert here.passes.forward == there.passes.forward + more
        assert here.passes.backward == there.passes.backward


# -- on a server


def on_server(tmp_path: Any, monkeypatch: Any, backend: Any) -> Any:
    """A model by a hub name, without weights, whose requests go to `backend` instead of a server."""
    families.model("llama").save_pretrained(tmp_path)
    families.tokenizer().save_pretrained(tmp_path)
    lazy = TransformersModel(
        str(tmp_path), task="text-generation", tokenizer=families.tokenizer(), attn_implementation="eager"
    )
    lazy.repo_id = "somebody/llama"
    monkeypatch.setattr(TransformersModel, "_remote_backend", lambda *_: backend)
    monkeypatch.setenv("NDIF_API_KEY", "a key")
    return ma.load(lazy, backend="nnsight", remote=True)


def test_remote_needs_a_hub_name_and_a_key(tmp_path, monkeypatch):
    bare = families.model("gpt2")
    bare.save_pretrained(tmp_path)
    monkeypatch.delenv("NDIF_API_KEY", raising=False)
    monkeypatch.setattr(CONFIG.API, "APIKEY", None)
    for source, text in ((bare, "a GPT2LMHeadModel in memory"), (str(tmp_path), f"the folder '{tmp_path}'")):
        with pytest.raises(
            UnsupportedModelError, match=f"remote=True\n  found: {text}, which a server does not have.*"
        ):
            ma.load(source, backend="nnsight", remote=True)
    with pytest.raises(BackendError, match=r"no key for NDIF\n  fix: get one at https://login.ndif.us .*NDIF_API_KEY"):
        ma.load("somebody/model", backend="nnsight", remote=True)
    monkeypatch.setenv("NDIF_API_KEY", "a key")

    def unreachable(*_: Any, **__: Any) -> None:
        raise OSError("We couldn't connect to the hub")

    monkeypatch.setattr(TransformersModel, "_load_meta", unreachable)
    given: dict[str, Any] = {"backend": "nnsight", "remote": True, "tokenizer": families.tokenizer()}
    with pytest.raises(UnknownModelError, match=r"'somebody/model'\n  found: We couldn't connect.*\n  fix: .*network"):
        ma.load("somebody/model", **given)
    with pytest.raises(SettingError, match="dtype for a model that is loaded already"):
        ma.load("somebody/model", dtype="float64", **given)


def test_what_a_server_gets_gives_the_numbers_of_the_reference(tmp_path, monkeypatch):
    families.model("llama").save_pretrained(tmp_path)
    settings = {"task": "text-generation", "tokenizer": families.tokenizer(), "attn_implementation": "eager"}
    there = TransformersModel(str(tmp_path), dispatch=True, **settings)
    model = on_server(tmp_path, monkeypatch, DryRun(there))
    assert model.model.device.type == "meta" and model.device.type == "cpu"
    arguments = {"record": "pattern", "metric": families.probe, "gradients": ("z", "resid_mid")}
    arguments |= {"edits": [Edit("resid_post", Add(torch.ones(24)), layers=[0], positions=[-1])]}
    found, expected = (m.run(BATCH, **arguments) for m in (model, families.hooked("llama")))
    for kind in ("activations", "gradients"):
        for name, x in getattr(expected, kind).items():
            torch.testing.assert_close(getattr(found, kind)[name].values, x.values, rtol=1e-5, atol=1e-4)
    task = pairs_task(model)
    scores = ma.attribution_patching(model, task, variant="qk", progress=False)
    torch.testing.assert_close(
        scores.signed["z"].values,
        ma.attribution_patching(families.hooked("llama"), task, variant="qk", progress=False).signed["z"].values,
    )
    assert scores.provenance["weight_hash"] == "hub:somebody/llama@main"
    for call in (lambda: model.weight("embed.W_E"), lambda: model.norm("ln_final")):
        with pytest.raises(UnsupportedFeatureError, match="the weights are on a server"):
            call()


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (
            RemoteError("Model somebody/llama is not deployed\nmore"),
            "RemoteError: Model somebody/llama is not deployed",
        ),
        (httpx.ReadTimeout("timed out"), "ReadTimeout: timed out"),
        (ConnectionRefusedError("refused"), "ConnectionRefusedError: refused"),
    ],
)
def test_failures_of_a_server_are_backend_errors(tmp_path, monkeypatch, error, text):
    def fail(_tracer: Any) -> None:
        raise error

    model = on_server(tmp_path, monkeypatch, fail)
    with pytest.raises(BackendError, match=f"a run of 'somebody/llama' on NDIF\n  found: {text}\n  fix: look at"):
        model.run(BATCH)
