"""Latents and errors of a user's dictionary are causal nodes: bit-identity, finite differences, definitions."""

from __future__ import annotations

import gc
from typing import Any

import backends
import families
import pytest
import torch
from patching_cases import pairs_task, plain
from test_models_gradients import TOLERANCE, disagreements
from torch import Tensor, nn

import mechattr as ma
from mechattr.errors import MismatchError, SettingError, UnknownSiteError, UnsupportedFeatureError
from mechattr.models import Add, Batch, Dictionary, Edit, Scale, Set, taps
from mechattr.models.record import check_belongs, record
from mechattr.models.running import Running
from mechattr.sites import HOSTS, Node, parse


class Sae(nn.Module):
    """A small dictionary with random weights; smooth, since finite differences cannot cross a kink."""

    def __init__(self, d: int, n: int = 7, seed: int = 0, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        for name, shape in (("up", (d, n)), ("down", (n, d)), ("bias", (n,))):
            weight = torch.randn(shape, generator=draw, dtype=torch.float64) * shape[0] ** -0.5
            self.register_parameter(name, nn.Parameter(weight.to(dtype)))

    def encode(self, x: Tensor) -> Tensor:
        return nn.functional.softplus(x @ self.up + self.bias)

    def decode(self, f: Tensor) -> Tensor:
        return f @ self.down


class Turned(nn.Module):
    """Latents are the stream in another basis: nothing is left over."""

    def __init__(self, d: int) -> None:
        super().__init__()
        noise = torch.randn(d, d, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        self.basis = nn.Parameter(torch.linalg.qr(noise)[0])

    def encode(self, x: Tensor) -> Tensor:
        return x @ self.basis

    def decode(self, f: Tensor) -> Tensor:
        return f @ self.basis.T


def dictionary(model: Any, site: str, layer: int, kind: Any = Sae, **more: Any) -> Dictionary:
    dtype = getattr(torch, model.info.dtype)
    made = kind(model.info.d_model).to(dtype)
    return Dictionary(encode=made.encode, decode=made.decode, site=site, layer=layer, **more)


def everywhere(model: Running) -> Running:
    """Dictionaries at every host of every layer, the one of the MLP a transcoder."""
    made = [
        dictionary(model, host, layer, reads="ln2" if host == "mlp_out" else None)
        for layer in range(model.info.n_layers)
        for host in HOSTS
        if f"blocks.{layer}.hook_{host}" in model.sites()
    ]
    return model.with_dictionaries(made)


def model_of(kind: str) -> Any:
    if kind == "plain":
        return plain("gpt2_like")
    if kind == "lens":
        return backends.lens("llama", torch.float64)
    return families.hooked(kind, torch.float64)


KINDS = pytest.mark.parametrize("kind", ["plain", "gpt2", "gpt_neox", "lens"])
NEW = ("resid_post_latents", "resid_post_error")


def tokens(model: Any, rows: int = 2, length: int = 5) -> Batch:
    return Batch.of(families.tokens(rows, length) % model.info.d_vocab)


@KINDS
def test_nothing_changes_where_nothing_is_edited(kind: str) -> None:
    model = model_of(kind)
    view, batch = everywhere(model), tokens(model)
    added = set(view.sites()) - set(model.sites())
    assert len(added) == 2 * model.info.n_layers * sum(f"blocks.0.hook_{h}" in model.sites() for h in HOSTS)
    plainly = model.run(batch, record=model.sites(), metric=families.probe, gradients=model.sites())
    run = view.run(batch, record=view.sites(), metric=families.probe, gradients=view.sites())
    assert torch.equal(run.logits, plainly.logits)
    for name in model.sites():
        assert torch.equal(run.activations[name].values, plainly.activations[name].values), name
        size = plainly.gradients[name].values.abs().max()  # float64, and transformers' norms in float32
        torch.testing.assert_close(run.gradients[name].values, plainly.gradients[name].values, rtol=0, atol=1e-5 * size)
    sae, last = view._dictionaries["blocks.1.hook_resid_post"], model.info.n_layers - 1
    x = plainly.activations["resid_post", last].values
    f = run.activations["resid_post_latents", last].values
    assert torch.equal(f, sae.encode(x)) and torch.equal(
        run.activations["resid_post_error", last].values, x - sae.decode(f)
    )
    g = plainly.gradients["resid_post", last].values
    torch.testing.assert_close(run.gradients["resid_post_error", last].values, g, rtol=1e-12, atol=0)  # rounding
    wanted = g @ sae.decode.__self__.down.T
    torch.testing.assert_close(
        run.gradients["resid_post_latents", last].values, wanted, rtol=1e-9, atol=1e-9
    )  # rounding
    transcoder = view._dictionaries["blocks.0.hook_mlp_out"]
    read = plainly.activations["ln2", 0].values
    assert torch.equal(run.activations["mlp_out_latents", 0].values, transcoder.encode(read))
    assert model.info.latents == () and not set(NEW) & {parse(name)[0] for name in model.sites()}


@KINDS
def test_finite_differences(kind: str) -> None:
    with families.widened():
        model = model_of(kind)
        found = disagreements(everywhere(model), tokens(model))
    assert max(found.values()) < TOLERANCE, {name: e for name, e in found.items() if e >= TOLERANCE}


def test_control_an_error_that_follows_the_latents_takes_their_effect_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong: the error computed after the latents were edited."""

    def wrong(self: taps.Taps, host: str, x: Tensor) -> Tensor:
        d = self.active[host]
        decoded = d.decode(self._pass(d.sites[0], d.encode(self.inputs.pop(host, x))))
        return decoded + self._pass(d.sites[1], x - decoded)

    model = model_of("gpt2")
    view, batch, edit = everywhere(model), tokens(model), [Edit("resid_post_latents", Scale(0.0), layers=[0])]
    plainly = model.run(batch).logits
    assert (view.run(batch, edits=edit).logits - plainly).abs().max() > 0.1
    monkeypatch.setattr(taps.Taps, "_through", wrong)
    assert (view.run(batch, edits=edit).logits - plainly).abs().max() < 1e-4  # float32 norms


def test_control_an_error_without_gradient_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong: right in value, and upstream only what the latents explain has a gradient."""

    def wrong(self: taps.Taps, host: str, x: Tensor) -> Tensor:
        d = self.active[host]
        latents = d.encode(self.inputs.pop(host, x))
        error = (x - d.decode(latents)).detach()
        return d.decode(self._pass(d.sites[0], latents)) + self._pass(d.sites[1], error)

    model = model_of("plain")
    monkeypatch.setattr(taps.Taps, "_through", wrong)
    found = disagreements(everywhere(model), tokens(model))
    assert found["blocks.1.hook_resid_post.hook_sae_acts_post"] < TOLERANCE  # the last one
    assert found["hook_embed"] > 0.1


def test_a_perfect_dictionary_has_no_error_and_its_latents_are_the_host() -> None:
    model = plain("gpt2_like")
    view = model.with_dictionaries([dictionary(model, "resid_post", 0, Turned)])
    here, there = tokens(model), Batch.of((tokens(model).tokens + 3) % 31)
    run, other = (view.run(b, record=("resid_post", *NEW)).activations for b in (here, there))
    assert run["resid_post_error", 0].values.abs().max() < 1e-14  # float64 rounding
    latents = Edit("resid_post_latents", Set(other["resid_post_latents", 0].values))
    whole = Edit("resid_post", Set(other["resid_post", 0].values), layers=[0])
    logits, expected = view.run(here, edits=[latents]).logits, model.run(here, edits=[whole]).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-12)  # float64 rounding
    assert (logits - model.run(here).logits).abs().max() > 0.1


@pytest.mark.parametrize("kind", ["plain", "gpt2"])
def test_patching_all_latents_and_the_error_is_patching_the_host(kind: str) -> None:
    model = model_of(kind)
    view, (here, there) = everywhere(model), (tokens(model), Batch.of((tokens(model).tokens + 3) % 31))
    for host, layer in (("resid_post", 0), ("attn_out", 1), ("mlp_out", 0)):
        parts = (f"{host}_latents", f"{host}_error")
        other = view.run(there, record=(host, *parts)).activations
        edits = [Edit(part, Set(other[part, layer].values), layers=[layer]) for part in parts]
        whole = [Edit(host, Set(other[host, layer].values), layers=[layer])]
        expected = model.run(here, edits=whole).logits
        torch.testing.assert_close(view.run(here, edits=edits).logits, expected, rtol=0, atol=1e-5)  # float32 norms
        assert (view.run(here, edits=edits[:1]).logits - expected).abs().max() > 1e-3, host  # the error counts


def test_exact_effects_are_their_definition() -> None:
    model = plain("gpt2_like")
    view, task = everywhere(model), pairs_task(model)
    result = ma.activation_patching(view, task, sites=NEW, progress=False)
    assert result.signed["resid_post_latents"].axes == ("layer", "pos", "latent")
    assert result.signed["resid_post_latents"].shape == (2, 5, 7)
    assert result.signed["resid_post_error"].axes == ("layer", "pos")
    there = view.run(task.corrupt, record=NEW).activations
    base = view.run(task.clean, metric=task.metric).metric
    for node in (Node("resid_post_latents", 0, 2, neuron=3), Node("resid_post_error", 1, 4)):
        chosen = {} if node.neuron is None else {"neurons": [node.neuron]}
        x = there[node.site, node.layer].values[:, [node.pos]]
        x = x if node.neuron is None else x[..., [node.neuron]]
        edit = Edit(node.site, Set(x), layers=[node.layer], positions=[node.pos], **chosen)
        effect = view.run(task.clean, edits=[edit], metric=task.metric).metric - base
        assert float(effect.abs().max()) > 1e-6
        assert result.value(node, "signed") == pytest.approx(float(effect.mean()), abs=1e-12)  # float64 rounding
        assert result.value(node) == pytest.approx(float(effect.abs().mean()), abs=1e-12)
    again = ma.activation_patching(view, task, nodes=result.top(5), progress=False)
    assert [again.value(node) for node in result.top(5)] == pytest.approx([result.value(n) for n in result.top(5)])
    assert Node("resid_post_latents", 0, 2, neuron=3).label == "L0N3 resid_post_latents"
    assert set(result.to_pandas()["site"]) == set(NEW)


class Linear(Turned):
    """Latents of a part of the space, so that something is left over."""

    def encode(self, x: Tensor) -> Tensor:
        return x @ self.basis[:, :5]

    def decode(self, f: Tensor) -> Tensor:
        return f @ self.basis[:, :5].T


@pytest.mark.parametrize("variant", ["atp", "hedged"])
def test_estimates_are_exact_in_a_linear_network(variant: str) -> None:
    model = plain("linear")
    view = model.with_dictionaries(
        [dictionary(model, host, i, Linear) for i in range(2) for host in ("resid_post", "mlp_out")]
    )
    task, sites = pairs_task(model), (*NEW, "mlp_out_latents", "mlp_out_error")
    exact = ma.activation_patching(view, task, sites=sites, progress=False)
    found = ma.attribution_patching(view, task, sites=sites, variant=variant, progress=False)
    for site in sites:
        assert exact.signed[site].values.abs().max() > 1e-3
        torch.testing.assert_close(found.signed[site].values, exact.signed[site].values, rtol=0, atol=1e-10)  # float64


def test_drops_go_past_a_dictionary_in_the_middle_of_a_block() -> None:
    model = plain("gpt2_like")
    view, task = everywhere(model), pairs_task(model)
    with pytest.raises(UnsupportedFeatureError, match=r"(?s)resid_mid.*use variant='atp', or unit='sublayer'"):
        ma.attribution_patching(view, task, sites="resid_mid_latents", variant="graddrop", progress=False)
    for settings in ({"variant": "atp"}, {"variant": "graddrop", "unit": "sublayer"}):
        found = ma.attribution_patching(view, task, sites="resid_mid_latents", progress=False, **settings)
        assert found.scores["resid_mid_latents"].values.any()


@pytest.mark.parametrize("kind", ["plain", "gpt2", "lens"])
def test_steering(kind: str) -> None:
    model = (
        families.hooked("gpt2") if kind == "gpt2" else plain("gpt2_like") if kind == "plain" else backends.lens("llama")
    )
    view = model.with_dictionaries([dictionary(model, "resid_post", 0)])
    batch, sae = tokens(model), view._dictionaries["blocks.0.hook_resid_post"]
    latent = Edit("resid_post_latents", Add(30.0), neurons=[2], positions="generated")
    direction = 30.0 * sae.decode.__self__.down.detach()[2]
    wanted = model.generate(
        batch,
        edits=[Edit("resid_post", Add(direction), layers=[0], positions="generated")],
        max_new_tokens=6,
        do_sample=False,
    )
    found = view.generate(batch, edits=[latent], max_new_tokens=6, do_sample=False)
    assert torch.equal(found.tokens, wanted.tokens)
    assert not torch.equal(found.tokens, model.generate(batch, max_new_tokens=6, do_sample=False).tokens)


def test_edits_of_latents_are_checked() -> None:
    model = plain("gpt2_like")
    view, batch = everywhere(model), tokens(model)
    with pytest.raises(
        SettingError, match=r"neurons=\[7\]\n  found: the axis latent of .*hook_sae_acts_post has 0 to 6"
    ):
        view.run(batch, edits=[Edit("resid_post_latents", Scale(0.0), neurons=[7])])
    with pytest.raises(SettingError, match="neuron 7: latent runs from 0 to 6"):
        ma.activation_patching(view, pairs_task(model), nodes=[Node("resid_post_latents", 0, 1, neuron=7)])
    with pytest.raises(UnknownSiteError, match="site 'resid_post_latents'\n  found: this model has no such site"):
        model.run(batch, record="resid_post_latents")


@pytest.mark.parametrize("kind", ["plain", "gpt2"])
def test_checkpointed_runs_give_the_same(kind: str) -> None:
    model = model_of(kind)
    view, batch = everywhere(model), tokens(model)
    sites = [name for name in view.sites() if "sae" in name or name.endswith("resid_pre")]
    runs = [view.run(batch, record=sites, metric=families.probe, gradients=sites, checkpoint=c) for c in (False, True)]
    for name in sites:
        assert torch.equal(runs[0].activations[name].values, runs[1].activations[name].values)
        torch.testing.assert_close(
            runs[0].gradients[name].values, runs[1].gradients[name].values, rtol=1e-9, atol=1e-9
        )  # float64, another order of sums


@pytest.mark.parametrize("kind", ("t5", "bart"))
def test_the_decoder_of_an_encoder_decoder_model(kind: str) -> None:
    model, batch = families.hooked(kind, torch.float64), families.ragged_of(kind)
    view = model.with_dictionaries([dictionary(model, "mlp_out", 1)])
    sites = ("mlp_out_latents", "mlp_out_error", "cross_z")
    run = view.run(batch, record=sites)
    whole = [Edit(name, Set(run.activations[name, 1].values)) for name in view.sites() if "sae" in name]
    assert torch.equal(run.logits, model.run(batch).logits)
    again = view.run(batch, edits=whole).logits  # what was there, put there
    real = batch.mask
    torch.testing.assert_close(again[real], run.logits[real], rtol=0, atol=1e-9)  # float64 rounding
    off = view.run(batch, edits=[Edit("mlp_out_latents", Scale(0.0))]).logits
    assert float((off - run.logits)[real].abs().max()) > 1e-3  # control: they are part of the path


def test_runs_leave_no_tensor_alive() -> None:
    model = model_of("gpt2")
    view, batch = everywhere(model), tokens(model)

    def run() -> None:
        sites, edit = ("resid_post_latents", "mlp_out_error", "resid_pre"), Edit("mlp_out_latents", Scale(2.0))
        view.run(batch, edits=[edit], metric=families.probe, gradients=sites, record=sites)

    def live() -> int:
        return sum(issubclass(type(x), Tensor) for x in gc.get_objects())

    run()
    gc.collect()
    before = live()
    gc.disable()  # what is left then is held by a cycle or by the model
    try:
        for _ in range(20):
            run()
        assert live() <= before
    finally:
        gc.enable()


def test_traces_are_refused() -> None:
    with pytest.raises(UnsupportedFeatureError, match=r"(?s)1 dictionaries.*runs traces.*use backend='hf'"):
        backends.backend_model("nnsight-gpt2").with_dictionaries([dictionary(families.hooked("gpt2"), "resid_post", 0)])


def test_results_of_other_dictionaries_are_told_apart() -> None:
    model = plain("gpt2_like")
    batch, made = tokens(model), dictionary(model, "resid_post", 0)
    view = model.with_dictionaries([made])
    cache = record(view, batch, NEW)
    check_belongs(cache, view)
    other = Sae(model.info.d_model, seed=1)
    changed = Dictionary(encode=other.encode, decode=other.decode, site="resid_post", layer=0)
    with pytest.raises(MismatchError, match="the result was made with dictionary"):
        check_belongs(cache, model.with_dictionaries([changed]))
    assert "dictionary_hash" not in model.fingerprint()
    assert view.fingerprint()["weight_hash"] == model.fingerprint()["weight_hash"]
    more = view.with_dictionaries([dictionary(model, "resid_post", 1)])
    assert sum("hook_sae_acts_post" in name for name in more.sites()) == 2


def bad(encode: Any = None, decode: Any = None, **more: Any) -> Dictionary:
    made = Sae(8)
    given = {"site": "resid_post", "layer": 0, **more}
    return Dictionary(encode=encode or made.encode, decode=decode or made.decode, **given)


WRONG = [
    (lambda: [bad(site="z")], "a dictionary at 'z'\n  found: no host of dictionaries"),
    (lambda: [bad(encode=3)], "encode=3\n  fix: give two functions"),
    (lambda: [bad(reads="pattern")], "a dictionary that reads 'pattern'"),
    (lambda: [bad(layer=1.5)], "a dictionary of layer 1.5"),
    (lambda: [bad(layer=9)], "(?s)a dictionary at blocks.9.hook_resid_post.*has 2 layers with embed"),
    (lambda: [bad(site="attn_out", reads="mlp_post")], "mlp.hook_post is computed after blocks.0.hook_attn_out"),
    (lambda: [], "an empty list"),
    (lambda: bad(), "give a list of Dictionary"),
    (lambda: [bad(), bad()], "two dictionaries at blocks.0.hook_resid_post"),
    (lambda: [bad(), bad(encode=lambda x: x, decode=lambda f: f, layer=1)], "8 latents at layer 1 and 7 at another"),
    (lambda: [bad(encode=lambda x: x.float())], r"encode of torch.float64 .* returned torch.float32"),
    (lambda: [bad(encode=lambda x: x @ torch.ones(3))], "(?s)encode of .* fails: .*fix: encode .batch, pos, d."),
    (lambda: [bad(encode=lambda x: None)], "returned a NoneType"),
    (lambda: [bad(encode=lambda x: x[0], name="mine")], r"'mine' at .*\n  found: encode of .* returned .* \(2, 8\)"),
    (
        lambda: [bad(encode=lambda x: x, decode=lambda f: f[..., :3])],
        r"decode of .* returned torch.float64 \(1, 2, 3\)",
    ),
    (lambda: [bad(encode=lambda x: x / 0)], "returned NaN or infinity"),
    (lambda: [bad(encode=lambda x: x + torch.rand(8), decode=lambda f: f)], "another value the second time"),
]


@pytest.mark.parametrize(("make", "text"), WRONG, ids=[text[:30] for _, text in WRONG])
def test_what_does_not_fit_is_refused(make: Any, text: str) -> None:
    with pytest.raises(SettingError, match=text):
        plain("gpt2_like").with_dictionaries(make())
