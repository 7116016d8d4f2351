"""Information flow routes against their definition, one part and one edge at a time (E15), and small cases by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import families
import pytest
import torch
from patching_cases import plain
from torch import Tensor

import mechattr as ma
from mechattr.decomposition import shares
from mechattr.decomposition.parts import AttentionParts, MlpParts, attention_parts, mlp_parts
from mechattr.decomposition.routes import INTO, KINDS, Routes
from mechattr.errors import AxisError, SettingError, UnsupportedFeatureError
from mechattr.labelled import Labelled
from mechattr.models import Batch
from mechattr.models.plain import plain_model
from mechattr.models.plain_config import PlainConfig
from mechattr.sites import parse

Edge = tuple[int, str, int, int, str, int]  # layer, into, query, key, kind, head
Place = tuple[int, str, int]
# post-norm, norms on what is written, parallel, grouped queries, an encoder with sliding windows
MODELS = ("gpt2_like", "llama_like", "gpt2", "llama", "gemma2", "olmo2", "gpt_neox", "falcon_groups", "bert")
THRESHOLDS = (0.0, 0.03, 0.1, 1.0)
# float64: sums of a few hundred terms, and hf's norms and softmaxes in float64 too
EXACT = 1e-12


def model_of(kind: str) -> Any:
    if kind == "attention_only":
        return plain_model(PlainConfig.attention_only(n_heads=2, n_kv_heads=2, d_model=8, d_head=4))
    return plain(kind) if kind in ("gpt2_like", "llama_like") else families.hooked(kind, torch.float64)


def one_row(model: Any, length: int = 6) -> Batch:
    return Batch.of(families.tokens(1, length) % model.info.d_vocab)


def prox(z: Tensor, y: Tensor, wrong: str = "") -> float:
    order = 2 if wrong == "L2 norms" else 1
    found = float(y.norm(order) - (y - z).norm(order))
    return abs(found) if wrong == "no clipping at 0" else max(0.0, found)


def whole_graph(model: Any, batch: Batch, wrong: str = "") -> dict[Place, dict[Edge, float]]:
    """The share of every part of every place, by the definition."""
    cache = model.run(batch, record=model.sites()).activations
    found: dict[Place, dict[Edge, float]] = {}
    for layer in range(model.info.n_layers):
        has_mlp = f"blocks.{layer}.hook_mlp_out" in model.sites()
        a, m = attention_parts(model, cache, layer), mlp_parts(model, cache, layer) if has_mlp else None
        u = a.values()[0]
        for i in range(batch.tokens.shape[1]):
            parts: dict[Edge, Tensor] = {}
            for j in range(batch.tokens.shape[1] if model.info.encoder else i + 1):
                for h in range(model.info.n_heads):
                    parts[layer, INTO[0], i, j, "attention", h] = a.pattern[0, h, i, j] * u[j, h]
            parts[layer, INTO[0], i, i, "residual", -1] = a.residual[0, i]
            parts[layer, INTO[0], i, i, "bias", -1] = a.bias[0, i]
            found[layer, INTO[0], i] = by_size(parts, a.whole[0, i], wrong)
            left = cache["resid_post", layer].values[0, i]
            parts = {(layer, INTO[1], i, i, "residual", -1): left}
            if m is not None:
                parts = {
                    (layer, INTO[1], i, i, "mlp", -1): m.written[0, i],
                    (layer, INTO[1], i, i, "residual", -1): m.residual[0, i],
                    (layer, INTO[1], i, i, "bias", -1): m.bias[0, i],
                }
            found[layer, INTO[1], i] = by_size(parts, left if m is None else m.whole[0, i], wrong)
    return found


def by_size(parts: dict[Edge, Tensor], y: Tensor, wrong: str) -> dict[Edge, float]:
    if wrong == "bias in no part":
        parts = {edge: z for edge, z in parts.items() if edge[4] != "bias"}
    if wrong == "stream left out":
        parts = {edge: z for edge, z in parts.items() if edge[4] != "residual" or len(parts) == 1}
    if wrong == "heads summed first":
        summed: dict[Edge, Tensor] = {}
        for edge, z in parts.items():
            summed[(*edge[:5], -1)] = summed.get((*edge[:5], -1), 0) + z
        parts = summed
    near = {edge: prox(z, y, wrong) for edge, z in parts.items() if edge[4] != "bias" or bool(z.any())}
    total = sum(near.values())
    if not total:
        return {edge: float(edge[4] == "residual") for edge in near}
    return {edge: value / total for edge, value in near.items()}


def below(edge: Edge, parallel: bool) -> Place | None:
    layer, into, _, key, kind, _ = edge
    if kind == "bias" or (into == INTO[0] and layer == 0) or (kind == "mlp" and parallel and layer == 0):
        return None
    if into == INTO[1] and not (kind == "mlp" and parallel):
        return layer, INTO[0], key
    return layer - 1, INTO[1], key


def reachable(graph: dict[Place, dict[Edge, float]], top: Place, threshold: float, parallel: bool) -> dict[Edge, float]:
    """The part of the thresholded graph that a path from the top leads to."""
    kept = {place: {e: w for e, w in edges.items() if w >= threshold} for place, edges in graph.items()}
    for place, edges in graph.items():
        if not kept[place]:
            largest = max(edges, key=lambda edge: edges[edge])
            kept[place] = {largest: edges[largest]}
    found, met, waiting = {}, {top}, [top]
    while waiting:
        for edge, weight in kept[waiting.pop()].items():
            found[edge] = weight
            place = below(edge, parallel)
            if place is not None and place not in met:
                met.add(place)
                waiting.append(place)
    return found


def edges_of(routes: Routes) -> dict[Edge, float]:
    names = ("layer", "into", "query", "key", "kind", "head", "weight")
    rows = zip(*(routes.column(name).tolist() for name in names), strict=True)
    return {(a, INTO[b], i, j, KINDS[k], h): w for a, b, i, j, k, h, w in rows}


def by_key(edges: dict[Edge, float]) -> dict[Edge, float]:
    """Shares summed over heads."""
    found: dict[Edge, float] = {}
    for edge, weight in edges.items():
        found[(*edge[:5], -1)] = found.get((*edge[:5], -1), 0.0) + weight
    return found


def assert_edges(found: dict[Edge, float], expected: dict[Edge, float]) -> None:
    assert found.keys() == expected.keys()
    values = [torch.tensor([edges[key] for key in expected], dtype=torch.float64) for edges in (found, expected)]
    torch.testing.assert_close(*values, rtol=0, atol=EXACT)


@pytest.mark.parametrize("kind", (*MODELS, "attention_only"))
def test_routes_are_what_the_top_reaches_of_the_thresholded_graph(kind: str) -> None:
    with families.widened():
        model = model_of(kind)
        batch = one_row(model)
        graph = whole_graph(model, batch)
        for position in (-1, 2):
            top = (model.info.n_layers - 1, INTO[1], position % 6)
            for threshold in THRESHOLDS:
                found = ma.information_flow_routes(model, batch, position=position, threshold=threshold)
                assert_edges(edges_of(found), reachable(graph, top, threshold, model.info.parallel))


@pytest.mark.parametrize(
    "wrong", ["bias in no part", "stream left out", "L2 norms", "no clipping at 0", "heads summed first"]
)
def test_routes_by_another_definition_are_told_apart(wrong: str) -> None:
    model = model_of("gpt2_like")
    batch = one_row(model)
    found = by_key(edges_of(ma.information_flow_routes(model, batch, threshold=0.0)))
    place = (1, INTO[0], 5)

    def told(wrong: str) -> None:
        """The last token's shares in what attention leaves, over heads together."""
        expected = by_key(whole_graph(model, batch, wrong)[place])
        assert_edges({edge: found[edge] for edge in expected}, expected)

    told("")
    with pytest.raises(AssertionError, match="not close"):
        told(wrong)


