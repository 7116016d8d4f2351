"""GrAInS on networks in which one token drives the preference along one direction, and against slow definitions."""

from __future__ import annotations

import warnings
from typing import Any

import families
import pytest
import torch
from letters_model import BOS, Letters

from mechattr.errors import NonFiniteError, SettingError, UnknownNameError, UnsupportedFeatureError
from mechattr.models import Batch
from mechattr.models.edits import Edit
from mechattr.models.hf import HookedHF
from mechattr.models.operators import Set
from mechattr.models.plain import plain_model
from mechattr.models.plain_config import PlainConfig
from mechattr.sites import Node, full_name
from mechattr.steering import grains, mean_difference, token_scores

CAUSE, YES, NO = 2, 8, 9  # c, i, j
SITE = full_name("resid_post", 0)
TRIPLES = [("".join("abdefgh"[(3 * i + 2 * j) % 7] for j in range(2 + i % 3)) + "c" + "de"[: i % 3], "i", "j")
           for i in range(6)]  # fmt: skip


def driven() -> tuple[Any, torch.Tensor]:
    """A network of one block that looks everywhere alike for the embedding of `c`, and writes a direction where it
    stands; the direction raises `i` and lowers `j`."""
    model = plain_model(
        PlainConfig.attention_only(n_layers=1, n_heads=1, n_kv_heads=1, d_model=32, d_head=4, d_vocab=12, n_ctx=12),
        tokenizer=Letters(),
    )
    w = {name: torch.zeros_like(x) if "attn" in name or "pos" in name else x for name, x in model._weights.items()}
    q, _ = torch.linalg.qr(torch.randn(32, 14, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    direction = q[:, 13]
    w["embed.W_E"] = q[:, :12].T.clone()
    w["blocks.0.attn.W_V"][0, :, 0] = q[:, CAUSE]
    w["blocks.0.attn.W_O"][0, 0] = 6 * direction
    w["unembed.W_U"] = torch.zeros_like(w["unembed.W_U"])
    w["unembed.W_U"][:, YES], w["unembed.W_U"][:, NO] = direction, -direction
    return type(model)(model.config, w, tokenizer=Letters()), direction


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a.double(), b, dim=0))


@pytest.mark.parametrize("settings", [
    {}, {"mode": "pos"}, {"mode": "neg"}, {"ablate": "pad"}, {"ablate": "attn_mask", "mode": "pos"},
    {"reduce": "pca_uncentered"}, {"target": "last_token"}, {"k": 1}
], ids=str)  # fmt: skip
def test_the_token_that_drives_the_preference_and_its_direction_are_found(settings: dict[str, Any]) -> None:
    model, direction = driven()
    scores = token_scores(model, TRIPLES)
    for i, (prompt, *_) in enumerate(TRIPLES):
        for side in ("preferred", "dispreferred"):
            found = scores.of(i, side)
            assert max(range(len(found)), key=lambda t, f=found: f[t][1]) == 1 + prompt.index("c")
    v = grains(model, TRIPLES, layers=[0], **settings)
    assert cosine(v.directions[0], direction) > 0.99
    plain = mean_difference(model, [(p + a, p + b) for p, a, b in TRIPLES], layers=[0])
    assert cosine(plain.directions[0], direction) < 0.9  # the control: no token taken away, so answers differ


def test_before_the_answer_the_direction_is_found_where_the_token_is_not_read_itself() -> None:
    model, direction = driven()
    apart = [triple for triple in TRIPLES if not triple[0].endswith("c")]
    settings: dict[str, Any] = {"layers": [0], "k": 1, "mode": "pos", "positions": "prompt_last"}
    v, mixed = (grains(model, triples, **settings).directions[0] for triples in (apart, TRIPLES))
    assert cosine(v, direction) > 0.99
    assert cosine(mixed, direction) < 0.98  # the control: where c is the last token, its own embedding is taken away


def test_dispreferred_answers_count_against() -> None:
    """The control of the planted token: the sign of the dispreferred sequence forgotten."""
    model, _ = driven()
    scores = token_scores(model, TRIPLES)
    wrong = -scores.values[len(TRIPLES) :]
    cause = scores.batch.tokens[len(TRIPLES) :] == CAUSE
    assert not bool((wrong.argmax(1) == cause.int().argmax(1)).any())


