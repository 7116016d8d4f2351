"""GrAInS: the tokens that carry a preference, found by gradients, say which differences of states make the vector."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Size, Tensor

from mechattr.engines.moments import Moments
from mechattr.errors import SettingError, UnknownNameError, nearest
from mechattr.models.base import HookedModel
from mechattr.models.halving import Halving
from mechattr.steering.data import POSITIONS, Sites, check_positions, chosen_sites, picked, shape_at
from mechattr.steering.made import made
from mechattr.steering.numbers import check_count
from mechattr.steering.preference import TokenScores, Triples, checked, token_scores
from mechattr.steering.removal import ABLATIONS, Removal
from mechattr.steering.vector import SteeringVector

CHOICES = {
    "mode": ("both", "pos", "neg"),
    "reduce": ("mean", "pca_uncentered"),
    "ablate": ABLATIONS,
    "modality": ("all", "image", "text"),
}
ROWS = 6  # of a triple: two sequences, each as it is, without its positive and without its negative tokens


def grains(
    model: HookedModel,
    triples: Triples,
    *,
    layers: Sequence[int] | None = None,
    sites: Sites = None,
    k: int = 10,
    positions: str | int = "last",
    seed: int = 0,
    mode: str = "both",
    reduce: str = "mean",
    ablate: str = "mean_embed",
    special: bool = False,
    modality: str = "all",
    target: str = "sequence",
    baseline: str | int | Tensor = "mean",
    steps: int = 20,
    rule: str = "gauss_legendre",
    tolerance: float | None = None,
    batch_size: int = 32,
) -> SteeringVector:
    """v = v(positive tokens) - v(negative tokens), where v(S) is the mean of h - h without the tokens S over both
    sequences of all triples: prompt with preferred and prompt with dispreferred answer.

    Integrated gradients score each token of a sequence by what it adds to log p(preferred) - log p(dispreferred). The
    positive tokens of a sequence are its k largest scores above 0, the negative ones its k smallest below 0.

    Args:
        model: a causal language model.
        triples: (prompt, preferred answer, dispreferred answer); see `mechattr.steering.token_scores`.
        layers: blocks whose output (`resid_post`, so before the final norm) is steered; or
        sites: sites by name, or nodes.
        k: tokens of a sequence and sign; all that there are, where there are fewer.
        positions: where h is read: at the `"last"` token, where the answer has been read; at `"prompt_last"`, the
            prompt's last token, where the answer is decided, with only tokens of the prompt among the k; the `"mean"`;
            or one position.
        seed: nothing is drawn here; kept for one signature of all builders.
        mode: `"both"`, or one of the two terms: `"pos"` is v(positive tokens), `"neg"` is -v(negative tokens).
        reduce: the `"mean"`, or `"pca_uncentered"`: the first principal component of the differences, which are not
            centred, with the sign of their mean and the length of the mean's projection on it.
        ablate: how a sequence loses tokens: `"mean_embed"` gives them the mean of all embeddings, and those of an image
            the mean of its own; `"zero_embed"` gives them zeros, `"pad"` the padding token (else the unknown one), and
            `"attn_mask"` hides them from all other tokens.
        special: whether special tokens, such as a first one, can be among the k; tokens of an image always can.
        modality: which tokens can be: `"all"`, those of an `"image"`, or those of `"text"`.
        target, baseline, steps, rule, tolerance: of `mechattr.steering.token_scores`.
        batch_size: rows of a forward pass; halved when memory runs out.

    Raises:
        SettingError: triples, layers, positions or k that do not fit; one triple with `"pca_uncentered"`; no padding
            token, or one in place of image tokens; no images; no token with a score of the sign that the mode needs.
        UnknownNameError: no such mode, reduction, ablation, modality, target, rule or baseline.
        UnknownSiteError: a site that the model does not have.
        UnsupportedFeatureError: a model that does not predict next tokens, or images for one that reads none.

    Cost:
        2 `steps` forward and backward passes and 10 forward passes a triple.

    References:
        Nguyen, Prasad, Stengel-Eskin, Bansal (2025), GrAInS, arXiv 2507.18043.
    """
    names = chosen_sites(model, layers, sites)
    check_positions(positions, (*POSITIONS, "prompt_last"))
    _check(k, {"mode": mode, "reduce": reduce, "ablate": ablate, "modality": modality})
    given, removal = checked(triples), Removal.of(model, ablate)
    _check_images(any(images for *_, images in given), ablate, modality)
    scores = token_scores(
        model, given, target=target, baseline=baseline, steps=steps, rule=rule, tolerance=tolerance,
        batch_size=batch_size,
    )  # fmt: skip
    if reduce != "mean" and len(scores) == 1:
        raise SettingError(f"reduce={reduce!r}", "one triple", "use reduce='mean', or more triples")
    hits = _hits(model, scores, k, mode, special, modality, before=positions == "prompt_last")
    moments, lengths = _differences(model, scores, hits, names, positions, removal, batch_size, reduce != "mean")
    directions = {
        name: sum((sign * _reduced(moments[name, sign], reduce) for sign in hits), torch.zeros(()).double())
        for name in names
    }
    return made(
        model, "grains", directions, sites, seed, positions=positions, n_pairs=len(scores), lengths=lengths,
        k=k, mode=mode, reduce=reduce, ablate=ablate, special=special, modality=modality, target=target,
        steps=steps, rule=rule, baseline="tensor" if isinstance(baseline, Tensor) else baseline,
        n_ablated={"pos" if sign > 0 else "neg": int(found.any(1).sum()) for sign, found in hits.items()},
        largest_gap=float(scores.gap.abs().max()),
        passes={"forward": scores.passes[0] + (2 + 2 * len(hits)) * len(scores), "backward": scores.passes[1]},
    )  # fmt: skip


def _hits(
    model: HookedModel, scores: TokenScores, k: int, mode: str, special: bool, modality: str, *, before: bool
) -> dict[int, Bool[Tensor, "row pos"]]:
    """The tokens that are taken away, by sign; `before` the answer only, where its tokens come behind what is read."""
    batch = scores.batch
    image = torch.zeros_like(batch.mask) if batch.image is None else batch.image
    allowed = {"all": batch.mask, "image": image, "text": batch.mask & ~image}[modality]
    if not special:
        marked = torch.tensor(list(model.tokenizer.all_special_ids), dtype=torch.long, device=batch.device)
        allowed = allowed & (image | ~torch.isin(batch.tokens, marked))
    if before:
        allowed = allowed & (batch.positions < scores.starts[:, None])
    signs = {"pos": [1], "neg": [-1], "both": [1, -1]}[mode]
    hits = {sign: scores.top(k, sign, allowed) for sign in signs}
    if not any(bool(found.any()) for found in hits.values()):
        found = "no token with a score of the sign that it needs"
        raise SettingError(f"mode={mode!r}", found, "use mode='both', or prompts that say what is preferred")
    return hits


def _differences(
    model: HookedModel,
    scores: TokenScores,
    hits: dict[int, Bool[Tensor, "row pos"]],
    names: Sequence[str],
    positions: str | int,
    removal: Removal,
    batch_size: int,
    scatter: bool,
) -> tuple[dict[tuple[str, int], Moments], dict[str, float]]:
    """The moments of h - h without the tokens, by site and sign, and the mean length of h, by site."""
    n, batch = len(scores), scores.batch
    moments = {(x, s): Moments(Size(shape_at(model, x)).numel(), scatter=scatter) for x in names for s in hits}
    lengths = {name: Moments(1, scatter=False) for name in names}
    none = torch.zeros_like(batch.mask)

    def states(triples: Sequence[int]) -> list[list[Tensor]]:
        """For each triple, [variant x side, d] at each site, the whole sequences first."""
        rows = torch.tensor([row for i in triples for row in (i, n + i)], device=batch.device)
        part = batch.rows(rows.repeat(1 + len(hits))).shortened()
        gone = torch.cat([found[rows] for found in (none, *hits.values())])[:, : part.tokens.shape[1]]
        part, edits = removal(part, gone)
        cache = model.run(part, record=names, edits=edits).activations
        where = scores.starts[part.example] - 1 if positions == "prompt_last" else positions
        found = [picked(cache[name].values, part, where).flatten(1) for name in names]
        split = [x.reshape(1 + len(hits), len(triples), 2, -1).transpose(0, 1).flatten(1, 2) for x in found]
        return [[x[j] for x in split] for j in range(len(triples))]

    halving = Halving(max(1, batch_size // ROWS))
    for begin in range(0, n, halving.size):
        triples = range(begin, min(n, begin + halving.size))
        for i, at_sites in zip(triples, halving(triples, states), strict=True):
            for name, x in zip(names, at_sites, strict=True):
                whole, *ablated = x.split(2)
                lengths[name].add(whole.norm(dim=-1, keepdim=True))
                for (sign, found), other in zip(hits.items(), ablated, strict=True):
                    some = found[[i, n + i]].any(1).to(x.device)
                    moments[name, sign].add((whole.double() - other.double())[some])
    return moments, {name: float(m.mean) for name, m in lengths.items()}


def _reduced(m: Moments, reduce: str) -> Float[Tensor, " d"]:
    if reduce == "mean" or not m.n:
        return m.mean
    first = torch.linalg.eigh(m.uncentred).eigenvectors[:, -1]
    return first * (first @ m.mean)


def _check(k: Any, given: dict[str, str]) -> None:
    check_count("k", k)
    for name, value in given.items():
        if value not in CHOICES[name]:
            raise UnknownNameError(f"{name}={value!r}", "no such choice", nearest(str(value), CHOICES[name]))


def _check_images(given: bool, ablate: str, modality: str) -> None:
    if modality == "image" and not given:
        raise SettingError("modality='image'", "triples without images", "give each triple its image, or leave it out")
    if given and ablate == "pad" and modality != "text":
        fix = "use ablate='mean_embed', or modality='text'"
        raise SettingError("ablate='pad'", "image tokens, for which no token of text can stand", fix)
