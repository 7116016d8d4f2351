"""Tuned lenses: an affine map for each residual stream, trained so that the model's read-out of it predicts what the
model predicts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import ClassVar

import torch
from einops import einsum
from jaxtyping import Bool, Float
from torch import Tensor

from mechattr.base import Artifact
from mechattr.decomposition.logit_lens import streams
from mechattr.decomposition.prompt import prompt_of
from mechattr.decomposition.vocabulary import kl, last_stream, log_probabilities, read_out
from mechattr.errors import MismatchError, SettingError, nearest
from mechattr.labelled import Labelled
from mechattr.models.base import Batch, HookedModel
from mechattr.provenance import JSON, provenance


class TunedLens(Artifact):
    """Translators x -> x + W x + b by residual stream, of one model.

    `tensors` holds `weight` [site, to, from] and `bias` [site, to], and from training `kl/training` [step, site] and,
    with held-out texts, `kl/before` and `kl/after` [site]: KL(model || lens) in nats a token.
    """

    kind: ClassVar[str] = "tuned_lens"

    @property
    def sites(self) -> list[str]:
        """The full names of the streams that are translated."""
        return [str(site) for site in self.tensors["weight"].coords["site"]]

    def translate(self, site: str, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
        """The stream of a site as the last stream; streams without a translator stay as they are."""
        if site not in self.sites:
            return x
        weight, bias = (self.tensors[name].sel(site=site).values.to(x.device) for name in ("weight", "bias"))
        return _translated(x, weight, bias)

    def check(self, model: HookedModel, sites: Sequence[str]) -> None:
        """Whether these are the translators of a model, at these sites.

        Raises:
            MismatchError: they are not.
        """
        own, found = self.provenance.get("weight_hash"), model.fingerprint()["weight_hash"]
        if own != found:
            raise MismatchError(
                f"a tuned lens on {model.info.name!r}",
                f"it was trained on {self.provenance.get('name')!r}, whose weights are others",
                "train one on this model with ma.decomposition.tuned_lens.fit",
            )
        lacking = [site for site in sites if site != last_stream(model) and site not in self.sites]
        if lacking:
            raise MismatchError(f"a tuned lens at {lacking[0]}", "no translator", nearest(lacking[0], self.sites))


def identity(model: HookedModel, sites: str | Sequence[str] | None = None) -> TunedLens:
    """Translators before any training, with which the tuned lens is the logit lens.

    Args:
        model: a hooked model.
        sites: as in `logit_lens`; the last stream needs none.

    Raises:
        SettingError: no site but the last.
    """
    names = [site for site in streams(model, sites) if site != last_stream(model)]
    if not names:
        raise SettingError(f"a tuned lens at {sites!r}", "only the last stream", "name streams before it")
    width = model.info.d_model
    return _lens(model, names, torch.zeros(len(names), width, width), torch.zeros(len(names), width), {}, {})


def fit(
    model: HookedModel,
    texts: Iterable[str],
    *,
    sites: str | Sequence[str] | None = None,
    steps: int = 250,
    batch_size: int = 16,
    max_tokens: int = 128,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.0,
    held_out: Sequence[str] = (),
) -> TunedLens:
    """Trains translators from the identity on: AdamW on

        mean over tokens of KL(softmax(logits) || softmax(unembed(final_norm(x + W x + b)))),

    with the model frozen and each site apart from the others. The learning rate falls linearly to 0.

    Args:
        model: a hooked model.
        texts: read once, a batch at a time, in their order; `itertools.cycle(texts)` goes on with the first.
        sites: as in `logit_lens`; the last stream needs none.
        steps: batches to train on; fewer if the texts end before.
        batch_size: texts a step.
        max_tokens: longer texts are cut there.
        learning_rate: at the start.
        weight_decay: pulls translators to the identity.
        held_out: texts on which the divergence is measured before and after.

    Raises:
        SettingError: no texts, or settings that are no positive numbers.

    Cost: a step takes 1 forward pass of a batch, and for each site one block, the unembedding and its backward pass.
    Held-out texts take the same without backward passes, twice.
    """
    for name, value in (("steps", steps), ("batch_size", batch_size), ("max_tokens", max_tokens)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise SettingError(f"{name}={value!r}", "not a count", "give a whole number from 1")
    if not learning_rate > 0:
        raise SettingError(f"learning_rate={learning_rate!r}", "not positive", "give a small number such as 1e-3")
    if isinstance(texts, str) or isinstance(held_out, str):
        raise SettingError("texts of a tuned lens", "one text", "give a list or another iterable of texts")
    names = identity(model, sites).sites
    bias = torch.zeros(len(names), model.info.d_model, device=model.weight("unembed.W_U").device)
    weight = bias.new_zeros(*bias.shape, model.info.d_model)
    tables = {"kl/before": _measured(model, names, held_out, weight, bias, batch_size, max_tokens)}
    optimiser = torch.optim.AdamW([weight, bias], lr=learning_rate, weight_decay=weight_decay)
    losses, source = [], iter(texts)
    for step in range(steps):
        chunk = list(islice(source, batch_size))
        if not chunk:
            break
        optimiser.param_groups[0]["lr"] = learning_rate * (1 - step / steps)
        weight.grad, bias.grad = torch.zeros_like(weight), torch.zeros_like(bias)
        loss = torch.zeros(len(names))
        for place, seen in enumerate(_seen(model, names, chunk, max_tokens)):
            loss[place], weight.grad[place], bias.grad[place] = _gradients(model, seen, weight[place], bias[place])
        losses.append(loss)
        optimiser.step()
    if not losses:
        raise SettingError("texts of a tuned lens", "none", "give texts like those that the lens is to read")
    tables["kl/training"] = Labelled(torch.stack(losses), ("step", "site"), {"site": names})
    tables["kl/after"] = _measured(model, names, held_out, weight, bias, batch_size, max_tokens)
    settings: dict[str, JSON] = {
        "steps": len(losses), "batch_size": batch_size, "max_tokens": max_tokens, "optimiser": "AdamW",
        "learning_rate": learning_rate, "weight_decay": weight_decay, "n_held_out": len(held_out),
    }  # fmt: skip
    return _lens(model, names, weight, bias, tables, settings)


@dataclass(frozen=True, eq=False, slots=True)
class _Seen:
    """The stream of a site on some texts, and what the model predicted there."""

    x: Float[Tensor, "batch pos d_model"]
    real: Bool[Tensor, "batch pos"]
    log_p: Float[Tensor, "batch pos d_vocab"]

    def divergence(self, logits: Float[Tensor, "batch pos d_vocab"]) -> Float[Tensor, " batch"]:
        """KL(model || lens), summed over real tokens."""
        return kl(self.log_p, log_probabilities(logits)).masked_fill(~self.real, 0).sum(1)


def _seen(model: HookedModel, names: Sequence[str], texts: Sequence[str], max_tokens: int) -> Iterator[_Seen]:
    """Site by site, from one run."""
    whole = prompt_of(model, texts).batch
    batch = Batch.of(whole.tokens[:, :max_tokens], whole.mask[:, :max_tokens])
    run = model.run(batch, record=names)
    log_p = log_probabilities(run.logits)
    for name in names:
        yield _Seen(run.activations[name].values.masked_fill(~batch.mask[..., None], 0), batch.mask, log_p)


def _translated(x: Tensor, weight: Float[Tensor, "to from"], bias: Float[Tensor, " to"]) -> Tensor:
    """x + W x + b in float32 or wider, in the dtype of x."""
    wide = torch.promote_types(x.dtype, weight.dtype)
    return (x.to(wide) + (x.to(wide) @ weight.T.to(wide) + bias.to(wide))).to(x.dtype)


def _gradients(model: HookedModel, seen: _Seen, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The mean divergence over tokens and its gradients: that of y = x + W x + b is the read-out's, by W its product
    with x."""
    run = read_out(model, _translated(seen.x, weight, bias), lambda logits, _: seen.divergence(logits))
    assert run.metric is not None
    by_y, n = run.gradients[last_stream(model)].values.to(weight.dtype), seen.real.sum()
    by_weight = einsum(by_y, seen.x.to(weight.dtype), "b p e, b p d -> e d")
    return run.metric.sum() / n, by_weight / n, by_y.sum((0, 1)) / n


