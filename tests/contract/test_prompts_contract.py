"""What every row of `mechattr.METHODS` that takes prompts is held to (E16, E18)."""

from __future__ import annotations

import copy
from inspect import signature
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from backends import backend_model
from contract_state import state
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from prompt_cases import CASES, PLAIN, PromptCase, call, function_of, model_of, rows_of

import mechattr as ma
from mechattr.decomposition.routes import Routes
from mechattr.errors import SettingError, UnsupportedFeatureError
from mechattr.methods import METHODS, MethodRow
from mechattr.models import Batch

ROWS = {name: row for name, row in METHODS.items() if row.takes == "prompts"}
EVERY = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
TARGETED = {name: case for name, case in CASES.items() if case.targeted}
COMPLETE = {name: case for name, case in CASES.items() if "complete" in METHODS[case.method].promises}


def close(model: Any) -> float:
    """Rounding of the dtype, of logits of about 30 and sums of a few hundred products."""
    return 1e-10 if model.info.dtype == "float64" else 2e-4


def assert_row(whole: Any, row: int, alone: Any, length: int, atol: float) -> None:
    """A row of a result is the result of that row, and NaN (whole numbers: -1) at its padding."""
    if isinstance(whole, Routes):  # each prompt has a list of edges, of a length of its own
        assert_graph(whole.prompt(row), alone.prompt(0), atol)
        return
    assert whole.tensors.keys() == alone.tensors.keys()
    for name, table in alone.tensors.items():
        found = whole.tensors[name].sel(batch=row)
        assert found.axes == table.axes[1:], name
        values, padding = found.values, []
        for dim, axis in enumerate(found.axes):
            if axis in ("pos", "query", "key"):
                padding.append(values.narrow(dim, length, values.shape[dim] - length))
                values = values.narrow(dim, 0, length)
        torch.testing.assert_close(
            values, table.values[0], rtol=0, atol=atol, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
        )
        assert all(bool((part.isnan() if part.is_floating_point() else part < 0).all()) for part in padding), name


def assert_graph(found: Routes, expected: Routes, atol: float) -> None:
    """The same edges with the same weights."""
    assert found.tensors.keys() == expected.tensors.keys()
    for name, table in expected.tensors.items():
        tolerance = atol if name == "weight" else 0
        torch.testing.assert_close(found.tensors[name].values, table.values, rtol=0, atol=tolerance)


def test_every_method_is_held_to_the_contract() -> None:
    assert {case.method for case in CASES.values()} == set(ROWS)


