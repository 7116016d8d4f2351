"""Steering where it should be and nowhere else: against runs with edits, loops by hand, and formulas."""

from __future__ import annotations

from typing import Any

import families
import pytest
import torch
from patching_cases import plain
from steering_cases import SITE, vector

import mechattr as ma
from mechattr.errors import MismatchError, NonFiniteError, SettingError
from mechattr.models import Batch, HookedHF
from mechattr.models.edits import Edit
from mechattr.models.operators import Add
from mechattr.sites import full_name
from mechattr.steering import OPERATORS, SteeringVector
from mechattr.steering.operators import ablate, angular, clamp, norm_preserving


def test_blocks_around_a_model_of_the_user_nest() -> None:
    model, other = families.hooked("llama"), families.hooked("gpt2")
    batch, torch_model = families.ragged("left"), model.model
    given = {"input_ids": batch.tokens, "attention_mask": batch.mask.long(), "position_ids": batch.positions}
    one, two = vector(model), vector(model, seed=1)

    def logits() -> torch.Tensor:
        with torch.no_grad():
            return torch_model(**given).logits[batch.mask]

    clean = logits()
    with one.apply(torch_model):
        first = logits()
        with two.apply(torch_model, 2.0), vector(other).apply(other.model):
            both = logits()
        assert torch.equal(logits(), first)
        with one.apply(torch_model, -1.0):
            torch.testing.assert_close(logits(), clean, rtol=0, atol=1e-4)  # float32 sums
    assert torch.equal(logits(), clean)
    edits = [Edit(SITE, Add(one.tensors[SITE].values)), Edit(SITE, Add(2 * two.tensors[SITE].values))]
    expected = model.run(batch, edits=edits).logits[batch.mask]
    torch.testing.assert_close(both, expected, rtol=0, atol=1e-4)  # float32 sums
    with pytest.raises(AssertionError):  # control: one of both
        torch.testing.assert_close(first, expected, rtol=0, atol=1e-4)
    twice = model.run(batch, edits=[edits[0], edits[0]]).logits[batch.mask]
    with one.apply(torch_model, 2.0):  # what an earlier block attached is gone
        torch.testing.assert_close(logits(), twice, rtol=0, atol=1e-4)


def test_a_model_of_the_user_is_checked_again_only_when_it_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
    torch_model, batch = families.model("llama"), families.ragged("left")
    vector = SteeringVector.of({"blocks.1.hook_resid_post": torch.randn(torch_model.config.hidden_size)})
    checks: list[Any] = []
    monkeypatch.setattr("mechattr.models.hf.selfcheck", checks.append)

    def steered() -> int:
        with vector.apply(torch_model, 2.0), torch.no_grad():
            torch_model(batch.tokens)
        return len(checks)

    assert [steered(), steered()] == [1, 1]
    torch_model.double()
    assert [steered(), steered()] == [2, 2]
    handle = torch_model.model.layers[0].register_forward_hook(lambda *_: None)
    assert steered() == 3
    handle.remove()
    own = torch_model.model.layers[1].mlp.forward
    torch_model.model.layers[1].mlp.forward = lambda x: own(x)
    assert steered() == 4
    HookedHF(torch_model)
    assert len(checks) == 5  # the control: a model that is loaded is checked each time


def test_a_run_is_steered_as_by_an_edit_and_nothing_stays() -> None:
    for model in (plain("gpt2_like"), families.hooked("llama")):
        batch = Batch.of(families.ragged().tokens % model.info.d_vocab, families.ragged().mask)
        v = vector(model)
        clean = model.run(batch).logits
        edited = model.run(batch, edits=[Edit(SITE, Add(2 * v.tensors[SITE].values))]).logits
        fingerprint = model.fingerprint()
        with v.apply(model, 2.0):
            torch.testing.assert_close(model.run(batch).logits, edited, rtol=0, atol=1e-4)  # float32 sums
            assert model.fingerprint() != fingerprint
            with v.apply(model, -2.0):
                torch.testing.assert_close(model.run(batch).logits, clean, rtol=0, atol=1e-3)
        with pytest.raises(RuntimeError, match="mine"), v.apply(model):
            raise RuntimeError("mine")
        assert torch.equal(model.run(batch).logits, clean) and model.fingerprint() == fingerprint
        with v.apply(model, 0.0):
            assert torch.equal(model.run(batch).logits, clean)  # bit for bit


