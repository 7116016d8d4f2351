"""Cache and Attribution: their look-ups, rankings and tables, and opening an artifact of any kind."""

from __future__ import annotations

import importlib
import json
import math
import sys
import types
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch.testing import assert_close

import mechattr.provenance as provenance_module
from mechattr import storage
from mechattr.artifact import KINDS, Attribution, Cache, Passes
from mechattr.artifact import open as open_artifact
from mechattr.errors import ArtifactError, AxisError, SettingError, UnknownNameError, UnknownSiteError
from mechattr.labelled import Labelled
from mechattr.provenance import json_value, provenance
from mechattr.sites import SITES, Node, full_name


def cache(layers: tuple[int, ...] = (0, 1, 3)) -> Cache:
    sites = {full_name("z", layer): torch.randn(2, 3, 4, 5, dtype=torch.float64) for layer in layers}
    return Cache.from_tensors({"hook_embed": torch.randn(2, 3, 8, dtype=torch.float64), **sites})


def attribution(direction: str | None = "noising", **settings: object) -> Attribution:
    score = torch.tensor([[[0.1, 0.9], [0.5, 0.5]], [[0.0, float("nan")], [0.3, 0.9]]])
    signed = torch.tensor([[[-0.1, 0.9], [-0.5, 0.5]], [[0.0, float("nan")], [0.3, -0.8]]])
    tensors = {
        "score/z": Labelled(score, ("layer", "pos", "head")),
        "signed/z": Labelled(signed, ("layer", "pos", "head")),
        "score/k": Labelled(score[:, 0, :1], ("layer", "kv_head")),
        "signed/k": Labelled(signed[:, 0, :1], ("layer", "kv_head")),
        "score/mlp_post": Labelled(torch.tensor([[0.2, 0.9, 0.0]]), ("layer", "neuron"), {"layer": [1]}),
        "signed/mlp_post": Labelled(torch.tensor([[0.2, -0.9, 0.0]]), ("layer", "neuron"), {"layer": [1]}),
        "score/embed": Labelled(torch.tensor([0.4, 0.6]), ("pos",), {"pos": ["S1", "END"]}),
        "signed/embed": Labelled(torch.tensor([0.4, -0.6]), ("pos",), {"pos": ["S1", "END"]}),
    }
    return Attribution(tensors, settings={**settings, **({"direction": direction} if direction else {})})


# Cache


def test_a_cache_is_a_mapping_over_full_names() -> None:
    stored = cache()
    assert list(stored) == ["hook_embed", *(full_name("z", layer) for layer in (0, 1, 3))]
    assert len(stored) == 4
    assert stored["z", 3] is stored["blocks.3.attn.hook_z"]
    assert stored["embed"] is stored["embed", None] is stored["hook_embed"]
    assert stored.layers("z") == (0, 1, 3)
    assert stored.layers("q") == ()
    assert stored["z", 0].axes == SITES["z"].axes


def test_a_short_name_stacks_the_layers_present() -> None:
    stored = cache((3, 0, 1))
    stacked = stored["z"]
    assert stacked.axes == ("layer", *SITES["z"].axes)
    assert stacked.coords["layer"] == (0, 1, 3)
    for layer in (0, 1, 3):
        assert_close(stacked.sel(layer=layer).values, stored["z", layer].values, rtol=0, atol=0)
    in_recorded_order = torch.stack([stored[name].values for name in stored if "hook_z" in name])
    assert not torch.equal(stacked.values, in_recorded_order)  # the wrong implementation: layers as they came


def test_layers_of_different_shape_do_not_stack() -> None:
    with pytest.raises(AxisError, match="to combine two labelled tensors"):
        Cache.from_tensors({full_name("q", n): torch.zeros(1, 2, n + 1, 3) for n in range(2)})["q"]


def test_membership_follows_look_up() -> None:
    stored = cache()
    present = ["z", "embed", "hook_embed", ("z", 3), ("embed", None), "blocks.1.attn.hook_z"]
    absent = ["q", ("z", 2), ("z", None), "blocks.2.attn.hook_z", "nonsense", 3]
    assert [key in stored for key in present] == [True] * len(present)
    assert [key in stored for key in absent] == [False] * len(absent)
    assert stored.get(("z", 2)) is None


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("q", "site 'q' in a cache\n  found: recorded sites: embed, z\n  fix: record this site too"),
        (("z", 2), "did you mean 'blocks."),
        (("z", None), "give a layer"),
        ("zz", "no such site"),
        ("blocks.0.attn.hook_zz", "did you mean 'blocks.0.attn.hook_z'"),
    ],
)
def test_what_was_not_recorded_is_named(key: object, message: str) -> None:
    with pytest.raises(UnknownSiteError) as caught:
        cache()[key]
    assert message in str(caught.value)


