"""LRP against a network whose rules are written out, and its account (E6, E7, E17, E18)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from typing import Any

import families
import pytest
import torch
from lrp_reference import Reference
from torch import Tensor

import mechattr as ma
from mechattr.decomposition import Decomposition, account, relevance
from mechattr.errors import AnswerError, SelfCheckError, SettingError, UnknownNameError, UnsupportedFeatureError
from mechattr.models import Batch, HookedHF, PlainConfig, Rules, plain_model
from mechattr.models.plain import HookedPlain
from mechattr.models.taps import Taps

CONFIGS = {
    "gpt2_like": PlainConfig.gpt2_like(),
    "llama_like": PlainConfig.llama_like(),
    "one_head": PlainConfig.gpt2_like(n_heads=1, n_kv_heads=1),
    "one_kv_head": PlainConfig.llama_like(n_kv_heads=1),
}
IDS = torch.tensor([3, 14, 15, 9, 26, 5])
LRP = import_module("mechattr.decomposition.lrp")
VARIANTS = pytest.mark.parametrize("variant", ["cp", "attn"])
# float64 rounding of logits of about ten and sums of a few thousand products
EXACT, LEDGER = 1e-12, 1e-11


def close(found: Tensor, expected: Tensor, atol: float = LEDGER) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


def without_biases(config: PlainConfig) -> HookedPlain:
    """A network of random weights whose biases are all zero."""
    drawn = plain_model(config)._weights
    return plain_model(config, {n: torch.zeros_like(w) for n, w in drawn.items() if ".b" in n})


def explain(model: Any, ids: Tensor = IDS, **settings: Any) -> Decomposition:
    return ma.lrp(model, Batch.of(ids), **{"target": 5, "foil": 7, **settings})


def closes(result: Decomposition, atol: float = LEDGER) -> None:
    """The components are the logit, and what the stream holds at each cut is what was not taken above it."""
    (logit,) = result.settings["logit"]
    total = result.components.values.sum()
    close(total, torch.tensor(logit, dtype=total.dtype), atol)
    sides = result.tensors["conservation"]
    close(sides.sel(side="relevance").values, sides.sel(side="accounted").values, atol)


# -- against the definition


@VARIANTS
@pytest.mark.parametrize("kind", CONFIGS)
def test_relevance_is_that_of_the_rules_written_out(kind: str, variant: str) -> None:
    model = plain_model(CONFIGS[kind])
    wanted = Reference(model, IDS, 5, 7, variant)
    result = explain(model, variant=variant, sites="resid_pre")
    close(torch.tensor(result.settings["logit"][0], dtype=torch.float64), wanted.logit)
    close(result.tokens.values[0], wanted.streams[0])
    close(result.tensors["score/embed"].values[0], wanted.tokens)
    if "score/pos_embed" in result.tensors:
        close(result.tensors["score/pos_embed"].values[0], wanted.positions)
    close(result.scores["resid_pre"].values[0], torch.stack(wanted.streams))
    names = result.components.coords["component"]
    component = {name: result.components.sel(component=name).values[0] for name in names}
    for name, bias in wanted.biases.items():
        close(component.get(name, torch.zeros((), dtype=torch.float64)), bias)
    for layer, leak in enumerate(wanted.leaks):
        close(component[f"blocks.{layer}.attn.softmax_leak"], leak)
    entry = {name: result.ledger.sel(entry=name).values[0] for name in result.ledger.coords["entry"]}
    assert list(entry) == ["tokens", "positions", "biases", "softmax_leak", "logit", "residual"]
    close(entry["tokens"] + entry["positions"], wanted.streams[0].sum())
    close(entry["biases"], torch.stack(list(wanted.biases.values())).sum())
    close(entry["softmax_leak"], sum(wanted.leaks, start=torch.zeros((), dtype=torch.float64)))
    assert entry["softmax_leak"].abs() > 0.05 if variant == "attn" else entry["softmax_leak"] == 0
    closes(result)


@pytest.mark.parametrize("wrong", ["variants exchanged", "another target", "one token more"])
def test_another_relevance_is_told_apart(wrong: str) -> None:
    """The control of the test above."""
    model = plain_model(CONFIGS["llama_like"])
    variant, target = "cp" if "variants" in wrong else "attn", 6 if "target" in wrong else 5
    ids = torch.cat([IDS[:1], IDS]) if "more" in wrong else IDS
    expected = Reference(model, ids, target, 7, variant).streams[0][-len(IDS) :]
    with pytest.raises(AssertionError):
        close(explain(model, variant="attn").tokens.values[0], expected)


# -- the account


def test_without_biases_the_tokens_and_every_cut_are_the_logit() -> None:
    result = explain(without_biases(CONFIGS["llama_like"]), sites="resid_pre")
    logit = torch.tensor(result.settings["logit"][0], dtype=torch.float64)
    assert result.components.coords["component"] == ("tokens", "embed.rest", "unembed.b_U")
    close(result.tokens.values.sum(), logit, EXACT)
    for sums in (result.scores["resid_pre"].values[0].sum(-1), result.tensors["conservation"].values[0]):
        close(sums, logit.expand_as(sums), EXACT)


class OneNormFull(HookedPlain):
    """A network one of whose norms no rule reaches."""

    def _norm(self, name: str, site: str, x: Tensor, taps: Taps) -> Tensor:
        if name != "blocks.1.ln2.":
            return super()._norm(name, site, x, taps)
        before, taps.rules = taps.rules, replace(taps.rules, norm="full")
        try:
            return super()._norm(name, site, x, taps)
        finally:
            taps.rules = before


@contextmanager
def rules(monkeypatch: pytest.MonkeyPatch, **changed: Any) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setitem(LRP.RULES, "cp", lambda: replace(Rules.cp_lrp(), **changed))
        yield


def test_the_account_rejects_what_is_no_lrp(monkeypatch: pytest.MonkeyPatch) -> None:
    model = plain_model(CONFIGS["gpt2_like"])
    closes(explain(model))
    monkeypatch.setattr(account, "_BROKEN", torch.inf)  # the check at run time, which has a test of its own
    broken = OneNormFull(model.config, model._weights)
    with pytest.raises(AssertionError):  # a rule missing on one norm
        closes(explain(broken))
    for changed in ({"norm": "full"}, {"activation": "full"}, {"v_factor": 0.5}):
        with rules(monkeypatch, **changed), pytest.raises(AssertionError):
            closes(explain(model))
    for short in ("v", "attn_out", "mlp_out"):
        with monkeypatch.context() as patch, pytest.raises(AssertionError):  # a bias dropped
            patch.delitem(relevance._ENTERS, short)
            closes(explain(model))


@pytest.mark.parametrize("changed", [{"v_factor": 1.0}, {"qk_factor": 0.5}, {"temperature": 2.0}])
def test_a_leak_that_is_no_softmax_is_told_apart(changed: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    """The account measures leaks as what is missing behind a pattern, whatever the rule; only the definition tells."""
    model = plain_model(CONFIGS["llama_like"])
    leaks = torch.stack(Reference(model, IDS, 5, 7, "attn").leaks)

    def found() -> Tensor:
        result = explain(model, variant="attn")
        names = [f"blocks.{layer}.attn.softmax_leak" for layer in range(2)]
        return result.components.sel(component=names).values[0]

    close(found(), leaks)
    monkeypatch.setitem(LRP.RULES, "attn", lambda: replace(Rules.attn_lrp(), **changed))
    with pytest.raises(AssertionError):
        close(found(), leaks)


def test_a_value_bias_counted_twice_is_rejected() -> None:
    result = explain(plain_model(CONFIGS["gpt2_like"]))
    again = result.components.sel(component="blocks.0.attn.b_V").values
    with pytest.raises(AssertionError):
        close(result.components.values.sum(1) + again, torch.tensor(result.settings["logit"], dtype=torch.float64))


def test_a_model_that_the_rules_miss_is_refused() -> None:
    model = plain_model(CONFIGS["llama_like"])
    broken = OneNormFull(model.config, model._weights, name="odd")
    found = "tokens, positions, biases and leaks miss .* of a logit of .*"
    text = rf"LRP of 'odd' \(plain\)\n  found: {found}\n  fix: the rules miss"
    with pytest.raises(SelfCheckError, match=text):
        explain(broken)


# -- relevance inside


@VARIANTS
@pytest.mark.parametrize("kind", ["gpt2_like", "llama_like"])
def test_relevance_inside_is_what_goes_through(kind: str, variant: str) -> None:
    sites = ("z", "v", "rot_q", "rot_k", "mlp_pre", "mlp_post", "attn_out", "mlp_out", "resid_mid", "ln_final")
    result = explain(plain_model(CONFIGS[kind]), variant=variant, sites=sites)
    score = {name: table.values[0] for name, table in result.scores.items()}
    assert result.scores["z"].axes == ("batch", "layer", "pos", "head")
    assert result.scores["v"].axes == ("batch", "layer", "pos", "kv_head")
    assert result.scores["mlp_post"].axes == ("batch", "layer", "pos", "neuron")
    assert result.scores["ln_final"].axes == ("batch", "pos")
    assert sorted(result.settings["sites"]) == sorted(sites)

    def part(name: str) -> Tensor:
        names = [f"blocks.{layer}.{name}" for layer in range(2)]
        known = result.components.coords["component"]
        return torch.stack(
            [result.components.sel(component=n).values[0] if n in known else score["z"].new_zeros(()) for n in names]
        )

    close(score["attn_out"].sum(1), score["z"].sum((1, 2)) + part("attn.b_O"))
    close(score["mlp_out"].sum(1), score["mlp_post"].sum((1, 2)) + part("mlp.b_out"))
    through = sum(score[short].sum((1, 2)) for short in ("v", "rot_q", "rot_k"))
    close(score["z"].sum((1, 2)), through + part("attn.softmax_leak"))
    if kind == "gpt2_like":
        close(score["mlp_pre"], score["mlp_post"])  # the identity rule passes all on
    elif variant == "cp":
        assert not score["mlp_pre"].any()  # the gate
    assert score["rot_q"].any() == (variant == "attn")


# -- several targets


@VARIANTS
@pytest.mark.parametrize("kind", ["gpt2_like", "gpt2", "bert"])
def test_several_targets_of_one_prompt_are_what_each_gives_alone(kind: str, variant: str) -> None:
    model = plain_model(CONFIGS[kind]) if kind in CONFIGS else families.hooked(kind)
    atol = LEDGER if kind in CONFIGS else 1e-5  # float32: logits of about ten
    targets, foils = [5, 6, 9, 5], [7, 8, 7, 8]
    settings: dict[str, Any] = {"variant": variant, "sites": ("z", "q")}
    together = explain(model, target=targets, foil=foils, **settings)
    assert together.tokens.axes == ("target", "pos") and together.scores["z"].axes[:2] == ("target", "layer")
    assert together.settings["target_ids"] == targets and len(together.strings) == 1
    shared = 1.0 if kind != "bert" else 4.0
    assert together.passes == (shared, 4.0)
    for other in (
        explain(model, target=targets, foil=foils, targets_at_once=3, **settings),
        explain(model, target=targets, foil=foils, checkpoint=True, **settings),
    ):
        for name, table in together.tensors.items():
            close(other.tensors[name].values, table.values, atol)
    for i, (target, foil) in enumerate(zip(targets, foils, strict=True)):
        alone = explain(model, target=target, foil=foil, **settings)
        for name, table in alone.tensors.items():
            close(together.tensors[name].sel(target=i).values, table.values[0], atol)
    with pytest.raises(AssertionError):  # control: another row's target
        close(together.tokens.sel(target=1).values, explain(model, target=5, foil=7, **settings).tokens.values[0], atol)
    one_foil = explain(model, target=[5, 6], **settings)
    close(one_foil.tokens.sel(target=0).values, together.tokens.sel(target=0).values, atol)
    frame = one_foil.to_pandas()
    assert list(frame.columns) == ["target", "pos", "token", "value"] and len(frame) == 2 * len(IDS)
    assert "<table" in one_foil._repr_html_()


def test_one_text_with_a_list_of_one_target_has_the_axis() -> None:
    model = ma.load("tiny")
    text = "When Mary and John went to the store"
    assert ma.lrp(model, text, target=[" Mary"]).tokens.axes == ("target", "pos")
    assert ma.lrp(model, text, target=" Mary", foil=[" John", " the"]).tokens.axes == ("target", "pos")
    assert ma.lrp(model, [text], target=[" Mary"]).tokens.axes == ("batch", "pos")
    assert ma.lrp(model, text, target=" Mary").tokens.axes == ("pos",)


def test_nodes_are_those_of_the_sites_that_were_asked_for() -> None:
    model, text = ma.load("tiny"), "When Mary and John went to the store"
    result = ma.lrp(model, text, target=" Mary", sites="z")
    table = result.scores["z"].values
    layer, pos, head = (int(i) for i in torch.unravel_index(table.argmax(), table.shape))
    best = ma.Node("z", layer, pos=pos, head=head)
    assert result.top(1) == [best] and result.value(best) == table.max()
    assert len(result.nodes()) == table.numel()  # and not the tokens' embeddings, which hold the same relevance again
    plain_result = ma.lrp(model, text, target=" Mary")
    direct = ma.direct_logit_attribution(model, text, target=" Mary")  # heads, and the same heads by source token
    for other, tables in ((plain_result, "tokens, score/embed"), (direct, "components, score/heads")):
        for ask in (lambda other=other: other.top(3), other.nodes):
            with pytest.raises(SettingError, match=f"nodes of a decomposition\n  found: .*{tables}"):
                ask()


def test_blocks_computed_again_change_nothing() -> None:
    model = families.hooked("llama")
    again, once = (explain(model, checkpoint=c, variant="attn", sites="z") for c in (True, False))
    for name, table in once.tensors.items():
        close(again.tensors[name].values, table.values, 0.0)
    assert (again.passes, once.passes) == ((2.0, 1.0), (1.0, 1.0))


# -- what must not matter


def heads_permuted(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    order = torch.tensor([2, 0, 3, 1])
    return {n: w[order] if ".attn." in n and not n.endswith("b_O") else w for n, w in weights.items()}


def norms_scaled(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Norm weights and biases times 3, and what reads them divided by 3."""
    new = dict(weights)
    for n, w in weights.items():
        if ".ln1." in n or ".ln2." in n or n.startswith("ln_final"):
            new[n] = 3 * w
        elif n.endswith(("W_Q", "W_K", "W_V", "mlp.W_in", "W_U")):
            new[n] = w / 3
    return new


