"""Integrated gradients on a path: completeness, a slow loop from the definition, linear networks, and wrong rules."""

from __future__ import annotations

from typing import Any

import families
import pytest
import torch
from patching_cases import plain

from mechattr.engines.paths import path_gradients
from mechattr.engines.quadrature import RULES, nodes
from mechattr.errors import SettingError, UnknownNameError
from mechattr.models import Batch
from mechattr.models.edits import Edit
from mechattr.models.operators import Set
from mechattr.models.plain import plain_model
from mechattr.models.plain_config import PlainConfig


def final_logit(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """The logit of a token of each row's own, after its last one."""
    rows = torch.arange(len(batch))
    return logits[rows, batch.columns(-1), 3 + batch.example]


def calm(kind: str) -> Any:
    """A network whose path does not pass near a length of zero, where norms bend it."""
    heads = {"n_kv_heads": 2} if kind == "llama_like" else {}
    model = plain_model(getattr(PlainConfig, kind)(d_model=32, **heads))
    weights = {n: x if "ln" in n or n == "embed.W_E" else 0.3 * x for n, x in model._weights.items()}
    return type(model)(model.config, weights)


def batch_of(model: Any, side: str = "right") -> Batch:
    ragged = families.ragged(side)
    return Batch.of(ragged.tokens % model.info.d_vocab, ragged.mask)


def by_loop(
    model: Any, batch: Batch, baseline: torch.Tensor, points: Any, weights: Any, site: str = "hook_embed"
) -> torch.Tensor:
    """The definition, one row, one step and one forward pass at a time."""
    found = torch.zeros(*batch.tokens.shape, model.info.d_model, dtype=torch.float64)
    for i in range(len(batch)):
        one = Batch(
            batch.tokens[i, batch.mask[i]][None], torch.ones(1, int(batch.lengths[i])).bool(), torch.tensor([i])
        )
        x = model.run(one, record=site).activations[site].values.double()
        b = baseline.double().expand(x.shape)
        total = torch.zeros_like(x)
        for alpha, weight in zip(points, weights, strict=True):
            edit = Edit(site, Set(b + alpha * (x - b)))
            total += weight * model.run(one, edits=[edit], metric=final_logit, gradients=site).gradients[site].values
        found[i, batch.mask[i]] = ((x - b) * total)[0]
    return found


@pytest.mark.parametrize("kind", ["gpt2_like", "llama_like"])
def test_attributions_sum_to_the_change_and_are_their_definition(kind: str) -> None:
    model = calm(kind)
    batch = batch_of(model)
    found = path_gradients(model, batch, final_logit, batch_size=7)
    assert float((found.gap / found.change).abs().max()) < 1e-6  # 20 Gauss-Legendre points on a smooth path
    mean = model.weight("embed.W_E").mean(0)
    points, weights = nodes("gauss_legendre", 20)
    expected = by_loop(model, batch, mean, points, weights)
    torch.testing.assert_close(found.attributions, expected, rtol=0, atol=1e-10)  # float64, other order of sums
    ends = model.run(batch, metric=final_logit).metric
    edit = Edit("embed", Set(torch.where(batch.mask[..., None], mean, model.weight("embed.W_E")[batch.tokens])))
    assert ends is not None
    torch.testing.assert_close(found.change, ends - model.run(batch, edits=[edit], metric=final_logit).metric)
    assert found.passes == (22 * len(batch), 20 * len(batch)) and not bool(found.attributions[~batch.mask].any())
    points, weights = nodes("trapezoid", 20)
    x = model.weight("embed.W_E")[batch.tokens]
    wrong = {
        "weights that sum to 1 - 1/n": by_loop(model, batch, mean, points, 0.95 * weights),
        "baseline forgotten": torch.where(batch.mask[..., None], expected / (x - mean) * x, 0.0),
    }
    for name, bad in wrong.items():
        assert float(((bad.flatten(1).sum(1) - found.change) / found.change).abs().max()) > 1e-2, name


@pytest.mark.parametrize("rule", RULES)
def test_a_linear_network_is_exact_by_every_rule(rule: str) -> None:
    model = plain("linear")
    batch = batch_of(model)
    found = path_gradients(model, batch, final_logit, rule=rule, steps=3)
    torch.testing.assert_close(found.gap, torch.zeros(len(batch)).double(), rtol=0, atol=1e-12)  # float64
    points, weights = nodes(rule, 3)
    wrong = by_loop(
        model, batch, model.weight("embed.W_E").mean(0), points, weights * (1 - 1 / 3)
    )  # their sum is not 1
    assert float((wrong.flatten(1).sum(1) - found.change).abs().max()) > 1e-3


def test_rows_padding_and_batches_do_not_matter() -> None:
    model = calm("llama_like")
    right, left = batch_of(model), batch_of(model, "left")
    a = path_gradients(model, right, final_logit, steps=5, baseline=7)
    b = path_gradients(model, left, final_logit, steps=5, baseline=7, batch_size=3)
    torch.testing.assert_close(a.attributions[right.mask], b.attributions[left.mask], rtol=0, atol=1e-10)  # float64
    fixed = torch.zeros_like(right.mask)
    fixed[:, 0] = True
    kept = path_gradients(model, right, final_logit, steps=20, fixed=fixed)
    assert not bool(kept.attributions[:, 0].any()) and float((kept.gap / kept.change).abs().max()) < 1e-6
    same = path_gradients(model, right, final_logit, steps=5, baseline=model.weight("embed.W_E")[7])
    assert torch.equal(same.attributions, a.attributions)


def test_short_rows_run_without_the_columns_of_long_ones() -> None:
    model = calm("llama_like")
    batch, widths = batch_of(model), []

    def counting(logits: torch.Tensor, rows: Batch) -> torch.Tensor:
        widths.append(logits.shape[1])
        return final_logit(logits, rows)

    found = path_gradients(model, batch, counting, steps=5, baseline=7, batch_size=5)
    assert widths[-len(batch) :] == sorted(batch.lengths.tolist())  # five steps of one row each, the shortest first
    together = path_gradients(model, batch, counting, steps=5, baseline=7, batch_size=100)
    assert widths[-1] == batch.tokens.shape[1]  # the control: all rows in one pass need all columns
    torch.testing.assert_close(found.attributions, together.attributions, rtol=0, atol=1e-10)  # float64


def test_other_sites_have_paths_too() -> None:
    model = calm("gpt2_like")
    batch = batch_of(model)
    site = "blocks.1.hook_resid_pre"
    baseline = torch.linspace(-1, 1, model.info.d_model)
    found = path_gradients(model, batch, final_logit, site=site, baseline=2 * baseline)
    points, weights = nodes("gauss_legendre", 20)
    expected = by_loop(model, batch, 2 * baseline, points, weights, site)
    torch.testing.assert_close(found.attributions, expected, rtol=0, atol=1e-10)  # float64


def test_steps_double_until_the_gap_is_small_and_only_where_it_is_not() -> None:
    model = calm("llama_like")
    batch = batch_of(model)
    once = path_gradients(model, batch, final_logit, steps=2, tolerance=0.999)
    assert once.steps.tolist() == [2, 2, 2]
    found = path_gradients(model, batch, final_logit, steps=2, tolerance=1e-7, max_steps=64)
    assert float((found.gap / found.change).abs().max()) < 1e-7 and int(found.steps.max()) > 2
    assert found.passes[1] < 3 * (2 + 4 + 8 + 16 + 32 + 64)
    with pytest.warns(UserWarning, match=r"integrated gradients of . of 3 rows miss up to .*% of the change"):
        path_gradients(model, batch, final_logit, steps=2, tolerance=1e-9, max_steps=4)
    with pytest.warns(UserWarning, match="another baseline"):
        path_gradients(model, batch, final_logit, baseline="zero", rule="midpoint", steps=4)  # rms at zero


def test_batches_shrink_when_memory_runs_out() -> None:
    model = calm("gpt2_like")
    batch = batch_of(model)
    expected = path_gradients(model, batch, final_logit, steps=5)

    class Small:
        """A model that holds two rows at once."""

        def __getattr__(self, name: str) -> Any:
            return getattr(model, name)

        def run(self, part: Batch, **asked: Any) -> Any:
            if len(part) > 2:
                raise RuntimeError("out of memory")
            return model.run(part, **asked)

    found = path_gradients(Small(), batch, final_logit, steps=5)  # type: ignore[arg-type]
    torch.testing.assert_close(found.attributions, expected.attributions, rtol=0, atol=1e-12)  # float64


def test_wrong_settings_are_refused() -> None:
    model = calm("gpt2_like")
    batch = batch_of(model)
    cases: list[tuple[type[Exception], dict[str, Any], str]] = [
        (
            UnknownNameError,
            {"baseline": "maen"},
            "baseline='maen'\n  found: no such baseline\n  fix: did you mean 'mean'",
        ),
        (UnknownNameError, {"rule": "simpson"}, "rule 'simpson'"),
        (SettingError, {"baseline": 10**6}, "ids from 0 to"),
        (SettingError, {"baseline": torch.ones(3)}, r"a baseline of shape \[3\]"),
        (SettingError, {"site": "resid_pre"}, "2 sites of that name"),
        (SettingError, {"site": "blocks.0.hook_resid_pre"}, "no embeddings are there"),
        (SettingError, {"tolerance": 2}, "tolerance=2\n  found: no share"),
        (SettingError, {"steps": 0}, "steps=0"),
        (SettingError, {"batch_size": 0}, "batch_size=0"),
        (SettingError, {"fixed": torch.ones(2)}, r"fixed of shape \[2\]"),
    ]
    for kind, settings, text in cases:
        with pytest.raises(kind, match=text):
            path_gradients(model, batch, final_logit, **settings)
