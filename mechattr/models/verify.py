"""What a hooked model promises, measured on it: its own numbers, and sites that are what their names say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from mechattr.models.base import Batch, HookedModel, Start
from mechattr.models.cross import arguments, generating
from mechattr.models.edits import Edit
from mechattr.models.hf import HookedHF
from mechattr.models.images import marked
from mechattr.models.operators import Add, Set
from mechattr.models.small import small_model
from mechattr.sites import parse

INSIDE = ("attn_scores", "pattern")  # asking for them changes the attention path, within rounding
RESUMMED = (*INSIDE, "result", "expert_out")  # sums over heads or experts are taken in another order
HIDDEN = -1e30  # masked scores are as negative as the dtype goes
STEP = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One promise.

    Attributes:
        name: what was checked.
        error: the largest relative deviation that was found; 0 where every bit was equal.
        limit: what it may be.
        where: the site at which it was largest, if there is one.
    """

    name: str
    error: float
    limit: float
    where: str = ""

    @property
    def passed(self) -> bool:
        """Whether the deviation is within its limit."""
        return self.error <= self.limit


def verify(model: HookedModel) -> tuple[Check, ...]:
    r"""Measures what the hooked-model layer promises, on any model.

    `recording`: recording every site, and an edit that changes nothing, leave the logits as they are; bit for bit where
    no sum is taken in another order. `gradients`: at every site the derivative of a random linear metric $m$ of all
    logits along a direction $d$ is what patching measures,
    $\langle \nabla_x m, d \rangle = \partial_\varepsilon m(x + \varepsilon d)$ by Richardson's central differences.
    `padding`: rows of a batch that is padded give what they give alone. `restart`: a run from a cached residual stream
    is the whole run.

    Args:
        model: best a small one in float64: in narrower dtypes rounding hides the finite differences, and their limit is
            wide.

    Returns:
        One check for each promise.

    Cost:
        10 forward passes of two prompts of five tokens for each site, 3 of three prompts besides, and 1 backward pass.
    """
    wide = model.info.dtype == "float64"
    rows = sample(model, (5, 5))
    # transformers takes softmaxes and norms in float32 whatever the dtype: 6e-8 of a metric, divided by the step
    checks = [_recording(model, rows), _gradients(model, rows, 1e-2 if wide else 0.3)]
    checks += [_padding(model, 1e-5 if wide else 1e-3), _restart(model, rows)]
    return tuple(checks)


def verify_family(name: str) -> tuple[Check, ...]:
    """`verify` on a family's small random model in float64, and what only a transformers model can be held to.

    `logits`: without taps they are those of the model's own call, bit for bit, with eager attention and with sdpa where
    the family has it. `generation`: an edit of strength zero leaves the generated tokens as they are; decoders only.

    Args:
        name: a name of `small_configs()`.

    Raises:
        UnknownNameError: no small model of this name.
    """
    model = HookedHF(small_model(name, torch.float64))
    checks = [_logits(name), *verify(model)]
    return tuple(checks) if model.info.encoder else (*checks, _generation(model))


def _logits(name: str) -> Check:
    errors = {}
    for attention in ("eager", "sdpa"):
        try:
            own = small_model(name, attention=attention)
        except ValueError:  # transformers has no sdpa for this family
            continue
        model = HookedHF(own)
        batch = sample(model, (5, 5))
        with torch.no_grad():
            given = {"input_ids": batch.tokens} if batch.source is None else arguments(batch)
            errors[attention] = _off(model.run(batch).logits, own(**given).logits)
    return _worst("logits", errors, 0.0)


def _generation(model: HookedHF) -> Check:
    batch = sample(model, (5, 5))
    given = {"attention_mask": batch.mask.long()} if batch.source is None else generating(batch)
    own = model.model.generate(batch.prompt.tokens, **given, max_new_tokens=4, do_sample=False)
    edited = model.generate(batch, edits=[Edit("resid_post", Add(0.0))], max_new_tokens=4, do_sample=False).tokens
    same = own.shape == edited.shape and bool((own == edited).all())
    return Check(name="generation", error=0.0 if same else 1.0, limit=0.0)


def sample(model: HookedModel, lengths: Sequence[int]) -> Batch:
    """Rows of random token ids, padded on the right; an encoder's are in the other order, and one longer."""
    batch = _random(model, lengths, seed=0)
    others = [length + 1 for length in reversed(lengths)]
    return replace(batch, source=_random(model, others, seed=3)) if model.info.n_encoder_layers else batch


