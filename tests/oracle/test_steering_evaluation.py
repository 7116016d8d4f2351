"""Evaluations of steering: every measure and control against its definition."""

from __future__ import annotations

import itertools
from typing import Any

import families
import numpy as np
import pytest
import torch
from torch.testing import assert_close

import mechattr as ma
from mechattr.models import HookedModel
from mechattr.models.plain import PlainConfig, plain_model
from mechattr.sites import full_name
from mechattr.steering import SteeringEvaluation, SteeringVector
from mechattr.steering.intervals import interval

TRIPLES = [("a b a", " a", " b a"), ("b b a b a a", " b", " a"), ("b a", " a a b", " b"), ("a a a", " b", " a")]
NEUTRAL = ["a b b a", "b a", "a a b a b b"]
MULTIPLIERS = (-0.5, 0.0, 1.0, 2.0)
SITE = full_name("resid_post", 0)
EXACT: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-12}  # float64, other batch shapes
PREFIX = "b a a "


@pytest.fixture(scope="module")
def model() -> HookedModel:
    return plain_model(PlainConfig.gpt2_like(n_layers=2), tokenizer=families.tokenizer())


@pytest.fixture(scope="module")
def vector(model: HookedModel) -> SteeringVector:
    return SteeringVector.of(
        {SITE: torch.randn(model.info.d_model, generator=torch.Generator().manual_seed(1)).double()}
    )


@pytest.fixture(scope="module")
def noise(vector: SteeringVector) -> SteeringVector:
    return ma.steering.random_like(vector, 77)


@pytest.fixture(scope="module")
def found(model: HookedModel, vector: SteeringVector, noise: SteeringVector) -> SteeringEvaluation:
    return ma.steering.evaluate(
        model, vector, TRIPLES, multipliers=MULTIPLIERS, neutral=NEUTRAL, shuffled=noise, prompting=PREFIX, seed=4
    )


def test_conditions_are_plain_runs_of_their_vectors(
    model: HookedModel, vector: SteeringVector, noise: SteeringVector, found: SteeringEvaluation
) -> None:
    assert found.conditions == ("vector", "random", "shuffled") and found.multipliers == MULTIPLIERS
    draws = [ma.steering.random_like(vector, seed) for seed in (4, 5, 6)]
    tables = {"vector": vector, "random": draws[0], "shuffled": noise}
    for k, m in enumerate(MULTIPLIERS):
        for name, one in tables.items():
            with one.apply(model, m):
                wanted = ma.steering.propensity(model, TRIPLES)
            at = {"condition": name, "multiplier": f"{m:g}"}
            assert_close(found.tensors["propensity"].sel(**at).values, wanted, **EXACT)
            kl = ma.steering.kl_to_base(model, NEUTRAL, lambda one=one, m=m: one.apply(model, m))
            assert_close(found.tensors["kl"].sel(**at).values, kl, **EXACT)
        for draw, one in enumerate(draws):
            with one.apply(model, m):
                wanted = ma.steering.propensity(model, TRIPLES)
            assert_close(found.tensors["random"].values[draw, k], wanted, **EXACT)
    with noise.apply(model, 2.0):  # control: another vector
        assert not torch.allclose(found.tensors["propensity"].values[0, -1], ma.steering.propensity(model, TRIPLES))


def test_plain_prompting_stands_in_front_of_the_prompt(model: HookedModel, found: SteeringEvaluation) -> None:
    prompted = ma.steering.propensity(model, [(PREFIX + p, a, b) for p, a, b in TRIPLES])
    assert_close(found.tensors["prompting"].values, prompted, **EXACT)
    assert found.prompting is not None
    assert found.prompting.value == pytest.approx(float((prompted - found.base).mean()), rel=1e-12)
    behind = ma.steering.propensity(model, [(p + " " + PREFIX.strip(), a, b) for p, a, b in TRIPLES])
    assert not torch.allclose(found.tensors["prompting"].values, behind)  # control: behind the prompt


