"""Reading, patching and differentiating a site are one causal node: finite differences at all sites of all families."""

from __future__ import annotations

from collections.abc import Mapping

import families
import pytest
import torch

from mechattr.models import Add, Batch, Edit, HookedModel, PlainConfig, Rules, Set, plain_model, taps
from mechattr.sites import parse

every_family = pytest.mark.parametrize("family", families.EVERY)
STEP = 1e-3  # in units of the direction's length; Richardson leaves an error of its fourth power
# Richardson's error is of order 1e-12, rounding of order 1e-12 / STEP, and curvature of sharp softmaxes adds the rest
TOLERANCE = 1e-4


def disagreements(model: HookedModel, batch: Batch, gradient_of: Mapping[str, str] | None = None) -> dict[str, float]:
    """|finite difference - gradient . direction| / size, by site, for a random linear metric of all logits.

    All perturbations of all sites are rows of one batch. `gradient_of` takes a site's gradient from another one.
    """
    sites, rows = model.sites(), len(batch)
    run = model.run(batch, record=sites, metric=families.probe, gradients=sites)
    generator, edits, slopes = torch.Generator().manual_seed(5), [], []
    for i, name in enumerate(sites):
        x, gradient = run.activations[name].values, run.gradients[(gradient_of or {}).get(name, name)].values
        noise = torch.randn(x.shape, generator=generator, dtype=x.dtype)
        if name.endswith("attn_scores"):
            noise = noise * (x > -1e30)  # masked entries are as negative as the dtype goes
        direction = noise / noise.norm() + gradient / gradient.norm().clamp(min=1e-12)
        slopes.append((direction * gradient).sum())
        for j, step in enumerate((STEP, -STEP, STEP / 2, -STEP / 2)):
            first = (4 * i + j) * rows
            edits.append(Edit(name, Add(step * direction), rows=range(first, first + rows)))
    many = batch.rows(list(range(rows)) * (4 * len(sites)))
    value = model.run(many, edits=edits, metric=families.probe).metric.view(len(sites), 4, rows).sum(2)
    wide, narrow = (value[:, 0] - value[:, 1]) / (2 * STEP), (value[:, 2] - value[:, 3]) / STEP
    measured, claimed = (4 * narrow - wide) / 3, torch.stack(slopes)
    size = torch.maximum(measured.abs(), claimed.abs()).clamp(min=1e-6)
    return dict(zip(sites, ((measured - claimed).abs() / size).tolist(), strict=True))


@every_family
def test_finite_differences_agree_with_the_gradient_at_every_site(family):
    with families.widened():
        batch = families.batch_of(family, families.tokens(2, 6))
        found = disagreements(families.hooked(family, torch.float64), batch)
    assert max(found.values()) < TOLERANCE, {name: e for name, e in found.items() if e >= TOLERANCE}


@pytest.mark.parametrize("kind", ["gpt2_like", "llama_like", "attention_only", "linear"])
def test_finite_differences_agree_on_the_plain_backend(kind):
    found = disagreements(plain_model(getattr(PlainConfig, kind)()), Batch.of(families.tokens(2, 6) % 31))
    assert max(found.values()) < TOLERANCE, {name: e for name, e in found.items() if e >= TOLERANCE}


def test_control_the_gradient_of_a_shared_tensor_fails(monkeypatch):
    """Without an autograd node of its own a site gets the gradient of whatever uses the same tensor."""
    monkeypatch.setattr(taps, "_node", lambda x, *_: x)
    with families.widened():
        found = disagreements(families.hooked("llama", torch.float64), Batch.of(families.tokens(2, 6)))
    assert found["blocks.0.hook_resid_mid"] > 0.1


def test_control_the_gradient_of_a_neighbouring_site_fails():
    wrong = {"blocks.0.hook_resid_pre": "blocks.0.ln1.hook_out", "blocks.0.hook_attn_out": "blocks.0.ln2.hook_out"}
    with families.widened():
        found = disagreements(families.hooked("gpt2", torch.float64), Batch.of(families.tokens(2, 6)), wrong)
    assert min(found[name] for name in wrong) > 0.1


@pytest.mark.parametrize("rules", [None, Rules(norm="frozen"), Rules(hold=frozenset({0})), Rules(hold=frozenset({1}))])
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
def test_visited_gradients_are_the_stored_ones(rules, frozen):
    model, batch = families.hooked("llama"), families.ragged("left")
    sites = ("q", "k", "v", "z", "mlp_post", "resid_mid")
    model.model.requires_grad_(not frozen)
    stored = model.run(batch, record=sites, metric=families.probe, gradients=sites, rules=rules)
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    visited = model.run(
        batch, metric=families.probe, gradients=sites, rules=rules, visit=lambda n, x, g: seen.__setitem__(n, (x, g))
    )
    model.model.requires_grad_(True)
    assert not visited.gradients
    for name, gradient in stored.gradients.items():
        if name in seen:
            assert torch.equal(seen[name][0], stored.activations[name].values)
            assert torch.equal(seen[name][1], gradient.values), name
        else:
            assert not gradient.values.any(), name
    held = {f"blocks.{layer}.attn.hook_z" for layer in (rules.hold if rules else ())}
    assert {name for name in stored.gradients if parse(name)[0] == "z"} - set(seen) == held


@pytest.mark.parametrize("visiting", [False, True])
def test_sites_without_influence_have_gradient_zero(visiting):
    model, batch = families.hooked("gpt2"), Batch.of(families.tokens())
    cut = Edit("resid_post", Set(torch.randn(24)), layers=[0])  # nothing of the first block is left
    seen: dict[str, torch.Tensor] = {}
    visit = (lambda n, x, g: seen.__setitem__(n, g)) if visiting else None
    for frozen in (False, True):
        model.model.requires_grad_(not frozen)
        run = model.run(batch, edits=[cut], metric=families.probe, gradients="z", visit=visit)
        found = seen if visiting else {name: x.values for name, x in run.gradients.items()}
        assert visiting or not found["blocks.0.attn.hook_z"].any()
        assert "blocks.0.attn.hook_z" not in seen
        assert found["blocks.1.attn.hook_z"].abs().max() > 0.1
        first = model.run(batch, metric=lambda logits, b: logits[:, 0, 0], gradients="z").gradients
        assert not any(x.values[:, 1:].any() for x in first.values())  # no later position reaches the first logits
        assert all(x.values[:, 0].any() for x in first.values())
    model.model.requires_grad_(True)


def test_gradients_do_not_depend_on_which_other_sites_are_asked_for():
    model, batch = families.hooked("gemma2"), families.ragged("right")
    alone = model.run(batch, metric=families.probe, gradients="z").gradients
    sites = [name for name in model.sites() if parse(name)[0] not in ("attn_scores", "pattern", "result", "resid_mid")]
    together = model.run(batch, metric=families.probe, gradients=sites).gradients
    for name in alone:
        # the scale sites add an exact zero to each norm, whose gradients cancel up to float32 rounding
        torch.testing.assert_close(together[name].values, alone[name].values, rtol=1e-4, atol=1e-5)