def test_rows_have_multipliers_of_their_own_and_masks_say_where() -> None:
    model = plain("gpt2_like")
    batch = Batch.of(families.ragged("left").tokens % model.info.d_vocab, families.ragged("left").mask)
    v = vector(model)
    with v.apply(model, [0.0, 1.0, -2.0]):
        together = model.run(batch).logits
    for row, factor in enumerate((0.0, 1.0, -2.0)):
        with v.apply(model, factor):
            torch.testing.assert_close(together[row], model.run(batch).logits[row], rtol=0, atol=1e-12)
    mask = torch.zeros_like(batch.mask)
    mask[0, 3] = mask[2, -1] = mask[1, 0] = True  # the last is padding
    with v.apply(model, positions=mask):
        found = model.run(batch).logits
    expected = model.run(
        batch,
        edits=[
            Edit(SITE, Add(v.tensors[SITE].values), positions=[int(batch.positions[0, 3])], rows=[0]),
            Edit(SITE, Add(v.tensors[SITE].values), positions=[-1], rows=[2]),
        ],
    ).logits
    torch.testing.assert_close(found[batch.mask], expected[batch.mask], rtol=0, atol=1e-12)  # float64
    with v.apply(model, [1.0, 2.0]), pytest.raises(SettingError, match="2 multipliers\n  found: a batch of 3 rows"):
        model.run(batch)
    with v.apply(model, positions=mask[:, :2]), pytest.raises(SettingError, match="a mask of positions of shape"):
        model.run(batch)


def test_results_made_while_steering_say_how() -> None:
    model = plain("gpt2_like")
    v, masks = vector(model), [torch.zeros(20, 60, dtype=torch.bool) for _ in range(2)]
    masks[1][10, 30] = True  # in the middle, which a tensor's text leaves out
    seen = []
    for positions in (*masks, masks[1].clone(), "all", "last"):
        with v.apply(model, positions=positions):
            seen.append(model.fingerprint()["standing_hash"])
    assert seen[1] == seen[2] and len(set(seen)) == 4


def test_heads_are_steered_one_by_one() -> None:
    model = plain("gpt2_like")
    batch = Batch.of(families.tokens() % model.info.d_vocab)
    site = full_name("z", 0)
    tensor = torch.zeros(model.info.n_heads, model.info.d_head)
    tensor[1] = 3.0
    with SteeringVector.of({site: tensor}).apply(model, operator="ablate_then_add"):
        found = model.run(batch, record=site)
    clean = model.run(batch, record=site).activations[site].values
    x, u = clean[:, :, 1], torch.full((model.info.d_head,), model.info.d_head**-0.5, dtype=torch.float64)
    expected = clean.clone()
    expected[:, :, 1] = x - (x @ u)[..., None] * u + 3.0
    torch.testing.assert_close(found.activations[site].values, expected, rtol=0, atol=1e-12)  # float64


@pytest.mark.parametrize("backend", ["nnsight", "transformer_lens"])
def test_other_backends_are_steered_alike(backend: str) -> None:
    model, other = ma.load("tiny"), ma.load("tiny", backend=backend)
    batch = model.tokenize(["They say that the cow", "At night the old farmer"], padding_side="left")
    v = vector(model)
    found = []
    for one in (model, other):
        with v.apply(one, [2.0, -1.0], positions="last"):
            found.append((one.run(batch).logits, one.generate(batch, max_new_tokens=3, do_sample=False).texts))
    torch.testing.assert_close(found[0][0][batch.mask], found[1][0][batch.mask], rtol=0, atol=1e-4)  # float32 sums
    assert found[0][1] == found[1][1]
    clean = other.run(batch).logits[batch.mask]  # the control: nothing steered
    assert float((clean - found[1][0][batch.mask]).abs().max()) > 1


def test_overflow_names_site_and_multiplier() -> None:
    v = vector(families.hooked("gpt2"))
    batch = families.ragged("left")
    text = (
        r"steering at blocks.1.hook_resid_post\n  found: NaN or infinity in torch.float32, with the multiplier 1e\+39"
    )
    for model in (families.hooked("gpt2"), families.hooked("gpt2").model):
        with pytest.raises(NonFiniteError, match=text), v.apply(model, 1e39) as steered:
            run = steered.run if hasattr(steered, "run") else lambda b: steered(b.tokens, attention_mask=b.mask.long())
            run(batch)
        clean = families.hooked("gpt2").run(batch).logits  # nothing stays
        assert bool(clean[batch.mask].isfinite().all())
    with (
        pytest.raises(NonFiniteError, match="with the multiplier 1, 1e"),
        v.apply(families.hooked("gpt2"), [1, 1e39, 1]),
    ):
        families.hooked("gpt2").generate(batch, max_new_tokens=2)


