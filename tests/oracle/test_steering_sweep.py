"""Sweeps: against definitions with one text, vector and multiplier at a time, nothing stacked and nothing restarted."""

from __future__ import annotations

from typing import Any

import families
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import mechattr as ma
from mechattr.errors import SettingError
from mechattr.models import Batch, Edit, HookedModel
from mechattr.models.plain import PlainConfig, plain_model
from mechattr.sites import full_name
from mechattr.steering import Condition, SteeringVector
from mechattr.steering.prompted import applied_to
from mechattr.steering.scored import items, texts
from mechattr.steering.stacked import Steered

TRIPLES = [("a b a", " a", " b a"), ("b b a b a a", " b", " a"), ("b a", " a a b", " b"), ("a a a", " b", " a")]
NEUTRAL = ["a b b a", "b a", "a a b a b b"]
MULTIPLIERS = (-1.5, 0.0, 0.5, 2.0)
WHERE = ("all", "prompt", "generated", "last", [0, -2])
EXACT: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-12}  # float64, other batch shapes


@pytest.fixture(scope="module")
def model() -> HookedModel:
    return plain_model(PlainConfig.gpt2_like(n_layers=3), tokenizer=families.tokenizer())


@pytest.fixture(scope="module")
def vector(model: HookedModel) -> SteeringVector:
    return drawn(model, [full_name("resid_post", layer) for layer in range(model.info.n_layers)])


def drawn(model: HookedModel, sites: list[str], seed: int = 5) -> SteeringVector:
    generator, d = torch.Generator().manual_seed(seed), model.info.d_model
    return SteeringVector.of({site: torch.randn(d, generator=generator, dtype=torch.double) for site in sites})


def columns(where: Any, n: int, total: int) -> list[int]:
    words = {"all": range(total), "prompt": range(n), "generated": range(n, total), "last": [n - 1]}
    return list(words[where]) if isinstance(where, str) else [p if p >= 0 else n + p for p in where]


def logits_of(model: HookedModel, text: str, moved: dict[str, Tensor], where: list[int]) -> Tensor:
    """x + moved at some positions of some sites, of one text alone."""
    edits = [Edit(site, lambda x, _, by=by: x + by, positions=where) for site, by in moved.items()]
    return model.run(model.tokenize(text), edits=edits if where else []).logits[0]


def log_p(model: HookedModel, prompt: str, answer: str, moved: dict[str, Tensor], where: Any) -> float:
    n, ids = len(model.tokenize(prompt).tokens[0]), model.tokenize(prompt + answer).tokens[0].tolist()
    found = logits_of(model, prompt + answer, moved, columns(where, n, len(ids))).log_softmax(-1)
    return sum(float(found[t - 1, ids[t]]) for t in range(n, len(ids)))


def propensities(model: HookedModel, moved: dict[str, Tensor], where: Any = "all") -> Tensor:
    found = [log_p(model, p, a, moved, where) - log_p(model, p, b, moved, where) for p, a, b in TRIPLES]
    return torch.tensor(found, dtype=torch.double)


def divergences(model: HookedModel, moved: dict[str, Tensor], *, reverse: bool = False) -> Tensor:
    found = []
    for text in NEUTRAL:
        n = len(model.tokenize(text).tokens[0])
        p, q = (logits_of(model, text, by, list(range(n))).log_softmax(-1) for by in ({}, moved))
        p, q = (q, p) if reverse else (p, q)
        found.append(sum(float((p[t].exp() * (p[t] - q[t])).sum()) for t in range(n)) / n)
    return torch.tensor(found, dtype=torch.double)