def _random(model: HookedModel, lengths: Sequence[int], seed: int) -> Batch:
    ids = torch.randint(0, model.info.d_vocab, (len(lengths), max(lengths)), generator=_seeded(seed))
    ids = ids.where(~marked(ids, model.info.image_token), (ids + 1) % model.info.d_vocab)  # text alone
    return Batch.of(ids, torch.arange(max(lengths)) < torch.tensor(lengths)[:, None])


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _probe(logits: Float[Tensor, "batch pos d_vocab"], batch: Batch) -> Float[Tensor, " batch"]:
    """A random linear function of all logits at real tokens, the same for a row however it is padded."""
    weights = torch.randn(64, logits.shape[-1], generator=_seeded(1)).to(logits)
    return (logits * weights[batch.positions.clamp(min=0)] * batch.mask[..., None]).sum((1, 2))


def _off(found: Tensor, wanted: Tensor) -> float:
    """The largest difference, in units of the largest entry."""
    seen = wanted > HIDDEN
    difference = (found - wanted).where(seen, 0).abs().max()
    return float(difference / wanted.where(seen, 0).abs().max().clamp(min=1e-12))


def _worst(name: str, errors: Mapping[str, float], limit: float) -> Check:
    where = max(errors, key=lambda key: errors[key])
    return Check(name=name, error=errors[where], limit=limit, where=where if errors[where] else "")


def _recording(model: HookedModel, batch: Batch) -> Check:
    plain = model.run(batch).logits
    errors: dict[str, float] = {}
    for short in dict.fromkeys(parse(name)[0] for name in model.sites()):
        kept = model.run(batch, record=[short])
        edited = model.run(batch, edits=[Edit(short, Set(kept.activations))])
        error = max(_off(run.logits, plain) for run in (kept, edited))
        errors[short] = 0.0 if short.endswith(RESUMMED) and error < 1e-5 else error
    return _worst("recording", errors, 0.0)


def _gradients(model: HookedModel, batch: Batch, limit: float) -> Check:
    sites, rows = model.sites(), len(batch)
    run = model.run(batch, record=sites, metric=_probe, gradients=sites)
    generator, steps, errors = _seeded(2), (STEP, -STEP, STEP / 2, -STEP / 2), {}
    many = batch.rows(list(range(rows)) * len(steps))
    for name in sites:
        x, gradient = run.activations[name].values, run.gradients[name].values
        noise = torch.randn(x.shape, generator=generator).to(x) * (x > HIDDEN)
        direction = noise / noise.norm() + gradient / gradient.norm().clamp(min=1e-12)
        edits = [
            Edit(name, Add(step * direction), rows=range(i * rows, (i + 1) * rows)) for i, step in enumerate(steps)
        ]
        value = model.run(many, edits=edits, metric=_probe).metric
        assert value is not None  # a metric was given
        a, b, c, d = value.view(len(steps), rows).sum(1).tolist()
        measured, claimed = (4 * (c - d) / STEP - (a - b) / (2 * STEP)) / 3, float((direction * gradient).sum())
        errors[name] = abs(measured - claimed) / max(abs(measured), abs(claimed), 1e-6)
    return _worst("gradients", errors, limit)


def _padding(model: HookedModel, limit: float) -> Check:
    batch, sites = sample(model, (6, 4, 5)), model.sites()
    together = model.run(batch, record=sites, metric=_probe, gradients=sites)
    errors: dict[str, float] = dict.fromkeys(sites, 0.0)
    for row, length in enumerate(batch.lengths.tolist()):
        alone = model.run(trimmed(batch.rows([row])), record=sites, metric=_probe, gradients=sites)
        for name in sites:
            for whole, single in ((together.activations, alone.activations), (together.gradients, alone.gradients)):
                wanted = single[name].values[0]
                part = whole[name].values[row][tuple(slice(0, n) for n in wanted.shape)]
                errors[name] = max(errors[name], _off(part, wanted))
        errors["logits"] = max(errors.get("logits", 0.0), _off(together.logits[row, :length], alone.logits[0]))
    return _worst("padding", errors, limit)


def trimmed(batch: Batch) -> Batch:
    """A row without its padding, which is on the right."""
    n = int(batch.lengths.max())
    source = None if batch.source is None else trimmed(batch.source)
    return replace(batch, tokens=batch.tokens[:, :n], mask=batch.mask[:, :n], source=source)


def _restart(model: HookedModel, batch: Batch) -> Check:
    whole = model.run(batch, record="resid_pre")
    errors = {}
    for layer in range(model.info.n_layers):
        start = Start(layer, whole.activations["resid_pre", layer].values)
        errors[f"blocks.{layer}.hook_resid_pre"] = _off(model.run(batch, start=start).logits, whole.logits)
    return _worst("restart", errors, 0.0)