def test_keys_of_a_cache_are_full_site_names() -> None:
    with pytest.raises(UnknownSiteError, match="no such full site name"):
        Cache({"z": Labelled(torch.zeros(1), ("pos",))})
    with pytest.raises(AxisError):
        Cache.from_tensors({"hook_embed": torch.zeros(2, 3)})


def test_artifacts_cannot_be_changed_and_do_not_follow_their_arguments() -> None:
    tensors = {"hook_embed": Labelled(torch.zeros(1, 1, 1), SITES["embed"].axes)}
    settings = {"list": [1]}
    stored = Cache(tensors, settings=settings)
    tensors.clear()
    settings["list"].append(2)
    assert len(stored) == 1
    assert stored.settings["list"] == [1]
    with pytest.raises(TypeError):
        stored.settings["new"] = 1
    with pytest.raises(TypeError):
        stored.tensors["new"] = None
    with pytest.raises(AttributeError):
        stored.settings = {}


# Attribution


def test_contribution_is_the_metric_lost_by_noising() -> None:
    signed = attribution().signed["embed"].values
    assert_close(attribution("noising").contribution["embed"].values, -signed, rtol=0, atol=0)
    assert_close(attribution("denoising").contribution["embed"].values, signed, rtol=0, atol=0)
    assert attribution("noising").value(Node("embed", None, "END"), "contribution") == pytest.approx(0.6)
    zero = attribution("noising").contribution["mlp_post"].values[0, 2]
    assert math.copysign(1.0, zero.item()) == 1.0  # not -0.0


def test_contribution_needs_a_direction_that_exists() -> None:
    with pytest.raises(SettingError, match=r"use \.signed instead"):
        _ = attribution(None).contribution
    with pytest.raises(SettingError, match="use 'noising' or 'denoising'"):
        attribution("sideways")


def test_signed_values_must_line_up_with_scores() -> None:
    score = Labelled(torch.zeros(2), ("layer",))
    with pytest.raises(AxisError, match="to combine"):
        Attribution({"score/mlp_out": score, "signed/mlp_out": Labelled(torch.zeros(2), ("pos",))})
    with pytest.raises(AxisError, match="add 'score/mlp_out'"):
        Attribution({"signed/mlp_out": score})


def slow_top(result: Attribution, k: int, by: str) -> list[Node]:
    """The definition: all nodes, one at a time, by value and then in node order."""
    measured = [(node, result.value(node, by)) for node in result.nodes()]
    kept = [(node, value) for node, value in measured if not math.isnan(value)]
    return [node for node, _ in sorted(kept, key=lambda pair: (-pair[1], pair[0]))][:k]


@pytest.mark.parametrize("by", ["score", "contribution", "abs_signed"])
@pytest.mark.parametrize("k", [0, 1, 3, 7, 100])
def test_top_follows_its_definition(by: str, k: int) -> None:
    assert attribution().top(k, by) == slow_top(attribution(), k, by)


def test_top_breaks_ties_in_node_order_and_leaves_out_what_was_not_measured() -> None:
    # 0.9 occurs at z L0 and L1 and at a neuron: float32 values, so the tie is exact
    assert attribution().top(3) == [Node("mlp_post", 1, None, None, 1), Node("z", 0, 0, 1), Node("z", 1, 1, 1)]
    assert Node("z", 1, 0, 1) not in attribution().top(100)
    assert len(attribution().nodes()) == 7 + 2 + 3 + 2
    assert math.isnan(attribution().value(Node("z", 1, 0, 1)))


def test_top_by_topk_alone_would_not_break_ties_in_node_order() -> None:
    # negative control: with many equal scores the places that topk returns are not the first ones
    scores = torch.zeros(5000)
    result = Attribution({"score/mlp_out": Labelled(scores, ("layer",))})
    assert [node.layer for node in result.top(5)] == [0, 1, 2, 3, 4]
    assert torch.topk(scores, 5).indices.tolist() != [0, 1, 2, 3, 4]