def _measured(
    model: HookedModel,
    names: Sequence[str],
    texts: Sequence[str],
    weight: Tensor,
    bias: Tensor,
    batch_size: int,
    max_tokens: int,
) -> Labelled:
    """Mean divergence over the tokens of held-out texts, by site; NaN without texts."""
    total, n = torch.zeros(len(names)), 0
    for i in range(0, len(texts), batch_size):
        for place, seen in enumerate(_seen(model, names, texts[i : i + batch_size], max_tokens)):
            logits = read_out(model, _translated(seen.x, weight[place], bias[place])).logits
            total[place] += seen.divergence(logits).sum().cpu()
        n += int(seen.real.sum())
    return Labelled(total / n if n else total * torch.nan, ("site",), {"site": names})


def _lens(
    model: HookedModel,
    names: Sequence[str],
    weight: Tensor,
    bias: Tensor,
    tables: Mapping[str, Labelled],
    settings: Mapping[str, JSON],
) -> TunedLens:
    tensors = {
        "weight": Labelled(weight.detach().cpu(), ("site", "to", "from"), {"site": names}),
        "bias": Labelled(bias.detach().cpu(), ("site", "to"), {"site": names}),
        **tables,
    }
    described = provenance({**asdict(model.info), **model.fingerprint()})
    return TunedLens(tensors, settings=settings, provenance=described)