def test_steerability_is_the_mean_least_squares_slope(found: SteeringEvaluation) -> None:
    m = np.array(MULTIPLIERS)
    for name in found.conditions:
        values = found.tensors["propensity"].sel(condition=name).values.numpy()
        slopes = [np.polyfit(m, values[:, i], 1)[0] for i in range(len(TRIPLES))]
        np.testing.assert_allclose(found.slopes(name).numpy(), slopes, rtol=1e-10)  # another solver
        assert found.steerability(name).value == pytest.approx(np.mean(slopes), rel=1e-10)
        assert found.anti_steerable(name).value == np.mean([slope < 0 for slope in slopes])
        origin = (m @ values) / (m @ m)  # control: a line through the origin
        assert not np.allclose(found.slopes(name).numpy(), origin, rtol=1e-2)
    excess = found.steerability("vector").value - np.mean(np.abs(found.random_steerability))
    assert found.steerability(over="random").value == pytest.approx(excess, rel=1e-12)
    one = found.slopes("vector") - found.slopes("random")  # control: one draw, with the sign that it happens to have
    assert found.steerability(over="random").value != pytest.approx(float(one.mean()), rel=1e-3)
    assert found.random_steerability[0] == pytest.approx(found.steerability("random").value, rel=1e-12)
    assert len(found.random_steerability) == 3


def test_intervals_are_percentiles_of_means_of_drawn_items() -> None:
    values = torch.randn(2, 30, generator=torch.Generator().manual_seed(0)).double()
    drawn = torch.randint(30, (2000, 30), generator=torch.Generator().manual_seed(3))
    for row, (mean, low, high) in zip(values, interval(values, seed=3).T, strict=True):
        means = [float(row[one].mean()) for one in drawn]
        assert_close(torch.stack([low, high]).numpy(), np.quantile(means, [0.025, 0.975]), rtol=1e-10, atol=1e-12)
        assert float(mean) == pytest.approx(float(row.mean()), rel=1e-12)
        normal = 1.96 * float(row.std(correction=0)) / 30**0.5
        assert float(high - low) / 2 == pytest.approx(normal, rel=0.1)  # what large samples tend to
        permuted = [float(row[torch.randperm(30)].mean()) for _ in range(50)]  # control: without replacement
        assert max(permuted) - min(permuted) < 1e-12
    gappy = torch.cat([values, torch.full((2, 5), torch.nan)], 1)
    assert_close(interval(gappy)[0], values.mean(1), rtol=1e-12, atol=1e-12)
    assert bool((interval(gappy)[1] < interval(gappy)[0]).all()) and bool(interval(gappy[:, 30:]).isnan().all())


def test_random_vectors_are_as_long_at_every_head_and_position() -> None:
    z = torch.randn(4, 8, generator=torch.Generator().manual_seed(2))
    z[2] = 0
    first = torch.randn(3, 16, generator=torch.Generator().manual_seed(3))
    one = SteeringVector.of({full_name("z", 1): z, full_name("resid_pre", 0): first})
    likes = [ma.steering.random_like(one, seed) for seed in (0, 0, 1)]
    for name, table in one.tensors.items():
        drawn, same, other = (like.tensors[name].values for like in likes)
        assert_close(drawn.norm(dim=-1), table.values.norm(dim=-1))
        assert torch.equal(drawn, same) and not torch.allclose(drawn, other)
        unscaled = torch.randn(table.shape) / table.shape[-1] ** 0.5 * table.values.norm(dim=-1, keepdim=True)
        with pytest.raises(AssertionError):  # control: as long in the mean only
            assert_close(unscaled.norm(dim=-1), table.values.norm(dim=-1))
    assert not likes[0].tensors[full_name("z", 1)].values[2].any()