def test_an_mlp_beside_the_attention_reads_what_the_attention_reads() -> None:
    with families.widened():
        model = model_of("gpt_neox")
        batch = one_row(model)
        found, graph = ma.information_flow_routes(model, batch, position=2, threshold=0.5), whole_graph(model, batch)
        top = (model.info.n_layers - 1, INTO[1], 2)
        assert_edges(edges_of(found), reachable(graph, top, 0.5, True))
        with pytest.raises(AssertionError):  # as if the MLP came after the attention
            assert_edges(edges_of(found), reachable(graph, top, 0.5, False))


@pytest.mark.parametrize("kind", ["gpt2_like", "llama_like", "gemma2", "bert"])
@pytest.mark.parametrize("choice", [{}, {"compat": True}, {"neurons": True}, {"compat": True, "neurons": True}])
def test_the_shares_of_a_place_sum_to_1(kind: str, choice: dict[str, bool]) -> None:
    with families.widened():
        model = model_of(kind)
        frame = ma.information_flow_routes(model, one_row(model), threshold=0.0, **choice).to_pandas()
    sums = frame.groupby(["layer", "into", "query"])["weight"].sum()
    # compat counts a floor of 1e-5 for keys that cannot be seen, too: those are no edges
    torch.testing.assert_close(
        torch.tensor(sums.to_numpy()), torch.ones(len(sums), dtype=torch.float64),
        rtol=0, atol=1e-3 if "compat" in choice else 1e-14,
    )  # fmt: skip


