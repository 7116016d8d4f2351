"""Backward rules: the forward pass stays, and at every site of every family each rule's equation holds (E14)."""

from __future__ import annotations

from dataclasses import replace

import families
import pytest
import torch
from rules_cases import ATTN, CP, EVERY, GIM, RELP, Tempered, allowed, close, real
from torch import Tensor
from torch.nn import functional as F

from mechattr.errors import SettingError
from mechattr.models import Batch, HookedHF, PlainConfig, Rules, plain_copy, plain_model, rules
from mechattr.models.attention import AttentionTap, _explicit
from mechattr.models.edits import Frame
from mechattr.models.taps import Taps
from mechattr.sites import full_name, parse

TOGETHER = replace(GIM, activation="secant", gate="detached", softcap="secant", router="detached", temperature=3.0)
every_family = pytest.mark.parametrize("family", families.FAMILIES)


def reachable(model: HookedHF, rule: Rules) -> Rules:
    """The rule, without what acts inside experts where no rule reaches that, and on linear layers of experts."""
    found = replace(rule, activation="full", gate="full") if model.info.family == "gpt_oss" else rule
    found = replace(found, linear_epsilon=0.0, linear_gamma=0.0) if model.info.n_experts else found
    assert model.supports(found) and model.supports(rule) == (found == rule)
    return found


# -- the forward pass


def assert_forward_unchanged(model, batch: Batch, *rules: Rules) -> None:
    plain, recorded = model.run(batch), {}
    for rule in rules:
        given = {"metric": families.probe, "gradients": "resid_pre", "rules": rule}
        assert torch.equal(model.run(batch, **given).logits[batch.mask], plain.logits[batch.mask])
        sites = tuple(allowed(model.sites(), rule))
        ruled = model.run(batch, record=sites, **given)
        if sites not in recorded:
            recorded[sites] = model.run(batch, record=sites).activations
        for site, x in recorded[sites].items():
            found = ruled.activations[site]
            assert torch.equal(real(found.values, found.axes, batch), real(x.values, x.axes, batch)), site


@every_family
def test_the_forward_pass_is_the_same_to_the_last_bit(family):
    model = families.hooked(family)
    assert_forward_unchanged(model, families.ragged("left"), *(reachable(model, rule) for rule in EVERY))


@pytest.mark.parametrize("kind", ["gpt2_like", "llama_like", "attention_only", "linear"])
def test_the_forward_pass_of_a_plain_network_is_the_same_to_the_last_bit(kind):
    assert_forward_unchanged(plain_model(getattr(PlainConfig, kind)(d_vocab=61)), families.ragged("left"), *EVERY)


def test_control_a_rule_that_acts_on_values_is_seen(monkeypatch):
    monkeypatch.setattr(rules, "frozen_like", lambda exact, linear: linear)
    for model in (families.hooked("llama"), plain_model(PlainConfig.llama_like(d_vocab=61))):
        for rule in (Rules(gate="half"), Rules(temperature=3.0), Rules(v_factor=0.5)):
            with pytest.raises(AssertionError):
                assert_forward_unchanged(model, families.ragged("left"), rule)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3"])
def test_a_model_loaded_with_sdpa_obeys_the_same_rules(family):
    fused, eager, batch = families.hooked(family, attention="sdpa"), families.hooked(family), families.ragged("left")
    for rule in EVERY:
        one, two = (m.run(batch, metric=families.probe, gradients="resid_pre", rules=rule) for m in (fused, eager))
        close(one.logits[batch.mask], two.logits[batch.mask], 1e-5)  # float32, another order of sums
        for site, x in two.gradients.items():
            close(one.gradients[site].values[batch.mask], x.values[batch.mask], 1e-4)  # the same, magnified once more
        if not rule.in_softmax:  # the fused kernel itself runs
            assert torch.equal(one.logits[batch.mask], fused.run(batch).logits[batch.mask])


# -- every family, site by site