@pytest.mark.parametrize("kind", (*PLAIN, "gpt2", "llama"))
@EVERY
def test_nothing_is_changed_and_the_same_call_gives_the_same_bits(case: PromptCase, kind: str) -> None:
    model = model_of(kind)
    rows = rows_of(model)
    before = copy.deepcopy(state(model, (rows,)))
    first, second = call(case, model, rows), call(case, model, rows)
    assert state(model, (rows,)) == before
    assert first.settings == second.settings and first.provenance == second.provenance
    for name, table in first.tensors.items():
        torch.testing.assert_close(second.tensors[name].values, table.values, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kind", (*PLAIN, *families.SHAPES))
@EVERY
def test_batches_and_padding_on_either_side_change_nothing(case: PromptCase, kind: str) -> None:
    model = model_of(kind)
    if kind in case.refuses:
        with pytest.raises(UnsupportedFeatureError, match=case.refuses[kind]):
            call(case, model, rows_of(model))
        return
    singly = rows_of(model)
    alone = [call(case, model, Batch.of(singly.tokens[i, singly.mask[i]])) for i in range(3)]
    for side in ("right", "left"):
        whole = call(case, model, rows_of(model, side))
        for i, length in enumerate((7, 4, 5)):
            assert_row(whole, i, alone[i], length, close(model))


@EVERY
def test_another_prompt_is_told_apart(case: PromptCase) -> None:
    """The control of the test above."""
    model = model_of("gpt2_like")
    rows = rows_of(model)
    whole = call(case, model, rows)
    tokens = rows.tokens[0].clone()
    tokens[1] = (tokens[1] + 1) % model.info.d_vocab
    with pytest.raises(AssertionError):
        assert_row(whole, 0, call(case, model, Batch.of(tokens)), 7, close(model))


@pytest.mark.parametrize("case", TARGETED.values(), ids=TARGETED)
def test_targets_foils_and_positions_matter(case: PromptCase) -> None:
    model = model_of("gpt2_like")
    rows = rows_of(model)
    first = call(case, model, rows)
    for other in ({"target": 6}, {"foil": 8}, {"foil": None}, {"position": 1}):
        changed = call(case, model, rows, **other)
        assert any(
            not torch.equal(changed.tensors[name].values.nan_to_num(), table.values.nan_to_num())
            for name, table in first.tensors.items()
        )
    each = call(case, model, rows, target=[5, 6, 9], foil=[7, 8, 7])
    for row, (target, foil) in enumerate(((5, 7), (6, 8), (9, 7))):
        alone = call(case, model, rows, target=target, foil=foil)
        for name, table in alone.tensors.items():
            found, expected = (x.sel(batch=row).values for x in (each.tensors[name], table))
            torch.testing.assert_close(found, expected, rtol=0, atol=close(model), equal_nan=True)


@pytest.mark.parametrize(
    ("case", "kind"),
    [
        pytest.param(case, kind, id=f"{name}-{kind}")
        for name, case in COMPLETE.items()
        for kind in (*PLAIN, *families.SHAPES)
        if kind not in case.refuses
    ],
)
def test_what_is_complete_sums_to_the_logit(case: PromptCase, kind: str) -> None:
    model = model_of(kind)
    result = call(case, model, rows_of(model))
    table = result.tensors[case.total]
    (axis,) = [axis for axis in table.axes if axis != "batch"]
    kept = [name for name in table.coords[axis] if name not in case.total_without]
    total = table.sel(**{axis: kept}).values.nan_to_num().sum(-1)
    expected = torch.tensor(result.settings["logit"], dtype=total.dtype)
    torch.testing.assert_close(total, expected, rtol=0, atol=close(model))


@pytest.mark.parametrize("kind", ("lens-gpt2", "nnsight-gpt2", "nnsight-local-gpt2"))
@EVERY
def test_backends_agree_or_refuse(case: PromptCase, kind: str) -> None:
    other, model = backend_model(kind), families.hooked("gpt2")
    rows = rows_of(model)
    if kind not in case.backends:
        with pytest.raises(UnsupportedFeatureError, match="fix: "):
            call(case, other, rows)
        return
    found, expected = call(case, other, rows), call(case, model, rows)
    for name, table in expected.tensors.items():
        torch.testing.assert_close(found.tensors[name].values, table.values, rtol=0, atol=close(model), equal_nan=True)


@EVERY
def test_one_text_gives_results_without_a_batch(case: PromptCase) -> None:
    model = ma.load("tiny")
    text = "When Mary and John went to the store"
    targets = {"target": " Mary", "foil": " John"} if case.targeted else {}
    one, several = call(case, model, text, **targets), call(case, model, [text, "The cat"], **targets)
    if isinstance(one, Routes):
        assert several.tensors.keys() - one.tensors.keys() == {"batch"}
    else:
        for name, table in one.tensors.items():
            assert several.tensors[name].axes == ("batch", *table.axes)
    assert_row(several, 0, call(case, model, [text], **targets), len(one.strings[0]), close(model))


@pytest.mark.parametrize("kind", (*PLAIN, "gpt2"))
@EVERY
def test_one_token_gives_finite_results(case: PromptCase, kind: str) -> None:
    model = model_of(kind)
    result = call(case, model, Batch.of(torch.tensor([[3]])))
    assert all(bool(table.values.isfinite().all()) for table in result.tensors.values())


@EVERY
def test_results_are_stored_read_and_shown(case: PromptCase, tmp_path: Path) -> None:
    model = model_of("gpt2_like")
    one = Batch.of(rows_of(model).tokens[:1])
    for prompt in (one, rows_of(model)):
        result = call(case, model, prompt)
        result.save(tmp_path / f"{len(prompt)}")
        frame = result.to_pandas()
        assert len(frame)
        for again in (ma.open(tmp_path / f"{len(prompt)}"), case.result.load(tmp_path / f"{len(prompt)}")):
            assert type(again) is case.result
            assert again.settings == result.settings and again.provenance == result.provenance
            assert again.to_pandas().equals(frame)
            assert again._repr_html_() == result._repr_html_()
        assert "<table" in result._repr_html_()
        assert result.provenance["weight_hash"] == model.fingerprint()["weight_hash"]
        assert result.settings["method"] == case.method
        assert result.passes.forward >= len(prompt) and result.passes.backward >= 0
    ax = Figure().add_subplot()
    drawn = call(case, model, one).plot(ax)
    assert isinstance(drawn, Axes) and drawn.get_figure() is ax.get_figure()


@EVERY
def test_wrong_input_is_refused(case: PromptCase) -> None:
    model = model_of("gpt2_like")
    rows = rows_of(model)
    with pytest.raises(SettingError, match=r"a prompt\n  found: a int\n  fix: give a text"):
        call(case, model, 3)
    if "position" in case.settings or "position" not in signature(function_of(case)).parameters:
        return
    with pytest.raises(SettingError, match="position 4\n  found: rows of 4 to 7 real tokens"):
        call(case, model, rows, position=4)
    for position in ("END", 1.0, True):
        with pytest.raises(SettingError, match="fix: give one whole number"):
            call(case, model, rows, position=position)


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_a_row_names_a_page_that_exists(row: MethodRow, root: Path) -> None:
    page = (root / row.page).read_text(encoding="utf-8")
    assert f"ma.{row.name}(" in page and "## Cost" in page and "## Traps" in page