def test_without_a_threshold_every_token_is_reached_by_every_head() -> None:
    model = model_of("llama_like")
    frame = ma.information_flow_routes(model, one_row(model), threshold=0.0).to_pandas()
    moved = frame[frame["kind"] == "attention"]
    assert len(moved[moved["layer"] == 1]) == 4 * 6  # the last token alone is looked at: heads times its keys
    assert len(moved[moved["layer"] == 0]) == 4 * (1 + 2 + 3 + 4 + 5 + 6)
    path = ma.information_flow_routes(model, one_row(model), threshold=1.0).to_pandas()
    assert not path.duplicated(["layer", "into", "query"]).any() and len(path) <= 4


def by_hand(
    parts: list[tuple[float, float]], passed: tuple[float, float], whole: tuple[float, float]
) -> AttentionParts:
    """One token, and a head for each part."""
    n = len(parts)
    return AttentionParts(
        torch.ones(1, n, 1, 1, dtype=torch.float64),
        torch.ones(1, 1, n, 1, dtype=torch.float64),
        torch.tensor(parts, dtype=torch.float64)[:, None],
        torch.tensor([[passed]], dtype=torch.float64),
        torch.zeros(1, 1, 2, dtype=torch.float64),
        torch.tensor([[whole]], dtype=torch.float64),
    )


def mlp_by_hand(written: float, passed: float, bias: float, whole: float) -> MlpParts:
    return MlpParts(*(torch.full((1, 1, 2), x, dtype=torch.float64) for x in (written, passed, bias, whole)))


NODE = torch.tensor([0])


def test_small_cases_by_hand() -> None:
    def close(found: shares.Shares, *expected: float, atol: float = 1e-15) -> None:
        torch.testing.assert_close(found.flat[0], torch.tensor(expected, dtype=torch.float64), rtol=0, atol=atol)

    close(shares.mlp_shares(mlp_by_hand(1, 0, 0, 1), 0, NODE), 1, 0, 0)
    collinear = by_hand([(1, 1), (2, 2)], (1, 1), (4, 4))
    close(shares.attention_shares(collinear, 0, NODE, 1), 0.25, 0.5, 0.25, 0)
    opposed = by_hand([(1, 1), (-1, 0)], (2, 1), (2, 2))
    close(shares.attention_shares(opposed, 0, NODE, 1), 0.4, 0, 0.6, 0)
    published = shares.attention_shares(opposed, 0, NODE, 1, compat=True)
    close(published, 0.4, 2e-6, 0.6, 0, atol=5e-6)  # known to five digits
    assert published.moved[0, 1, 0] > 0
    # nothing points the way of the sum: the stream counts as all of it, and the place is counted
    clipped = shares.mlp_shares(mlp_by_hand(-1, -1, 3, 1), 0, NODE)
    close(clipped, 0, 1, 0)
    assert clipped.clipped == 1 and published.clipped == 0


def test_a_head_that_writes_nothing_has_no_share() -> None:
    config = PlainConfig.gpt2_like(n_heads=2, n_kv_heads=2, d_model=8)
    whole = plain_model(config)
    w_o = whole.weight("blocks.0.attn.W_O").clone()
    w_o[1] = 0
    batch = one_row(whole)
    for model, silent in ((plain_model(config, {"blocks.0.attn.W_O": w_o}), True), (whole, False)):
        frame = ma.information_flow_routes(model, batch, threshold=0.0).to_pandas()
        written = frame[(frame["layer"] == 0) & (frame["head"] == 1)]["weight"]
        assert len(written) == 21 and bool((written == 0).all()) == silent


