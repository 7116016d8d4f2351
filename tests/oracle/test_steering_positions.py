"""Position numbers that meet or miss a row, and generation whose calls say less of a prompt than it has."""

from __future__ import annotations

import copy
from typing import Any

import families
import pytest
import steering_cases as cases
import torch

from mechattr.errors import SettingError, UnsupportedFeatureError
from mechattr.models import Batch, HookedHF
from mechattr.models.edits import Edit
from mechattr.models.operators import Add
from mechattr.sites import full_name
from mechattr.steering import Condition

# some rows of 7, 4 and 5 tokens have both numbers at one token, or have none of them
NUMBERS = ([4, -1], [2, -2], [-5], [-7], [3, 3], [6, -4, 0])


def own(numbers: list[int], length: int) -> list[int]:
    """The positions of a row, each once, by definition."""
    return sorted({p if p >= 0 else length + p for p in numbers if p >= -length})


def twice(numbers: list[int], length: int) -> list[int]:
    """Wrong: a position that two numbers name is moved twice."""
    return [p if p >= 0 else length + p for p in numbers if p >= -length]


def alone(model: Any, batch: Batch, row: int, v: Any, at: list[int]) -> torch.Tensor:
    """Logits of one row without its padding, with one edit for each position."""
    tokens = families.alone(batch, row)
    length = tokens.tokens.shape[1]
    edits = [Edit(n, Add(x.values), positions=[p]) for n, x in v.tensors.items() for p in at if p < length]
    return model.run(tokens, edits=edits).logits[0]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("numbers", NUMBERS)
def test_a_position_is_moved_once_and_short_rows_are_left_alone(numbers: list[int], side: str) -> None:
    model, batch = families.hooked("llama", torch.float64), families.ragged(side)
    v = cases.everywhere(model)
    with v.apply(model, positions=numbers):
        found = model.run(batch).logits
    for row in range(3):
        length = int(batch.lengths[row])
        expected = alone(model, batch, row, v, own(numbers, length))
        # float64, but for the float32 inside rotary angles and norms, which padding reorders
        torch.testing.assert_close(found[row, batch.mask[row]], expected, rtol=1e-4, atol=1e-4)
        if len(twice(numbers, length)) > len(own(numbers, length)):
            wrong = alone(model, batch, row, v, twice(numbers, length))
            assert not torch.allclose(found[row, batch.mask[row]], wrong, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("numbers", NUMBERS)
def test_the_same_in_generation(numbers: list[int]) -> None:
    model, batch = families.hooked("llama"), families.ragged("left")
    v = cases.everywhere(model)
    with v.apply(model, positions=numbers):
        found = model.generate(batch, max_new_tokens=4, do_sample=False).tokens[:, -4:]
    for row in range(3):
        length, tokens = int(batch.lengths[row]), families.alone(batch, row).tokens
        for _ in range(4):
            logits = alone(model, Batch.of(tokens), 0, v, own(numbers, length))
            tokens = torch.cat([tokens, logits[-1:].argmax(-1)[None]], 1)
        assert found[row].tolist() == tokens[0, -4:].tolist()


@pytest.mark.parametrize("positions", ["all", "prompt", "generated", "last", "numbers", "mask"])
@pytest.mark.parametrize(
    "how", [{"cache_implementation": "static"}, {"prefill_chunk_size": 4}], ids=["static", "parts"]
)
def test_a_prompt_that_calls_see_in_parts_or_without_its_mask(how: dict[str, Any], positions: str) -> None:
    torch_model = families.model("gpt2")
    model, batch = HookedHF(torch_model), families.ragged("left")
    v = cases.everywhere(model)
    where = cases.mask_of(batch) if positions == "mask" else cases.PLACES[positions]
    expected = cases.by_hand(model, batch, v, where, 4, [1.0] * 3)
    given = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, **how}
    with v.apply(model, positions=where):
        hooked = model.generate(batch, **given).tokens[:, -4:]
    with v.apply(torch_model, positions=where):
        plain = torch_model.generate(batch.tokens, attention_mask=batch.mask.long(), **given)[:, -4:]
    assert hooked.tolist() == plain.tolist() == expected.tolist()


