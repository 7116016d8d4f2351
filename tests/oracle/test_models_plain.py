"""The plain network, transformers' families and the weights by name tell one story."""

from __future__ import annotations

import families
import pytest
import torch

from mechattr.errors import SettingError, UnknownNameError
from mechattr.models import Add, Batch, Edit, HookedHF, PlainConfig, Rules, plain_copy, plain_model


def close(found: torch.Tensor, wanted: torch.Tensor, relative: float) -> None:
    """Equal up to `relative` of the largest entry, masked scores aside."""
    wanted, found = wanted.where(wanted > -1e30, 0), found.where(wanted > -1e30, 0)
    torch.testing.assert_close(found, wanted, rtol=0, atol=relative * max(1.0, float(wanted.abs().max())))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("rules", [None, Rules(norm="frozen"), Rules(hold=frozenset({0, 1}))])
def test_the_plain_copy_equals_transformers_site_by_site(family, rules):
    with families.widened():
        model, batch = HookedHF(families.model(family, torch.float64)), families.ragged("left")
        copied = plain_copy(model)
        sites = copied.sites()
        assert set(sites) == set(model.sites())
        edits = [Edit("z", Add(0.3), heads=[1], positions=[-1]), Edit("resid_mid", Add(0.1), positions=[1])]
        one, two = (
            m.run(batch, record=sites, edits=edits, metric=families.probe, gradients=sites, rules=rules)
            for m in (model, copied)
        )
    real = batch.mask
    tolerance = 1e-10 if family == "gpt2" else 1e-5  # all float64, but for Llama's rotary frequencies in transformers
    close(two.logits[real], one.logits[real], tolerance)
    for name in sites:
        for first, second in ((one.activations, two.activations), (one.gradients, two.gradients)):
            a, b = first[name].values, second[name].values
            a, b = (x.movedim(2, 1)[real] if "query" in first[name].axes else x[real] for x in (a, b))
            close(b, a, tolerance)


def test_control_another_rotary_base_is_seen():
    model, batch = families.hooked("llama"), Batch.of(families.tokens())
    config = PlainConfig.of(model)
    changed = plain_copy(model)
    changed.config = PlainConfig(**{n: getattr(config, n) for n in config.__slots__} | {"rope_theta": 500.0})
    with pytest.raises(AssertionError):
        close(changed.run(batch).logits, model.run(batch).logits.double(), 1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["gpt2_like", "llama_like", "attention_only", "linear"])
def test_a_padded_batch_gives_what_its_rows_give_alone(kind, side):
    model, batch = plain_model(getattr(PlainConfig, kind)(d_vocab=61)), families.ragged(side)
    sites = model.sites()
    together = model.run(batch, record=sites, metric=families.probe, gradients=sites)
    for row in range(3):
        real = batch.mask[row]
        alone = model.run(Batch.of(batch.tokens[row, real]), record=sites, metric=families.probe, gradients=sites)
        close(together.logits[row, real], alone.logits[0], 1e-10)  # float64
        for name in sites:
            for whole, single in ((together.activations, alone.activations), (together.gradients, alone.gradients)):
                part = whole[name].values[row]
                part = part[:, real][:, :, real] if "query" in whole[name].axes else part[real]
                close(part, single[name].values[0], 1e-10)  # float64


def expanded(model, repeat):
    """The same network with a key and value head for every query head."""
    names = {f"blocks.{i}.attn.{m}_{w}" for i in range(2) for m in "Wb" for w in "KV"}
    weights = {n: repeat(w) if n in names else w for n, w in model._weights.items()}
    return plain_model(PlainConfig.llama_like(n_kv_heads=4), weights)


def test_grouped_query_attention_equals_full_attention_with_expanded_weights():
    grouped, batch = plain_model(PlainConfig.llama_like()), Batch.of(families.tokens() % 31)
    full = expanded(grouped, lambda w: w.repeat_interleave(2, 0))
    sites = ("z", "pattern", "v")
    one, two = (m.run(batch, record=sites, metric=families.probe, gradients=sites) for m in (grouped, full))
    close(two.logits, one.logits, 1e-10)  # float64
    for layer in range(2):
        close(two.activations["z", layer].values, one.activations["z", layer].values, 1e-10)
        shared = two.gradients["v", layer].values.unflatten(2, (2, 2)).sum(3)  # a shared head gets both gradients
        close(shared, one.gradients["v", layer].values, 1e-10)
    wrong = expanded(grouped, lambda w: w.repeat(2, *[1] * (w.ndim - 1)))  # control: heads dealt in turn
    with pytest.raises(AssertionError):
        close(wrong.run(batch).logits, one.logits, 1e-5)


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "mistral"])
def test_softcap_and_window_equal_transformers(family):
    """Asking for scores takes the explicit path; the window of 4 is shorter than the prompt of 7."""
    model, batch = families.hooked(family), Batch.of(families.tokens())
    with torch.no_grad():
        own = model.model(batch.tokens).logits
    run = model.run(batch, record=("attn_scores", "pattern"))
    close(run.logits, own, 1e-5)  # float32
    pattern = run.activations["pattern", 0].values
    assert not pattern.tril(-4).any()
    assert pattern.tril(-3).any()
    torch.testing.assert_close(pattern.sum(-1), torch.ones(3, 4, 7), rtol=0, atol=1e-5)  # float32
    if family == "gemma2":
        scores = run.activations["attn_scores", 0].values
        assert scores.abs().where(scores > -1e30, 0).max() <= 3.0  # the softcap
    plain = dict(families.configs())[family]
    for option, value in (("sliding_window", 64), ("attn_logit_softcapping", None)):  # controls
        if getattr(plain, option, None) is not None:
            other = families.model(family)
            setattr(other.config, option, value)
            changed = type(other)(other.config).eval()
            changed.load_state_dict(other.state_dict())
            with torch.no_grad():
                assert (changed(batch.tokens).logits - own).abs().max() > 1e-3


