"""Rules of relevance written out as such: messages, products and softmaxes, in full T x T tensors."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import families
import pytest
import torch
from rules_cases import ATTN, CP, close
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mechattr.models import Batch, HookedHF, PlainConfig, Rules, plain_model
from mechattr.models.linear_rules import linear_rule

# -- one linear layer


def layer(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs of both signs and one zero, a weight, a bias and relevance."""
    noise = torch.Generator().manual_seed(seed)
    x, weight, bias, r = (
        torch.randn(size, generator=noise, dtype=torch.float64) for size in ((7, 5), (5, 6), (6,), (7, 6))
    )
    x[0, 0] = 0.0
    return x, weight, bias, r


def by_rule(x: Tensor, weight: Tensor, bias: Tensor | None, r: Tensor, rules: Rules) -> Tensor:
    """Relevance of x: x times the gradient, from relevance r = y times the gradient."""
    x = x.clone().requires_grad_(True)
    y = x @ weight + (0.0 if bias is None else bias)
    ruled = linear_rule(x, weight, bias, y, rules)
    assert torch.equal(ruled, y)
    (g,) = torch.autograd.grad(ruled, x, r / y.detach())
    return (x * g).detach()


def by_messages(
    x: Tensor, weight: Tensor, bias: Tensor, r: Tensor, epsilon: float, gamma: float, wrong: str = ""
) -> Tensor:
    """The definition, number by number."""
    found = torch.zeros_like(x)
    for i, row in enumerate(x):
        for k in range(weight.shape[1]):
            y = sum(row[j] * weight[j, k] for j in range(len(row))) + bias[k]
            parts = [*(row[j] * weight[j, k] for j in range(len(row))), bias[k]]
            parts = [c * (1 + gamma) if c * y > 0 else c for c in parts]
            total = sum(parts[:-1]) if wrong == "a bias that is dropped" else sum(parts)
            signed = total + (epsilon if total >= 0 or wrong == "an unsigned stabiliser" else -epsilon)
            for j in range(len(row)):
                found[i, j] += parts[j] / signed * r[i, k]
    return found


@pytest.mark.parametrize(
    ("epsilon", "gamma"), [(0.0, 0.0), (1e-6, 0.0), (0.3, 0.0), (0.0, 0.25), (1e-6, 2.0), (0.3, 0.5)]
)
def test_a_linear_layer_is_its_messages(epsilon: float, gamma: float) -> None:
    given = layer()
    rules = Rules(linear_epsilon=epsilon, linear_gamma=gamma)
    close(by_rule(*given, rules), by_messages(*given, epsilon, gamma), 1e-12)  # float64
    for wrong in ["a bias that is dropped"] + ["an unsigned stabiliser"] * (epsilon == 0.3):
        with pytest.raises(AssertionError):  # controls
            close(by_rule(*given, rules), by_messages(*given, epsilon, gamma, wrong), 1e-12)


def test_a_stabiliser_takes_the_side_of_zero_as_positive() -> None:
    x, weight = torch.tensor([[1.0, 1.0]], dtype=torch.float64), torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    for rules in (Rules(linear_epsilon=0.1), Rules(linear_epsilon=0.1, linear_gamma=0.5), Rules(linear_gamma=0.5)):
        leaf = x.clone().requires_grad_(True)
        (g,) = torch.autograd.grad(linear_rule(leaf, weight, None, leaf @ weight, rules).sum(), leaf)
        assert not g.any()  # y = 0 has no relevance to hand on


# -- a network of ReLUs (E9)


def relus(n_layers: int = 3) -> Any:
    """A residual network of bias-free ReLU MLPs: attention writes nothing, and there are no norms."""
    config = PlainConfig(
        n_layers=n_layers, norm="none", positions="none", attention="uniform", activation="relu", d_vocab=61
    )
    model = plain_model(config)
    zero = {n: torch.zeros_like(t) for n, t in model._weights.items() if ".b_" in n or "W_O" in n}
    return plain_model(config, {**model._weights, **zero})


