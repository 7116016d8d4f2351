"""Operators and selections of edits against slow loops, and the errors of those that do not fit."""

from __future__ import annotations

import families
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mechattr.errors import MismatchError, SettingError, UnknownSiteError, UnsupportedFeatureError
from mechattr.models import (
    Ablate,
    Add,
    Batch,
    Edit,
    Mean,
    PlainConfig,
    Resample,
    Scale,
    Set,
    Zero,
    plain_model,
)
from mechattr.sites import site_spec

MODEL = plain_model(PlainConfig.llama_like(n_layers=2))
IDS = families.tokens(3, 6) % 31
BATCH = Batch.of(IDS)
OTHER = MODEL.run(Batch.of(families.tokens(4, 6, seed=9) % 31), record=MODEL.sites()).activations


def ragged(side: str) -> Batch:
    batch = families.ragged(side, (6, 3, 4))
    return Batch.of(batch.tokens % 31, batch.mask)


def recorded(site: str, *edits: Edit, batch: Batch = BATCH) -> torch.Tensor:
    return MODEL.run(batch, record=site, edits=edits).activations[site, 0].values


DIRECTION = torch.arange(1.0, 5.0, dtype=torch.float64)
OPERATORS = {
    "set": (Set(2.5), lambda x: torch.full_like(x, 2.5)),
    "set a vector": (Set(DIRECTION), lambda x: DIRECTION.expand_as(x)),
    "add": (Add(DIRECTION), lambda x: x + DIRECTION),
    "scale": (Scale(-0.5), lambda x: x * -0.5),
    "zero": (Zero(), lambda x: x - x),
    "mean": (Mean(OTHER), lambda x: OTHER["z", 0].values.sum(0, keepdim=True).expand_as(x) / 4),
    "resample": (Resample(OTHER, [3, 0, 3]), lambda x: torch.stack([OTHER["z", 0].values[i] for i in (3, 0, 3)])),
    "ablate": (Ablate(DIRECTION), lambda x: x - (x * DIRECTION).sum(-1, keepdim=True) * DIRECTION / 30),
    "a function": (lambda x, place: x.tanh(), torch.tanh),
    "a function that writes in place": (lambda x, place: x.mul_(3), lambda x: 3 * x),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_do_what_their_name_says(name):
    op, by_hand = OPERATORS[name]
    found = recorded("z", Edit("z", op, layers=[0]))
    torch.testing.assert_close(found, by_hand(recorded("z")), rtol=0, atol=1e-12)  # sums in float64


def test_edits_of_a_site_are_applied_in_order():
    found = recorded("z", Edit("z", Scale(2.0)), Edit("z", Add(1.0)))
    torch.testing.assert_close(found, 2 * recorded("z") + 1, rtol=0, atol=0)


def test_an_edit_never_writes_into_a_recorded_activation():
    edit = Edit("resid_pre", lambda x, place: x.zero_(), layers=[1])
    run = MODEL.run(BATCH, record=("resid_post", "resid_pre"), edits=[edit])
    assert run.activations["resid_post", 0].values.abs().max() > 0.1
    assert not run.activations["resid_pre", 1].values.any()


def some(top: int) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, top), min_size=1, max_size=top + 1, unique=True)


@given(
    site=st.sampled_from(["z", "k", "mlp_post", "resid_mid", "pattern", "ln1_scale"]),
    side=st.sampled_from(["left", "right"]),
    rows=st.none() | some(2),
    positions=st.none() | st.lists(st.integers(-3, 2), min_size=1, max_size=3, unique_by=lambda p: p % 6),
    features=st.none() | some(1),
)
def test_a_selection_is_what_a_slow_loop_selects(site, side, rows, positions, features):
    """Real-token positions, heads or neurons and rows, in batches padded on either side."""
    batch, axes = ragged(side), site_spec(site).axes
    if site == "pattern":  # a uniform row stays one in later layers, so any value will do
        features = None
    named = {"head": "heads", "kv_head": "heads", "neuron": "neurons"}
    axis = next((a for a in axes if a in named), None)
    selection = {} if axis is None or features is None else {named[axis]: features}
    edit = Edit(site, lambda x, place: 3 * x + 1, layers=[0], rows=rows, positions=positions, **selection)
    found, wanted = recorded(site, edit, batch=batch), recorded(site, batch=batch).clone()
    column = axes.index("query") if "query" in axes else 1
    for row in range(3) if rows is None else rows:
        length, first = int(batch.lengths[row]), int(batch.mask[row].int().argmax())
        chosen = set(range(wanted.shape[column]))
        if positions is not None:
            chosen = {first + (p if p >= 0 else length + p) for p in positions}
        for c in chosen:
            part = wanted[row].select(column - 1, c)  # a view
            if axis is None or features is None:
                part.mul_(3).add_(1)
            else:
                for feature in features:
                    part[feature].mul_(3).add_(1)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def test_values_broadcast_to_the_selected_rows_and_positions():
    value = torch.arange(2.0 * 2 * 1 * 4, dtype=torch.float64).view(2, 2, 1, 4)
    found = recorded("z", Edit("z", Set(value), rows=[2, 0], positions=[1, -1], heads=[3]))
    assert torch.equal(found[2, 1, 3], value[0, 0, 0])
    assert torch.equal(found[0, 5, 3], value[1, 1, 0])
    assert torch.equal(found[1], recorded("z")[1])