def test_unknown_weights_are_refused():
    for model in (families.hooked("gpt2"), plain_model(PlainConfig())):
        for name in ("blocks.0.attn.W_X", "blocks.9.attn.W_Q", "W_E"):
            with pytest.raises(UnknownNameError, match="this model has no such weight"):
                model.weight(name)
    with pytest.raises(
        UnknownNameError, match=r"weight 'blocks.0.attn.W_q'.*\n.*\n  fix: did you mean .*'blocks.0.attn.W_Q'"
    ):
        families.hooked("gpt2").weight("blocks.0.attn.W_q")


@pytest.mark.parametrize("family", families.FAMILIES)
def test_rules_never_change_the_forward_pass(family):
    model, batch = families.hooked(family), families.ragged("right")
    plain = model.run(batch, metric=families.probe, gradients="embed")
    for rules in (Rules(norm="frozen"), Rules(hold=frozenset({0})), Rules(norm="frozen", hold=frozenset({0, 1}))):
        ruled = model.run(batch, metric=families.probe, gradients="embed", rules=rules)
        assert torch.equal(ruled.logits[batch.mask], plain.logits[batch.mask])
        assert not torch.equal(ruled.gradients["embed"].values, plain.gradients["embed"].values)


def test_rules_on_a_network_worked_out_by_hand():
    """One block, one position: attention copies v, so the whole backward pass fits in a few lines."""
    config = PlainConfig(n_layers=1, n_heads=1, n_kv_heads=1, d_head=16, activation="identity", positions="none")
    model, batch = plain_model(config), Batch.of(torch.tensor([[3]]))
    w = {n.removeprefix("blocks.0."): t for n, t in model._weights.items()}
    x = w["embed.W_E"][3].clone().requires_grad_(True)
    target = torch.randn(31, dtype=torch.float64)

    def norm(x, name, frozen):
        centred = x - x.mean()
        scale = (centred.pow(2).mean() + 1e-5).sqrt()
        return centred / (scale.detach() if frozen else scale) * w[f"{name}.w"] + w[f"{name}.b"]

    for frozen in (False, True):
        for hold in (False, True):
            v = norm(x, "ln1", frozen) @ w["attn.W_V"][0] + w["attn.b_V"][0]
            attn = v @ w["attn.W_O"][0] + w["attn.b_O"]
            mid = x + (attn.detach() if hold else attn)
            mlp = norm(mid, "ln2", frozen) @ w["mlp.W_in"] + w["mlp.b_in"]
            mlp = mlp @ w["mlp.W_out"] + w["mlp.b_out"]
            logits = norm(mid + (mlp.detach() if hold else mlp), "ln_final", frozen) @ w["unembed.W_U"]
            (by_hand,) = torch.autograd.grad(logits @ target, x)
            rules = Rules(norm="frozen" if frozen else "full", hold=frozenset({0}) if hold else frozenset())
            run = model.run(batch, metric=lambda out, b: out[:, 0] @ target, gradients="embed", rules=rules)
            close(run.gradients["embed"].values[0, 0], by_hand, 1e-12)  # float64


@pytest.mark.parametrize("family", ["mistral", "gemma2"])
def test_only_gpt2_and_llama_have_a_plain_copy(family):
    with pytest.raises(SettingError, match=r"copy a GPT-2 or a Llama with default attention scaling"):
        plain_copy(families.hooked(family))


def test_weights_by_hand_are_checked():
    config = PlainConfig()
    with pytest.raises(UnknownNameError, match=r"weight 'blocks\.0\.attn\.W_q'"):
        plain_model(config, {"blocks.0.attn.W_q": torch.zeros(1)})
    with pytest.raises(SettingError, match="norm='none of them'"):
        PlainConfig(norm="none of them")
    with pytest.raises(SettingError, match="let kv heads divide heads"):
        PlainConfig(n_kv_heads=3)
    zeros = plain_model(config, {"unembed.W_U": torch.zeros(16, 31), "unembed.b_U": torch.zeros(31)})
    assert not zeros.run(Batch.of(torch.tensor([[1, 2]]))).logits.any()
