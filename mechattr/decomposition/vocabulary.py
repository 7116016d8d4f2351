"""Residual streams read as predictions: the model's own final norm and unembedding, piece by piece."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechattr.models.base import Batch, HookedModel, Metric, Run, Start
from mechattr.models.edits import Edit
from mechattr.models.operators import Set
from mechattr.sites import full_name

AT_ONCE = 2**25  # logits of one piece


def last_stream(model: HookedModel) -> str:
    """The full name of the stream that the final norm reads."""
    return full_name("resid_post", model.info.n_layers - 1)


def read_out(model: HookedModel, stream: Float[Tensor, "batch pos d_model"], metric: Metric | None = None) -> Run:
    """A run whose last residual stream is given: its logits are unembed(final_norm(stream)) by the model's modules.

    The last block runs, too, and what it writes is replaced. With a metric the run has its gradient at `last_stream`.
    """
    last = last_stream(model)
    batch = Batch.of(torch.zeros(stream.shape[:2], dtype=torch.long, device=stream.device))  # tokens are not read
    start, edits = Start(model.info.n_layers - 1, stream), [Edit(last, Set(stream))]
    return model.run(batch, start=start, edits=edits, metric=metric, gradients=() if metric is None else last)


def pieces(rows: int, columns: int, d_vocab: int) -> Iterator[tuple[slice, slice]]:
    """Rows and columns whose logits are made together: whole rows where they fit, else stretches of one."""
    wide = max(1, min(columns, AT_ONCE // d_vocab))
    high = max(1, AT_ONCE // (d_vocab * columns))
    for row in range(0, rows, high):
        for column in range(0, columns, wide):
            yield slice(row, row + high), slice(column, column + wide)


def summary(
    logits: Float[Tensor, "batch pos d_vocab"],
    log_q: Float[Tensor, "batch pos d_vocab"],
    k: int,
    ids: Int[Tensor, " batch"] | None,
    foils: Int[Tensor, " batch"] | None,
) -> dict[str, Float[Tensor, "batch pos ..."]]:
    """What is kept of logits: KL to the prediction q, the k likeliest tokens, and where a target stands."""
    logits = logits.to(log_q.dtype)
    log_p = logits.log_softmax(-1)
    top = log_p.topk(k)
    found = {
        "score/kl": kl(log_p, log_q),
        "top/token": top.indices,
        "top/probability": top.values.exp(),
    }
    if ids is None:
        return found

    def of(x: Tensor, tokens: Tensor) -> Tensor:
        return x.gather(-1, tokens[:, None, None].expand(-1, x.shape[1], -1))

    logit = of(logits, ids)
    found["score/logit"] = (logit if foils is None else logit - of(logits, foils))[..., 0]
    found["score/probability"] = of(log_p, ids)[..., 0].exp()
    found["score/rank"] = 1 + (logits > logit).sum(-1).to(logits.dtype)
    return found


def log_probabilities(logits: Float[Tensor, "... d_vocab"]) -> Float[Tensor, "... d_vocab"]:
    """Log-softmax in float32 or wider."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def kl(log_p: Float[Tensor, "... d_vocab"], log_q: Float[Tensor, "... d_vocab"]) -> Float[Tensor, "..."]:
    """KL(p || q) in nats, 0 where they are the same to the last bit."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)
