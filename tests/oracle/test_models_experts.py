"""Mixtures of experts against a slow one: a router and experts written out token by token from their parameters."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import families
import pytest
import torch
import transformers as tf
from patching_cases import pairs_task
from torch import Tensor
from torch.nn import functional as F

import mechattr as ma
from mechattr.artifact import Cache
from mechattr.errors import SettingError, UnknownSiteError, UnsupportedFeatureError, UnsupportedModelError
from mechattr.models import Add, Batch, Edit, HookedHF, Rules, Set, Zero
from mechattr.models.small import small_model
from mechattr.sites import Node

MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss", "granitemoe")
every_mixture = pytest.mark.parametrize("family", MIXTURES)
# Sums of a dozen numbers in float64, behind a softmax that is taken in float64 too
CLOSE = {"rtol": 0.0, "atol": 1e-11}


def block(model: HookedHF, layer: int) -> Any:
    """The mixture of a layer."""
    inside = model.model.model.layers[layer]
    return inside.block_sparse_moe if model.info.family == "granitemoe" else inside.mlp


def routing(model: HookedHF, logits: Tensor, *, divide: bool | None = None) -> Tensor:
    """The weight of every expert at every token, zero where a token is not routed: [token, expert]."""
    family, c = model.info.family, model.config
    divide = getattr(c, "norm_topk_prob", True) if divide is None else divide
    weights = torch.zeros_like(logits)
    for token, row in enumerate(logits.tolist()):
        chosen = sorted(range(len(row)), key=lambda e: -row[e])[: c.num_experts_per_tok]
        over = chosen if family in ("gpt_oss", "granitemoe") or divide else range(len(row))
        total = sum(math.exp(row[e]) for e in over)
        for e in chosen:
            weights[token, e] = math.exp(row[e]) / total
    return weights


def expert(model: HookedHF, layer: int, e: int, x: Tensor) -> Tensor:
    """What one expert makes of one token."""
    experts = block(model, layer).experts
    if model.info.family != "gpt_oss":
        gate, up = (experts.gate_up_proj[e] @ x).chunk(2)
        return experts.down_proj[e] @ (F.silu(gate) * up)
    both = x @ experts.gate_up_proj[e] + experts.gate_up_proj_bias[e]
    gate, up = both[::2].clamp(max=3.0), both[1::2].clamp(-3.0, 3.0)
    return ((up + 1) * gate * torch.sigmoid(1.702 * gate)) @ experts.down_proj[e] + experts.down_proj_bias[e]


@torch.no_grad()
def slowly(model: HookedHF, layer: int, x: Tensor, logits: Tensor, **how: Any) -> Tensor:
    """What each expert adds, [batch, pos, expert, d_model]."""
    tokens, weights = x.flatten(0, 1), routing(model, logits.flatten(0, 1), **how)
    each = [[w * expert(model, layer, e, t) for e, w in enumerate(row)] for t, row in zip(tokens, weights, strict=True)]
    return torch.stack([torch.stack(row) for row in each]).unflatten(0, x.shape[:2])


@torch.no_grad()
def shared(model: HookedHF, layer: int, x: Tensor) -> Tensor | float:
    """What the expert that every token goes through adds, where there is one."""
    if model.info.family != "qwen2_moe":
        return 0.0
    mixture = block(model, layer)
    return torch.sigmoid(mixture.shared_expert_gate(x)) * mixture.shared_expert(x)


SITES = ("ln2", "router_logits", "expert_out", "mlp_out")


def seen(model: HookedHF, *edits: Edit) -> list[dict[str, Tensor]]:
    """Activations of each layer."""
    with families.widened():
        run = model.run(Batch.of(families.tokens(2, 6)), record=SITES, edits=edits)
    return [{short: run.activations[short, layer].values for short in SITES} for layer in range(2)]


def same(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, **CLOSE)


@every_mixture
def test_every_expert_adds_what_a_slow_one_adds_and_together_they_are_the_mlp(family: str) -> None:
    model = families.hooked(family, torch.float64)
    for layer, at in enumerate(seen(model)):
        same(at["router_logits"], linear(model, layer, at["ln2"]))
        same(at["expert_out"], slowly(model, layer, at["ln2"], at["router_logits"]))
        factor = 0.22 if family == "granitemoe" else 1.0
        whole = factor * (at["expert_out"].sum(2) + shared(model, layer, at["ln2"]))
        same(at["mlp_out"], whole)
        routed = (at["expert_out"] != 0).any(-1).sum(-1)
        assert set(routed.flatten().tolist()) == {2} and at["expert_out"].shape[2] == model.info.n_experts == 5


@torch.no_grad()
def linear(model: HookedHF, layer: int, x: Tensor) -> Tensor:
    mixture = block(model, layer)
    router = mixture.router if hasattr(mixture, "router") else mixture.gate
    return F.linear(x, router.weight, getattr(router, "bias", None))


@every_mixture
def test_without_one_expert_the_others_add_up_as_before(family: str) -> None:
    model = families.hooked(family, torch.float64)
    plain = seen(model)[0]
    goes = (plain["expert_out"] != 0).any(-1)
    busy = int(goes.sum((0, 1)).argmax())
    row, pos = goes[:, :, busy].nonzero()[0].tolist()
    left = plain["expert_out"].clone()
    left[:, :, busy] = 0
    factor = 0.22 if family == "granitemoe" else 1.0
    edited = seen(model, Edit("expert_out", Zero(), layers=[0], experts=[busy]))[0]
    same(edited["mlp_out"], factor * (left.sum(2) + shared(model, 0, plain["ln2"])))
    assert (edited["mlp_out"] - plain["mlp_out"]).abs().max() > 0.1  # control: nothing taken out
    one = seen(model, Edit("expert_out", Zero(), layers=[0], experts=[busy], positions=[pos], rows=[row]))[0]
    moved = (one["expert_out"] != plain["expert_out"]).any(-1).nonzero().tolist()
    assert moved == [[row, pos, busy]] and not one["expert_out"][row, pos, busy].any()


@every_mixture
def test_an_edit_of_the_routers_logits_changes_the_routing(family: str) -> None:
    model = families.hooked(family, torch.float64)
    plain = seen(model)[0]
    shift = 2 * torch.randn(5, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    for op, experts in ((Add(shift), None), (Set(9.0), [4])):
        at = seen(model, Edit("router_logits", op, layers=[0], experts=experts))[0]
        same(at["expert_out"], slowly(model, 0, at["ln2"], at["router_logits"]))
        with pytest.raises(AssertionError):  # control: the routing of the logits before the edit
            same(at["expert_out"], slowly(model, 0, at["ln2"], plain["router_logits"]))
    assert (at["expert_out"][:, :, 4] != 0).any(-1).all()  # every token now goes to the expert with logit 9


def test_control_weights_over_all_experts_are_not_weights_over_the_chosen() -> None:
    for family, wrong in (("mixtral", False), ("qwen3_moe", False), ("olmoe", True), ("qwen2_moe", True)):
        model = families.hooked(family, torch.float64)
        at = seen(model)[0]
        with pytest.raises(AssertionError):
            same(at["expert_out"], slowly(model, 0, at["ln2"], at["router_logits"], divide=wrong))


def test_control_the_shared_expert_is_a_part_of_the_mlp() -> None:
    at = seen(families.hooked("qwen2_moe", torch.float64))[0]
    assert (at["mlp_out"] - at["expert_out"].sum(2)).abs().max() > 0.1


@every_mixture
def test_fused_experts_keep_every_bit_where_nothing_is_summed_again(family: str) -> None:
    built = small_model(family)
    built.set_experts_implementation("grouped_mm")
    model, batch = HookedHF(built), Batch.of(families.tokens())
    with torch.no_grad():
        own = built(batch.tokens).logits
    assert torch.equal(model.run(batch, record=("router_logits", "mlp_out")).logits, own)
    itself = model.run(batch, record="router_logits").activations
    assert torch.equal(model.run(batch, edits=[Edit("router_logits", Set(itself))]).logits, own)
    apart = model.run(batch, record="expert_out").logits
    torch.testing.assert_close(apart, own, rtol=0, atol=1e-5 * float(own.abs().max()))  # another order of sums


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "granitemoe"])
def test_in_bfloat16_a_routing_that_is_computed_again_keeps_every_bit(family: str) -> None:
    model, batch = families.hooked(family, torch.bfloat16), Batch.of(families.tokens())
    itself = model.run(batch, record="router_logits").activations
    edits = [Edit("router_logits", Set(itself))]
    assert torch.equal(model.run(batch, edits=edits).logits, model.run(batch).logits)


def test_rules_that_do_not_reach_the_inside_of_experts_are_refused_before_anything_runs() -> None:
    model, batch = families.hooked("gpt_oss"), Batch.of(families.tokens())
    assert not model.supports(Rules.relp()) and model.supports(Rules(norm="frozen", router="detached"))
    assert model.supports("expert_out") and not model.supports("mlp_post")
    text = r"rules \{'norm'.* of family 'gpt_oss'\n  found: .* reach the gate inside each expert \(GptOss.*\n  fix: use"
    with pytest.raises(UnsupportedFeatureError, match=text):
        model.run(batch, metric=families.probe, gradients="z", rules=Rules.relp())
    text = (
        r"Rules\(linear_epsilon=0.0, linear_gamma=0.5\)\n  found: the MLPs are mixtures of experts.*\n  fix: .*replace"
    )
    with pytest.raises(UnsupportedFeatureError, match=text):
        families.hooked("mixtral").tape(batch, gradients="z", rules=Rules(linear_gamma=0.5))


def relevance_by_hand(model: HookedHF, x: Tensor, g: Tensor, rules: Rules) -> Tensor:
    """The gradient at what a mixture reads, [token, d_model], from that of what it writes: each chosen expert is the
    linear map that it is at its values, its weight a number or half of a product."""
    logits = linear(model, 0, x)
    weights, found = routing(model, logits), torch.zeros_like(x)
    experts = block(model, 0).experts
    for token, row in enumerate(weights):
        for e in row.nonzero()[:, 0].tolist():
            w_gate, w_up = experts.gate_up_proj[e].detach().chunk(2)
            gate, up = w_gate @ x[token], w_up @ x[token]
            at_product = row[e] * (experts.down_proj[e].detach().T @ g[token])
            share = 0.5 if rules.gate == "half" else 1.0
            found[token] += w_up.T @ (at_product * F.silu(gate) * share)
            if rules.gate == "half":
                found[token] += w_gate.T @ (at_product * up * F.silu(gate) / gate * share)
    return found


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "olmoe"])
def test_rules_inside_experts_against_experts_worked_out_by_hand(family: str) -> None:
    model, batch = families.hooked(family, torch.float64), Batch.of(families.tokens(2, 6))
    with families.widened():
        for rules in (Rules.cp_lrp(), Rules.attn_lrp()):
            run = model.run(
                batch, record="ln2", metric=families.probe, gradients=("ln2", "mlp_out", "router_logits"), rules=rules
            )
            x, g = (values["ln2", 0].values.flatten(0, 1) for values in (run.activations, run.gradients))
            at_out = run.gradients["mlp_out", 0].values.flatten(0, 1)
            same(g, relevance_by_hand(model, x, at_out, rules))
            assert not run.gradients["router_logits", 0].values.any()
            with pytest.raises(AssertionError):  # control: the other rule
                same(g, relevance_by_hand(model, x, at_out, Rules(gate="half" if rules.gate != "half" else "detached")))


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_half_of_a_gate_is_not_half_of_a_routing_weight(family: str) -> None:
    model, batch = families.hooked(family, torch.float64), Batch.of(families.tokens(2, 6))
    wanted = ("router_logits", "expert_out")
    full, half = (
        model.run(batch, metric=families.probe, gradients=wanted, rules=rules).gradients
        for rules in (Rules(), Rules(gate="half"))
    )
    last = model.info.n_layers - 1  # nothing above it meets the rule
    for short in wanted:
        torch.testing.assert_close(half[short, last].values, full[short, last].values, rtol=0, atol=1e-12)
    assert (half["router_logits", 0].values - full["router_logits", 0].values).abs().max() > 1e-3  # control


def test_sites_of_a_dense_mlp_are_refused_with_what_there_is() -> None:
    model = families.hooked("mixtral")
    task = pairs_task(model)
    fix = "  fix: its MLPs are mixtures of experts: use mlp_out, expert_out or router_logits"
    with pytest.raises(UnknownSiteError, match=rf"site 'mlp_post'\n  found: .* it has embed.*expert_out.*\n{fix}"):
        ma.attribution_patching(model, task, sites=("z", "mlp_post"))
    with pytest.raises(UnsupportedFeatureError, match=r"edges of .*\n  found: its MLPs are mixtures of experts"):
        ma.edge_attribution(model, task)
    with pytest.raises(SettingError, match=r"experts=\[5\]\n  found: the axis expert of .*hook_expert_out has 0 to 4"):
        model.run(Batch.of(families.tokens()), edits=[Edit("expert_out", Zero(), experts=[5])])
    assert ma.attribution_patching(model, task, sites=("z", "mlp_out")).top(3)


ROUTED = ("expert_out", "router_logits")


@every_mixture
def test_the_effect_of_a_single_expert_is_that_of_an_edit(family: str) -> None:
    model = families.hooked(family, torch.float64)
    task = pairs_task(model)
    found = ma.activation_patching(model, task, sites=ROUTED)
    other = model.run(task.corrupt, record=ROUTED).activations
    with families.widened():
        base = model.run(task.clean, metric=task.metric, record="expert_out").metric
    assert base is not None

    def edited(node: Node, expert: int) -> float:
        edit = Edit(node.site, Set(other), layers=[node.layer], experts=[expert], positions=[node.pos])  # type: ignore[list-item]
        run = model.run(task.clean, metric=task.metric, edits=[edit])
        assert run.metric is not None
        return float((run.metric - base).mean())

    close: dict[str, Any] = {"rtol": 0, "atol": 1e-5}  # norms of transformers work in float32
    for node in found.nodes():
        torch.testing.assert_close(found.value(node, "signed"), edited(node, int(node.neuron or 0)), **close)
    node = found.top(1)[0]
    with pytest.raises(AssertionError):  # control: the expert beside it
        torch.testing.assert_close(found.value(node, "signed"), edited(node, (int(node.neuron or 0) + 1) % 5), **close)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_estimates_at_single_experts_are_the_effects_of_a_small_step(family: str) -> None:
    """A step that is small enough leaves the metric linear in every node, and the choice of experts as it is."""
    model, step = families.hooked(family, torch.float64), 1e-6
    task = pairs_task(model)
    with families.widened():
        here, there = (model.run(side, record=ROUTED).activations for side in (task.clean, task.corrupt))
        near = Cache(
            {name: here[name] + step * (there[name] - here[name]) for name in here}, settings={}, provenance={}
        )
        atp = ma.attribution_patching(model, task, sites=ROUTED, variant="atp", source=near)
        exact = ma.activation_patching(model, task, sites=ROUTED, source=near)
    for site in ROUTED:
        wanted = exact.signed[site].values / step
        # second order in the step, and differences of metrics of size 10 over the step
        torch.testing.assert_close(atp.signed[site].values / step, wanted, rtol=1e-4, atol=1e-6)
        with pytest.raises(AssertionError):  # control: an estimate of the next expert
            torch.testing.assert_close(atp.signed[site].values.roll(1, -1) / step, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("variant", "unit"), [("atp", "block"), ("graddrop", "block"), ("star", "sublayer")])
def test_with_one_expert_a_token_an_expert_is_the_mlp(variant: str, unit: str) -> None:
    """Where both prompts route a token to one and the same expert, what it adds is the MLP's output."""
    config = families.configs()["mixtral"]
    config.num_experts_per_tok = 1
    torch.manual_seed(0)
    built = tf.MixtralForCausalLM(config).eval().double()
    built.set_experts_implementation("eager")
    for weight in built.parameters():
        weight.data *= 10  # as transformers draws them, nothing changes much
    model = HookedHF(built)
    task = pairs_task(model, (6,))
    found = ma.attribution_patching(model, task, sites=("expert_out", "mlp_out"), variant=variant, unit=unit)
    sides = [
        model.run(side, record="expert_out").activations["expert_out"].values[:, 0]
        for side in (task.clean, task.corrupt)
    ]
    goes = [(side != 0).any(-1) for side in sides]  # [layer, pos, expert]
    same_one = (goes[0] & goes[1]).any(-1)
    experts, mlp = found.scores["expert_out"].values, found.scores["mlp_out"].values
    torch.testing.assert_close(experts.sum(-1)[same_one], mlp[same_one], **CLOSE)
    assert bool((mlp[same_one] > 1e-3).any()) and not bool(same_one.all())
    with pytest.raises(AssertionError):  # control: where the routing changes, two experts change
        torch.testing.assert_close(experts.sum(-1), mlp, **CLOSE)