def test_shuffled_labels_leave_nothing_of_what_all_pairs_share(model: HookedModel) -> None:
    pairs = [
        ("a a b", "a a a"),
        ("b a b", "b a a"),
        ("a b b", "a b a"),
        ("b b b", "b b a"),
        ("a b", "a a"),
        ("b b", "b a"),
    ]
    differences = [model.run(model.tokenize(list(p)), record=SITE).activations[SITE].values[:, -1] for p in pairs]
    right = torch.stack([x[0] - x[1] for x in differences])
    build = ma.steering.mean_difference
    mixed = ma.steering.shuffled(build, model, pairs, seed=2, layers=[0])
    swapped = set(torch.randperm(6, generator=torch.Generator().manual_seed(2))[:3].tolist())
    signs = torch.tensor([-1.0 if i in swapped else 1.0 for i in range(6)]).double()
    assert_close(mixed.directions[0], (signs @ right / 6).float())  # stored in float32
    whole = build(model, pairs, layers=[0]).directions[0]
    assert not torch.allclose(mixed.directions[0], whole)
    sums = [float((torch.randint(0, 2, (6,)) * 2 - 1).sum()) for _ in range(50)]
    assert float(signs.sum()) == 0 and any(sums)  # control: coins keep a share of what pairs have in common
    triples = [(p, a, b) for p, a, b in TRIPLES]
    seen: list[Any] = []
    ma.steering.shuffled(lambda m, data, seed: seen.append(data) or mixed, model, triples, seed=1)
    assert sum(a != b for a, b in zip(seen[0], triples, strict=True)) == 2
    assert all({*a[1:]} == {*b[1:]} and a[0] == b[0] for a, b in zip(seen[0], triples, strict=True))


def test_the_frontier_is_mean_effect_against_mean_kl(found: SteeringEvaluation) -> None:
    frontier, control = found.frontier(), found.frontier("random")
    assert frontier.labels == tuple(("vector", m) for m in MULTIPLIERS) and control.labels[0] == ("random", -0.5)
    values = found.tensors["propensity"].values
    assert_close(frontier.effect, (values[0] - found.base).mean(1), **EXACT)
    assert_close(frontier.side, found.tensors["kl"].values[0].mean(1), **EXACT)
    assert float(frontier.side[1]) == float(frontier.effect[1]) == 0.0
    assert not torch.allclose(frontier.effect, values[0].mean(1))  # control: propensity and not its change


def test_equal_evaluations_are_equal_files(
    model: HookedModel, vector: SteeringVector, noise: SteeringVector, found: SteeringEvaluation, tmp_path: Any
) -> None:
    how: dict[str, Any] = {"neutral": NEUTRAL, "shuffled": noise, "prompting": PREFIX}
    again = ma.steering.evaluate(model, vector, TRIPLES, multipliers=MULTIPLIERS, seed=4, **how)
    other = ma.steering.evaluate(model, vector, TRIPLES, multipliers=MULTIPLIERS, seed=5, **how)
    for name, one in (("a", found), ("b", again), ("c", other)):
        one.save(tmp_path / name)
    a, b, c = ((tmp_path / name).read_bytes() for name in "abc")
    assert a == b and a != c
    opened = ma.open(tmp_path / "a")
    assert isinstance(opened, SteeringEvaluation) and opened.summary == found.summary and repr(opened) == repr(found)
    assert opened.steerability() == found.steerability()


def test_the_table_says_it_all(found: SteeringEvaluation) -> None:
    table = found.to_pandas()
    assert table.condition.tolist() == [name for name in found.conditions for _ in MULTIPLIERS] + ["prompting"]
    row = table[(table.condition == "vector") & (table.multiplier == 2.0)].iloc[0]
    assert row.effect == pytest.approx(float(found.effects("vector")[3].mean()))
    assert row.effect_low < row.effect < row.effect_high and row.kl_low < row.kl < row.kl_high
    assert table.iloc[-1].effect == pytest.approx(found.prompting.value) and np.isnan(table.iloc[-1].multiplier)
    html = found._repr_html_()
    assert "steerability" in html and "random vectors" in html and "shuffled labels" in html
    assert "effect</th>" in html and "effect_low" not in html