@pytest.mark.parametrize("settings", [{}, {"reduce": "pca_uncentered"}, {"ablate": "pad", "target": "repo"}], ids=str)
def test_swapped_answers_turn_scores_and_vector_around(settings: dict[str, Any]) -> None:
    model, _ = driven()
    swapped = [(p, b, a) for p, a, b in TRIPLES]
    target = settings.get("target", "sequence")
    a, b = token_scores(model, TRIPLES, target=target), token_scores(model, swapped, target=target)
    torch.testing.assert_close(a.values.roll(len(TRIPLES), 0), -b.values, rtol=0, atol=1e-12)  # float64
    v, turned = (grains(model, t, layers=[0], k=2, **settings).directions[0] for t in (TRIPLES, swapped))
    torch.testing.assert_close(turned, -v, rtol=0, atol=1e-6)  # float32 results
    if not settings:  # the control: positive tokens only do not turn around
        halves = [grains(model, t, layers=[0], k=2, mode="pos").directions[0] for t in (TRIPLES, swapped)]
        assert not torch.allclose(halves[0], -halves[1], atol=1e-2)


def small(kind: str = "gpt2_like") -> Any:
    """A network in which everything has an influence."""
    config = getattr(PlainConfig, kind)(d_model=32, d_vocab=12, n_ctx=16)
    model = plain_model(config, tokenizer=Letters())
    weights = {n: x if "ln" in n or n == "embed.W_E" else 0.3 * x for n, x in model._weights.items()}
    return type(model)(config, weights, tokenizer=Letters())


WORDS = [("abc", "de", "f"), ("hgfed", "c", "aa"), ("b", "gh", "hg")]


def log_p(model: Any, ids: list[int], start: int, target: str) -> float:
    """The definition, token by token."""
    table = model.run(Batch.of(torch.tensor([ids]))).logits[0].log_softmax(-1)
    if target == "repo":
        return float(table[-1, ids[-1]])
    first = start if target == "sequence" else len(ids) - 1
    return sum(float(table[t - 1, ids[t]]) for t in range(first, len(ids)))


@pytest.mark.parametrize("target", ["sequence", "last_token", "repo"])
def test_scores_sum_to_the_preference(target: str) -> None:
    model = small()
    scores = token_scores(model, WORDS, target=target)
    mean = model.weight("embed.W_E").mean(0)

    def without(ids: list[int], start: int) -> float:
        class Blank:
            def run(self, batch: Batch) -> Any:
                return model.run(batch, edits=[Edit("embed", Set(mean))])

        return log_p(Blank(), ids, start, target)

    for i, (prompt, *answers) in enumerate(WORDS):
        for side, sign in ((0, 1), (1, -1)):
            ids, start = [BOS, *(ord(c) - 97 for c in prompt + answers[side])], 1 + len(prompt)
            expected = sign * (log_p(model, ids, start, target) - without(ids, start))
            row = i + side * len(WORDS)
            # 20 Gauss-Legendre points on a smooth path
            assert float(scores.values[row].sum()) == pytest.approx(expected, abs=1e-6)
            assert int(scores.starts[row]) == start
            other = "last_token" if target == "repo" else "repo"  # the control: the other off-by-one
            assert abs(log_p(model, ids, start, other) - log_p(model, ids, start, target)) > 1e-3


