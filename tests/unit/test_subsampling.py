"""Difference in means: its distribution on synthetic models whose effects are known."""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from scipy.stats import norm
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mechattr.engines.subsampling import Contrast, Moments, Split, contrast, draw, planned_looks
from mechattr.patching.sampling import CHUNK, Sampling

ALPHA = 0.05
THETA = 1.0
REPEATS = 700
# Three standard deviations of a binomial share.
SLACK = 3 * math.sqrt(ALPHA * (1 - ALPHA) / REPEATS)

Miss = Callable[[Split], bool]


def samples(seed: int, m: int, p: float, n: int = 20, loud: float = 0.0, rare: float = 0.0) -> tuple[Tensor, Tensor]:
    """An additive model: node 0 is planted with effect THETA, the others are small; `loud` is the standard deviation
    that node 0 adds to the noise. With `rare`, one more node that is not covered has that effect."""
    generator = torch.Generator().manual_seed(seed)
    effects = 0.05 * torch.randn(n, generator=generator, dtype=torch.float64)
    effects[0] = THETA
    chosen = torch.rand(m, n, generator=generator) < p
    noise = torch.randn(m, generator=generator, dtype=torch.float64)
    values = chosen.double() @ effects + (0.2 + chosen[:, 0] * loud) * noise
    return chosen, values + rare * (torch.rand(m, generator=generator) < p)


def split(seed: int, m: int, p: float, **settings: Any) -> Split:
    return Split.of(*samples(seed, m, p, **settings))


def miss_rate(miss: Miss, **settings: Any) -> float:
    return sum(miss(split(seed, **settings)) for seed in range(REPEATS)) / REPEATS


def bound_below(found: Split) -> bool:
    """theta* < THETA."""
    return bool(contrast([found]).upper(ALPHA).max() < THETA)


def welch(found: Split) -> Contrast:
    """Each group with its own variance."""
    high, low = found.inside, found.outside
    parts = high.variance / high.count, low.variance / low.count
    error = (parts[0] + parts[1]).sqrt()
    size = (high.mean - low.mean).abs()
    return Contrast(size, size, error, error**4 / (parts[0] ** 2 / (high.count - 1) + parts[1] ** 2 / (low.count - 1)))


def normal_quantile(found: Split) -> bool:
    """Wrong: a normal quantile in place of Student's t."""
    now = welch(found)
    return bool((now.size + float(norm.isf(ALPHA)) * now.error).nan_to_num(math.inf).max() < THETA)


def pooled_variance(found: Split) -> bool:
    """Wrong: one variance for both groups."""
    high, low = found.inside, found.outside
    dof = high.count + low.count - 2
    error = ((high.squares + low.squares) / dof * (1 / high.count + 1 / low.count)).sqrt()
    size = (high.mean - low.mean).abs()
    return bool(Contrast(size, size, error, dof).upper(ALPHA).max() < THETA)


def own_variance(found: Split) -> bool:
    """Wrong: the variance of the smaller group as it is, though that group has not seen what is rare."""
    return bool(welch(found).upper(ALPHA).nan_to_num(math.inf).max() < THETA)


def product_of_p(found: Split) -> bool:
    """Wrong: the nodes' p values multiplied as if each were a test of the same hypothesis."""
    return bool(contrast([found]).tail(THETA).prod() < ALPHA)


MANY = {"m": 300, "p": 0.1}
LOUD = {"m": 300, "p": 0.1, "loud": 1.0}
RARE = {"m": 1500, "p": 0.02, "n": 2, "rare": 20.0}  # 0.6 times together with node 0
FEW = {"m": 40, "p": 0.1, "n": 2}  # four inclusions


@pytest.mark.parametrize(
    ("settings", "least"),
    [(MANY, ALPHA / 3), (LOUD, ALPHA / 3), (FEW, 0), (RARE, 0)],  # a bound that is never exceeded is not calibrated
)
def test_the_bound_is_calibrated(settings: dict[str, Any], least: float) -> None:
    assert least <= miss_rate(bound_below, **settings) <= ALPHA + SLACK


