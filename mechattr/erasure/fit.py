"""Fitting erasure probes: all layers and offsets together, document by document."""

from __future__ import annotations

import os
import random
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mechattr.engines.linear_probes import Ridge, cross_entropy_gradient, log_probabilities
from mechattr.erasure.documents import WINDOW, check_layers, encoded
from mechattr.erasure.probes import ErasureProbes
from mechattr.erasure.recipes import Closed, Descent, Recipe
from mechattr.erasure.training import Training
from mechattr.erasure.work import Work, losses
from mechattr.errors import SettingError
from mechattr.models.base import HookedModel
from mechattr.provenance import provenance

OFFSETS = (-3, -2, -1, 0, 1)
SAMPLE, PLACES = 8, 16  # documents, and least positions of each, on which closed form is made sharp by one of:
FACTORS = tuple(4.0**power for power in range(7))


def fit_probes(
    model: HookedModel,
    texts: Sequence[str],
    *,
    layers: Sequence[int] | None = None,
    offsets: Sequence[int] = OFFSETS,
    recipe: Recipe | None = None,
    held_out: float = 0.2,
    window: int = WINDOW,
    seed: int = 0,
    batch_size: int = 8,
    progress: bool | None = None,
    resume: str | os.PathLike[str] | None = None,
) -> ErasureProbes:
    """Probes P(token at t + offset | state at t) = softmax(W h) for every layer and offset, W without bias.

    All probes see each document once an epoch, from one forward pass. Documents are cut off at `window` tokens; those
    that are too short for an offset do not count for it. At offset 0 the first token is left out: it is the same in
    every document where the tokenizer begins with one of its own.

    Args:
        model: a hooked model.
        texts: one a document.
        layers: -1 is the embedding, 0 to L - 1 are the blocks, L is what follows the final norm; all of them without.
        offsets: which token is read off, counted from the position of the state.
        recipe: `Closed()` or `Descent()`; `Descent.reference()` has the published settings.
        held_out: the share of documents that is not trained on, and on which losses are measured.
        window: most tokens of a document.
        seed: of which documents are held out, and of their order.
        batch_size: documents of one forward pass.
        progress: `None` shows a bar on a terminal only.
        resume: a file that keeps the state of an interrupted descent after each epoch.

    Returns:
        The probes, with the losses of each epoch in their settings. With one document nothing is held out: a warning
        says so, and `held_out` losses are missing.

    Raises:
        SettingError: layers, offsets, a recipe or texts that do not fit; an offset without any data.
        MismatchError: `resume` belongs to other work.

    Cost:
        1 forward pass a document and epoch (1 epoch in closed form), whatever the number of probes; and for each
        probe, position and epoch 6 d_vocab d_model operations by descent, d_model^2 in closed form.

    References:
        Feucht, Atkinson, Wallace, Bau (2024), Token Erasure as a Footprint of Implicit Vocabulary Items in LLMs,
        arXiv 2406.20086.
    """
    chosen, recipe = check_layers(model, layers), Descent() if recipe is None else recipe
    offsets = check_offsets(offsets)
    if not isinstance(recipe, Closed | Descent):
        raise SettingError(f"recipe={recipe!r}", f"a {type(recipe).__name__}", "give Closed(...) or Descent(...)")
    if not 0 <= held_out < 1:
        raise SettingError(f"held_out={held_out!r}", "no share", "give a share of the documents below 1")
    rows = [row for row in encoded(model, texts, window) if row]
    if not rows:
        raise SettingError("texts", "none with a token", "give at least one text that is not empty")
    work = Work(model, rows, chosen, offsets, held_out=held_out, seed=seed, batch_size=batch_size, progress=progress)
    if held_out and not work.test:
        warnings.warn("one document: nothing is held out, so that no held-out loss is known", stacklevel=2)
    weights, lost = _closed(work, recipe) if isinstance(recipe, Closed) else _descent(work, recipe, resume)
    settings: dict[str, Any] = {
        "method": "fit_probes",
        "recipe": {"kind": type(recipe).__name__.lower(), **asdict(recipe)},
        "layers": list(chosen),
        "offsets": list(offsets),
        "window": window,
        "n_documents": {"train": len(work.train), "held_out": len(work.test)},
        "seed": seed,
        "losses": lost,
    }
    made = provenance({**asdict(model.info), **model.fingerprint()}, seed=seed, tokens=work.tokens)
    by_layer = dict(zip(chosen, weights.unflatten(0, (len(chosen), len(offsets))), strict=True))
    return ErasureProbes.of(by_layer, offsets, settings=settings, provenance=made)