def test_the_check_sees_a_mask_that_is_left_out() -> None:
    torch_model = families.model("gpt2")
    batch = families.ragged("left")
    v = cases.everywhere(HookedHF(torch_model))
    columns = torch.zeros_like(batch.mask)
    columns[:, [2]] = True  # wrong: columns of a padded prompt as positions
    expected = cases.by_hand(HookedHF(torch_model), batch, v, [2], 4, [1.0] * 3)
    with v.apply(torch_model, positions=columns):
        wrong = torch_model.generate(
            batch.tokens, attention_mask=batch.mask.long(), max_new_tokens=4, do_sample=False, pad_token_id=0
        )[:, -4:]
    assert wrong.tolist() != expected.tolist()


def test_a_mask_that_does_not_say_what_is_padding_is_refused() -> None:
    torch_model = families.model("gpt2")
    v = cases.everywhere(HookedHF(torch_model))
    ids = families.tokens(2, 5)
    with v.apply(torch_model), pytest.raises(UnsupportedFeatureError) as error:
        torch_model(ids, attention_mask=torch.ones(2, 1, 5, 5, dtype=torch.bool).tril())
    assert str(error.value) == (
        "steering under a mask of attention with more axes than two\n  found: no word of what is padding\n"
        "  fix: hand over attention_mask [row, column]"
    )


@pytest.mark.parametrize("forgets", [False, True])
def test_prompts_take_turns(forgets: bool) -> None:
    """What a gate says of one is kept with its cache; a copy of the cache (the control) is of the last prompt."""
    torch_model = families.model("gpt2")
    model, ids = HookedHF(torch_model), families.tokens(2, 6)
    v, c = cases.vector(model), torch.randn(model.info.d_model, generator=torch.Generator().manual_seed(1))
    scores = Condition.of(full_name("resid_post", 0), c, 0.0).scores(model, Batch.of(ids))
    gate = Condition.of(full_name("resid_post", 0), c, float(scores.mean()))  # opens for one of the two
    with v.apply(torch_model, gate=gate), torch.no_grad():
        alone = torch_model(ids[:1, :1], past_key_values=torch_model(ids[:1]).past_key_values).logits
    with v.apply(torch_model, gate=gate), torch.no_grad():
        cache = torch_model(ids[:1]).past_key_values
        torch_model(ids[1:])
        found = torch_model(ids[:1, :1], past_key_values=copy.deepcopy(cache) if forgets else cache).logits
    assert torch.equal(found, alone) != forgets


def test_a_cache_of_another_prompt_than_the_last_one_is_refused() -> None:
    torch_model = families.model("gpt2")
    v = cases.vector(HookedHF(torch_model))
    one, two = families.tokens(1, 5), families.tokens(2, 3)
    with v.apply(torch_model), torch.no_grad():
        cache = torch_model(one, use_cache=True).past_key_values
        torch_model(two, use_cache=True)
        with pytest.raises(SettingError) as error:
            torch_model(one[:, :1], past_key_values=copy.deepcopy(cache))
    assert str(error.value) == (
        "a call of 1 rows\n  found: the last prompt, of 2, has no cache of that many rows\n"
        "  fix: finish one prompt before the next one begins"
    )


@pytest.mark.parametrize(
    ("positions", "found"),
    [
        (torch.tensor(3), "something else than whole numbers"),
        (torch.rand(2, 6), "something else than whole numbers"),
        (torch.ones(2, 6, dtype=torch.long), "something else than whole numbers"),
        ([], "no position"),
        (torch.tensor([], dtype=torch.long), "no position"),
    ],
)
def test_positions_that_are_none(positions: Any, found: str) -> None:
    model = families.hooked("gpt2")
    with pytest.raises(SettingError) as error, cases.vector(model).apply(model, positions=positions):
        pass
    assert f"found: {found}\n  fix: give one of 'all', 'prompt', 'generated', 'last', position" in str(error.value)


@pytest.mark.parametrize(
    ("operator", "found"),
    [(lambda x, _v, _m: x[:, :1], "shape [2, 1, 32]"), (lambda _x, _v, _m: None, "a NoneType")],
)
def test_operators_that_give_something_else_are_refused(operator: Any, found: str) -> None:
    model = families.hooked("gpt2")
    with cases.vector(model).apply(model, operator=operator), pytest.raises(SettingError, match="an operator at") as e:
        model.run(Batch.of(families.tokens(2, 5)))
    assert f"found: {found.replace('32', str(model.info.d_model))}" in str(e.value)
    with pytest.raises(SettingError, match="no such operator"), cases.vector(model).apply(model, operator=["add"]):
        pass
