"""The map of tokens by tokens, alone and as the picture of a result."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.figure import Figure
from patching_cases import plain
from prompt_cases import rows_of

import mechattr as ma
from mechattr.errors import SettingError


def test_queries_run_downward_and_sources_to_the_right() -> None:
    grid = np.zeros((3, 3))
    grid[2, 1] = 0.5
    ax = ma.draw.token_map(grid, [" a", "\n", "<s>"], label="share", title="block 0", ax=Figure().add_subplot())
    (image,) = ax.get_images()
    assert image.get_array()[2, 1] == 0.5 and image.get_clim() == (0.0, 0.5)
    for labels in (ax.get_xticklabels(), ax.get_yticklabels()):
        assert [label.get_text() for label in labels] == ["␣a", "↵", "⟨bos⟩"]
    assert ax.get_ylim() == (2.5, -0.5) and ax.get_title("left") == "block 0"
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("source token", "position")


def test_some_of_many_tokens_are_named_and_signs_are_kept() -> None:
    grid = np.linspace(-1, 1, 70 * 70).reshape(70, 70)
    ax = ma.draw.token_map(grid, ["t"] * 70, label="share", signed=True, ax=Figure().add_subplot())
    assert len(ax.get_xticks()) == 35 and ax.get_xlabel() == "source token (1 of 2 named)"
    low, high = ax.get_images()[0].get_clim()
    assert low == -high


def test_values_that_do_not_fit_are_refused() -> None:
    with pytest.raises(SettingError, match=r"a token x token map\n  found: values \(2, 3\), 3 tokens\n  fix: give"):
        ma.draw.token_map(np.zeros((2, 3)), ["a", "b", "c"], label="share")


def test_the_picture_of_alti_is_its_rollout() -> None:
    model = plain("gpt2_like")
    rows = rows_of(model)
    result = ma.alti(model, rows.rows([0]))
    ax = result.plot(Figure().add_subplot())
    assert np.array_equal(ax.get_images()[0].get_array(), result.scores["rollout"].sel(batch=0).numpy())
    with pytest.raises(SettingError, match="a plot of a decomposition\n  found: 3 prompts"):
        ma.alti(model, rows).plot()