def check_offsets(offsets: Sequence[int]) -> tuple[int, ...]:
    """The offsets of probes.

    Raises:
        SettingError: none, one twice, or something else than whole numbers.
    """
    given = tuple(offsets)
    if not given or len(set(given)) < len(given) or not all(type(offset) is int for offset in given):
        raise SettingError(f"offsets={given}", "none, one twice, or no whole numbers", "give some, such as (-2, -1, 0)")
    return given


def _closed(work: Work, recipe: Closed) -> tuple[Tensor, list[dict[str, Any]]]:
    info = work.model.info
    device = work.model.weight("embed.W_E").device
    ridge = Ridge.empty(work.n_probes, info.d_vocab, info.d_model, device=device)
    for document in work.documents(work.train, "fitting probes"):
        ridge.add(*work.stacked(document))
    weights = ridge.solve(recipe.alpha).float()
    weights = weights * _sharpness(work, weights)[:, None, None]
    return weights, losses(work, weights, epoch=1, train=None)


def _sharpness(work: Work, weights: Float[Tensor, "probe vocab d_model"]) -> Float[Tensor, " probe"]:
    """The factor, a power of 4, at which each probe's softmax fits some of the documents best: what ridge regression
    predicts lies between 0 and 1, so that its softmax as it is would be nearly flat."""
    parts = []
    for document in work.documents(work.train[:SAMPLE], "sharpness"):
        some = slice(None, None, max(1, len(document.tokens) // PLACES))
        parts.append([x[:, some] for x in work.stacked(document)])
    states, labels, kept = (torch.cat(columns, 1) for columns in zip(*parts, strict=True))
    best = []
    for w, h, y, k in zip(weights, states.to(weights.dtype), labels, kept.to(weights.dtype), strict=True):
        found = [log_probabilities(w[None], h[None] * factor, y[None])[0] for factor in FACTORS]
        best.append(torch.stack([(k * x).sum() for x in found]).argmax())
    return weights.new_tensor(FACTORS)[torch.stack(best)]


def _descent(work: Work, recipe: Descent, resume: str | os.PathLike[str] | None) -> tuple[Tensor, list[dict[str, Any]]]:
    state = Training.begin(work, recipe, resume)
    while state.epoch < recipe.epochs:
        order = list(work.train)
        random.Random(f"{work.seed} {state.epoch}").shuffle(order)
        loss, seen = (state.weights.new_zeros(work.n_probes) for _ in range(2))
        for number, document in enumerate(work.documents(order, f"epoch {state.epoch + 1} of {recipe.epochs}"), 1):
            states, labels, kept = work.stacked(document)
            some = kept.sum(-1, keepdim=True)
            kept = (kept / some.clamp(min=1)).float()
            inputs = states.float() / state.scale
            here, _ = cross_entropy_gradient(state.weights, inputs, labels, kept, into=state.gradient)
            state.waiting += 1
            loss, seen = loss + here, seen + (some[:, 0] > 0)
            if state.waiting == recipe.documents or (recipe.flush and number == len(order)):
                state.step()
        state.epoch += 1
        state.losses += losses(work, state.weights / state.scale, epoch=state.epoch, train=loss / seen.clamp(min=1))
        state.settle()
        if resume is not None:
            state.write(resume)
    return state.weights / state.scale, state.losses
