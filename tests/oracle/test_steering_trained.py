"""Trained steering: gradients against finite differences of losses by hand, planted directions, what a swap does."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from letters_model import Letters
from torch import Tensor

import mechattr as ma
from mechattr.errors import MismatchError, SettingError, UnknownNameError, UnsupportedFeatureError
from mechattr.models import Batch
from mechattr.models.edits import Edit
from mechattr.models.plain import plain_model
from mechattr.models.plain_config import PlainConfig
from mechattr.sites import Node, full_name
from mechattr.steering import ReFT, learned, propensity, reft
from mechattr.steering.learned import shifted
from mechattr.steering.lesson import LOSSES, Lesson, Trainee
from mechattr.steering.reft import turned

BOS = 11
TRIPLES = [("abc", "de", "f"), ("hgfed", "c", "aab"), ("b", "gh", "hg")]
SITES = [full_name("resid_post", 0), full_name("z", 1), full_name("resid_post", 1)]
CLOSE: dict[str, Any] = {"rtol": 1e-6, "atol": 1e-8}  # central differences in float64
POSITIONS = ["all", "prompt", "generated", "last", [1, -1]]


@pytest.fixture(scope="module")
def model() -> Any:
    """A network in which everything has an influence."""
    config = PlainConfig.gpt2_like(d_model=16, d_vocab=12, n_ctx=16)
    made = plain_model(config, tokenizer=Letters())
    weights = {n: x if "ln" in n or n == "embed.W_E" else 0.3 * x for n, x in made._weights.items()}
    return type(made)(config, weights, tokenizer=Letters())


def lesson(model: Any, loss: str, positions: Any = "all", sites: list[str] = SITES) -> Lesson:
    return Lesson(model, TRIPLES, sites, positions=positions, loss=loss, beta=0.3, batch_size=32)


def ids(text: str) -> list[int]:
    return [BOS, *(ord(c) - 97 for c in text)]


def acted(positions: Any, start: int, n: int) -> list[int]:
    """Where steering acts in n tokens, of which the answer's first is `start`."""
    if not isinstance(positions, str):
        return [p if p >= 0 else start + p for p in positions]
    first, end = {"all": (0, n), "prompt": (0, start), "generated": (start, n), "last": (start - 1, start)}[positions]
    return [*range(first, end)]


def by_hand(model: Any, loss: str, positions: Any, ops: Any) -> Tensor:
    """The mean loss, one text at a time and token by token; `ops(factor)` is what is done at each site."""

    def log_p(prompt: str, answer: str, factor: float | None) -> Tensor:
        tokens, start = ids(prompt + answer), 1 + len(prompt)
        at = acted(positions, start, len(tokens))
        edits = [] if factor is None else [Edit(site, op, positions=at) for site, op in ops(factor).items()]
        table = model.run(Batch.of(torch.tensor([tokens])), edits=edits).logits[0].log_softmax(-1)
        return sum((table[t - 1, tokens[t]] for t in range(start, len(tokens))), torch.zeros(()))

    total = torch.zeros((), dtype=torch.float64)
    for prompt, better, worse in TRIPLES:
        if loss == "cross_entropy":
            total = total - log_p(prompt, better, 1.0)
            continue
        signs = (1.0, -1.0) if loss == "bidirectional" else (1.0,)
        for d in signs:
            gains = [log_p(prompt, y, d) - log_p(prompt, y, None) for y in (better, worse)]
            total = total - torch.log(torch.sigmoid(d * 0.3 * (gains[0] - gains[1]))) / len(signs)
    return total / len(TRIPLES)