@pytest.mark.parametrize(
    ("wrong", "settings"), [(normal_quantile, FEW), (pooled_variance, LOUD), (product_of_p, MANY), (own_variance, RARE)]
)
def test_wrong_bounds_are_not_calibrated(wrong: Miss, settings: dict[str, Any]) -> None:
    assert miss_rate(wrong, **settings) > ALPHA + SLACK


def strata(seed: int) -> list[Split]:
    """Three strata in which the planted effect is +THETA, -THETA and +THETA."""
    found = []
    for i, sign in enumerate((1, -1, 1)):
        chosen, values = samples(3 * seed + i, 200, 0.1)
        found.append(Split.of(chosen, sign * values))
    return found


def test_the_bound_over_strata_is_calibrated_for_effects_of_opposite_sign() -> None:
    splits = [strata(seed) for seed in range(REPEATS)]
    right = [bool(contrast(found).upper(ALPHA).max() < THETA) for found in splits]
    assert ALPHA / 3 <= sum(right) / REPEATS <= ALPHA + SLACK
    wrong = []
    for found in splits:  # wrong: the absolute value after the mean
        now = contrast(found)
        wrong.append(bool(Contrast(now.signed.abs(), now.signed, now.error, now.dof).upper(ALPHA).max() < THETA))
    assert sum(wrong) / REPEATS > ALPHA + SLACK


def stops_below(seed: int, looks: list[int], level: float) -> bool:
    """Whether one of the looks finds a bound below THETA."""
    chosen, values = samples(seed, looks[-1], 0.1)
    found = (contrast([Split.of(chosen[:look], values[:look])]) for look in looks)
    return any(bool(now.upper(level).max() < THETA) for now in found)


