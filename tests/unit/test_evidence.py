"""Metrics of evidence: cases worked out by hand, chance by enumeration, and what each wrong reading would give."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose

import mechattr as ma
from mechattr.errors import EmptyTaskError, MismatchError, SettingError, UnknownNameError, UnsupportedFeatureError
from mechattr.evaluation import evidence
from mechattr.evaluation.evidence import METRICS, chance
from mechattr.evaluation.evidence_result import BASELINES, EvidenceScores
from mechattr.evaluation.words import of_words, place
from mechattr.models.plain_config import PlainConfig
from mechattr.tasks import EvidenceSample

NAN, INF = np.nan, np.inf

# relevance, evidence (1), words that do not count (-1): values by hand
BY_HAND: dict[str, tuple[list[float], list[int], dict[str, float]]] = {
    "evidence first": ([0.1, 0.6, 0.3], [0, 1, 0], {"PG_1": 1, "PG_2": 1, "MRR": 1, "RMA": 0.6, "RRA": 1}),
    "evidence second": ([0.5, 0.25, 0.25], [0, 1, 0], {"PG_1": 0, "PG_2": 0, "MRR": 1 / 3, "RMA": 0.25, "RRA": 0}),
    "a tie for the first": ([0.5, 0.5, 0.0], [0, 1, 0], {"PG_1": 0, "PG_2": 1, "MRR": 0.5, "RMA": 0.5, "RRA": 0}),
    "all equal": ([0.0, 0.0, 0.0, 0.0], [1, 0, 0, 0], {"PG_1": 0, "PG_2": 0, "MRR": 0.25, "RMA": NAN, "RRA": 0}),
    "against the answer": ([-3.0, 1.0, 0.5], [1, 0, 0], {"PG_1": 0, "PG_2": 0, "MRR": 1 / 3, "RMA": 0, "RRA": 0}),
    "nothing for it": ([-3.0, -1.0, -2.0], [0, 1, 0], {"PG_1": 1, "PG_2": 1, "MRR": 1, "RMA": NAN, "RRA": 1}),
    "two words of evidence": (
        [4.0, 1.0, 3.0, 2.0], [1, 1, 0, 0], {"PG_1": 1, "PG_2": 1, "MRR": 1, "RMA": 0.5, "RRA": 0.5}
    ),
    "evidence that ties": ([2.0, 2.0, 1.0], [1, 1, 0], {"PG_1": 1, "PG_2": 1, "MRR": 1, "RMA": 0.8, "RRA": 1}),
    "a word that does not count": ([9.0, 1.0, 0.0], [-1, 1, 0], {"PG_1": 1, "PG_2": 1, "MRR": 1, "RMA": 1, "RRA": 1}),
    "one word": ([0.0], [1], {"PG_1": 1, "PG_2": 1, "MRR": 1, "RMA": NAN, "RRA": 1}),
    "not finite": ([NAN, 1.0, 2.0], [0, 1, 0], dict.fromkeys(METRICS, NAN)),
    "infinite": ([0.0, INF, 2.0], [0, 1, 0], dict.fromkeys(METRICS, NAN)),
    "not finite, and not counted": ([NAN, 1.0, 0.0], [-1, 1, 0], dict.fromkeys(METRICS, 1.0)),
}  # fmt: skip


def arrays(name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    values, marks, _ = BY_HAND[name]
    return np.array([values]), np.array([marks]) == 1, np.array([marks]) >= 0


@pytest.mark.parametrize("name", BY_HAND)
@pytest.mark.parametrize("metric", METRICS)
def test_metrics_are_what_the_definitions_give_by_hand(name: str, metric: str) -> None:
    # a quotient or two
    assert_allclose(METRICS[metric](*arrays(name)), [BY_HAND[name][2][metric]], rtol=1e-15)


def optimistic_ties(relevance: np.ndarray, marked: np.ndarray, counted: np.ndarray) -> float:
    best = relevance[marked & counted].max()
    return float(1 + (relevance[counted] > best).sum() <= 1)


def magnitude(relevance: np.ndarray, marked: np.ndarray, counted: np.ndarray) -> float:
    return float(evidence.pointing_game(np.abs(relevance), marked, counted)[0])


def padding_counts(relevance: np.ndarray, marked: np.ndarray, counted: np.ndarray) -> float:
    return float(evidence.pointing_game(relevance, marked, np.ones_like(counted))[0])


@pytest.mark.parametrize(
    ("wrong", "case"),
    [
        (optimistic_ties, "a tie for the first"),
        (optimistic_ties, "all equal"),
        (magnitude, "against the answer"),
        (magnitude, "nothing for it"),
        (padding_counts, "a word that does not count"),
    ],
)
def test_wrong_readings_fail_on_the_cases_by_hand(wrong: Callable[..., float], case: str) -> None:
    assert wrong(*arrays(case)) != BY_HAND[case][2]["PG_1"]
    assert wrong(*arrays("evidence first")) == 1  # where nothing is special they agree


def test_rows_are_scored_one_by_one() -> None:
    """Padding and neighbours change nothing."""
    names = [name for name in BY_HAND if name != "one word"]
    width = max(len(BY_HAND[name][0]) for name in names)
    relevance, marked, counted = np.full((len(names), width), 7.0), *np.zeros((2, len(names), width), dtype=bool)
    for row, name in enumerate(names):
        values, m, c = arrays(name)
        size = values.shape[1]
        relevance[row, :size], marked[row, :size], counted[row, :size] = values[0], m[0], c[0]
    for measure in METRICS.values():
        alone = [measure(*arrays(name))[0] for name in names]
        assert_allclose(measure(relevance, marked, counted), alone, rtol=1e-15)  # the same operations


@pytest.mark.parametrize(("n", "g"), [(1, 1), (2, 1), (3, 3), (4, 2), (5, 3), (6, 1)])
def test_chance_is_the_mean_over_all_orders(n: int, g: int) -> None:
    marked = np.array([[True] * g + [False] * (n - g)])
    orders = [np.array([order], dtype=float) for order in itertools.permutations(range(1, n + 1))]
    found = chance(np.array([n, 9]), np.array([g, 1]))  # beside a longer sample
    for metric, measure in METRICS.items():
        mean = np.mean([measure(order, marked, np.ones_like(marked)) for order in orders])
        assert_allclose(found[metric][0], mean, rtol=1e-12)  # sums of up to 720 terms
    if 1 < g < n:  # negative control: as if there were one word of evidence
        assert abs(chance(np.array([n]), np.array([1]))["MRR"][0] - found["MRR"][0]) > 0.1


def test_shapes_that_differ_and_samples_without_evidence_are_refused() -> None:
    relevance, marked = np.ones((2, 3)), np.zeros((2, 3), dtype=bool)
    with pytest.raises(SettingError, match=r"shapes \(2, 3\), \(2, 3\) and \(3, 2\)"):
        evidence.ranks(relevance, marked, np.ones((3, 2), dtype=bool))
    marked[0, 0] = True
    with pytest.raises(EmptyTaskError, match=r"sample 1 has none among the words that count \(1 such samples\)"):
        evidence.ranks(relevance, marked, np.ones_like(marked))


def test_a_word_has_the_sum_of_its_tokens() -> None:
    relevance = torch.tensor([[9.0, 0.25, 0.25, 0.4, 9.0], [1.0, -0.5, 2.0, 3.0, 0.5]], dtype=torch.float64)
    word = torch.tensor([[-1, 0, 0, 1, -1], [0, 0, 1, 2, -1]])
    found = of_words(relevance, word)
    assert_allclose(found, [[0.5, 0.4, 0.0], [0.5, 2.0, 3.0]], rtol=1e-15)  # sums of two
    assert_allclose(of_words(relevance, word, "max"), [[0.25, 0.4, 0.0], [1.0, 2.0, 3.0]], rtol=0)
    with pytest.raises(UnknownNameError, match="reduction 'mean'\n  found: no such reduction"):
        of_words(relevance, word, "mean")  # type: ignore[arg-type]
    # negative control: the mean of a word's tokens lets the second word, of one token, win
    marked, counted = np.array([[True, False]]), np.ones((1, 2), dtype=bool)
    assert evidence.pointing_game(found[:1, :2], marked, counted) == 1
    assert evidence.pointing_game(np.array([[0.5 / 2, 0.4]]), marked, counted) == 0


@pytest.fixture(scope="module")
def tiny() -> object:
    return ma.load("tiny")


def sample(
    text: str, target: str = "is", foil: str = "are", evidence: tuple[int, ...] = (1,), **more: object
) -> EvidenceSample:
    return EvidenceSample(words=tuple(text.split()), target=target, foil=foil, evidence=evidence, **more)


def test_words_lie_on_the_tokens_that_spell_them(tiny: object) -> None:
    placed = place(tiny, [sample("The clerk rarely"), sample("Perhaps the old clerks frequently", "are", "is", (3,))])
    for row, each in enumerate(placed.samples):
        strings = placed.batch.strings[row]
        for i, word in enumerate(each.words):
            spelt = "".join(s for s, w in zip(strings, placed.word[row].tolist(), strict=False) if w == i)
            assert spelt.strip() == word
    assert placed.word[0].tolist()[-1] == -1  # padding
    assert [tiny.decode_token(i) for i in (*placed.answers.tolist(), *placed.foils.tolist())] == [
        " is",
        " are",
        " are",
        " is",
    ]


def test_what_does_not_fit_is_left_out_and_counted(tiny: object) -> None:
    given = [sample("The clerk"), sample("The clerk", "wouldn't"), sample("The clerk", evidence=())]
    placed = place(tiny, given)
    assert placed.samples == (given[0],)
    assert placed.skipped == {"a sample without evidence": 1, "answer of several tokens": 1}
    with pytest.raises(
        EmptyTaskError, match="2 samples on 'tiny'\n  found: 1 × a sample without evidence; 1 × answer of"
    ):
        place(tiny, given[1:])
    with pytest.raises(EmptyTaskError, match="no samples were given"):
        place(tiny, [])


def test_models_that_predict_no_next_word_are_refused() -> None:
    from families import hooked

    with pytest.raises(UnsupportedFeatureError, match="an encoder, which predicts no next tokens"):
        place(hooked("bert"), [sample("The clerk")])
    bare = ma.models.plain_model(PlainConfig.gpt2_like(n_layers=1))
    with pytest.raises(SettingError, match="which has no tokenizer"):
        place(bare, [sample("The clerk")])


def pointing_at(which: int) -> Callable[..., torch.Tensor]:
    """A method that gives everything to one token, counted from the start."""

    def method(model: object, batch: ma.models.Batch, targets: torch.Tensor, foils: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.one_hot(torch.full((len(batch),), which), batch.tokens.shape[1]).double()

    return method


def test_only_samples_that_the_model_gets_right_are_scored(tiny: object) -> None:
    given = [sample("The clerk"), sample("The clerk", "are", "is"), sample("The clerks", "are", "is")]
    found = ma.evaluation.evidence_benchmark(tiny, given, {"second": pointing_at(1), "first": pointing_at(0)})
    assert (found.settings["n_given"], found.settings["n_fit"], found.settings["n_right"]) == (3, 3, 2)
    assert found.accuracy == 2 / 3
    assert found.methods == ("second", "first", *BASELINES)
    assert found.values("second", "PG_1").tolist() == [1, 1]
    assert found.values("first", "PG_1").tolist() == found.values("first words", "PG_1").tolist() == [0, 0]
    assert found.values("last words", "PG_1").tolist() == [1, 1]
    assert found.values("chance", "PG_1").tolist() == [0.5, 0.5]
    with pytest.raises(EmptyTaskError, match="the model prefers the foil on all 1 samples"):
        ma.evaluation.evidence_benchmark(tiny, given[1:2], {})


def test_secondary_evidence_and_the_rest_of_the_phrase_take_no_part(tiny: object) -> None:
    given = [sample("This clerk that calls guests", evidence_plus=(0, 1), secondary=(3,))]
    for which in (0, 3):  # the determiner, the inner verb
        found = ma.evaluation.evidence_benchmark(tiny, given, {"it": pointing_at(which)})
        assert found.values("it", "MRR").tolist() == [1 / 3]  # that, guests, and then the tied evidence
        assert_allclose(found.values("chance", "PG_1"), [1 / 3], rtol=1e-15)  # one less a quotient
    whole = ma.evaluation.evidence_benchmark(tiny, given, {"it": pointing_at(0)}, phrase=True)
    assert whole.values("it", "PG_1").tolist() == [1]
    assert whole.values("chance", "PG_1").tolist() == [0.5]  # two of four words


def test_results_are_tables_by_stratum_and_can_be_saved(
    tiny: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mechattr.evaluation.evidence_result.RESAMPLES", 100)
    given = ma.tasks.agreement_samples(48, 1)
    methods = {"second": pointing_at(1), "undefined": lambda *args: torch.full(args[1].tokens.shape, float("nan"))}
    found = ma.evaluation.evidence_benchmark(tiny, given, methods, batch_size=7)
    n = found.settings["n_right"]
    table = found.to_pandas()
    assert len(table) == 5 * 5
    row = table[(table.method == "undefined") & (table.metric == "MRR")].iloc[0]
    assert (row.n, row.undefined) == (0, n)
    row = table[(table.method == "second") & (table.metric == "PG_1")].iloc[0]
    assert row["mean"] == np.mean([s.evidence == (1,) for s in found_samples(found, given, tiny)])
    assert row.low <= row["mean"] <= row.high
    by_length = found.to_pandas("length", metrics=("PG_1",))
    assert set(by_length.stratum) <= {"1–4", "5–8", "9–12", "13–16", "17–20"}
    assert by_length[by_length.method == "second"].n.sum() == n
    assert sorted(found.strata("n_attractors")) == ["0", "1", "2", "3", "4"]
    found.save(tmp_path / "scores.safetensors")
    again = ma.open(tmp_path / "scores.safetensors")
    assert isinstance(again, EvidenceScores)
    assert again.to_pandas().equals(table)
    assert "samples that the model gets right" in repr(found)
    assert "chance" in found._repr_html_()
    for bad, call in (
        ("metric 'PG'", lambda: found.values("second", "PG")),
        ("method 'third'", lambda: found.values("third", "PG_1")),
        ("factor 'size'", lambda: found.strata("size")),
    ):
        with pytest.raises(UnknownNameError, match=bad):
            call()


def found_samples(found: EvidenceScores, given: tuple[EvidenceSample, ...], model: object) -> list[EvidenceSample]:
    """The scored samples, by running each prompt alone."""
    kept = []
    for each in given:
        placed = place(model, [each])
        logits = model.run(placed.batch).logits[0, -1]
        kept += [each] if logits[placed.answers] > logits[placed.foils] else []
    assert [len(s.words) for s in kept] == found.factors["length"]
    return kept


def test_the_kind_of_the_first_word_is_told(tiny: object) -> None:
    """Evidence before attractor before last word; a tie goes against the evidence."""
    given = [sample("The clerk near guests", attractors=(3,)), sample("The clerk often")]
    methods = {f"at {i}": pointing_at(i) for i in range(4)} | {"nowhere": lambda *args: 0 * pointing_at(0)(*args)}
    methods["undefined"] = lambda *args: torch.full(args[1].tokens.shape, float("nan"))
    found = ma.evaluation.evidence_benchmark(tiny, given[:1], methods).first_places()
    kinds = {"at 0": "another word", "at 1": "evidence", "at 2": "another word", "at 3": "attractor"}
    for name, kind in {**kinds, "nowhere": "another word", "first words": "another word"}.items():
        assert found.loc[name].to_dict() == {place: float(place == kind) for place in found}
    assert found.loc["undefined"].sum() == 0
    assert "chance" not in found.index
    alone = ma.evaluation.evidence_benchmark(tiny, given[1:], {}).first_places()
    assert alone.loc["last words"].to_dict() == {"evidence": 0, "attractor": 0, "last word": 1, "another word": 0}


def test_magnitudes_are_ranked_when_asked_for(tiny: object) -> None:
    given = [sample("The clerk often")]
    methods = {"negative": lambda *args: -pointing_at(1)(*args)}
    assert ma.evaluation.evidence_benchmark(tiny, given, methods).values("negative", "PG_1") == 0
    assert ma.evaluation.evidence_benchmark(tiny, given, methods, absolute=True).values("negative", "PG_1") == 1


def test_methods_that_cannot_be_scored_are_refused(tiny: object) -> None:
    given = [sample("The clerk")]
    with pytest.raises(
        SettingError, match="method 'chance'\n  found: the name of a baseline\n  fix: rename the method"
    ):
        ma.evaluation.evidence_benchmark(tiny, given, {"chance": pointing_at(0)})
    with pytest.raises(MismatchError, match=r"method 'flat'\n  found: shape \(2,\) for prompts of shape \(1, 2\)"):
        ma.evaluation.evidence_benchmark(tiny, given, {"flat": lambda *args: torch.zeros(2)})
    with pytest.raises(SettingError, match="batch_size=0"):
        ma.evaluation.evidence_benchmark(tiny, given, {}, batch_size=0)


def test_points_stand_at_their_values_with_baselines_dashed(tiny: object) -> None:
    found = ma.evaluation.evidence_benchmark(
        tiny, ma.tasks.agreement_samples(16, 1), {"one": pointing_at(1), "two": pointing_at(2)}
    )
    ax = found.plot()
    assert [label.get_text() for label in ax.get_yticklabels()] == ["one", "two"]
    (points,) = (line for line in ax.lines if line.get_gid() == "value")
    assert_allclose(points.get_xdata(), [found.values(name, "PG_1").mean() for name in ("one", "two")])
    dashed = {line.get_label(): line.get_xdata()[0] for line in ax.lines if str(line.get_gid()).startswith("baseline")}
    assert dashed == {name: found.values(name, "PG_1").mean() for name in BASELINES}
    with pytest.raises(SettingError, match="2 values, 1 and 2 ends, 2 names, 0 baselines"):
        ma.draw.dots([0.1, 0.2], ["a", "b"], low=[0.0], high=[1.0, 1.0])
