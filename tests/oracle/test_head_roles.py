"""Roles of heads on routes: against counting edge by edge, and on a circuit whose heads are known."""

from __future__ import annotations

from pathlib import Path

import families
import pytest
import torch
from induction_model import induction_model, induction_task
from patching_cases import plain

import mechattr as ma
from mechattr.decomposition.roles import ROLES, HeadRoles, _word_numbers, head_roles
from mechattr.errors import EmptyTaskError, SettingError, UnknownNameError
from mechattr.models import Batch

TOKENS = [[7, 9, 7, 9, 7, 8], [5, 5, 6, 5, 5, 6]]


def by_hand(routes: ma.decomposition.Routes, wrong: str = "") -> tuple[torch.Tensor, torch.Tensor]:
    """Scores [layer, head, role] and counts [layer, role], one place and one head at a time."""
    n_layers, n_heads = 2, 2
    frame = routes.to_pandas()
    frame = frame[frame["into"] == "resid_mid"]
    scores = torch.zeros(n_layers, n_heads, len(ROLES), dtype=torch.float64)
    nodes = torch.zeros(n_layers, len(ROLES), dtype=torch.float64)
    for (b, layer, i), edges in frame.groupby(["batch", "layer", "query"]):
        ids = TOKENS[b]
        keys = {
            "weight": list(range(i + 1)),
            "previous": [i - 1] if i else [],
            "self": [i],
            "first": [0] if i else [],
            "word": [],
            "same_token": [j for j in range(i) if ids[j] == ids[i]],
            "induction": [j for j in range(1, i + 1) if ids[j - 1] == ids[i]],
        }
        for place, role in enumerate(ROLES):
            if role != "active" and not keys[role] and wrong != "places that do not allow it counted":
                continue
            nodes[layer, place] += 1
            for head in range(n_heads):
                here = edges[edges["head"] == head]
                if role == "active":
                    scores[layer, head, place] += bool(len(here))
                else:
                    scores[layer, head, place] += here[here["key"].isin(keys[role])]["weight"].sum()
    return scores / nodes[:, None], nodes


@pytest.mark.parametrize("batch_size", [1, 32])
def test_roles_are_means_over_the_places_that_allow_them(batch_size: int) -> None:
    model, batch = plain("gpt2_like"), Batch.of(torch.tensor(TOKENS))
    found = head_roles(model, batch, threshold=0.02, batch_size=batch_size)
    routes = ma.information_flow_routes(model, batch, threshold=0.02)
    scores, nodes = by_hand(routes)
    assert torch.equal(found.nodes.values, nodes.long()) and bool((nodes[:, ROLES.index("word")] == 0).all())
    # sums of at most a dozen shares, in another order
    torch.testing.assert_close(found.score.values, scores, rtol=0, atol=1e-13, equal_nan=True)
    with pytest.raises(AssertionError):
        wrong, _ = by_hand(routes, "places that do not allow it counted")
        torch.testing.assert_close(found.score.values, wrong, rtol=0, atol=1e-13, equal_nan=True)
    assert found.passes == (2, 0)


def test_the_heads_of_a_known_circuit_have_their_roles() -> None:
    model = induction_model()
    found = head_roles(model, induction_task(model, n=6).clean, threshold=0.01)
    for role, layer in (("previous", 0), ("induction", 1)):
        score, weight = (found.score.sel(layer=layer, role=name).values for name in (role, "weight"))
        share = score / weight
        assert float(share[0]) > 0.8 and float(share[1:].max()) < 0.3  # of what a head keeps; the others are random
        assert found.top(role).set_index("layer").loc[layer].iloc[0]["head"] == 0


def test_words_are_those_of_the_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ma.load("tiny")
    batch = model.tokenize("The store's drink, 12 inks")
    words: dict[int, str] = {}
    for number, text in zip(_word_numbers(model, batch.tokens[0]).tolist(), batch.strings[0], strict=True):
        words[number] = words.get(number, "") + text
    assert list(words.values()) == ["The", " store", "'s", " drink", ",", " 12", " inks"]
    assert len(words) < len(batch.strings[0])
    roles = head_roles(model, ["When Mary and John went to the store", "The old teacher saw the drink"])
    assert int(roles.nodes.sel(role="word").values.sum()) > 0

    class WordPiece:
        """Pieces of words are marked, and spaces are nowhere."""

        def get_vocab(self) -> dict[str, int]:
            return {"play": 0, "##ing": 1, "cat": 2}

        def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
            return [["play", "##ing", "cat"][i] for i in ids]

    monkeypatch.setattr(model, "tokenizer", WordPiece())
    assert _word_numbers(model, torch.tensor([0, 1, 2, 0, 1])).tolist() == [1, 1, 2, 3, 3]


def test_roles_are_stored_read_and_refused(tmp_path: Path) -> None:
    model, batch = plain("llama_like"), Batch.of(torch.tensor(TOKENS))
    found = head_roles(model, batch)
    found.save(tmp_path / "roles")
    again = ma.open(tmp_path / "roles")
    assert isinstance(again, HeadRoles) and again.to_pandas().equals(found.to_pandas())
    assert list(found.to_pandas()) == ["layer", "head", "role", "score", "nodes"]
    assert "<table" in found._repr_html_() and repr(found) == "HeadRoles(2 prompts, routes from 0.04)"
    with pytest.raises(
        UnknownNameError, match=r"role 'previus'\n  found: no such role\n  fix: did you mean 'previous'"
    ):
        found.top("previus")
    with pytest.raises(EmptyTaskError, match=r"roles of heads\n  found: no prompts"):
        head_roles(model, [])
    with pytest.raises(SettingError, match="batch_size=0"):
        head_roles(model, batch, batch_size=0)
    left = families.ragged("left")
    left, right = (Batch.of(x.tokens % model.info.d_vocab, x.mask) for x in (left, families.ragged()))
    torch.testing.assert_close(  # float64: another order of the same sums
        head_roles(model, left).score.values, head_roles(model, right).score.values, rtol=0, atol=1e-10, equal_nan=True
    )
