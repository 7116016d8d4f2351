"""The account of relevance: where a logit went, whether all of it was found, and the tables that say so."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from mechattr.decomposition.prompt import Prompt
from mechattr.decomposition.relevance import VECTORS, Relevance
from mechattr.errors import SelfCheckError
from mechattr.labelled import Labelled
from mechattr.models.base import HookedModel
from mechattr.sites import parse, site_spec

# |residual| over all relevance that was given out, from which on the rules miss a part of the model; rounding of
# float32 stays orders of magnitude below.
_BROKEN = 1e-3


def check_account(model: HookedModel, found: Relevance, components: Mapping[str, Tensor], logit: Tensor) -> None:
    """Whether the components are the logit; in bfloat16 nothing can be said.

    Raises:
        SelfCheckError: they are not.
    """
    if model.info.dtype == "bfloat16":
        return
    residual = logit - _sum(components.values(), logit)
    given_out = found.tables[found.plan.cuts[0]].abs().sum(1) + _sum((x.abs() for x in components.values()), logit)
    wrong = (residual.abs() > _BROKEN * given_out).nonzero()
    if len(wrong):
        row = int(wrong[0, 0])
        missed, whole = float(residual[row]), float(logit[row])
        raise SelfCheckError(
            f"LRP of {model.info.name!r} ({model.info.family})",
            f"tokens, positions, biases and leaks miss {missed:.4g} of a logit of {whole:.4g}",
            "the rules miss a part of this model: use another method, such as attribution_patching",
        )


def tables(
    model: HookedModel, rows: Prompt, found: Relevance, components: Mapping[str, Tensor], logit: Tensor
) -> dict[str, Labelled]:
    """The tables of a result.

    Args:
        model: a hooked model.
        rows: what the entries of all tensors belong to.
        found: relevance.
        components: all that the logit went to.
        logit: what is explained.
    """
    plan = found.plan
    tensors = {"tokens": rows.table(found.tables[plan.cuts[0]], ("pos",))}
    for site in plan.embeddings:
        tensors[f"score/{parse(site)[0]}"] = rows.table(found.tables[site], ("pos",))
    for short in dict.fromkeys(parse(site)[0] for site in plan.kept):
        tensors[f"score/{short}"] = _of_site(model, rows, found, short)
    tensors["components"] = _named(rows, "component", components)
    tensors["ledger"] = _named(rows, "entry", _ledger(components, logit, mixture=model.info.n_experts > 0))
    tensors["conservation"] = _conservation(model.info.n_layers, rows, found, components, logit)
    return tensors


def _of_site(model: HookedModel, rows: Prompt, found: Relevance, short: str) -> Labelled:
    """Relevance at a site, layers first; zero where no pass reached it."""
    names = [site for site in found.plan.kept if parse(site)[0] == short]
    axes = [axis for axis in site_spec(short).axes[1:] if axis not in VECTORS]
    sizes = {**model.info.sizes_at(short), "pos": rows.batch.tokens.shape[1]}
    blank = found.totals[found.plan.end].new_zeros(len(rows), *(sizes[axis] for axis in axes))
    values = [found.tables.get(name, blank) for name in names]
    if not site_spec(short).layered:
        return rows.table(values[0], axes)
    layers = [layer for name in names if (layer := parse(name)[1]) is not None]
    return rows.table(torch.stack(values, 1), ("layer", *axes), layer=layers)


def _ledger(components: Mapping[str, Tensor], logit: Tensor, *, mixture: bool) -> dict[str, Tensor]:
    entries = {"tokens": logit * 0, "positions": logit * 0, "biases": logit * 0, "softmax_leak": logit * 0}
    entries |= {"experts": logit * 0} if mixture else {}
    entries |= {"linear": logit * 0} if any(name.endswith(".linear") for name in components) else {}
    for name, x in components.items():
        entry = name.rpartition(".")[2]
        entries[entry if entry in entries else "biases"] += x
    return entries | {"logit": logit, "residual": logit - _sum(components.values(), logit)}


def _conservation(
    n_layers: int, rows: Prompt, found: Relevance, components: Mapping[str, Tensor], logit: Tensor
) -> Labelled:
    """Relevance of the stream at each cut, beside the logit less all that was taken above it."""
    left, sides = logit, []
    for layer in reversed(range(n_layers + 1)):
        left = left - _sum((x for name, x in components.items() if _layer(name, n_layers) == layer), logit)
        sides.append(torch.stack([found.total(found.plan.cuts[layer]), left], 1))
    return rows.table(torch.stack(sides[::-1], 1), ("cut", "side"), side=("relevance", "accounted"))


def _layer(component: str, n_layers: int) -> int:
    """The block in which a component is, -1 for what enters the first and `n_layers` for the read-out."""
    if component.startswith("blocks."):
        return int(component.split(".")[1])
    return -1 if component in ("tokens", "positions", "embed.rest") else n_layers


def _named(rows: Prompt, axis: str, values: Mapping[str, Tensor]) -> Labelled:
    return rows.table(torch.stack(list(values.values()), 1), (axis,), **{axis: tuple(values)})


def _sum(parts: Iterable[Tensor], like: Tensor) -> Tensor:
    return sum(parts, start=like * 0)