def test_node_order_does_not_depend_on_how_a_table_is_laid_out() -> None:
    scores = torch.rand(3, 4, 2).round(decimals=1)
    coords = {"layer": [2, 0, 1], "head": [3, 2, 1, 0]}
    straight = Attribution({"score/z": Labelled(scores, ("layer", "head", "pos"), coords)})
    turned = Attribution({"score/z": Labelled(scores.permute(2, 1, 0), ("pos", "head", "layer"), coords)})
    assert straight.top(24) == turned.top(24) == slow_top(straight, 24, "score")
    assert straight.nodes() == sorted(straight.nodes())
    assert straight.to_pandas().equals(turned.to_pandas())


def test_a_million_scores_rank_without_a_loop_over_them() -> None:
    scores = torch.rand(4, 25, 10_000)
    scores[2, 7, 1234], scores[3, 0, 9999] = 3.0, 2.0
    result = Attribution({"score/mlp_post": Labelled(scores, ("layer", "pos", "neuron"))})
    assert result.top(2) == [Node("mlp_post", 2, 7, None, 1234), Node("mlp_post", 3, 0, None, 9999)]


@pytest.mark.parametrize("k", [-1, 2.0, True, "3"])
def test_top_wants_a_count(k: object) -> None:
    with pytest.raises(SettingError, match="give a whole number from 0"):
        attribution().top(k)


def test_unknown_measures_and_missing_signs_are_named() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'contribution'"):
        attribution().top(1, by="contributions")
    with pytest.raises(UnknownNameError, match="no signed values of \\['mlp_out'\\]"):
        Attribution({"score/mlp_out": Labelled(torch.zeros(2), ("layer",))}).top(1, by="abs_signed")


def test_scores_of_pairs_of_positions_are_not_nodes() -> None:
    routes = Attribution({"score/alti": Labelled(torch.rand(2, 3, 3), ("layer", "query", "key"))})
    assert routes.scores["alti"].axes == ("layer", "query", "key")
    with pytest.raises(AxisError, match="nodes of 'alti'"):
        routes.top(3)
    assert "score/alti" in routes._repr_html_()


def test_values_by_node() -> None:
    result = attribution()
    assert result.value(Node("k", 0, head=0), "signed") == pytest.approx(-0.1)
    assert result.value(Node("mlp_post", 1, neuron=1), "abs_signed") == pytest.approx(0.9)
    with pytest.raises(AxisError, match="give the node all of them"):
        result.value(Node("z", 0, 0))
    with pytest.raises(AxisError, match="axis 'neuron'"):
        result.value(Node("z", 0, 0, 0, 5))
    with pytest.raises(UnknownSiteError, match="scores of z, k, mlp_post, embed"):
        result.value(Node("q", 0, 0, 0))


def test_the_table_is_sorted_complete_and_typed() -> None:
    result = attribution()
    frame = result.to_pandas()
    assert list(frame.columns) == ["site", "layer", "pos", "head", "neuron", "score", "signed", "contribution"]
    assert len(frame) == len(result.nodes())
    assert frame["score"].is_monotonic_decreasing
    assert {str(frame[name].dtype) for name in ("layer", "head", "neuron")} == {"Int64"}
    for row in frame.itertuples():
        node = Node(
            row.site, *(None if pd.isna(field) else field for field in (row.layer, row.pos, row.head, row.neuron))
        )
        assert result.value(node) == row.score
        assert result.value(node, "signed") == row.signed
        assert result.value(node, "contribution") == row.contribution
    assert attribution(None).to_pandas()["contribution"].isna().all()


def test_tables_of_nothing() -> None:
    empty = Attribution({})
    assert empty.top(5) == empty.nodes() == []
    assert len(empty.to_pandas()) == 0


def test_passes_and_extras_come_from_the_result_or_are_refused() -> None:
    assert attribution(passes={"forward": 2, "backward": 0.5}).passes == Passes(forward=2, backward=0.5)
    with pytest.raises(SettingError, match="use a method that counts its passes"):
        _ = attribution().passes
    tokens = Labelled(torch.zeros(3), ("pos",))
    assert Attribution({"tokens": tokens}).tokens is tokens
    for name in ("tokens", "components", "ledger"):
        with pytest.raises(UnknownNameError, match=f"'{name}' of an attribution"):
            getattr(attribution(method="atp"), name)


