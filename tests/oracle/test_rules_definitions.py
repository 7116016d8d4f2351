"""Backward rules against their slow definition, against a network worked out by hand, and what they conserve."""

from __future__ import annotations

from dataclasses import replace

import families
import pytest
import torch
from rules_cases import EVERY, GIM, RELP, Tempered, close
from torch import Tensor
from torch.nn import functional as F

from mechattr.models import Batch, PlainConfig, Rules, plain_model


def name(value: Rules) -> str:
    return ",".join(f"{k}={v}" for k, v in value.to_json().items())


every_rule = pytest.mark.parametrize("rule", EVERY, ids=name)


# -- the slow definition: a network whose pieces are detached or rescaled by hand


class Messages(torch.autograd.Function):
    """A linear layer that passes relevance on message by message: c_jk = x_j w_jk, times 1 + gamma where it has the
    sign of y_k, carries c_jk / (sum_j c_jk + b_k) of the relevance of k, and the bias likewise."""

    @staticmethod
    def forward(ctx, x, weight, bias, rule, wrong):
        y = x @ weight + bias
        ctx.save_for_backward(x, weight, bias, y)
        ctx.rule, ctx.wrong = rule, wrong
        return y

    @staticmethod
    def backward(ctx, g):
        x, weight, bias, y = ctx.saved_tensors
        messages = torch.cat([x[:, :, None] * weight, bias.expand(len(x), 1, -1)], 1)  # [pos, in + bias, out]
        gamma = 0.0 if ctx.wrong == "a linear layer without gamma" else ctx.rule.linear_gamma
        messages = messages * (1 + gamma * (messages * y[:, None] > 0))
        total = messages.sum(1, keepdim=True)
        sign = 1.0 if ctx.wrong == "an unsigned stabiliser" else 1 - 2 * (total < 0).to(total.dtype)
        relevance = messages / (total + ctx.rule.linear_epsilon * sign) * (y * g)[:, None]
        if ctx.wrong == "a bias that takes nothing":
            relevance = messages / messages[:, :-1].sum(1, keepdim=True) * (y * g)[:, None]
        return relevance[:, :-1].sum(2) / x, None, None, None, None


WRONG = {
    "an unsigned stabiliser": Rules(linear_epsilon=0.1),
    "a linear layer without gamma": Rules(linear_gamma=0.25),
    "a bias that takes nothing": Rules(linear_gamma=0.25),
    "the 1/T of a softmax at T": GIM,
    "the slope in place of the secant": RELP,
    "half at one factor only": RELP,
    "the factor of q and k at v": GIM,
    "scores detached, pattern not": replace(RELP, pattern="full"),
    "the centring frozen with the scale": Rules(norm="frozen"),
    "a gate that is not detached": Rules.cp_lrp(),
    "the skip path held as well": replace(RELP, hold=frozenset({1})),
}


