"""Models that are steered at the same time: in several threads, in blocks that end in any order, on bare models."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import families
import pytest
import torch
from patching_cases import plain
from steering_cases import SITE, by_hand, everywhere, vector

from mechattr.errors import ModelStateError
from mechattr.models import Batch, HookedHF
from mechattr.models.edits import Edit
from mechattr.models.operators import Add
from mechattr.sites import full_name
from mechattr.steering import SteeringVector

TALK = {"prompt": None, "given": (), "mask": None, "inside": False}


class Forgetful(dict):
    """Holds nothing."""

    def __setitem__(self, _key: Any, _value: Any) -> None:
        pass


def together(works: list[Callable[[], Any]], times: int = 6) -> list[list[Any]]:
    """What each piece of work gives in a thread of its own, while the others go on."""
    found: list[list[Any]] = [[] for _ in works]
    begin = threading.Barrier(len(works))

    def repeat(which: int) -> None:
        begin.wait()
        for _ in range(times):
            found[which].append(works[which]())

    threads = [threading.Thread(target=repeat, args=(which,)) for which in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def fitted(model: Any, side: str = "left") -> Batch:
    rows = families.ragged(side)
    return Batch.of(rows.tokens % model.info.d_vocab, rows.mask)


def test_two_threads_steer_two_models() -> None:
    def hooked(model: Any, seed: int) -> Callable[[], torch.Tensor]:
        def work() -> torch.Tensor:
            with vector(model, seed).apply(model, positions="last"):
                return model.run(fitted(model)).logits

        return work

    def bare(model: Any, seed: int) -> Callable[[], torch.Tensor]:
        def work() -> torch.Tensor:
            batch = fitted(model)
            with vector(model, seed).apply(model.model, 1.5):
                settings = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 2}
                return model.model.generate(batch.tokens, attention_mask=batch.mask.long(), **settings)

        return work

    one, two = families.hooked("gpt2"), families.hooked("llama")
    works = [hooked(one, 0), hooked(two, 1), hooked(plain("gpt2_like"), 2), bare(families.hooked("qwen3"), 3)]
    expected = [work() for work in works]
    clean = one.run(fitted(one)).logits
    for which, found in enumerate(together(works)):
        assert all(torch.equal(x, expected[which]) for x in found)
    assert not torch.equal(expected[0], clean) and torch.equal(one.run(fitted(one)).logits, clean)


def test_two_threads_begin_blocks_around_one_bare_model() -> None:
    """Neither of the checks at load meets what the other block changes; while both blocks are open, both act."""
    bare, batch = families.model("gpt2"), families.ragged("right")
    v, inside = vector(families.hooked("gpt2")), threading.Barrier(2, timeout=20)

    def work() -> torch.Tensor:
        with v.apply(bare), torch.no_grad():
            inside.wait()
            found = bare(batch.tokens, attention_mask=batch.mask.long()).logits
            inside.wait()
        return found

    with torch.no_grad():
        clean = bare(batch.tokens, attention_mask=batch.mask.long()).logits
        one, two = together([work, work], times=1)
        assert torch.equal(one[0], two[0]) and not torch.equal(one[0], clean)
        with v.apply(bare, 2.0):
            twice = bare(batch.tokens, attention_mask=batch.mask.long()).logits
        torch.testing.assert_close(one[0], twice, rtol=0, atol=1e-4)  # float32 sums
        assert torch.equal(bare(batch.tokens, attention_mask=batch.mask.long()).logits, clean)


def test_threads_of_one_bare_model_take_turns() -> None:
    """Each thread has a prompt of its own: position 5 is a prompt's in one and generated in the other, and loops with a
    cache go on where they were."""
    model, steps = families.hooked("llama"), 4
    bare, v = model.model, everywhere(model)
    rows = [families.tokens(2, 4, seed=3), families.tokens(3, 7, seed=4), families.tokens(1, 3, seed=5)]
    settings = {"max_new_tokens": steps, "min_new_tokens": steps, "do_sample": False, "pad_token_id": 2}

    def generating(tokens: torch.Tensor) -> Callable[[], torch.Tensor]:
        mask = torch.ones_like(tokens)
        return lambda: bare.generate(tokens, attention_mask=mask, **settings)[:, -steps:]

    def looping() -> torch.Tensor:
        tokens, cache, said = rows[2], None, []
        with torch.no_grad():
            for _ in range(steps):
                out = bare(tokens, past_key_values=cache, use_cache=True)
                tokens, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
                said.append(tokens)
        return torch.cat(said, 1)

    works = [generating(rows[0]), generating(rows[1]), looping]
    with v.apply(bare, positions=[2, 5]):
        found = together(works)
    for which, tokens in enumerate(rows):
        expected = by_hand(model, Batch.of(tokens), v, [2, 5], steps, [1.0] * len(tokens))
        assert all(torch.equal(x, expected) for x in found[which])
        assert not torch.equal(works[which](), expected)  # control: nothing steered


@pytest.mark.parametrize("shared", [False, True])
def test_a_prompt_belongs_to_its_thread(shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """`shared` is the control: one prompt for all threads, so that the other thread's decides what is generated."""
    if shared:
        monkeypatch.setattr(
            "mechattr.models.attached._Talk", lambda: SimpleNamespace(**TALK, planned={}, told=Forgetful())
        )
    model = families.hooked("llama")
    bare, v, rows = model.model, everywhere(model), families.tokens(1, 3)
    said: list[torch.Tensor] = []
    with v.apply(bare, positions="generated"), torch.no_grad():
        tokens, cache = rows, None
        for _ in range(4):
            out = bare(tokens, past_key_values=cache, use_cache=True)
            tokens, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
            said.append(tokens)
            other = threading.Thread(target=bare, args=(families.tokens(1, 7),))
            other.start()
            other.join()
    expected = by_hand(model, Batch.of(rows), v, "generated", 4, [1.0])
    assert torch.equal(torch.cat(said, 1), expected) is not shared


