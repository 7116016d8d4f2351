"""How much of a behaviour circuits of several sizes keep, when every other edge is ablated; measured exactly.

1. Take a circuit of each size from the scores of edges.
2. Run each with all other edges ablated (`EdgeRun`), and the complement of each.
3. Do the same with random circuits of as many edges.
4. Put the mean metric of each on a scale where the whole model is 1 and the model with every edge ablated 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from jaxtyping import Float
from torch import Tensor

from mechattr.artifact import Passes
from mechattr.base import Artifact
from mechattr.engines.executors import Executor
from mechattr.engines.spread import Pairs
from mechattr.evaluation.scale import (
    check_draws,
    check_graph,
    check_kind,
    doubt,
    gap_of,
    ratio,
    scored_direction,
)
from mechattr.evaluation.trials import SHARES, TAKEN, asked_circuits, with_random
from mechattr.labelled import Labelled
from mechattr.models.base import HookedModel
from mechattr.patching.circuit import Circuit
from mechattr.patching.edge_artifact import EdgeAttribution
from mechattr.patching.edge_run import EdgeRun
from mechattr.patching.places import check_call
from mechattr.patching.settings import provenance_of, settings_of
from mechattr.tasks.task import Task

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes


REACHED = 1e-3  # how close to 1 counts as reached: the whole model itself is 1 up to rounding


class Faithfulness(Artifact):
    """The faithfulness of circuits by size.

    `tensors`, with the number of edges that were asked for as coordinates of `size`: `n_edges` (left without dead
    ends), `faithfulness` and `complement` (of everything outside the circuit), `random` and `random_complement` with
    axes draw and size, and `metric` of each circuit by pair.
    """

    kind = "faithfulness"

    @property
    def sizes(self) -> tuple[int, ...]:
        """The numbers of edges that were asked for, ascending."""
        return cast(tuple[int, ...], tuple(self.tensors["faithfulness"].coords["size"]))

    @property
    def shares(self) -> Float[Tensor, " size"]:
        """The sizes as shares of all edges."""
        return torch.tensor(self.sizes, dtype=torch.float64) / self._number("graph_edges")

    @property
    def values(self) -> Float[Tensor, " size"]:
        """f of the circuit of each size: 1 is the whole model, 0 the model with every edge ablated."""
        return self.tensors["faithfulness"].values

    @property
    def cpr(self) -> float:
        """Area under f over the share of edges, from the smallest size to the largest; NaN for a single size."""
        return _area(self.shares, self.values)

    @property
    def cmd(self) -> float:
        """Area between f and 1 over the share of edges; NaN for a single size."""
        return _area(self.shares, (1 - self.values).abs())

    @property
    def random_cpr(self) -> list[float]:
        """`cpr` of the random circuits of each draw."""
        return [_area(self.shares, row) for row in self.tensors["random"].values]

    @property
    def random_cmd(self) -> list[float]:
        """`cmd` of the random circuits of each draw."""
        return [_area(self.shares, (1 - row).abs()) for row in self.tensors["random"].values]

    @property
    def crossing(self) -> int | None:
        """The smallest size whose f is 1 or more, to 0.001; `None` if there is none."""
        return next((n for n, f in zip(self.sizes, self.values.tolist(), strict=True) if f >= 1 - REACHED), None)

    @property
    def random_crossing(self) -> list[int | None]:
        """`crossing` of the random circuits of each draw."""
        rows = self.tensors["random"].values.tolist()
        return [next((n for n, f in zip(self.sizes, row, strict=True) if f >= 1 - REACHED), None) for row in rows]

    @property
    def passes(self) -> Passes:
        """What the result cost, in prompt rows."""
        return Passes(**cast(dict[str, float], self.settings["passes"]))

    @property
    def summary(self) -> str:
        """The result in a sentence or two, and before it whether f is meaningful at all: where the gap is less than 2
        standard errors from 0 it is not."""
        unsure = doubt(self.settings)
        return f"{unsure}. {self._findings}" if unsure else self._findings

    @property
    def _findings(self) -> str:
        total, ablation = self._number("graph_edges"), self.settings["ablation"]
        if len(self.sizes) == 1:
            f, rest = self.values.item(), self.tensors["complement"].values.item()
            return (
                f"A circuit of {int(self.tensors['n_edges'].values.item()):,} of {total:,} edges keeps {f:z.0%} of the "
                f"gap between the whole model and the model with every edge ablated ({ablation}), "
                f"the other edges {rest:z.0%}{self._chance(0)}."
            )
        crossing = "No circuit reaches the whole model" if self.crossing is None else _reached(self.crossing, total)
        middle = min(range(len(self.sizes)), key=lambda i: abs(math.log(self.shares[i].item() / 0.1)))
        return (
            f"{crossing}; {self.sizes[middle]:,} edges ({self.shares[middle]:.1%}) keep {self.values[middle]:z.0%} of "
            f"its gap to the model with every edge ablated ({ablation}){self._chance(middle)}. "
            f"CPR {self.cpr:.2f}, CMD {self.cmd:.2f}."
        )

    def to_pandas(self) -> pd.DataFrame:
        """One row a size: size (edges asked for), share, n_edges, faithfulness, complement, and of random circuits
        random (mean), random_low, random_high (extremes) and random_complement (mean)."""
        import pandas as pd

        random, complement = (self.tensors[name].values for name in ("random", "random_complement"))
        nothing = torch.full_like(self.values, math.nan)
        some = len(random) > 0
        columns = {
            "size": torch.tensor(self.sizes),
            "share": self.shares,
            **{name: self.tensors[name].values for name in ("n_edges", "faithfulness", "complement")},
            "random": random.mean(0) if some else nothing,
            "random_low": random.amin(0) if some else nothing,
            "random_high": random.amax(0) if some else nothing,
            "random_complement": complement.mean(0) if some else nothing,
        }
        return pd.DataFrame({name: column.numpy() for name, column in columns.items()})

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draws f against size; see `mechattr.draw.curves.faithfulness_curve`."""
        from mechattr import draw

        single, random = len(self.sizes) == 1, self.tensors["random"].values
        areas = {} if single else {"cpr": self.cpr, "cmd": self.cmd}
        crossing, chance = None if single else self.crossing, random if len(random) else None
        ax = draw.pyplot_axes(5.8, 3.4) if ax is None else ax
        return draw.faithfulness_curve(
            torch.tensor(self.sizes), self.values, random=chance, crossing=crossing, ax=ax,
            note=doubt(self.settings), **areas,
        )  # fmt: skip

    def __repr__(self) -> str:
        return f"Faithfulness({self.summary})"

    def _repr_html_(self) -> str:
        table = self.to_pandas().to_html(index=False, na_rep="", float_format="{:.4g}".format)
        return f"<div>{escape(self.summary)}</div>{table}"

    def _number(self, name: str) -> int:
        return int(cast(int, self.settings[name]))

    def _chance(self, size: int) -> str:
        random = self.tensors["random"].values
        return f", random circuits of that size {random[:, size].mean():z.0%}" if len(random) else ""