def norms_scaled_alone(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The control: nothing that reads the norms makes up for it."""
    return {n: 3 * w if ".ln1." in n else w for n, w in weights.items()}


def heads_permuted_alone(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The control: values go with the output of another head."""
    return {n: w[torch.tensor([2, 0, 3, 1])] if n.endswith("W_V") else w for n, w in weights.items()}


@VARIANTS
@pytest.mark.parametrize("change", [heads_permuted, norms_scaled])
def test_equal_functions_have_equal_token_scores(
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]], variant: str
) -> None:
    model = plain_model(CONFIGS["gpt2_like"])
    first = explain(model, variant=variant).tokens.values
    same = HookedPlain(model.config, change(model._weights))
    close(explain(same, variant=variant).tokens.values, first, 1e-10)
    control = norms_scaled_alone if change is norms_scaled else heads_permuted_alone
    other = HookedPlain(model.config, control(model._weights))
    with pytest.raises(AssertionError):
        close(explain(other, variant=variant).tokens.values, first, 1e-10)


# -- edges


@VARIANTS
@pytest.mark.parametrize("kind", CONFIGS)
def test_nothing_is_divided_by_zero(kind: str, variant: str) -> None:
    model = plain_model(CONFIGS[kind])
    silent = {n: w * 0 for n, w in model._weights.items() if "mlp.W_in" in n or "mlp.b_in" in n or "W_gate" in n}
    silent |= {n: w * 0 for n, w in model._weights.items() if "b_gate" in n}
    for quiet in (model, plain_model(model.config, silent)):
        for ids in (IDS, IDS[:1]):
            result = explain(quiet, ids, variant=variant, sites=("mlp_pre", "z"))
            assert all(bool(table.values.isfinite().all()) for table in result.tensors.values())
            closes(result)