@pytest.mark.parametrize(("kind", "batch_size"), [("gpt2_like", 3), ("llama_like", 32), ("llama_like", 1)])
def test_a_sweep_is_one_run_for_each_text_layer_and_multiplier(kind: str, batch_size: int) -> None:
    model = plain_model(getattr(PlainConfig, kind)(n_layers=2), tokenizer=families.tokenizer())
    vector = drawn(model, [full_name("resid_post", layer) for layer in range(2)])
    found = ma.steering.sweep(
        model, vector, TRIPLES, multipliers=MULTIPLIERS, neutral=NEUTRAL, batch_size=batch_size
    ).tensors
    for layer, v in vector.directions.items():
        site = full_name("resid_post", layer)
        for m in MULTIPLIERS:
            at = {"layer": layer, "multiplier": f"{m:g}"}
            assert_close(found["propensity"].sel(**at).values, propensities(model, {site: m * v}), **EXACT)
            assert_close(found["kl"].sel(**at).values, divergences(model, {site: m * v}), **EXACT)
    assert_close(found["base"].values, propensities(model, {}), **EXACT)


def test_wrong_sweeps_are_told_apart(model: HookedModel, vector: SteeringVector) -> None:
    """Controls of the test above: multipliers that cross rows, and KL the other way round."""
    found = ma.steering.sweep(model, vector, TRIPLES, multipliers=MULTIPLIERS, neutral=NEUTRAL).tensors
    site, v = full_name("resid_post", 1), vector.directions[1]
    right = torch.stack([propensities(model, {site: m * v}) for m in MULTIPLIERS])
    crossed = found["propensity"].sel(layer=1).values.T.reshape(len(MULTIPLIERS), len(TRIPLES))
    assert not torch.allclose(crossed, right, rtol=1e-3)
    reversed_kl = divergences(model, {site: 2.0 * v}, reverse=True)
    assert not torch.allclose(found["kl"].sel(layer=1, multiplier="2").values, reversed_kl, rtol=1e-3)


@pytest.mark.parametrize("where", WHERE, ids=str)
def test_positions_count_from_the_prompt(model: HookedModel, vector: SteeringVector, where: Any) -> None:
    found = ma.steering.sweep(model, vector, TRIPLES, layers=[1], multipliers=[0.7], positions=where)
    site, by = full_name("resid_post", 1), 0.7 * vector.directions[1]
    values = found.tensors["propensity"].values[0, 0]
    assert_close(values, propensities(model, {site: by}, where), **EXACT)
    if where == "last":  # control: the last token of the answer, which nothing is read from, changes nothing
        assert not torch.allclose(values, propensities(model, {}), rtol=1e-3)


@pytest.mark.parametrize("operator", sorted(ma.steering.OPERATORS))
def test_a_restart_gives_what_apply_gives(model: HookedModel, vector: SteeringVector, operator: str) -> None:
    found = ma.steering.sweep(model, vector, TRIPLES, multipliers=MULTIPLIERS, operator=operator)
    for layer in range(3):
        one = vector.only(full_name("resid_post", layer))
        for m in MULTIPLIERS:
            with one.apply(model, m, operator=operator):
                wanted = ma.steering.propensity(model, TRIPLES)
            values = found.tensors["propensity"].sel(layer=layer, multiplier=f"{m:g}").values
            assert_close(values, wanted, **EXACT)


@pytest.mark.parametrize("operator", ["norm_preserving", "ablate_then_add"])
def test_operators_act_at_positions_as_apply_has_them(
    model: HookedModel, vector: SteeringVector, operator: str
) -> None:
    how: dict[str, Any] = {"layers": [1], "multipliers": [1.5], "operator": operator}
    found = ma.steering.sweep(model, vector, TRIPLES, positions="last", **how).tensors["propensity"].values[0, 0]
    for i, (prompt, *answers) in enumerate(TRIPLES):
        last = [len(model.tokenize(prompt).tokens[0]) - 1]
        with vector.only(full_name("resid_post", 1)).apply(model, 1.5, positions=last, operator=operator):
            a, b = (log_p(model, prompt, answer, {}, "all") for answer in answers)
        assert_close(float(found[i]), a - b, **EXACT)


def test_runs_begin_behind_what_is_the_same(model: HookedModel, vector: SteeringVector) -> None:
    found = ma.steering.sweep(model, vector, TRIPLES, multipliers=MULTIPLIERS, neutral=NEUTRAL)
    rows = 2 * len(TRIPLES) + len(NEUTRAL)
    blocks = 2 + 1 + 1  # behind layer 0, behind layer 1, and the last block again
    assert found.passes.forward == pytest.approx(rows * (1 + 3 * blocks / 3), rel=1e-12)  # no runs at multiplier 0
    every = ma.steering.sweep(model, vector, TRIPLES, multipliers=MULTIPLIERS, neutral=NEUTRAL, operator="ablate")
    assert every.passes.forward == pytest.approx(rows * (1 + 4 * blocks / 3), rel=1e-12)


