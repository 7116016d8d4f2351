"""Edge attribution against its definition, against nodes, and against edges moved by hand; each with wrong answers that
the same check rejects."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import edge_cases as ec
import families
import patching_cases as cases
import pytest
import torch
from torch import Tensor

import mechattr as ma
from mechattr.engines.quadrature import nodes
from mechattr.errors import EmptyTaskError, NonFiniteError, SettingError, UnknownNameError, UnsupportedFeatureError
from mechattr.models.plain import plain_copy, plain_model
from mechattr.models.plain_config import PlainConfig
from mechattr.models.rules import Rules
from mechattr.patching import edge_scores
from mechattr.patching.edges import edge_attribution
from mechattr.patching.graph import Graph
from mechattr.tasks.task import Task

KINDS = tuple(cases.PLAIN)
PATHS = {
    "eap": [(1.0, 1.0)],
    "clean_corrupted": [(0.0, 0.5), (1.0, 0.5)],
    "eap_ig": [(x, w) for x, w in zip(*(part.tolist() for part in nodes("midpoint", 3)), strict=True)],
}
EXACT = 1e-10  # float64 rounding of effects of order 1 to 100
WRONG = {
    "gradient of the whole stream": KINDS,
    "norm treated as identity": ("gpt2_like", "llama_like"),
    "keys of the group's first head only": ("llama_like",),
    "gradient of the mean over pairs": KINDS,
}


def run(model: Any, task: Task, **settings: Any) -> Any:
    return edge_attribution(model, task, steps=3, progress=False, **settings)


def changes(result: Any) -> Tensor:
    """Metric of the corrupt run minus that of the clean run, by pair."""
    sides = (torch.tensor(result.settings[f"{side}_metric"], dtype=torch.float64) for side in ("corrupt", "clean"))
    return next(sides) - next(sides)


def apart(result: Any, effects: Tensor) -> float:
    """The largest difference of any edge, in score or signed mean."""
    mask = result.graph.mask
    signed = (result.signed.values - effects.mean(0))[mask].abs().max()
    return max(float(signed), float((result.score.values - effects.abs().mean(0))[mask].abs().max()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", PATHS)
def test_equals_the_definition(kind: str, method: str) -> None:
    model = cases.plain(kind)
    task = cases.pairs_task(model, (5, 4, 6))  # padding
    for direction in ("noising", "denoising"):
        result = run(model, task, method=method, direction=direction)
        assert apart(result, ec.edge_effects(model, task, PATHS[method], direction=direction)) < EXACT
    assert bool((result.score.values.isnan() == ~result.graph.mask).all())


@pytest.mark.parametrize(("wrong", "kind"), [(wrong, kind) for wrong, kinds in WRONG.items() for kind in kinds])
def test_the_check_rejects(wrong: str, kind: str) -> None:
    model = cases.plain(kind)
    task = cases.pairs_task(model)
    result = run(model, task)
    assert apart(result, ec.edge_effects(model, task, PATHS["eap_ig"])) < EXACT
    assert apart(result, ec.edge_effects(model, task, PATHS["eap_ig"], wrong=wrong)) > 1e-3


def test_absolute_values_are_taken_pair_by_pair() -> None:
    model = cases.plain("gpt2_like")
    task = cases.pairs_task(model)
    result, effects = run(model, task, method="eap"), ec.edge_effects(model, task)
    mask = result.graph.mask
    torch.testing.assert_close(result.score.values[mask], effects.abs().mean(0)[mask], rtol=0, atol=EXACT)
    abs_after_the_mean = effects.mean(0).abs()
    assert float((result.score.values - abs_after_the_mean)[mask].max()) > 1e-3


def node_scores(model: Any, task: Task, graph: Graph, rules: Rules | None = None) -> Tensor:
    """AtP of every writer: what its whole output does to first order."""
    sites = ["resid_pre", "z", *(["mlp_out"] if graph.has_mlp else [])]
    result = ma.attribution_patching(
        model, task, sites=sites, variant="atp", positions="all", rules=rules, progress=False
    )
    found = []
    for name in graph.writers:
        layer = graph.layer_of(name)
        head = int(name.split(".h")[1]) if ".h" in name else None
        site = "z" if head is not None else "resid_pre" if layer is None else "mlp_out"
        found.append(result.value(ma.Node(site, layer or 0, head=head), "signed"))
    return torch.tensor(found, dtype=torch.float64)


FAMILIES = (
    *("gpt2", "llama", "mistral", "qwen2", "qwen3", "gpt_neox", "gpt_neox_sequential", "phi3", "opt"),
    *("phi", "cohere2", "stablelm_parallel", "gptj", "falcon", "falcon_groups", "bloom", "modernbert"),
)


@pytest.mark.parametrize("family", FAMILIES)
def test_edges_out_of_a_writer_sum_to_its_node_in_every_family(family: str) -> None:
    """Needs the right weights, norm, input and bias of every reader: without queries, keys or MLPs it does not hold."""
    with families.widened():
        model = families.hooked(family, torch.float64)
        task = cases.pairs_task(model)
        result = edge_attribution(model, task, method="eap", progress=False)
        whole = node_scores(model, task, result.graph)
    signed = result.signed.values.nan_to_num(0)
    torch.testing.assert_close(signed.sum(1), whole, rtol=0, atol=EXACT * float(whole.abs().max()))
    for kind in ("<q>", "<k>", "<v>", "m"):
        others = [i for i, name in enumerate(result.graph.readers) if not (kind in name or name.startswith(kind))]
        assert float((signed[:, others].sum(1) - whole).abs().max()) > 1e-4 * float(whole.abs().max())


@pytest.mark.parametrize("kind", KINDS)
def test_edges_out_of_a_writer_sum_to_its_node(kind: str) -> None:
    model = cases.plain(kind)
    task = cases.pairs_task(model)
    result = run(model, task, method="eap")
    sums = result.signed.values.nan_to_num(0).sum(1)
    torch.testing.assert_close(sums, node_scores(model, task, result.graph), rtol=0, atol=EXACT)


@pytest.mark.parametrize("rules", [Rules(norm="frozen"), Rules.relp(), Rules.gim(), Rules(hold=frozenset({1}))])
@pytest.mark.parametrize("kind", ["gpt2_like", "llama_like"])
def test_edges_follow_the_rules_that_nodes_follow(kind: str, rules: Rules) -> None:
    model = cases.plain(kind)
    task = cases.pairs_task(model)
    result = run(model, task, method="eap", rules=rules)
    sums = result.signed.values.nan_to_num(0).sum(1)
    torch.testing.assert_close(sums, node_scores(model, task, result.graph, rules), rtol=0, atol=EXACT)
    plain_sums = run(model, task, method="eap").signed.values.nan_to_num(0).sum(1)
    assert float((sums - plain_sums).abs().max()) > 1e-3
    assert result.settings["rules"] == rules.to_json() and result.settings["completeness"] is None


def test_in_a_linear_network_the_path_does_not_matter() -> None:
    model = cases.plain("linear")
    task = cases.pairs_task(model)
    eap = run(model, task, method="eap")
    for steps, rule in ((1, "left"), (2, "gauss_legendre"), (4, "midpoint")):
        path = edge_attribution(model, task, steps=steps, rule=rule, progress=False)
        torch.testing.assert_close(path.score.values, eap.score.values, rtol=0, atol=EXACT, equal_nan=True)


def test_a_nonlinear_network_does_depend_on_the_path() -> None:
    """The control of the test above: the same comparison fails where it should."""
    model = cases.plain("gpt2_like")
    task = cases.pairs_task(model)
    left, right = (edge_attribution(model, task, steps=2, rule=rule, progress=False) for rule in ("left", "right"))
    assert float((left.signed.values - right.signed.values).nan_to_num(0).abs().max()) > 1e-3


def test_the_left_rule_starts_at_the_source() -> None:
    model = cases.plain("llama_like")
    task = cases.pairs_task(model)
    result = edge_attribution(model, task, steps=2, rule="left", progress=False)
    assert apart(result, ec.edge_effects(model, task, [(0.0, 0.5), (0.5, 0.5)])) < EXACT
    assert apart(result, ec.edge_effects(model, task, [(1.0, 0.5), (0.5, 0.5)])) > 1e-3


@pytest.mark.parametrize("kind", ["gpt2_like", "llama_like"])
def test_first_order_effect_of_moving_one_edge(kind: str) -> None:
    """Adding a little of a writer's change to one reader's input changes the metric by that much of its EAP score."""
    model = cases.plain(kind)
    task = cases.pairs_task(model, (5,))
    result = run(model, task, method="eap")
    split = ec.Split(model)
    x, y = (split.embed(batch.tokens[0]) for batch in (task.clean, task.corrupt))
    written = []
    for start in (x, y):
        split.logits(start)
        written.append({name: value.detach() for name, value in split.written.items()})
    edges = result.graph.mask.nonzero()
    step = 1e-5
    for i in torch.randperm(len(edges), generator=torch.Generator().manual_seed(0))[:25]:
        source, target = result.graph.writers[edges[i, 0]], result.graph.readers[edges[i, 1]]
        change = written[1][source] - written[0][source]
        sides = [
            float(ec.metric_of(ec.Split(model, given={target: sign * step * change}), x, task, task.clean).detach())
            for sign in (1, -1)
        ]
        moved = (sides[0] - sides[1]) / (2 * step)
        # central differences: error of order step^2 with large third derivatives, and 1e-16 / step of rounding
        assert result.value(source, target, "signed") == pytest.approx(moved, abs=1e-7, rel=1e-5)


@pytest.mark.parametrize("kind", ["gpt2_like", "llama_like"])
@pytest.mark.parametrize("rule", ["midpoint", "gauss_legendre"])
def test_edges_out_of_the_input_sum_to_the_change_of_the_metric(kind: str, rule: str) -> None:
    """The residual falls with more steps to nothing, and it says how far the sum is from the metric's change."""
    model = plain_model(cases.PLAIN[kind], {"embed.W_E": 0.3 * cases.plain(kind).weight("embed.W_E")})
    task = cases.pairs_task(model)
    missing = []
    for steps in (4, 40):
        result = edge_attribution(model, task, steps=steps, rule=rule, progress=False)
        missing.append(result.settings["completeness"]["mean"])
    total = result.signed.sel(source="input").values.nan_to_num(0).sum()
    change = float(changes(result).mean())
    assert abs(float(total) - change) <= missing[1] + 1e-12  # a mean of errors is at most their mean size
    assert missing[1] < 0.1 * missing[0] and missing[1] < 0.02 * abs(change)
    one_sided = edge_attribution(model, task, method="eap", progress=False).settings["completeness"]["mean"]
    assert one_sided > 10 * missing[1]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_transformers_models_agree_with_plain_copies(family: str) -> None:
    model = cases.hf(family)
    task = cases.pairs_task(model)
    exact = run(plain_copy(model), task)
    found = run(model, task)
    largest = float(exact.score.values.nan_to_num(0).max())
    for name in ("score", "signed"):
        # float32 through two layers with weights of scale 0.3
        torch.testing.assert_close(
            found.tensors[name].values.double(), exact.tensors[name].values, rtol=0, atol=3e-5 * largest, equal_nan=True
        )