def relevance_of_relus(model: Any, x: Tensor, at_end: Tensor) -> Tensor:
    """LRP-0 from the residual stream after the last block down to that before the first, [pos, d_model]."""
    w, streams = model._weights, [x]
    for i in range(model.config.n_layers):
        streams.append(streams[-1] + F.relu(streams[-1] @ w[f"blocks.{i}.mlp.W_in"]) @ w[f"blocks.{i}.mlp.W_out"])
    r = at_end * streams[-1]
    for i in reversed(range(model.config.n_layers)):
        w_in, w_out = w[f"blocks.{i}.mlp.W_in"], w[f"blocks.{i}.mlp.W_out"]
        x, pre = streams[i], streams[i] @ w_in
        share = r / streams[i + 1]
        at_post = F.relu(pre) * (share @ w_out.T)  # identity at the ReLU: what is 0 has none
        r = x * share + x * ((at_post / pre.where(pre != 0, 1.0)) @ w_in.T)
    return r


def test_lrp_0_is_gradient_times_input_is_the_identity_rule_where_activations_are_relus() -> None:
    model, batch = relus(), Batch.of(families.tokens(1, 6))
    sites = ("resid_pre", "resid_post")
    found = {}
    for name, rules in (
        ("gradient", Rules()),
        ("identity", Rules(activation="secant")),
        ("epsilon 1e-6", Rules(linear_epsilon=1e-6)),
        ("epsilon 1e-9", Rules(linear_epsilon=1e-9)),
        ("gamma", Rules(linear_gamma=0.25)),
    ):
        run = model.run(batch, record=sites, metric=families.probe, gradients=sites, rules=rules)
        x = run.activations["resid_pre", 0].values[0]
        found[name] = x * run.gradients["resid_pre", 0].values[0]
    wanted = relevance_of_relus(model, x, run.gradients["resid_post", 2].values[0])
    close(found["gradient"], wanted, 1e-12)  # float64
    close(found["identity"], wanted, 1e-12)
    near, nearer = ((found[f"epsilon {e}"] - wanted).abs().max() for e in ("1e-6", "1e-9"))
    assert 0 < near < 1e-2 * wanted.abs().max()
    torch.testing.assert_close(near / nearer, torch.tensor(1e3, dtype=torch.float64), rtol=0.02, atol=0)  # linear in it
    assert (found["gamma"] - wanted).abs().max() > 1e-2  # control: another rule
    curved = plain_model(replace(model.config, activation="gelu_new"), model._weights)
    slopes, secants = (
        curved.run(batch, metric=families.probe, gradients="resid_pre", rules=rules).gradients["resid_pre", 0].values
        for rules in (Rules(), Rules(activation="secant"))
    )
    assert (slopes - secants).abs().max() > 1e-2  # control: f'(z) is f(z)/z for ReLUs only


# -- products and softmaxes (E11)


@pytest.mark.parametrize("kind", ["gpt2_like", "llama_like"])
@pytest.mark.parametrize("name", ["cp", "attn"])
def test_attention_and_gates_are_their_rules_of_relevance(kind: str, name: str) -> None:
    model, rules = plain_model(getattr(PlainConfig, kind)(d_vocab=61)), CP if name == "cp" else ATTN
    half = 1.0 if name == "cp" else 0.5
    batch = families.ragged("left")
    sites = [s for s in ("z", "v", "rot_q", "rot_k", "pattern", "attn_scores", "mlp_pre", "mlp_pre_linear", "mlp_post")]
    sites = [s for s in sites if s != "mlp_pre_linear" or model.info.gated]
    run = model.run(batch, record=sites, metric=families.probe, gradients=sites, rules=rules)
    groups = model.info.n_heads // model.info.n_kv_heads
    for at in range(model.info.n_layers):
        x = {s: run.activations[s, at].values for s in sites}
        r = {s: x[s].where(x[s] > -1e300, 0.0) * run.gradients[s, at].values for s in sites}
        v, k = (x[s].repeat_interleave(groups, 2) for s in ("v", "rot_k"))
        messages = torch.einsum("bhqk,bkhd,bqhd->bhqkd", x["pattern"], v, r["z"] / x["z"])  # A_qk v_kd of z_qd
        close(r["v"], half * messages.sum(2).transpose(1, 2).unflatten(2, (-1, groups)).sum(3))
        if name == "cp":
            assert not r["rot_q"].any() and not r["rot_k"].any()
        else:
            at_pattern = half * messages.sum(-1)
            scores = x["attn_scores"].where(x["attn_scores"] > -1e300, 0.0)  # what is masked has no relevance
            at_scores = scores * (at_pattern - x["pattern"] * at_pattern.sum(-1, keepdim=True))
            pairs = torch.einsum("bqhd,bkhd->bhqkd", x["rot_q"], k) * model.attention(at).scaling
            pairs = pairs * (at_scores / scores.where(scores != 0, 1.0))[..., None] * half  # q_d k_d of the score
            close(r["rot_q"], pairs.sum(3).transpose(1, 2))
            close(r["rot_k"], pairs.sum(2).transpose(1, 2).unflatten(2, (-1, groups)).sum(3))
            assert (at_scores.sum(-1) - at_pattern.sum(-1)).abs().max() > 1e-3  # control: a softmax leaks
        if model.info.gated:
            close(r["mlp_pre_linear"], half * r["mlp_post"])
            close(r["mlp_pre"], (1 - half) * r["mlp_post"])
        else:
            close(r["mlp_pre"], r["mlp_post"])
        with pytest.raises(AssertionError):  # control: all of a product to both of its factors
            close(r["v"], (1.5 - half) * messages.sum(2).transpose(1, 2).unflatten(2, (-1, groups)).sum(3))