def test_nodes_of_experts_have_names_tables_and_limits(tmp_path: Path) -> None:
    model = families.hooked("mixtral")
    task = pairs_task(model)
    found = ma.attribution_patching(model, task, sites=("z", *ROUTED))
    assert found.settings["variant"] == "hedged" and found.scores["expert_out"].axes == ("layer", "pos", "expert")
    found.save(tmp_path / "result.safetensors")
    again = ma.open(tmp_path / "result.safetensors")
    assert again.top(9) == found.top(9)
    frame = found.to_pandas()
    row = frame[frame["site"] == "router_logits"].iloc[0]
    assert found.value(Node("router_logits", int(row.layer), row.pos, neuron=int(row.neuron))) == row.score
    labels = [Node(site, 1, neuron=3).label for site in ROUTED]
    assert labels == ["L1E3", "L1E3 router_logits"]
    exact = ma.activation_patching(model, task, nodes=found.top(5))
    assert exact.nodes() == sorted(found.top(5))
    merged = ma.activation_patching(model, task, sites="expert_out", positions="all")
    assert merged.scores["expert_out"].axes == ("layer", "expert")
    ax = merged.plot()
    assert ax.get_xlabel() == "expert (expert_out)"
    with pytest.raises(SettingError, match=r"neuron 5: expert runs from 0 to 4"):
        ma.activation_patching(model, task, nodes=[Node("expert_out", 0, 1, neuron=5)])
    with pytest.raises(SettingError, match=r"neuron None: expert runs from 0 to 4"):
        ma.activation_patching(model, task, nodes=[Node("expert_out", 0, 1)])