def test_kv_readers_are_kv_heads() -> None:
    model = cases.plain("llama_like")
    result = run(model, cases.pairs_task(model))
    assert result.graph == Graph(2, 4, 2, True, False)
    assert sum("<k>" in name for name in result.graph.readers) == 2 * 2


@pytest.mark.parametrize("kind", ["gpt2_like", "llama_like"])
def test_batching_and_padding_change_nothing(kind: str) -> None:
    model = cases.plain(kind)
    task = cases.pairs_task(model, (5, 4, 6, 5))
    whole = run(model, task)
    others = [run(model, task, batch_size=1), run(model, task, batch_size=3)]
    others += [run(model, cases.repadded(task, side)) for side in ("left", "right")]
    for other in others:
        for name in ("score", "signed"):
            left, right = whole.tensors[name].values, other.tensors[name].values
            torch.testing.assert_close(left, right, rtol=0, atol=EXACT, equal_nan=True)


def test_small_buffers_change_nothing_and_stay_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Working tensors keep to the buffer's size: one position of one pair at the least."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        bytes = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                Largest.bytes = max(Largest.bytes, out.numel() * out.element_size())
            return out

    config = PlainConfig(n_layers=3, n_heads=4, n_kv_heads=4, d_model=32, d_head=4, d_mlp=8)
    model = plain_model(config)
    task = cases.pairs_task(model, (9, 9, 9))
    whole = run(model, task)
    writers, readers = Graph.of(model.info).mask.shape
    small = 3 * writers * config.d_model * 8  # three positions
    assert writers * readers * 8 < small  # and so one pair's scores
    made = []

    def watched(*parts: Any) -> Any:
        with Largest():
            made.extend(edge_scores_pair_scores(*parts))
        return made[-3:]

    edge_scores_pair_scores = edge_scores.pair_scores
    monkeypatch.setattr("mechattr.patching.edges.pair_scores", watched)
    unbounded = run(model, task)
    assert Largest.bytes > 2 * small  # the control: without the small buffer they are larger
    Largest.bytes = 0
    monkeypatch.setattr(edge_scores, "BUFFER", small)
    parts = run(model, task)
    assert 0 < Largest.bytes <= small
    for other in (unbounded, parts):
        torch.testing.assert_close(other.score.values, whole.score.values, rtol=0, atol=EXACT, equal_nan=True)