@VARIANTS
def test_an_encoder_hands_back_through_its_head(variant: str) -> None:
    for kind in ("bert", "modernbert"):
        result = explain(families.hooked(kind), variant=variant)
        closes(result, 1e-5)  # float32: logits of about ten
        assert result.settings["explains"] == "the logit" and "head" in result.components.coords["component"]


@VARIANTS
def test_what_an_encoder_s_head_takes_is_its_biases(variant: str) -> None:
    with_biases, without = families.model("bert"), families.model("bert")
    with torch.no_grad():
        for name, parameter in without.named_parameters():
            if name.startswith("cls.") and name.endswith("bias"):
                parameter.zero_()
    found = [explain(HookedHF(m), variant=variant).components for m in (without, with_biases)]
    head = [table.sel(component="head").values for table in found]
    close(head[0], torch.zeros(1), 1e-5)  # float32
    assert head[1].abs() > 0.1  # the control


@VARIANTS
def test_a_mixture_of_experts_hands_all_of_it_back(variant: str) -> None:
    for kind in ("mixtral", "qwen2_moe", "olmoe"):
        result = explain(families.hooked(kind), variant=variant)
        closes(result, 1e-5)  # float32
        close(result.ledger.sel(entry="experts").values, torch.zeros(1), 1e-5)
    with pytest.raises(UnsupportedFeatureError, match="they do not reach the gate inside each expert"):
        explain(families.hooked("gpt_oss"), variant=variant)


