"""Figures: limits and colours, what is outlined and labelled, that nothing overlaps, and what is not measured."""

from __future__ import annotations

import html
import math
import re
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb

from mechattr import draw
from mechattr.artifact import Attribution
from mechattr.draw.heatmap import MAX_TICKS
from mechattr.draw.labels import overlap, place
from mechattr.errors import SettingError
from mechattr.labelled import Labelled

WHITE = (1.0, 1.0, 1.0)


def heavy(*shape: int, seed: int = 0) -> np.ndarray:
    """Values as effects are: many small ones, a few large ones, both signs."""
    return np.random.default_rng(seed).standard_t(1.5, size=shape) * 0.1


def by_gid(ax: Any, gid: str) -> list[Any]:
    return ax.findobj(lambda artist: artist.get_gid() == gid)


def colours_of(ax: Any) -> np.ndarray:
    """The colours that the first image of the axes is drawn with, [row, column, rgba]."""
    image = ax.get_images()[0]
    return image.cmap(image.norm(image.get_array()))


# --- limits and colours


def test_limits_leave_one_outlier_out_and_say_so() -> None:
    values = np.concatenate([np.linspace(-1, 1, 999), [50.0]])
    bounds = draw.limits(values)
    assert bounds.bound <= 1.0
    assert bounds.n_clipped / bounds.n_values == bounds.clipped_share <= 0.011
    assert bounds.note == f"{bounds.n_clipped} of 1000 clipped"
    assert not np.abs(values).max() <= bounds.bound, "limits at the maximum would show this map as blank"


@pytest.mark.parametrize("values", [np.zeros((2, 3)), np.full((2, 2), np.nan), np.zeros((0,))])
def test_limits_of_nothing_are_finite(values: np.ndarray) -> None:
    bounds = draw.limits(values)
    assert bounds.bound == 1.0
    assert bounds.note == ""


def test_limits_ignore_what_was_not_measured_and_take_all_arrays_together() -> None:
    one, other = np.array([0.5, np.nan, np.inf]), torch.tensor([-2.0, 0.5], dtype=torch.bfloat16)
    assert draw.limits(one, other) == draw.Limits(bound=0.5, n_clipped=1, n_values=3)


def is_white_at_zero(cmap: Any, norm: Any) -> bool:
    return tuple(cmap(norm(0.0))[:3]) == WHITE


@pytest.mark.parametrize("signed", [True, False])
def test_zero_is_exactly_white(signed: bool) -> None:
    assert is_white_at_zero(*draw.colours(0.37, signed=signed))


def test_the_library_s_own_map_would_not_be_white_at_zero() -> None:
    cmap, norm = matplotlib.colormaps["RdBu"], matplotlib.colors.Normalize(-0.37, 0.37)
    assert not is_white_at_zero(cmap, norm)
    _, lopsided = draw.colours(0.37, signed=True)
    lopsided.vmax = 1.0
    assert not is_white_at_zero(draw.colours(0.37, signed=True)[0], lopsided)


def test_positive_is_blue_and_negative_red() -> None:
    cmap, norm = draw.colours(1.0, signed=True)
    red, _, blue, _ = cmap(norm(0.6))
    assert blue > red
    red, _, blue, _ = cmap(norm(-0.6))
    assert red > blue


def test_style_changes_nothing_for_others() -> None:
    before = dict(matplotlib.rcParams)
    draw.head_map(heavy(2, 2), label="effect")
    assert dict(matplotlib.rcParams) == before


# --- the head map


def test_layers_run_downward_from_zero_with_the_mlp_column_beside() -> None:
    heads, mlps = heavy(5, 6), heavy(5, seed=1)
    ax = draw.head_map(heads, mlps, label="effect [logit]")
    low, high = ax.get_ylim()
    assert low > high, "layer 0 belongs on top"
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["0", "1", "2", "3", "4", "5", "MLP"]
    grid, column = ax.get_images()
    np.testing.assert_array_equal(grid.get_array(), heads)
    np.testing.assert_array_equal(column.get_array(), mlps[:, None])
    assert grid.norm.vmin == -grid.norm.vmax
    assert column.norm.vmax == grid.norm.vmax, "heads and MLPs are compared by one scale"
    assert column.get_extent()[0] > grid.get_extent()[1], "the column must not cover a head"