def test_a_million_edges() -> None:
    """A narrow network with the graph of a large one."""
    config = PlainConfig(n_layers=32, n_heads=32, n_kv_heads=32, d_model=8, d_head=2, d_mlp=4)
    model = plain_model(config, dtype="float32")
    task = cases.pairs_task(model, (4,))
    result = edge_attribution(model, task, method="eap", progress=False)
    assert result.graph.n_edges == 1_592_881 == int((~result.score.values.isnan()).sum())
    assert result.score.values.shape == (1_057, 3_105)


def test_prompts_that_do_not_differ_give_exact_zeros() -> None:
    for model in (cases.plain("llama_like"), cases.hf("gpt2")):
        task = cases.pairs_task(model, changed=())
        result = run(model, task)
        assert not bool(result.score.values[result.graph.mask].any())
        assert result.settings["n_trivial_zero"] == result.graph.n_edges
        assert result.settings["completeness"] == {"mean": 0.0, "max": 0.0, "relative": None}


def test_passes_are_those_that_were_run() -> None:
    model = cases.plain("gpt2_like")
    task = cases.pairs_task(model)
    counted = {"forward": 0, "backward": 0}
    plain_run, plain_tape = type(model).run, type(model).tape

    class Counting(type(model)):  # type: ignore[misc]
        def run(self, batch: Any, **kwargs: Any) -> Any:
            counted["forward"] += len(batch)
            return plain_run(self, batch, **kwargs)

        def tape(self, batch: Any, **kwargs: Any) -> Any:
            counted["forward"] += len(batch)
            counted["backward"] += len(batch)
            return plain_tape(self, batch, **kwargs)

    model.__class__ = Counting
    for method, rule, a_pair in (
        ("eap", "midpoint", (2, 1)),
        ("clean_corrupted", "midpoint", (2, 2)),
        ("eap_ig", "midpoint", (5, 3)),
        ("eap_ig", "left", (4, 3)),
        ("eap_ig", "trapezoid", (3, 3)),
    ):
        counted.update(forward=0, backward=0)
        passes = run(model, task, method=method, rule=rule, batch_size=2).passes
        assert (counted["forward"], counted["backward"]) == passes == (3 * a_pair[0], 3 * a_pair[1])