# -- nothing is left behind, and nobody else is touched (E13)


def gradients(model: HookedHF, rules: Rules | None, metric: Any = families.probe) -> Tensor:
    """Of two rows padded on the left."""
    return (
        model.run(families.ragged("left"), metric=metric, gradients="resid_pre", rules=rules)
        .gradients["resid_pre", 0]
        .values
    )


PAIRS = [("llama", "eager", ATTN, "gpt2", "sdpa", CP), ("gpt2", "eager", CP, "llama", "sdpa", ATTN)]


@pytest.mark.parametrize(("one", "how", "rules", "other", "otherwise", "others"), PAIRS)
def test_rules_of_two_models_do_not_meet(
    one: str, how: str, rules: Rules, other: str, otherwise: str, others: Rules
) -> None:
    first, second = families.hooked(one, attention=how), families.hooked(other, attention=otherwise)
    batch, top, low = families.ragged("left"), "blocks.1.hook_resid_post", "blocks.0.hook_resid_pre"
    alone = {
        rule: (gradients(first, rule), gradients(second, other_rule))
        for rule, other_rule in ((rules, others), (None, None))
    }
    assert not torch.equal(alone[rules][0], alone[None][0]) and not torch.equal(
        alone[rules][1], alone[None][1]
    )  # control
    nested: list[Tensor] = []

    def metric(logits: Tensor, b: Batch) -> Tensor:
        nested.append(gradients(second, others))  # a run inside the run of another model
        return families.probe(logits, b)

    assert torch.equal(gradients(first, rules, metric), alone[rules][0])
    assert torch.equal(nested[0], alone[rules][1])
    # interleaved: one model's graph is open while the other runs
    tape = first.tape(batch, metric=families.probe, gradients=(top, low), rules=rules)
    assert torch.equal(gradients(second, others), alone[rules][1])
    found: dict[str, Tensor] = {}
    tape.pull_back(lambda site, x, g: found.__setitem__(site, g.clone()))
    assert torch.equal(found[low], alone[rules][0])
    # at the same time
    seen: dict[int, Tensor] = {}
    runs = ((first, rules), (second, others), (first, None), (second, None))
    threads = [
        threading.Thread(target=lambda i=i, m=m, r=r: seen.__setitem__(i, gradients(m, r)))
        for i, (m, r) in enumerate(runs)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, wanted in enumerate((*alone[rules], *alone[None])):
        assert torch.equal(seen[i], wanted)


@pytest.mark.parametrize("family", ["llama", "gemma2", "bert", "roberta", "olmo", "qwen2_moe"])
def test_after_a_run_under_rules_everything_is_as_before(family: str) -> None:
    model, batch = families.hooked(family), families.ragged("left")
    watched = (nn.LayerNorm, nn.Linear, nn.Dropout, *{type(m) for m in model.model.modules()})

    def state() -> list[Any]:
        functions = [dict(f.items()) for f in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS)]
        modules = [(set(m.__dict__), len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.model.modules()]
        return [functions, modules, [kind.forward for kind in watched], model.model.config._attn_implementation]

    before, full = state(), gradients(model, None)
    logits = model.run(batch).logits
    linear = {} if model.info.n_experts else {"linear_gamma": 0.25}
    for rules in (CP, ATTN, replace(CP, **linear)):
        assert not torch.equal(gradients(model, rules), full)  # control: the rules did act
        assert state() == before
        with pytest.raises(ZeroDivisionError):
            gradients(model, rules, lambda out, b: 1 / 0)
        assert state() == before
    assert torch.equal(gradients(model, None), full)
    assert torch.equal(model.run(batch).logits, logits)