@pytest.mark.parametrize(("layers", "heads"), [(4, 8), (12, 12), (32, 32)])
def test_the_ten_strongest_cells_are_outlined_and_named_without_overlap(layers: int, heads: int) -> None:
    values, mlps = heavy(layers, heads), heavy(layers, seed=1)
    ax = draw.head_map(values, mlps, label="effect")
    order = np.argsort(-np.abs(np.column_stack([values, mlps])).ravel())[:10]
    expected = {
        f"MLP {i // (heads + 1)}" if i % (heads + 1) == heads else f"L{i // (heads + 1)}H{i % (heads + 1)}"
        for i in order
    }
    assert len(by_gid(ax, "outlined")) == 10
    names = by_gid(ax, "outlined-name")
    assert {name.get_text() for name in names} == expected
    ax.figure.draw_without_rendering()
    assert not overlapping(names)
    assert all(name.get_fontsize() >= 7 for name in names)


def test_cells_without_effect_or_measurement_are_not_outlined() -> None:
    values = np.zeros((3, 4))
    values[1, 2], values[2, 3] = -0.5, np.nan
    ax = draw.head_map(values, label="effect")
    assert [name.get_text() for name in by_gid(ax, "outlined-name")] == ["L1H2"]
    colours = colours_of(ax)
    assert tuple(colours[0, 0, :3]) == WHITE
    np.testing.assert_allclose(colours[2, 3, :3], to_rgb("#d9d9d9"), atol=1e-9)  # the grey has 8 bits
    assert any("grey: not measured" in axes.get_ylabel() for axes in ax.figure.axes)


def test_clipped_cells_are_counted_on_the_colour_bar() -> None:
    values = np.full((10, 20), 0.1)
    values[3, 4] = 9.0
    ax = draw.head_map(values, label="effect [logit]")
    assert any("1 of 200 clipped" in axes.get_ylabel() for axes in ax.figure.axes)


def test_head_map_draws_into_given_axes() -> None:
    figure = draw.new_figure(4, 3)
    ax = figure.add_subplot()
    assert draw.head_map(heavy(2, 2), label="effect", ax=ax) is ax


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(SettingError, match=r"heads \(2, 3\), MLPs \(3,\)"):
        draw.head_map(heavy(2, 3), heavy(3), label="effect")
    with pytest.raises(SettingError, match=r"MLP \(2, 3\), 4 tokens"):
        draw.position_map({"MLP": heavy(2, 3)}, list("abcd"), label="effect")
    with pytest.raises(SettingError, match="2 estimates, 3 exact values"):
        draw.scatter([1, 2], [1, 2, 3], ["a", "b"])


# --- the position map

PANELS = ("residual stream", "attention", "MLP")


@pytest.mark.parametrize("n", [5, 15, 40, 41, 130])
def test_at_most_forty_tokens_are_named_and_none_overlap(n: int) -> None:
    tokens = [f" word{i}" for i in range(n)]
    axes = draw.position_map({name: heavy(4, n) for name in PANELS}, tokens, label="effect")
    last = axes[-1]
    last.figure.draw_without_rendering()
    labels = [label for label in last.get_xticklabels() if label.get_text()]
    assert 0 < len(labels) <= MAX_TICKS
    assert n > MAX_TICKS or len(labels) == n
    assert not overlapping(labels)
    assert all(ax.get_ylim()[0] > ax.get_ylim()[1] for ax in axes)


def test_the_overlap_check_finds_labels_that_overlap() -> None:
    axes = draw.position_map({"MLP": heavy(4, 40)}, [f" word{i}" for i in range(40)], label="effect")
    for label in axes[0].get_xticklabels():
        label.set_rotation(0)
    axes[0].figure.draw_without_rendering()
    assert overlapping(axes[0].get_xticklabels())


def test_panels_share_one_scale_and_one_colour_bar() -> None:
    panels = {"residual stream": heavy(4, 6) * 100, "attention": heavy(4, 6, seed=1), "MLP": heavy(4, 6, seed=2)}
    axes = draw.position_map(panels, list("abcdef"), label="effect")
    scales = {(ax.get_images()[0].norm.vmin, ax.get_images()[0].norm.vmax) for ax in axes}
    bound = draw.limits(*panels.values()).bound
    assert scales == {(-bound, bound)}
    assert len(axes[0].figure.axes) == len(axes) + 1


def test_spans_are_named_above_their_tokens_and_do_not_overlap() -> None:
    spans = {"IO": (2, 3), "S1": (4, 5), "S1+1": (5, 6), "S1+1 again": (6, 7), "END": (14, 15)}
    axes = draw.position_map({name: heavy(4, 15) for name in PANELS}, list("abcdefghijklmno"), label="e", spans=spans)
    axes[0].figure.draw_without_rendering()
    names = by_gid(axes[0], "span")
    assert {name.get_text(): name.get_position()[0] for name in names} == {
        "IO": 2, "S1": 4, "S1+1": 5, "S1+1 again": 6, "END": 14,
    }  # fmt: skip
    assert not overlapping(names)