def test_fewer_blocks_really_run(model: HookedModel, vector: SteeringVector, monkeypatch: Any) -> None:
    ran: list[int] = []
    inner = type(model)._block  # type: ignore[attr-defined]
    monkeypatch.setattr(
        type(model), "_block", lambda s, layer, taps, x, *rest: (ran.append(len(x)), inner(s, layer, taps, x, *rest))[1]
    )
    found = ma.steering.sweep(model, vector, TRIPLES, multipliers=MULTIPLIERS, neutral=NEUTRAL)
    assert sum(ran) == pytest.approx(3 * found.passes.forward, rel=1e-12)


def test_the_multiplier_0_gives_the_base_to_the_last_bit(model: HookedModel, vector: SteeringVector) -> None:
    for operator in ("add", "norm_preserving", "angular"):
        how: dict[str, Any] = {"multipliers": [0.0, 1.0], "operator": operator, "neutral": NEUTRAL}
        found = ma.steering.sweep(model, vector, TRIPLES, **how).tensors
        assert torch.equal(found["base"].values, ma.steering.propensity(model, TRIPLES))
        assert all(torch.equal(one, found["base"].values) for one in found["propensity"].values[:, 0])
        assert not found["kl"].values[:, 0].any() and found["kl"].values[:, 1].all()
    clamped = ma.steering.sweep(model, vector, TRIPLES, multipliers=[0.0], operator="clamp").tensors
    assert not torch.allclose(clamped["propensity"].values, clamped["base"].values)  # control: it changes x at 0


SITES = {
    "two streams": [full_name("resid_post", 0), full_name("resid_post", 2)],
    "a stream and what it is called behind it": [full_name("resid_post", 0), full_name("resid_pre", 1)],
    "inside a block": [full_name("mlp_out", 1)],
    "the first block": [full_name("attn_out", 0)],
    "before all blocks": [full_name("embed")],
}


@pytest.mark.parametrize("sites", SITES.values(), ids=SITES)
def test_a_vector_at_any_sites_is_plain_runs(model: HookedModel, sites: list[str]) -> None:
    one, measured = drawn(model, sites), items(model, TRIPLES)
    scores = Steered(model, [one], MULTIPLIERS, "all", "add", None, 5, False).scores(measured.rows, "")
    for k, m in enumerate(MULTIPLIERS):
        wanted = propensities(model, {site: m * table.values for site, table in one.tensors.items()})
        assert_close(measured.values(scores.steered)[0, k], wanted, **EXACT)


def test_heads_are_swept_layer_by_layer(model: HookedModel) -> None:
    heads, d_head = model.info.n_heads, model.info.d_head
    values = torch.zeros(heads, d_head, dtype=torch.double)
    values[1] = torch.randn(d_head, generator=torch.Generator().manual_seed(3), dtype=torch.double)
    sites = [full_name("z", 2), full_name("z", 0)]
    found = ma.steering.sweep(model, SteeringVector.of(dict.fromkeys(sites, values)), TRIPLES, multipliers=[1.5])
    assert found.layers == (0, 2)
    for layer in (0, 2):
        wanted = propensities(model, {full_name("z", layer): 1.5 * values})
        assert_close(found.tensors["propensity"].sel(layer=layer).values[0], wanted, **EXACT)