def _gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def cap_slope(capped: Tensor, softcap: float, rule: Rules) -> Tensor:
    """What a cap passes on, from what it made of a score; 0 at masked scores."""
    inside = (capped / softcap).where(capped > -1e30, 0)
    if rule.softcap == "secant":
        return inside / torch.atanh(inside)
    return 1 - inside**2


def assert_site_by_site(model, family: str, ran: Rules, said: Rules) -> None:
    """The gradient at each site follows by `said` from that at the next one, in a run under `ran`."""
    batch = Batch.of(families.tokens(2, 6))
    run = model.run(batch, record=model.sites(), metric=families.probe, gradients=model.sites(), rules=ran)
    for layer in range(model.info.n_layers):
        x, g = (
            {parse(n)[0]: t.values for n, t in c.items() if parse(n)[1] == layer}
            for c in (run.activations, run.gradients)
        )
        if "mlp_pre" in x:
            z = x["mlp_pre"].clone().requires_grad_(True)
            learned = family == "apertus"  # in every block
            a = (model.model.model.layers[layer].mlp.act_fn if learned else families.activation(family))(z)
            (slope,) = torch.autograd.grad(a.sum(), z)
            slope, a = (a.detach() / z.detach() if said.activation == "secant" else slope), a.detach()
            share = 0.5 if said.gate == "half" and model.info.gated else 1.0
            passes = 0.0 if said.gate == "detached" and model.info.gated else share
            close(g["mlp_pre"], g["mlp_post"] * passes * slope * x.get("mlp_pre_linear", torch.ones(())), 1e-9)
            if model.info.gated:
                close(g["mlp_pre_linear"], g["mlp_post"] * share * a, 1e-9)
        groups = model.info.n_heads // model.info.n_kv_heads
        v = torch.einsum("bhqk,bqhd->bkhd", x["pattern"], g["z"]).unflatten(2, (-1, groups)).sum(3)
        close(g["v"], said.v_factor * v, 1e-9)
        form = model.attention(layer)
        logits = x["attn_scores"]
        if form.sinks is not None:
            logits = torch.cat([logits, form.sinks[None, :, None, None].expand(*logits.shape[:3], 1)], -1)
        p = torch.softmax(logits / said.temperature, -1)[..., : x["attn_scores"].shape[-1]]
        scores = p * (g["pattern"] - (p * g["pattern"]).sum(-1, keepdim=True)) * (said.pattern == "full")
        close(g["attn_scores"], scores, 1e-9)
        scores = (
            scores * form.scaling * (1 if form.softcap is None else cap_slope(x["attn_scores"], form.softcap, said))
        )
        scores = scores.where(x["attn_scores"] > -1e30, 0)
        keys = x["rot_k"].repeat_interleave(groups, 2)
        close(g["rot_q"], said.qk_factor * torch.einsum("bhqk,bkhd->bqhd", scores, keys), 1e-9)
        to_keys = torch.einsum("bhqk,bqhd->bkhd", scores, x["rot_q"]).unflatten(2, (-1, groups)).sum(3)
        close(g["rot_k"], said.qk_factor * to_keys, 1e-9)


@every_family
def test_every_family_obeys_the_rules_site_by_site(family):
    """Each rule once: what excludes each other is in one of two."""
    with families.widened():
        model = families.hooked(family, torch.float64)
        together = reachable(model, TOGETHER)
        for rule in (reachable(model, RELP), together):
            assert_site_by_site(model, family, rule, rule)
        with pytest.raises(AssertionError):  # control
            assert_site_by_site(model, family, together, replace(together, temperature=1.0))