def test_setting_to_a_recording_takes_the_same_place():
    source = MODEL.run(Batch.of(IDS.flip(0)), record="z").activations
    found = recorded("z", Edit("z", Set(source), heads=[1], positions=[-2], rows=[0]))
    assert torch.equal(found[0, 4, 1], source["z", 0].values[0, 4, 1])
    assert torch.equal(found[0, :4], recorded("z")[0, :4])
    plain = {name: x.values for name, x in source.items()}
    assert torch.equal(found, recorded("z", Edit("z", Set(plain), heads=[1], positions=[-2], rows=[0])))


def test_an_empty_selection_changes_nothing():
    for selection in ({"positions": []}, {"rows": []}, {"heads": []}, {"rows": [], "positions": [0]}):
        assert torch.equal(recorded("z", Edit("z", Zero(), **selection)), recorded("z"))


WRONG = [
    (Edit("zz", Zero()), UnknownSiteError, "site 'zz'\n  found: no such site"),
    (Edit("pos_embed", Zero()), UnknownSiteError, "this model has no such site; it has embed, resid_pre"),
    (Edit("z", Zero(), layers=[0, 7]), SettingError, r"layers=\[7\]\n  found: the model's layers has 0 to 1"),
    (Edit("blocks.0.attn.hook_z", Zero(), layers=[1]), SettingError, "the full name says the layer"),
    (Edit("z", Zero(), heads=[4]), SettingError, r"heads=\[4\]\n  found: the axis head of .*hook_z has 0 to 3"),
    (Edit("k", Zero(), heads=[2]), SettingError, "the axis kv_head of blocks.0.attn.hook_k has 0 to 1"),
    (Edit("z", Zero(), heads=2), SettingError, r"a single number\n  fix: give a list: heads=\[2\]"),
    (Edit("resid_pre", Zero(), heads=[0]), SettingError, "its axes are batch, pos, d_model\n  fix: leave heads out"),
    (Edit("z", Zero(), neurons=[0]), SettingError, "fix: leave neurons out"),
    (Edit("z", Zero(), experts=[0]), SettingError, "fix: leave experts out"),
    (Edit("mlp_post", Zero(), neurons=[32]), SettingError, r"neurons=\[32\]"),
    (Edit("z", Zero(), rows=[3]), SettingError, r"rows=\[3\]\n  found: the batch has 0 to 2"),
    (Edit("z", Zero(), positions=[6]), SettingError, "position 6\n  found: rows of 6 to 6 real tokens"),
    (Edit("z", Zero(), positions=[-7]), SettingError, r"positions=\[-7\]\n  found: the shortest row has 6 tokens"),
    (Edit("z", Zero(), positions="end"), UnsupportedFeatureError, "positions='end'\n  found: unknown group"),
    (Edit("z", Zero(), heads=[1.5]), SettingError, r"heads=\[1.5\] at .*hook_z\n  found: no list of whole numbers"),
    (Edit("z", Zero(), heads="12"), SettingError, "heads='12' at .*\n  found: no list of whole numbers"),
    (Edit("z", Zero(), rows=[True, False, True]), SettingError, r"fix: give one, such as rows=\[0, 1\]"),
    (Edit("z", Zero(), rows=torch.tensor([True, False, True])), SettingError, "no list of whole numbers"),
    (Edit("embed", Zero(), layers=[0]), SettingError, "found: the site exists once in the model"),
    (Edit("z", 3.0), SettingError, "with op 3.0\n  found: that is not callable"),
    (Edit("z", Set(torch.zeros(3))), SettingError, "a value of shape \\(3,\\) at blocks.0.attn.hook_z"),
    (Edit("z", lambda x, place: None), SettingError, "returned NoneType"),
    (Edit("z", lambda x, place: x[:1]), SettingError, r"returned torch.float64 \(1, 6, 4, 4\)"),
    (Edit("z", lambda x, place: x.float(), heads=[0]), SettingError, "returned torch.float32"),
    (Edit("z", Ablate(torch.zeros(4))), SettingError, "give a non-zero direction of 4 numbers"),
    (Edit("z", Set(OTHER)), MismatchError, "for 3 rows\n  found: the recording has 4"),
    (Edit("z", Set({})), MismatchError, "the recording has no such site"),
    (Edit("z", Mean({"blocks.0.attn.hook_z": torch.zeros(2, 5, 4, 4)})), MismatchError, "the same number of tokens"),
    (Edit("z", Resample(OTHER, [0])), SettingError, "Resample with 1 rows\n  found: a batch of 3 rows"),
    (Edit("z", Resample(OTHER, [0, 1, 4])), SettingError, r"Resample from rows \[4\]\n  found: a recording of 4 rows"),
]  # fmt: skip