def test_written_texts_are_those_of_one_generation_each(model: HookedModel, vector: SteeringVector) -> None:
    asked: list[list[str]] = []

    def judge(texts: list[str]) -> list[float]:
        asked.append(texts)
        return [float(text.count("b")) for text in texts]

    found = ma.steering.evaluate(
        model, vector, TRIPLES, multipliers=(0.0, 2.0), positions="generated", random=1, prompting=PREFIX, generate=7,
        judge=judge, batch_size=3,
    )  # fmt: skip
    random = ma.steering.random_like(vector, 0)
    prompts = [prompt for prompt, *_ in TRIPLES]
    ways: list[Any] = [("vector", vector), ("random", random)]
    for name, one in ways:
        for k, m in enumerate((0.0, 2.0)):
            rows = []
            for i, prompt in enumerate(prompts):
                batch = model.tokenize(prompt)
                with one.apply(model, m, positions="generated"):
                    written = model.generate(batch, max_new_tokens=7, do_sample=False)
                assert found.settings["texts"][name][k][i] == written.texts[0]
                ids = written.tokens[0].tolist()
                start = len(batch.tokens[0])
                end = ids.index(1, start) + 1 if 1 in ids[start:] else len(ids)
                log_p = model.run(ma.models.Batch.of(torch.tensor([ids[:end]]))).logits[0].log_softmax(-1)
                surprise = -np.mean([float(log_p[t - 1, ids[t]]) for t in range(start, end)])
                at = {"condition": name, "multiplier": f"{m:g}"}
                assert float(found.tensors["perplexity"].sel(**at).values[i]) == pytest.approx(
                    np.exp(surprise), rel=1e-9
                )
                assert float(found.tensors["judge"].sel(**at).values[i]) == written.texts[0].count("b")
                rows.append(ids[start:end])
            grams = [[tuple(row[i : i + 4]) for i in range(len(row) - 3)] for row in rows]
            again = torch.tensor([1 - len({*g}) / len(g) if g else torch.nan for g in grams]).double()
            assert_close(found.tensors["repetition"].sel(**at).values, again, equal_nan=True)
            twos = [pair for row in rows for pair in itertools.pairwise(row)]
            assert float(found.tensors["distinct_2"].sel(**at).values) == pytest.approx(len({*twos}) / len(twos))
    prompted = [model.generate(model.tokenize(PREFIX + p), max_new_tokens=7, do_sample=False).texts[0] for p in prompts]
    assert found.settings["texts"]["prompting"] == [prompted]
    assert len(asked) == 5 and asked[-1] == prompted
    assert found.settings["texts"]["vector"][0] == found.settings["texts"]["random"][0]
    assert found.settings["texts"]["vector"][0] != found.settings["texts"]["vector"][1]  # control: not steered
    assert {"perplexity", "distinct_2", "repetition", "judge", "judge_low"} <= {*found.to_pandas().columns}


def test_a_gate_closes_for_texts_and_items_alike(model: HookedModel, vector: SteeringVector) -> None:
    how: dict[str, Any] = {"multipliers": (0.0, 2.0), "generate": 4, "random": 1, "neutral": NEUTRAL}
    found = ma.steering.evaluate(model, vector, TRIPLES, gate=lambda batch: batch.lengths > 4, **how)
    open_for = [len(model.tokenize(prompt).tokens[0]) > 4 for prompt, *_ in TRIPLES]
    whole = ma.steering.evaluate(model, vector, TRIPLES, **how)
    for name in ("vector", "random"):
        base, steered = found.settings["texts"][name]
        assert steered == [
            b if opened else a for opened, a, b in zip(open_for, base, whole.settings["texts"][name][1], strict=True)
        ]
        moved = whole.tensors["propensity"].sel(condition=name).values[1]
        gated = found.tensors["propensity"].sel(condition=name).values[1]
        assert_close(gated, torch.where(torch.tensor(open_for), moved, found.base), **EXACT)
        assert not torch.allclose(gated, moved)  # control: no gate


