"""Agreement of segments with known words by hand-counted cases, and the import of published probes."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest
import torch
from letters_model import V, copying

from mechattr.erasure import Closed, fit_probes, import_probes
from mechattr.erasure.gold import agreement, agreement_table, joined, shuffled
from mechattr.errors import ArtifactError, MismatchError, SettingError

FOUND = [[(0, 1), (2, 2), (3, 5)], [(1, 2)]]
GOLD = [[(0, 1), (3, 4)], [(1, 2), (4, 7)]]


def test_agreement_counts_by_hand() -> None:
    found = agreement(FOUND, GOLD)
    assert (found.precision, found.recall) == (2 / 3, 2 / 4) and (found.n_found, found.n_gold) == (3, 4)
    assert found.boundary_f1 == pytest.approx(2 * 5 / (6 + 8))  # 0 1 3 of the first, 1 2 of the second
    two = agreement(FOUND, GOLD, length="2")
    assert (two.precision, two.recall, two.n_found, two.n_gold) == (1.0, 2 / 3, 2, 3)
    assert agreement(FOUND, GOLD, length="3").precision == 0.0
    assert math.isnan(agreement([[(0, 0)]], [[]]).precision) and math.isnan(agreement([[]], [[]]).boundary_f1)
    assert agreement(GOLD, GOLD).boundary_f1 == 1.0
    shifted = [[(p + 1, q + 1) for p, q in spans] for spans in GOLD]  # spans that end one late are no spans
    assert agreement(shifted, GOLD).recall == 0.0


def test_the_merge_rule_joins_letters_without_a_space() -> None:
    assert joined([" the", " dr", "ink", "s", ",", " a", "2", "b", "\n", "no"]) == [(1, 3)]
    assert joined([]) == [] and joined(["a"]) == []


def test_random_spans_keep_their_lengths_and_do_not_overlap() -> None:
    draw = random.Random(0)
    for _ in range(50):
        spans = shuffled([(0, 1), (4, 6), (8, 8)], 9, draw)
        taken = [i for p, q in spans for i in range(p, q + 1)]
        assert sorted(q - p for p, q in spans) == [0, 1, 2] and len(taken) == len(set(taken)) and max(taken) < 9
    assert shuffled([(0, 2)], 3, draw) == [(0, 2)]


def test_the_table_has_each_rule_and_length() -> None:
    strings = [["a", "b", " c", " d", "e", "f"], [" x", " y", "z", ".", " q", "r", "s", "t"]]
    table = agreement_table(FOUND, GOLD, strings, draws=20)
    assert set(table["spans"]) == {"segments", "merged tokens", "random"} and len(table) == 12
    whole = table[table["length"] == "all"].set_index("spans")
    assert whole.loc["segments", "recall"] == 0.5 and whole.loc["random", "recall"] < 0.5
    assert whole.loc["merged tokens", "recall"] == agreement([joined(row) for row in strings], GOLD).recall


def test_published_probes_are_read_safely(tmp_path: Path) -> None:
    model = copying()
    probes = fit_probes(model, ["abcdefg", "bcadhg"], recipe=Closed(), offsets=(-1, 0))
    for layer in probes.layers:
        for offset in probes.offsets:
            state = {"fc.weight": probes.weights(layer, offset).clone()}
            torch.save(state, tmp_path / f"layer{layer}_tgtidx{offset}.ckpt")  # noqa: TID251 (as they are published)
    found = import_probes(tmp_path, model)
    for layer in probes.layers:
        for offset in probes.offsets:
            assert torch.equal(found.weights(layer, offset), probes.weights(layer, offset))
    assert found.provenance["weight_hash"] == model.fingerprint()["weight_hash"]
    path = tmp_path / "layer0_tgtidx-1.ckpt"
    broken = path.read_bytes()[:200]
    cases = [
        (
            {"fc.bias": torch.zeros(2)},
            ArtifactError,
            r"fc\.weight in layer0_tgtidx-1\.ckpt\n  found: keys \['fc\.bias'\]",
        ),
        ({"fc.weight": torch.zeros(V, 3)}, MismatchError, r"found: shape \[12, 3\]"),
        ({"fc.weight": Path("run me")}, ArtifactError, "one that holds more than tensors is not read"),
    ]
    for state, kind, text in cases:
        torch.save(state, path)  # noqa: TID251 (as they are published)
        with pytest.raises(kind, match=text):
            import_probes(tmp_path, model)
    path.write_bytes(broken)
    with pytest.raises(ArtifactError, match=r"tensors from layer0_tgtidx-1\.ckpt"):
        import_probes(tmp_path, model)
    path.unlink()
    with pytest.raises(MismatchError, match="probes of layer 0 at offset -1"):
        import_probes(tmp_path, model)
    with pytest.raises(ArtifactError, match="no file named"):
        import_probes(tmp_path / "none", model)


def test_wrong_input_is_refused() -> None:
    with pytest.raises(SettingError, match="gold spans of 2 documents\n  found: 1"):
        agreement(FOUND, GOLD[:1])
    with pytest.raises(SettingError, match="length='5'"):
        agreement(FOUND, GOLD, length="5")
