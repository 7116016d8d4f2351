"""What of a backward pass under rules belongs to tokens, positions, biases and leaks: relevance is activation times
gradient, and that of a bias the bias times the gradient where it enters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from mechattr.models.base import HookedModel
from mechattr.models.norms import Norm
from mechattr.sites import full_name, site_spec

VECTORS = ("d_model", "d_head")  # axes that one relevance is the sum over

# The bias that enters at a site, by short name.
_ENTERS = {"q": "attn.b_Q", "k": "attn.b_K", "v": "attn.b_V", "attn_out": "attn.b_O", "mlp_out": "mlp.b_out"}


@dataclass(frozen=True, eq=False, slots=True)
class Difference:
    """What relevance loses between two places: at one site, less what arrives at others."""

    above: str
    below: tuple[str, ...]


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class Plan:
    """What is looked at in a backward pass, by the name of the component that it is.

    Attributes:
        biases: site -> name -> bias, where a bias is not zero.
        differences: leaks, and biases that enter behind a norm, by name.
        embeddings: of the sites `embed` and `pos_embed`, those that the model has.
        cuts: the residual stream before each block, and after the last.
        end: where the read-out begins: the last norm's output, or the last residual stream.
        kept: sites whose relevance is wanted in full.
    """

    biases: Mapping[str, Mapping[str, Tensor]]
    differences: Mapping[str, Difference]
    embeddings: tuple[str, ...]
    cuts: tuple[str, ...]
    end: str
    kept: tuple[str, ...]

    @property
    def tables(self) -> frozenset[str]:
        """Sites whose relevance is kept for each position."""
        return frozenset((*self.kept, *self.embeddings, self.cuts[0]))

    @property
    def totals(self) -> frozenset[str]:
        """Sites whose relevance is wanted as a whole."""
        parts = (site for d in self.differences.values() for site in (d.above, *d.below))
        return frozenset((*parts, *self.cuts, self.end, *self.tables))

    def sites(self, model: HookedModel) -> list[str]:
        """All that the backward pass visits, in the order of the forward pass."""
        wanted = self.totals.union(self.biases)
        return [site for site in model.sites() if site in wanted]


def plan_of(model: HookedModel, *, kept: Iterable[str], leaks: bool) -> Plan:
    """What to look at in a model.

    Args:
        model: a hooked model.
        kept: full names of sites whose relevance is wanted.
        leaks: whether relevance flows through attention patterns.
    """
    info, have = model.info, frozenset(model.sites())
    biases: dict[str, dict[str, Tensor]] = {}
    differences: dict[str, Difference] = {}

    def enters(site: str, name: str, bias: Tensor | None) -> None:
        if bias is not None and bool(bias.any()):
            biases.setdefault(site, {})[name] = bias

    for layer in range(info.n_layers):
        at = {short: full_name(short, layer) for short in (*_ENTERS, "z", "rot_q", "rot_k", "ln1", "ln2", "mlp_post")}
        p = f"blocks.{layer}."
        for short, name in _block_biases(model).items():
            if full_name(short, layer) in have:
                enters(full_name(short, layer), p + name, model.weight(p + name))
        for ln, write, inner in (("ln1", "attn_out", "z"), ("ln2", "mlp_out", "mlp_post")):
            if info.post_norm:
                site = at["ln1"] if ln == "ln1" else full_name("resid_post", layer)
                enters(site, f"{p}{ln}_post.b", _bias(model.norm(f"{p}{ln}_post")))
                continue
            if at[ln] in have:
                enters(at[ln], f"{p}{ln}.b", _bias(model.norm(p + ln)))
            behind = model.norm(f"{p}{ln}_post")
            if behind is None:
                continue
            own = biases.pop(at[write], {})  # the projection's bias goes through the norm behind it
            if at[inner] in have and (own or behind.bias is not None):
                differences[f"{p}{ln}_post.b"] = Difference(at[write], (at[inner],))
        if leaks and at["rot_q"] in have:
            differences[f"{p}attn.softmax_leak"] = Difference(at["z"], (at["v"], at["rot_q"], at["rot_k"]))
        if info.n_experts and at["ln2"] in have:
            differences[f"{p}mlp.experts"] = Difference(at["mlp_out"], (at["ln2"],))
    last = full_name("resid_post", info.n_layers - 1)
    end = "ln_final.hook_out" if "ln_final.hook_out" in have else last
    if end != last:
        enters(end, "ln_final.b", _final_bias(model))
    return Plan(
        biases=biases,
        differences=differences,
        embeddings=tuple(site for site in ("hook_embed", "hook_pos_embed") if site in have),
        cuts=(*(full_name("resid_pre", layer) for layer in range(info.n_layers)), last),
        end=end,
        kept=tuple(kept),
    )


@dataclass(eq=False, slots=True)
class Relevance:
    """What backward passes brought, one entry a row; what no pass reached is missing.

    Attributes:
        plan: what is looked at.
        tables: relevance by site, with the site's axes but those of vectors.
        totals: relevance of a whole site.
        biases: relevance of each bias.
    """

    plan: Plan
    tables: dict[str, Tensor] = field(default_factory=dict)
    totals: dict[str, Tensor] = field(default_factory=dict)
    biases: dict[str, Tensor] = field(default_factory=dict)

    def visit(self, site: str, x: Tensor, gradient: Tensor) -> None:
        """Takes what is looked at from the gradient at a site; in float32 or wider."""
        wide = torch.promote_types(x.dtype, torch.float32)
        if site in self.plan.biases:
            over_positions = gradient.sum(1, dtype=wide)
            for name, bias in self.plan.biases[site].items():
                self.biases[name] = (over_positions * bias.to(wide)).flatten(1).sum(1)
        if site in self.plan.totals:
            product = x.to(wide) * gradient.to(wide)
            if site in self.plan.tables:
                axes = site_spec(site).axes
                vector = [place for place, axis in enumerate(axes) if axis in VECTORS]
                product = self.tables[site] = product.sum(vector) if vector else product
            self.totals[site] = product.flatten(1).sum(1)

    def total(self, site: str) -> Tensor:
        """Relevance of a whole site, zero where no pass reached it."""
        found = self.totals.get(site)
        return torch.zeros_like(self.totals[self.plan.end]) if found is None else found

    def components(self, *, absorbed: bool = False) -> dict[str, Tensor]:
        """Relevance by component: token and position embeddings, what else enters the first block, biases and leaks of
        the blocks and of the last norm; and if wanted what is absorbed in each block beside them."""
        found = {}
        names = {"hook_embed": "tokens", "hook_pos_embed": "positions"}
        for site in self.plan.embeddings:
            found[names[site]] = self.total(site)
        found["embed.rest"] = self.total(self.plan.cuts[0]) - sum(found.values(), start=torch.zeros(()))
        for site_biases in self.plan.biases.values():
            for name in site_biases:
                found[name] = self.biases.get(name, self.total(self.plan.end) * 0)
        for name, difference in self.plan.differences.items():
            found[name] = self.total(difference.above) - sum(map(self.total, difference.below), start=torch.zeros(()))
        for layer, (below, above) in enumerate(pairwise(self.plan.cuts) if absorbed else ()):
            inside = (x for name, x in found.items() if name.startswith(f"blocks.{layer}."))
            through = self.total(above) - self.total(below)
            found[f"blocks.{layer}.linear"] = through - sum(inside, start=torch.zeros(()))
        return found


def _block_biases(model: HookedModel) -> dict[str, str]:
    """The names of a block's biases by the short name of the site at which they enter."""
    if model.info.n_experts:  # those of experts are inside
        return {short: name for short, name in _ENTERS.items() if short != "mlp_out"}
    if model.info.gated:
        return {**_ENTERS, "mlp_pre": "mlp.b_gate", "mlp_pre_linear": "mlp.b_in"}
    return {**_ENTERS, "mlp_pre": "mlp.b_in"}


def _bias(norm: Norm | None) -> Tensor | None:
    return None if norm is None else norm.bias


def _final_bias(model: HookedModel) -> Tensor | None:
    return None if model.info.post_norm else _bias(model.norm("ln_final"))