def faithfulness(
    model: HookedModel,
    task: Task,
    edges: EdgeAttribution | Circuit,
    *,
    sizes: Sequence[float] = SHARES,
    by: str = TAKEN[0],
    method: str = TAKEN[1],
    ablation: str = "resample",
    random: int = 5,
    seed: int = 0,
    direction: str | None = None,
    batch_size: int | None = None,
    progress: bool | None = None,
    resume: Path | None = None,
    executor: str | Executor | None = None,
) -> Faithfulness:
    r"""Measures how much of the behaviour circuits keep when every edge outside them is ablated.

    $$f(C) = \frac{m(C) - m(\varnothing)}{m(M) - m(\varnothing)}, \qquad
    \mathrm{CPR} = \int f \, dk, \quad \mathrm{CMD} = \int |1 - f| \, dk$$

    with $m$ the mean metric over pairs, $M$ all edges, $\varnothing$ none, and $k$ the share of edges; the integrals
    run from the smallest share to the largest by the trapezoidal rule. $f$ has no ceiling: a circuit without the edges
    that work against a behaviour can exceed 1, which CPR rewards and CMD does not. The complement's
    $f(M \setminus C)$ says what the model can still do without the circuit (completeness). Where the mean gap
    $m(M) - m(\varnothing)$ is less than 2 standard errors from 0 over the pairs, f divides by what may be noise: the
    result says so, and `settings["gap"]` has both numbers. A size at which no path is left is the empty circuit.

    Args:
        model: a hooked model whose blocks add to the residual stream.
        task: prompt pairs with a metric; other pairs than those that the scores come from make the fairer test.
        edges: scores of edges, or one circuit, which is then the only size; `sizes`, `by` and `method` are for scores.
        sizes: shares of all edges, above 0 and up to 1; shares that come to the same number of edges count once.
        by: `"contribution"`, `"score"` or `"abs_signed"`; see `circuit_of`.
        method: `"top"` or `"greedy"`; see `circuit_of`.
        ablation: `"resample"`, `"mean"` or `"zero"`; see `EdgeRun`.
        random: how many random circuits stand beside each circuit, with the same number of edges.
        seed: of the random circuits.
        direction: `"noising"` runs the clean prompts and ablates with the corrupt ones, `"denoising"` the reverse;
            that of the edges without it.
        batch_size: rows of a forward pass; it halves itself when memory runs out.
        progress: `None` shows a bar on a terminal only.
        resume: a journal; a run that was killed goes on from it and returns the same result.
        executor: `"ray"`, `"inprocess"` or an executor, to run the pairs block by block elsewhere; see `docs/scale.md`.
            Blocks give the metric of each pair, and f is taken once, from the means over all of them.

    Raises:
        SettingError: the metric is the same with all edges and with none, so that f is undefined; or an unusable
            share, number of random circuits or batch size; or another direction than that of the edges; or `sizes`,
            `by` or `method` with a circuit.
        MismatchError: scores or a circuit of another graph than the model's.
        UnknownNameError: no such measure, method, ablation or direction.
        UnsupportedFeatureError: a model whose heads have no writes of their own.
        EmptyTaskError: no pairs.
        NonFiniteError: a run has NaN or infinity.
        ExecutorError: a block failed for good.

    Cost:
        2 (1 + random) forward passes a pair and size, and 3 a pair (2 with zero); circuits that are the same, such as
        all edges or none, run once.

    References:
        Wang et al. 2023, arXiv:2211.00593 (faithfulness, completeness, minimality); Mueller et al. 2025,
        arXiv:2504.13151 (CPR, CMD).
    """
    check_call("faithfulness", model, task)
    check_draws(random, seed)
    check_kind(edges, (Circuit, EdgeAttribution))
    way = scored_direction(edges, direction)
    blocks = Pairs.on(model, task, executor)
    run = EdgeRun(model, task, direction=way, ablation=ablation, batch_size=batch_size)
    check_graph(run, edges)
    asked, how = asked_circuits(edges, sizes, by, method)
    circuits, masks = with_random(asked, run.graph.mask, random, seed)
    found = run.metrics(masks, progress=progress, resume=resume, label="faithfulness", blocks=blocks)
    whole, empty = found[0], found[1]
    by_size = found[2:].unflatten(0, (len(circuits), 1 + random, 2))  # [size, draw, circuit or complement, pair]
    f = ratio(by_size, whole, empty, model)
    coords = {"size": tuple(asked)}
    tensors = {
        "n_edges": Labelled(torch.tensor([draws[0].n_edges for draws in circuits]), ("size",), coords),
        "faithfulness": Labelled(f[:, 0, 0].clone(), ("size",), coords),
        "complement": Labelled(f[:, 0, 1].clone(), ("size",), coords),
        "random": Labelled(f[:, 1:, 0].T.clone(), ("draw", "size"), coords),
        "random_complement": Labelled(f[:, 1:, 1].T.clone(), ("draw", "size"), coords),
        "metric": Labelled(by_size[:, 0, 0].clone(), ("size", "pair"), coords),
    }
    settings = settings_of(
        task,
        method="faithfulness",
        direction=run.direction,
        sites=[],
        positions="all",
        base=whole.tolist(),
        source=empty.tolist() if run.ablation == "resample" else None,
        passes=(float(run.forward), 0.0),
        trivial=0,
        ablation=run.ablation,
        whole=whole.mean().item(),
        empty=empty.mean().item(),
        gap=gap_of(whole, empty),
        graph_edges=run.graph.n_edges,
        random=random,
        seed=seed,
        **how,
        **({} if blocks is None else blocks.said),
    )
    return Faithfulness(tensors, settings=settings, provenance=provenance_of(model, task))


def _area(x: Float[Tensor, " size"], y: Float[Tensor, " size"]) -> float:
    return float(torch.trapezoid(y, x)) if len(x) > 1 else math.nan


def _reached(n: int, total: int) -> str:
    return f"{n:,} of {total:,} edges reach the whole model"
