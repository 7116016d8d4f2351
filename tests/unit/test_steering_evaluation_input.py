"""What evaluations and sweeps of steering refuse, and what they say then."""

from __future__ import annotations

import math
from typing import Any

import families
import pytest
import torch

import mechattr as ma
from mechattr.errors import (
    EmptyTaskError,
    MismatchError,
    NonFiniteError,
    SettingError,
    UnknownNameError,
    UnsupportedFeatureError,
)
from mechattr.models import HookedModel
from mechattr.models.hf import HookedHF
from mechattr.models.plain import PlainConfig, plain_model
from mechattr.sites import full_name
from mechattr.steering import Condition, SteeringVector

TRIPLES = [("a b a", " a", " b a"), ("b a", " a a b", " b")]
SITES = [full_name("resid_post", layer) for layer in (0, 1)]


@pytest.fixture(scope="module")
def model() -> HookedModel:
    return plain_model(PlainConfig.gpt2_like(n_layers=2), tokenizer=families.tokenizer())


@pytest.fixture(scope="module")
def vector(model: HookedModel) -> SteeringVector:
    return SteeringVector.of(dict.fromkeys(SITES, torch.ones(model.info.d_model)))


LATE = Condition.of(full_name("resid_post", 1), torch.ones(16), 0.5)
WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no multipliers": ({"multipliers": []}, SettingError, "none, or not finite"),
    "NaN": ({"multipliers": [1.0, math.nan]}, SettingError, "none, or not finite"),
    "infinity": ({"multipliers": [1.0, math.inf]}, SettingError, "none, or not finite"),
    "a word": ({"multipliers": ["one"]}, SettingError, "no list of numbers"),
    "one number": ({"multipliers": 1.0}, SettingError, "no list of numbers"),
    "the same twice": ({"multipliers": [1.0, 2.0, 1.0]}, SettingError, "some more than once"),
    "no such positions": ({"positions": "prompts"}, SettingError, "did you mean 'prompt'"),
    "a mask": ({"positions": torch.ones(2, 3, dtype=torch.bool)}, SettingError, "position numbers"),
    "half a position": ({"positions": [0.5]}, SettingError, "position numbers"),
    "before the prompt": ({"positions": [-9]}, SettingError, "name positions that every prompt has"),
    "behind every text": ({"positions": [9]}, SettingError, "name positions that texts have"),
    "no position": ({"positions": []}, SettingError, "name positions that texts have"),
    "no such operator": ({"operator": "subtract"}, UnknownNameError, "no such operator"),
    "a list of operators": ({"operator": ["add"]}, UnknownNameError, "no such operator"),
    "no rows at once": ({"batch_size": 0}, SettingError, "batch_size=0\n  found: not a count"),
    "half a row": ({"batch_size": 1.5}, SettingError, "batch_size=1.5"),
    "a number as texts": ({"neutral": 3}, SettingError, "neutral text 0\n  found: 3"),
    "a gate of rows": ({"gate": [True, False]}, SettingError, "give a condition"),
    "a gate behind what is steered": ({"gate": LATE}, SettingError, "which comes before it"),
    "an empty text": ({"neutral": ["a", ""]}, SettingError, "neutral text 1"),
    "no text": ({"neutral": [3]}, SettingError, "neutral text 0"),
}