# slow: all families are in the test above, and one of each shape of block is here
@pytest.mark.parametrize(
    "family", [n if n in families.SHAPES else pytest.param(n, marks=pytest.mark.slow) for n in families.FAMILIES]
)
def test_presets_and_controls_site_by_site(family):
    with families.widened():
        model = families.hooked(family, torch.float64)
        for rule in (RELP, replace(GIM, activation="secant", temperature=3.0), Rules(), CP, ATTN):
            assert_site_by_site(model, family, reachable(model, rule), reachable(model, rule))
        gim = reachable(model, GIM)
        for said in (replace(gim, qk_factor=1.0), replace(gim, v_factor=1.0), replace(gim, temperature=1.0)):
            with pytest.raises(AssertionError):  # controls
                assert_site_by_site(model, family, gim, said)
        if not model.info.n_experts:
            with pytest.raises(AssertionError):
                assert_site_by_site(model, family, RELP, replace(RELP, activation="full"))
        if model.info.gated and not model.info.n_experts:
            with pytest.raises(AssertionError):
                assert_site_by_site(model, family, CP, replace(CP, gate="full"))
        if model.attention(0).softcap is not None:
            with pytest.raises(AssertionError):
                assert_site_by_site(model, family, ATTN, replace(ATTN, softcap="full"))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_plain_and_transformers_agree_at_every_site(family):
    with families.widened():
        model, batch = HookedHF(families.model(family, torch.float64)), families.ragged("left")
        copied = plain_copy(model)
        tolerance = 1e-9 if family == "gpt2" else 1e-5  # all float64, but for Llama's rotary frequencies
        for rule in EVERY:
            one, two = (
                m.run(batch, metric=families.probe, gradients=allowed(copied.sites(), rule), rules=rule)
                for m in (model, copied)
            )
            for site, x in one.gradients.items():
                found = two.gradients[site]
                close(real(found.values, x.axes, batch), real(x.values, x.axes, batch), tolerance)


def test_sinks_take_part_in_the_softmax_on_the_way_back():
    """An attention call with one sink a head, against the written-out softmax over keys and sink together."""
    q, k, v = (torch.randn(1, 2, 3, 4, dtype=torch.float64) for _ in range(3))
    g = torch.randn(1, 3, 2, 4, dtype=torch.float64)
    sinks = torch.tensor([0.5, 2.0], dtype=torch.float64)
    whole = torch.arange(3)[None]
    for temperature in (1.0, 3.0):
        taps = Taps(Frame(torch.tensor([3]), whole, whole), rules=Rules(temperature=temperature))
        tap = AttentionTap(taps, "blocks.0.attn.hook_", True, False)
        x = q.clone().requires_grad_(True)
        out, _ = _explicit(tap, x, k, v, None, s_aux=sinks)
        (found,) = torch.autograd.grad(out, x, g)
        scores = torch.cat([x @ k.mT / 2, sinks[None, :, None, None].expand(1, 2, 3, 1)], -1)
        out = (Tempered.apply(scores, temperature, False)[..., :3] @ v).transpose(1, 2)
        (wanted,) = torch.autograd.grad(out, x, g)
        close(found, wanted)
    alone = torch.softmax(q @ k.mT / 2, -1)  # control: the sink left out
    assert (alone.sum(-1) - torch.softmax(scores.detach(), -1)[..., :3].sum(-1)).abs().max() > 0.1


# -- the values themselves


@pytest.mark.parametrize("act", [F.silu, F.gelu, _gelu, F.relu])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_secant_is_defined_at_zero(act, dtype):
    z = torch.tensor([0.0, -0.0, 1e-320, -1e-41, 1e-7, -2.0, 3.0], dtype=dtype).requires_grad_(True)
    y = act(z)
    ruled = rules.secant(act, z, y)
    assert torch.equal(ruled, y)
    (slope,) = torch.autograd.grad(ruled.sum(), z)
    limit = 1.0 if act is F.relu else 0.5
    torch.testing.assert_close(slope[:3], torch.full((3,), limit, dtype=dtype), rtol=1e-2, atol=0)  # bfloat16: 8 bits
    torch.testing.assert_close(slope[5:], (y / z)[5:].detach(), rtol=0, atol=0)
    assert slope.isfinite().all()