def overlapping(texts: list[Any]) -> list[tuple[str, str]]:
    """The pairs of texts whose boxes share more than a hairline."""
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts if text.get_text()]
    return [(a, b) for (a, one), (b, other) in combinations(boxes, 2) if overlap(one, other) > 2.0]


# --- the scatter


def test_spearman_equals_scipy_with_ties_and_leaves_out_what_is_missing() -> None:
    from scipy.stats import spearmanr

    x, y = np.round(heavy(60), 1), np.round(heavy(60) + heavy(60, seed=1), 1)
    ours = draw.spearman(x, y)
    assert math.isclose(ours, spearmanr(x, y).statistic, abs_tol=1e-12)  # one correlation in float64
    holes = np.concatenate([x, [np.nan, 1.0]]), np.concatenate([y, [1.0, np.inf]])
    assert draw.spearman(*holes) == ours
    ties_by_order = np.corrcoef(np.argsort(np.argsort(x)), np.argsort(np.argsort(y)))[0, 1]
    assert abs(ties_by_order - ours) > 1e-3, "the values must have ties, or the oracle would not notice"


@pytest.mark.parametrize(("x", "y"), [([1, 2], [1, 2]), ([1, 1, 1, 1], [1, 2, 3, 4]), ([], [])])
def test_spearman_without_enough_variation_is_nan(x: list[float], y: list[float]) -> None:
    assert math.isnan(draw.spearman(x, y))


def test_scatter_labels_the_ten_worst_without_overlap() -> None:
    exact = heavy(80)
    estimate = exact * (1 + 0.4 * heavy(80, seed=1))
    estimate[7] = np.nan
    names = [f"L{i // 8}H{i % 8}" for i in range(80)]
    ax = draw.scatter(estimate, exact, names, groups=["head"] * 60 + ["MLP"] * 20, unit="logit")
    ax.figure.draw_without_rendering()
    labels = by_gid(ax, "worst")
    worst = np.argsort(-np.nan_to_num(np.abs(estimate - exact)))[:10]
    assert {label.get_text() for label in labels} == {names[i] for i in worst}
    assert not overlapping(labels)
    assert ax.get_xlim() == ax.get_ylim()
    assert (ax.get_xscale(), ax.get_yscale()) == ("symlog", "symlog")
    assert ax.get_title("left") == f"Spearman {draw.spearman(estimate, exact):.3f}, n = 79"


def test_scatter_of_nothing_and_of_zeros_can_be_drawn(tmp_path: Path) -> None:
    for values in ([], [0.0, 0.0, 0.0]):
        ax = draw.scatter(values, values, [""] * len(values))
        assert "too few points" in ax.get_title("left")
        assert draw.save(ax.figure, tmp_path / "empty.png").stat().st_size > 0


def test_crowded_labels_are_moved_apart() -> None:
    ax = draw.new_figure(4, 4).add_subplot()
    ax.set(xlim=(0, 1), ylim=(0, 1))
    points = [(0.5 + 0.01 * i, 0.5) for i in range(6)]
    notes = place(ax, points, [f"name {i}" for i in range(6)])
    assert not overlapping(notes)
    for note in notes:
        note.set_position((10, 10))
    assert overlapping(notes), "labels at one fixed offset would overlap here"


# --- tokens


@pytest.mark.parametrize(
    ("token", "looks"),
    [
        (" Mary", "␣Mary"),
        ("ĠMary", "␣Mary"),
        ("▁Mary", "␣Mary"),
        ("\n", "↵"),
        ("<|endoftext|>", "⟨bos⟩"),
        ("<s>", "⟨bos⟩"),
        ("<pad>", "⟨pad⟩"),
        ("[MASK]", "⟨mask⟩"),
        ("<b>", "⟨b⟩"),
        ("a<b", "a<b"),
        ("", "∅"),
        ("\x00", "�"),
    ],
)
def test_tokens_are_spelled_as_people_read_them(token: str, looks: str) -> None:
    assert draw.spell(token) == looks


def test_long_tokens_are_cut() -> None:
    assert draw.spell("abcdefgh", longest=5) == "abcd…"