@VARIANTS
def test_what_the_rules_of_linear_layers_take_is_an_entry(variant: str) -> None:
    model = without_biases(CONFIGS["llama_like"])
    plain, gamma = explain(model, variant=variant), explain(model, variant=variant, gamma=0.25)
    close(gamma.ledger.sel(entry="linear").values, torch.zeros(1, dtype=torch.float64))  # without biases it conserves
    with pytest.raises(AssertionError):
        close(gamma.tokens.values, plain.tokens.values, 0.01)
    taken = {}
    for epsilon in (1e-6, 1e-3):
        result = explain(model, variant=variant, epsilon=epsilon)
        taken[epsilon] = float(result.ledger.sel(entry="linear").values.abs())
        closes(result)
    assert 0 < taken[1e-6] < 1e-3 < 100 * taken[1e-3]
    assert result.settings["rules"]["linear_epsilon"] == 1e-3
    with pytest.raises(SettingError, match="linear_gamma=-1"):
        explain(model, gamma=-1)


def test_capped_logits_are_explained_before_their_cap() -> None:
    model = families.hooked("gemma2")
    result = explain(model)
    assert result.settings["explains"] == "the logit before any cap"
    run = model.run(Batch.of(IDS), record="ln_final")
    before = run.activations["ln_final"].values[0, -1] @ model.weight("unembed.W_U")
    found = torch.tensor(result.settings["logit"])
    close(found, (before[5] - before[7])[None], 1e-5)  # float32
    with pytest.raises(AssertionError):  # the control: behind the cap
        close(found, (run.logits[0, -1, 5] - run.logits[0, -1, 7])[None], 1e-5)