def test_operators_are_their_formulas() -> None:
    generator = torch.Generator().manual_seed(0)
    x, v = torch.randn(2, 5, 7, generator=generator, dtype=torch.float64), torch.randn(7, generator=generator).double()
    m = torch.tensor([0.5, -2.0], dtype=torch.float64).reshape(2, 1, 1)
    close = {"rtol": 0, "atol": 1e-12}  # float64
    torch.testing.assert_close(norm_preserving(x, v, m).norm(dim=-1), x.norm(dim=-1), **close)
    gone = ablate(x, v, m)
    torch.testing.assert_close(gone @ v, torch.zeros(2, 5, dtype=torch.float64), **close)
    torch.testing.assert_close(ablate(gone, v, m), gone, **close)
    wanted = (m[..., 0] * v.norm()).expand(2, 5)
    torch.testing.assert_close(clamp(x, v, m) @ (v / v.norm()), wanted, **close)
    turned = angular(x, v, torch.ones_like(m))
    torch.testing.assert_close(turned / turned.norm(dim=-1, keepdim=True), (v / v.norm()).expand_as(x), **close)
    torch.testing.assert_close(angular(x, v, m).norm(dim=-1), x.norm(dim=-1), **close)
    for opposite in (torch.zeros_like(v), -torch.eye(7)[0].double()):  # nothing says where to turn
        assert torch.equal(
            angular(torch.eye(7).double()[:1].expand(2, 1, 7), opposite, m)[0, 0], torch.eye(7).double()[0]
        )
    zero = torch.zeros_like(m)
    for name in ("add", "norm_preserving", "angular"):
        assert torch.equal(OPERATORS[name](x, v, zero), x), name


def test_ablation_is_orthogonal_weights() -> None:
    """Everything that writes along the direction, made orthogonal to it, is ablation at every place of the stream."""
    model = plain("gpt2_like")
    batch = Batch.of(families.tokens() % model.info.d_vocab)
    u = vector(model).tensors[SITE].values.double()
    u = u / u.norm()
    weights = dict(model._weights)
    for name in weights:
        if name.endswith(("W_O", "W_out", "b_O", "b_out", "W_E", "W_pos")):
            weights[name] = weights[name] - (weights[name] @ u)[..., None] * u
    other = type(model)(model.config, weights)
    everywhere = [full_name(s, n) for s in ("resid_pre", "resid_mid", "resid_post") for n in range(model.info.n_layers)]
    with SteeringVector.of(dict.fromkeys(everywhere, u)).apply(model, operator="ablate"):
        torch.testing.assert_close(model.run(batch).logits, other.run(batch).logits, rtol=0, atol=1e-10)  # float64


def test_vectors_are_added_and_compared() -> None:
    model = plain("gpt2_like")
    a, b = vector(model), vector(model, 1)
    values = [v.tensors[SITE].values for v in (a, b, a + b, a - b, -a, 2 * a, a / 4)]
    torch.testing.assert_close(values[2], values[0] + values[1])
    torch.testing.assert_close(values[3], values[0] - values[1])
    assert torch.equal(values[4], -values[0]) and torch.equal(values[5], 2 * values[0])
    assert torch.equal(values[6], values[0] / 4) and a.cosine(-a)[SITE] == pytest.approx(-1)
    assert torch.equal(a.directions[1], values[0]) and a.normalised().norms()[SITE] == pytest.approx(1)
    longer = a.with_norms({SITE: 3.0})
    assert longer.norms()[SITE] == pytest.approx(3) and longer.cosine(a)[SITE] == pytest.approx(1)
    assert (0 * a).with_norms({SITE: 0.0}).norms()[SITE] == 0
    for given, text in (
        ({}, f"the length at {SITE}\n  found: None"), ({SITE: -1.0}, "found: -1.0\n  fix: give a length for each site"),
    ):  # fmt: skip
        with pytest.raises(SettingError, match=text):
            a.with_norms(given)
    with pytest.raises(SettingError, match="no direction there"):
        (0 * a).with_norms({SITE: 1.0})
    with pytest.raises(MismatchError, match="vectors at the same sites"):
        a + vector(model, site=full_name("resid_post", 0))


def test_what_does_not_fit_is_refused() -> None:
    model = plain("gpt2_like")
    v = vector(model)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"operator": "addd"}, "operator='addd'\n  found: no such operator\n  fix: did you mean 'add'"),
        ({"positions": "promt"}, "did you mean 'prompt'"),
        ({"positions": [1.5]}, r"positions=\[1.5\]\n  found: something else than whole numbers"),
        ({"positions": [True, False]}, "something else than whole numbers"),
        ({"multiplier": float("nan")}, "multiplier=nan"),
        ({"gate": 1}, "gate=1"),
    ]
    for settings, text in cases:
        with pytest.raises(SettingError, match=text), v.apply(model, **settings):
            pass
    with (
        pytest.raises(MismatchError, match=r"a direction of shape \[3\]"),
        SteeringVector.of({SITE: torch.ones(3)}).apply(model),
    ):
        pass
    far = SteeringVector.of({full_name("resid_post", 9): torch.ones(model.info.d_model)})
    with pytest.raises(MismatchError, match="has no such site"), far.apply(model):
        pass
    with pytest.raises(SettingError, match="a model to steer\n  found: a int"), v.apply(3):
        pass
    with pytest.raises(SettingError, match="NaN or infinity"):
        SteeringVector.of({SITE: torch.tensor([1.0, float("nan")])})