def test_presets_and_json():
    assert RELP.to_json() == {"norm": "frozen", "activation": "secant", "gate": "half", "pattern": "detached"}
    assert GIM.to_json() == {"norm": "frozen", "gate": "half", "temperature": 2.0, "qk_factor": 0.25, "v_factor": 0.5}
    assert CP.to_json() == {**RELP.to_json(), "gate": "detached", "router": "detached"}
    halves = {"gate": "half", "softcap": "secant", "router": "detached", "qk_factor": 0.25, "v_factor": 0.5}
    assert ATTN.to_json() == {"norm": "frozen", "activation": "secant", **halves}
    assert Rules().to_json() == {}
    for rule in EVERY:
        assert Rules(**rule.to_json()) == rule
    assert plain_model(PlainConfig()).supports(RELP)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (
            {"activation": "secants"},
            r"Rules\(activation='secants'\)\n  found: no such rule\n  fix: did you mean 'secant'",
        ),
        ({"gate": "halve"}, r"Rules\(gate='halve'\)\n  found: no such rule\n  fix: did you mean 'half'"),
        ({"pattern": 3}, r"Rules\(pattern=3\)\n  found: no such rule"),
        ({"temperature": 0.0}, r"Rules\(temperature=0.0\)\n  found: no positive number\n  fix: 1.0 leaves"),
        ({"qk_factor": float("nan")}, r"Rules\(qk_factor=nan\)\n  found: no positive number"),
        ({"v_factor": "half"}, r"Rules\(v_factor='half'\)\n  found: no positive number"),
        ({"v_factor": True}, r"Rules\(v_factor=True\)\n  found: no positive number"),
        ({"linear_gamma": -0.1}, r"Rules\(linear_gamma=-0.1\)\n  found: no number from 0\n  fix: 0.0 leaves"),
        ({"linear_epsilon": float("inf")}, r"Rules\(linear_epsilon=inf\)\n  found: no number from 0"),
        (
            {"pattern": "detached", "temperature": 2.0},
            r"temperature or qk_factor\n  found: nothing flows back through a detached pattern\n  fix: choose one",
        ),
    ],
)
def test_wrong_rules_are_refused(given, text):
    with pytest.raises(SettingError, match=text):
        Rules(**given)


# fused projections, experts, shared experts, a prediction head, an encoder beside the decoder, sinks
@pytest.mark.parametrize("family", ["phi3", "mixtral", "qwen2_moe", "bert", "t5", "gpt_oss"])
def test_rules_leave_nothing_behind(family):
    model, batch = families.hooked(family), families.ragged_of(family, "left")

    def modules() -> list[tuple[str, list[str], int]]:
        found = [(name, m.__dict__) for name, m in model.model.named_modules()]
        return [(n, sorted(d), len(d["_forward_hooks"]) + len(d["_forward_pre_hooks"])) for n, d in found]

    before, names = model.run(batch, metric=families.probe, gradients="embed").gradients["embed"].values, modules()
    with pytest.raises(ZeroDivisionError):
        model.run(batch, metric=lambda logits, b: 1 / 0, gradients="embed", rules=reachable(model, RELP))
    for rule in (GIM, CP, ATTN):
        ruled = model.run(batch, metric=families.probe, gradients="embed", rules=reachable(model, rule))
        assert not torch.equal(ruled.gradients["embed"].values, before)
    assert modules() == names
    again = model.run(batch, metric=families.probe, gradients="embed").gradients["embed"].values
    assert torch.equal(again, before)


def test_queries_and_keys_get_nothing_through_a_detached_pattern():
    model, batch = families.hooked("llama"), Batch.of(families.tokens())
    run = model.run(batch, metric=families.probe, gradients=("q", "k", "pattern", "v"), rules=RELP)
    for layer in range(2):
        assert not run.gradients[full_name("q", layer)].values.any()
        assert not run.gradients[full_name("k", layer)].values.any()
        assert run.gradients[full_name("pattern", layer)].values.any()
        assert run.gradients[full_name("v", layer)].values.any()
