"""Whether a circuit needs each of its parts: what is lost when one of them is ablated too."""

from __future__ import annotations

import math
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

import torch

from mechattr.artifact import Passes
from mechattr.base import Artifact
from mechattr.engines.executors import Executor
from mechattr.engines.spread import Pairs
from mechattr.evaluation.scale import check_draws, check_graph, check_kind, doubt, gap_of, ratio, scored_direction
from mechattr.evaluation.trials import ARROW, taken_apart
from mechattr.labelled import Labelled
from mechattr.models.base import HookedModel
from mechattr.patching.circuit import Circuit
from mechattr.patching.edge_run import EdgeRun
from mechattr.patching.places import check_call
from mechattr.patching.settings import provenance_of, settings_of
from mechattr.tasks.task import Task

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

RARE = 0.95  # share of the random circuits' parts that a part beats where it stands out
_SHOWN = 20  # rows of a table in a notebook


class Minimality(Artifact):
    """What each part of a circuit is worth to it.

    `tensors` holds `drop` (f of the circuit minus f without the part) by name of the part, and `random`, the same of
    random circuits with as many edges: axes draw and rank, largest first, NaN where a draw has fewer parts.
    """

    kind = "minimality"

    @property
    def passes(self) -> Passes:
        """What the result cost, in prompt rows."""
        return Passes(**cast(dict[str, float], self.settings["passes"]))

    @property
    def chance_level(self) -> float:
        """The drop that 95 % of the random circuits' parts stay below; NaN without random circuits."""
        random = self.tensors["random"].values
        known = random[~random.isnan()]
        return float(known.quantile(RARE)) if len(known) else math.nan

    @property
    def summary(self) -> str:
        """The result in two sentences, and before them whether f is meaningful at all: where the gap is less than 2
        standard errors from 0 it is not."""
        drop, unit = self.tensors["drop"], str(self.settings["unit"])
        whole, first = float(cast(float, self.settings["faithfulness"])), int(drop.values.argmax())
        unsure, n, largest = doubt(self.settings), len(drop), drop.values[first].item()
        text = f"{unsure}. " if unsure else ""
        text += f"A circuit of {self.settings['n_edges']:,} edges has f = {whole:.3g}; "
        text += f"of its {n} {unit}{'s' * (n != 1)} {drop.coords['part'][first]} is worth most, {largest:.3g}."
        if not math.isnan(self.chance_level):
            above = int((drop.values > self.chance_level).sum())
            verb = "is" if above == 1 else "are"
            text += f" {above} of {n} {verb} worth more than {RARE:.0%} of those of random circuits."
        return text

    def to_pandas(self) -> pd.DataFrame:
        """The parts, largest drop first: part, drop, and chance, the share of the random circuits' parts whose drop is
        at least as large (NaN without random circuits)."""
        import pandas as pd

        drop, random = self.tensors["drop"], self.tensors["random"].values
        known = random[~random.isnan()]
        chance = [float((known >= x).double().mean()) if len(known) else math.nan for x in drop.values]
        frame = pd.DataFrame({"part": list(drop.coords["part"]), "drop": drop.values.numpy(), "chance": chance})
        return frame.sort_values("drop", ascending=False, kind="stable", ignore_index=True)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draws the drops of the parts; see `mechattr.draw.drop_bars`."""
        from mechattr import draw

        table = self.to_pandas()
        names = [" → ".join(map(draw.node_name, part.split(ARROW))) for part in table["part"]]
        ax = draw.pyplot_axes(*draw.drop_size(len(names))) if ax is None else ax
        level, kind = self.chance_level, f"{self.settings['unit']}s"
        return draw.drop_bars(
            names, table["drop"].to_numpy(), chance=level, label=f"{RARE:.0%} of random circuits' {kind} drop less",
            kind=kind, note=doubt(self.settings), ax=ax,
        )  # fmt: skip

    def __repr__(self) -> str:
        return f"Minimality({self.summary})"

    def _repr_html_(self) -> str:
        table = self.to_pandas()
        shown = table.head(_SHOWN).to_html(index=False, escape=True, na_rep="", float_format="{:.4g}".format)
        more = f"<div>and {len(table) - _SHOWN:,} more</div>" if len(table) > _SHOWN else ""
        return f"<div>{escape(self.summary)}</div>{shown}{more}"


def minimality(
    model: HookedModel,
    task: Task,
    circuit: Circuit,
    *,
    unit: Literal["node", "edge"] = "node",
    ablation: str = "resample",
    random: int = 5,
    seed: int = 0,
    direction: str | None = None,
    batch_size: int | None = None,
    progress: bool | None = None,
    resume: Path | None = None,
    executor: str | Executor | None = None,
) -> Minimality:
    r"""Measures how much faithfulness a circuit loses with each of its parts.

    $$\mathrm{drop}(p) = f(C) - f(C \setminus p)$$

    with $f$ as `faithfulness` defines it. A part with a drop near zero is not needed, or another one stands in for it.
    Where the gap that f divides by is less than 2 standard errors from 0, the result says that it is not meaningful.

    Args:
        model: a hooked model whose blocks add to the residual stream.
        task: prompt pairs with a metric.
        circuit: the circuit.
        unit: `"node"` removes all edges of a head or MLP, `"edge"` one edge, for small circuits.
        ablation: `"resample"`, `"mean"` or `"zero"`; see `EdgeRun`.
        random: how many random circuits, with the same number of edges, are taken apart in the same way.
        seed: of the random circuits.
        direction: `"noising"` runs the clean prompts and ablates with the corrupt ones, `"denoising"` the reverse;
            that of the circuit without it.
        batch_size: rows of a forward pass; it halves itself when memory runs out.
        progress: `None` shows a bar on a terminal only.
        resume: a journal; a run that was killed goes on from it and returns the same result.
        executor: `"ray"`, `"inprocess"` or an executor, to run the pairs block by block elsewhere; see `docs/scale.md`.
            Blocks give the metric of each pair, and f is taken once, from the means over all of them.

    Raises:
        EmptyTaskError: no pairs, or a circuit without such parts.
        SettingError: faithfulness is undefined, an unusable number of random circuits or batch size, or another
            direction than that of the circuit.
        MismatchError: a circuit of another graph than the model's.
        UnknownNameError: no such unit, ablation or direction.
        UnsupportedFeatureError: a model whose heads have no writes of their own.
        NonFiniteError: a run has NaN or infinity.
        ExecutorError: a block failed for good.

    Cost:
        1 forward pass a pair and part of the circuit and of each random one, and 4 + random a pair (3 + random with
        zero); circuits that are the same run once.

    References:
        Wang et al. 2023, arXiv:2211.00593.
    """
    check_call("minimality", model, task)
    check_draws(random, seed)
    check_kind(circuit, (Circuit,))
    way = scored_direction(circuit, direction)
    blocks = Pairs.on(model, task, executor)
    run = EdgeRun(model, task, direction=way, ablation=ablation, batch_size=batch_size)
    check_graph(run, circuit)
    without, masks = taken_apart(circuit, run.graph.mask, unit, random, seed)
    found = run.metrics(masks, progress=progress, resume=resume, label="minimality", blocks=blocks)
    f = ratio(found[2:], found[0], found[1], model)
    wholes, rest = f[: 1 + random], f[1 + random :].split([len(parts) for parts in without])
    drops = [whole - part for whole, part in zip(wholes, rest, strict=True)]
    ranked = torch.full((random, max(map(len, drops[1:]), default=0)), math.nan, dtype=f.dtype)
    for row, drop in zip(ranked, drops[1:], strict=True):
        row[: len(drop)] = drop.sort(descending=True).values
    tensors = {
        "drop": Labelled(drops[0], ("part",), {"part": tuple(without[0])}),
        "random": Labelled(ranked, ("draw", "rank")),
    }
    settings = settings_of(
        task,
        method="minimality",
        direction=run.direction,
        sites=[],
        positions="all",
        base=found[0].tolist(),
        source=found[1].tolist() if run.ablation == "resample" else None,
        passes=(float(run.forward), 0.0),
        trivial=0,
        unit=unit,
        ablation=run.ablation,
        faithfulness=wholes[0].item(),
        n_edges=circuit.n_edges,
        gap=gap_of(found[0], found[1]),
        random=random,
        seed=seed,
        **({} if blocks is None else blocks.said),
    )
    return Minimality(tensors, settings=settings, provenance=provenance_of(model, task))