def drawn(*shapes: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def slope(value: Any, parameters: list[Tensor], ways: list[Tensor], h: float = 1e-5) -> Tensor:
    """The derivative along a way, by central differences."""
    up, down = (value([p + s * h * w for p, w in zip(parameters, ways, strict=True)]) for s in (1, -1))
    return (up - down) / (2 * h)


def along(gradients: dict[str, list[Tensor]], ways: list[Tensor]) -> Tensor:
    flat = [g for found in gradients.values() for g in found]
    return sum(((g * w).sum() for g, w in zip(flat, ways, strict=True)), torch.zeros(()))


@pytest.mark.parametrize("positions", POSITIONS, ids=str)
@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_of_vectors_are_finite_differences_of_the_loss(model: Any, loss: str, positions: Any) -> None:
    shapes = [(16,), (model.info.n_heads, model.info.d_head), (16,)]
    vectors, ways = drawn(*shapes), drawn(*shapes, seed=1)

    def value(given: list[Tensor]) -> Tensor:
        return by_hand(
            model, loss, positions, lambda d: {s: partial(plus, d * v) for s, v in zip(SITES, given, strict=True)}
        )

    taught = lesson(model, loss, positions)
    trainee = Trainee(shifted, {s: [v] for s, v in zip(SITES, vectors, strict=True)}, {}, reads=False)
    losses, gradients = taught.measure(trainee, range(3))
    torch.testing.assert_close(losses.mean(), value(vectors), **CLOSE)
    expected = slope(value, vectors, ways)
    torch.testing.assert_close(along(gradients, ways), expected, **CLOSE)
    parts = [taught.measure(trainee, [i])[1] for i in range(3)]  # rows do not mix
    for name, (whole,) in gradients.items():
        torch.testing.assert_close(sum(part[name][0] for part in parts) / 3, whole, **CLOSE)
    other = lesson(model, loss, "last" if positions != "last" else "all")  # the control: other positions
    assert not torch.allclose(along(other.measure(trainee, range(3))[1], ways), expected, rtol=1e-3, atol=1e-4)


def plus(v: Tensor, x: Tensor, _place: Any) -> Tensor:
    return x + v


def test_gradients_are_those_behind_an_edit_that_takes_something_away(model: Any) -> None:
    (u,) = drawn((16,), seed=5)
    u = u / u.norm()
    vectors, ways = drawn((16,)), drawn((16,), seed=1)

    def ablated(x: Tensor, factors: Tensor, v: Tensor) -> Tensor:
        return x - (x @ u)[..., None] * u + factors * v

    def value(given: list[Tensor]) -> Tensor:
        return by_hand(
            model, "preference", "all", lambda d: {SITES[0]: lambda x, _: ablated(x, torch.tensor(d), given[0])}
        )

    trainee = Trainee(ablated, {SITES[0]: vectors}, {}, reads=True)
    _, gradients = lesson(model, "preference", sites=SITES[:1]).measure(trainee, range(3))
    expected = slope(value, vectors, ways)
    torch.testing.assert_close(along(gradients, ways), expected, **CLOSE)
    (g,) = gradients[SITES[0]]
    before = {SITES[0]: [g - (g @ u) * u]}  # the control: the gradient before the edit has nothing along u
    assert not torch.allclose(along(before, ways), expected, rtol=1e-3, atol=1e-4)


def gram_schmidt(a: Tensor) -> Tensor:
    """Rows from columns, one after the other."""
    rows: list[Tensor] = []
    for column in a.T:
        rest = column - sum(((column @ row) * row for row in rows), torch.zeros_like(column))
        rows.append(rest / rest.norm())
    return torch.stack(rows)


def low_rank(a: Tensor, w: Tensor, b: Tensor, d: float, x: Tensor, _place: Any) -> Tensor:
    r = gram_schmidt(a)
    return x + d * torch.einsum("rd,bpr->bpd", r, torch.einsum("rd,bpd->bpr", w - r, x) + b)


@pytest.mark.parametrize(
    ("loss", "positions"), [("cross_entropy", "all"), ("bidirectional", "last"), ("preference", [0, 2])]
)
def test_gradients_of_low_rank_changes_are_exact_in_several_layers(model: Any, loss: str, positions: Any) -> None:
    sites = [SITES[0], SITES[2]]
    shapes = 2 * [(16, 3), (3, 16), (3,)]
    parameters, ways = drawn(*shapes, seed=2), drawn(*shapes, seed=3)

    def value(given: list[Tensor]) -> Tensor:
        return by_hand(
            model,
            loss,
            positions,
            lambda d: {s: partial(low_rank, *given[3 * i : 3 * i + 3], d) for i, s in enumerate(sites)},
        )

    taught = lesson(model, loss, positions, sites)
    table = {s: parameters[3 * i : 3 * i + 3] for i, s in enumerate(sites)}
    losses, gradients = taught.measure(Trainee(turned, table, {}, reads=True), range(3))
    torch.testing.assert_close(losses.mean(), value(parameters), **CLOSE)
    expected = slope(value, parameters, ways)
    torch.testing.assert_close(along(gradients, ways), expected, **CLOSE)
    # controls: without the states; and each layer as if the other one were not steered
    blind = taught.measure(Trainee(turned, table, {}, reads=False), range(3))[1]
    alone = {
        s: lesson(model, loss, positions, [s]).measure(Trainee(turned, {s: table[s]}, {}, reads=True), range(3))[1][s]
        for s in sites
    }
    for wrong in (blind, alone):
        assert not torch.allclose(along(wrong, ways), expected, rtol=1e-3, atol=1e-4)


def driven() -> tuple[Any, Tensor]:
    """A network whose answers depend on one direction of the last state: `i` rises with it, and `j` falls."""
    config = PlainConfig.attention_only(n_layers=1, n_heads=1, n_kv_heads=1, d_model=32, d_head=4, d_vocab=12, n_ctx=12)
    made = plain_model(config, tokenizer=Letters())
    w = {name: torch.zeros_like(x) if "attn" in name or "pos" in name else x for name, x in made._weights.items()}
    direction = torch.nn.functional.normalize(drawn((32,), seed=4)[0], dim=0)
    w["unembed.W_U"] = torch.zeros_like(w["unembed.W_U"])
    w["unembed.W_U"][:, 8], w["unembed.W_U"][:, 9] = direction, -direction
    return type(made)(config, w, tokenizer=Letters()), direction


LETTERS = [("abc", "i", "j"), ("de", "i", "j"), ("hgfe", "i", "j")]


@pytest.mark.parametrize("loss", LOSSES)
def test_the_direction_that_answers_depend_on_is_learned(loss: str) -> None:
    net, direction = driven()
    v = learned(net, LETTERS, layers=[0], loss=loss, progress=False)
    found = v.directions[0].double()
    assert float(torch.nn.functional.cosine_similarity(found, direction, dim=0)) > 0.99
    changed = reft(net, LETTERS, layers=[0], rank=1, loss=loss, progress=False)
    for answer in (v, changed):
        assert answer.settings["losses"][0] == pytest.approx(answer.settings["base_loss"], abs=1e-12)  # float64
        assert answer.settings["loss_after"] < min(answer.settings["losses"]) < answer.settings["base_loss"]
        before = propensity(net, LETTERS)
        with answer.apply(net):
            assert bool((propensity(net, LETTERS) > before + 1).all())
    # the control: steps of one size for each number, as the common Adam makes them, lose the direction
    assert float(torch.nn.functional.cosine_similarity(direction.sign(), direction, dim=0)) < 0.9


def test_a_swap_turns_the_vector_around_where_the_loss_goes_both_ways(model: Any) -> None:
    swapped = [(p, b, a) for p, a, b in TRIPLES]
    for loss, turns in (("bidirectional", True), ("preference", False)):  # the control: one way only
        v, w = (
            learned(model, t, layers=[0, 1], loss=loss, steps=8, rate=0.1, progress=False) for t in (TRIPLES, swapped)
        )
        for name, table in v.tensors.items():
            assert float(table.values.norm()) > 0.1
            same = torch.allclose(w.tensors[name].values, -table.values, rtol=1e-5, atol=1e-6)  # float32 results
            assert same == turns


def test_vectors_stay_within_their_length_and_at_their_nodes(model: Any) -> None:
    nodes = [Node("z", 0, head=2), Node("resid_post", 1)]
    v = learned(model, TRIPLES, sites=nodes, steps=5, rate=1.0, max_norm=0.5, progress=False)
    assert [bool(x.any()) for x in v.tensors["blocks.0.attn.hook_z"].values] == [False, False, True, False]
    assert all(norm == pytest.approx(0.5, abs=1e-6) for norm in v.norms().values())  # float32 results
    free = learned(model, TRIPLES, sites=nodes, steps=5, rate=1.0, progress=False)
    assert all(norm > 0.5 for norm in free.norms().values())  # the control: without a limit
    assert v.settings["lengths"] == free.settings["lengths"]
    assert free.settings["passes"] == {"forward": 3 * (2 + 5 * 4 + 4), "backward": 3 * 5 * 4}


def test_minibatches_are_drawn_by_the_seed_and_batches_do_not_matter(model: Any) -> None:
    how: dict[str, Any] = {"layers": [0], "steps": 4, "rate": 0.1, "progress": False}
    for build in (learned, reft):

        def values(build: Any = build, **more: Any) -> Tensor:
            return torch.cat([t.values.flatten() for t in build(model, TRIPLES, **how, **more).tensors.values()])

        whole = values()
        assert torch.equal(whole, values())
        torch.testing.assert_close(values(batch_size=2), whole, rtol=1e-5, atol=1e-6)  # float32 results
        some = values(minibatch=1)
        assert torch.equal(some, values(minibatch=1))
        assert not torch.allclose(some, whole, atol=1e-3)  # the control: other triples in each step


def test_reft_is_its_formula_and_its_rows_stay_orthonormal(model: Any, tmp_path: Path) -> None:
    found = reft(model, TRIPLES, layers=[0, 1], rank=3, steps=5, rate=0.1, progress=False)
    for side in ("left", "right"):
        batch = model.tokenize(["abcde", "fg"], padding_side=side)
        for site in found.sites:
            r, w, b = (x.double() for x in found.parts(site))
            torch.testing.assert_close(r @ r.T, torch.eye(3).double(), rtol=0, atol=1e-6)  # stored in float32
            one = ReFT({n: t for n, t in found.tensors.items() if n.startswith(site)}, settings=found.settings)
            x = model.run(batch, record=site).activations[site].values
            with one.apply(model, multiplier=[2.0, -0.5], positions=[-1]):
                y = model.run(batch, record=site).activations[site].values
            expected = x.clone()
            for row, factor in enumerate((2.0, -0.5)):
                at = int(batch.columns(-1)[row])
                expected[row, at] += factor * (r.T @ (w @ x[row, at] + b - r @ x[row, at]))
            torch.testing.assert_close(y, expected, rtol=0, atol=1e-10)  # float64
            wrong = x + 2 * ((x @ w.T + b) @ r)  # the control: without taking R x away
            assert not torch.allclose(y[0], wrong[0], atol=1e-2)
    clean = model.run(batch).logits
    with found.apply(model, multiplier=0.0):
        assert torch.equal(model.run(batch).logits, clean)
    found.save(tmp_path / "reft")
    again = ma.open(tmp_path / "reft")
    assert isinstance(again, ReFT) and again.settings == found.settings and again.sites == found.sites
    with found.apply(model):
        steered = model.run(batch).logits
        assert "standing_hash" in model.fingerprint()
    with again.apply(model):
        assert torch.equal(model.run(batch).logits, steered) and not torch.equal(steered, clean)
    assert again.provenance["weight_hash"] == model.fingerprint()["weight_hash"]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_generations_are_steered_as_runs_are(family: str) -> None:
    net = families.hooked(family)
    tokens = families.tokenizer()
    net = type(net)(net.model, tokens)
    triples = [("a b a", " b", " a a"), ("b", " a b", " b")]
    found = reft(net, triples, layers=[0, net.info.n_layers - 1], rank=2, steps=3, rate=0.2, progress=False)
    texts = ["a b a b a", "b"]
    results = []
    for side in ("left", "right"):
        batch = net.tokenize(texts, padding_side=side)
        with found.apply(net, multiplier=3.0):
            if side == "left":
                made = net.generate(batch, max_new_tokens=3, do_sample=False)
                new = made.tokens[:, made.prompt_columns :]
                rows = [ids for ids in net.tokenize(texts).tokens]
                for row, ids in enumerate(rows):  # the manual loop, without a cache
                    ids = ids[net.tokenize(texts).mask[row]]
                    for step in range(3):
                        token = net.run(Batch.of(ids)).logits[0, -1].argmax()
                        assert int(token) == int(new[row, step])
                        ids = torch.cat([ids, token[None]])
            results.append(net.run(batch).logits[batch.mask])
        with found.apply(net.model, multiplier=3.0) as bare:  # the transformers model itself
            raw = bare(batch.tokens, attention_mask=batch.mask.long()).logits[batch.mask].detach()
        if side == "right":
            torch.testing.assert_close(raw, results[-1], rtol=1e-4, atol=1e-4)  # float32
            clean = net.run(batch).logits[batch.mask]
            assert not torch.allclose(clean, raw, atol=1e-2)  # the control: not steered
            with found.apply(net, multiplier=3.0, gate=[True, False]):
                gated = net.run(batch).logits[batch.mask]
            closed = batch.example[:, None].expand(batch.mask.shape)[batch.mask] == 1
            assert torch.equal(gated[closed], clean[closed]) and torch.equal(gated[~closed], results[-1][~closed])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)  # float32, other columns