def test_a_function_of_the_state_stands_beside_vectors_as_long_as_what_it_adds(model: HookedModel) -> None:
    pairs = [("a b b", "a b a"), ("b b b", "b b a"), ("a a b", "a a a"), ("b a b", "b a a")]
    function = ma.steering.g_act(model, pairs, layers=[0], clusters=2)
    other = ma.steering.shuffled(ma.steering.g_act, model, pairs, layers=[0], clusters=2)
    found = ma.steering.evaluate(model, function, TRIPLES, multipliers=(0.0, 1.0), shuffled=other, random=2, generate=2)
    texts = [prompt + answer for prompt, *answers in TRIPLES for answer in answers]
    added = []
    for text in texts:
        x = model.run(model.tokenize(text), record=SITE).activations[SITE].values[0]
        added += function.added(SITE, x).norm(dim=-1).tolist()
    for seed in (0, 1):
        control = ma.steering.controls.random_of(model, {SITE: float(np.mean(added))}, seed)
        assert control.norms()[SITE] == pytest.approx(np.mean(added), rel=1e-6)  # float32
        with control.apply(model, 1.0):
            wanted = ma.steering.propensity(model, TRIPLES)
        assert_close(found.tensors["random"].values[seed, 1], wanted, rtol=1e-5, atol=1e-5)  # float32 vectors
    centroids = function.parts(SITE)[0].norm(dim=-1).mean()  # control: each centroid counts once
    assert float(centroids) != pytest.approx(np.mean(added), rel=1e-3)
    for name, one in (("vector", function), ("shuffled", other)):
        with one.apply(model, 1.0):
            wanted = ma.steering.propensity(model, TRIPLES)
            text = model.generate(model.tokenize(TRIPLES[0][0]), max_new_tokens=2, do_sample=False).texts[0]
        assert_close(found.tensors["propensity"].sel(condition=name).values[1], wanted, **EXACT)
        assert found.settings["texts"][name][1][0] == text
    assert found.passes.forward == 8 + 8 + 4 * 8 * 1.0 / 2 + 3 * 2 * 4  # base, lengths, half of the blocks, texts


def test_directions_of_single_positions_act_where_they_stand(model: HookedModel) -> None:
    values = torch.randn(2, model.info.d_model, generator=torch.Generator().manual_seed(8)).double()
    one = SteeringVector.of({SITE: values})
    found = ma.steering.evaluate(model, one, TRIPLES, multipliers=(0.0, 1.0), random=1)
    for name, used in (("vector", one), ("random", ma.steering.random_like(one, 0))):
        with used.apply(model, 1.0):
            wanted = ma.steering.propensity(model, TRIPLES)
        assert_close(found.tensors["propensity"].sel(condition=name).values[1], wanted, **EXACT)
    first = ma.steering.evaluate(model, SteeringVector.of({SITE: values[0]}), TRIPLES, multipliers=(0.0, 1.0), random=1)
    # control: the first direction at every position
    assert not torch.allclose(first.tensors["propensity"].values[0], found.tensors["propensity"].values[0])


def test_heads_from_attribution_are_scored_by_the_task_that_found_them() -> None:
    model = ma.load("tiny")
    task = ma.tasks.make(model, "subject_verb", n=8, seed=0)
    result = ma.attribution_patching(model, task, sites=["z"], positions="all")
    pairs = [(f"I think that the {noun}s", f"I think that the {noun}") for noun in ("rabbit", "lion", "writer")]
    heads = ma.steering.mean_difference(model, pairs, sites=result.top(3))
    found = ma.steering.evaluate(model, heads, task, multipliers=(0.0, 1.0), positions="last", random=1)
    with heads.apply(model, 1.0, positions="last"):
        wanted = model.run(task.clean, metric=task.metric).metric
    values = found.tensors["propensity"].sel(condition="vector").values
    assert_close(values[1], wanted, rtol=1e-4, atol=1e-4)  # float32, other batch shapes
    assert not torch.allclose(values[0], wanted, rtol=1e-4, atol=1e-4)  # control: not steered
    assert "logit" in found.summary and found.settings["measure"]["name"] == task.metric.name