def test_bfloat16_says_what_it_is_good_for() -> None:
    small = HookedHF(families.model("llama", torch.bfloat16))
    result = explain(small)
    assert result.settings["notes"] == ["bfloat16: good for rankings; the account closes to two digits"]
    assert result.tokens.values.dtype == torch.float32
    assert explain(families.hooked("llama")).settings["notes"] == []


def test_wrong_input_is_refused_with_words() -> None:
    model = plain_model(CONFIGS["gpt2_like"])
    with pytest.raises(UnsupportedFeatureError, match=r"LRP in float16\n  found: gradients overflow.*\n  fix: load"):
        explain(plain_model(CONFIGS["gpt2_like"], dtype="float16"))
    with pytest.raises(UnknownNameError, match="variant 'atn'\n  found: no such variant\n  fix: did you mean 'attn'"):
        explain(model, variant="atn")
    for site in ("pattern", "ln1_scale"):
        with pytest.raises(SettingError, match=r"relevance of blocks.0.*\n  found: patterns pass on.*\n  fix: ask for"):
            explain(model, sites=site)
    with pytest.raises(SettingError, match="targets_at_once=0\n  found: no count\n  fix: give a whole number from 1"):
        explain(model, target=[5, 6], targets_at_once=0)
    with pytest.raises(SettingError, match="foils\n  found: 2 for 3 prompts"):
        explain(model, target=[5, 6, 9], foil=[7, 8])
    with pytest.raises(SettingError, match="targets\n  found: 0 for 1 prompts"):
        explain(model, target=[])
    with pytest.raises(AnswerError, match="token 7"):
        explain(model, target=[5, 7])
    with pytest.raises(UnsupportedFeatureError, match="an encoder-decoder model"):
        ma.lrp(families.hooked("t5"), families.batch_of("t5", families.tokens()), target=5)