def test_plots_are_drawn_by_the_drawing_module(monkeypatch: pytest.MonkeyPatch) -> None:
    import mechattr

    fake = types.ModuleType("mechattr.draw")
    fake.attribution = lambda result, ax=None: (result, ax)
    monkeypatch.setitem(sys.modules, "mechattr.draw", fake)
    monkeypatch.setattr(mechattr, "draw", fake, raising=False)
    result = attribution()
    assert result.plot(ax="axes") == (result, "axes")


def test_the_notebook_view_is_a_short_escaped_table() -> None:
    scores = Labelled(torch.arange(40.0).reshape(20, 2), ("layer", "pos"), {"pos": ["<i>", "END"]})
    shown = Attribution(
        {"score/mlp_out": scores}, settings={"method": "<atp>", "n_pairs": 8, "passes": {"forward": 2, "backward": 1}}
    )._repr_html_()
    assert shown.count("<tr") == 1 + 20
    assert "method &lt;atp&gt;, 8 pairs, 2 forward and 1 backward passes" in shown
    assert "&lt;i&gt;" in shown
    assert "<i>" not in shown
    assert "and 5 more" in cache(tuple(range(24)))._repr_html_()
    assert repr(cache()) == "Cache(4 tensors, 3,264 bytes)"


# Opening


@pytest.mark.parametrize("make", [cache, attribution])
def test_an_artifact_comes_back_from_its_file(make, tmp_path: Path) -> None:
    made = make()
    made.save(tmp_path / "a.safetensors")
    for back in (open_artifact(tmp_path / "a.safetensors"), type(made).load(str(tmp_path / "a.safetensors"))):
        assert type(back) is type(made)
        assert list(back.tensors) == list(made.tensors)
        assert (back.settings, back.provenance) == (made.settings, made.provenance)
        back.verify()
        for name, tensor in made.tensors.items():
            assert back.tensors[name].coords == tensor.coords
            assert_close(back.tensors[name].values, tensor.values, rtol=0, atol=0, equal_nan=True)


def test_another_kind_names_both(tmp_path: Path) -> None:
    cache().save(tmp_path / "a.safetensors")
    with pytest.raises(ArtifactError) as caught:
        Attribution.load(tmp_path / "a.safetensors")
    assert "as kind 'attribution'\n  found: kind 'cache'" in str(caught.value)


def test_an_unknown_kind_names_the_nearest(tmp_path: Path) -> None:
    storage.save(tmp_path / "a.safetensors", "caches", {}, {}, {})
    with pytest.raises(ArtifactError, match=r"kind 'caches'\n  fix: did you mean 'cache'\?"):
        open_artifact(tmp_path / "a.safetensors")


def test_kinds_are_import_strings_of_classes_with_that_kind() -> None:
    for kind, target in KINDS.items():
        module, name = target.split(":")
        assert getattr(importlib.import_module(module), name).kind == kind


def test_content_that_the_kind_refuses_is_an_artifact_error(tmp_path: Path) -> None:
    storage.save(tmp_path / "a.safetensors", "cache", {"no site": Labelled(torch.zeros(1), ("pos",))}, {}, {})
    with pytest.raises(ArtifactError, match="to read kind 'cache'"):
        open_artifact(tmp_path / "a.safetensors")


def test_a_lazy_cache_reads_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = cache()
    made.save(tmp_path / "a.safetensors")
    reads: list[str] = []
    load = storage._load
    monkeypatch.setattr(storage, "_load", lambda entry: (reads.append(entry.name), load(entry))[1])
    lazy = Cache.load(tmp_path / "a.safetensors", lazy=True)
    assert "z" in lazy
    assert ("z", 1) in lazy
    assert repr(lazy) == repr(made)
    assert lazy._repr_html_() == made._repr_html_()
    assert reads == []
    assert_close(lazy["z", 1].values, made["z", 1].values, rtol=0, atol=0)
    assert reads == ["blocks.1.attn.hook_z"]
    open_artifact(tmp_path / "a.safetensors")
    assert len(reads) == 1 + len(made)  # the check can fail: an eager open reads everything