def logits_by_hand(model, tokens: Tensor, x: Tensor, rule: Rules, wrong: str = "") -> Tensor:
    """[pos, d_vocab] of one row from its residual stream [pos, d_model] before the first block."""
    c, w, n = model.config, model._weights, len(tokens)

    def norm(x, at):
        mean = x.mean(-1, keepdim=True) if c.norm == "layer" else torch.zeros(())
        mean = mean.detach() if wrong == "the centring frozen with the scale" else mean
        scale = ((x - mean).pow(2).mean(-1, keepdim=True) + c.eps).sqrt()
        y = (x - mean) / (scale.detach() if rule.norm == "frozen" else scale) * w[at + ".w"]
        return y + w[at + ".b"] if c.norm == "layer" else y

    def act(z):
        y = F.silu(z) if c.activation == "silu" else F.gelu(z, approximate="tanh")
        secant = rule.activation == "secant" and wrong != "the slope in place of the secant"
        return z * (y / z).detach() if secant else y

    def linear(x, weight, bias):
        return Messages.apply(x, weight, bias, rule, wrong)

    def project(x, weight, bias):
        return torch.stack([linear(x, *head) for head in zip(weight, bias, strict=True)], 1)

    def half(y):
        return y / 2 + (y / 2).detach()

    def times(x, factor):
        return factor * x + (1 - factor) * x.detach()

    def rotated(x):
        i = torch.arange(c.d_head // 2, dtype=x.dtype)
        angle = torch.arange(n, dtype=x.dtype)[:, None, None] * c.rope_theta ** (-2 * i / c.d_head)
        turned = torch.complex(*x.chunk(2, -1)) * torch.polar(torch.ones_like(angle), angle)
        return torch.cat([turned.real, turned.imag], -1)

    for layer in range(c.n_layers):
        p = f"blocks.{layer}."
        y = norm(x, p + "ln1")
        q, k, v = (project(y, w[f"{p}attn.W_{i}"], w[f"{p}attn.b_{i}"]) for i in "QKV")
        q, k = (rotated(q), rotated(k)) if c.positions == "rotary" else (q, k)
        v_factor = rule.qk_factor if wrong == "the factor of q and k at v" else rule.v_factor
        q, k, v = times(q, rule.qk_factor), times(k, rule.qk_factor), times(v, v_factor)
        k, v = (t.repeat_interleave(c.n_heads // c.n_kv_heads, 1) for t in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) / c.d_head**0.5
        scores = scores.masked_fill(torch.ones(n, n).triu(1).bool(), -1e300)
        scores = scores.detach() if wrong == "scores detached, pattern not" else scores
        pattern = Tempered.apply(scores, rule.temperature, wrong == "the 1/T of a softmax at T")
        pattern = pattern.detach() if rule.pattern == "detached" else pattern
        z = torch.einsum("hqk,khd->qhd", pattern, v)
        write = linear(z.flatten(1), w[p + "attn.W_O"].flatten(0, 1), w[p + "attn.b_O"])
        if layer in rule.hold and wrong == "the skip path held as well":
            x = x.detach() + 0 * x
        x = x + (write.detach() if layer in rule.hold else write)
        y = norm(x, p + "ln2")
        if c.gated:
            u = linear(y, w[p + "mlp.W_in"], w[p + "mlp.b_in"])
            a = act(linear(y, w[p + "mlp.W_gate"], w[p + "mlp.b_gate"]))
            m = (a.detach() if rule.gate == "detached" and wrong != "a gate that is not detached" else a) * u
            if rule.gate == "half":
                m = half(a) * u if wrong == "half at one factor only" else half(m)
        else:
            m = act(linear(y, w[p + "mlp.W_in"], w[p + "mlp.b_in"]))
        write = linear(m, w[p + "mlp.W_out"], w[p + "mlp.b_out"])
        x = x + (write.detach() if layer in rule.hold else write)
    return norm(x, "ln_final") @ w["unembed.W_U"] + w["unembed.b_U"]


def assert_as_by_hand(model, rule: Rules, wrong: str = "") -> None:
    batch = Batch.of(families.tokens(1, 6) % 31)
    run = model.run(batch, record="resid_pre", metric=families.probe, gradients="resid_pre", rules=rule)
    x = run.activations["resid_pre", 0].values[0].clone().requires_grad_(True)
    logits = logits_by_hand(model, batch.tokens[0], x, rule, wrong)
    close(logits.detach(), run.logits[0])
    (wanted,) = torch.autograd.grad(families.probe(logits[None], batch).sum(), x)
    close(run.gradients["resid_pre", 0].values[0], wanted)


@pytest.mark.parametrize("kind", ["gpt2_like", "llama_like"])
@every_rule
def test_the_backward_pass_is_the_slow_definition(kind, rule):
    assert_as_by_hand(plain_model(getattr(PlainConfig, kind)()), rule)


@pytest.mark.parametrize("wrong", WRONG)
def test_control_wrong_definitions_are_seen(wrong):
    kind = "gpt2_like" if "centring" in wrong else "llama_like"
    with pytest.raises(AssertionError):
        assert_as_by_hand(plain_model(getattr(PlainConfig, kind)()), WRONG[wrong], wrong)


def test_every_rule_changes_the_gradient():
    model, batch = plain_model(PlainConfig.llama_like()), Batch.of(families.tokens() % 31)
    full = model.run(batch, metric=families.probe, gradients="resid_pre").gradients["resid_pre", 0].values
    for rule in EVERY:
        ruled = model.run(batch, metric=families.probe, gradients="resid_pre", rules=rule).gradients["resid_pre", 0]
        changed = bool((ruled.values - full).abs().max() > 1e-3 * full.abs().max())
        assert changed == (rule not in (Rules(softcap="secant"), Rules(router="detached"))), rule  # there are none here


@pytest.mark.parametrize("wrong", ["", "whole", "slope"])
def test_relevance_patching_of_one_gated_mlp_worked_out_by_hand(wrong):
    """x + b_O + (a(z) u) W_out with z = x W_gate, u = x W_in: no norm, and attention writes its bias only."""
    config = PlainConfig.llama_like(n_layers=1, norm="none", positions="none", d_mlp=5)
    zero = {f"blocks.0.attn.{n}": torch.zeros_like(t) for n, t in _attention(config).items()}
    model, batch = plain_model(config, zero), Batch.of(torch.tensor([[3]]))
    w = {n.removeprefix("blocks.0."): t for n, t in model._weights.items()}
    target = torch.randn(31, dtype=torch.float64)
    x = w["embed.W_E"][3] + w["attn.b_O"]
    z, u = (x @ w[f"mlp.W_{n}"] + w[f"mlp.b_{n}"] for n in ("gate", "in"))
    g = w["unembed.W_U"] @ target
    at_post = w["mlp.W_out"] @ g
    sigma = 1 / (1 + torch.exp(-z))
    slope = sigma * (1 + z * (1 - sigma)) if wrong == "slope" else sigma  # silu(z) / z
    share = 1.0 if wrong == "whole" else 0.5
    by_hand = g + w["mlp.W_gate"] @ (share * slope * u * at_post) + w["mlp.W_in"] @ (share * z * sigma * at_post)
    run = model.run(batch, metric=lambda out, b: out[:, 0] @ target, gradients="embed", rules=RELP)
    found = run.gradients["embed"].values[0, 0]
    if wrong:
        with pytest.raises(AssertionError):
            close(found, by_hand)
    else:
        close(found, by_hand)


def _attention(config: PlainConfig) -> dict[str, Tensor]:
    h, k, m, d = config.n_heads, config.n_kv_heads, config.d_model, config.d_head
    return {"W_V": torch.zeros(k, m, d), "b_V": torch.zeros(k, d), "W_O": torch.zeros(h, d, m)}


# -- conservation


def lost(model, batch: Batch, rule: Rules) -> float:
    """The largest |metric - sum of activation times gradient| at any block's input, relative to the largest metric."""
    run = model.run(batch, record="resid_pre", metric=families.probe, gradients="resid_pre", rules=rule)
    gaps = [
        (x.values * run.gradients[site].values)[batch.mask].sum() - run.metric.sum()
        for site, x in run.activations.items()
    ]
    return float(torch.stack(gaps).abs().max() / run.metric.abs().max())


def without_biases(kind: str):
    model = plain_model(getattr(PlainConfig, kind)(d_vocab=61))
    biases = {n: torch.zeros_like(t) for n, t in model._weights.items() if ".b_" in n or n.endswith(".b")}
    return plain_model(model.config, {**model._weights, **biases})


@pytest.mark.parametrize("kind", ["gpt2_like", "llama_like"])
def test_relevance_is_conserved_without_biases(kind):
    model, batch = without_biases(kind), families.ragged("right")
    assert lost(model, batch, RELP) < 1e-10  # float64
    for field in ("norm", "activation", "pattern", *(["gate"] if kind == "llama_like" else [])):  # controls
        assert lost(model, batch, replace(RELP, **{field: "full"})) > 1e-2, field
    assert lost(plain_model(PlainConfig.gpt2_like(d_vocab=61)), batch, RELP) > 1e-2  # biases take their part


@pytest.mark.parametrize("family", ["mistral", "phi3", "olmo2", "gemma3"])
def test_relevance_is_conserved_in_families_without_biases(family):
    """Grouped queries, a fused gate, norms of q and k, and norms after the writes."""
    with families.widened():
        model, batch = families.hooked(family, torch.float64), Batch.of(families.tokens())
        assert lost(model, batch, RELP) < 1e-10  # float64 throughout
        for field in ("norm", "activation", "pattern", "gate"):
            assert lost(model, batch, replace(RELP, **{field: "full"})) > 1e-2, field
