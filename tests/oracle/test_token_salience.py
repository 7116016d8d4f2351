"""DecompX, GlobEnc, rollout and norms against slow definitions (E8, E18)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import families
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import mechattr as ma
from mechattr.artifact import Cache
from mechattr.decomposition import decompx, decompx_vectors, lengths, prompt_of, readout, target_of
from mechattr.decomposition.lengths import MATRICES, sites_of
from mechattr.errors import SelfCheckError, SettingError, UnknownNameError, UnsupportedFeatureError
from mechattr.models import Batch, PlainConfig, plain_model
from mechattr.models.norms import Norm

IDS = torch.tensor([[3, 14, 15, 9, 26, 5]])
PLAIN = {"gpt2_like": PlainConfig.gpt2_like(), "llama_like": PlainConfig.llama_like()}
EXACT = 1e-12  # float64 rounding of sums of a few thousand products of size one
ROOT = 1e-7  # a root of a sum whose products cancel down to rounding


def close(found: Tensor, expected: Tensor, atol: float = EXACT) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


def model_of(kind: str) -> Any:
    return plain_model(PLAIN[kind]) if kind in PLAIN else families.hooked(kind, torch.float64)


# -- DecompX


@pytest.mark.parametrize("kind", [*PLAIN, "gpt2", "llama", "gpt_neox", "qwen3", "gemma2", "bert"])
def test_vectors_add_up_to_the_stream_at_every_stage(kind: str) -> None:
    with families.widened():
        model, batch = model_of(kind), Batch.of(IDS)
        n = model.info.n_layers
        vectors = decompx_vectors(model, batch, layers=range(n + 1), at_once=4)
        assert vectors.axes == ("batch", "layer", "source", "pos", "d_model") and vectors.coords["source"][-1] == "bias"
        run = model.run(batch, record=("resid_pre", "resid_post")).activations
        streams = torch.stack([*run["resid_pre"].values, run["resid_post"].values[-1]], 1)
        close(vectors.values.sum(2), streams, 1e-10)  # streams of size ten, and norms of transformers
        whole = decompx_vectors(model, batch, layers=range(n + 1)).values
        close(whole, vectors.values)
        if not model.info.encoder:  # what comes later has no part in what is before
            assert not vectors.values[:, :, 3, :3].any() and vectors.values[:, :, 3, 3:].any()


@pytest.mark.parametrize("kind", PLAIN)
def test_read_out_they_are_the_relevance_of_cp_lrp(kind: str) -> None:
    model, batch = model_of(kind), Batch.of(IDS)
    prompt = prompt_of(model, batch)
    target = target_of(model, prompt, 5, 7)
    last = model.run(batch, record="resid_post").activations["resid_post", model.info.n_layers - 1].values
    read = readout(model, target, target.at(last))
    shares = read.of(decompx_vectors(model, batch).values[:, 0, :, -1])
    found = ma.lrp(model, batch, target=5, foil=7)
    close(shares[:, :-1], found.tokens.values)
    (logit,) = found.settings["logit"]
    close(shares.sum(1) + read.norm_bias + read.head_bias, torch.tensor([logit], dtype=torch.float64))
    names = [name for name in found.components.coords["component"] if str(name).startswith("blocks.")]
    close(shares[:, -1], found.components.sel(component=names).values.sum(1))
    with pytest.raises(AssertionError):  # control: relevance through the pattern
        close(shares[:, :-1], ma.lrp(model, batch, target=5, foil=7, variant="attn").tokens.values)


def to_all_sources(self: Any, name: str, vectors: Tensor, whole: Tensor, affine: bool) -> Tensor:
    """A wrong norm: its bias given to every source."""
    return RIGHT(self, name, vectors, whole, True)


def own_scale(self: Any, name: str, vectors: Tensor, whole: Tensor, affine: bool) -> Tensor:
    """A wrong norm: each vector divided by its own scale."""
    norm: Norm = self.model.norm(name)
    y = norm.centre(vectors) / norm.scale(vectors)[..., None] * norm.weight
    return y + norm.bias if affine else y


RIGHT = decompx._Frozen.norm


@pytest.mark.parametrize("wrong", [to_all_sources, own_scale])
def test_vectors_that_do_not_add_up_are_refused(wrong: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decompx._Frozen, "norm", wrong)
    text = r"vectors of 'plain' \(plain\)\n  found: they miss .* of the stream\n  fix: a part of this model"
    with pytest.raises(SelfCheckError, match=text):
        decompx_vectors(model_of("gpt2_like"), Batch.of(IDS))


def test_a_silent_neuron_is_no_division_by_zero() -> None:
    model = model_of("gpt2_like")
    silent = {name: w * 0 for name, w in model._weights.items() if "mlp.W_in" in name or "mlp.b_in" in name}
    vectors = decompx_vectors(plain_model(PLAIN["gpt2_like"], silent), Batch.of(IDS)).values
    assert vectors.isfinite().all()


def test_texts_and_padding_of_vectors() -> None:
    model = families.hooked("llama")
    for side in ("left", "right"):
        whole = decompx_vectors(model, families.ragged(side))
        for row, length in enumerate((7, 4, 5)):
            alone = decompx_vectors(model, families.alone(families.ragged(side), row)).values[0]
            found = whole.values[row][:, [*range(length), 7]]
            close(found[:, :, :length], alone, 1e-5)  # float32
            assert found[:, :, length:].isnan().all()
    assert decompx_vectors(ma.load("tiny"), "When Mary").axes == ("layer", "source", "pos", "d_model")


# -- matrices


def slow_parts(model: Any, cache: Cache, layer: int) -> tuple[Tensor, Tensor]:
    """What each head moves from each position to each other, and the stream: [batch, head, query, key, d_model]."""
    v = cache["v", layer].values
    w_o = model.weight(f"blocks.{layer}.attn.W_O")
    v = v.repeat_interleave(len(w_o) // v.shape[2], 2)
    moved = torch.einsum("bhqk,bkhe,hem->bhqkm", cache["pattern", layer].values, v, w_o)
    return moved, cache["resid_pre", layer].values


def linear(norm: Norm, x: Tensor, whole: Tensor, *, real: bool = True) -> Tensor:
    """A norm's linear part, with the scale of `whole` at the query; or, wrongly, of each part."""
    scale = norm.scale(whole)[:, :, None, None] if real else norm.scale(x)[..., None]
    return norm.centre(x) * norm.weight / scale


