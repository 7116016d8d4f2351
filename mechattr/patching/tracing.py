"""Causal tracing: blur what the prompt says about its subject, then restore one place at a time to what it was.

Noise on the embeddings of some tokens damages the prediction; where putting back the clean activation of one node
repairs it, the information passes. The sweep is the one of exact patching: its base run is the noised one, and several
noises of a prompt are rows of one batch.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechattr.artifact import Attribution
from mechattr.engines.executors import Executor
from mechattr.engines.spread import spread
from mechattr.engines.sweep import sweep
from mechattr.errors import SettingError, UnknownNameError, nearest
from mechattr.models.base import Batch, HookedModel
from mechattr.models.edits import Edit
from mechattr.models.operators import Add
from mechattr.patching.interventions import Interventions, rows_of, whole_number
from mechattr.patching.nodes import NONE, NodeTable, every_node
from mechattr.patching.places import Positions, check_call, mode_of, node_sites, places_of
from mechattr.patching.settings import provenance_of, settings_of
from mechattr.patching.source import Source
from mechattr.sites import full_name
from mechattr.tasks.task import Task

STREAMS = ("resid_post", "mlp_out", "attn_out")


def causal_tracing(
    model: HookedModel,
    task: Task,
    *,
    span: str | None = None,
    noise: float = 3.0,
    samples: int = 10,
    window: int = 1,
    sites: str | Sequence[str] = STREAMS,
    positions: Positions | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool | None = None,
    resume: Path | None = None,
    executor: str | Executor | None = None,
) -> Attribution:
    r"""Measures how much of a prediction one clean activation restores after the prompt's subject was blurred.

    $$I(n) = L\big(\tilde x \mid \mathrm{do}(n_l \leftarrow n_l(x),\ |l - l_n| \le \lfloor w/2 \rfloor)\big)
    - L(\tilde x), \qquad \text{score}(n) = \mathbb E |I(n)|, \quad \text{signed}(n) = \mathbb E\, I(n)$$

    over pairs and noises, with $x$ the clean prompt and $\tilde x$ the same prompt whose embeddings at the span have
    Gaussian noise of standard deviation $\sigma$ added. $\sigma$ is `noise` times the standard deviation of all entries
    of the token embedding matrix (scaled as the model scales it). One noise is the same for all nodes; it depends on
    `seed`, the clean prompt and its number, and on nothing else. Corrupt prompts are not run.

    Args:
        model: a hooked model.
        task: prompt pairs with a metric.
        span: the span of the task whose tokens are blurred; by default the tokens in which clean and corrupt differ.
        noise: standard deviation, in units of that of the embedding matrix.
        samples: noises a pair.
        window: layers that are restored together, an odd number: the node's own and as many below as above it, fewer at
            the ends. The score stands at the layer in the middle. Sites outside the blocks have no window.
        sites: short names; every node of these sites is restored.
        positions: `"aligned"` (each position), `"named"` (spans) or `"all"` (merged); by default each position where
            the pairs align, else the spans that the task names in every pair.
        seed: of the noise.
        batch_size: rows of a forward pass, about 4096 tokens' worth unless given; it halves itself when memory runs
            out.
        progress: `None` shows a bar on a terminal only.
        resume: a journal; a sweep that was killed goes on from it and returns the same result.
        executor: `"ray"`, `"inprocess"` or an executor, to run the pairs block by block elsewhere; see `docs/scale.md`.

    Returns:
        Tables as those of `activation_patching` under denoising: `contribution` is the metric that is regained.
        `settings` has, by pair, `clean_metric`, `noised_metric` (the mean over noises, which `corrupt_metric` holds,
        too) and `noised_tokens`, and `sigma`. A pair without noised tokens has effects of exactly zero.

    Raises:
        UnknownSiteError: a site that this model does not have.
        UnknownNameError: no such kind of positions, or a span that some pair does not name.
        SettingError: an even window, a number out of range, or an unusable `batch_size`.
        AlignmentError: positions that are not comparable across the pairs.
        EmptyTaskError: no pairs.
        NonFiniteError: a run has NaN or infinity.
        OutputExistsError: the journal belongs to another sweep.
        ExecutorError: a block failed for good.

    Cost:
        2 forward passes for each noise of each pair, one clean and one noised, and (L - lowest layer of the window)/L
        of one for each node of each of them whose activation differs; a whole one outside the blocks. Nodes that the
        noise does not reach are not run. No backward pass.

    References:
        Meng et al. 2022, Locating and Editing Factual Associations in GPT, arXiv:2202.05262: 3 standard deviations,
        10 noises, window 1 for the residual stream and 10 for MLP and attention.
    """
    check_call("causal tracing", model, task)
    if executor is not None:
        return spread(causal_tracing, **locals())
    whole_number("samples", samples, 1)
    whole_number("seed", seed, 0)
    if whole_number("window", window, 1) % 2 == 0:
        fix = f"give an odd number, such as {window + 1}"
        raise SettingError(f"window={window}", "no layer in the middle of an even number of layers", fix)
    if isinstance(noise, bool) or not isinstance(noise, int | float) or not (0 < noise < math.inf):
        raise SettingError(f"noise={noise!r}", "no standard deviation", "give a positive number, such as 3.0")
    mode = mode_of(task, positions)
    places = places_of(task, mode)
    table = every_node(model, node_sites(model, sites), places)
    blurred = _blurred(task, span)
    rows = rows_of(task.clean, batch_size)
    pair = [i for i in range(len(task)) for _ in range(samples)]
    base = task.clean.rows(pair)
    blur = _Blur(base, blurred[pair], noise * _spread(model), samples, seed, model.info.d_model)
    clean = Source(model, base, task.metric, table.names)  # as often as noised: what noise does not reach is then equal
    run = _Restorations(model, base, task.metric, clean, table, places.rows(pair), rows, blur=blur, reach=window // 2)
    results = sweep(
        run.groups(),
        run.compute,
        n_groups=len(run.parts),
        key={
            "method": "causal_tracing",
            "task": task.hash(),
            "nodes": table.hash(),
            "rows": rows,
            "span": span,
            "noise": noise,
            "samples": samples,
            "window": window,
            "seed": seed,
            **model.fingerprint(),
        },
        resume=resume,
        progress=progress,
        label="causal tracing",
    )
    magnitude, signed = run.means(results)
    noised = torch.tensor(run.base_metric, dtype=torch.float64).view(len(task), samples).mean(1).tolist()
    settings = settings_of(
        task,
        method="causal_tracing",
        direction="denoising",
        sites=table.sites,
        positions=mode,
        base=noised,
        source=run.source_metric[::samples],
        passes=(float(2 * len(base)) + run.forward, 0.0),
        trivial=~run.ran,
        n_nodes=len(table),
        noised_metric=noised,
        noised_tokens=blurred.sum(1).tolist(),
        sigma=blur.sigma,
        span=span,
        noise=float(noise),
        samples=samples,
        window=window,
        seed=seed,
    )
    return Attribution(table.labelled(magnitude, signed), settings=settings, provenance=provenance_of(model, task))


def noise_of(seed: int, prompt: Sequence[int], sample: int, tokens: int, width: int) -> Float[Tensor, "token d_model"]:
    """Standard normal noise for some tokens of a prompt, number `sample`, in float64."""
    digest = hashlib.sha256(f"{seed} {sample} {list(prompt)}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.randn(tokens, width, dtype=torch.float64, generator=generator)


def _spread(model: HookedModel) -> float:
    """Standard deviation of the entries of the token embedding matrix."""
    table = model.weight("embed.W_E")
    return float(table.to(torch.promote_types(table.dtype, torch.float32)).std(correction=0))


def _blurred(task: Task, span: str | None) -> Bool[Tensor, "pair column"]:
    """The columns that get noise.

    Raises:
        UnknownNameError: a pair does not name the span.
    """
    if span is None:
        return task.clean.differs(task.corrupt)
    without = [i for i, spans in enumerate(task.spans) if span not in spans]
    if without:
        names = sorted({name for spans in task.spans for name in spans})
        found = f"{len(without)} of {len(task)} pairs have no such span (first: pair {without[0]})"
        raise UnknownNameError(f"to blur span {span!r}", found, nearest(str(span), names))
    low, high = (torch.tensor([spans[span][i] for spans in task.spans])[:, None] for i in (0, 1))
    where = task.clean.positions
    return (where >= low.to(where.device)) & (where < high.to(where.device))


@dataclass(frozen=True, eq=False, slots=True)
class _Blur:
    """The noise of every row.

    Attributes:
        prompts: the prompts, `samples` rows of each.
        columns: where it is added.
        sigma: its standard deviation.
        samples: noises of a prompt.
        seed: of all of it.
        width: of the embeddings.
    """

    prompts: Batch
    columns: Bool[Tensor, "row column"]
    sigma: float
    samples: int
    seed: int
    width: int

    def edit(self, rows: Int[Tensor, " some"]) -> Edit:
        """Of some rows."""
        added = torch.zeros(len(rows), self.columns.shape[1], self.width, dtype=torch.float64)
        for i, row in enumerate(rows.tolist()):
            where = self.columns[row].cpu()
            prompt = self.prompts.tokens[row][self.prompts.mask[row]].tolist()
            noise = noise_of(self.seed, prompt, row % self.samples, int(where.sum()), self.width)
            added[i, where] = self.sigma * noise
        return Edit(full_name("embed"), Add(added))


class _Restorations(Interventions):
    """Interventions on noised prompts, which restore a window of layers."""

    def __init__(self, *run: Any, blur: _Blur, reach: int) -> None:
        super().__init__(*run)
        self.blur, self.reach = blur, reach
        self.mates = _window(self.table, reach)

    def before(self, pairs: Int[Tensor, " row"]) -> list[Edit]:
        return [self.blur.edit(pairs)]

    def lowest(self, layer: int | None) -> int | None:
        return None if layer is None else max(0, layer - self.reach)

    def members(self, nodes: Int[Tensor, " row"]) -> tuple[Int[Tensor, " member"], Int[Tensor, " member"]]:
        mates = self.mates[nodes]
        row, which = (mates != NONE).nonzero(as_tuple=True)
        return row, mates[row, which]

    def together(self, moved: Bool[Tensor, "pair node"]) -> Bool[Tensor, "pair node"]:
        found = torch.zeros_like(moved)
        for mate in self.mates.unbind(1):
            found |= moved[:, mate] & (mate != NONE)
        return found


def _window(table: NodeTable, reach: int) -> Int[Tensor, "node layer"]:
    """For each node of a whole table, itself and the same head or neuron of its place in the layers around it; -1
    beyond the ends."""
    mates = torch.full((len(table), 2 * reach + 1), NONE)
    for _, coords, mine, _ in table.tables.values():
        layers = mine.view(len(coords.get("layer", [NONE])), -1)  # nodes are listed layer by layer
        for shift in range(-reach, reach + 1):
            if abs(shift) < len(layers):
                low, high = max(0, -shift), len(layers) - max(0, shift)
                mates[layers[low:high], shift + reach] = layers[low + shift : high + shift]
    return mates
