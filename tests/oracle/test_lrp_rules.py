"""Layer-wise relevance propagation: what reaches a cut, what biases take and what softmaxes leak is the metric."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import families
import pytest
import torch
from rules_cases import ATTN, CP
from torch import Tensor

from mechattr.errors import UnsupportedFeatureError
from mechattr.models import Batch, HookedHF, Rules
from mechattr.models.hf_rules import Ruling

RULED = tuple(name for name in families.EVERY if name != "gpt_oss")  # whose experts no rule reaches
CLOSE = 1e-11  # of the largest part: float64 sums of some hundred terms that nearly cancel


@contextmanager
def biases(model: HookedHF) -> Iterator[dict[str, Tensor]]:
    """Every bias of a model, differentiable for the time of one ledger."""
    found = {name: p for name, p in model.model.named_parameters() if name.endswith("bias")}
    for p in found.values():
        p.requires_grad_(True)
    try:
        yield found
    finally:
        for p in found.values():
            p.requires_grad_(False)


def above(model: HookedHF, names: Any, layer: int) -> set[str]:
    """The parameters whose effect enters a residual stream at a block or later."""
    anatomy, paths = model._anatomy, {m: f"{name}." for name, m in model.model.named_modules()}
    late = [paths[m] for stack in anatomy.stacks for m in (*stack.blocks[layer:], stack.ends.get("final")) if m]
    base = paths[model.model.base_model]
    return {name for name in names if name.startswith(tuple(late)) or not name.startswith(base)}


def ledger(model: HookedHF, batch: Batch, rules: Rules, layer: int = 0) -> dict[str, float]:
    """The parts of the metric at the input of a block; the metric is taken at the last norm where logits are capped."""
    capped = getattr(model.config, "final_logit_softcapping", None) is not None
    stacks = ["blocks", "encoder"] if model.info.n_encoder_layers else ["blocks"]
    cuts = [f"{stack}.{layer}.hook_resid_pre" for stack in stacks]
    around = [n for n in model.sites() if n.rpartition("hook_")[2] in ("z", "v", "rot_q", "rot_k")]
    with biases(model) as parameters:
        sites = [*cuts, *around, *(["ln_final.hook_out"] if capped else [])]
        metric = None if capped else families.probe
        tape = model.tape(batch, metric=metric, gradients=sites, record=sites, rules=rules)
        if capped:
            x = tape.activations["ln_final.hook_out"]
            noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(5), dtype=x.dtype)
            root, gradient, value = tape._nodes["ln_final.hook_out"].edge, noise, (x * noise).sum()
        else:
            root, gradient, value = tape._value, torch.ones_like(tape._value), tape.metric.sum()
        inputs = [*(tape._nodes[name].edge for name in [*cuts, *around]), *parameters.values()]
        found = torch.autograd.grad([root], inputs, [gradient], allow_unused=True)
    relevance = {
        name: 0.0 if g is None else float((tape.activations[name] * g).sum())
        for name, g in zip([*cuts, *around], found, strict=False)
    }
    taken = {
        name: 0.0 if g is None else float((p.detach() * g).sum())
        for (name, p), g in zip(parameters.items(), found[len(cuts + around) :], strict=True)
    }
    leaks = [
        r if name.endswith("_z") else -r
        for name, r in relevance.items()
        if name in around and int(name.split(".")[1]) >= layer
    ]
    parts = {
        "stream": sum(relevance[name] for name in cuts),
        "biases": sum(taken[name] for name in above(model, taken, layer)),
    }
    return {**parts, "leak": 0.0 if rules.pattern == "detached" else sum(leaks), "metric": float(value)}


def gap(parts: dict[str, float]) -> float:
    """What is missing, relative to the largest part."""
    missing = parts["metric"] - parts["stream"] - parts["biases"] - parts["leak"]
    return abs(missing) / max(abs(x) for x in parts.values())


@pytest.mark.parametrize("family", RULED)
def test_relevance_is_accounted_for_at_every_cut_of_every_family(family):
    """Norms of q and k, behind writes and in prediction heads, parallel blocks, sinks, clips, caps, shared experts."""
    with families.widened():
        model, batch = families.hooked(family, torch.float64), families.batch_of(family, families.tokens())
        sourced = family in families.SOURCED  # cross-attention leaks into the other stack
        for layer in range(1 if sourced else model.info.n_layers):
            for rules in (CP,) if sourced else (CP, ATTN):
                assert gap(ledger(model, batch, rules, layer)) < CLOSE, rules
        mixture = bool(model.info.n_experts)
        wrong = ["norm", "gate" if model.info.gated or mixture else "activation"] + ["router"] * mixture
        for field in wrong:  # controls
            assert gap(ledger(model, batch, replace(CP, **{field: "full"}))) > 1e-3, field
        if not sourced:
            assert gap({**ledger(model, batch, ATTN), "leak": 0.0}) > 1e-3  # control: softmaxes do not conserve


@pytest.mark.parametrize("family", ["mistral", "gemma2", "phi3", "olmo2", "t5", "mt5"])
def test_linear_rules_conserve_relevance_where_there_are_no_biases(family):
    with families.widened():
        model, batch = families.hooked(family, torch.float64), families.batch_of(family, families.tokens())
        plain, gamma, both = (
            ledger(model, batch, replace(CP, linear_gamma=gamma, linear_epsilon=epsilon))
            for gamma, epsilon in ((0.0, 0.0), (0.25, 0.0), (0.25, 0.1))
        )
        assert gap(plain) < CLOSE
        assert gap(gamma) < CLOSE
        assert gap(both) > 1e-3  # control: a stabiliser takes its share
        seen = {
            rules: model.run(batch, metric=families.probe, gradients="resid_pre", rules=rules).gradients["resid_pre", 0]
            for rules in (CP, replace(CP, linear_gamma=0.25))
        }
        plain, gamma = (x.values for x in seen.values())
        assert (plain - gamma).abs().max() > 1e-2 * plain.abs().max()  # control: gamma does something


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "bert", "roberta"])
def test_control_a_rule_that_is_missing_on_one_norm_is_seen(family, monkeypatch):
    with families.widened():
        model, batch = families.hooked(family, torch.float64), Batch.of(families.tokens())
        norms = model._anatomy.norms
        for rules, missed in ((ATTN, norms[1]), (CP, norms[-1])):
            monkeypatch.setattr(
                model, "_anatomy", replace(model._anatomy, norms=tuple(m for m in norms if m is not missed))
            )
            with pytest.raises(UnsupportedFeatureError, match="they do not reach"):
                model.run(batch, metric=families.probe, gradients="z", rules=rules)
            monkeypatch.setattr(model, "_refusal", lambda rules: None)
            assert gap(ledger(model, batch, rules)) > 1e-4
            monkeypatch.undo()
        assert gap(ledger(model, batch, CP)) < CLOSE


@pytest.mark.parametrize("family", ["bert", "roberta", "modernbert"])
def test_control_a_head_that_keeps_its_slope_is_seen(family, monkeypatch):
    monkeypatch.setattr(Ruling, "head", lambda self: None)
    with families.widened():
        model, batch = families.hooked(family, torch.float64), Batch.of(families.tokens())
        assert gap(ledger(model, batch, CP)) > 1e-3


# -- what is refused, with the modules that are missed


class Leaky(torch.nn.Module):
    """An activation that no row knows of."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.leaky_relu(x)


