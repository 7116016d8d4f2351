"""The table of builders and operators: its parts on little data, and its page against its numbers."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest
import torch

from benchmarks import steering_page, steering_table
from benchmarks.steering_data import BEHAVIOURS, EVENTS, NAMES, drawn
from benchmarks.steering_rows import RANDOM, candidates
from benchmarks.steering_table import BUDGET, SHARES, SIDES, at_budget, cell, setting
from mechattr.steering.intervals import estimate
from mechattr.tasks.grammar import gendered_pronoun, subject_verb
from mechattr.tasks.grammar.names import FEMALE, MALE

LAYER = 1
UNSEEN = {
    "number agreement": [*subject_verb.PEOPLE["test"], *subject_verb.THINGS["test"]],
    "gendered pronoun": [*sum(gendered_pronoun.NOUNS["test"], ()), *MALE["test"], *FEMALE["test"]],
    "sentiment": [*NAMES["test"], *sum(EVENTS["test"], ())],
}


def measured(builders: list[str]) -> dict[str, dict[str, float]]:
    """Effects of `add` at one layer of the bundled model, with their intervals and mean KL."""
    at = setting(steering_table.ma.load("tiny"), "number agreement", 0, 16, 24, 8)
    found = {}
    for name in builders:
        vectors = candidates(at.model, name, at.data, 0, at.length)
        here = {number: vector for number, vector in vectors.items() if number % at.model.info.n_layers == LAYER}
        one = cell(at, dict.fromkeys(SIDES, here), "add", SHARES)
        value, low, high = estimate(torch.tensor(one["effect"]))
        kl = (one["towards"]["kl"] + one["away"]["kl"]) / 2
        found[name] = {"value": value, "low": low, "high": high, "kl": kl}
    return found


def test_sound_builders_do_more_than_random_vectors_at_the_same_price() -> None:
    behind, before = "grains, behind the answer", "grains, before the answer"
    found = measured(["mean_difference", before, behind, RANDOM])
    assert all(abs(math.log(one["kl"] / BUDGET)) < math.log(2) for one in found.values())  # on texts of the other half
    assert found["mean_difference"]["low"] > found[before]["high"]
    assert found[before]["low"] > found[behind]["high"]
    assert found[before]["low"] > found[RANDOM]["high"]
    # the control: what is said of the sound ones does not hold of every vector
    assert found[behind]["low"] < found["mean_difference"]["high"] / 2


@pytest.mark.parametrize("scale", [1e-4, 1.0, 400.0])
def test_the_multiplier_of_a_price_is_found_where_price_is_a_power(scale: float) -> None:
    kl = [scale * m**2 for m in SHARES]
    found = at_budget(SHARES, kl, BUDGET, from_zero=True)
    expected = min(math.sqrt(BUDGET / scale), SHARES[-1])
    assert found == pytest.approx(expected, rel=1e-12)  # lines in logarithms are exact for powers
    if scale == 1.0:  # the control: lines in the numbers themselves
        assert abs(float(np.interp(BUDGET, kl, SHARES)) / expected - 1) > 0.01


def test_a_price_that_begins_above_the_budget_has_no_multiplier() -> None:
    assert at_budget(SHARES, [2 * BUDGET] * len(SHARES), BUDGET, from_zero=False) is None
    assert at_budget(SHARES, [0.0] * len(SHARES), BUDGET, from_zero=False) == SHARES[-1]
    dipping = [2 * BUDGET, BUDGET / 2, BUDGET / 2, 2 * BUDGET, 3 * BUDGET, 4 * BUDGET]
    found = at_budget(SHARES, dipping, BUDGET, from_zero=False)
    assert found is not None and SHARES[2] < found < SHARES[3]


@pytest.mark.parametrize("name", BEHAVIOURS)
def test_no_word_of_held_out_items_is_in_the_data_of_vectors(name: str) -> None:
    data = drawn(name, 64, 64, 0)
    seen, held = (" ".join(text for row in part for text in row) for part in ([*data.pairs, *data.triples], data.held))
    found = [[word for word in UNSEEN[name] if re.search(rf"\b{word}s?\b", text)] for text in (seen, held)]
    assert not found[0]
    assert found[1]  # the control: they are what is asked about
    assert data.right == [1, -1] * 32
    assert all(positive != negative for positive, negative in data.pairs)


def test_the_measured_table_bears_out_what_the_steering_page_says_of_it() -> None:
    document = json.loads((steering_page.RESULTS / "steering.json").read_text(encoding="utf-8"))
    rows = {table["behaviour"]: table["rows"] for table in document["tables"]}
    found = {
        key: {n: cells["add"]["effect"] for n, cells in part.items() if "add" in cells} for key, part in rows.items()
    }
    behind, before, control = "grains, behind the answer", "grains, before the answer", RANDOM
    for one in (found["number agreement"], found["gendered pronoun"]):
        for name in ("mean_difference", "pca, uncentred", "probe", "iti", "learned", "reft", "g_act", before, behind):
            assert one[name][1] > one[control][2], name  # the lower end above the upper end of the control
        assert one[behind][2] < one[before][1] < one[before][2] < one["mean_difference"][1]
        assert not one["act_add"][1] > one[control][2]  # the control of this test: one that is not above
    assert found["sentiment"][behind][1] > found["sentiment"][before][2]
    assert found["sentiment"][behind][1] > found["sentiment"]["mean_difference"][2]
    assert found["gendered pronoun"]["pca, centred"][2] < found["gendered pronoun"]["pca, uncentred"][1] / 3


def test_the_page_says_what_the_numbers_are() -> None:
    document = json.loads((steering_page.RESULTS / "steering.json").read_text(encoding="utf-8"))
    page = (steering_page.RESULTS / "steering.md").read_text(encoding="utf-8")
    assert "\n".join(steering_page.lines(document)) + "\n" == page
    document["tables"][0]["rows"]["mean_difference"]["add"]["effect"][0] += 1  # the control
    assert "\n".join(steering_page.lines(document)) + "\n" != page
    figure = steering_page.figure(document)
    assert len(figure.axes) == len(document["tables"])
