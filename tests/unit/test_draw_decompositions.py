"""Pictures of decompositions: what is drawn of which table, and that sums and signs are what they are."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from prompt_cases import model_of, rows_of

import mechattr as ma
from mechattr.draw.style import RED_BLUE
from mechattr.draw.text import FEW
from mechattr.draw.waterfall import HEADS, MOST, NEGATIVE, POSITIVE
from mechattr.errors import SettingError

SHAPE = (12, 12)  # layers and heads of a model with more components than rows
TEXT = "When Mary and John went to the store, John gave a drink to"


def axes() -> Any:
    return Figure(figsize=(7, 9)).add_subplot()


def bars(ax: Any, gid: str) -> list[Any]:
    return [patch for container in ax.containers for patch in container if patch.get_gid() == gid]


def large_components() -> tuple[list[str], np.ndarray]:
    names = ["embed"]
    for layer in range(SHAPE[0]):
        names += [*(f"L{layer}H{head}" for head in range(SHAPE[1])), f"b_O {layer}", f"MLP {layer}", f"b_out {layer}"]
    names += ["norm bias", "unembed bias"]
    return names, np.random.default_rng(0).normal(size=len(names))


def test_each_bar_of_a_waterfall_begins_where_the_last_one_ended() -> None:
    values = [2.0, -3.0, 0.5]
    ax = ma.draw.waterfall(["embed", "L0H1", "MLP 0"], values, total=-0.4, label="logit of x", ax=axes())
    drawn = bars(ax, "component")
    starts = [bar.get_x() for bar in drawn]
    assert np.allclose([bar.get_width() for bar in drawn], [*values, 0.1])  # the last is the remainder
    assert np.allclose(starts, [0.0, 2.0, -1.0, -0.5])
    assert [to_hex(bar.get_facecolor()) for bar in drawn[:3]] == [POSITIVE, NEGATIVE, POSITIVE]
    (total,) = bars(ax, "total")
    assert np.isclose(total.get_width(), -0.4)
    assert [text.get_text() for text in ax.get_yticklabels()] == ["embed", "L0H1", "MLP 0", "remainder", "sum"]
    assert [text.get_text() for text in ax.texts] == ["+2.00", "-3.00", "+0.50", "+0.10", "-0.40"]
    assert ax.get_xlabel() == "logit of x"


def test_many_components_are_put_together_and_none_is_lost() -> None:
    names, values = large_components()
    ax = ma.draw.waterfall(names, values, total=float(values.sum()), ax=axes())
    rows = [text.get_text() for text in ax.get_yticklabels()]
    heads = sorted(((abs(v), n) for n, v in zip(names, values, strict=True) if n.startswith("L")), reverse=True)
    assert {row for row in rows if row.startswith("L") and "other" not in row} == {name for _, name in heads[:HEADS]}
    assert sum(int(row.split()[1]) for row in rows if "other heads" in row) == SHAPE[0] * SHAPE[1] - HEADS
    assert rows[-5:] == ["biases of layers", "norm bias", "unembed bias", "remainder", "sum"] and len(rows) < len(names)
    drawn = [bar.get_width() for bar in bars(ax, "component")]
    assert np.isclose(sum(drawn), values.sum()) and abs(drawn[-1]) < 1e-9
    biases = sum(v for n, v in zip(names, values, strict=True) if n.startswith("b_"))
    assert np.isclose(drawn[rows.index("biases of layers")], biases)
    plain = ma.draw.waterfall([f"part {i}" for i in range(MOST + 1)], np.ones(MOST + 1), ax=axes())
    assert len(bars(plain, "component")) == MOST + 1


def test_few_tokens_are_bars_and_more_are_coloured_text() -> None:
    few = ma.draw.token_values([" a", "b"], [1.0, -2.0], label="logit", ax=axes())
    assert [bar.get_width() for bar in bars(few, "bar")] == [1.0, -2.0]
    assert [text.get_text() for text in few.get_yticklabels()] == ["␣a", "b"]
    values = np.linspace(-1, 1, 40)
    values[3] = np.nan
    many = ma.draw.token_values([f" word{i}" for i in range(40)], values, label="logit", ax=axes())
    boxes = [patch for patch in many.patches if patch.get_gid() == "token"]
    assert len(boxes) == 40 and not bars(many, "bar")
    assert to_hex(boxes[0].get_facecolor()) == RED_BLUE[0] and to_hex(boxes[-1].get_facecolor()) == RED_BLUE[-1]
    spans = [(box.get_y(), box.get_x(), box.get_x() + box.get_width()) for box in boxes]
    for (line, _, end), (below, start, _) in pairwise(spans):
        assert (below == line and start >= end) or (below > line and start == 0)  # no two boxes overlap
    assert many.get_xlim()[1] >= max(end for *_, end in spans)
    labels = [ax.get_xlabel() for ax in many.figure.axes]
    assert any("grey: not measured" in label for label in labels)
    assert FEW <= 40


def test_each_table_gets_the_picture_that_suits_it() -> None:
    model = ma.load("tiny")
    result = ma.direct_logit_attribution(model, TEXT, target=" Mary", foil=" John")
    assert len(bars(result.plot(axes()), "total")) == 1
    heads = ma.draw.decomposition(result, axes(), table="score/heads")
    assert heads.get_images()[0].get_array().shape == (4, 4) and heads.get_ylim() == (3.5, -0.5)
    lens = ma.token_lens(model, TEXT, target=" Mary", foil=" John")
    drawn = lens.plot(axes())
    assert drawn.get_xlabel() == "source token" and drawn.get_xticklabels()[1].get_text() == "␣Mary"
    with pytest.raises(SettingError, match="score/head_source with axes layer, head, pos"):
        ma.draw.decomposition(result, axes(), table="score/head_source")


def test_a_table_of_a_lens_has_a_word_in_each_cell_and_goes_on_below() -> None:
    model = ma.load("tiny")
    result = ma.logit_lens(model, TEXT)
    ax = result.plot(axes())
    cells = [text.get_text() for text in ax.texts if text.get_gid() == "cell"]
    tokens = [text.get_text() for text in ax.texts if text.get_gid() == "token"]
    assert len(tokens) == 16 and tokens[1] == "␣Mary" and len(cells) == 16 * 5 and cells[-1] == "␣Mary"
    assert len(ax.get_images()) == 2  # bands of eight tokens
    names = [text.get_text() for text in ax.get_yticklabels()]
    assert names[:5] == ["before 0", "0", "1", "2", "3"]
    assert min(text.get_fontsize() for text in ax.texts) >= 7
    one = ma.logit_lens(model, TEXT, position=-1).plot(axes())
    assert [text.get_text() for text in one.texts if text.get_gid() == "token"] == ["␣to"]


def test_wrong_input_is_refused() -> None:
    with pytest.raises(SettingError, match="a waterfall\n  found: 1 values, 2 names"):
        ma.draw.waterfall(["a", "b"], [1.0])
    with pytest.raises(SettingError, match="values of tokens\n  found: 2 tokens and 1 values"):
        ma.draw.token_values(["a", "b"], [1.0], label="logit")
    model = model_of("gpt2_like")
    with pytest.raises(SettingError, match="3 prompts\n  fix: decompose one prompt"):
        ma.direct_logit_attribution(model, rows_of(model), target=5).plot()