def test_inside_another_block_both_act(model: HookedModel, vector: SteeringVector) -> None:
    site, outer = full_name("resid_post", 1), drawn(model, [full_name("resid_post", 1)], seed=9)
    plain = ma.steering.sweep(model, vector, TRIPLES, layers=[1], multipliers=[0.5], operator="norm_preserving")
    with outer.apply(model, 0.8):
        how: dict[str, Any] = {"layers": [1], "multipliers": [0.5], "operator": "norm_preserving", "neutral": NEUTRAL}
        found = ma.steering.sweep(model, vector, TRIPLES, **how)
        with vector.only(site).apply(model, 0.5, operator="norm_preserving"):
            wanted = ma.steering.propensity(model, TRIPLES)
        assert_close(found.tensors["base"].values, ma.steering.propensity(model, TRIPLES), **EXACT)
    assert_close(found.tensors["propensity"].values[0, 0], wanted, **EXACT)
    assert found.passes.forward == 2 * (2 * len(TRIPLES) + len(NEUTRAL))  # from the embeddings
    assert not torch.allclose(plain.tensors["propensity"].values[0, 0], wanted, rtol=1e-3)  # control: one of them


def test_a_task_is_measured_by_its_own_metric() -> None:
    model = ma.load("tiny")
    task = ma.tasks.make(model, "subject_verb", n=6, seed=0)
    vector = drawn(model, [full_name("resid_post", layer) for layer in (0, 2)])
    found = ma.steering.sweep(model, vector, task, multipliers=[-0.1, 0.0, 0.1], positions="last")
    assert found.settings["measure"] == {"name": task.metric.name, "unit": "logit"} and found.unit == "logit"
    for layer in (0, 2):
        site, v = full_name("resid_post", layer), vector.directions[layer].float()
        for k, m in enumerate((-0.1, 0.0, 0.1)):
            for i in range(len(task)):
                one = task.rows([i]).clean
                edit = Edit(site, lambda x, _, by=m * v: x + by, positions=[-1])
                wanted = model.run(one, edits=[edit], metric=task.metric).metric
                at = found.tensors["propensity"].sel(layer=layer).values[k, i]
                assert_close(at, wanted[0], rtol=1e-4, atol=1e-4)  # float32, other batch shapes
    corrupt = model.run(task.corrupt, metric=task.metric).metric
    assert not torch.allclose(found.base, corrupt, rtol=1e-2)  # control: the other prompts


def test_texts_count_as_prompts_or_as_what_is_generated(model: HookedModel, vector: SteeringVector) -> None:
    site, v = full_name("resid_post", 1), vector.directions[1]
    whole = divergences(model, {site: v})
    for where, same in (("prompt", True), ("generated", True), ("last", False)):
        steered = Steered(model, [vector.only(site)], (1.0,), where, "add", None, 8, False)
        found = steered.scores(texts(model, NEUTRAL, where), "").steered[0, 0]
        assert torch.allclose(found, whole, rtol=1e-10) == same


def test_it_does_not_matter_what_stands_beside_a_text(model: HookedModel, vector: SteeringVector) -> None:
    whole = ma.steering.sweep(model, vector, TRIPLES, multipliers=MULTIPLIERS, positions="last").tensors["propensity"]
    for i, triple in enumerate(TRIPLES):  # less padding, and other rows
        alone = ma.steering.sweep(model, vector, [triple], multipliers=MULTIPLIERS[::-1], positions="last")
        assert_close(alone.tensors["propensity"].values[..., 0], whole.values[..., i].flip(1), **EXACT)
    again = ma.steering.sweep(model, vector, TRIPLES, multipliers=MULTIPLIERS, positions="last")
    assert torch.equal(again.tensors["propensity"].values, whole.values)