@pytest.mark.parametrize("how, error, text", WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("function", [ma.steering.sweep, ma.steering.evaluate])
def test_what_both_refuse(
    model: HookedModel, vector: SteeringVector, function: Any, how: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        function(model, vector, TRIPLES, **how)


@pytest.mark.parametrize("function", [ma.steering.sweep, ma.steering.evaluate])
def test_too_much_is_named_by_site_and_multipliers(model: HookedModel, function: Any) -> None:
    huge = SteeringVector.of({SITES[0]: torch.full((model.info.d_model,), 1e150, dtype=torch.double)})
    with pytest.raises(NonFiniteError) as caught:
        function(model, huge, TRIPLES, multipliers=[1e-200, 1e200])
    assert caught.value.asked == f"steering at {SITES[0]}"  # and not where the run began
    assert caught.value.found == "NaN or infinity, with a multiplier among 1e-200, 1e+200"


@pytest.mark.parametrize("function", [ma.steering.sweep, ma.steering.evaluate])
def test_vectors_data_and_models_that_do_not_fit(model: HookedModel, vector: SteeringVector, function: Any) -> None:
    with pytest.raises(MismatchError, match="apply the vector to the model that it was made for"):
        function(model, SteeringVector.of({SITES[0]: torch.ones(7)}), TRIPLES)
    with pytest.raises(SettingError, match="triples"):
        function(model, vector, [])
    with pytest.raises(UnsupportedFeatureError, match="use a causal language model"):
        function(families.hooked("bert"), vector, TRIPLES)
    at_positions = SteeringVector.of({SITES[0]: torch.ones(3, model.info.d_model)})
    with pytest.raises(SettingError, match="leave positions out"):
        function(model, at_positions, TRIPLES, positions="last")
    tiny = ma.load("tiny")
    task = ma.tasks.make(tiny, "subject_verb", n=2, seed=0)
    empty = object.__new__(type(task))
    for name in type(task).__slots__:
        object.__setattr__(empty, name, getattr(task, name))
    object.__setattr__(empty, "clean", task.clean.rows([]))
    with pytest.raises(EmptyTaskError, match="no pairs"):
        function(tiny, SteeringVector.of({SITES[0]: torch.ones(tiny.info.d_model)}), empty)


@pytest.mark.parametrize(
    "how, text",
    [
        ({"random": 0}, "random=0"),
        ({"random": True}, "random=True"),
        ({"generate": -1}, "generate=-1"),
        ({"seed": 1.5}, "seed=1.5\n  found: no seed"),
        ({"shuffled": [1]}, "shuffled\n  found: a list\n  fix: give what a builder makes"),
        ({"judge": len}, "no texts to judge"),
        ({"judge": 3, "generate": 2}, "a int"),
        ({"prompting": 3}, "prompting"),
        ({"judge": lambda texts: [1.0], "generate": 1}, "shape \\[1\\] for 2 texts"),
        ({"judge": lambda texts: [math.nan] * len(texts), "generate": 1}, "or not finite"),
        ({"judge": lambda texts: None, "generate": 1}, "return one number for each text"),
        ({"judge": lambda texts: ["good"] * len(texts), "generate": 1}, "return one number for each text"),
    ],
)
def test_what_an_evaluation_refuses(model: HookedModel, vector: SteeringVector, how: dict[str, Any], text: str) -> None:
    with pytest.raises(SettingError, match=text):
        ma.steering.evaluate(model, vector, TRIPLES, multipliers=[0.1], **how)


def test_a_tensor_is_no_vector(model: HookedModel) -> None:
    with pytest.raises(SettingError, match=r"vector\n  found: a Tensor\n  fix: give what a builder makes, or from_dir"):
        ma.steering.evaluate(model, torch.ones(16), TRIPLES)  # type: ignore[arg-type]


def test_triples_can_come_one_by_one(model: HookedModel, vector: SteeringVector) -> None:
    """They are read a second time, with a prompt in front."""
    how: dict[str, Any] = {"multipliers": [1.0], "random": 1, "prompting": "a b "}
    given = ma.steering.evaluate(model, vector, iter(TRIPLES), **how)  # type: ignore[arg-type]
    wanted = ma.steering.evaluate(model, vector, TRIPLES, **how)
    for name, table in wanted.tensors.items():
        assert torch.equal(given.tensors[name].values, table.values)
    assert torch.equal(ma.steering.propensity(model, iter(TRIPLES)), wanted.base)  # type: ignore[arg-type]
    with pytest.raises(SettingError, match="batch_size=0"):
        ma.steering.propensity(model, TRIPLES, batch_size=0)


def test_a_task_cannot_be_prompted() -> None:
    model = ma.load("tiny")
    task = ma.tasks.make(model, "subject_verb", n=2, seed=0)
    with pytest.raises(SettingError, match=r"positions='generated'\n  found: prompts without answers"):
        one = SteeringVector.of({SITES[0]: torch.ones(model.info.d_model)})
        ma.steering.evaluate(model, one, task, positions="generated")
    with pytest.raises(SettingError, match="a task, whose prompts are tokens"):
        one = SteeringVector.of({SITES[0]: torch.ones(model.info.d_model)})
        ma.steering.evaluate(model, one, task, prompting="Please: ")


def test_what_a_sweep_refuses(model: HookedModel, vector: SteeringVector) -> None:
    with pytest.raises(SettingError, match="vectors of layers \\[0, 1\\]"):
        ma.steering.sweep(model, vector, TRIPLES, layers=[0, 2])
    with pytest.raises(SettingError, match="vectors of layers"):
        ma.steering.sweep(model, vector, TRIPLES, layers=[])
    with pytest.raises(SettingError, match="layers=1\n  found: a int"):
        ma.steering.sweep(model, vector, TRIPLES, layers=1)  # type: ignore[arg-type]
    with pytest.raises(SettingError, match=r"use mechattr\.steering\.evaluate"):
        ma.steering.sweep(model, SteeringVector.of({full_name("embed"): torch.ones(model.info.d_model)}), TRIPLES)
    for given in ({}, [vector], {0: "v"}):
        with pytest.raises(SettingError, match="vectors by layer"):
            ma.steering.sweep(model, given, TRIPLES)  # type: ignore[arg-type]


def test_what_a_result_does_not_have(model: HookedModel, vector: SteeringVector) -> None:
    found = ma.steering.evaluate(model, vector, TRIPLES, multipliers=[0.5], random=1)
    for measure in (found.steerability, found.anti_steerable):
        with pytest.raises(SettingError, match="give at least two"):
            measure()
    with pytest.raises(SettingError, match="give neutral= texts"):
        found.frontier()
    priced = ma.steering.evaluate(model, vector, TRIPLES, multipliers=[0.5], random=1, neutral=["a b"])
    with pytest.raises(SettingError, match="budget=0"):
        priced.frontier(budget=0)  # at once, not where a number of it is asked for
    with pytest.raises(UnknownNameError, match="did you mean 'vector'"):
        found.effects("vektor")
    assert found.prompting is None and "multiplier 0.5: effect" in found.summary
    swept = ma.steering.sweep(model, vector, TRIPLES, multipliers=[0.5, 1.0])
    with pytest.raises(UnknownNameError, match="layer 7"):
        swept.steerability(7)
    assert "layers 0 to 1: the largest effect is" in repr(swept) and "nat" in swept._repr_html_()


def test_shuffled_labels_need_two_pairs(model: HookedModel) -> None:
    with pytest.raises(SettingError, match="give at least two"):
        ma.steering.shuffled(ma.steering.mean_difference, model, [("a", "b")], layers=[0])


def test_nothing_stays_behind_an_error(model: HookedModel, vector: SteeringVector) -> None:
    before = ma.steering.propensity(model, TRIPLES)
    with pytest.raises(SettingError):
        ma.steering.evaluate(model, vector, TRIPLES, generate=1, judge=lambda texts: [])
    assert torch.equal(ma.steering.propensity(model, TRIPLES), before)
    assert "standing_hash" not in model.fingerprint()


def test_a_transformers_model_is_given_behind_a_hooked_one() -> None:
    model = HookedHF(families.model("gpt2"), families.tokenizer(), name="gpt2")
    vector = SteeringVector.of({SITES[0]: torch.ones(model.info.d_model)})
    assert ma.steering.evaluate(model, vector, TRIPLES, random=1).base.shape == (2,)