class Boxes(HTMLParser):
    """Text, style and hover text of each token box."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.boxes: list[dict[str, str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag == "span":
            self.boxes.append({"text": "", **{name: value or "" for name, value in attrs}})

    def handle_data(self, data: str) -> None:
        self.boxes[-1]["text"] += data

    def ground(self, place: int) -> str:
        found = re.search(r"background:(#\w+)", self.boxes[place]["style"])
        assert found
        return found[1]


def test_tokens_are_escaped() -> None:
    nasty = ['<script>alert("x")</script>', "&amp;", "</span>", '" onmouseover="x']
    parsed = Boxes(draw.tokens_html(nasty, spans={'<i>"name"': (0, 1)}))
    assert [box["text"] for box in parsed.boxes] == [draw.spell(token) for token in nasty]
    assert set(parsed.tags) == {"div", "span"}
    unescaped = Boxes("<div>" + "".join(f"<span>{token}</span>" for token in nasty) + "</div>")
    assert "script" in unescaped.tags, "this parser would have seen the tag"


def test_values_colour_the_ground_and_stand_in_the_hover_text() -> None:
    parsed = Boxes(draw.tokens_html(list("abcd"), values=[1.0, -1.0, 0.0, np.nan], unit="logit", bound=1.0))
    assert parsed.ground(0) == "#053061"
    assert parsed.ground(1) == "#67001f"
    assert parsed.ground(2) == "#ffffff"
    assert "+1 logit" in parsed.boxes[0]["title"]
    assert "logit" not in parsed.boxes[3]["title"]


def test_differences_are_marked_and_spans_tinted() -> None:
    parsed = Boxes(draw.tokens_html(["a", "b", "c"], differs=[1], spans={"S": (2, 3)}))
    assert ["bold" in box["style"] for box in parsed.boxes] == [False, True, False]
    assert [html.unescape(box["title"]) for box in parsed.boxes] == [
        "position 0",
        "position 1 · differs",
        "position 2 · S",
    ]
    assert parsed.ground(2) != parsed.ground(0)


def test_values_and_tokens_must_match() -> None:
    with pytest.raises(SettingError, match="3 tokens and 2 values"):
        draw.tokens_html(["a", "b", "c"], values=[1, 2])


# --- whole results and files


def result(**scores: tuple[Any, tuple[str, ...]]) -> Attribution:
    tensors = {f"score/{site}": Labelled(torch.as_tensor(values), axes) for site, (values, axes) in scores.items()}
    return Attribution(tensors, settings={"metric": {"name": "logit_difference", "unit": "logit"}})


def test_plot_sums_magnitudes_over_positions() -> None:
    z, mlp = np.abs(heavy(3, 5, 4)), np.abs(heavy(3, 5, 7, seed=1))
    z[1, :, 2] = np.nan
    z[2, 0, 0] = np.nan
    ax = draw.attribution(result(z=(z, ("layer", "pos", "head")), mlp_post=(mlp, ("layer", "pos", "neuron"))))
    shown, side = ax.get_images()
    expected = np.nansum(z, axis=1)
    expected[1, 2] = np.nan
    np.testing.assert_allclose(np.ma.filled(shown.get_array(), np.nan), expected, rtol=1e-12)  # sums of 5 in float64
    np.testing.assert_allclose(side.get_array()[:, 0], mlp.sum((1, 2)), rtol=1e-12)  # sums of 35 in float64
    labels = [axes.get_ylabel().replace("\n", " ") for axes in ax.figure.axes]
    assert any("mean |effect| summed over positions and neurons [logit]" in label for label in labels)
    assert ax.get_images()[0].norm.vmin == 0.0


def test_plot_names_kv_heads_and_results_without_heads() -> None:
    assert draw.attribution(result(k=(np.ones((2, 2)), ("layer", "kv_head")))).get_xlabel() == "kv head (k)"
    ax = draw.attribution(result(resid_pre=(np.ones((2, 3)), ("layer", "pos"))))
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["resid_pre"]


def test_plot_without_layers_is_refused() -> None:
    with pytest.raises(SettingError, match="scores of embed"):
        draw.attribution(result(embed=(np.ones(3), ("pos",))))


def test_files_are_opaque_white_and_the_same_every_time(tmp_path: Path) -> None:
    from PIL import Image

    for suffix in ("png", "svg"):
        one, two = (
            draw.save(draw.head_map(heavy(2, 3), label="effect").figure, tmp_path / f"{i}.{suffix}").read_bytes()
            for i in range(2)
        )
        assert one == two
    pixels = np.asarray(Image.open(tmp_path / "0.png").convert("RGBA"))
    assert (pixels[..., 3] == 255).all()
    assert tuple(pixels[0, 0]) == (255, 255, 255, 255)