def slow(model: Any, cache: Cache, layer: int, kind: str, *, residual: bool = True, real: bool = True) -> Tensor:
    """A matrix from its definition, with a vector for each pair of positions."""
    if kind == "rollout":
        pattern = cache["pattern", layer].values
        return 0.5 * pattern.mean(1) + 0.5 * torch.eye(pattern.shape[-1], dtype=pattern.dtype)
    moved, x = slow_parts(model, cache, layer)
    if kind == "heads":
        return moved.norm(dim=-1).sum(1)
    parts = moved.sum(1)
    if kind == "sum":
        return parts.norm(dim=-1)
    if residual:
        parts = parts + torch.eye(x.shape[1], dtype=x.dtype)[..., None] * x[:, :, None]
    if kind == "residual" or not model.info.post_norm:
        return parts.norm(dim=-1)
    p, out = f"blocks.{layer}.", cache["attn_out", layer].values
    first, second = model.norm(p + "ln1_post"), model.norm(p + "ln2_post")
    parts = linear(first, parts, x + out)
    if kind == "globenc":
        parts = linear(second, parts, first(x + out) + cache["mlp_out", layer].values, real=real)
    return parts.norm(dim=-1)


@pytest.mark.parametrize("chunk", [1, 2**24])
@pytest.mark.parametrize("kind", MATRICES)
@pytest.mark.parametrize("name", ["gpt2_like", "llama_like", "bert"])
def test_matrices_are_those_of_the_definition(
    name: str, kind: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lengths, "_CHUNK", chunk)
    with families.widened():
        model = model_of(name)
        sites = {"pattern", "v", "resid_pre", "attn_out", "mlp_out"}
        cache = model.run(Batch.of(IDS), record=sorted(sites)).activations
        some = model.run(Batch.of(IDS), record=sites_of(model, kind)).activations
        for layer in range(model.info.n_layers):
            found = MATRICES[kind](model, some, layer)
            close(found, slow(model, cache, layer, kind), ROOT)
            if kind in ("residual", "norm", "globenc"):
                with pytest.raises(AssertionError):  # control: without what passes by
                    close(found, slow(model, cache, layer, kind, residual=False), ROOT)
            if kind == "globenc" and name == "bert":
                with pytest.raises(AssertionError):  # control: each part divided by its own scale
                    close(found, slow(model, cache, layer, kind, real=False), ROOT)