def test_frozen_norms_give_another_gradient() -> None:
    """With frozen norms the gradient at a reader's input is that of the norm at its scale: centring and weight only."""
    model = cases.plain("gpt2_like")
    task = cases.pairs_task(model, (5,))
    frozen = run(model, task, method="eap", rules=Rules(norm="frozen"))
    name, norm = "blocks.1.hook_resid_mid", model.norm("blocks.1.ln2")
    sites = [name, "blocks.1.ln2.hook_out"]
    here = model.run(task.clean, record=sites, gradients=sites, metric=task.metric, rules=Rules(norm="frozen"))
    there = model.run(task.corrupt, record=["blocks.0.hook_mlp_out"])
    before = model.run(task.clean, record=["blocks.0.hook_mlp_out"])
    change, stream = (there.activations["mlp_out", 0] - before.activations["mlp_out", 0]).values, here.activations[name]
    a = norm.centre(here.gradients[sites[1]].values * norm.weight) / norm.scale(stream.values)[..., None]
    assert frozen.value("m0", "m1", "signed") == pytest.approx(float((change * a).sum()), abs=EXACT)
    assert frozen.settings["completeness"] is None
    full = run(model, task, method="eap")
    assert abs(full.value("m0", "m1", "signed") - frozen.value("m0", "m1", "signed")) > 1e-4


def test_models_whose_writes_do_not_add_up_are_refused() -> None:
    for family in ("gemma2", "olmo2", "bert"):
        model = cases.hf(family)
        with pytest.raises(UnsupportedFeatureError, match=r"norms act on what its blocks write(.|\n)*score nodes"):
            run(model, cases.pairs_task(model))


def test_bad_input() -> None:
    model = cases.plain("gpt2_like")
    task = cases.pairs_task(model)
    with pytest.raises(UnknownNameError, match=r"method 'eapig'(.|\n)*did you mean 'eap_ig'"):
        run(model, task, method="eapig")
    with pytest.raises(UnknownNameError, match="no such quadrature rule"):
        run(model, task, rule="simpson")
    with pytest.raises(UnknownNameError, match="no such direction"):
        run(model, task, direction="up")
    with pytest.raises(SettingError, match="steps=0"):
        edge_attribution(model, task, steps=0)
    with pytest.raises(SettingError, match="batch_size=0"):
        run(model, task, batch_size=0)
    with pytest.raises(EmptyTaskError, match="no pair index"):
        run(model, task.rows([]))


def test_the_first_site_that_overflows_is_named() -> None:
    model = cases.plain("gpt2_like")
    task = cases.pairs_task(model)

    class Burst(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> Tensor:
            return gradients[0] * torch.inf

    burst: Any = Burst.apply
    metric = replace(task.metric, function=lambda logits, batch: burst(task.metric(logits, batch)))
    with pytest.raises(NonFiniteError, match=r"edge scores at blocks\.1\.hook_resid_post"):
        run(model, replace(task, metric=metric))