def test_what_does_not_fit_is_refused(model: Any) -> None:
    cases: list[tuple[type[Exception], dict[str, Any], str]] = [
        (SettingError, {"positions": "lats"}, "did you mean 'last'"),
        (SettingError, {"positions": [1.5]}, r"positions=\[1.5\]\n  found: no place in a text"),
        (SettingError, {"positions": [30]}, "no token there comes before one of an answer"),
        (SettingError, {"steps": 0}, "steps=0\n  found: not a count"),
        (SettingError, {"minibatch": 0}, "minibatch=0\n  found: not a count"),
        (SettingError, {"batch_size": 0}, "batch_size=0\n  found: not a count"),
        (SettingError, {"rate": -1}, "rate=-1\n  found: no positive number"),
        (SettingError, {"beta": float("nan")}, "beta=nan\n  found: no positive number"),
        (UnknownNameError, {"loss": "preferences"}, "did you mean 'preference'"),
        (SettingError, {"layers": [9]}, r"layers=\[9\]"),
    ]
    for build in (learned, reft):
        for kind, settings, text in cases:
            with pytest.raises(kind, match=text):
                build(model, TRIPLES, **{"layers": [0], **settings})  # type: ignore[operator]
        with pytest.raises(SettingError, match="triples\n  found: none"):
            build(model, [], layers=[0])  # type: ignore[operator]
        with pytest.raises(UnsupportedFeatureError, match="has an encoder"):
            build(families.hooked("bert"), TRIPLES, layers=[0])  # type: ignore[operator]
        with pytest.raises(SettingError, match="positions='generated'\n  found: no token there comes before"):
            build(model, [("ab", "c", "d")], layers=[0], positions="generated")  # type: ignore[operator]
    with pytest.raises(SettingError, match="max_norm=0\n  found: no positive number"):
        learned(model, TRIPLES, layers=[0], max_norm=0)
    with pytest.raises(SettingError, match="rank=17\n  found: states of 16 numbers"):
        reft(model, TRIPLES, layers=[0], rank=17)
    with pytest.raises(SettingError, match="steering at L0H1 z\n  found: a function of the whole state"):
        reft(model, TRIPLES, sites=[Node("z", 0, head=1)])
    found = reft(model, TRIPLES, layers=[1], rank=1, steps=1, progress=False)
    other = families.hooked("gpt2")
    with pytest.raises(MismatchError, match=r"reft at blocks\.1\.hook_resid_post, of width 16"), found.apply(other):
        pass
    with pytest.raises(SettingError, match="reft at 'resid_post'"):
        found.parts("resid_post")
    small, _ = driven()
    with pytest.raises(MismatchError, match="has no such site"), found.apply(small):
        pass