def test_blocks_end_in_any_order() -> None:
    for site in (SITE, full_name("v", 1)):  # the second is inside attention
        model = HookedHF(families.model("gpt2"), name="gpt2")
        bare, batch = model.model, families.ragged("right")
        before = {name: dict(module.__dict__) for name, module in bare.named_modules()}

        def logits(bare: Any = bare, batch: Batch = batch) -> torch.Tensor:
            with torch.no_grad():
                return bare(batch.tokens, attention_mask=batch.mask.long()).logits[batch.mask]

        shape = (model.info.d_model,) if site == SITE else (model.info.n_kv_heads, model.info.d_head)
        one, two = (SteeringVector.of({site: torch.randn(shape)}) for _ in range(2))
        edits = [Edit(site, Add(x.tensors[site].values)) for x in (one, two)]
        expected = [model.run(batch, edits=part).logits[batch.mask] for part in ([], edits, edits[1:])]
        first, second = ExitStack(), ExitStack()
        first.enter_context(one.apply(bare))
        second.enter_context(two.apply(bare))
        torch.testing.assert_close(logits(), expected[1], rtol=0, atol=1e-4)  # float32 sums
        first.close()
        torch.testing.assert_close(logits(), expected[2], rtol=0, atol=1e-4)
        with pytest.raises(AssertionError):  # control: the block that ended
            torch.testing.assert_close(logits(), expected[1], rtol=0, atol=1e-4)
        second.close()
        assert torch.equal(logits(), expected[0])
        after = {name: dict(module.__dict__) for name, module in bare.named_modules()}
        assert all(before[name].keys() == after[name].keys() for name in before)


def test_a_bare_model_that_is_steered_is_not_hooked_as_another() -> None:
    model = families.hooked("gpt2")
    v, batch = vector(model), families.ragged("right")
    own, clean = model.fingerprint(), model.run(batch).logits
    with v.apply(model.model, 2.0):
        assert not torch.equal(model.run(batch).logits, clean)
        inside = model.fingerprint()
        text = "a hooked GPT2LMHeadModel\n  found: it is being steered, inside a block around the transformers model"
        with pytest.raises(ModelStateError, match=text):
            HookedHF(model.model)
    with v.apply(model, 2.0):
        assert model.fingerprint() == inside != own
    assert model.fingerprint() == own and torch.equal(model.run(batch).logits, clean)


def test_numbers_of_positions_leave_shorter_rows_alone() -> None:
    """In a run, a generation and a call of a bare model alike; also where they count from the prompt's end."""
    for model in (plain("gpt2_like"), families.hooked("llama")):
        batch, v = fitted(model), vector(model)  # 7, 4 and 5 tokens
        values = v.tensors[SITE].values
        expected = model.run(batch, edits=[Edit(SITE, Add(values), positions=[4], rows=[0, 2])]).logits[batch.mask]
        with v.apply(model, positions=[4, 8]):
            torch.testing.assert_close(model.run(batch).logits[batch.mask], expected, rtol=0, atol=1e-4)  # float32
            tokens = model.generate(batch, max_new_tokens=6).tokens[:, -6:]
        assert torch.equal(tokens, by_hand(model, batch, v, [4, 8], 6, [1.0] * 3))
        with pytest.raises(AssertionError):  # control: another position
            changed = model.run(batch, edits=[Edit(SITE, Add(values), positions=[3])]).logits[batch.mask]
            torch.testing.assert_close(changed, expected, rtol=0, atol=1e-4)
        if isinstance(model, HookedHF):
            given = {"attention_mask": batch.mask.long(), "position_ids": batch.positions.clamp(min=0)}
            with v.apply(model.model, positions=[4, 8]), torch.no_grad():
                found = model.model(batch.tokens, **given).logits[batch.mask]
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
        expected = model.run(batch, edits=[Edit(SITE, Add(values), positions=[-5], rows=[0, 2])]).logits[batch.mask]
        with v.apply(model, positions=[-5]):
            torch.testing.assert_close(model.run(batch).logits[batch.mask], expected, rtol=0, atol=1e-4)