@pytest.mark.parametrize("kind", ["gpt2_like", "llama_like"])
@pytest.mark.parametrize(("ablate", "positions"), [("mean_embed", "last"), ("pad", "last"), ("pad", "prompt_last")])
def test_the_vector_is_its_definition_in_single_runs(kind: str, ablate: str, positions: str) -> None:
    model, k = small(kind), 2
    layers = [0, model.info.n_layers - 1]
    found = grains(model, WORDS, layers=layers, k=k, ablate=ablate, positions=positions, batch_size=13)
    scores = token_scores(model, WORDS)
    mean = model.weight("embed.W_E").mean(0)
    for layer in layers:
        site, parts = full_name("resid_post", layer), {1: [], -1: []}

        def state(ids: torch.Tensor, at: list[int], end: int, site: str = site) -> torch.Tensor:
            tokens, edits = (
                ids.clone(),
                [Edit("embed", Set(mean), positions=at)] if ablate == "mean_embed" and at else [],
            )
            if ablate == "pad":
                tokens[at] = 0
            return model.run(Batch.of(tokens), record=site, edits=edits).activations[site].values[0, end]

        normed: list[torch.Tensor] = []

        for row in range(2 * len(WORDS)):
            ids = scores.batch.tokens[row, scores.batch.mask[row]]
            end = len(ids) - 1 if positions == "last" else len(WORDS[row % len(WORDS)][0])  # a first token, no answer
            # what is read before the answer does not change with it, so that its tokens are not among the k
            for sign, part in parts.items():
                order = sorted(range(1, end + 1), key=lambda t, r=row, s=sign: -s * float(scores.values[r, t]))
                at = [t for t in order[:k] if sign * float(scores.values[row, t]) > 0]
                if at:
                    part.append(state(ids, [], end) - state(ids, at, end))
                    final = "ln_final.hook_out"
                    normed.append(sign * (state(ids, [], end, final) - state(ids, at, end, final)))
        expected = torch.stack(parts[1]).mean(0) - torch.stack(parts[-1]).mean(0)
        torch.testing.assert_close(found.directions[layer].double(), expected, rtol=1e-5, atol=1e-6)  # float32 results
        assert found.settings["n_ablated"] == {"pos": len(parts[1]), "neg": len(parts[-1])}
    wrong = torch.stack(normed).mean(0)  # the control: states behind the final norm have another direction
    assert cosine(found.directions[layers[-1]], wrong) < 0.99
    if positions == "prompt_last":  # the control: answers have one token or two, so that this is another place
        with pytest.raises(AssertionError):
            elsewhere = grains(model, WORDS, layers=layers, k=k, ablate=ablate, positions=-2)
            torch.testing.assert_close(elsewhere.directions[layers[-1]].double(), expected, rtol=1e-5, atol=1e-6)


def test_hidden_tokens_are_as_if_they_were_not_there() -> None:
    """Without positions, a token that no other token sees is a text without it; vectors are float32."""
    model, _ = driven()
    w = {n: x + 0.3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).double() * ("attn" in n)
         for n, x in model._weights.items()}  # fmt: skip
    model = type(model)(model.config, w, tokenizer=Letters())
    found = grains(model, TRIPLES[:2], layers=[0], k=1, mode="pos", ablate="attn_mask")
    parts = []
    for prompt, *answers in TRIPLES[:2]:
        for answer in answers:
            text, row = prompt + answer, len(parts)
            scores = token_scores(model, TRIPLES[:2])
            i = row // 2 + len(scores) * (row % 2)
            at = int(scores.values[i].masked_fill(scores.batch.tokens[i] == BOS, 0).argmax())
            assert at < len(text)  # else the last token, which sees itself
            both = [text, text[: at - 1] + text[at:]]
            x, y = (model.run(model.tokenize(t), record=SITE).activations[SITE].values[0, -1] for t in both)
            parts.append(x - y)
    torch.testing.assert_close(
        found.directions[0].double(), torch.stack(parts).mean(0), rtol=1e-5, atol=1e-6
    )  # float32