@pytest.mark.parametrize("method", ["ablation", "missed_effect_bound", "causal_tracing"])
def test_other_methods_take_nodes_of_experts(method: str) -> None:
    model = families.hooked("mixtral")
    task = pairs_task(model, changed=(0, 1, 2))
    more: dict[str, dict[str, Any]] = {
        "ablation": {"kind": "zero"},
        "missed_effect_bound": {"verified": [], "p": 0.3, "budget": 60},
        "causal_tracing": {"samples": 2},
    }
    given = {**more[method], "positions": "all"}
    result = getattr(ma, method)(model, task, sites=ROUTED[:1] if method == "ablation" else ROUTED, **given)
    if method == "ablation":
        run = model.run(task.clean, edits=[Edit("expert_out", Zero(), layers=[1], experts=[2])], metric=task.metric)
        base = model.run(task.clean, record="expert_out", metric=task.metric)
        assert run.metric is not None and base.metric is not None
        wanted = float((run.metric - base.metric).mean())
        assert wanted != 0 and result.value(Node("expert_out", 1, neuron=2), "signed") == pytest.approx(
            wanted, abs=1e-5
        )


def test_models_that_mix_dense_blocks_in_or_run_fused_experts_in_float64_are_refused() -> None:
    for option, text in (
        ({"mlp_only_layers": [0]}, r"mlp_only_layers=\[0\]\n  found: blocks without experts among blocks with experts"),
        ({"decoder_sparse_step": 2}, r"decoder_sparse_step=2\n  found: blocks without experts"),
    ):
        config = families.configs()["qwen3_moe"]
        for name, value in option.items():
            setattr(config, name, value)
        with pytest.raises(UnsupportedModelError, match=text):
            HookedHF(tf.Qwen3MoeForCausalLM(config).eval())
    built = small_model("olmoe").double()
    built.set_experts_implementation("grouped_mm")
    text = r"in float64\n  found: .*'grouped_mm' experts do not run in float64\n  fix: call .*\('eager'\) first"
    with pytest.raises(UnsupportedModelError, match=text):
        HookedHF(built)