def test_planned_looks_share_the_error_probability() -> None:
    looks = planned_looks(640, 0.1)
    assert looks == [80, 160, 320, 640]
    repeats = range(REPEATS // 2)
    slack = SLACK * math.sqrt(2)
    assert sum(stops_below(seed, looks, ALPHA / len(looks)) for seed in repeats) / len(repeats) <= ALPHA + slack
    # wrong: the whole error probability at each look
    assert sum(stops_below(seed, looks, ALPHA) for seed in repeats) / len(repeats) > ALPHA + slack


def test_looks_wait_for_inclusions() -> None:
    assert planned_looks(3000, 0.01) == [1500, 3000]
    assert planned_looks(100, 0.01) == [100]
    assert len(planned_looks(10**6, 0.5)) == 6


def test_the_estimate_is_unbiased_and_its_width_falls_with_the_root() -> None:
    found = [contrast([split(seed, 200, 0.1)]) for seed in range(400)]
    estimates = torch.stack([now.signed[0] for now in found])
    assert abs(float(estimates.mean()) - THETA) < 4 * float(estimates.std()) / 20  # four standard errors of 400
    widths = []
    for m in (1600, 25600):
        now = contrast([split(0, m, 0.1)])
        widths.append(float((now.upper(ALPHA) - now.size).mean()))
    assert widths[0] / widths[1] == pytest.approx(4, rel=0.1)  # estimated variances fluctuate, t falls


def test_a_control_variate_narrows_the_estimate_and_keeps_it_unbiased() -> None:
    guess = torch.full((20,), 0.01, dtype=torch.float64)
    guess[0] = 0.9 * THETA
    right, wrong, errors = [], [], []
    for seed in range(200):
        chosen, values = samples(seed, 200, 0.1)
        found = [Split.of(chosen, values - chosen.double() @ guess)]
        now = contrast(found, offset=guess[None])
        right.append(float(now.signed[0]))
        errors.append(float(now.error[1:].mean() / contrast([Split.of(chosen, values)]).error[1:].mean()))
        wrong.append(float(contrast(found).signed[0]))  # wrong: the estimate is not added again
    tolerance = 4 * float(torch.tensor(right).std()) / math.sqrt(200)  # four standard errors
    assert abs(sum(right) / 200 - THETA) < tolerance < abs(sum(wrong) / 200 - THETA)
    assert max(errors) < 0.9


def closed_forms(t: float) -> dict[int, float]:
    """P(T >= t) of Student's t with 1 to 4 degrees of freedom."""
    return {
        1: 0.5 - math.atan(t) / math.pi,
        2: 0.5 - t / (2 * math.sqrt(2 + t * t)),
        3: 0.5 - (t / (math.sqrt(3) * (1 + t * t / 3)) + math.atan(t / math.sqrt(3))) / math.pi,
        4: 0.5 - 0.375 * t / math.sqrt(1 + t * t / 4) * (1 - t * t / (1 + t * t / 4) / 12),
    }


# Quantiles as tables of the distribution print them: (dof, upper tail) -> t.
TABLE = {(10, 0.05): 1.8124611228, (30, 0.01): 2.4572615424, (5, 0.025): 2.5705818356, (100, 0.05): 1.6602343261}


def unit_contrast(dof: float) -> Contrast:
    return Contrast(*torch.tensor([[0.0], [0.0], [1.0], [dof]], dtype=torch.float64))


def test_student_t() -> None:
    for t in (-1.5, 0.0, 0.3, 1.0, 2.7, 11.0):
        for dof, p in closed_forms(t).items():
            assert float(unit_contrast(dof).tail(t)) == pytest.approx(p, abs=1e-12)
            if 0 < p < 0.5:
                assert float(unit_contrast(dof).upper(p)) == pytest.approx(t, rel=1e-10)
    for (dof, p), t in TABLE.items():
        assert float(unit_contrast(dof).upper(p)) == pytest.approx(t, abs=1e-10)
        assert float(unit_contrast(dof).tail(t)) == pytest.approx(p, abs=1e-10)
        assert float(norm.isf(p)) != pytest.approx(t, abs=1e-3)  # wrong: the normal quantile


def test_p_values_and_bounds_are_inverse() -> None:
    now = contrast([split(1, 100, 0.1)])
    theta = float(now.upper(ALPHA).max())
    assert float(now.tail(theta).max()) == pytest.approx(ALPHA, abs=1e-12)


def test_chunks_add_up_without_cancellation() -> None:
    chosen, values = samples(0, 500, 0.1, n=7)
    values = values + 1e9
    parts = [Split.of(chosen[i : i + 64], values[i : i + 64]) for i in range(0, 500, 64)]
    nothing = Split.of(chosen[:0], values[:0])
    total = sum(parts, start=nothing) + nothing
    for node in range(7):
        for mask, moments in ((chosen[:, node], total.inside), (~chosen[:, node], total.outside)):
            group = values[mask]
            assert int(moments.count[node]) == len(group)
            assert float(moments.mean[node]) == pytest.approx(float(group.mean()), rel=1e-15)
            # the numbers themselves are rounded to 1e-7 at 1e9
            assert float(moments.variance[node]) == pytest.approx(float(group.var()), rel=1e-6)
            raw = (group.square().sum() - len(group) * group.mean().square()) / (len(group) - 1)
            assert float(raw) != pytest.approx(float(group.var()), rel=1e-2)  # wrong: raw sums of squares


def test_too_few_samples_give_an_infinite_bound() -> None:
    chosen = torch.tensor([[1, 1, 0, 1], [0, 1, 0, 1], [0, 0, 0, 1], [0, 0, 0, 1]], dtype=torch.bool)
    now = contrast([Split.of(chosen, torch.tensor([1.0, 2.0, 3.0, 5.0]))])
    assert now.error.isinf().tolist() == now.size.isnan().tolist() == [True, False, True, True]
    assert now.upper(ALPHA).isinf().tolist() == [True, False, True, True]
    assert now.tail(1e9).tolist()[::2] == [1.0, 1.0]


def test_groups_without_spread() -> None:
    chosen = torch.tensor([[1], [1], [0], [0], [0]], dtype=torch.bool)
    flat = contrast([Split.of(chosen, torch.tensor([2.0, 2.0, 0.0, 0.0, 0.0]))])
    assert float(flat.error) == 0.0 and float(flat.upper(ALPHA)) == 2.0
    assert [float(flat.tail(theta)) for theta in (1.9, 2.0, 2.1)] == [1.0, 1.0, 0.0]
    # the smaller group takes the larger variance, 1, of the other one: SE^2 = 1/2 + 1/3, nu = SE^4 / (1/4 + 1/18)
    lent = contrast([Split.of(chosen, torch.tensor([2.0, 2.0, -1.0, 0.0, 1.0]))])
    assert float(lent.error) == pytest.approx(math.sqrt(5 / 6), rel=1e-14)
    assert float(lent.dof) == pytest.approx((5 / 6) ** 2 / (1 / 4 + 1 / 18), rel=1e-14)


def test_strata_in_which_a_node_cannot_act_count_as_zero() -> None:
    one = split(0, 100, 0.1, n=3)
    never = Split.of(torch.zeros(0, 3, dtype=torch.bool), torch.zeros(0))
    live = torch.tensor([[True, True, True], [False, False, True]])
    now, alone = contrast([one, never], live), contrast([one])
    torch.testing.assert_close(now.size[:2], alone.size[:2] / 2, rtol=1e-14, atol=0)
    torch.testing.assert_close(now.error[:2], alone.error[:2] / 2, rtol=1e-14, atol=0)
    torch.testing.assert_close(now.dof[:2], alone.dof[:2], rtol=1e-14, atol=0)
    assert bool(now.error[2].isinf())  # it can act there and was never seen


def test_draws_repeat_and_have_the_right_shares() -> None:
    stratum, chosen = draw(3, 5, 4000, 50, 0.02, 4)
    again = draw(3, 5, 4000, 50, 0.02, 4)
    assert torch.equal(stratum, again[0]) and torch.equal(chosen, again[1])
    for other in (draw(3, 6, 4000, 50, 0.02, 4), draw(4, 5, 4000, 50, 0.02, 4)):
        assert not torch.equal(chosen, other[1])
    assert float(chosen.double().mean()) == pytest.approx(0.02, abs=4 * math.sqrt(0.02 * 0.98 / 200_000))
    assert stratum.bincount().tolist() == pytest.approx([1000] * 4, abs=4 * math.sqrt(1000))


class Largest(TorchDispatchMode):
    """Notes the largest tensor that is made, in bytes."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if isinstance(found, Tensor):
            self.bytes = max(self.bytes, found.numel() * found.element_size())
        return found


def test_memory_grows_by_a_byte_for_a_sample_and_node() -> None:
    n, pairs = 100_000, 3
    generator = torch.Generator().manual_seed(0)
    estimates = torch.randn(pairs, n, generator=generator, dtype=torch.float64)
    moved = torch.rand(pairs, n, generator=generator) < 0.9
    sets: Any = SimpleNamespace(moved=moved, estimates=lambda: estimates.clone())
    run = Sampling(sets, torch.arange(n), 0.01, 0, CHUNK, per_pair=False, control=True)
    effects = torch.randn(CHUNK, generator=generator, dtype=torch.float64)
    tracemalloc.start()
    with Largest() as largest:
        run.take(effects.tolist())
    peak = tracemalloc.get_traced_memory()[1]  # of numpy, which draws
    tracemalloc.stop()
    assert largest.bytes <= CHUNK * n and peak < 2 * CHUNK * n
    # wrong: all samples and nodes in float64
    which, chosen = run.draws.draw(0)
    with Largest() as largest:
        values = effects - (chosen.double() * estimates[which]).sum(1)
        powers = torch.stack([values**0, values, values**2])
        inside, outside = powers @ chosen.double(), powers @ (~chosen).double()
    assert largest.bytes == 8 * CHUNK * n
    for found, sums in ((run.strata[0].inside, inside), (run.strata[0].outside, outside)):
        assert torch.equal(found.count, sums[0])
        seen = sums[0] > 0
        torch.testing.assert_close(found.mean[seen], (sums[1] / sums[0])[seen])  # rounding: another order
    assert run.rows == int((chosen & moved[which]).any(1).sum())


def test_moments_of_nothing() -> None:
    none = Moments.of_powers(torch.zeros(3, 2, dtype=torch.float64), torch.tensor(0.0))
    assert (none + none).variance.isnan().all() and (none + none).mean.tolist() == [0.0, 0.0]