@pytest.mark.parametrize("kind", ["gpt2_like", "llama_like", "gemma2", "bert"])
def test_neurons_are_the_parts_of_an_mlp(kind: str) -> None:
    with families.widened():
        model = model_of(kind)
        batch = one_row(model)
        found = ma.information_flow_routes(model, batch, threshold=0.0, neurons=True).to_pandas()
        cache = model.run(batch, record=model.sites()).activations
        for layer in range(model.info.n_layers):
            parts = mlp_parts(model, cache, layer)
            neurons = shares.neuron_parts(model, cache, layer, parts)
            added = neurons.acts @ neurons.w_out + neurons.bias + parts.residual
            torch.testing.assert_close(added, parts.whole, rtol=0, atol=1e-10)  # float64 rounding of a norm's scale
            post = cache["mlp_post", layer].values
            without = added - neurons.bias if kind != "gemma2" else post @ model.weight(f"blocks.{layer}.mlp.W_out")
            with pytest.raises(AssertionError):  # b_out left out or, where there is none, the norm behind the MLP
                torch.testing.assert_close(without, parts.whole, rtol=0, atol=1e-10)
            y = parts.whole[0, 5]
            each = [prox(act * w, y) for act, w in zip(neurons.acts[0, 5], neurons.w_out, strict=True)]
            total = sum(each) + prox(parts.residual[0, 5], y) + prox(neurons.bias[0, 5], y)
            here = found[(found["layer"] == layer) & (found["into"] == INTO[1]) & (found["query"] == 5)]
            weights = torch.tensor(here[here["kind"] == "mlp"].sort_values("neuron")["weight"].to_numpy())
            torch.testing.assert_close(weights, torch.tensor(each, dtype=torch.float64) / total, rtol=0, atol=EXACT)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("gpt2_like")
    whole = ma.information_flow_routes(model, one_row(model), threshold=0.0, neurons=True)
    monkeypatch.setitem(shares._ENTRIES, "cpu", 50)  # one place and few keys or neurons at a time
    parts = ma.information_flow_routes(model, one_row(model), threshold=0.0, neurons=True)
    for name, table in whole.tensors.items():
        torch.testing.assert_close(parts.tensors[name].values, table.values, rtol=0, atol=EXACT)


@pytest.mark.parametrize("kind", ["gpt2_like", "gpt_neox", "attention_only"])
def test_a_graph_is_pruned_to_what_a_higher_threshold_gives(kind: str) -> None:
    with families.widened():
        model = model_of(kind)
        batch = Batch.of(families.tokens(3, 6) % model.info.d_vocab)
        low = ma.information_flow_routes(model, batch, threshold=0.01, top_k=5)
        for threshold in (0.01, 0.05, 0.3, 1.0):
            expected = ma.information_flow_routes(model, batch, threshold=threshold, top_k=5)
            found = low.prune(threshold)
            assert found.settings == expected.settings and found.to_pandas().equals(expected.to_pandas())
        assert low.prune(0.3).n_edges < low.n_edges
    with pytest.raises(SettingError, match=r"threshold=0.001\n  found: edges below 0.01 are gone\n  fix: extract"):
        low.prune(0.001)
    renormalised = ma.information_flow_routes(model, batch, renormalise=True)
    with pytest.raises(SettingError, match="found: renormalised weights"):
        renormalised.prune(0.5)


def test_merged_graphs_sum_heads_and_the_stream() -> None:
    model = model_of("gpt2_like")
    routes = ma.information_flow_routes(model, one_row(model), threshold=0.05)
    frame = routes.to_pandas()
    expected: dict[tuple[Any, ...], float] = {}
    for row in frame.itertuples():
        kind = "attention" if row.into == INTO[0] and row.kind == "residual" else row.kind
        edge = (row.layer, row.into, row.query, row.key, kind)
        expected[edge] = expected.get(edge, 0.0) + row.weight
    merged = routes.merged().to_pandas()
    columns = ["layer", "into", "query", "key", "kind"]
    assert set(map(tuple, merged[columns].to_numpy())) == expected.keys() and len(merged) == len(expected)
    for row in merged.itertuples():
        edge = (row.layer, row.into, row.query, row.key, row.kind)
        assert row.weight == pytest.approx(expected[edge], abs=1e-14)  # another order of two or three terms
    assert list(merged["layer"]) == sorted(merged["layer"], reverse=True)
    assert len(merged) < len(frame) and "head" not in merged


