"""Footprints, segments and the vocabulary that is read out, on a network whose erasure is known."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from letters_model import BOS, FORGOTTEN, Letters, copying, texts
from matplotlib.figure import Figure

import mechattr as ma
from mechattr.draw.footprints import segments_html
from mechattr.erasure import (
    Closed,
    Descent,
    ErasureProbes,
    entities_of,
    fit_probes,
    footprint,
    read_out,
    segment,
    words_of,
)
from mechattr.erasure.documents import documents, encoded
from mechattr.erasure.segment import drops, layers_between
from mechattr.errors import MismatchError, OutputExistsError, SettingError
from mechattr.models.plain import plain_model
from mechattr.models.plain_config import PlainConfig

FRESH = texts(40, seed=5)


@cache
def forgetting() -> tuple[Any, ErasureProbes]:
    model = copying(forgetting=True)
    recipe = Descent(rate=0.3, epochs=6, documents=4)
    return model, fit_probes(model, texts(150), recipe=recipe, offsets=(-2, -1, 0))


def spots(rows: list[str], *, forgotten: bool) -> list[list[tuple[int, int]]]:
    """Positions of forgotten letters, or of the others, each a span of one token; the first token has no letter."""
    return [[(i, i) for i, letter in enumerate(row, 1) if (letter in FORGOTTEN) == forgotten and i > 1] for row in rows]


def test_a_planted_erasure_is_seen_where_it_is_and_nowhere_else() -> None:
    model, probes = forgetting()
    groups = {"forgotten": spots(FRESH, forgotten=True), "kept": spots(FRESH, forgotten=False)}
    found = footprint(model, FRESH, probes=probes, groups=groups)
    layers = list(found.tensors["hits"].coords["layer"])
    before, after = layers.index(0), layers.index(1)
    for offset in (0, -1):
        assert float(found.accuracy("forgotten", offset)[before]) == 1.0
        assert float(found.accuracy("kept", offset)[after]) == 1.0
        assert float(found.accuracy("forgotten", offset)[after]) < 0.4  # one in five letters or one in eleven
        lost, low, high = found.drop("forgotten", offset, 0, 1)
        assert 0.5 < low <= lost <= high <= 1 and found.drop("kept", offset, 0, 1)[0] == 0
    assert float(found.accuracy("kept", -2)[after]) < 0.4  # which no state says
    assert int(found.tensors["counts"].sel(group="kept", offset=-1).values.sum()) == sum(map(len, groups["kept"]))
    swapped = footprint(model, FRESH, probes=probes, groups={"forgotten": groups["kept"]})
    assert float(swapped.accuracy("forgotten", -1)[after]) == 1.0  # the control: spans at the other letters


def test_n_grams_are_words_of_exactly_the_length_of_an_offset() -> None:
    model, probes = forgetting()
    spans = [[(1, 1), (2, 3), (4, 6)]]
    found = footprint(model, ["abcdefgh"], probes=probes, groups={"mine": spans})
    layers = list(found.tensors["hits"].coords["layer"])
    for offset, place in ((0, 1), (-1, 3), (-2, 6)):
        assert int(found.tensors["counts"].sel(group="mine ngram", offset=offset).values.sum()) == 1
        alone = footprint(model, ["abcdefgh"], probes=probes, groups={"one": [[(place, place)]]})
        for layer in range(len(layers)):
            one, gram = (x.accuracy(g, offset)[layer] for x, g in ((alone, "one"), (found, "mine ngram")))
            assert float(one) == float(gram)
    assert int(found.tensors["counts"].sel(group="mine", offset=-1).values.sum()) == 3  # every span's last token
    with pytest.raises(SettingError, match=r"layer 9 of a footprint\n  found: layers \[-1, 0, 1\]"):
        found.drop("all", 0, 0, 9)


def test_intervals_contain_the_estimate_and_shrink_with_documents() -> None:
    model, probes = forgetting()
    few, many = (footprint(model, FRESH[:n], probes=probes) for n in (8, 40))
    widths = []
    for found in (few, many):
        mean, (low, high) = found.accuracy("all", -1), found.interval("all", -1)
        assert bool(((low <= mean) & (mean <= high)).all())
        widths.append(float((high - low)[-1]))
    assert widths[1] < widths[0]


def test_documents_in_a_batch_are_documents_alone() -> None:
    model, probes = forgetting()
    together = footprint(model, FRESH[:6], probes=probes)
    for i, text in enumerate(FRESH[:6]):
        alone = footprint(model, [text], probes=probes)
        for name, table in alone.tensors.items():
            assert torch.equal(together.tensors[name].values[i], table.values[0])


def test_drops_are_differences_of_softmax_probabilities() -> None:
    model, probes = forgetting()
    (document,) = documents(model, encoded(model, [FRESH[0]]), (0, 1))
    found = drops(document, probes, (0, 1))
    n = len(document.tokens)
    for row, offset in enumerate((0, -1, -2)):
        for t in range(n):
            if t + offset < 0:
                assert math.isnan(found[row, t])
                continue
            p = [
                (probes.weights(layer, offset).double() @ document.states[i, t]).softmax(-1)[
                    document.tokens[t + offset]
                ]
                for i, layer in enumerate((0, 1))
            ]
            torch.testing.assert_close(found[row, t].double(), p[0] - p[1], rtol=0, atol=1e-6)  # float32 results
    skipped = drops(document, probes, (0, 1), first=False)
    assert bool(skipped[0, 0].isnan())
    torch.testing.assert_close(skipped[:, 1:], found[:, 1:], rtol=0, atol=0, equal_nan=True)


def test_segments_are_a_partition_and_end_where_pieces_are_forgotten() -> None:
    model, probes = forgetting()
    text = "acbaecda"  # b and d are forgotten, with the letters before them
    found = segment(model, text, probes=probes, start=0, end=1)
    assert [i for p, q, _ in found.segments for i in range(p, q + 1)] == list(range(len(text) + 1))
    assert found.segments[0][:2] == (0, 0)  # the special token stands by itself
    words = ["".join(found.strings[p : q + 1]) for p, q, _ in found.segments if q > p]
    assert all(word[-1] in FORGOTTEN for word in words) and {"cb", "cd"} <= {word[-2:] for word in words}
    assert tuple(found.to_pandas().columns) == ("first", "last", "n_tokens", "text", "psi")
    short = segment(model, text, probes=probes, start=0, end=1, longest=1)
    assert all(p == q for p, q, _ in short.segments)
    reference = segment(model, text, probes=probes, start=0, end=1, first="reference")
    assert reference.segments[0][:2] == (0, 0)


def test_the_vocabulary_counts_segments_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    model, probes = forgetting()
    whole = read_out(model, FRESH, probes=probes, start=0, end=1, batch_size=3)
    singly = [segment(model, text, probes=probes, start=0, end=1) for text in FRESH]
    assert [[s[:2] for s in part] for part in whole.segments()] == [[s[:2] for s in one.segments] for one in singly]
    frame = whole.to_pandas()
    for row in frame.head(5).itertuples():
        scores = [
            score
            for one, text in zip(singly, FRESH, strict=True)
            for p, q, score in one.segments
            if q > p and encoded(model, [text])[0][p : q + 1] == row.ids
        ]
        assert row.count == len(scores) and row.psi == pytest.approx(sum(scores) / len(scores), abs=1e-6)
    journal = tmp_path / "journal"
    read_out(model, FRESH, probes=probes, start=0, end=1, batch_size=3, resume=journal)
    lines = journal.read_text().splitlines()
    journal.write_text("\n".join(lines[:5]) + "\n")  # killed on the way
    again = read_out(model, FRESH, probes=probes, start=0, end=1, batch_size=3, resume=journal)
    assert again.to_pandas().equals(frame)
    with pytest.raises(OutputExistsError):
        read_out(model, FRESH[1:], probes=probes, start=0, end=1, resume=journal)


def test_results_are_stored_and_shown(tmp_path: Path) -> None:
    model, probes = forgetting()
    results = (
        footprint(model, FRESH[:5], probes=probes),
        segment(model, "acbad", probes=probes, start=0, end=1),
        read_out(model, FRESH[:5], probes=probes, start=0, end=1),
    )
    for i, result in enumerate(results):
        result.save(tmp_path / f"{i}")
        again = ma.open(tmp_path / f"{i}")
        assert type(again) is type(result) and again.to_pandas().equals(result.to_pandas())
        assert again._repr_html_() == result._repr_html_()
    results[0].plot(Figure().add_subplot())
    shown = segments_html(["<&", "a", "\n"], [(0, 1, 0.4), (2, 2, math.nan)])
    assert "&lt;&amp;" in shown and "ψ = 0.400" in shown and "<br>" in shown


def test_texts_without_tokens_have_their_place_and_nothing_in_it() -> None:
    model, probes = forgetting()
    alone = segment(model, "", probes=probes)  # the special token that every text begins with
    assert [s[:2] for s in alone.segments] == [(0, 0)] and math.isnan(alone.segments[0][2])
    assert "ψ is not defined" in alone._repr_html_()
    bare = copying(forgetting=True, first=False)
    probes = fit_probes(bare, texts(20), recipe=Closed(), offsets=(-2, -1, 0))
    nothing = segment(bare, "", probes=probes)
    assert nothing.segments == [] and nothing.to_pandas().empty and "<div" in nothing._repr_html_()
    assert segment(bare, "a", probes=probes).segments[0][:2] == (0, 0)
    found = read_out(bare, ["abcd", "", "ab"], probes=probes, start=0, end=1)
    singly = [segment(bare, text, probes=probes, start=0, end=1).segments for text in ("abcd", "", "ab")]
    assert [[s[:2] for s in part] for part in found.segments()] == [[s[:2] for s in part] for part in singly]
    empty = read_out(bare, ["", ""], probes=probes, start=0, end=1)
    assert empty.to_pandas().empty and empty.segments() == [[], []]
    measured = footprint(bare, ["abcd", ""], probes=probes)
    assert measured.tensors["counts"].sel(group="all", offset=0).values.tolist() == [3, 0]
    with pytest.raises(SettingError, match="texts\n  found: none"):
        footprint(bare, [], probes=probes)
    with pytest.raises(SettingError, match="none with a token"):
        fit_probes(bare, ["", ""])


def test_documents_are_cut_at_the_context() -> None:
    model, probes = forgetting()
    long = "abcdefghijk" * 3
    assert len(words_of(model, long).tokens) == model.info.n_ctx == len(encoded(model, [long])[0])
    assert int(footprint(model, [long], probes=probes).tensors["counts"].values.max()) == model.info.n_ctx - 1
    assert segment(model, long, probes=probes).segments[-1][1] == model.info.n_ctx - 1


def test_a_vocabulary_of_one_token() -> None:
    """Every probe is certain: nothing drops, and every span scores zero."""
    model = plain_model(PlainConfig.gpt2_like(d_vocab=1), tokenizer=Letters(bos=None))
    probes = fit_probes(model, ["aaaa", "aaaaa", "aa"], recipe=Descent(epochs=1))
    found = segment(model, "aaaa", probes=probes)
    assert [s[:2] for s in found.segments] == [(0, 0), (1, 1), (2, 2), (3, 3)]
    assert [s[2] for s in found.segments[1:]] == [0.0, 0.0, 0.0]
    assert float(footprint(model, ["aaa"], probes=probes).accuracy("all", -1).min()) == 1.0


def test_layers_between_follow_the_depth() -> None:
    model, probes = forgetting()
    assert layers_between(model, probes, None, None) == (0, 1)
    with pytest.raises(SettingError, match="the end does not lie above the start"):
        layers_between(model, probes, 1, 0)
    with pytest.raises(SettingError, match="the probe of layer 7"):
        layers_between(model, probes, 0, 7)


def test_words_are_where_the_text_has_them() -> None:
    model = ma.load("tiny")
    text = "The cat's dictionary, 42 well-known words."
    found = words_of(model, text)
    strings = model.tokenize(text).strings[0]
    assert found.texts == ("The", "cat's", "dictionary", "well", "known", "words")
    for (first, last), word in zip(found.spans, found.texts, strict=True):
        assert "".join(strings[first : last + 1]).strip() == word
    assert set(found.multi) | set(found.single) == set(found.spans) and found.multi
    assert entities_of(found, model, ["dictionary"]) == tuple(
        s for s in found.multi if found.texts[found.spans.index(s)] == "dictionary"
    )
    assert words_of(model, "").spans == () and words_of(model, "4 2!").spans == ()


def test_what_does_not_belong_is_refused() -> None:
    model, probes = forgetting()
    with pytest.raises(MismatchError, match=r"(?s)erasure_probes of model .*was made with weight"):
        segment(copying(), "abc", probes=probes)
    with pytest.raises(SettingError, match="spans of 1 documents"):
        footprint(model, FRESH[:2], probes=probes, groups={"mine": [[]]})
    with pytest.raises(SettingError, match="group 'mine' of a footprint"):
        footprint(model, FRESH[:2], probes=probes).accuracy("mine", 0)
    only = fit_probes(model, texts(8), recipe=Closed(), offsets=(0, -1))
    with pytest.raises(SettingError, match=r"the probe of offset -2\n  found: probes of offsets \(0, -1\)"):
        segment(model, "abc", probes=only)
    assert BOS in model.tokenizer.all_special_ids