@pytest.mark.parametrize(
    "settings", [{"method": "rollout"}, {"method": "globenc"}, {"method": "globenc", "normalise": True}]
)
def test_tokens_are_a_row_of_the_product(settings: dict[str, Any]) -> None:
    model = model_of("gpt2_like")
    found = ma.token_salience(model, Batch.of(IDS), layers=True, position=4, **settings)
    low, high = found.scores["layers"].values[0]
    close((high @ low)[4], found.tokens.values[0], 1e-9)  # lengths of size a hundred
    with pytest.raises(AssertionError):  # control: multiplied the other way round
        close((low @ high)[4], found.tokens.values[0], 1e-9)
    if settings.get("normalise") or settings["method"] == "rollout":
        close(high.sum(-1), torch.ones_like(high[0]))
        close(found.tokens.values.sum(), torch.ones((), dtype=torch.float64))
    assert not found.tokens.values[0, 5:].any() and (found.tokens.values >= 0).all()


def test_what_holds_no_stream_is_averaged() -> None:
    model = model_of("gpt2_like")
    for parts in ("heads", "sum"):
        found = ma.token_salience(model, Batch.of(IDS), method="norms", parts=parts, layers=True)
        assert found.settings["aggregate"] == "mean" and found.settings["parts"] == parts
        close(found.scores["layers"].values[0].mean(0)[-1], found.tokens.values[0])
    asked = ma.token_salience(model, Batch.of(IDS), method="norms", parts="sum", aggregate="rollout", layers=True)
    low, high = asked.scores["layers"].values[0]
    close((high @ low)[-1], asked.tokens.values[0], 1e-9)


class Largest(TorchDispatchMode):
    """The largest number of entries of any tensor that is made."""

    entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.untyped_storage().nbytes() > 0:
            self.entries = max(self.entries, out.untyped_storage().nbytes() // out.element_size())
        return out


@pytest.mark.parametrize("kind", ["heads", "sum", "norm", "globenc"])
def test_no_vector_is_formed_for_a_pair_of_positions(kind: str) -> None:
    length, model = 128, plain_model(PlainConfig.gpt2_like(n_ctx=128, d_model=64, d_head=16))
    batch = Batch.of(torch.arange(length) % 31)
    cache = model.run(batch, record=sites_of(model, kind)).activations
    with Largest() as fast:
        MATRICES[kind](model, cache, 0)
    with Largest() as naive:
        slow(model, cache, 0, "sum")
    assert fast.entries <= 4 * length**2 < 64 * length**2 <= naive.entries  # heads, d_model


# -- the public function


def test_decompx_is_the_size_of_shares() -> None:
    model = model_of("llama_like")
    found, shares = (
        ma.token_salience(model, Batch.of(IDS), method="decompx", target=5, foil=7),
        ma.lrp(model, Batch.of(IDS), target=5, foil=7),
    )
    close(found.tokens.values, shares.tokens.values.abs(), 0.0)
    close(found.scores["share"].values, shares.tokens.values, 0.0)
    close(found.ledger.values, shares.ledger.values, 0.0)
    free = ma.token_salience(model, Batch.of(IDS), method="decompx", position=2)
    vectors = decompx_vectors(model, Batch.of(IDS)).values[0, 0, :-1, 2]
    close(free.tokens.values[0], vectors.norm(dim=-1))
    assert free.passes == (7.0, 0.0)


def test_wrong_input_is_refused_with_words() -> None:
    model, batch = model_of("gpt2_like"), Batch.of(IDS)
    with pytest.raises(UnknownNameError, match=r"method 'glob'\n  found: no such one\n  fix: did you mean 'globenc'"):
        ma.token_salience(model, batch, method="glob")
    with pytest.raises(UnknownNameError, match=r"parts 'head'\n  found: no such one\n  fix: did you mean 'heads'"):
        ma.token_salience(model, batch, method="norms", parts="head")
    with pytest.raises(UnknownNameError, match=r"aggregate 'sum'\n  found: no such one\n  fix: choose one of"):
        ma.token_salience(model, batch, aggregate="sum")
    with pytest.raises(SettingError, match=r"a target of token_salience\n  found: rollout follows how.*\n  fix: leave"):
        ma.token_salience(model, batch, method="rollout", target=5)
    with pytest.raises(SettingError, match=r"a foil of token_salience\n  found: no target\n  fix: give target"):
        ma.token_salience(model, batch, method="decompx", foil=5)
    for layers in ([3], [], [True], [-1]):
        with pytest.raises(SettingError, match=r"layers=.*\n  found: blocks 0 to 1, 2 behind the last\n  fix: name"):
            decompx_vectors(model, batch, layers=layers)
    with pytest.raises(SettingError, match=r"at_once=0\n  found: no count"):
        decompx_vectors(model, batch, at_once=0)
    with pytest.raises(UnsupportedFeatureError, match=r"vectors of .*\n  found: its MLPs are mixtures of experts"):
        decompx_vectors(families.hooked("mixtral"), batch)