def test_a_module_that_rules_do_not_reach_is_named() -> None:
    built = families.model("llama")
    built.model.layers[1].mlp.extra = Leaky()
    model, batch = HookedHF(built), Batch.of(families.tokens())
    text = r"family 'llama'\n  found: they do not reach model.layers.1.mlp.extra \(Leaky\)\n  fix: use rules that act"
    with pytest.raises(UnsupportedFeatureError, match=r"rules \{'norm': .*\} in a model of " + text):
        model.run(batch, metric=families.probe, gradients="z", rules=CP)
    for rules in (Rules(norm="frozen"), Rules(gate="half"), Rules(linear_epsilon=0.1)):
        assert not model.supports(rules)
    attention = Rules(pattern="detached", v_factor=0.5, hold={0})
    assert model.supports(attention)
    assert model.run(batch, metric=families.probe, gradients="z", rules=attention).gradients


def test_clips_of_a_family_that_is_not_known_to_clip_are_refused() -> None:
    built = families.model("llama")
    built.config.clip_qkv = 2.0
    with pytest.raises(UnsupportedFeatureError, match=r"do not reach clipped queries, keys and values \(clip_qkv\)"):
        HookedHF(built).tape(Batch.of(families.tokens()), gradients="z", rules=ATTN)


def test_secants_in_float16_are_refused_and_in_bfloat16_are_not() -> None:
    model, batch = families.hooked("llama", torch.float16), Batch.of(families.tokens())
    text = r"Rules\(activation='secant', softcap='full'\) in float16\n  found: relevance .* above 65504.*\n  fix: load"
    with pytest.raises(UnsupportedFeatureError, match=text):
        model.run(batch, metric=families.probe, gradients="z", rules=CP)
    assert model.supports(Rules(norm="frozen", pattern="detached"))
    wide = families.hooked("llama", torch.bfloat16)
    assert wide.run(batch, metric=families.probe, gradients="z", rules=CP).gradients["z"].values.isfinite().all()


def test_the_output_projection_is_not_taken_apart_under_gamma() -> None:
    model, rules = families.hooked("mistral"), replace(CP, linear_gamma=0.25)
    text = r"hook_result under Rules\(linear_gamma=0.25\)\n  found: the gamma rule acts on .*\n  fix: use z in place"
    with pytest.raises(UnsupportedFeatureError, match=text):
        model.run(Batch.of(families.tokens()), record="result", metric=families.probe, gradients="z", rules=rules)