def test_a_gate_decides_from_the_prompt_alone(model: HookedModel, vector: SteeringVector) -> None:
    site, by = full_name("resid_post", 1), 1.5 * vector.directions[1]
    read = full_name("resid_post", 0)
    direction = torch.randn(model.info.d_model, generator=torch.Generator().manual_seed(0)).double()

    def similarity(text: str) -> float:
        last = model.run(model.tokenize(text), record=read).activations[read].values[0, -1]
        return float(torch.cosine_similarity(last, direction, 0))

    likes = [similarity(prompt) for prompt, *_ in TRIPLES]
    middle = sum(sorted(likes)[1:3]) / 2  # opens for two of the four
    condition = Condition.of(read, direction, middle)
    how: dict[str, Any] = {"layers": [1], "multipliers": [0.0, 1.5], "neutral": NEUTRAL}
    found = ma.steering.sweep(model, vector, TRIPLES, gate=condition, **how)
    steered, base = propensities(model, {site: by}), propensities(model, {})
    opened = torch.tensor(likes) > middle
    assert_close(found.tensors["propensity"].values[0, 1], torch.where(opened, steered, base), **EXACT)
    assert torch.equal(found.tensors["propensity"].values[0, 1][~opened], found.base[~opened])  # to the last bit
    moved, of_texts = divergences(model, {site: by}), torch.tensor([similarity(text) for text in NEUTRAL]) > middle
    assert_close(found.tensors["kl"].values[0, 1], torch.where(of_texts, moved, 0.0), **EXACT)
    rows, runs = 2 * len(TRIPLES) + len(NEUTRAL), 2 * int(opened.sum()) + int(of_texts.sum())
    assert found.passes.forward == pytest.approx(2 * rows + runs / 3, rel=1e-12)
    assert found.settings["gate"] == condition.digest
    whole = [[similarity(prompt + answer) > middle for answer in answers] for prompt, *answers in TRIPLES]
    assert whole != [[bool(one)] * 2 for one in opened]  # control: prompt and answer, as a run around them has it

    by_length = ma.steering.sweep(model, vector, TRIPLES, gate=lambda batch: batch.lengths > 4, **how)
    long = torch.tensor([len(model.tokenize(prompt).tokens[0]) > 4 for prompt, *_ in TRIPLES])
    assert 0 < int(long.sum()) < len(long)
    assert_close(by_length.tensors["propensity"].values[0, 1], torch.where(long, steered, base), **EXACT)
    never = ma.steering.sweep(model, vector, TRIPLES, gate=lambda batch: [False] * len(batch), **how)
    assert all(torch.equal(one, never.base) for one in never.tensors["propensity"].values[0])


def test_a_function_of_the_state_is_swept_like_a_vector(model: HookedModel) -> None:
    pairs = [("a b b", "a b a"), ("b b b", "b b a"), ("a a b", "a a a"), ("b a b", "b a a")]
    given = {layer: ma.steering.g_act(model, pairs, layers=[layer], clusters=2) for layer in (0, 2)}
    for where in ("all", "last"):
        found = ma.steering.sweep(model, given, TRIPLES, multipliers=(0.0, 1.5), positions=where).tensors["propensity"]
        for layer, function in given.items():
            for i, (prompt, *answers) in enumerate(TRIPLES):
                last = [len(model.tokenize(prompt).tokens[0]) - 1]
                for m in (0.0, 1.5):
                    with function.apply(model, m, positions=last if where == "last" else "all"):
                        a, b = (log_p(model, prompt, answer, {}, "all") for answer in answers)
                    assert_close(float(found.sel(layer=layer, multiplier=f"{m:g}").values[i]), a - b, **EXACT)
    assert not torch.allclose(found.values[0], found.values[1])  # control: another layer
    with pytest.raises(SettingError, match="leave operator out"):
        ma.steering.sweep(model, given, TRIPLES, operator="ablate")


@pytest.mark.parametrize("where", WHERE, ids=str)
def test_texts_are_steered_as_while_they_are_written(model: HookedModel, vector: SteeringVector, where: Any) -> None:
    """Greedy tokens are the likeliest ones when what was written is read again."""
    one, differs = vector.only(full_name("resid_post", 0)), False
    for prompt, *_ in TRIPLES:
        batch = model.tokenize(prompt)
        with one.apply(model, 3.0, positions=where):
            tokens = model.generate(batch, max_new_tokens=5, do_sample=False).tokens
        start, whole = batch.lengths, Batch.of(tokens)
        with applied_to(one, model, torch.tensor([3.0]), where, "add", whole, start):
            again = model.run(whole).logits.argmax(-1)
        assert torch.equal(again[0, start - 1 : -1], tokens[0, start:])
        with one.apply(model, 3.0, positions=where):
            differs |= not torch.equal(model.run(whole).logits.argmax(-1)[0, start - 1 : -1], tokens[0, start:])
    assert differs == (where != "all")  # control: as `apply` has positions, the answer is of the prompt
