"""The bound on missed effects: calibrated against enumeration, honest about its cost, resumable."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from patching_cases import pairs_task, plain
from torch import Tensor

import mechattr as ma
from mechattr.errors import OutputExistsError, SettingError
from mechattr.patching.bound import missed_effect_bound
from mechattr.patching.bound_result import Bound
from mechattr.patching.nodes import every_node
from mechattr.patching.places import places_of
from mechattr.patching.sampling import CHUNK
from mechattr.patching.sets import Sets
from mechattr.tasks.task import Task

SITES = ("z", "mlp_out")
P = 0.3
ALPHA = 0.1
REPEATS = 100


def averaged_effects(model: Any, task: Task, sites: tuple[str, ...], p: float) -> tuple[Tensor, Tensor]:
    """By enumeration of every set, [pair, node]: effects averaged over random contexts, and effects alone."""
    table = every_node(model, sites, places_of(task, "all"))
    sets = Sets(model, task, table, "all", "noising")
    n = len(table)
    every = (torch.arange(2**n)[:, None] >> torch.arange(n) & 1).bool()
    effects = torch.stack([sets.effects(torch.full((2**n,), pair), every) for pair in range(len(task))])
    averaged = torch.zeros(len(task), n, dtype=torch.float64)
    for node in range(n):
        others = torch.cat([every[:, :node], every[:, node + 1 :]], 1).double()
        weight = (others * math.log(p) + (1 - others) * math.log(1 - p)).sum(1).exp()
        sign = torch.where(every[:, node], 1.0, -1.0)
        averaged[:, node] = effects @ (weight * sign)
    return averaged, effects[:, 2 ** torch.arange(n)]


def values(bound: Bound, which: str) -> Tensor:
    """One statistic of every node, in the order of a table."""
    return torch.cat([bound.tensors[f"{which}/{site}"].values.flatten() for site in SITES])


@pytest.mark.parametrize(
    ("kind", "per_pair", "control"), [("linear", False, False), ("linear", True, True), ("llama_like", False, True)]
)
def test_the_bound_is_calibrated_on_a_network(kind: str, per_pair: bool, control: bool) -> None:
    model = plain(kind)
    task = pairs_task(model)
    truth, alone = averaged_effects(model, task, SITES, P)
    theta = float((truth.abs().mean(0) if per_pair else truth.mean(0).abs()).max())
    bounds = [
        missed_effect_bound(
            model, task, verified=[], sites=SITES, positions="all", p=P, budget=159, confidence=1 - ALPHA,
            per_pair=per_pair, control=control, seed=seed, progress=False,
        )
        for seed in range(REPEATS)
    ]  # fmt: skip
    slack = 3 * math.sqrt(ALPHA * (1 - ALPHA) / REPEATS)  # three standard deviations of a binomial share
    assert sum(bound.theta < theta for bound in bounds) / REPEATS <= ALPHA + slack
    # wrong: the estimate itself as the bound
    assert sum(float(values(bound, "difference").max()) < theta for bound in bounds) / REPEATS > ALPHA + slack
    estimates = torch.stack([values(bound, "signed") for bound in bounds])
    error = estimates.std(0) / math.sqrt(REPEATS)
    assert ((estimates.mean(0) - truth.mean(0)).abs() < 4 * error).all()
    # wrong: the effect of a node alone; nodes interact even in a linear network, where one overwrites what another did
    assert not ((estimates.mean(0) - alone.mean(0)).abs() < 4 * error).all()


@pytest.fixture
def model() -> Any:
    return plain("llama_like")


@pytest.fixture
def task(model: Any) -> Task:
    return pairs_task(model)


def bound_of(model: Any, task: Task, **settings: Any) -> Bound:
    return missed_effect_bound(model, task, **{"verified": [], "p": 0.05, "progress": False, **settings})


def top(model: Any, task: Task, k: int = 10) -> ma.Attribution:
    return ma.activation_patching(model, task, nodes=ma.attribution_patching(model, task).top(k))


def identical(left: Bound, right: Bound) -> bool:
    """Whether two results have the same bits."""
    same = left.tensors.keys() == right.tensors.keys() and dict(left.settings) == dict(right.settings)
    return same and all(x.values.equal(right.tensors[n].values.nan_to_num(7.0)) for n, x in filled(left).items())


def filled(bound: Bound) -> dict[str, Any]:
    return {n: ma.Labelled(x.values.nan_to_num(7.0), x.axes, x.explicit_coords) for n, x in bound.tensors.items()}


def counted(model: Any, monkeypatch: pytest.MonkeyPatch, stop_after: int | None = None) -> list[int]:
    """Rows of each forward pass; with `stop_after`, the user interrupts after so many passes."""
    rows: list[int] = []
    run = type(model).run

    def counting(self: Any, batch: Any, **settings: Any) -> Any:
        if stop_after is not None and len(rows) >= stop_after:
            raise KeyboardInterrupt
        rows.append(len(batch))
        return run(self, batch, **settings)

    monkeypatch.setattr(type(model), "run", counting)
    return rows


@pytest.mark.parametrize("settings", ({}, {"per_pair": True}, {"target": 1e-6}))
def test_an_interrupted_run_resumes_to_the_same_bits(
    model: Any, task: Task, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**settings, "budget": 600}
    whole = bound_of(model, task, **settings)
    journal = tmp_path / "journal"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        counted(model, patch, stop_after=5)
        bound_of(model, task, resume=journal, **settings)
    with monkeypatch.context() as patch:
        rows = counted(model, patch)
        assert identical(bound_of(model, task, resume=journal, **settings), whole)
        assert 0 < sum(rows) < whole.passes.forward
    with monkeypatch.context() as patch:
        rows = counted(model, patch)
        assert identical(bound_of(model, task, resume=journal, **settings), whole)
        assert sum(rows) == 9  # the prompts themselves, and their gradients
    assert not identical(bound_of(model, task, seed=1, **settings), whole)
    with pytest.raises(OutputExistsError, match="another sweep \\(different: samples\\)"):
        bound_of(model, task, seed=1, resume=journal, **settings)


@pytest.mark.parametrize("per_pair", (False, True))
def test_a_journal_goes_on_with_another_budget(
    model: Any, task: Task, per_pair: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """9 passes are spent on the prompts; the last chunk of each run has fewer samples than the others."""
    journal, spent = tmp_path / "journal", {}
    for budget in (200, 700, 300):
        alone = bound_of(model, task, budget=budget, per_pair=per_pair)
        with monkeypatch.context() as patch:
            rows = counted(model, patch)
            assert identical(bound_of(model, task, budget=budget, per_pair=per_pair, resume=journal), alone)
            spent[budget] = sum(rows), alone.passes.forward
    assert spent[200][0] == spent[200][1]
    assert spent[700][0] <= spent[700][1] - 100  # the one whole chunk, less the samples of it that patch nothing
    assert spent[300][0] <= 9 + (300 - 9) % CHUNK


def test_looks_are_planned_from_the_budget_and_no_other_journal_will_do(model: Any, task: Task, tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    bound_of(model, task, budget=600, target=1e-6, resume=journal)
    for settings in ({"budget": 2009, "target": 1e-6}, {"budget": 600}):
        with pytest.raises(OutputExistsError, match="another sweep \\(different: looks\\)"):
            bound_of(model, task, resume=journal, **settings)


@pytest.mark.parametrize(("target", "done"), ((1e-9, "16/16"), (1e9, "2/16"), (None, "16/16")))
def test_all_looks_have_one_bar(
    model: Any, task: Task, target: float | None, done: str, capsys: pytest.CaptureFixture[str]
) -> None:
    bound_of(model, task, budget=2009, target=target, progress=True)
    shown = capsys.readouterr().err
    assert shown.count("| 0/") == 1 and f"| {done} [" in shown


@pytest.mark.parametrize("budget", (40, 300))
def test_the_budget_is_kept_and_passes_are_counted(
    model: Any, task: Task, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = counted(model, monkeypatch)
    bound = bound_of(model, task, p=0.01, budget=budget)
    assert bound.passes == (sum(rows), 3)
    assert sum(rows) <= budget and bound.settings["samples"] == budget - 9
    rows.clear()
    assert bound_of(model, task, p=0.01, budget=budget, control=False).passes == (sum(rows), 0)
    assert sum(rows) <= budget


@pytest.mark.parametrize("per_pair", (False, True))
def test_estimates_as_a_control_variate_narrow_the_bound(per_pair: bool) -> None:
    model = plain("linear")
    settings: dict[str, Any] = {"sites": ("v", "z", "mlp_post"), "p": 0.01, "per_pair": per_pair}
    with_it, without = (bound_of(model, pairs_task(model), control=control, **settings) for control in (True, False))
    errors = [bound.to_pandas()["error"].median() for bound in (with_it, without)]
    assert errors[0] < 0.5 * errors[1]
    frames = [bound.to_pandas().set_index(["site", "layer", "pos", "head", "neuron"]) for bound in (with_it, without)]
    gap = (frames[0]["signed"] - frames[1]["signed"]).abs() / frames[1]["error"]
    assert gap.max() < 5  # both estimate the same; five standard errors, the largest of a hundred nodes


def test_the_default_budget_gives_thirty_inclusions(model: Any, task: Task) -> None:
    bound = bound_of(model, task)
    assert bound.settings["samples"] == 600
    frame = bound.to_pandas()
    assert frame["inclusions"].mean() == pytest.approx(30, abs=1)
    assert bound_of(model, task, per_pair=True).settings["samples"] == 1800


def test_it_stops_early_when_the_target_is_met(model: Any, task: Task) -> None:
    full = bound_of(model, task, budget=2009, target=1e-9)
    assert (full.settings["looks_planned"], full.settings["looks_taken"]) == (4, 4)
    early = bound_of(model, task, budget=2009, target=1e9)
    assert (early.settings["looks_planned"], early.settings["looks_taken"]) == (4, 1)
    assert early.settings["samples"] == 2 * CHUNK and early.passes.forward < full.passes.forward / 3
    plain_run = bound_of(model, task, budget=2009)
    assert plain_run.settings["looks_planned"] == 1
    assert full.theta > plain_run.theta  # looking has its price: a quarter of the error probability each
    assert full.p_of(full.theta) == pytest.approx(0.01, rel=1e-6)
    assert plain_run.p_of(full.theta) < 0.0026
    assert "Look 1 of 4 planned ones, each at 1/4 of the error probability." in early.covers


def test_verified_nodes_are_left_out_and_give_the_scale(model: Any, task: Task) -> None:
    exact = top(model, task)
    everything = bound_of(model, task)
    for per_pair in (False, True):
        bound = bound_of(model, task, verified=exact, per_pair=per_pair)
        assert bound.n_covered == everything.n_covered - 10
        assert len(bound.verified) == 10 and bound.verified == tuple(sorted(bound.verified, reverse=True))
        which = "score" if per_pair else "abs_signed"
        assert bound.verified_kth == min(exact.value(node, which) for node in exact.nodes())
        assert (bound.settings["n_verified"], bound.settings["direction"]) == (10, "noising")
    nodes = bound_of(model, task, verified=exact.nodes())
    assert nodes.n_covered == bound.n_covered and nodes.verified == () and nodes.verified_kth is None
    for node in exact.nodes():
        axis = "kv_head" if node.site in "kv" else "head"
        where = {"layer": node.layer, "pos": node.pos, axis: node.head, "neuron": node.neuron}
        found = bound.tensors[f"error/{node.site}"].sel(**{k: v for k, v in where.items() if v is not None})
        assert found.values.isnan()
    other = ma.activation_patching(model, task, nodes=exact.nodes(), direction="denoising")
    assert bound_of(model, task, verified=other).settings["direction"] == "denoising"
    assert bound_of(model, task, verified=exact, sites="z").settings["n_verified"] == sum(
        node.site == "z" for node in exact.nodes()
    )


def test_with_every_node_verified_nothing_can_be_missed(model: Any, task: Task) -> None:
    bound = bound_of(model, task, verified=ma.activation_patching(model, task))
    assert (bound.theta, bound.n_covered, bound.passes.forward) == (0.0, 0, 6.0)
    assert bound.summary == (
        "no node of q, k, v, z, mlp_post is left to bound: each was verified or has the same activation on both "
        "prompts, so no effect can have been missed"
    )
    assert bound.p_of(0.1) == 0.0 and bound.curve()[1].sum() == 0.0
    assert len(bound.to_pandas()) == 0 and "left to bound" in bound._repr_html_()


@pytest.mark.parametrize("per_pair", (False, True))
def test_pairs_that_do_not_differ(model: Any, per_pair: bool) -> None:
    same = pairs_task(model, changed=())
    bound = bound_of(model, same, per_pair=per_pair)
    assert (bound.theta, bound.n_covered, bound.passes.forward) == (0.0, 0, 6.0)
    assert bound.settings["n_trivial_zero"] == bound.settings["n_nodes"]


def test_a_pair_that_does_not_differ_has_no_effect_in_the_mean(model: Any) -> None:
    one, same = pairs_task(model, (5,)), pairs_task(model, (5,), changed=())

    def both(name: str) -> Any:
        parts = [getattr(task, name) for task in (one, same)]
        return type(parts[0])(torch.cat([p.tokens for p in parts]), torch.cat([p.mask for p in parts]), torch.arange(2))

    mixed = pairs_task(model, (5, 5))
    mixed = replace(mixed, clean=both("clean"), corrupt=both("corrupt"))
    bound = bound_of(model, mixed, per_pair=True, budget=1006)
    assert float(bound.to_pandas()["inclusions"].mean()) == pytest.approx(50, abs=2)  # no sample went to the other pair
    inside = bound_of(model, mixed, budget=1006)
    assert inside.n_covered == bound.n_covered and inside.passes.forward < 700  # half of its samples cannot act
    assert bound.theta < inside.theta


def test_too_small_a_budget_gives_no_bound_and_says_what_is_needed(model: Any, task: Task) -> None:
    bound = bound_of(model, task, p=0.01, budget=100)
    assert math.isinf(bound.theta)
    few = int((bound.to_pandas()["inclusions"] < 2).sum())
    assert few > 0 and len(bound.to_pandas()) == bound.n_covered
    assert bound.summary == (
        f"no bound with 99 % confidence: {few} of {bound.n_covered} unverified nodes were in fewer than two samples, "
        "or in all but one; a budget of about 3009 forward passes is needed"
    )
    assert bound.to_pandas()["upper"].iloc[0] == math.inf and bound.p_of(1e9) == 1.0
    with pytest.raises(SettingError, match="a budget of about 3009 forward passes"):
        bound.plot()


def test_the_result_says_what_it_covers(model: Any, task: Task) -> None:
    bound = bound_of(model, task, verified=top(model, task), sites=("z", "k"))
    assert bound.summary == (
        "with 99 % confidence no unverified component of z, k has a |mean effect| (averaged over random 5 % contexts) "
        f"above {bound.theta:.3g} logit"
    )
    assert bound.covers.startswith(f"{bound.n_covered} nodes of z, k: all but {bound.settings['n_verified']} that were")
    assert "over 3 pairs, in which effects of opposite sign on different pairs cancel" in bound.covers
    assert "each other covered node is patched with probability 5 %; the effect of a node patched alone" in bound.covers
    assert "cancel" not in bound_of(model, task, per_pair=True).covers
    assert bound.summary in bound._repr_html_() and repr(bound) == f"Bound({bound.summary})"
    frame = bound.to_pandas()
    assert list(frame)[-6:] == ["difference", "signed", "error", "dof", "inclusions", "upper"]
    assert frame["upper"].is_monotonic_decreasing and frame["upper"].iloc[0] == bound.theta


def test_the_curve_falls_to_the_error_probability_at_the_bound(model: Any, task: Task) -> None:
    bound = bound_of(model, task)
    thetas, p = bound.curve()
    assert float(thetas[0]) == 0 and len(thetas) == 61 and float(thetas[-1]) == pytest.approx(1.5 * bound.theta)
    assert (p.diff() <= 0).all() and 0.5 < p[0] <= 1
    assert bound.p_of(bound.theta) == pytest.approx(0.01, rel=1e-6)
    given = bound.curve([0.1, bound.theta])
    assert given[1].tolist() == [bound.p_of(0.1), bound.p_of(bound.theta)]
    with pytest.raises(SettingError, match="that is no size of an effect"):
        bound.p_of(-1.0)


def test_it_can_be_saved_and_drawn(model: Any, task: Task, tmp_path: Path) -> None:
    from matplotlib import pyplot as plt

    bound = bound_of(model, task, verified=top(model, task))
    bound.save(tmp_path / "bound.ma")
    again = Bound.load(tmp_path / "bound.ma")
    assert identical(again, bound) and again.theta == bound.theta and again.summary == bound.summary
    again.verify()
    axes = bound.plot()
    assert "logit" in axes.get_xlabel()
    plt.close("all")
