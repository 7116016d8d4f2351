"""Gates: each row decides for itself, from its prompt, and what it decided is kept."""

from __future__ import annotations

import itertools
import threading
from typing import Any

import families
import pytest
import torch
from backends import backend_model
from patching_cases import plain
from steering_cases import FAMILIES, SITE, by_hand, everywhere, vector

import mechattr as ma
from mechattr.errors import MismatchError, SettingError, UnknownNameError, UnsupportedFeatureError
from mechattr.models import Batch
from mechattr.models.base import Start
from mechattr.sites import full_name
from mechattr.steering import Condition, SteeringVector
from mechattr.steering.conditions import SIMILARITIES

READ = full_name("resid_post", 0)
ROWS = {"cosine": "last", "projection": "mean", "tanh": "last"}


def read_alone(model: Any, batch: Batch, c: torch.Tensor, similarity: str, positions: str) -> torch.Tensor:
    """The similarity of each row without its padding, from the formula."""
    found = []
    for row in range(len(batch)):
        x = model.run(families.alone(batch, row), record=READ).activations[READ].values[0].double()
        h, u = (x[-1] if positions == "last" else x.mean(0)), c.double() / c.double().norm()
        other = {"cosine": u, "tanh": torch.tanh((h @ u) * u)}
        found.append(
            h @ u if similarity == "projection" else h @ other[similarity] / h.norm() / other[similarity].norm()
        )
    return torch.stack(found)


def between(
    model: Any, batch: Batch, similarity: str = "cosine", positions: str = "last"
) -> tuple[Condition, list[bool]]:
    """A condition whose threshold lies between what rows have, and which rows it opens for by definition: not the
    first alone, and not all."""
    for seed in range(20):
        c = torch.randn(model.info.d_model, generator=torch.Generator().manual_seed(seed))
        scores = read_alone(model, batch, c, similarity, positions)
        low, middle, *_ = scores.sort().values.tolist()
        opened = (scores > (low + middle) / 2).tolist()
        if not opened[0]:
            return Condition.of(READ, c, (low + middle) / 2, similarity=similarity, positions=positions), opened
    raise AssertionError("no such direction")


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_a_condition_decides_row_by_row(similarity: str, side: str) -> None:
    for model in (plain("gpt2_like"), families.hooked("llama")):
        batch = Batch.of(families.ragged(side).tokens % model.info.d_vocab, families.ragged(side).mask)
        gate, opened = between(model, batch, similarity, ROWS[similarity])
        torch.testing.assert_close(
            gate.scores(model, batch).double(),
            read_alone(model, batch, gate.direction, similarity, ROWS[similarity]),
            rtol=0,
            atol=1e-4,  # float32 sums
        )
        for operator in ("add", "ablate"):
            with vector(model).apply(model, operator=operator, gate=gate):
                found = model.run(batch).logits
            with vector(model).apply(model, operator=operator, gate=opened):
                assert torch.equal(found, model.run(batch).logits)
            clean = model.run(batch).logits
            with vector(model).apply(model, operator=operator):
                steered = model.run(batch).logits
            for row, is_open in enumerate(opened):  # to the last bit
                assert torch.equal(found[row], (steered if is_open else clean)[row])
            with vector(model).apply(model, operator=operator, gate=[opened[0]] * 3):  # control: the first row decides
                assert not torch.equal(found, model.run(batch).logits)
        with vector(model).apply(model, [float(one) for one in opened]):
            by_multiplier = model.run(batch).logits
        with vector(model).apply(model, gate=gate):
            assert torch.equal(model.run(batch).logits, by_multiplier)