@pytest.mark.parametrize(("edit", "error", "text"), WRONG, ids=[text[:40] for _, _, text in WRONG])
def test_edits_that_do_not_fit_are_refused(edit, error, text):
    with pytest.raises(error, match=text):
        MODEL.run(BATCH, edits=[edit])


def test_positions_beyond_a_shorter_row_are_refused_only_where_they_matter():
    edit = Edit("z", Zero(), positions=[4])
    with pytest.raises(SettingError, match="rows of 3 to 6 real tokens"):
        MODEL.run(ragged("left"), edits=[edit])
    MODEL.run(ragged("left"), edits=[Edit("z", Zero(), positions=[4], rows=[0])])


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Batch.of(torch.zeros(2, 3)), "tokens torch.float32"),
        (lambda: Batch.of(IDS, torch.ones(3, 5)), "give tokens and mask of one shape"),
        (lambda: Batch.of(IDS, torch.tensor([[True] * 6, [False] * 6, [True] * 6])), "a row without any real token"),
        (lambda: Batch.of(IDS, torch.tensor([[True, False] * 3] * 3)), "padding between real tokens"),
        (lambda: Batch.of(IDS, strings=["a", "b"]), "3 rows and the strings of 2"),
        (lambda: BATCH.rows([3]), r"rows \[3\]\n  found: 3 rows\n  fix: give a list of row numbers, or one bool"),
        (lambda: BATCH.rows([0.5]), r"rows \[0.5\]"),
        (lambda: BATCH.rows([True, False]), r"rows \[True, False\]"),
        (lambda: MODEL.run(BATCH.rows([])), "a batch without rows"),
        (lambda: MODEL.run("a b"), r"found: a str\n  fix: make a batch with model.tokenize"),
        (lambda: MODEL.run(BATCH, edits=Edit("z", Zero())), "give a list of Edit"),
    ],
)
def test_batches_that_make_no_sense_are_refused(make, text):
    with pytest.raises(SettingError, match=text):
        make()


def test_rows_are_chosen_by_number_or_by_one_bool_each():
    batch = Batch.of(IDS, strings=["abcdef", "ghijkl", "mnopqr"])
    for chosen in ([0, 2], [0, -1], torch.tensor([0, 2]), range(0, 3, 2), [True, False, True]):
        part = batch.rows(chosen)
        assert torch.equal(part.tokens, IDS[[0, 2]])
        assert part.example.tolist() == [0, 2]
        assert part.strings == (tuple("abcdef"), tuple("mnopqr"))


def test_columns_are_where_positions_stand():
    for side in ("left", "right"):
        batch = ragged(side)
        assert batch.padding_side == side
        for position in (-3, -1, 0, 2):
            columns = batch.columns(position)
            counted = batch.positions[torch.arange(3), columns]
            assert counted.tolist() == [position if position >= 0 else n + position for n in (6, 3, 4)]
        twice = batch.rows([1, 1, 0])
        assert twice.example.tolist() == [1, 1, 0]
        assert twice.lengths.tolist() == [3, 3, 6]