@pytest.mark.parametrize("ablate", ["mean_embed", "pad", "attn_mask"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "qwen3"])
def test_triples_of_many_lengths_give_what_they_give_one_by_one(family: str, ablate: str) -> None:
    model = HookedHF(families.model(family), tokenizer=families.tokenizer())
    triples = [("a b a", " b", " a a"), ("b", " a b b a", " b"), ("a a b a b a", " b", " a")]
    settings: dict[str, Any] = {"layers": [0, model.info.n_layers - 1], "k": 2, "steps": 2, "mode": "pos"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # two steps on a network that bends: what is left out is the same
        together = grains(model, triples, ablate=ablate, **settings)
        alone = [grains(model, [triple], ablate=ablate, **settings) for triple in triples]
    counts = [v.settings["n_ablated"]["pos"] for v in alone]
    assert together.settings["n_ablated"] == {"pos": sum(counts)}
    for name, table in together.tensors.items():
        expected = sum(n * v.tensors[name].values for n, v in zip(counts, alone, strict=True)) / sum(counts)
        torch.testing.assert_close(table.values, expected, rtol=1e-4, atol=1e-3)  # float32 networks of large weights
        assert not torch.allclose(table.values, alone[0].tensors[name].values, atol=1e-2)  # the control: one of them


def test_more_than_all_tokens_and_one_triple_and_special_tokens() -> None:
    model = small()
    every = grains(model, WORDS, layers=[0], k=1000)
    assert torch.equal(every.directions[0], grains(model, WORDS, layers=[0], k=10).directions[0])
    asked = grains(model, WORDS, layers=[0], k=1000, special=True)
    assert not torch.equal(asked.directions[0], every.directions[0])  # the first token, which is left alone otherwise
    one = grains(model, WORDS[:1], layers=[0])
    assert one.settings["n_pairs"] == 1
    with pytest.raises(SettingError, match="reduce='pca_uncentered'\n  found: one triple"):
        grains(model, WORDS[:1], layers=[0], reduce="pca_uncentered")


def test_heads_of_nodes_are_the_only_ones_that_have_a_direction() -> None:
    model = small()
    nodes = [Node("z", 0, head=2), Node("z", 1, pos=3, head=0), Node("resid_post", 1)]
    v = grains(model, WORDS, sites=nodes)
    whole = grains(model, WORDS, sites=["blocks.0.attn.hook_z", "blocks.1.attn.hook_z", full_name("resid_post", 1)])
    assert set(v.sites) == set(whole.sites)
    assert [bool(x.any()) for x in v.tensors["blocks.0.attn.hook_z"].values] == [False, False, True, False]
    assert torch.equal(v.tensors["blocks.0.attn.hook_z"].values[2], whole.tensors["blocks.0.attn.hook_z"].values[2])
    assert torch.equal(v.directions[1], whole.directions[1])
    with pytest.raises(SettingError, match=r"the direction of L0H9 z\n  found: 4 at blocks.0.attn.hook_z"):
        whole.only([Node("z", 0, head=9)])


def test_what_does_not_fit_is_refused() -> None:
    model = small()
    cases: list[tuple[Any, type[Exception], dict[str, Any], str]] = [
        ([], SettingError, {}, "triples\n  found: none"),
        ([("a", "b")], SettingError, {}, "triple 0"),
        ([("a", "b", "")], SettingError, {}, "triple 0"),
        ([("a", "b", "b")], SettingError, {}, "two equal answers"),
        (WORDS, SettingError, {"k": 0}, "k=0\n  found: not a count"),
        (WORDS, SettingError, {"layers": [9]}, r"layers=\[9\]"),
        (WORDS, SettingError, {"positions": "lats"}, "did you mean 'last'"),
        (WORDS, SettingError, {"positions": "promt_last"}, "did you mean 'prompt_last'"),
        (WORDS, UnknownNameError, {"mode": "bth"}, "mode='bth'\n  found: no such choice\n  fix: did you mean 'both'"),
        (WORDS, UnknownNameError, {"target": "sequenc"}, "did you mean 'sequence'"),
    ]
    for triples, kind, settings, text in cases:
        with pytest.raises(kind, match=text):
            grains(model, triples, **{"layers": [0], **settings})
    broken = {name: x * torch.nan if name == "blocks.0.attn.W_O" else x for name, x in model._weights.items()}
    with pytest.raises(NonFiniteError, match=r"NaN or infinity, first at blocks\.0\.attn"):
        grains(type(model)(model.config, broken, tokenizer=Letters()), WORDS, layers=[0])
    with pytest.raises(UnknownNameError, match="side='left'"):
        token_scores(model, WORDS).of(0, "left")
    with pytest.raises(UnsupportedFeatureError, match="has an encoder"):
        token_scores(families.hooked("bert"), WORDS)