@pytest.mark.parametrize("place", ["all", "generated"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_decision_is_kept_while_tokens_are_generated(family: str, place: str) -> None:
    model, steps, batch = families.hooked(family), 4, families.ragged("left")
    v = everywhere(model)
    gate, opened = between(model, batch, positions="mean")
    factors = [float(one) for one in opened]
    expected = by_hand(model, batch, v, place, steps, factors)
    given = {"attention_mask": batch.mask.long(), "pad_token_id": 2}
    for settings in ({}, {"num_beams": 3}):
        settings = {"max_new_tokens": steps, "min_new_tokens": steps, "do_sample": False, **settings}
        with v.apply(model, gate=gate, positions=place):
            found = model.generate(batch, **settings).tokens
        with v.apply(model.model, gate=gate, positions=place):
            assert torch.equal(model.model.generate(batch.tokens, **given, **settings), found)
        with v.apply(model, factors, positions=place):
            assert torch.equal(model.generate(batch, **settings).tokens, found)
        assert "num_beams" in settings or torch.equal(found[:, -steps:], expected)


def test_what_is_generated_does_not_change_the_decision() -> None:
    """Control: a loop that decides again at each step from all tokens so far says something else."""
    model, steps, batch = families.hooked("gpt2"), 8, families.ragged("left")
    v = vector(model, size=8.0)
    gate, opened = between(model, batch)
    with v.apply(model, gate=gate):
        found = model.generate(batch, max_new_tokens=steps, min_new_tokens=steps, do_sample=False).tokens[:, -steps:]
    factors = [float(one) for one in opened]
    assert torch.equal(found, by_hand(model, batch, v, "all", steps, factors))
    again = []
    for row in range(len(batch)):
        tokens = families.alone(batch, row).tokens
        for _ in range(steps):
            with v.apply(model, gate=gate):
                tokens = torch.cat([tokens, model.run(Batch.of(tokens)).logits[:, -1:].argmax(-1)], 1)
        again.append(tokens[0, -steps:])
    assert not torch.equal(torch.stack(again), found)


@pytest.mark.parametrize("kind", ["lens-gpt2", "nnsight-gpt2", "nnsight-local-gpt2"])
def test_other_backends_are_gated_alike(kind: str) -> None:
    model, other, batch = families.hooked("gpt2"), backend_model(kind), families.ragged("left")
    gate, opened = between(model, batch)
    v = vector(model)
    for given in (gate, opened):
        with v.apply(model, gate=given):
            expected, tokens = model.run(batch).logits[batch.mask], model.generate(batch, max_new_tokens=3).tokens
        if kind == "nnsight-local-gpt2" and given is gate:
            text = "a gate that reads activations\n  found: remote='local', where each forward pass stands alone"
            with pytest.raises(UnsupportedFeatureError, match=text), v.apply(other, gate=given):
                pass
            continue
        with v.apply(other, gate=given):
            torch.testing.assert_close(other.run(batch).logits[batch.mask], expected, rtol=0, atol=1e-4)  # float32
            assert torch.equal(other.generate(batch, max_new_tokens=3).tokens, tokens)
    with v.apply(other), pytest.raises(AssertionError):  # control: no gate
        torch.testing.assert_close(other.run(batch).logits[batch.mask], expected, rtol=0, atol=1e-4)


def test_rules_and_functions_of_the_batch() -> None:
    model, batch = families.hooked("gpt2"), families.ragged("left")
    one, first = between(model, batch)
    other, second = between(model, batch, "projection", "mean")
    other, second = ~other, [not is_open for is_open in second]
    a, b = torch.tensor(first), torch.tensor(second)
    v = vector(model)
    rules: list[tuple[Any, torch.Tensor]] = [
        (one & other, a & b), (one | other, a | b), (~one, ~a), (~(one | other) | one & one, ~(a | b) | a),
        (lambda rows: rows.lengths > 4, batch.lengths > 4),
    ]  # fmt: skip
    marks = set()
    for gate, opened in rules:
        with v.apply(model, gate=gate):
            found, marks = model.run(batch).logits, marks | {model.fingerprint()["standing_hash"]}
        with v.apply(model, gate=opened):
            assert torch.equal(found, model.run(batch).logits)
            marks |= {model.fingerprint()["standing_hash"]}
        with v.apply(model, gate=~opened):
            assert not torch.equal(found, model.run(batch).logits)
    assert len(marks) == len(rules) + len({tuple(opened.tolist()) for _, opened in rules})


def test_gated_blocks_nest_and_see_what_outer_blocks_steer() -> None:
    model, batch = families.hooked("gpt2"), families.ragged("left")
    gate, opened = between(model, batch)
    push = SteeringVector.of({READ: -50 * gate.direction})  # closes the gate for every row
    for around in (model, model.model):

        def logits(around: Any = around) -> torch.Tensor:
            if around is model:
                return model.run(batch).logits
            positions = batch.positions.clamp(min=0)
            with torch.no_grad():
                return around(batch.tokens, attention_mask=batch.mask.long(), position_ids=positions).logits

        with push.apply(around):
            pushed = logits()
            with vector(model).apply(around, gate=gate):
                assert torch.equal(logits(), pushed)
        with vector(model).apply(around, gate=gate), push.apply(around):  # the gate is read before the push
            found = logits()
        with vector(model).apply(around, gate=opened), push.apply(around):
            assert torch.equal(logits(), found) and not torch.equal(found, pushed)
        with vector(model).apply(around, gate=gate), vector(model, 1).apply(around, gate=~gate):
            found = logits()
        with vector(model).apply(around, gate=opened), vector(model, 1).apply(around, gate=[not o for o in opened]):
            assert torch.equal(logits(), found)


def test_threads_have_decisions_of_their_own() -> None:
    model, batch = families.hooked("llama"), families.ragged("left")
    gate, _ = between(model, batch)
    order = [torch.tensor(index) for index in ([0, 1, 2], [2, 1, 0], [1, 0, 2])]
    found: dict[int, list[torch.Tensor]] = {}
    with vector(model).apply(model, gate=gate):
        expected = [model.run(batch.rows(index)).logits for index in order]

        def work(which: int) -> None:
            found[which] = [model.run(batch.rows(order[which])).logits for _ in range(8)]

        threads = [threading.Thread(target=work, args=(which,)) for which in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(torch.equal(x, expected[which]) for which in range(3) for x in found[which])


def test_a_condition_is_fitted_and_saved(tmp_path: Any) -> None:
    model = ma.load("tiny")
    nouns = ("rabbit", "lion", "shepherd", "writer", "gardener", "beggar", "cow", "farmer")
    pairs = [(f"I think that the {noun}s", f"I think that the {noun}") for noun in nouns]
    batch = model.tokenize([text for pair in pairs for text in pair], padding_side="left")
    for similarity in SIMILARITIES:
        gate = ma.steering.condition(model, pairs, layers=[2, 3], similarity=similarity)
        assert gate.settings["f1"] == gate.settings["held_out_f1"] == 1.0 and gate.settings["n_held_out"] == 2
        found = gate.scores(model, batch)
        low, high = float(found[1::2].max()), float(found[::2].min())
        assert gate.settings["comparator"] == "above" and low < gate.threshold < high
        train = ma.steering.condition(model, pairs, layers=[2, 3], similarity=similarity, seed=1)
        assert train.threshold != gate.threshold  # other pairs are held out
    swapped = ma.steering.condition(model, [pair[::-1] for pair in pairs], layers=[2, 3], builder=ma.steering.pca)
    assert swapped.settings["direction"] == "pca" and torch.equal(
        swapped.decide(model.run(batch, record=swapped.site).activations[swapped.site].values, batch),
        torch.tensor([False, True] * len(pairs)),
    )
    grid = [k / 100 for k in range(101)]
    coarse = ma.steering.condition(model, pairs, layers=[2, 3], similarity="tanh", thresholds=grid)
    assert coarse.threshold in grid and coarse.settings["f1"] <= 1.0
    gate.save(tmp_path / "gate")
    again = ma.open(tmp_path / "gate")
    assert isinstance(again, Condition) and again.digest == gate.digest and again.settings == gate.settings


def test_the_best_cut_is_that_of_all_cuts() -> None:
    """Against every threshold and comparator by counting; of cuts with one F1 the widest."""
    from mechattr.steering.condition import _cuts

    generator = torch.Generator().manual_seed(0)
    for n in (3, 4, 9):
        positive, negative = torch.randn(2, n, generator=generator, dtype=torch.float64) + torch.tensor([[0.5], [0]])
        every = torch.cat([positive, negative]).sort().values
        for cut in _cuts(positive, negative, None):
            best = (-1.0, 0.0, 0.0)
            for low, high in itertools.pairwise(every):
                t = (low + high) / 2
                hits, false = ((x > t) if cut.comparator == "above" else (x < t) for x in (positive, negative))
                tp, fp = int(hits.sum()), int(false.sum())
                best = max(best, (2 * tp / (2 * tp + fp + n - tp), float((high - low) / 2 / every.std()), float(t)))
            assert (cut.f1, cut.threshold) == (best[0], best[2]) and cut.gap == pytest.approx(best[1])


def test_what_does_not_fit_is_refused() -> None:
    model, batch = families.hooked("gpt2"), families.ragged("left")
    v, c = vector(model), torch.ones(model.info.d_model)
    late, early = Condition.of(full_name("ln1", 1), c, 0.0), vector(model, site=READ)
    cases: list[tuple[Any, type[Exception], str]] = [
        (Condition.of(full_name("resid_post", 7), c, 0.0), MismatchError, "has no such site"),
        (Condition.of(READ, c[:3], 0.0), MismatchError, rf"a gate that reads \[3\] at {READ}"),
        (1, SettingError, r"gate=1\n  found: torch.int64 of shape \[\]"),
        ("yes", SettingError, "found: a str\n  fix: give one bool a row, a condition"),
        ([1, 0, 1], SettingError, "found: torch.int64"),
    ]
    for gate, kind, text in cases:
        with pytest.raises(kind, match=text), v.apply(model, gate=gate):
            pass
    text = f"a gate that reads {late.site}\n  found: steering at {READ}, which comes before it\n  fix: read the site"
    for gate in (late, ~late | late):
        with pytest.raises(SettingError, match=text), early.apply(model, gate=gate):
            pass
    with early.apply(model, gate=Condition.of(READ, c, 0.0)):  # what it reads at one site is not steered yet
        model.run(batch)
    text = "a gate of 9 rows\n  found: a batch of 3 rows\n  fix: give one bool for each prompt: its beams share it"
    for around in (model, model.model):
        for gate in ([True] * 9, lambda _rows: [True] * 9):
            with v.apply(around, gate=gate), pytest.raises(SettingError, match=text):
                if around is model:
                    model.generate(batch, num_beams=3, max_new_tokens=2)
                else:
                    around.generate(batch.tokens, attention_mask=batch.mask.long(), num_beams=3, max_new_tokens=2)
    with v.apply(model, [1.0] * 9), pytest.raises(SettingError, match="9 multipliers\n  found: a batch of 3 rows"):
        model.generate(batch, num_beams=3, max_new_tokens=2)
    with v.apply(model, positions=torch.ones(9, 7).bool()), pytest.raises(SettingError, match=r"of shape \[9, 7\]"):
        model.generate(batch, num_beams=3, max_new_tokens=2)
    gate = Condition.of(READ, c, 0.0)
    with v.apply(model, gate=gate) as steered:
        stream = steered.run(batch, record=SITE).activations[SITE].values
        with pytest.raises(UnsupportedFeatureError, match="or below the start of this run"):
            steered.run(batch, start=Start(1, stream))
    with v.apply(model.model, gate=gate):
        cache = model.model(batch.tokens[:1, :4]).past_key_values  # inside: what it goes on with has a decision
        model.model(batch.tokens[:1, 4:], past_key_values=cache)
    cache = model.model(batch.tokens[:1, :4]).past_key_values
    text = "a forward pass over 3 of the prompt's 7 columns\n  fix: hand the whole prompt over at once"
    with v.apply(model.model, gate=gate), pytest.raises(UnsupportedFeatureError, match=text):
        model.model(batch.tokens[:1, 4:], past_key_values=cache)


def test_conditions_that_are_none() -> None:
    c = torch.ones(16)
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"comparator": "larger"}, UnknownNameError, "comparator='larger'\n  found: no such name"),
        ({"similarity": "cosin"}, UnknownNameError, "did you mean 'cosine'"),
        ({"positions": "first"}, SettingError, "positions='first'"),
        ({"threshold": float("nan")}, SettingError, "threshold=nan\n  found: no finite number"),
        ({"direction": 0 * c}, SettingError, "a direction of zeros, NaN or infinity"),
        ({"site": full_name("pattern", 0), "direction": c[:, None]}, SettingError, "axes batch, head, query, key"),
    ]
    for given, kind, text in cases:
        with pytest.raises(kind, match=text):
            Condition.of(**{"site": READ, "direction": c, "threshold": 0.0, **given})
    with pytest.raises(SettingError, match="a rule of gates\n  found: a bool"):
        Condition.of(READ, c, 0.0) & True
    model = ma.load("tiny")
    pairs = [("the cows", "the cow"), ("the lions", "the lion")]
    for data, settings, text in (
        (pairs, {}, "pairs\n  found: 2\n  fix: give at least 3"),
        (3 * pairs, {"held_out": 0}, "held_out=0\n  found: no share"),
        (3 * pairs, {"positions": 0}, "a vector of mean_difference\n  found: no difference at blocks.1.hook_resid"),
    ):
        with pytest.raises(SettingError, match=text):
            ma.steering.condition(model, data, layers=[1], **settings)
    with pytest.raises(UnknownNameError, match="did you mean 'tanh'"):
        ma.steering.condition(model, pairs, layers=[1], similarity="tan")
    with pytest.raises(SettingError, match="builder='pca'\n  found: a str"):
        ma.steering.condition(model, pairs, layers=[1], builder="pca")  # type: ignore[arg-type]