def test_verify_notices_values_changed_in_memory(tmp_path: Path) -> None:
    made = cache()
    with pytest.raises(SettingError, match="it was not read from a file"):
        made.verify()
    made.save(tmp_path / "a.safetensors")
    back = Cache.load(tmp_path / "a.safetensors")
    back["z", 1].values[0, 0, 0, 0] += 1
    with pytest.raises(ArtifactError, match=r"to verify 'blocks\.1\.attn\.hook_z'"):
        back.verify()


# Settings and provenance


def test_settings_come_back_as_they_are_shown(tmp_path: Path) -> None:
    settings = {
        "sites": ("z", "q"),
        "clean_metric": np.array([1.5, float("nan")]).tolist(),
        "n": np.int64(3),
        "scale": torch.tensor(0.5),
        "flag": np.bool_(True),
        "none": None,
        "nested": {"é": [{}]},
    }
    made = Cache({}, settings=settings)
    assert dict(made.settings) == {
        "sites": ["z", "q"],
        "clean_metric": [1.5, None],
        "n": 3,
        "scale": 0.5,
        "flag": True,
        "none": None,
        "nested": {"é": [{}]},
    }
    made.save(tmp_path / "a.safetensors")
    assert open_artifact(tmp_path / "a.safetensors").settings == made.settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"a": {"b": [0, float("inf")]}}, "settings['a']['b'][1] = inf"),
        ({"a": {1: 2}}, "key 1 of settings['a']"),
        ({"a": torch.float32}, "settings['a'] = torch.float32"),
        ({"a": {1, 2}}, "settings['a'] = {1, 2}"),
        ({"a": b"bytes"}, "settings['a'] = b'bytes'"),
    ],
)
def test_settings_that_are_not_json_are_named(settings: dict, message: str) -> None:
    with pytest.raises(SettingError) as caught:
        Cache({}, settings=settings)
    assert message in str(caught.value)


def test_json_values_are_strict_json() -> None:
    assert json.dumps(json_value({"x": float("nan")}), allow_nan=False) == '{"x": null}'


def test_provenance_describes_model_versions_and_tokens() -> None:
    tokens = torch.tensor([[1, 2, 3]])
    made = provenance({"model": "tiny", "dtype": torch.float32, "device": torch.device("cpu")}, seed=3, tokens=tokens)
    assert (made["model"], made["dtype"], made["device"], made["seed"]) == ("tiny", "float32", "cpu", 3)
    assert made["versions"].keys() == {"python", "mechattr", "torch", "transformers", "numpy", "safetensors"}
    assert made["versions"]["torch"] == torch.__version__
    assert made == provenance({"model": "tiny", "dtype": "float32", "device": "cpu"}, seed=3, tokens=tokens.int())
    assert json_value(made) == made


@pytest.mark.parametrize("tokens", [[[1, 2, 4]], [[1], [2], [3]], [[3, 2, 1]]])
def test_other_tokens_have_another_hash(tokens: list[list[int]]) -> None:
    one, other = (provenance({}, tokens=torch.tensor(ids))["tokens_sha256"] for ids in ([[1, 2, 3]], tokens))
    assert one != other
    assert provenance({})["tokens_sha256"] is None


def test_a_package_that_is_not_installed_has_an_unknown_version(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise provenance_module.metadata.PackageNotFoundError(name)

    with monkeypatch.context() as patch:
        patch.setattr(provenance_module.metadata, "version", missing)
        provenance_module._version.cache_clear()
        assert provenance({})["versions"]["mechattr"] == "0+unknown"
    provenance_module._version.cache_clear()
    assert provenance({})["versions"]["mechattr"] != "0+unknown"


def test_one_node_without_coordinates_is_a_node() -> None:
    # the embeddings with all positions merged: a table of no axes
    scores = {
        "score/embed": Labelled(torch.tensor(2.0), ()),
        "score/z": Labelled(torch.tensor([[1.0, 3.0]]), ("layer", "head")),
    }
    result = Attribution(scores, settings={"method": "m"}, provenance={})
    assert result.top(2) == [Node("z", 0, None, 1), Node("embed", None)]
    assert result.to_pandas()["site"].tolist() == ["z", "embed", "z"]
    assert len(result.nodes()) == 3