def test_renormalised_parts_that_are_kept_sum_to_1_and_top_k_are_the_largest() -> None:
    model = model_of("gpt2_like")
    raw = ma.information_flow_routes(model, one_row(model), threshold=0.04)
    again = ma.information_flow_routes(model, one_row(model), threshold=0.04, renormalise=True)
    place = ["layer", "into", "query"]
    kept, found = raw.to_pandas(), again.to_pandas()
    assert kept.drop(columns="weight").equals(found.drop(columns="weight"))
    whole = kept.groupby(place)["weight"].transform("sum")
    torch.testing.assert_close(
        torch.tensor(found["weight"].to_numpy()), torch.tensor((kept["weight"] / whole).to_numpy()), rtol=0, atol=1e-14
    )
    assert float(whole.min()) < 0.9  # something was dropped
    two = ma.information_flow_routes(model, one_row(model), threshold=0.0, top_k=2).to_pandas()
    full = ma.information_flow_routes(model, one_row(model), threshold=0.0).to_pandas()
    largest = full.groupby(place)["weight"].nlargest(2).groupby(place).sum()
    summed = two.groupby(place)["weight"].sum()
    assert (two.groupby(place).size() == 2).all()
    assert summed.to_dict() == pytest.approx(largest[summed.index].to_dict(), abs=1e-14)


def test_the_published_tool_sums_heads_before_its_threshold() -> None:
    model = model_of("gpt2_like")
    batch = one_row(model)
    for renormalise in (False, True):
        found = ma.information_flow_routes(
            model, batch, threshold=0.1, compat=True, renormalise=renormalise
        ).to_pandas()
        assert not (found["kind"] == "bias").any() and "head" not in found
        assert not ((found["kind"] == "residual") & (found["into"] == INTO[0])).any()
        cache = model.run(batch, record=model.sites()).activations
        a = attention_parts(model, cache, 1)
        y, u = a.whole[0, 5], a.values()[0]
        parts = [[a.pattern[0, h, 5, j] * u[j, h] for j in range(6)] for h in range(2)]
        near = [[max(1e-5, float(y.abs().sum() - (z - y + 1e-6).abs().sum())) for z in row] for row in parts]
        stream = max(1e-5, float(y.abs().sum() - (a.residual[0, 5] - y + 1e-6).abs().sum()))
        total = sum(map(sum, near)) + stream
        each = [[x / total for x in row] for row in near]
        stream /= total
        if renormalise:
            each = [[x if x >= 0.1 else 0.0 for x in row] for row in each]
            total = sum(map(sum, each)) + stream
            each, stream = [[x / total for x in row] for row in each], stream / total
        keys = [each[0][j] + each[1][j] + (stream if j == 5 else 0.0) for j in range(6)]
        expected = {j: w for j, w in enumerate(keys) if w >= 0.1}
        here = found[(found["layer"] == 1) & (found["into"] == INTO[0])]
        assert dict(zip(here["key"], here["weight"], strict=True)) == pytest.approx(expected, abs=EXACT)


def test_what_cannot_be_is_refused() -> None:
    model = model_of("gpt2_like")
    for given, text in (
        ({"threshold": 2}, r"threshold=2\n  found: no share of a whole\n  fix: give a number from 0 to 1"),
        ({"threshold": float("nan")}, "no share of a whole"),
        ({"threshold": True}, "no share of a whole"),
        ({"top_k": 0}, r"top_k=0\n  found: no number of edges\n  fix: give a whole number from 1, or None"),
        ({"position": 1.0}, r"position=1.0\n  found: float"),
    ):
        with pytest.raises(SettingError, match=text):
            ma.information_flow_routes(model, one_row(model), **given)
    experts = families.hooked("mixtral")
    with pytest.raises(UnsupportedFeatureError, match=r"experts in place of one MLP\n  fix: leave neurons=True out"):
        ma.information_flow_routes(experts, one_row(experts), neurons=True)
    with pytest.raises(UnsupportedFeatureError, match=r"found: no site blocks.0.mlp.hook_post"):
        ma.information_flow_routes(model_of("attention_only"), one_row(model), neurons=True)
    with pytest.raises(UnsupportedFeatureError, match="an encoder-decoder model"):
        ma.information_flow_routes(families.hooked("t5"), families.batch_of("t5", families.tokens()))
    routes = ma.information_flow_routes(model, one_row(model))
    with pytest.raises(SettingError, match=r"prompt 1\n  found: 1 prompts\n  fix: give a number from 0 to 0"):
        routes.prompt(1)
    with pytest.raises(AxisError, match="the edges of routes"):
        Routes({"weight": routes.tensors["weight"]}, settings=routes.settings)
    short = {**routes.tensors, "layer": Labelled(torch.zeros(1), ("edge",))}
    with pytest.raises(AxisError, match="give one entry an edge"):
        replace(routes, tensors=short)
    assert parse("blocks.0.hook_resid_mid")[0] == INTO[0] and parse("blocks.0.hook_resid_post")[0] == INTO[1]
